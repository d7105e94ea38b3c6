"""What the batch jobs share: arguments, logging, one line of JSON on what was done, exit code."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distrec.config import Config, load_config
from distrec.errors import DistrecError
from distrec.store import check_store

JOBS_LOG = "jobs.jsonl"

EXIT_CODES = """\
exit codes: 0 done; 1 unexpected error; 2 configuration or arguments; 3 data; 4 checkpoint;
5 training (loss not finite, ranks disagree); 6 launch (a rank or Spark died, the store is out of
reach: may succeed next time); 7 training was stopped by SIGTERM (goes on next time); 130
interrupted (Ctrl-C)
"""
_INTERRUPTED = 130
_interrupt = threading.Event()


def note_interrupt() -> None:
    """A handler of Ctrl-C was called: whatever ends the present job from now on comes of it.

    What a handler raises may be lost in a library, which then fails in another way.
    """
    _interrupt.set()


@contextmanager
def on_sigterm(note: Callable[[], None]) -> Iterator[None]:
    """SIGTERM calls `note` inside, in place of ending the process; in the main thread only."""
    # signals are its business alone
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: note())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def configure_logging() -> None:
    """Send INFO of distrec and warnings of everybody to standard error, one line an event."""
    # on a terminal a line may begin where Spark has drawn its bar
    clear = "\r\033[K" if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb" else ""
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stderr,
        format=f"{clear}%(asctime)s %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("distrec").setLevel(logging.INFO)
    # py4j reports the traceback of an error that we report ourselves, some of them as the root
    logging.getLogger("py4j").setLevel(logging.CRITICAL)
    logging.getLogger().addFilter(_not_from_py4j)


def _not_from_py4j(record: logging.LogRecord) -> bool:
    return Path(record.pathname).parent.name != "py4j"


def log_line(directory: Path, entry: Mapping[str, Any]) -> None:
    """Append one job's line to logs/jobs.jsonl, from which the report takes the timings."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / JOBS_LOG).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


def execute(
    name: str,
    config: Config,
    function: Callable[[Config], Mapping[str, Any]],
    print_line: bool = True,
) -> int:
    """Run one job: print its line of JSON on standard output, keep it in the run's logs.

    Args:
        name: Of the job: prepare, train, evaluate, score.
        config: Of the run.
        function: Does the work and returns a small summary that JSON can hold.
        print_line: Whether standard output is for programs; the logs have the line anyway.

    Returns:
        0, or the exit code of the error; 130 after an interrupt from the keyboard.
    """
    _interrupt.clear()
    started = time.monotonic()
    entry: dict[str, Any] = {
        "job": name,
        "run": config.name,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        check_store(config, name)
        entry |= {"exit_code": 0, "summary": dict(function(config))}
    except (Exception, KeyboardInterrupt) as error:
        entry |= _told(name, error)
    entry["seconds"] = round(time.monotonic() - started, 3)
    if print_line:
        print(json.dumps(entry), flush=True)
    try:
        log_line(config.logs_directory, entry)
    except OSError as error:
        # the work is done or its error is told: a full disk must not hide either
        print(f"{name}: the log line could not be written: {error}", file=sys.stderr)
    return int(entry["exit_code"])


def _told(name: str, error: BaseException) -> dict[str, Any]:
    """Tell the user what ended a job; its part of the line of JSON."""
    if _interrupt.is_set() or _from_an_interrupt(error):
        print(f"\n{name}: interrupted", file=sys.stderr)
        return {"exit_code": _INTERRUPTED, "error": "KeyboardInterrupt", "message": "interrupted"}
    code = 1
    if isinstance(error, DistrecError):
        code = error.exit_code
        print(f"{name}: {error}", file=sys.stderr)
    else:
        logging.getLogger("distrec").error("%s failed", name, exc_info=error)
    return {"exit_code": code, "error": type(error).__name__, "message": str(error)}


def _from_an_interrupt(error: BaseException | None) -> bool:
    """Whether it is one, or came up while one was cleaned up after, as calls to a JVM do."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def parse_arguments(
    name: str,
    description: str,
    argv: Sequence[str] | None,
    extra: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """--config, --set and what `extra` adds."""
    parser = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="PATH", help="the run's TOML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one key, such as train.learning_rate=0.01; may be given several times",
    )
    if extra is not None:
        extra(parser)
    return parser.parse_args(argv)


def override(key: str, text: str) -> str:
    """As --set has it, for a value that is text even where it looks like a number."""
    return f"{key}={json.dumps(text)}"


def run_job(
    name: str,
    description: str,
    function: Callable[[Config], Mapping[str, Any]],
    argv: Sequence[str] | None = None,
    options: Mapping[str, tuple[str, str]] | None = None,
) -> int:
    """Whole of a job; returns the exit code.

    Args:
        name: Of the job.
        description: For --help.
        function: Does the work.
        argv: Arguments; those of the process by default.
        options: Option -> key of the configuration that it sets, and what --help says of it.
    """
    configure_logging()
    options = options or {}

    def add(parser: argparse.ArgumentParser) -> None:
        for option, (key, text) in options.items():
            parser.add_argument(option, metavar="PATH", dest=key, help=text)

    arguments = parse_arguments(name, description, argv, add)
    given = vars(arguments)
    overrides = [override(key, given[key]) for key, _ in options.values() if given[key] is not None]
    try:
        config = load_config(arguments.config, [*arguments.overrides, *overrides])
    except DistrecError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    return execute(name, config, function)
