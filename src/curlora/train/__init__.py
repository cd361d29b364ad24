"""``curlora train``: fine-tune a model on conversations within a forgetting budget, and write a report."""

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
