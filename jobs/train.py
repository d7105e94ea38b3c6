"""Training, as one rank of horovodrun, alone, or starting its ranks itself.

horovodrun -np 4 python jobs/train.py --config conf/X.toml     one rank a process
python jobs/train.py --config conf/X.toml                      one process
python jobs/train.py --launcher local --config conf/X.toml     starts launch.num_ranks ranks here
spark-submit jobs/train.py --launcher spark --config ...       ranks on Spark's executors
"""

from __future__ import annotations

import argparse
import sys

from distrec.config import load_config
from distrec.errors import DistrecError
from distrec.job import configure_logging, execute, parse_arguments
from distrec.launch import LAUNCHERS


def add_options(parser: argparse.ArgumentParser) -> None:
    """What train has besides --config and --set."""
    parser.add_argument(
        "--launcher",
        choices=["none", *LAUNCHERS],
        default="none",
        help="none (this process is a rank; the default), local or spark",
    )


def main() -> int:
    """Returns the exit code."""
    configure_logging()
    arguments = parse_arguments("train", str(__doc__), None, add_options)
    try:
        config = load_config(arguments.config, arguments.overrides)
    except DistrecError as error:
        print(f"train: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.launcher != "none":
        return execute("train", config, LAUNCHERS[arguments.launcher])
    # only a rank needs torch: the launchers leave it to their ranks
    from distrec.trainer.rank import rank_of_environment, run_and_report, run_rank

    if rank_of_environment() == 0:
        return execute("train", config, run_rank)
    return run_and_report(config)


if __name__ == "__main__":
    sys.exit(main())
