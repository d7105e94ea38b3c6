"""docs/configuration.md, made from the classes of distrec.config and the texts under their keys."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distrec.config import Config, Section, section_of

INTRODUCTION = """\
# Configuration reference

One TOML file serves every job. Made by `make docs` from `distrec/config/`: do not edit. Any key
can be set for one job with `--set section.key=value`. `distrec config FILE` prints a file resolved.
"""


def reference() -> str:
    """The whole reference as Markdown."""
    parts = [INTRODUCTION, *_section("", Config)]
    return "\n".join(parts) + "\n"


def _section(path: str, section: type[Section]) -> list[str]:
    scalar: list[tuple[str, FieldInfo]] = []
    nested: list[tuple[str, FieldInfo, type[Section]]] = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            scalar.append((name, field))
        else:
            nested.append((name, field, inner))
    title = f"[{path}]" if path else "Top level"
    lines = [f"\n## {title}\n"]
    if section.__doc__:
        lines.append(f"{_one_line(section.__doc__)}\n")
    if scalar:
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        lines += [_row(name, field) for name, field in scalar]
    for name, field, inner in nested:
        inner_path = f"{path}.{name}" if path else name
        if _is_list(field.annotation):
            inner_path = f"{inner_path}[]"
        elif get_origin(field.annotation) is Mapping:
            inner_path = f'{inner_path}."KEY"'
        lines += _section(inner_path, inner)
    return lines


def _row(name: str, field: FieldInfo) -> str:
    text = _one_line(field.description or "").replace("|", "\\|")
    return f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {text} |"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "none"
    return f"`{json.dumps(field.default)}`"


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        inner = [argument for argument in get_args(annotation) if argument is not type(None)]
        return " or ".join(_type(argument) for argument in inner)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if annotation is Any:
        return "any value"
    if origin is tuple:
        return f"list of {_type(get_args(annotation)[0])}"
    if origin is not None:
        return "table"
    names = {str: "text", int: "whole number", float: "number", bool: "true, false"}
    return names.get(annotation, str(annotation))


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple
