# SPDX-License-Identifier: Apache-2.0
"""BARs and configuration space as a client sees them.

Facts. Some parts of a BAR are plain memory that can be mapped; registers with side effects trap,
in an emulated function always. A register must be accessed once, with its width: a slice copy may
be split or repeated by the C library.

Choice. :meth:`Bar.load` and :meth:`Bar.store` are one access each, through the mapping where there
is one and by a message to the keeper elsewhere. :meth:`Bar.view` gives NumPy the mapped memory, for
what really is memory. A trapped register that the function offers as a doorbell is rung through an
eventfd, without the keeper.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from os import eventfd_write
from typing import Protocol

import numpy as np
import numpy.typing as npt

from holdfast import pci
from holdfast.errors import BadAccess, Closed, HoldfastError
from holdfast.kernel import events
from holdfast.kernel.mapping import Mapping
from holdfast.regs.spec import Register
from holdfast.regs.view import RegisterView, check_access
from holdfast.values import Area, Region


class RegionPort(Protocol):
    """Access to a region by message."""

    def region_read(self, index: int, offset: int, count: int) -> bytes: ...

    def region_write(self, index: int, offset: int, data: bytes) -> None: ...


@dataclass(slots=True)
class Bell:
    """A doorbell: an eventfd whose every count stands for one write of ``value``. Owns ``fd``."""

    offset: int
    value: int | None
    fd: int

    def ring(self, count: int = 1) -> None:
        """Ring ``count`` times with one system call."""
        if self.fd < 0:
            raise Closed("the doorbell was closed", operation="ring doorbell")
        eventfd_write(self.fd, count)

    def close(self) -> None:
        if self.fd >= 0:
            events.close(self.fd)
            self.fd = -1


class Bar:
    """One BAR (or another region). Loads and stores may be made from any thread."""

    def __init__(
        self,
        region: Region,
        port: RegionPort,
        mapped: list[tuple[Area, Mapping]],
        target: str,
    ) -> None:
        self.index = region.index
        self.size = region.size
        self.target = f"{target} BAR{region.index}" if region.index < 6 else f"{target} config"
        self._port = port
        self._mapped = sorted(mapped, key=lambda pair: pair[0].offset)
        self._starts = [area.offset for area, _ in self._mapped]
        self._closed = False
        self._why: HoldfastError | None = None
        self.registers = RegisterView(self.load, self._store, self.target)

    def load(self, offset: int, width: int = 4) -> int:
        """One load of ``width`` bytes (1, 2, 4, 8) at a naturally aligned ``offset``."""
        self._check(offset, width, "load")
        found = self._find(offset, width)
        if found is not None:
            area, mapping = found
            return mapping.load(offset - area.offset, width)
        return int.from_bytes(self._port.region_read(self.index, offset, width), "little")

    def store(self, offset: int, value: int, width: int = 4) -> None:
        """One store. A trapped store returns after the function has taken it."""
        self._store(offset, width, value)

    def _store(self, offset: int, width: int, value: int) -> None:
        self._check(offset, width, "store")
        if not 0 <= value < 1 << (8 * width):
            raise BadAccess(
                f"{value:#x} does not fit {width} bytes", operation="store", target=self.target
            )
        found = self._find(offset, width)
        if found is not None:
            area, mapping = found
            mapping.store(offset - area.offset, width, value)
        else:
            self._port.region_write(self.index, offset, value.to_bytes(width, "little"))

    def read(self, register: Register, index: int = 0) -> int:
        """Load a register by its row."""
        return self.registers.read(register, index)

    def write(self, register: Register, value: int, index: int = 0) -> None:
        """Store to a register by its row."""
        self.registers.write(register, value, index)

    @property
    def areas(self) -> tuple[Area, ...]:
        """The parts that are mapped into this process."""
        return tuple(area for area, _ in self._mapped)

    def view(self, offset: int = 0, nbytes: int | None = None) -> npt.NDArray[np.uint8]:
        """Mapped card memory as a NumPy array (no copy). BadAccess if it is not all mapped."""
        if nbytes is None:
            nbytes = self.size - offset
        found = self._find(offset, nbytes)
        if self._closed or found is None:
            raise BadAccess(
                f"{nbytes} bytes at {offset:#x} are not mapped memory",
                operation="view",
                target=self.target,
                hint=f"mapped areas: {[(a.offset, a.size) for a in self.areas]}",
            )
        area, mapping = found
        start = offset - area.offset
        return mapping.array[start : start + nbytes]

    def _check(self, offset: int, width: int, operation: str) -> None:
        if self._closed:
            raise self._why or Closed(
                "the device is closed", operation=operation, target=self.target
            )
        check_access(offset, width, self.size, target=self.target, operation=operation)

    def _find(self, offset: int, width: int) -> tuple[Area, Mapping] | None:
        place = bisect_right(self._starts, offset) - 1
        if place < 0:
            return None
        area, mapping = self._mapped[place]
        return (area, mapping) if offset + width <= area.end else None

    def close(self, *, forked: bool = False, why: HoldfastError | None = None) -> None:
        """Unmap, so that nothing in this process can post through it any more. Idempotent.

        Views that still exist read zeros from then on. In a forked child, where the windows never
        were, only the references go. Later accesses raise ``why``, or Closed.
        """
        self._closed = True
        self._why = why
        for _, mapping in self._mapped:
            if not forked:
                mapping.revoke()
            mapping.close()
        self._mapped.clear()
        self._starts.clear()


class Config(Bar):
    """PCI configuration space, with its capabilities."""

    def capabilities(self) -> dict[int, int]:
        """Capability id to offset (the first of each id), by a bounded walk of the chain."""
        found: dict[int, int] = {}
        for capability in pci.capabilities(self.read_bytes):
            found.setdefault(capability.id, capability.offset)
        return found

    def read_bytes(self, offset: int, count: int) -> bytes:
        """``count`` bytes at ``offset``, as the function's bus would see one block read."""
        return self._port.region_read(self.index, offset, count)

    @property
    def vendor(self) -> int:
        return self.load(0, 2)

    @property
    def device(self) -> int:
        return self.load(2, 2)
