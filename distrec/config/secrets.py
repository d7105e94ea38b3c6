"""What looks like a secret in settings that are not ours, and text without it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "(hidden)"
# what Spark hides (spark.redaction.regex), and keys of accounts; not paths of key stores, since
# Spark cannot be started from a copy that lacks a setting
_SECRET_SETTING = re.compile(
    r"passw|secret|token|\bkey\b|(?:access|account|private|api)[._-]?key\b", re.IGNORECASE
)
# user:password@host in an address; -Dpassword=x, ?token=x, key: x inside a longer setting
_SECRET_IN_ADDRESS = re.compile(r"(://)[^/\s@\"']+@")
_SECRET_IN_TEXT = re.compile(
    r"((?:passw(?:or)?d|secret|token|credentials?|[\w.-]*key)\s*[=:]\s*)[^\s,;&\"']+", re.IGNORECASE
)


def mask_text(text: str) -> str:
    """Hide what looks like a password inside a longer text."""
    text = _SECRET_IN_ADDRESS.sub(rf"\1{MASK}@", text)
    return _SECRET_IN_TEXT.sub(rf"\g<1>{MASK}", text)


def mask_setting(key: str, value: Any) -> Any:
    """A setting as it may be written down: nothing under a key that looks secret is left.

    Example:
        >>> mask_setting("spark.ssl.keyPassword", "abc"), mask_setting("spark.ssl.enabled", "true")
        ('(hidden)', 'true')
    """
    if isinstance(value, Mapping):
        return {name: mask_setting(str(name), inner) for name, inner in value.items()}
    if _SECRET_SETTING.search(key):
        return MASK
    return mask_text(value) if isinstance(value, str) else value
