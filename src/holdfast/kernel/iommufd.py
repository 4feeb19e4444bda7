# SPDX-License-Identifier: Apache-2.0
"""iommufd: I/O address spaces (IOAS) of their own, and VFIO devices attached to them.

Sources: linux/iommufd.h, linux/vfio.h; drivers/iommu/iommufd/{ioas,io_pagetable,pages}.c,
drivers/vfio/device_cdev.c. Pins belong to the IOAS: they go at the unmap or with the iommufd.
Thread-safe.
"""

from __future__ import annotations

import errno
from typing import Final

import numpy as np

from holdfast.errors import HoldfastError
from holdfast.kernel import ioctl, libc
from holdfast.kernel.failure import failure
from holdfast.kernel.vfio_device import pairs
from holdfast.uapi import iommufd as u
from holdfast.uapi import vfio
from holdfast.values import Perm

NODE: Final = "/dev/iommu"

_MOST_RANGES: Final = 1024
"""Usable IOVA ranges taken at most. Each reserved window makes one; machines have a handful."""


def bind(device: int, iommufd: int, target: str) -> None:
    """Make a freshly opened VFIO device one of this iommufd. EBUSY/EINVAL if someone holds it."""
    request = vfio.BIND_IOMMUFD.pack(vfio.BIND_IOMMUFD.size, 0, iommufd, 0)
    ioctl.call(
        device,
        vfio.DEVICE_BIND_IOMMUFD,
        bytearray(request),
        operation="VFIO_DEVICE_BIND_IOMMUFD",
        target=target,
    )


def attach(device: int, ioas: int, target: str) -> None:
    """Let a bound device translate through this IOAS."""
    request = vfio.ATTACH_IOMMUFD_PT.pack(vfio.ATTACH_IOMMUFD_PT.size, 0, ioas)
    ioctl.call(
        device,
        vfio.DEVICE_ATTACH_IOMMUFD_PT,
        bytearray(request),
        operation="VFIO_DEVICE_ATTACH_IOMMUFD_PT",
        target=target,
    )


def new_ioas(fd: int, target: str = "") -> int:
    """A new, empty I/O address space; it lives as long as the iommufd."""
    request = bytearray(u.IOAS_ALLOC_ARG.pack(u.IOAS_ALLOC_ARG.size, 0, 0))
    ioctl.call(fd, u.IOAS_ALLOC, request, operation="IOMMU_IOAS_ALLOC", target=target)
    return int(u.IOAS_ALLOC_ARG.unpack(request)[2])


def iova_ranges(fd: int, ioas: int, target: str = "") -> tuple[tuple[int, int], ...]:
    """Usable IOVAs of what is attached now, first and last inclusive."""
    room = np.zeros(u.IOVA_RANGE.size * _MOST_RANGES, np.uint8)
    request = bytearray(
        u.IOVA_RANGES_ARG.pack(u.IOVA_RANGES_ARG.size, ioas, _MOST_RANGES, 0, room.ctypes.data, 0)
    )
    ioctl.call(fd, u.IOAS_IOVA_RANGES, request, operation="IOMMU_IOAS_IOVA_RANGES", target=target)
    count = int(u.IOVA_RANGES_ARG.unpack(request)[2])
    return tuple(pairs(room.tobytes(), count, u.IOVA_RANGE))


def has_map_file(fd: int, target: str = "") -> bool:
    """Whether the kernel has IOMMU_IOAS_MAP_FILE (6.13).

    Asked with no permissions, which a kernel that knows the command refuses with EINVAL before it
    looks at anything else, and one that does not with ENOTTY.
    """
    request = u.MAP_FILE_ARG.pack(u.MAP_FILE_ARG.size, 0, 0, -1, 0, 0, 0)
    try:
        ioctl.call(
            fd,
            u.IOAS_MAP_FILE,
            bytearray(request),
            operation="IOMMU_IOAS_MAP_FILE",
            target=target,
        )
    except HoldfastError as error:
        return error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP)
    return True


def map_file(
    fd: int, ioas: int, iova: int, size: int, perm: Perm, file: int, offset: int, target: str = ""
) -> None:
    """Pin ``size`` bytes of a memfd or hugetlbfs file and map them. On error nothing is mapped.

    EEXIST or EADDRINUSE: something is mapped there. EINVAL: not a memory file, not whole pages,
    or outside the usable IOVAs. ENOMEM: RLIMIT_MEMLOCK, or no memory.
    """
    request = u.MAP_FILE_ARG.pack(u.MAP_FILE_ARG.size, _flags(perm), ioas, file, offset, size, iova)
    ioctl.call(
        fd,
        u.IOAS_MAP_FILE,
        bytearray(request),
        operation="IOMMU_IOAS_MAP_FILE",
        target=target,
    )


def map_memory(
    fd: int, ioas: int, iova: int, size: int, perm: Perm, address: int, target: str = ""
) -> None:
    """Pin ``size`` bytes of this process at ``address`` and map them. Errors as above."""
    request = u.MAP_ARG.pack(u.MAP_ARG.size, _flags(perm), ioas, 0, address, size, iova)
    ioctl.call(fd, u.IOAS_MAP, bytearray(request), operation="IOMMU_IOAS_MAP", target=target)


def map_file_here(
    fd: int, ioas: int, iova: int, size: int, perm: Perm, file: int, offset: int, target: str = ""
) -> None:
    """:func:`map_file` for kernels without it: through a mapping that ends with the call.

    The IOAS must have a device attached: then the pages are pinned when this returns
    (``iopt_area_fill_domains``). iommufd remembers the address, which it would need again only if
    all devices left the IOAS and one came back.
    """
    protection = libc.PROT_READ | (libc.PROT_WRITE if perm & Perm.WRITE else 0)
    try:
        address = libc.mmap(None, size, protection, libc.MAP_SHARED, file, offset)
    except OSError as error:
        raise failure(error, "map file", target) from error
    try:
        map_memory(fd, ioas, iova, size, perm, address, target)
    finally:
        libc.munmap(address, size)


def unmap(fd: int, ioas: int, iova: int, size: int, target: str = "") -> int:
    """IOMMU_IOAS_UNMAP: the bytes really unmapped and unpinned. Synchronous.

    0 where the kernel answers ENOENT: nothing is mapped there, or the range cuts a map in two.
    """
    request = bytearray(u.UNMAP_ARG.pack(u.UNMAP_ARG.size, ioas, iova, size))
    try:
        ioctl.call(fd, u.IOAS_UNMAP, request, operation="IOMMU_IOAS_UNMAP", target=target)
    except HoldfastError as error:
        if error.errno != errno.ENOENT:
            raise
        return 0
    return int(u.UNMAP_ARG.unpack(request)[3])


def _flags(perm: Perm) -> int:
    return (
        u.MAP_FIXED_IOVA
        | (u.MAP_READABLE if perm & Perm.READ else 0)
        | (u.MAP_WRITEABLE if perm & Perm.WRITE else 0)
    )
