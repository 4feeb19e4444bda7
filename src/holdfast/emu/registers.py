# SPDX-License-Identifier: Apache-2.0
"""The trapped side of a BAR: register values, handlers, and behaviour by access mode."""

from __future__ import annotations

from collections.abc import Callable

from holdfast.regs.spec import Bank, Mode, Register

ReadHandler = Callable[[int], int]
"""``handler(index) -> value`` of a register instance."""
WriteHandler = Callable[[int, int], None]
"""``handler(index, value)`` for a write to a register instance."""


class RegisterFile:
    """Values and handlers of the registers of one BAR.

    A register without a handler behaves after its mode: RW stores, RO keeps its reset value, RC
    reads once and is zero, W1C and W1S clear and set their own bits, WO stores and reads zero.
    Not thread-safe; the function's lock guards it.
    """

    def __init__(self, banks: tuple[Bank, ...]) -> None:
        self._at: dict[int, tuple[Register, int]] = {}
        self._values: dict[tuple[Register, int], int] = {}
        self._readers: dict[Register, ReadHandler] = {}
        self._writers: dict[Register, WriteHandler] = {}
        for bank in banks:
            for register, index in bank.instances():
                self._at[register.at(index)] = register, index
        self.registers = frozenset(register for register, _ in self._at.values())
        self.reset()

    def reset(self) -> None:
        """Every stored value back to its reset value; handlers stay."""
        self._values = {
            (register, index): register.reset
            for register in self.registers
            for index in range(register.count)
        }

    def on_read(self, register: Register, handler: ReadHandler) -> None:
        self._readers[register] = handler

    def on_write(self, register: Register, handler: WriteHandler) -> None:
        self._writers[register] = handler

    def peek(self, register: Register, index: int) -> int:
        """The stored value, past handlers and modes."""
        return self._values[register, index]

    def poke(self, register: Register, index: int, value: int) -> None:
        """Set the stored value, past handlers and modes; cut to the register's width."""
        self._values[register, index] = value & ((1 << 8 * register.width) - 1)

    def find(self, offset: int, width: int) -> tuple[Register, int] | None:
        """The register instance at exactly this offset and of this width."""
        hit = self._at.get(offset)
        return hit if hit is not None and hit[0].width == width else None

    def load(self, register: Register, index: int) -> int:
        """One read as software does it."""
        handler = self._readers.get(register)
        if handler is not None:
            return handler(index) & ((1 << 8 * register.width) - 1)
        if register.mode is Mode.WO:
            return 0
        value = self._values[register, index]
        if register.mode is Mode.RC:
            self._values[register, index] = 0
        return value

    def store(self, register: Register, index: int, value: int) -> None:
        """One write as software does it."""
        handler = self._writers.get(register)
        if handler is not None:
            handler(index, value)
            return
        if register.mode in (Mode.RW, Mode.WO):
            self.poke(register, index, value)
        elif register.mode is Mode.W1C:
            self._values[register, index] &= ~value
        elif register.mode is Mode.W1S:
            self._values[register, index] |= value
