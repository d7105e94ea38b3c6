"""Sizes and speeds as people write them: 64GiB, 10Gbit."""

from __future__ import annotations

import re

from distrec.errors import ConfigError

_BYTES = {"B": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGTP", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
_BITS = {f"{letter}bit": 1000**power for power, letter in enumerate("KMGT", start=1)}
_QUANTITY = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]+)(?P<rate>/s)?")


def parse_bytes(text: str, option: str) -> int:
    """A size in bytes.

    Args:
        text: A number and B, KiB, MiB, GiB, TiB, PiB or KB to PB (powers of 1000).
        option: Named in the message.

    Raises:
        ConfigError: It is not a size above zero.

    Example:
        >>> parse_bytes("64GiB", "--memory-per-rank")
        68719476736
    """
    match = _QUANTITY.fullmatch(text.strip())
    factor = None if match is None or match["rate"] else _BYTES.get(match["unit"])
    if match is None or factor is None or round(float(match["number"]) * factor) < 1:
        raise ConfigError(
            f"{option} is a size with its unit, above zero. Received: {text!r}. Write 64GiB, "
            f"512MiB or another of {', '.join(_BYTES)}."
        )
    return round(float(match["number"]) * factor)


def parse_bandwidth(text: str, option: str) -> float:
    """A speed, in bytes a second.

    Args:
        text: A number and Kbit, Mbit, Gbit or Tbit (powers of 1000), with or without /s.
        option: Named in the message.

    Raises:
        ConfigError: It is not a speed above zero.

    Example:
        >>> parse_bandwidth("10Gbit", "--bandwidth")
        1250000000.0
    """
    match = _QUANTITY.fullmatch(text.strip())
    factor = None if match is None else _BITS.get(match["unit"])
    if match is None or factor is None or float(match["number"]) == 0:
        raise ConfigError(
            f"{option} is what one rank can send in bits a second, above zero. Received: {text!r}. "
            f"Write 10Gbit or another of {', '.join(_BITS)}."
        )
    return float(match["number"]) * factor / 8


def format_bytes(number: float) -> str:
    """Three figures or so, with a binary unit.

    Example:
        >>> format_bytes(1536)
        '1.50 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            digits = 0 if unit == "B" or number >= 100 else 1 if number >= 10 else 2
            return f"{number:.{digits}f} {unit}"
        number /= 1024
    return f"{number:,.1f} PiB"
