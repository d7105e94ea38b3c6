"""The unified model without each of its towers and each alone, on public data sets.

    python benchmarks/quality/ablation.py DATA_FOLDER [--only toys] [--seeds 3] [--ranks 2]

What `distrec ablate` does, with the settings of ml1m_whole.py, toys.py and amazon_book.py; every
model is trained without valid. The model of all towers is to be no worse on test than the best of
the others. Amazon-Book is measured by Recall@20, the others by NDCG@10. The tables are below
OUTPUT/DATA/ablation; the last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import amazon_book
import ml1m_whole
import toys
from unified import add_arguments, common, configured

from distrec import ablate
from distrec.job import configure_logging

SETTINGS = {
    "ml-1m": ("sequence.toml", ml1m_whole.CHOSEN),
    "toys": ("sequence.toml", toys.CHOSEN),
    "amazon-book": ("unordered.toml", amazon_book.CHOSEN),
}
"""Data set -> configuration and what is changed in it."""


def over_best_part(table: dict[str, Any]) -> float:
    """The metric on test of all towers over that of the best choice of fewer."""
    place = next(
        place
        for place, column in enumerate(table["columns"])
        if (column["split"], column["slice"]) == ("test", "all")
    )
    first, *others = (row["cells"][place]["mean"] for row in table["rows"] if row["towers"])
    return round(first / max(others), 4)


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, "runs/quality/ablation")
    parser.add_argument("--seeds", type=int, default=1, help="runs a model, with seeds from 1")
    parser.add_argument("--only", choices=tuple(SETTINGS), action="append")
    given = parser.parse_args()
    configure_logging()
    common.print_header(["torch", "horovod", "pyspark"], f"{given.ranks} ranks of 1 thread")
    figures: dict[str, Any] = {"seeds": given.seeds}
    for name in given.only or SETTINGS:
        config_name, chosen = SETTINGS[name]
        changes = [*chosen, *given.settings]
        config = configured(name, name, config_name, given, 1, given.output / name, changes)
        code, directory = ablate.run(config, range(1, given.seeds + 1))
        if code:
            sys.exit(code)
        print(f"\n{name}\n{(directory / 'ablation.md').read_text()}", flush=True)
        table = json.loads((directory / "ablation.json").read_text())
        figures[name] = over_best_part(table)
    bars = {name: common.at_least(1.0) for name in figures if name != "seeds"}
    common.print_result("quality/ablation", figures, bars)


if __name__ == "__main__":
    main()
