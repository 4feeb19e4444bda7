# SPDX-License-Identifier: Apache-2.0
"""Numbers and layouts of VFIO (linux/vfio.h).

Names are the header's without ``VFIO_``. Every layout is written out with its padding and has the
size of the oldest version that carries what Holdfast needs: the kernel takes it from ``argsz``.
Integers are in host byte order, which is little-endian on every machine Holdfast supports.
"""

from __future__ import annotations

import struct
from typing import Final

from holdfast.uapi.ioc import io

TYPE: Final = ";"
BASE: Final = 100
API_VERSION: Final = 0

# -- containers and groups -----------------------------------------------------------------------

TYPE1_IOMMU: Final = 1
TYPE1V2_IOMMU: Final = 3
NOIOMMU_IOMMU: Final = 8
UNMAP_ALL: Final = 9

GET_API_VERSION: Final = io(TYPE, BASE + 0)
CHECK_EXTENSION: Final = io(TYPE, BASE + 1)
SET_IOMMU: Final = io(TYPE, BASE + 2)
GROUP_GET_STATUS: Final = io(TYPE, BASE + 3)
GROUP_SET_CONTAINER: Final = io(TYPE, BASE + 4)
GROUP_GET_DEVICE_FD: Final = io(TYPE, BASE + 6)

GROUP_FLAGS_VIABLE: Final = 1 << 0
GROUP_FLAGS_CONTAINER_SET: Final = 1 << 1

GROUP_STATUS: Final = struct.Struct("<II")  # argsz flags

# -- devices -------------------------------------------------------------------------------------

DEVICE_GET_INFO: Final = io(TYPE, BASE + 7)
DEVICE_GET_REGION_INFO: Final = io(TYPE, BASE + 8)
DEVICE_GET_IRQ_INFO: Final = io(TYPE, BASE + 9)
DEVICE_SET_IRQS: Final = io(TYPE, BASE + 10)
DEVICE_RESET: Final = io(TYPE, BASE + 11)
DEVICE_BIND_IOMMUFD: Final = io(TYPE, BASE + 18)
DEVICE_ATTACH_IOMMUFD_PT: Final = io(TYPE, BASE + 19)

DEVICE_FLAGS_RESET: Final = 1 << 0
DEVICE_FLAGS_PCI: Final = 1 << 1

REGION_INFO_FLAG_READ: Final = 1 << 0
REGION_INFO_FLAG_WRITE: Final = 1 << 1
REGION_INFO_FLAG_MMAP: Final = 1 << 2
REGION_INFO_FLAG_CAPS: Final = 1 << 3

REGION_INFO_CAP_SPARSE_MMAP: Final = 1
REGION_INFO_CAP_MSIX_MAPPABLE: Final = 3

PCI_CONFIG_REGION_INDEX: Final = 7
PCI_NUM_REGIONS: Final = 9
PCI_NUM_IRQS: Final = 5

IRQ_INFO_EVENTFD: Final = 1 << 0
IRQ_INFO_MASKABLE: Final = 1 << 1
IRQ_INFO_AUTOMASKED: Final = 1 << 2
IRQ_INFO_NORESIZE: Final = 1 << 3

IRQ_SET_DATA_NONE: Final = 1 << 0
IRQ_SET_DATA_BOOL: Final = 1 << 1
IRQ_SET_DATA_EVENTFD: Final = 1 << 2
IRQ_SET_ACTION_MASK: Final = 1 << 3
IRQ_SET_ACTION_UNMASK: Final = 1 << 4
IRQ_SET_ACTION_TRIGGER: Final = 1 << 5

INFO_CAP_HEADER: Final = struct.Struct("<HHI")  # id version next
DEVICE_INFO: Final = struct.Struct("<IIII")  # argsz flags num_regions num_irqs
REGION_INFO: Final = struct.Struct("<IIIIQQ")  # argsz flags index cap_offset size offset
SPARSE_MMAP: Final = struct.Struct("<II")  # nr_areas reserved, behind the capability's header
SPARSE_MMAP_AREA: Final = struct.Struct("<QQ")  # offset size
IRQ_INFO: Final = struct.Struct("<IIII")  # argsz flags index count
IRQ_SET: Final = struct.Struct("<IIIII")  # argsz flags index start count, then data
BIND_IOMMUFD: Final = struct.Struct("<IIiI")  # argsz flags iommufd out_devid
ATTACH_IOMMUFD_PT: Final = struct.Struct("<III")  # argsz flags pt_id

# -- type1: the I/O address space of a container -------------------------------------------------

IOMMU_GET_INFO: Final = io(TYPE, BASE + 12)
IOMMU_MAP_DMA: Final = io(TYPE, BASE + 13)
IOMMU_UNMAP_DMA: Final = io(TYPE, BASE + 14)

IOMMU_INFO_PGSIZES: Final = 1 << 0
IOMMU_INFO_CAPS: Final = 1 << 1
IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: Final = 1
IOMMU_TYPE1_INFO_DMA_AVAIL: Final = 3

DMA_MAP_FLAG_READ: Final = 1 << 0
DMA_MAP_FLAG_WRITE: Final = 1 << 1

TYPE1_INFO: Final = struct.Struct("<IIQII")  # argsz flags iova_pgsizes cap_offset pad
IOVA_RANGES: Final = struct.Struct("<II")  # nr_iovas reserved, behind the capability's header
IOVA_RANGE: Final = struct.Struct("<QQ")  # start end (inclusive)
DMA_AVAIL: Final = struct.Struct("<I")  # avail, behind the capability's header
DMA_MAP: Final = struct.Struct("<IIQQQ")  # argsz flags vaddr iova size
DMA_UNMAP: Final = struct.Struct("<IIQQ")  # argsz flags iova size

assert GROUP_STATUS.size == 8
assert INFO_CAP_HEADER.size == 8
assert DEVICE_INFO.size == 16
assert REGION_INFO.size == 32
assert SPARSE_MMAP.size == 8
assert SPARSE_MMAP_AREA.size == 16
assert IRQ_INFO.size == 16
assert IRQ_SET.size == 20
assert BIND_IOMMUFD.size == 16
assert ATTACH_IOMMUFD_PT.size == 12
assert TYPE1_INFO.size == 24
assert IOVA_RANGES.size == 8
assert IOVA_RANGE.size == 16
assert DMA_AVAIL.size == 4
assert DMA_MAP.size == 32
assert DMA_UNMAP.size == 24
DMA_UNMAP_ALL: Final = 1 << 1
