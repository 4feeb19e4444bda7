# SPDX-License-Identifier: Apache-2.0
"""Configuration space of an emulated function, built from what the function declares.

Two byte arrays of the same length: the contents, and a mask of the bits that software may change.
A write is masked and nothing else, save for the few bits with a meaning of their own, which
:meth:`ConfigSpace.write` reports as :class:`Event`. Read-only bits ignore writes silently: an
operating system writes zeros and ones everywhere (PCI Local Bus 3.0, 6.2).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.errors import UsageError
from holdfast.regs.spec import Bank
from holdfast.uapi import pci_regs as pci
from holdfast.values import Area


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the function says it is. ``class_code`` is 24 bits: base class, subclass, interface."""

    vendor: int
    device: int
    class_code: int = 0xFF0000
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


@dataclass(frozen=True, slots=True)
class BarSpec:
    """One memory BAR of a function.

    size
        Bytes; a power of two, at least 16.
    banks
        Registers. Accesses to them trap.
    ram
        Page-aligned pieces that are plain memory and can be mapped by the client; no registers.
    wide
        A 64-bit BAR: the next index is taken too.
    """

    index: int
    size: int
    banks: tuple[Bank, ...] = ()
    ram: tuple[Area, ...] = ()
    wide: bool = False
    prefetchable: bool = False


@dataclass(frozen=True, slots=True)
class MsixSpec:
    """Where the MSI-X table and pending bits lie: BAR index and byte offsets, 8-byte aligned.

    ``control`` is what a table entry's vector control word reads after a reset.
    """

    vectors: int
    bar: int
    table: int
    pba: int
    control: int = pci.MSIX_ENTRY_CTRL_MASKBIT

    def areas(self) -> tuple[Area, Area]:
        """The table and the pending bits (one per vector, in 8-byte words)."""
        return (
            Area(self.table, self.vectors * pci.MSIX_ENTRY_SIZE),
            Area(self.pba, -(-self.vectors // 64) * 8),
        )


class Event(enum.IntFlag):
    """What a configuration write set off."""

    FUNCTION_RESET = 1
    MASTER_CHANGED = 2
    MSI_ENABLED = 4  # an MSI or MSI-X control word was written and the type is enabled
    INTX_MASK_CHANGED = 8


_COMMAND_MASK = (
    pci.Command.IO
    | pci.Command.MEMORY
    | pci.Command.MASTER
    | pci.Command.SERR
    | pci.Command.INTX_DISABLE
)


class ConfigSpace:
    """256 bytes, or 4096 for a function with a PCI Express capability.

    Not thread-safe; the function's lock guards it. Capabilities are laid out in the order PM, MSI,
    PCI Express, MSI-X, from 0x40.
    """

    def __init__(
        self,
        identity: Identity,
        bars: Sequence[BarSpec],
        *,
        msi: int = 0,
        msix: MsixSpec | None = None,
        pin: int = 1,
        power: bool = False,
        express: bool = False,
        flr: bool = False,
    ) -> None:
        if msi not in (0, 1, 2, 4, 8, 16, 32):
            raise UsageError(f"{msi} MSI vectors: not a power of two up to 32")
        self.size = pci.CONFIG_SPACE_EXP_SIZE if express else pci.CONFIG_SPACE_SIZE
        self._data = bytearray(self.size)
        self._mask = bytearray(self.size)
        self._next = pci.STD_HEADER_SIZE
        self._link = pci.CAPABILITY_LIST
        self._msi_log2 = max(msi, 1).bit_length() - 1
        self.msi_offset = self.msix_offset = self.express_offset = 0
        self._header(identity, pin)
        for bar in bars:
            self._bar(bar)
        if power:
            self._power()
        if msi:
            self._msi()
        if express:
            self._express(flr)
        if msix is not None:
            self._msix(msix)
        self._initial = bytes(self._data)

    # -- access ----------------------------------------------------------------------------------

    def read(self, offset: int, count: int) -> bytes:
        """Bytes at ``offset``; the caller has checked the range."""
        return bytes(self._data[offset : offset + count])

    def write(self, offset: int, data: bytes) -> Event:
        """Store through the mask; the caller has checked the range and acts on the events."""
        before = self.command
        touched = range(offset, offset + len(data))
        flr = self._asks_for_reset(offset, data)
        for at, byte in zip(touched, data, strict=True):
            mask = self._mask[at]
            self._data[at] = (self._data[at] & ~mask) | (byte & mask)
        events = Event.FUNCTION_RESET if flr else Event(0)
        changed = before ^ self.command
        if changed & pci.Command.MASTER:
            events |= Event.MASTER_CHANGED
        if changed & pci.Command.INTX_DISABLE:
            events |= Event.INTX_MASK_CHANGED
        if self.msi_offset and self.msi_offset + pci.MSI_FLAGS in touched and self.msi_enabled:
            self._clamp_msi()
            events |= Event.MSI_ENABLED
        # Enable is in the high byte of MSI-X message control, in the low byte of MSI's.
        msix_touched = self.msix_offset + pci.MSIX_FLAGS + 1 in touched
        if self.msix_offset and msix_touched and self.msix_enabled:
            events |= Event.MSI_ENABLED
        return events

    def reset(self) -> None:
        """Back to what it was at power-on."""
        self._data[:] = self._initial

    # -- what the bits say -----------------------------------------------------------------------

    @property
    def command(self) -> int:
        return self._get(pci.COMMAND, 2)

    @command.setter
    def command(self, value: int) -> None:
        self._put(pci.COMMAND, 2, value & _COMMAND_MASK)

    @property
    def bus_master(self) -> bool:
        return bool(self.command & pci.Command.MASTER)

    @property
    def intx_disabled(self) -> bool:
        return bool(self.command & pci.Command.INTX_DISABLE)

    @property
    def msi_enabled(self) -> bool:
        if not self.msi_offset:
            return False
        return bool(self._get(self.msi_offset + pci.MSI_FLAGS, 2) & pci.MSI_FLAGS_ENABLE)

    @property
    def msix_enabled(self) -> bool:
        if not self.msix_offset:
            return False
        return bool(self._get(self.msix_offset + pci.MSIX_FLAGS, 2) & pci.MSIX_FLAGS_ENABLE)

    @property
    def device_control(self) -> int:
        """The PCI Express device control word; 0 without the capability."""
        if not self.express_offset:
            return 0
        return self._get(self.express_offset + pci.EXP_DEVCTL, 2)

    def show_interrupt(self, asserted: bool) -> None:
        """Status bit 3: the level of the function's INTx, whether masked or not."""
        status = self._get(pci.STATUS, 2) & ~int(pci.StatusBit.INTERRUPT)
        self._put(pci.STATUS, 2, status | (pci.StatusBit.INTERRUPT if asserted else 0))

    # -- building --------------------------------------------------------------------------------

    def _get(self, offset: int, width: int) -> int:
        return int.from_bytes(self._data[offset : offset + width], "little")

    def _put(self, offset: int, width: int, value: int, mask: int | None = None) -> None:
        self._data[offset : offset + width] = value.to_bytes(width, "little")
        if mask is not None:
            self._mask[offset : offset + width] = mask.to_bytes(width, "little")

    def _header(self, identity: Identity, pin: int) -> None:
        self._put(pci.VENDOR_ID, 2, identity.vendor)
        self._put(pci.DEVICE_ID, 2, identity.device)
        self._put(pci.COMMAND, 2, 0, _COMMAND_MASK)
        self._put(pci.REVISION_ID, 1, identity.revision)
        self._put(pci.CLASS_PROG, 3, identity.class_code)
        self._put(pci.CACHE_LINE_SIZE, 1, 0, 0xFF)
        self._put(pci.SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor)
        self._put(pci.SUBSYSTEM_ID, 2, identity.subsystem)
        self._put(pci.INTERRUPT_LINE, 1, 0, 0xFF)
        self._put(pci.INTERRUPT_PIN, 1, pin)

    def _bar(self, bar: BarSpec) -> None:
        if bar.size < 16 or bar.size & (bar.size - 1):
            raise UsageError(f"BAR {bar.index}: size {bar.size:#x} is not a power of two >= 16")
        if bar.size > 1 << 31 and not bar.wide:
            raise UsageError(f"BAR {bar.index}: {bar.size:#x} bytes need wide=True")
        width = 8 if bar.wide else 4
        kind = pci.BASE_ADDRESS_MEM_TYPE_64 if bar.wide else 0
        kind |= pci.BASE_ADDRESS_MEM_PREFETCH if bar.prefetchable else 0
        writable = (1 << 8 * width) - bar.size
        self._put(pci.BASE_ADDRESS_0 + 4 * bar.index, width, kind, writable)

    def _capability(self, number: int, size: int, align: int = 4) -> int:
        offset = -(-self._next // align) * align
        if offset + size > pci.CONFIG_SPACE_SIZE:
            raise UsageError("the capabilities do not fit configuration space")
        self._data[self._link] = offset
        self._data[offset + pci.CAP_LIST_ID] = number
        self._link = offset + pci.CAP_LIST_NEXT
        self._next = offset + size
        self._put(pci.STATUS, 2, self._get(pci.STATUS, 2) | pci.StatusBit.CAP_LIST)
        return offset

    def _power(self) -> None:
        offset = self._capability(pci.CapId.PM, pci.PM_SIZEOF)
        self._put(offset + pci.PM_PMC, 2, 3)  # version 3, no PME
        self._put(offset + pci.PM_CTRL, 2, pci.PM_CTRL_NO_SOFT_RESET, pci.PM_CTRL_STATE_MASK)

    def _msi(self) -> None:
        offset = self.msi_offset = self._capability(pci.CapId.MSI, pci.MSI_SIZEOF_64)
        flags = pci.MSI_FLAGS_64BIT | self._msi_log2 << 1
        self._put(offset + pci.MSI_FLAGS, 2, flags, pci.MSI_FLAGS_QSIZE | pci.MSI_FLAGS_ENABLE)
        self._put(offset + pci.MSI_ADDRESS_LO, 4, 0, 0xFFFFFFFC)
        self._put(offset + pci.MSI_ADDRESS_HI, 4, 0, 0xFFFFFFFF)
        self._put(offset + pci.MSI_DATA_64, 2, 0, 0xFFFF)

    def _clamp_msi(self) -> None:
        """More vectors enabled than there are: keep what there are (as QEMU does)."""
        flags = self._get(self.msi_offset + pci.MSI_FLAGS, 2)
        enabled = min((flags & pci.MSI_FLAGS_QSIZE) >> 4, self._msi_log2)
        flags = flags & ~pci.MSI_FLAGS_QSIZE | enabled << 4
        self._put(self.msi_offset + pci.MSI_FLAGS, 2, flags)

    def _express(self, flr: bool) -> None:
        offset = self._capability(pci.CapId.EXPRESS, pci.EXP_SIZEOF_V2, align=16)
        self.express_offset = offset
        self._put(offset + pci.EXP_FLAGS, 2, pci.EXP_FLAGS_V2)
        devcap = pci.EXP_DEVCAP_EXT_TAG | pci.EXP_DEVCAP_RBER | 2  # up to 512 bytes of payload
        self._put(offset + pci.EXP_DEVCAP, 4, devcap | (pci.EXP_DEVCAP_FLR if flr else 0))
        # Reset: relaxed ordering and no-snoop on, 512-byte read requests. Bit 15 reads 0.
        devctl = pci.EXP_DEVCTL_RELAX_EN | pci.EXP_DEVCTL_NOSNOOP_EN | 0x2000
        self._put(offset + pci.EXP_DEVCTL, 2, devctl, 0x7FFF)
        self._put(offset + pci.EXP_LNKCAP, 4, 0x83)  # 8 GT/s, 8 lanes
        self._put(offset + pci.EXP_LNKCTL, 2, 0, 0x01C3)
        self._put(offset + pci.EXP_LNKSTA, 2, 0x1083)  # slot clock; 8 GT/s, 8 lanes
        self._put(offset + pci.EXP_DEVCTL2, 2, 0, 0x001F)

    def _msix(self, msix: MsixSpec) -> None:
        offset = self.msix_offset = self._capability(pci.CapId.MSIX, pci.MSIX_SIZEOF)
        writable = pci.MSIX_FLAGS_ENABLE | pci.MSIX_FLAGS_MASKALL
        self._put(offset + pci.MSIX_FLAGS, 2, msix.vectors - 1, writable)
        self._put(offset + pci.MSIX_TABLE, 4, msix.table | msix.bar)
        self._put(offset + pci.MSIX_PBA, 4, msix.pba | msix.bar)

    def _asks_for_reset(self, offset: int, data: bytes) -> bool:
        if not self.express_offset:
            return False
        if not self._get(self.express_offset + pci.EXP_DEVCAP, 4) & pci.EXP_DEVCAP_FLR:
            return False
        high = self.express_offset + pci.EXP_DEVCTL + 1 - offset
        return 0 <= high < len(data) and bool(data[high] << 8 & pci.EXP_DEVCTL_BCR_FLR)
