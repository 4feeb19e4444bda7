# SPDX-License-Identifier: Apache-2.0
"""Reading configuration space: capability walk and BAR decoding over a read function.

Configuration space is data from the other side: a broken or hostile function may chain its
capabilities in a circle or outside of the space. Both walks are bounded by the number of
capabilities that fit, and stop at the first pointer that was seen before or lies outside.

Source: PCI Local Bus 3.0, 6.7; PCI Express Base, 7.5 and 7.6.3; linux/pci_regs.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from holdfast.errors import DeviceError
from holdfast.uapi import pci_regs as pci

Read = Callable[[int, int], bytes]
"""``read(offset, count)`` of configuration space."""
Write = Callable[[int, bytes], object]
"""``write(offset, data)`` of configuration space."""


@dataclass(frozen=True, slots=True)
class Capability:
    """One capability: its id and where it starts, in bytes."""

    id: int
    offset: int


@dataclass(frozen=True, slots=True)
class BarInfo:
    """One implemented base address register.

    index
        0-5; a 64-bit BAR also uses the next one.
    address
        What is programmed now, type bits removed.
    size
        In bytes; 0 where it was not measured (:func:`decode_bars` without sizes).
    """

    index: int
    io: bool
    wide: bool
    prefetchable: bool
    address: int
    size: int


def read_u8(read: Read, offset: int) -> int:
    return _read(read, offset, 1)


def read_u16(read: Read, offset: int) -> int:
    return _read(read, offset, 2)


def read_u32(read: Read, offset: int) -> int:
    return _read(read, offset, 4)


def _read(read: Read, offset: int, width: int) -> int:
    data = read(offset, width)
    if len(data) != width:
        raise DeviceError(
            f"configuration space answered {len(data)} bytes at {offset:#x}, not {width}",
            operation="read configuration space",
        )
    return int.from_bytes(data, "little")


def capabilities(read: Read) -> Iterator[Capability]:
    """Walk the capability list below 0x100. Ends silently at a broken pointer."""
    if not read_u16(read, pci.STATUS) & pci.StatusBit.CAP_LIST:
        return
    seen: set[int] = set()
    offset = read_u8(read, pci.CAPABILITY_LIST) & ~3
    while pci.STD_HEADER_SIZE <= offset <= pci.CONFIG_SPACE_SIZE - pci.CAP_SIZEOF:
        if offset in seen:
            return
        seen.add(offset)
        header = read_u16(read, offset)
        if header == 0xFFFF:  # the function is gone
            return
        yield Capability(header & 0xFF, offset)
        offset = header >> 8 & ~3


def extended_capabilities(read: Read) -> Iterator[Capability]:
    """Walk the extended list from 0x100. Only for a configuration space of 4096 bytes."""
    seen: set[int] = set()
    offset = pci.EXT_CAP_START
    while pci.EXT_CAP_START <= offset <= pci.CONFIG_SPACE_EXP_SIZE - pci.CAP_SIZEOF:
        header = read_u32(read, offset)
        if offset in seen or header in (0, 0xFFFFFFFF):
            return
        seen.add(offset)
        yield Capability(header & 0xFFFF, offset)
        offset = header >> 20 & ~3


def find_capability(read: Read, capability: int) -> int | None:
    """Offset of the first capability with this id, or None."""
    return next((found.offset for found in capabilities(read) if found.id == capability), None)


def decode_bars(read: Read, sizes: Sequence[int] = ()) -> tuple[BarInfo, ...]:
    """Decode the type bits and addresses of BAR 0-5.

    ``sizes`` in bytes by BAR index, as the backend's region table knows them: a BAR of size 0 is
    not implemented. Without ``sizes``, a BAR counts as implemented if any bit reads 1.
    """
    bars = []
    index = 0
    while index < pci.BASE_ADDRESSES:
        word = read_u32(read, pci.BASE_ADDRESS_0 + 4 * index)
        size = sizes[index] if index < len(sizes) else 0
        if not (size if sizes else word):
            index += 1
            continue
        bar = _decode_bar(read, index, word, size)
        bars.append(bar)
        index += 2 if bar.wide else 1
    return tuple(bars)


def _decode_bar(read: Read, index: int, word: int, size: int) -> BarInfo:
    if word & pci.BASE_ADDRESS_SPACE_IO:
        return BarInfo(index, True, False, False, word & pci.BASE_ADDRESS_IO_MASK, size)
    # Type 64 in BAR 5 has no upper half: take it as a 32-bit BAR.
    wide = (
        word & pci.BASE_ADDRESS_MEM_TYPE_MASK == pci.BASE_ADDRESS_MEM_TYPE_64
        and index + 1 < pci.BASE_ADDRESSES
    )
    address = word & pci.BASE_ADDRESS_MEM_MASK
    if wide:
        address |= read_u32(read, pci.BASE_ADDRESS_0 + 4 * (index + 1)) << 32
    prefetchable = bool(word & pci.BASE_ADDRESS_MEM_PREFETCH)
    return BarInfo(index, False, wide, prefetchable, address, size)


def measure_bars(read: Read, write: Write) -> tuple[BarInfo, ...]:
    """Size every BAR by writing all ones and reading back, then restore it.

    Memory decoding must be off while this runs, and nobody else may use the function
    (PCI Local Bus 3.0, 6.2.5.1).
    """
    sizes = [0] * pci.BASE_ADDRESSES
    saved = [read_u32(read, pci.BASE_ADDRESS_0 + 4 * i) for i in range(pci.BASE_ADDRESSES)]
    masks = []
    for index, word in enumerate(saved):
        offset = pci.BASE_ADDRESS_0 + 4 * index
        write(offset, b"\xff\xff\xff\xff")
        masks.append(read_u32(read, offset))
        write(offset, word.to_bytes(4, "little"))
    index = 0
    while index < pci.BASE_ADDRESSES:
        mask = masks[index]
        wide = False
        if mask & pci.BASE_ADDRESS_SPACE_IO:
            mask &= pci.BASE_ADDRESS_IO_MASK
            # The upper 16 bits of an I/O BAR may be hardwired to zero.
            mask |= 0xFFFF0000 if mask else 0
        else:
            wide = mask & pci.BASE_ADDRESS_MEM_TYPE_MASK == pci.BASE_ADDRESS_MEM_TYPE_64
            mask &= pci.BASE_ADDRESS_MEM_MASK
        if wide and index + 1 < pci.BASE_ADDRESSES:
            mask |= masks[index + 1] << 32
        else:
            mask |= 0xFFFFFFFF << 32 if mask else 0
        sizes[index] = ((1 << 64) - mask) if mask else 0
        index += 2 if wide else 1
    return decode_bars(read, sizes)


def set_command(read: Read, write: Write, bits: int, on: bool) -> int:
    """Set or clear bits of the command register; returns what it reads afterwards.

    The caller must compare: a function may refuse, and a reset may undo it.
    """
    old = read_u16(read, pci.COMMAND)
    new = old | bits if on else old & ~int(bits)  # the complement of a flag drops unnamed bits
    write(pci.COMMAND, new.to_bytes(2, "little"))
    return read_u16(read, pci.COMMAND)
