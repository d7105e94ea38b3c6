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

from distrec.config.secrets import mask_setting
from distrec.config.section import Section
from distrec.config.whole import Config
from distrec.errors import ConfigError

# far above what people write; the time that tomllib takes grows with the square of a bad file
MAX_CONFIG_BYTES = 2**16
# a number becomes an int64 of NumPy or Java, whose other bit is the sign
_INTEGER_BITS = 63
_MOST_LEVELS = 32
# that one message tells
_MOST_FAULTS = 50


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
        # a byte more than is allowed is enough to see that there is more
        with path.open("rb") as stream:
            content = stream.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration file {Path(path).absolute()}. Check the path."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"a configuration file has at most {MAX_CONFIG_BYTES:,} bytes. Received: {path}, which "
            "has more. Check the path."
        )
    document = _parse(content, path)
    for override in overrides:
        _apply(document, override)
    return parse_config(document, str(path))


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}. Save it as UTF-8.") from error
    if text.startswith("\ufeff"):
        raise ConfigError(
            f"{path} is not TOML: it begins with a byte order mark. Save it as UTF-8 without one."
        )
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply. Write it with less nesting.") from None


def parse_config(document: Mapping[str, Any], origin: str) -> Config:
    """Check a parsed document; `origin` names it in messages."""
    _check_tree(document, origin)
    try:
        # JSON mode: strict about types, yet a TOML array is a tuple
        return Config.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        faults = error.errors()
        lines = [_explain(dict(fault), origin) for fault in faults[:_MOST_FAULTS]]
        if len(faults) > _MOST_FAULTS:
            lines.append(f"... and {len(faults) - _MOST_FAULTS} more faults.")
        raise ConfigError("\n".join(lines)) from None


def _check_tree(document: Mapping[str, Any], origin: str) -> None:
    """Refuse nesting without end, and whole numbers that no 64 bits hold."""
    waiting: list[tuple[str, Any, int]] = [("", document, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        if depth > _MOST_LEVELS:
            raise ConfigError(f"{origin} is nested too deeply. Write it with less nesting.")
        if isinstance(value, Mapping):
            parent = f"{key}." if key else ""
            waiting += [(f"{parent}{name}", one, depth + 1) for name, one in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(key, one, depth + 1) for one in value]
        elif isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
            raise ConfigError(
                f"{key!r} in {origin}: whole numbers fit 64 bits. Received: one of "
                f"{value.bit_length()} bits."
            )


def dump_config(config: Config) -> str:
    """The resolved configuration as TOML; `load_config` gives the same object back.

    But for secrets of spark.conf, which are hidden: nobody starts Spark with what is read back.
    """
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key=value. Received: {override!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    *parents, last = key.strip().split(".")
    section = document
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {key}: {parent!r} is a value, not a section.")
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
    if location[:2] == ["spark", "conf"]:
        received = mask_setting(str(location[-1]), received)
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
