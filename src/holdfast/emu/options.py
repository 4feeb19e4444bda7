# SPDX-License-Identifier: Apache-2.0
"""Readers for the option values of a target: text in, number out, ``ValueError`` if it is neither.

Sizes and rates take the binary suffixes K, M, G and T.
"""

from __future__ import annotations

_SUFFIX = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def integer(text: str) -> int:
    """A whole number >= 0, decimal or with 0x."""
    number = int(text, 0)
    if number < 0:
        raise ValueError(f"{text} is negative")
    return number


def size(text: str) -> int:
    """Bytes, such as ``4096``, ``64M`` or ``1.5G``."""
    text = text.strip()
    factor = _SUFFIX.get(text[-1:].upper())
    if factor is None:
        return integer(text)
    number = float(text[:-1]) * factor
    if not 0 <= number < 1 << 63:
        raise ValueError(f"{text} is out of range")
    return int(number)


def rate(text: str) -> float | None:
    """Bytes per second with the suffixes of :func:`size`; ``0`` or ``none`` for unlimited."""
    return None if text == "none" else float(size(text)) or None


def seconds(text: str) -> float:
    """Seconds >= 0."""
    number = float(text)
    if not 0 <= number < 1e9:
        raise ValueError(f"{text} is not a time")
    return number
