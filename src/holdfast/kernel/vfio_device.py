# SPDX-License-Identifier: Apache-2.0
"""Calls on a VFIO device descriptor.

Sources: linux/vfio.h; drivers/vfio/pci/vfio_pci_core.c and vfio_pci_intrs.c. Functions raise
SystemFailure (or its subclass by errno) with the kernel's errno. Thread-safe: the kernel orders.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.errors import ResourceError, SystemFailure
from holdfast.kernel import ioctl
from holdfast.uapi import vfio as u

INFO_LIMIT: Final = 64 * 1024
"""Largest information structure taken from the kernel, in bytes."""

MAX_VECTORS: Final = 2048
"""Most vectors of any interrupt type: an MSI-X table ends there (PCI Local Bus 3.0, 6.8.2.3)."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What the device is, as counts. ``resets``: VFIO_DEVICE_RESET works."""

    resets: bool
    regions: int
    irqs: int


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """One region, in bytes. ``sparse``: pieces that may be mapped; None: the kernel lists none."""

    flags: int
    size: int
    offset: int
    sparse: tuple[tuple[int, int], ...] | None
    msix_mappable: bool


def device_info(fd: int, target: str) -> DeviceInfo:
    """VFIO_DEVICE_GET_INFO. SystemFailure if it is no PCI function."""
    answer = bytearray(u.DEVICE_INFO.pack(u.DEVICE_INFO.size, 0, 0, 0))
    ioctl.call(fd, u.DEVICE_GET_INFO, answer, operation="VFIO_DEVICE_GET_INFO", target=target)
    _, flags, regions, irqs = u.DEVICE_INFO.unpack(answer)
    if not flags & u.DEVICE_FLAGS_PCI:
        raise SystemFailure(
            f"not a PCI function (flags {flags:#x})", operation="open device", target=target
        )
    return DeviceInfo(bool(flags & u.DEVICE_FLAGS_RESET), regions, irqs)


def region_info(fd: int, index: int, target: str) -> RegionInfo:
    """VFIO_DEVICE_GET_REGION_INFO with its capabilities. A region that is not there has size 0."""
    room = u.REGION_INFO.size
    while True:
        answer = bytearray(room)
        u.REGION_INFO.pack_into(answer, 0, room, 0, index, 0, 0, 0)
        try:
            ioctl.call(
                fd,
                u.DEVICE_GET_REGION_INFO,
                answer,
                operation="VFIO_DEVICE_GET_REGION_INFO",
                target=target,
            )
        except SystemFailure as error:
            if error.errno != errno.EINVAL:
                raise
            return RegionInfo(0, 0, 0, None, False)  # such as VGA, where there is none
        argsz, flags, _, first, size, offset = u.REGION_INFO.unpack_from(answer)
        if argsz <= room:
            break
        room = bounded(argsz, target)
    sparse, mappable = None, False
    for kind, body in capabilities(answer, first if flags & u.REGION_INFO_FLAG_CAPS else 0):
        if kind == u.REGION_INFO_CAP_SPARSE_MMAP:
            count, _ = u.SPARSE_MMAP.unpack_from(body)
            sparse = tuple(pairs(body[u.SPARSE_MMAP.size :], count, u.SPARSE_MMAP_AREA))
        elif kind == u.REGION_INFO_CAP_MSIX_MAPPABLE:
            mappable = True
    return RegionInfo(flags, size, offset, sparse, mappable)


def irq_info(fd: int, index: int, target: str) -> tuple[int, int]:
    """VFIO_DEVICE_GET_IRQ_INFO: flags and count. ``(0, 0)`` where the type is not there."""
    answer = bytearray(u.IRQ_INFO.pack(u.IRQ_INFO.size, 0, index, 0))
    try:
        ioctl.call(
            fd, u.DEVICE_GET_IRQ_INFO, answer, operation="VFIO_DEVICE_GET_IRQ_INFO", target=target
        )
    except SystemFailure as error:
        if error.errno != errno.EINVAL:
            raise
        return 0, 0  # ERR on a function without PCI Express
    _, flags, _, count = u.IRQ_INFO.unpack(answer)
    if count > MAX_VECTORS:
        raise SystemFailure(
            f"{count} vectors of type {index}", operation="VFIO_DEVICE_GET_IRQ_INFO", target=target
        )
    return flags, count


def set_eventfds(fd: int, index: int, start: int, eventfds: Sequence[int], target: str) -> None:
    """Wire vectors ``start``... to eventfds; -1 leaves one without. All or nothing.

    For MSI and MSI-X the kernel answers a *positive* number if the system has fewer vectors to
    give than asked for, and has wired none (``vfio_msi_enable``): ResourceError.
    """
    count = len(eventfds)
    head = u.IRQ_SET.pack(
        u.IRQ_SET.size + 4 * count,
        u.IRQ_SET_DATA_EVENTFD | u.IRQ_SET_ACTION_TRIGGER,
        index,
        start,
        count,
    )
    result = _set_irqs(fd, head + struct.pack(f"={count}i", *eventfds), target)
    if result:
        raise ResourceError(
            f"the system has {result} interrupt vectors to give, {start + count} are needed",
            operation="VFIO_DEVICE_SET_IRQS",
            target=target,
            errno=errno.ENOSPC,
            hint="use fewer vectors, or free some: see /proc/interrupts",
        )


def disable_irqs(fd: int, index: int, target: str) -> None:
    """Take every vector of a type away. EINVAL (SystemFailure) if none is wired."""
    flags = u.IRQ_SET_DATA_NONE | u.IRQ_SET_ACTION_TRIGGER
    _set_irqs(fd, u.IRQ_SET.pack(u.IRQ_SET.size, flags, index, 0, 0), target)


def unmask_irq(fd: int, index: int, target: str) -> None:
    """Let vector 0 of an automasked type be raised again."""
    flags = u.IRQ_SET_DATA_NONE | u.IRQ_SET_ACTION_UNMASK
    _set_irqs(fd, u.IRQ_SET.pack(u.IRQ_SET.size, flags, index, 0, 1), target)


def reset(fd: int, target: str) -> None:
    """VFIO_DEVICE_RESET. EINVAL if there is none; EAGAIN if another reset holds the lock."""
    ioctl.call(fd, u.DEVICE_RESET, operation="VFIO_DEVICE_RESET", target=target)


def _set_irqs(fd: int, request: bytes, target: str) -> int:
    return ioctl.call(
        fd,
        u.DEVICE_SET_IRQS,
        bytearray(request),
        operation="VFIO_DEVICE_SET_IRQS",
        target=target,
    )


# -- information with capabilities ---------------------------------------------------------------


def bounded(argsz: int, target: str) -> int:
    """The room an answer needs, refused above :data:`INFO_LIMIT`."""
    if argsz > INFO_LIMIT:
        raise SystemFailure(
            f"the kernel wants {argsz} bytes for an answer", operation="query", target=target
        )
    return argsz


def capabilities(answer: bytearray, first: int) -> Iterator[tuple[int, bytes]]:
    """Walk a capability chain: each id, and what lies behind its header.

    Offsets count from the start of ``answer``. Ends at a pointer that does not move forward or
    leaves the answer, so it ends.
    """
    at, last = first, 0
    while last < at <= len(answer) - u.INFO_CAP_HEADER.size:
        kind, _, following = u.INFO_CAP_HEADER.unpack_from(answer, at)
        yield kind, bytes(answer[at + u.INFO_CAP_HEADER.size :])
        last, at = at, following


def pairs(body: bytes, count: int, layout: struct.Struct) -> Iterator[tuple[int, int]]:
    """``count`` pairs at the start of ``body``, or as many as are there."""
    for number in range(min(count, len(body) // layout.size)):
        first, second = layout.unpack_from(body, number * layout.size)
        yield first, second
