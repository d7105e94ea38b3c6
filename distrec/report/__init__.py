"""The HTML report of a run: one file that opens anywhere and asks the network for nothing."""

from distrec.report.page import write_report

__all__ = ["write_report"]
