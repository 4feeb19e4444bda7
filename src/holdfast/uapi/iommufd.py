# SPDX-License-Identifier: Apache-2.0
"""Numbers and layouts of iommufd (linux/iommufd.h).

Names are the header's without ``IOMMU_``. The first field of every structure is its own size, by
which the kernel knows the version. Integers are in host byte order, as in ``uapi.vfio``.
"""

from __future__ import annotations

import struct
from typing import Final

from holdfast.uapi.ioc import io

TYPE: Final = ";"

DESTROY: Final = io(TYPE, 0x80)
IOAS_ALLOC: Final = io(TYPE, 0x81)
IOAS_IOVA_RANGES: Final = io(TYPE, 0x84)
IOAS_MAP: Final = io(TYPE, 0x85)
IOAS_UNMAP: Final = io(TYPE, 0x86)
IOAS_MAP_FILE: Final = io(TYPE, 0x8F)

MAP_FIXED_IOVA: Final = 1 << 0
MAP_WRITEABLE: Final = 1 << 1
MAP_READABLE: Final = 1 << 2

IOAS_ALLOC_ARG: Final = struct.Struct("<III")  # size flags out_ioas_id
IOVA_RANGES_ARG: Final = struct.Struct("<IIIIQQ")
# size ioas_id num_iovas reserved allowed_iovas out_iova_alignment
IOVA_RANGE: Final = struct.Struct("<QQ")  # start last
MAP_ARG: Final = struct.Struct("<IIIIQQQ")  # size flags ioas_id reserved user_va length iova
MAP_FILE_ARG: Final = struct.Struct("<IIIiQQQ")  # size flags ioas_id fd start length iova
UNMAP_ARG: Final = struct.Struct("<IIQQ")  # size ioas_id iova length

assert IOAS_ALLOC_ARG.size == 12
assert IOVA_RANGES_ARG.size == 32
assert IOVA_RANGE.size == 16
assert MAP_ARG.size == 40
assert MAP_FILE_ARG.size == 40
assert UNMAP_ARG.size == 24
