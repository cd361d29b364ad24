"""docs/compatibility.md has pyproject.toml's lowest versions, the measured runs, and the present format of adapters."""

import re
from pathlib import Path

import pytest
from tools import compat

from curlora.tuner import format as file_format

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["torch", "transformers", "peft", "accelerate", "trl", "numpy"])
def test_the_lowest_versions_are_those_that_are_asked_for(name):
    bound = re.search(rf'"{name}>=([\d.]+)', PROJECT)[1]
    said = re.search(rf"^\| {name} \| ([\d.]+)", PAGE, re.MULTILINE)[1]
    assert said == bound


def test_the_table_is_of_the_lines_that_were_measured():
    assert compat.table(compat.latest()) in PAGE


def test_the_tests_that_are_measured_exist():
    assert [name for name in compat.TESTS if not (ROOT / name).exists()] == []


def test_the_present_format_is_the_last_in_the_table():
    assert max(map(int, re.findall(r"^\| (\d) \|", PAGE, re.MULTILINE))) == file_format.VERSION


def test_a_run_that_failed_says_so_in_its_row():
    rows = [
        {"python": "3.12.1", "versions": "lowest", "packages": {"torch": "2.6.0"}, "tests": {"failed": 1, "passed": 2}},
        {
            "python": "3.13",
            "versions": "newest",
            "failed": "no build\nmore",
            "without torch": {"help": True, "env": False},
        },
    ]
    lines = compat.table(rows).splitlines()[2:]
    assert lines[0] == "| 3.12.1 | lowest | 2.6.0 |  |  |  |  | 1 failed, 2 passed |"
    assert lines[1].endswith("| not run: no build; without PyTorch: help |")
