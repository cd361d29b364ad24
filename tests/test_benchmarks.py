"""The benchmarks run, and the pages say what they measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEED = ROOT / "benchmarks" / "speed"


def test_gpu_script_runs_small_shapes_on_whatever_there_is(tmp_path):
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--tiny", "--eager", "--rounds", "2", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["model"] for row in rows} == {"Llama-3.2-3B", "Mistral-7B"}
    assert {row["checkpointing"] for row in rows} == {True, False}
    assert all(set(row["step"]["over"]) == {"curlora", "lora"} for row in rows)


def test_gpu_script_says_that_there_is_no_gpu():
    code = "import sys, torch, runpy; torch.cuda.is_available = lambda: False; sys.argv = ['gpu.py']; "
    code += f"runpy.run_path({str(ROOT / 'benchmarks' / 'gpu.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "No GPU here" in done.stderr


def test_an_overhead_is_of_the_same_round(monkeypatch):
    monkeypatch.syspath_prepend(SPEED)
    import measure

    # A machine that gets slower with every round hides nothing.
    seconds = {"floor": [1.0, 2.0, 4.0], "curlora": [1.1, 2.1, 4.1], "lora": [1.4, 2.4, 4.4]}
    over = measure.over_floor(seconds)
    assert over == pytest.approx({"floor": 0, "curlora": 0.1, "lora": 0.4})
    assert measure.interval(seconds, "curlora", "lora") == pytest.approx((0.25, 0.25))


def test_everything_is_called_once_a_round_and_in_changing_order(monkeypatch):
    monkeypatch.syspath_prepend(SPEED)
    import measure

    calls = []
    seconds = measure.in_turn({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=6, warmup=2)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 8
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert {name: len(times) for name, times in seconds.items()} == {"a": 6, "b": 6, "c": 6}


def test_tables_of_the_pages_are_of_the_raw_lines(monkeypatch):
    monkeypatch.syspath_prepend(SPEED)
    import page

    for path in page.PAGES:
        text = path.read_text(encoding="utf-8")
        assert "<!-- table:" in text
        assert page.filled(text, page.tables()) == text
