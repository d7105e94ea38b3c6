"""Runs that share the dataset of another run and differ from it in their training alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrec.config import Config, parse_config
from distrec.errors import ConfigError


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values.

    Args:
        config: That is changed.
        changes: Key, such as train.learning_rate -> value.

    Raises:
        ConfigError: A change is not possible.
    """
    # not as JSON, which hides secrets of spark.conf
    document = config.model_dump(exclude_none=True)
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = document
        for parent in parents:
            section = section[parent]
        section[last] = value
    what = ", ".join(f"{key} = {value!r}" for key, value in changes.items())
    return parse_config(document, f"{config.name} with {what}")


def derived(config: Config, directory: Path, changes: Mapping[str, Any]) -> Config:
    """The configuration of a run below that of `config`, named after its directory, not published.

    Raises:
        ConfigError: A change is not possible.
    """
    own = {"output": str(directory), "name": f"{config.name}-{directory.name}", "store": ""}
    return changed(config, {**own, **changes})


def link_dataset(config: Config, run: Config) -> None:
    """Let a derived run read the dataset that is there: a symbolic link, relative.

    Raises:
        ConfigError: Something else lies in its place.
    """
    link = run.dataset_directory
    link.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(config.dataset_directory, link.parent)
    if link.is_symlink() and os.readlink(link) == target:
        return
    if link.exists() or link.is_symlink():
        raise ConfigError(
            f"{link} is a link to the dataset that is shared. Received: something else. Remove it."
        )
    link.symlink_to(target)
