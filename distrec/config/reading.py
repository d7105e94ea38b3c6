"""TOML to `Config`, refused as a whole with every fault found, and back."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import tomli_w
from pydantic import ValidationError

from distrec.config.section import Section
from distrec.config.whole import Config
from distrec.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply ``key=value`` overrides and check everything.

    Args:
        path: The TOML file.
        overrides: Such as ``train.learning_rate=0.01``; the value is TOML, or else a string.

    Raises:
        ConfigError: With every fault found, each with its key, what was received and the fix.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration file {Path(path).absolute()}. Check the path."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        _apply(document, override)
    return parse_config(document, str(path))


def parse_config(document: Mapping[str, Any], origin: str) -> Config:
    """Check a parsed document; `origin` names it in messages."""
    try:
        # JSON mode: strict about types, yet a TOML array is a tuple
        return Config.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        lines = [_explain(dict(fault), origin) for fault in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as TOML; `load_config` gives the same object back."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key=value. Received: {override!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    section = document
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {parent!r} is a value, not a section.")
    section[last] = value


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """Names of the keys that the section at `location` knows."""
    section: Any = Config
    is_name = False
    for part in location:
        # a place in a list, or a name in a table of sections
        if isinstance(part, int) or is_name:
            is_name = False
            continue
        field = section.model_fields.get(part)
        if field is None:
            return []
        section = section_of(field.annotation)
        if section is None:
            return []
        is_name = get_origin(field.annotation) is Mapping
    return list(section.model_fields)


def section_of(annotation: Any) -> type[Section] | None:
    """The section class that an annotation holds, if any: itself, optional or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = section_of(argument)
        if found is not None:
            return found
    return None


def _explain(fault: dict[str, Any], origin: str) -> str:
    location = [part for part in fault["loc"] if part is not None]
    key = ".".join(str(part) for part in location)
    received = fault.get("input")
    if fault["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
        return f"unknown key {key!r} in {origin}. {hint}"
    if fault["type"] == "missing":
        return f"key {key!r} is required in {origin}, and is not there."
    if fault["type"] == "value_error":
        return f"{fault['ctx']['error']}. ({key or 'whole file'} in {origin})"
    return f"{key!r} in {origin}: {fault['msg']}. Received: {received!r}."
