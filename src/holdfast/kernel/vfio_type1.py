# SPDX-License-Identifier: Apache-2.0
"""VFIO groups and containers with the type1 IOMMU driver.

Sources: linux/vfio.h; drivers/vfio/group.c, container.c, vfio_iommu_type1.c. What a map pins are
page references: they belong to the container, outlive the mapping and the process they were made
through, and go at the unmap or with the last group of the container. Thread-safe.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from holdfast.errors import NotSupported
from holdfast.kernel import ioctl, libc
from holdfast.kernel.failure import failure
from holdfast.kernel.vfio_device import bounded, capabilities, pairs
from holdfast.uapi import vfio as u
from holdfast.values import Perm

CONTAINER: Final = "/dev/vfio/vfio"


@dataclass(frozen=True, slots=True)
class Type1Info:
    """What an I/O address space takes.

    page_sizes
        bit n set: pages of 2**n bytes
    ranges
        usable IOVAs, first and last inclusive; empty if the kernel does not say (before 5.4)
    maps_left
        how many more maps the container takes now; None if the kernel does not say (before 5.10)
    """

    page_sizes: int
    ranges: tuple[tuple[int, int], ...]
    maps_left: int | None


def open_node(path: str, target: str) -> int:
    """Open a device node, close-on-exec; the caller owns it. Errors as in ``failure.py``."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise failure(error, f"open {path}", target) from error


def open_container(target: str) -> int:
    """A new container that can have the type1v2 driver; the caller owns it."""
    fd = open_node(CONTAINER, target)
    try:
        version = ioctl.call(fd, u.GET_API_VERSION, operation="VFIO_GET_API_VERSION", target=target)
        has_type1 = version == u.API_VERSION and ioctl.call(
            fd, u.CHECK_EXTENSION, u.TYPE1V2_IOMMU, operation="VFIO_CHECK_EXTENSION", target=target
        )
        if not has_type1:
            raise NotSupported(
                f"VFIO (API version {version}) has no type1v2 IOMMU driver",
                operation="open container",
                target=target,
                hint="modprobe vfio_iommu_type1",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def group_viable(group: int, target: str) -> bool:
    """Whether every function of the group is with VFIO or with no driver that does DMA."""
    answer = bytearray(u.GROUP_STATUS.pack(u.GROUP_STATUS.size, 0))
    ioctl.call(group, u.GROUP_GET_STATUS, answer, operation="VFIO_GROUP_GET_STATUS", target=target)
    _, flags = u.GROUP_STATUS.unpack(answer)
    return bool(flags & u.GROUP_FLAGS_VIABLE)


def join(group: int, container: int, target: str) -> None:
    """Put the container's first group into it, and give the container the type1v2 driver."""
    ioctl.call(
        group,
        u.GROUP_SET_CONTAINER,
        bytearray(container.to_bytes(4, "little")),
        operation="VFIO_GROUP_SET_CONTAINER",
        target=target,
    )
    ioctl.call(container, u.SET_IOMMU, u.TYPE1V2_IOMMU, operation="VFIO_SET_IOMMU", target=target)


def device_of(group: int, address: str, target: str) -> int:
    """Descriptor of the group's function at a PCI address, close-on-exec; the caller owns it."""
    return ioctl.call(
        group,
        u.GROUP_GET_DEVICE_FD,
        bytearray(address.encode() + b"\0"),
        operation="VFIO_GROUP_GET_DEVICE_FD",
        target=target,
    )


def info(container: int, target: str) -> Type1Info:
    """VFIO_IOMMU_GET_INFO with its capabilities."""
    room = u.TYPE1_INFO.size
    while True:
        answer = bytearray(room)
        u.TYPE1_INFO.pack_into(answer, 0, room, 0, 0, 0, 0)
        ioctl.call(
            container, u.IOMMU_GET_INFO, answer, operation="VFIO_IOMMU_GET_INFO", target=target
        )
        argsz, flags, page_sizes, first, _ = u.TYPE1_INFO.unpack_from(answer)
        if argsz <= room:
            break
        room = bounded(argsz, target)
    ranges: tuple[tuple[int, int], ...] = ()
    left = None
    for kind, body in capabilities(answer, first if flags & u.IOMMU_INFO_CAPS else 0):
        if kind == u.IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
            count, _ = u.IOVA_RANGES.unpack_from(body)
            ranges = tuple(pairs(body[u.IOVA_RANGES.size :], count, u.IOVA_RANGE))
        elif kind == u.IOMMU_TYPE1_INFO_DMA_AVAIL:
            (left,) = u.DMA_AVAIL.unpack_from(body)
    return Type1Info(page_sizes if flags & u.IOMMU_INFO_PGSIZES else 0, ranges, left)


def map_memory(
    container: int, iova: int, size: int, perm: Perm, address: int, target: str = ""
) -> None:
    """Pin ``size`` bytes of this process at ``address`` and map them. On error nothing is mapped.

    EEXIST: something is mapped there. ENOSPC: the container's maps are used up. EINVAL: not whole
    pages, or outside the usable IOVAs. ENOMEM: RLIMIT_MEMLOCK, or no memory.
    """
    request = u.DMA_MAP.pack(u.DMA_MAP.size, int(perm), address, iova, size)
    ioctl.call(
        container,
        u.IOMMU_MAP_DMA,
        bytearray(request),
        operation="VFIO_IOMMU_MAP_DMA",
        target=target,
    )


def map_file(
    container: int, iova: int, size: int, perm: Perm, fd: int, offset: int, target: str = ""
) -> None:
    """Pin ``size`` bytes of a file and map them. Errors as in :func:`map_memory`.

    Type1 takes addresses of the calling process only, so the file is mapped here for as long as
    the call takes. What stays are references to the file's pages, not the mapping.
    """
    protection = libc.PROT_READ | (libc.PROT_WRITE if perm & Perm.WRITE else 0)
    try:
        address = libc.mmap(None, size, protection, libc.MAP_SHARED, fd, offset)
    except OSError as error:
        raise failure(error, "map file", target) from error
    try:
        map_memory(container, iova, size, perm, address, target)
    finally:
        libc.munmap(address, size)


def unmap(container: int, iova: int, size: int, target: str = "") -> int:
    """VFIO_IOMMU_UNMAP_DMA: the bytes really unmapped and unpinned. Synchronous.

    0 if nothing is mapped there, and in some older kernels also if another process made the map
    (``vfio_dma_do_unmap`` compared address spaces). EINVAL if the range cuts a map in two.
    """
    request = bytearray(u.DMA_UNMAP.pack(u.DMA_UNMAP.size, 0, iova, size))
    ioctl.call(
        container,
        u.IOMMU_UNMAP_DMA,
        request,
        operation="VFIO_IOMMU_UNMAP_DMA",
        target=target,
    )
    return int(u.DMA_UNMAP.unpack(request)[3])


def unmap_all(container: int, target: str = "") -> None:
    """VFIO_IOMMU_UNMAP_DMA of everything (VFIO_DMA_UNMAP_FLAG_ALL, Linux 5.12). Synchronous."""
    request = bytearray(u.DMA_UNMAP.pack(u.DMA_UNMAP.size, u.DMA_UNMAP_ALL, 0, 0))
    ioctl.call(
        container,
        u.IOMMU_UNMAP_DMA,
        request,
        operation="VFIO_IOMMU_UNMAP_DMA (all)",
        target=target,
    )
