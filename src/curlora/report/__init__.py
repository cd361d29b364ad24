"""Runs for people: a page, tables on a terminal, and the plan of a run."""

from curlora.report.page import render, write_report

__all__ = ["render", "write_report"]
