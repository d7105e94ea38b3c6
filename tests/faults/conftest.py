"""The table that `make faults` ends with."""

from __future__ import annotations

import pytest

ROWS: list[tuple[str, str, str]] = []
"""Fault, what came of it, seconds over the undisturbed run."""


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    reports = [
        report
        for kind in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(kind, [])
        if "tests/faults" in report.nodeid
    ]
    passed = sum(report.passed for report in reports)
    terminalreporter.section("faults")
    width = max(len(row[0]) for row in ROWS)
    for name, outcome, seconds in ROWS:
        terminalreporter.write_line(f"{name:{width}}  {seconds:>8}  {outcome}")
    terminalreporter.write_line(f"{passed} passed, {len(reports) - passed} failed")
