"""Configurations that no job starts with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.bad_inputs.case import CONFIG, Case

NAME = "config.toml"
GOOD = """
name = "bad"
output = "run"

[prepare.events]
paths = ["events.csv"]
time = "time"
"""


def with_file(content: bytes) -> Callable[[Path], None]:
    """Writes the configuration."""
    return lambda run: (run / NAME).write_bytes(content) and None


def refused(name: str, content: str | bytes, message: str) -> Case:
    data = content.encode() if isinstance(content, str) else content
    return Case(name, "load", with_file(data), message, CONFIG)


def directory(run: Path) -> None:
    (run / NAME).mkdir()


CASES = (
    Case("no configuration", "load", lambda run: None, "there is no configuration file", CONFIG),
    Case("a directory as configuration", "load", directory, "Is a directory", CONFIG),
    refused("an empty configuration", "", "key 'name' is required in"),
    refused("TOML with a byte order mark", b"\xef\xbb\xbf" + GOOD.encode(), "byte order mark"),
    refused("TOML in UTF-16", GOOD.encode("utf-16"), "is not TOML: ... Save it as UTF-8"),
    refused("TOML in Latin-1", "# é".encode("latin-1") + GOOD.encode(), "Save it as UTF-8"),
    refused("binary data as TOML", b"PAR1\x00\x01", "is not TOML: "),
    refused("TOML that ends in mid-table", GOOD + "[train", "is not TOML: "),
    refused("a key twice", GOOD + 'time = "t"', "is not TOML: Cannot overwrite a value"),
    refused("a TOML bomb of lists", f"x = {'[' * 9000}{']' * 9000}", "is nested too deeply"),
    refused("a TOML bomb of tables", f"[{'.'.join('a' * 2000)}]", "is nested too deeply"),
    refused("a TOML file of 10 MB", b"#" * 10_000_000, "has at most 65,536 bytes"),
    refused(
        "a number of 5,000 digits", f"seed = {'9' * 5000}{GOOD}", "is not TOML: Exceeds the limit"
    ),
    refused(
        "a number of 80,000 bits", f"seed = 0x{'f' * 20000}{GOOD}", "whole numbers fit 64 bits"
    ),
    refused(
        "an unknown key", GOOD + "[train]\nlearning_rat = 1",
        "unknown key 'train.learning_rat' in ... Did you mean 'learning_rate'?",
    ),
    refused("text for a number", GOOD + "[train]\nmax_epochs = '3'", "should be a valid integer"),
    refused("a date for a number", "seed = 2020-01-01" + GOOD, "should be a valid integer"),
    refused("a table for a list", GOOD + "[model.towers]", "'model.towers' in ... Received: {}"),
    refused("NaN", GOOD + "[train]\nlearning_rate = nan", "should be a finite number"),
    refused("infinity", GOOD + "[loss]\nl2 = inf", "should be a finite number. Received: inf"),
    refused("a negative size", GOOD + "[train]\nglobal_batch_size = -1", "greater than or equal"),
    refused(
        "an absurd width", GOOD + "[model]\nembedding_dim = 4000000000000",
        "'model.embedding_dim' in ... less than or equal to 65536",
    ),
    refused(
        "an absurd hidden layer", GOOD + "[model]\ndeep_hidden = [4000000000000]",
        "'model.deep_hidden.0' in ... less than or equal to 65536",
    ),
    refused(
        "a name that leads out", GOOD.replace('"bad"', '"../bad"'), "should match pattern",
    ),
    refused("an empty path", GOOD.replace("events.csv", ""), "'prepare.events.paths.0' in"),
    refused(
        "a zero byte in a path", GOOD.replace("events.csv", "a\\u0000"), "'prepare.events.paths.0'"
    ),
    refused(
        "a thousand wrong keys", GOOD + "".join(f"[a{k}]\n" for k in range(1000)),
        "unknown key 'a0' in ... and 950 more faults",
    ),
)  # fmt: skip
