"""docs/bad-inputs.md, made from the cases: python -m tests.bad_inputs.table > docs/bad-inputs.md"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tests.bad_inputs import checkpoints, configs, datasets, raw
from tests.bad_inputs.case import Case

INTRODUCTION = """\
# Bad inputs

What distrec does with input that is damaged, mixed up or forged. Each line is a test
(`tests/unit/test_bad_inputs.py`, `tests/spark/test_bad_raw_data.py`), and this page is made from
them: do not edit, but run `python -m tests.bad_inputs.table > docs/bad-inputs.md`. The job that is
given the input ends with the message and the exit code, and the run's directory is as it was but
for logs and `bad_batches/`; "..." stands for names and numbers. Codes: 2 configuration, 3 data, 4
checkpoint, 5 training.
"""
SECTIONS = {
    "Configurations, given to any job": configs.CASES,
    "Raw data": raw.CASES,
    "Datasets": datasets.CASES,
    "Checkpoints": checkpoints.CASES,
}
ROWS = """
## Rows of raw data

Up to `prepare.max_reject_share` of a source may be such rows: they go to `rejects/`, each with its
reason, and are counted in the manifest. With more of them the job ends with 3 and the commonest
reasons.

| row | reason |
|---|---|"""


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION.rstrip()]
    for title, cases in SECTIONS.items():
        lines += [f"\n## {title}\n", "| input | job | code | message |", "|---|---|---|---|"]
        lines += _lines(cases)
    lines += [ROWS, *(f"| {name} | {_cell(reason)} |" for name, (_, reason) in raw.ROWS.items())]
    return "\n".join(lines) + "\n"


def _lines(cases: Iterable[Case]) -> list[str]:
    lines = []
    for case in cases:
        job = "any" if case.job == "load" else case.job
        lines.append(f"| {case.name} | {job} | {case.exit_code} | {_cell(case.message)} |")
    return lines


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("\0", "")


if __name__ == "__main__":
    sys.stdout.write(page())
