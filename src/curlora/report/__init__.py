"""Reports of runs: an HTML page, tables for the terminal, and the plan of a run."""

from curlora.report.page import render, write_report

__all__ = ["render", "write_report"]
