"""The house is as CONTRIBUTING.md draws it, and what it asks of GitHub and pre-commit is what `make lint` runs."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"


def drawn():
    """Arrows of the picture: who stands over whom."""
    picture = re.search(r"```mermaid\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    arrows = defaultdict(set)
    for line in picture.splitlines():
        if "-->" in line:
            upper, lower = line.split("-->")
            arrows[upper.strip()] |= {name.strip() for name in lower.split("&")}
    return arrows


def places(text, exports):
    """The places that a module imports from, wherever in it the import stands."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "curlora":
            yield from (exports.get(alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("curlora."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("curlora."))


def imported():
    init = ast.parse((SOURCE / "curlora" / "__init__.py").read_text(encoding="utf-8"))
    exports = {alias.name: node.module.split(".")[1] for node in init.body
               if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("curlora.")
               for alias in node.names}  # fmt: skip
    found = defaultdict(set)
    for path in SOURCE.glob("curlora*/**/*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        place = parts[1] if parts[0] == "curlora" else parts[0]
        if place != "__init__":
            found[place] |= {other for other in places(path.read_text(encoding="utf-8"), exports) if other != place}
    return found


def below(place, arrows):
    found, queue = set(), [place]
    while queue:
        for lower in arrows.get(queue.pop(), ()):
            if lower not in found:
                found.add(lower)
                queue.append(lower)
    return found


def test_arrows_point_one_way():
    assert set(TopologicalSorter(drawn()).static_order())  # an error on a circle


def test_every_import_follows_the_arrows():
    arrows = drawn()
    against = {(place, other) for place, others in imported().items() for other in others - below(place, arrows)}
    assert not against


def test_every_arrow_is_an_import():
    real = imported()
    assert not {(place, other) for place, others in drawn().items() for other in others - real[place]}


def test_every_place_is_in_the_picture():
    names = {path.stem for path in (SOURCE / "curlora").iterdir() if not path.name.startswith(("__", "py.typed"))}
    arrows = drawn()
    assert names - {"recipes"} == (set(arrows) | set().union(*arrows.values())) - {"curlora_cli"}


def test_every_file_of_a_room_is_in_its_table_once():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tables = dict(re.findall(r"^In `(\w+)/`, .*?\n\n(.*?)\n\n", contributing, re.DOTALL | re.MULTILINE))
    assert set(tables) == {"tuner", "text", "guard", "budget", "data", "continual", "train"}
    for room, table in tables.items():
        named = [name for line in table.splitlines() for name in re.findall(r"`([\w/]+)`", line.split("|")[1])]
        files = [path.stem for path in (SOURCE / "curlora" / room).glob("[!_]*.py")]
        folders = [f"{path.parent.name}/" for path in (SOURCE / "curlora" / room).glob("*/__init__.py")]
        assert sorted(named) == sorted(files + folders)


def test_importing_curlora_brings_nothing_that_peft_does_not_need():
    """As a user does who adds one line to a script: no pages, tables, recipes or trainers."""
    code = "import sys, peft; before = set(sys.modules); import curlora; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    brought = {name.partition(".")[0] for name in done.stdout.split()}
    assert "curlora" in brought
    heavy = {"datasets", "gguf", "jinja2", "matplotlib", "omegaconf", "pandas", "platformdirs", "pyarrow", "pydantic",
             "ray", "rich", "tensorboard", "trl", "typer", "triton"}  # fmt: skip
    assert not brought & heavy
    parts = {name.split(".")[1] for name in done.stdout.split() if name.startswith("curlora.")}
    assert not parts & {"continual", "demo", "inspection", "report", "train"}


def test_pre_commit_runs_what_make_lint_runs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    linted = {
        line.split("/")[1]
        for line in re.search(r"^lint:.*?\n\n", makefile, re.M | re.DOTALL)[0].splitlines()[1:]
        if line
    }
    hooks = [hook for repo in configuration(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {" ".join(hook["entry"].split()[:2]).split("/")[-1] for hook in hooks} >= {"ruff check", "ruff format"}
    assert {line.split()[0] for line in linted} == {hook["entry"].split()[0].split("/")[-1] for hook in hooks}


def configuration(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def workflows():
    paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert {path.stem for path in paths} >= {"docs", "release", "tests"}
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]


def test_workflows_ask_for_little_end_and_run_what_is_fixed():
    for workflow in workflows():
        assert workflow["permissions"] == {"contents": "read"}
        assert workflow["concurrency"]["group"]
        for job in workflow["jobs"].values():
            if "uses" in job:  # another workflow of this repository
                assert (ROOT / job["uses"]).is_file()
                continue
            assert job["timeout-minutes"] <= 90
            assert job.get("permissions", {}).keys() <= {"id-token"}
            for step in job["steps"]:
                assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + "0" * 40))


def test_workflows_run_targets_that_there_are():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    steps = [step for workflow in workflows() for job in workflow["jobs"].values() for step in job.get("steps", ())]
    called = {name for step in steps for name in re.findall(r"\bmake (\w+)", step.get("run", ""))}
    assert {"test", "docs", "dist"} <= called
    assert called <= set(re.findall(r"^(\w+):", makefile, re.M))


def test_every_python_that_is_named_is_tested():
    named = set(re.findall(r":: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    assert named
    tests = configuration(".github/workflows/tests.yml")
    assert set(tests["jobs"]["test"]["strategy"]["matrix"]["python"]) == named
