# SPDX-License-Identifier: Apache-2.0
"""Which parts of a function's regions can be mapped.

The kernel says it in three ways: a sparse list; a flag for the whole region; and, for the region
with the MSI-X table, a capability that the table may be mapped as well (since 4.16). Without that
capability its pages are left out, as mmap refuses them or they would change interrupts behind the
kernel's back. Areas are whole pages inside the region: BARs below 4096 bytes have none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Final

from holdfast import pci
from holdfast.errors import DeviceError
from holdfast.kernel import vfio_device as kernel
from holdfast.kernel.failure import failure
from holdfast.uapi import pci_regs
from holdfast.uapi import vfio as u
from holdfast.values import CONFIG_REGION, Area, Region

PAGE: Final = 4096
_MOST: Final = 64
"""Regions looked at. vfio-pci has 9, and a few more for some graphics cards."""


def discover(fd: int, count: int, target: str) -> tuple[Region, ...]:
    """Every region, by index. Raises DeviceError if there is no configuration space."""
    found = [kernel.region_info(fd, index, target) for index in range(min(count, _MOST))]
    if len(found) <= CONFIG_REGION or found[CONFIG_REGION].size < pci_regs.CONFIG_SPACE_SIZE:
        raise DeviceError("no configuration space", operation="open device", target=target)
    config = found[CONFIG_REGION]
    table: tuple[int, Area] | None = None
    if any(info.flags & u.REGION_INFO_FLAG_MMAP and not info.msix_mappable for info in found):
        table = msix_table(partial(_read, fd, config.offset, target))
    regions = []
    for index, info in enumerate(found):
        hole = table[1] if table is not None and table[0] == index else None
        regions.append(
            Region(
                index=index,
                size=info.size,
                readable=bool(info.flags & u.REGION_INFO_FLAG_READ),
                writable=bool(info.flags & u.REGION_INFO_FLAG_WRITE),
                areas=areas(info, hole),
                file_offset=info.offset,
            )
        )
    return tuple(regions)


def areas(info: kernel.RegionInfo, table: Area | None) -> tuple[Area, ...]:
    """The mappable areas of a region; ``table`` is where it has the MSI-X table, if it does."""
    if not info.flags & u.REGION_INFO_FLAG_MMAP:
        return ()
    if info.sparse is not None:
        wanted: Iterable[Area] = (Area(offset, size) for offset, size in info.sparse)
    elif table is not None and not info.msix_mappable:
        # Rounded inwards, so the pages that the table begins and ends in are out, too.
        wanted = (Area(0, table.offset), Area(table.end, max(info.size - table.end, 0)))
    else:
        wanted = (Area(0, info.size),)
    return tuple(_whole_pages(wanted, info.size))


def msix_table(read: pci.Read) -> tuple[int, Area] | None:
    """BAR and place of the MSI-X table, or None (PCI Local Bus 3.0, 6.8.2)."""
    at = pci.find_capability(read, pci_regs.CapId.MSIX)
    if at is None:
        return None
    entries = (pci.read_u16(read, at + pci_regs.MSIX_FLAGS) & pci_regs.MSIX_FLAGS_QSIZE) + 1
    place = pci.read_u32(read, at + pci_regs.MSIX_TABLE)
    offset = place & ~pci_regs.MSIX_BIR_MASK
    return place & pci_regs.MSIX_BIR_MASK, Area(offset, entries * pci_regs.MSIX_ENTRY_SIZE)


def _whole_pages(wanted: Iterable[Area], size: int) -> Iterator[Area]:
    """Areas rounded inwards to pages and cut to the region; nothing of those that vanish."""
    for area in wanted:
        first = -(-area.offset // PAGE) * PAGE
        end = min(area.end, size) // PAGE * PAGE
        if first < end:
            yield Area(first, end - first)


def _read(fd: int, base: int, target: str, offset: int, count: int) -> bytes:
    try:
        return os.pread(fd, count, base + offset)
    except OSError as error:
        raise failure(error, "read configuration space", target) from error
