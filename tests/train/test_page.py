"""Figures survive the file, and whatever users and models write is text on the page, the card and the screen."""

import json
import math
import re

from rich.console import Console

from curlora.train import TrainOutcome, outcome_tables
from curlora.train.card import write_card
from curlora.train.page import render

HOSTILE = "<script>alert(1)</script> | `a` [red]b[/red] {{ 7 * 7 }}"


def outcome(**changes):
    return TrainOutcome.model_validate(
        {
            "curlora": "1.0", "created": "today", "base_model": HOSTILE, "continue_from": None, "quantize": None,
            "data": HOSTILE, "layout": "by the model's chat template", "rank": 8, "layers": 14,
            "run": {
                "steps": 2, "examples": 40, "tokens": 4000, "trained_parameters": 896, "learning_rate": 0.1,
                "seconds": 3, "device": "cpu",
                "log": [{"step": 1, "loss": 2.0, "drift": 0.0}, {"step": 2, "loss": math.nan}],
            },
            "held_out": {"source": HOSTILE, "examples": 20, "tokens": 80, "loss_before": 2, "loss_after": 1.23456},
            "budget": {
                "stated": 0.01, "lifetime": 0.03, "predicted": 0.009, "kept": 0.75,
                "texts": {
                    "code": {"before": 10, "after": 10.05, "rise": 0.005, "limit": 0.01},
                    HOSTILE: {"before": 20, "after": math.inf, "rise": math.inf, "limit": 0.02},
                },
            },
            "replies": [{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE, "data": None}],
            **changes,
        }
    )  # fmt: skip


def test_figures_survive_the_file():
    one = outcome()
    content = json.loads(one.model_dump_json())
    other = TrainOutcome.model_validate(json.loads(json.dumps(content, allow_nan=False)))
    assert math.isnan(other.run.log[1]["loss"])
    assert other.budget == one.budget
    assert other.budget.worst[0] == HOSTILE
    assert not other.budget.within


def test_nothing_of_users_is_markup(tmp_path):
    page = render(outcome())
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 10
    assert "The budget was not kept." in page
    assert "49" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)

    write_card(outcome(), tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text()
    assert "<script" not in card.partition("---\n\n")[2]
    rows = [line for line in card.splitlines() if line.startswith("|")]
    for row in rows[:5]:
        assert len(re.split(r"(?<!\\)\|", row)) == 7, row

    console = Console(width=200, record=True)
    for part in outcome_tables(outcome()):
        console.print(part)
    screen = console.export_text()
    assert "[red]b[/red]" in screen
    assert "The budget was NOT kept." in screen
    assert "1.2346" in screen


def test_what_was_kept_is_not_said_to_be_lost():
    kept = outcome().budget.model_copy(update={"texts": {"code": outcome().budget.texts["code"]}})
    page = render(outcome(budget=kept.model_dump()))
    assert "The budget was not kept." not in page
    assert "+0.50 % on code" in page
