"""Run a part of the tests with the lowest, the pinned and the newest versions, on each Python; docs/compatibility.md.

    python tools/compat.py                                  every Python that is found, all three
    python tools/compat.py --python 3.12 --versions lowest  one of them
    python tools/compat.py --table                          only the page, from lines that were measured before

Each combination gets an environment of its own below ``build/compat``, made by uv, and a line of JSON in
``tools/compat.jsonl``. The lowest versions are what the bounds of pyproject.toml allow (uv's ``lowest-direct``), the
pinned ones those of constraints.txt, the newest whatever the index has. Where a Python has no build of PyTorch without
CUDA, the tests are not run and the line says so; what needs no PyTorch is run there all the same.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINES = ROOT / "tools" / "compat.jsonl"
PAGE = ROOT / "docs" / "compatibility.md"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
VERSIONS = ("lowest", "pinned", "newest")
SHOWN = ("torch", "transformers", "peft", "trl", "accelerate")
# What meets other libraries most: PEFT's calls, saving and loading, Trainers, the guard in them.
TESTS = (
    "tests/test_compat.py", "tests/tuner/test_beside_lora.py", "tests/tuner/test_saved_before.py",
    "tests/tuner/test_transformers.py", "tests/test_trainers.py", "tests/budget/test_callback.py",
    "tests/budget/test_penalty_restraint.py",
)  # fmt: skip
TEST_TOOLS = ["pytest>=8", "hypothesis>=6.100", "tensorboard>=2.18", "bitsandbytes>=0.50"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="3.x")
    parser.add_argument("--versions", nargs="+", default=VERSIONS, choices=VERSIONS)
    parser.add_argument("--torch-backend", help="of uv: where builds of PyTorch come from, such as cpu")
    parser.add_argument("--torch", help="a requirement in the place of the bounds', such as torch==2.13.0+cpu")
    parser.add_argument("--cuda", action="store_true", help="accept PyTorch with CUDA, which is gigabytes")
    parser.add_argument("--find-links", help="a folder with more packages")
    parser.add_argument("--tests", nargs="+", default=TESTS)
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a combination did not pass its tests")
    parser.add_argument("--table", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    passed = True
    if not arguments.table:
        for python in arguments.python:
            for versions in arguments.versions:
                line = measure(python, versions, arguments)
                with open(LINES, "a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
                passed = passed and set(line.get("tests", {"error": 1})) <= {"passed", "skipped"}
    text = PAGE.read_text(encoding="utf-8")
    filled = re.sub(r"(<!-- versions -->\n).*?(<!-- end -->)", rf"\1{table(latest())}\2", text, flags=re.DOTALL)
    PAGE.write_text(filled, encoding="utf-8")
    if arguments.strict and not passed:
        sys.exit(1)


def measure(python, versions, arguments):
    """Return the result of one combination, as an entry for ``compat.jsonl``."""
    line = {"python": python, "versions": versions, "date": datetime.date.today().isoformat(),
            "machine": f"{platform.system()} {platform.machine()}", "commit": commit()}  # fmt: skip
    folder = ROOT / "build" / "compat" / f"{python}-{versions}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        return line | in_environment(folder, python, versions, arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def in_environment(folder, python, versions, arguments):
    made = uv("venv", "--quiet", "--python", python, folder)
    if made.returncode:
        return {"failed": "no such Python here"}
    interpreter = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    found = {"python": of(interpreter, "import platform; print(platform.python_version())")}
    extra = [arguments.torch] if arguments.torch else []
    project = [f"{ROOT}[train]", *TEST_TOOLS, *extra]
    options = ["--resolution", "lowest-direct"] if versions == "lowest" else []
    if versions == "pinned":
        options += ["--constraint", str(ROOT / "constraints.txt")]
    for name, value in (("--torch-backend", arguments.torch_backend), ("--find-links", arguments.find_links)):
        options += [name, value] if value else []
    install = ["pip", "install", "--python", interpreter, *options]
    planned = uv(*install, "--dry-run", *project)
    if planned.returncode:
        if arguments.torch and "torch" in planned.stderr:
            return found | without_torch(interpreter) | {"failed": f"{arguments.torch} has no build for it"}
        return found | {"failed": planned.stderr.strip()}
    if not arguments.cuda and re.search(r"^ \+ (nvidia-|cuda-)", planned.stderr, re.MULTILINE):
        return found | without_torch(interpreter) | {"failed": "only a build of PyTorch with CUDA is offered"}
    installed = uv(*install, "--quiet", *project)
    if installed.returncode:
        return found | {"failed": installed.stderr.strip()}
    frozen = uv("pip", "freeze", "--python", interpreter).stdout
    found["packages"] = dict(re.findall(r"^([\w.-]+)==(.*)$", frozen, re.MULTILINE))
    report = folder / "tests.xml"
    # The tests are those of this tree, the package is the one that was installed.
    command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *arguments.tests]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    counts = {
        name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-400:])
    }
    failures = re.findall(r"^(?:FAILED|ERROR) (.+)", done.stdout, re.MULTILINE)
    return found | {
        "tests": counts or {"error": 1},
        "failures": failures or ([done.stdout[-2000:]] if not counts else []),
    }


def without_torch(interpreter):
    """Check what needs no PyTorch: every file compiles, and the command prints its help and environment."""
    if uv("pip", "install", "--quiet", "--python", interpreter, "--no-deps", ROOT).returncode:
        return {"without torch": {"failed": "the package does not install"}}
    tools = uv("pip", "install", "--quiet", "--python", interpreter, "typer", "rich")
    commands = {"compiles": ["-m", "compileall", "-q", "-f", str(ROOT / "src")],
                "help": ["-m", "curlora_cli", "--help"], "env": ["-m", "curlora_cli", "env"]}  # fmt: skip
    if tools.returncode:
        commands = {"compiles": commands["compiles"]}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONDONTWRITEBYTECODE": "1"}
    passed = {
        name: not subprocess.run([interpreter, *command], cwd="/", capture_output=True, env=environment).returncode
        for name, command in commands.items()
    }
    return {"without torch": passed}


def uv(*arguments):
    executable = shutil.which("uv") or Path(sys.executable).with_name("uv")
    return subprocess.run([str(a) for a in (executable, *arguments)], capture_output=True, text=True, cwd=ROOT)


def of(interpreter, code):
    return subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def commit():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def latest():
    """Return the last line of each combination, ordered by Python and versions."""
    rows = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    last = {(row["python"].rpartition(".")[0] if row["python"].count(".") > 1 else row["python"], row["versions"]): row
            for row in rows}  # fmt: skip
    return [last[key] for key in sorted(last, key=lambda key: (PYTHONS.index(key[0]), VERSIONS.index(key[1])))]


def table(rows):
    lines = [["Python", "versions", *SHOWN, "tests"], ["---"] * (len(SHOWN) + 3)]
    for row in rows:
        packages = row.get("packages", {})
        lines.append([row["python"], row["versions"], *(packages.get(name, "") for name in SHOWN), outcome(row)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def outcome(row):
    if "tests" in row:
        return ", ".join(f"{count} {name}" for name, count in row["tests"].items())
    parts = [name for name, passed in row.get("without torch", {}).items() if passed is True]
    said = "not run: " + row["failed"].splitlines()[0]
    return said + (f"; without PyTorch: {', '.join(parts)}" if parts else "")


if __name__ == "__main__":
    main()
