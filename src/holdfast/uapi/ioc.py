# SPDX-License-Identifier: Apache-2.0
"""How Linux makes an ioctl number out of direction, size, type and number (asm-generic/ioctl.h).

The layout is that of x86-64 and arm64; a few other architectures have their own.
"""

from __future__ import annotations

from typing import Final

NRBITS: Final = 8
TYPEBITS: Final = 8
SIZEBITS: Final = 14

TYPESHIFT: Final = NRBITS
SIZESHIFT: Final = TYPESHIFT + TYPEBITS
DIRSHIFT: Final = SIZESHIFT + SIZEBITS

NONE: Final = 0
WRITE: Final = 1
READ: Final = 2
"""Directions, as the calling program sees them."""


def ioc(direction: int, kind: str, number: int, size: int) -> int:
    """``_IOC``: ``kind`` is one character, ``size`` is in bytes."""
    return direction << DIRSHIFT | size << SIZESHIFT | ord(kind) << TYPESHIFT | number


def io(kind: str, number: int) -> int:
    """``_IO``: no argument, or one whose size the number does not tell."""
    return ioc(NONE, kind, number, 0)
