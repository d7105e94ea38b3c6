"""One rank of training, as the launcher starts it: python -m distrec.trainer --config X.toml"""

from __future__ import annotations

import logging
import sys

from distrec.config import load_config
from distrec.errors import DistrecError
from distrec.job import configure_logging, parse_arguments
from distrec.trainer.rank import run_and_report


def main() -> int:
    """Returns the exit code."""
    # a library sets up logging when it is imported, and the package came before this file
    logging.getLogger().handlers.clear()
    configure_logging()
    arguments = parse_arguments("train", str(__doc__), None)
    try:
        config = load_config(arguments.config, arguments.overrides)
    except DistrecError as error:
        print(f"train: {error}", file=sys.stderr)
        return error.exit_code
    return run_and_report(config)


if __name__ == "__main__":
    sys.exit(main())
