# SPDX-License-Identifier: Apache-2.0
"""What a register is, as data.

A :class:`Bank` is a named list of :class:`Register` rows inside one BAR. Drivers, emulated
functions, dumps and the documentation all read the same rows, so an offset is written once.
A register with ``count`` > 1 repeats every ``stride`` bytes (one per channel or per vector word).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass


class Mode(enum.StrEnum):
    """Access modes, after the usual datasheet letters."""

    RO = "ro"
    RW = "rw"
    WO = "wo"
    RC = "rc"  # clear on read
    W1C = "w1c"  # write one to clear
    W1S = "w1s"  # write one to set


@dataclass(frozen=True, slots=True)
class Field:
    """Bits ``hi`` down to ``lo`` of a register, both included."""

    name: str
    hi: int
    lo: int

    @property
    def mask(self) -> int:
        return ((1 << (self.hi - self.lo + 1)) - 1) << self.lo

    def get(self, word: int) -> int:
        return (word & self.mask) >> self.lo

    def put(self, value: int) -> int:
        return (value << self.lo) & self.mask


@dataclass(frozen=True, slots=True)
class Register:
    """One row of a datasheet's register table. Offsets and widths in bytes."""

    name: str
    offset: int
    mode: Mode = Mode.RW
    width: int = 4
    reset: int = 0
    doc: str = ""
    fields: tuple[Field, ...] = ()
    count: int = 1
    stride: int = 0

    def at(self, index: int = 0) -> int:
        """Offset of instance ``index`` in the BAR."""
        if not 0 <= index < self.count:
            raise IndexError(f"{self.name} has {self.count} instance(s), not {index}")
        return self.offset + index * self.stride


@dataclass(frozen=True, slots=True)
class Bank:
    """Registers of one BAR. No two instances overlap (checked at construction)."""

    name: str
    registers: tuple[Register, ...]

    def __post_init__(self) -> None:
        taken: dict[int, str] = {}
        for register, index in self.instances():
            for byte in range(register.at(index), register.at(index) + register.width):
                if byte in taken:
                    raise ValueError(f"{self.name}: {register.name} overlaps {taken[byte]}")
                taken[byte] = register.name

    def instances(self) -> Iterator[tuple[Register, int]]:
        """Every register instance as ``(register, index)``."""
        for register in self.registers:
            for index in range(register.count):
                yield register, index

    def by_offset(self) -> dict[int, tuple[Register, int]]:
        """Offset of each instance to the register and its index."""
        return {register.at(index): (register, index) for register, index in self.instances()}
