"""Assemble what a pull request to PEFT would add, from src/curlora; docs/upstream.md.

    python upstream/make.py DIRECTORY            DIRECTORY/src/peft/tuners/curlora and DIRECTORY/tests/test_curlora.py
    python upstream/make.py DIRECTORY --into     the same into a checkout of PEFT, and the lines that register it

The files are those of the tuner with other imports, without what PEFT would not take: Triton kernels, the ledger of
budgets, the model card's words on importing curlora, and the changes to PEFT's own objects that a plug-in needs. The
script stops with an error if a source file lacks something that it expects to replace.
"""

import argparse
import ast
import bisect
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src" / "curlora"
TUNER = (
    "basis", "config", "fingerprint", "format", "layer", "linear", "linking_matrix", "loading", "merging",
    "mixed_batch", "model", "param_wrapper", "sharded", "weight", "weighted",
)  # fmt: skip
BESIDE = ("functional", "sampling")
# Names, by file: statements that mention them are left out.
LEFT_OUT = {
    "functional": {"kernels", "chosen", "_kernel_backward"},
    "config": {"LEDGER_NAME", "_HOW_TO_LOAD", "beside", "card", "_SAVED_TYPE", "written"},
}
# Where PEFT's own modules have what `from peft import` gives to others.
HOMES = {"PeftConfig": "peft.config", "PeftType": "peft.utils"}
# What the text says of this package, and what it says instead.
WORDS = [
    ("curlora.Curlora", "peft.Curlora"),
    ("this curlora reads", "this PEFT reads"),
    ('update "\n                "curlora to load it."', 'update "\n                "PEFT to load it."'),
    (" :func:`curlora.convert_to_lora` is exact and faster.", ""),
    (', as CURLoRA or as "\n            "LoRA (curlora.save_as_lora)."', '."'),
    (" It is the reference for the kernels, and it runs wherever", ""),
    ("\n:func:`curlora.kernels.chosen` does not choose a kernel.", ""),
    ("curlora.tuner.", "peft.tuners.curlora."),
    ("curlora.sampling", "peft.tuners.curlora.sampling"),
]  # fmt: skip
LICENSE = "# SPDX-License-Identifier: Apache-2.0\n"
INIT = f"""{LICENSE}
from peft.utils import register_peft_method

from .config import CurloraConfig
from .layer import CurloraLayer
from .model import CurloraModel


__all__ = ["CurloraConfig", "CurloraLayer", "CurloraModel"]

register_peft_method(name="curlora", config_cls=CurloraConfig, model_cls=CurloraModel)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--into", action="store_true", help="the directory is a checkout of PEFT: register the method")
    arguments = parser.parse_args()
    package = arguments.directory / "src" / "peft"
    assemble(package / "tuners" / "curlora")
    test = arguments.directory / "tests" / "test_curlora.py"
    test.parent.mkdir(parents=True, exist_ok=True)
    test.write_text((HERE / "tests" / "test_curlora.py").read_text(encoding="utf-8"))
    tidy(arguments.directory, package / "tuners" / "curlora", test)
    if arguments.into:
        register(package)


def assemble(folder):
    """Write the tuner's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: SOURCE / "tuner" / f"{name}.py" for name in TUNER} | {n: SOURCE / f"{n}.py" for n in BESIDE}
    written = {name: without(path.read_text(encoding="utf-8"), LEFT_OUT.get(name, set()), path)
               for name, path in files.items()}  # fmt: skip
    used = {
        name for text in written.values() for name in re.findall(r"^from curlora\._compat import (.*)$", text, re.M)
    }
    written["_compat"] = reduced(SOURCE / "_compat.py", {name for line in used for name in line.split(", ")})
    for name, text in written.items():
        (folder / f"{name}.py").write_text(LICENSE + with_imports(text, name), encoding="utf-8")
    (folder / "__init__.py").write_text(INIT, encoding="utf-8")
    everything = "".join(written[name] for name in sorted(written))
    for old, _ in WORDS:
        if old not in everything:
            raise SystemExit(f"no file says {old!r} any more: see WORDS in {__file__}")
    for path in folder.glob("*.py"):
        if re.search(r"(?<!tuners\.)\bcurlora\.\w|^\s*(from|import) curlora\b", path.read_text(encoding="utf-8"), re.M):
            raise SystemExit(f"{path} still names or imports curlora")


def tidy(directory, *paths):
    """Remove imports that nothing uses any more, and format, by the checkout's own configuration if there is one."""
    own = directory / "pyproject.toml"
    options = ["--config", own] if own.exists() else ["--isolated", "--line-length", "119"]
    for command in (["check", "--fix", "--quiet", "--select", "F401,F841,I,RUF100"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *options, *paths], check=True)


def without(text, names, path):
    """Return ``text`` without the statements that mention ``names`` and the comments right above them."""
    lines, gone, found = text.splitlines(keepends=True), set(), set()

    def spoken_of(node):
        words = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        words |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        words |= {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}
        words |= {alias.name for n in ast.walk(node) if isinstance(n, ast.ImportFrom | ast.Import) for alias in n.names}
        return words & names

    def visit(body):
        for node in body:
            inner = [getattr(node, part, []) for part in ("body", "orelse", "finalbody")]
            head = [child for child in ast.iter_child_nodes(node) if not any(child in part for part in inner)]
            if not isinstance(inner[0], list) or not any(inner):
                head = [node]
            if isinstance(node, ast.FunctionDef) and node.name in names:
                head = [node]
            here = set().union(*map(spoken_of, head)) if head else set()
            if here:
                found.update(here)
                first = node.lineno - 1
                while lines[first - 1].lstrip().startswith("#") and indent(lines[first - 1]) == indent(lines[first]):
                    first -= 1
                gone.update(range(first, node.end_lineno))
            else:
                for part in inner:
                    visit(part)

    visit(ast.parse(text).body)
    if found != names:
        raise SystemExit(f"{path} no longer mentions {', '.join(sorted(names - found))}: see LEFT_OUT in {__file__}")
    return "".join(line for i, line in enumerate(lines) if i not in gone)


def indent(line):
    return len(line) - len(line.lstrip())


def reduced(path, wanted):
    """Return a module reduced to the requested functions and everything that they use."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    kept, queue = set(), sorted(wanted)
    while queue:
        if (name := queue.pop()) not in kept:
            kept.add(name)
            queue += [n.id for n in ast.walk(functions[name]) if isinstance(n, ast.Name) and n.id in functions]
    lines = text.splitlines(keepends=True)
    for node in reversed(tree.body):
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if is_all or (isinstance(node, ast.FunctionDef) and node.name not in kept):
            del lines[node.lineno - 1 : node.end_lineno]
    first = tree.body[0]
    docstring = '"""What depends on private names of other libraries, each with what happens where it is gone."""\n'
    return docstring + "".join(lines[first.end_lineno :])


def with_imports(text, name):
    def from_peft(match):
        names = [part.strip() for part in match[1].split(",")]
        return "\n".join(f"from {HOMES[part]} import {part}" for part in names)

    for pattern, new in (
        (r"^from curlora\.(?:tuner\.)?(\w+) import", r"from .\1 import"),
        (r"^from curlora import", "from . import"),
        (r"^from peft import ([\w, ]+)$", from_peft),
    ):
        text = re.sub(pattern, new, text, flags=re.M)
    for old, new in WORDS:
        text = text.replace(old, new)
    return text


def register(package):
    """Add to PEFT's own files the lines that register the method."""
    types = package / "utils" / "peft_types.py"
    text = types.read_text(encoding="utf-8")
    types.write_text(after(r'^    VERA = "VERA"\n', '    CURLORA = "CURLORA"\n', text, types), encoding="utf-8")
    for path, opening in (
        (package / "tuners" / "__init__.py", None),
        (package / "__init__.py", r"^from \.tuners import \(\n"),
    ):
        text = path.read_text(encoding="utf-8")
        if opening is None:
            line = "from .curlora import CurloraConfig, CurloraModel\n"
            later = next(m for m in re.finditer(r"^from \.(\w+) import", text, re.M) if m[1] > "curlora")
            text = text[: later.start()] + line + text[later.start() :]
        else:
            text = listed(opening, "    {},\n", text, path)
        path.write_text(listed(r"^__all__ = \[\n", '    "{}",\n', text, path), encoding="utf-8")


def after(pattern, line, text, path):
    match = re.search(pattern, text, re.M)
    if match is None:
        raise SystemExit(f"{path} has no {pattern!r}: this PEFT is laid out in another way")
    return text[: match.end()] + line + text[match.end() :]


def listed(opening, form, text, path):
    """Return ``text`` with the two public classes inserted alphabetically into a list with one name per line."""
    match = re.search(opening, text, re.M)
    if match is None:
        raise SystemExit(f"{path} has no {opening!r}: this PEFT is laid out in another way")
    end = match.end() + re.search(r"^[\])]", text[match.end() :], re.M).start()
    lines = text[match.end() : end].splitlines(keepends=True)
    for name in ("CurloraConfig", "CurloraModel"):
        lines.insert(bisect.bisect(lines, form.format(name)), form.format(name))
    return text[: match.end()] + "".join(lines) + text[end:]


if __name__ == "__main__":
    main()
