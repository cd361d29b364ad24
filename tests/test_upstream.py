"""A pull request to PEFT, put into a copy of the PEFT that is installed, works there without curlora."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from upstream import make

UPSTREAM = Path(__file__).parent.parent / "upstream"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    shutil.copytree(Path(peft.__file__).parent, folder / "src" / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, UPSTREAM / "make.py", folder, "--into"]
    subprocess.run(command, check=True)
    return folder


def test_its_tests_pass_there_and_nothing_imports_curlora(checkout):
    blocked = checkout / "blocked"
    (blocked / "curlora").mkdir(parents=True)
    (blocked / "curlora" / "__init__.py").write_text('raise ImportError("curlora was imported")')
    paths = os.pathsep.join(map(str, (checkout / "src", blocked)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_curlora.py"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "9 passed" in done.stdout


def test_kernels_ledger_and_the_words_of_a_plug_in_stay_behind(checkout):
    text = "".join(path.read_text() for path in (checkout / "src/peft/tuners/curlora").glob("*.py"))
    for left_out in (
        "kernels.chosen(",
        "LEDGER_NAME",
        "makes CURLoRA known to PEFT",
        "add_peft_type",
        "torch.ops.curlora",
    ):
        assert left_out not in text


def test_it_stops_where_the_source_is_no_longer_what_it_expects():
    with pytest.raises(SystemExit, match="no longer mentions gone"):
        make.without("x = 1\n", {"gone"}, "file.py")


def test_a_statement_goes_with_the_comment_above_it():
    text = "a = 1\n# About b.\nb = gone\nif gone.x:\n    c = 1\nfor d in a:\n    # Within.\n    gone(d)\n    e = d\n"
    assert make.without(text, {"gone"}, "file.py") == "a = 1\nfor d in a:\n    e = d\n"
