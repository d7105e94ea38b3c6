"""The configuration as text, without secrets."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from distrec.config import Config
from distrec.config.secrets import MASK, mask_text

# wider than what is left out of copies of a configuration: nothing is started from a report
_SECRET_KEY = re.compile(r"passw|secret|token|credential|key|auth", re.IGNORECASE)


def mask(value: Any, key: str = "") -> Any:
    """A copy of nested values in which nothing under a key that looks secret is left."""
    if isinstance(value, Mapping):
        return {name: mask(inner, str(name)) for name, inner in value.items()}
    if _SECRET_KEY.search(key) and value not in ("", None, True, False):
        return MASK
    if isinstance(value, list | tuple):
        return [mask(inner) for inner in value]
    return mask_text(value) if isinstance(value, str) else value


def settings_text(config: Config) -> str:
    """The run's resolved configuration, section by section, secrets hidden.

    It is read from config.toml in the run directory, which is what the run used; without one, it is
    the given configuration.
    """
    try:
        text = (config.directory / "config.toml").read_text(encoding="utf-8")
        document: dict[str, Any] = tomllib.loads(text)
    except (OSError, ValueError):
        document = config.model_dump(mode="json")
    return "\n".join(_section("", mask(document))).strip() + "\n"


def _section(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    if name and (plain or not values):
        yield f"\n[{name}]"
    for key, value in plain.items():
        if value is not None:
            yield f"{_key(key)} = {_value(value)}"
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _section(f"{name}.{_key(key)}" if name else _key(key), value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _value(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        return "[\n" + "".join(f"  {_value(inner)},\n" for inner in value) + "]"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inner} }}"
    return json.dumps(value, ensure_ascii=False, default=str)
