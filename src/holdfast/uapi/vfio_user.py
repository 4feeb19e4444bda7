# SPDX-License-Identifier: Apache-2.0
"""Numbers and layouts of the vfio-user protocol, version 0.x.

Sources: the vfio-user specification (docs/interop/vfio-user.rst of QEMU, docs/vfio-user.rst of
libvfio-user) and ``linux/vfio.h``, whose structures it carries. Integers are in host byte order;
Holdfast supports little-endian hosts only, so every layout here is written little-endian and
packed. The size beside each layout is asserted: a slip fails at import.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

MAJOR: Final = 0
MINOR: Final = 1
"""The version Holdfast speaks: 0.1. Minors 0 to 2 share everything used here."""


class Command(enum.IntEnum):
    """Message types (vfio-user specification, "Commands")."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    DIRTY_PAGES = 14  # retired
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


# -- header flags --------------------------------------------------------------------------------

TYPE_MASK: Final = 0xF
TYPE_COMMAND: Final = 0
TYPE_REPLY: Final = 1
NO_REPLY: Final = 0x10
ERROR: Final = 0x20

# -- DMA map and unmap flags ---------------------------------------------------------------------

DMA_READ: Final = 1 << 0
DMA_WRITE: Final = 1 << 1
DMA_MMAP: Final = 1 << 2
DMA_FILE_IO: Final = 1 << 3
DMA_MAP_FLAGS: Final = DMA_READ | DMA_WRITE | DMA_MMAP | DMA_FILE_IO

UNMAP_DIRTY_BITMAP: Final = 1 << 0
UNMAP_ALL: Final = 1 << 1

# -- device, region and interrupt information (linux/vfio.h) --------------------------------------

DEVICE_FLAG_RESET: Final = 1 << 0
DEVICE_FLAG_PCI: Final = 1 << 1

REGION_FLAG_READ: Final = 1 << 0
REGION_FLAG_WRITE: Final = 1 << 1
REGION_FLAG_MMAP: Final = 1 << 2
REGION_FLAG_CAPS: Final = 1 << 3

REGION_CAP_SPARSE_MMAP: Final = 1
REGION_CAP_TYPE: Final = 2
REGION_CAP_MSIX_MAPPABLE: Final = 3

IRQ_FLAG_EVENTFD: Final = 1 << 0
IRQ_FLAG_MASKABLE: Final = 1 << 1
IRQ_FLAG_AUTOMASKED: Final = 1 << 2
IRQ_FLAG_NORESIZE: Final = 1 << 3

IRQ_DATA_NONE: Final = 1 << 0
IRQ_DATA_BOOL: Final = 1 << 1
IRQ_DATA_EVENTFD: Final = 1 << 2
IRQ_DATA_MASK: Final = IRQ_DATA_NONE | IRQ_DATA_BOOL | IRQ_DATA_EVENTFD
IRQ_ACTION_MASK: Final = 1 << 3
IRQ_ACTION_UNMASK: Final = 1 << 4
IRQ_ACTION_TRIGGER: Final = 1 << 5
IRQ_ACTION_BITS: Final = IRQ_ACTION_MASK | IRQ_ACTION_UNMASK | IRQ_ACTION_TRIGGER

PCI_REGIONS: Final = 9
PCI_IRQS: Final = 5

# -- region I/O descriptors ----------------------------------------------------------------------

IO_FD_IOEVENTFD: Final = 0
IO_FD_IOREGIONFD: Final = 1
IOEVENTFD_DATAMATCH: Final = 1 << 0
IOEVENTFD_PIO: Final = 1 << 1

# -- limits: what the specification says counts when a peer names none ----------------------------

DEFAULT_MAX_MSG_FDS: Final = 1
DEFAULT_MAX_DATA_XFER: Final = 1 << 20
DEFAULT_MAX_DMA_MAPS: Final = 65535
DEFAULT_PGSIZES: Final = 4096

# -- layouts (offsets count from the end of the header) --------------------------------------------

HEADER: Final = struct.Struct("<HHIII")  # msg_id command msg_size flags error
VERSION: Final = struct.Struct("<HH")  # major minor, then JSON and a NUL
DMA_MAP: Final = struct.Struct("<IIQQQ")  # argsz flags offset address size
DMA_UNMAP: Final = struct.Struct("<IIQQ")  # argsz flags address size
DEVICE_INFO: Final = struct.Struct("<IIII")  # argsz flags num_regions num_irqs
REGION_INFO: Final = struct.Struct("<IIIIQQ")  # argsz flags index cap_offset size offset
REGION_CAP: Final = struct.Struct("<HHI")  # id version next
SPARSE_HEAD: Final = struct.Struct("<II")  # nr_areas reserved
SPARSE_AREA: Final = struct.Struct("<QQ")  # offset size
IO_FDS: Final = struct.Struct("<IIII")  # argsz flags index count
IO_FD_ENTRY: Final = struct.Struct("<QQIIIIQ")  # offset size fd_index type flags pad datamatch
IRQ_INFO: Final = struct.Struct("<IIII")  # argsz flags index count
IRQ_SET: Final = struct.Struct("<IIIII")  # argsz flags index start count
REGION_ACCESS: Final = struct.Struct("<QII")  # offset region count
WRITE_MULTI: Final = struct.Struct("<Q")  # wr_cnt
WRITE_MULTI_ENTRY: Final = struct.Struct("<QII8s")  # offset region count data
DMA_ACCESS: Final = struct.Struct("<QQ")  # address count

assert HEADER.size == 16
assert VERSION.size == 4
assert DMA_MAP.size == 32
assert DMA_UNMAP.size == 24
assert DEVICE_INFO.size == 16
assert REGION_INFO.size == 32
assert REGION_CAP.size == 8
assert SPARSE_HEAD.size == 8
assert SPARSE_AREA.size == 16
assert IO_FDS.size == 16
assert IO_FD_ENTRY.size == 40
assert IRQ_INFO.size == 16
assert IRQ_SET.size == 20
assert REGION_ACCESS.size == 16
assert WRITE_MULTI.size == 8
assert WRITE_MULTI_ENTRY.size == 24
assert DMA_ACCESS.size == 16
