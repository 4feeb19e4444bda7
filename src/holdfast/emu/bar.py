# SPDX-License-Identifier: Apache-2.0
"""One BAR of an emulated function in operation: registers, memory, MSI-X storage."""

from __future__ import annotations

import os

import numpy as np

from holdfast.emu.config_space import BarSpec, MsixSpec
from holdfast.emu.port import Bytes
from holdfast.emu.registers import RegisterFile
from holdfast.kernel import memfd
from holdfast.kernel.mapping import Mapping
from holdfast.uapi import pci_regs as pci
from holdfast.values import Area

_SINGLE = (1, 2, 4, 8)


class Bar:
    """One BAR in operation: registers, memory, and the MSI-X table if it lies here."""

    def __init__(self, spec: BarSpec, msix: MsixSpec | None) -> None:
        self.spec = spec
        self.registers = RegisterFile(spec.banks)
        here = msix is not None and msix.bar == spec.index
        self.msix = msix.areas() if msix is not None and here else ()
        self._control = (msix.control if msix is not None else 0).to_bytes(4, "little")
        self.fd: int | None = None
        self._mapping: Mapping | None = None
        self.memory: Bytes = np.zeros(0, np.uint8)
        if spec.ram:
            self.fd = memfd.create(f"holdfast-bar{spec.index}", spec.size)
            self._mapping = Mapping(self.fd, spec.size)
            self.memory = self._mapping.array
        self.storage: dict[Area, bytearray] = {}
        self.reset()

    def reset(self) -> None:
        """Registers and MSI-X table to their reset values; memory keeps its contents."""
        self.registers.reset()
        self.storage = {area: bytearray(area.size) for area in self.msix}
        if self.msix:
            table = self.storage[self.msix[0]]
            for entry in range(0, len(table), pci.MSIX_ENTRY_SIZE):
                at = entry + pci.MSIX_ENTRY_VECTOR_CTRL
                table[at : at + 4] = self._control

    def stored(self, offset: int, size: int) -> tuple[bytearray, int, bool] | None:
        """MSI-X storage at this place: the bytes, the offset in them, and whether writable."""
        for number, area in enumerate(self.msix):
            if area.offset <= offset and offset + size <= area.end:
                return self.storage[area], offset - area.offset, number == 0
        return None

    def close(self) -> None:
        self.memory = np.zeros(0, np.uint8)
        if self._mapping is not None:
            self._mapping.close()
        if self.fd is not None:
            os.close(self.fd)


def pieces(spec: BarSpec, offset: int, count: int) -> list[tuple[int, int, bool]]:
    """Cut an access into ``(offset, size, is memory)``: memory in one go, registers by access.

    A single access of 1, 2, 4 or 8 aligned bytes reaches the registers as it is; a longer one
    (a dump) as naturally aligned accesses of up to 4 bytes.
    """
    single = count in _SINGLE and offset % count == 0
    found = []
    at, end = offset, offset + count
    while at < end:
        area = next((area for area in spec.ram if area.offset <= at < area.end), None)
        if area is not None:
            size = min(end, area.end) - at
        elif single:
            size = count
        else:
            limit = min([area.offset for area in spec.ram if area.offset > at] + [end]) - at
            size = next(width for width in (4, 2, 1) if at % width == 0 and width <= limit)
        found.append((at, size, area is not None))
        at += size
    return found
