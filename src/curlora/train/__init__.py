"""``curlora train``: fine-tune on conversations within a stated budget of forgetting, from options to a page."""

from curlora.train.errors import TrainError
from curlora.train.options import (
    TrainOptions,
    parse_columns,
    parse_limits,
    parse_share,
    parse_targets,
    parse_texts,
    read_prompts,
)
from curlora.train.outcome import TrainOutcome
from curlora.train.run import Prepared, finished, prepare, train
from curlora.train.tables import outcome_tables, plan_tables

__all__ = [
    "Prepared",
    "TrainError",
    "TrainOptions",
    "TrainOutcome",
    "finished",
    "outcome_tables",
    "parse_columns",
    "parse_limits",
    "parse_share",
    "parse_targets",
    "parse_texts",
    "plan_tables",
    "prepare",
    "read_prompts",
    "train",
]
