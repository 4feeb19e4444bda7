# SPDX-License-Identifier: Apache-2.0
"""Registers by row: a view turns a :class:`~holdfast.regs.spec.Register` into one load or store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from holdfast.errors import BadAccess
from holdfast.regs.spec import Mode, Register

WIDTHS = (1, 2, 4, 8)


def check_access(offset: int, width: int, size: int, *, target: str, operation: str) -> None:
    """Refuse an access that no single bus transaction can carry out.

    ``offset`` and ``width`` in bytes from the start of a region of ``size`` bytes. Raises
    :class:`BadAccess`; nothing was touched.
    """
    if width not in WIDTHS:
        problem = f"width {width} is not 1, 2, 4 or 8 bytes"
    elif offset % width:
        problem = f"offset {offset:#x} is not aligned to {width} bytes"
    elif offset < 0 or offset + width > size:
        problem = f"{width} bytes at offset {offset:#x} lie outside of its {size:#x} bytes"
    else:
        return
    raise BadAccess(
        problem,
        operation=operation,
        target=target,
        hint="use a naturally aligned offset inside the region",
    )


@dataclass(frozen=True, slots=True)
class RegisterView:
    """Loads and stores by register row. As thread-safe as the two callables."""

    load: Callable[[int, int], int]
    """``load(offset, width)``: one access."""
    store: Callable[[int, int, int], None]
    """``store(offset, width, value)``: one access."""
    target: str = ""
    loads: Callable[[Sequence[tuple[int, int]]], list[int]] | None = None
    """``loads([(offset, width), ...])``: in order, if many are cheaper together than apart."""
    stores: Callable[[Sequence[tuple[int, int, int]]], None] | None = None
    """``stores([(offset, width, value), ...])``: in order."""

    def read(self, register: Register, index: int = 0) -> int:
        """Value of one register instance. A write-only register is refused."""
        return self.load(*self._readable(register, index))

    def read_many(self, registers: Iterable[tuple[Register, int]]) -> list[int]:
        """Values of ``(register, index)`` instances, read in this order."""
        accesses = [self._readable(register, index) for register, index in registers]
        if self.loads is not None:
            return self.loads(accesses)
        return [self.load(offset, width) for offset, width in accesses]

    def _readable(self, register: Register, index: int) -> tuple[int, int]:
        if register.mode in (Mode.WO, Mode.W1S):
            raise BadAccess(
                f"register {register.name} is write-only", operation="read", target=self.target
            )
        return register.at(index), register.width

    def write(self, register: Register, value: int, index: int = 0) -> None:
        """Store to one register instance. A read-only register or a too wide value is refused."""
        self.store(*self._writable(register, value, index))

    def write_many(self, writes: Iterable[tuple[Register, int, int]]) -> None:
        """Store ``(register, value, index)`` instances in this order; all are checked first."""
        accesses = [self._writable(register, value, index) for register, value, index in writes]
        if self.stores is not None:
            self.stores(accesses)
            return
        for access in accesses:
            self.store(*access)

    def _writable(self, register: Register, value: int, index: int) -> tuple[int, int, int]:
        if register.mode in (Mode.RO, Mode.RC):
            raise BadAccess(
                f"register {register.name} is read-only", operation="write", target=self.target
            )
        if not 0 <= value < 1 << (8 * register.width):
            raise BadAccess(
                f"{value:#x} does not fit the {register.width} bytes of {register.name}",
                operation="write",
                target=self.target,
            )
        return register.at(index), register.width, value
