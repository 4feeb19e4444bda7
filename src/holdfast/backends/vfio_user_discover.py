# SPDX-License-Identifier: Apache-2.0
"""What is at the other end: device, regions and interrupts, as a vfio-user server tells them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

from holdfast.contracts import Doorbell
from holdfast.errors import ProtocolError, RemoteError
from holdfast.kernel.mapping import PAGE
from holdfast.kernel.stream import Descriptors
from holdfast.uapi import vfio_user as u
from holdfast.uapi.vfio_user import Command
from holdfast.values import Area, DoorbellInfo, IrqIndex, IrqInfo, Region
from holdfast.wire.vfio_user import messages as m
from holdfast.wire.vfio_user.frame import MalformedError, Part, Parts

MAX_REGIONS: Final = 256
MAX_VECTORS: Final = 2048
MAX_REGION_INFO: Final = 1 << 16

_T = TypeVar("_T")
Request: TypeAlias = Callable[[Command, Parts], tuple[Part, Descriptors]]
RegionFds: TypeAlias = dict[int, int]


@dataclass(frozen=True, slots=True)
class Found:
    """The function as its server describes it."""

    reset: bool
    regions: tuple[Region, ...]
    irqs: tuple[IrqInfo, ...]


def decoded(decode: Callable[[Part], _T], payload: Part, target: str) -> _T:
    """Decode a reply; :class:`ProtocolError` if it is not one."""
    try:
        return decode(payload)
    except MalformedError as error:
        raise ProtocolError(str(error), operation="decode reply", target=target) from error


def discover(request: Request, target: str) -> tuple[Found, RegionFds]:
    """Ask for everything. The caller owns the descriptors of mappable regions."""
    info = decoded(
        m.DeviceInfo.decode, _plain(request, Command.DEVICE_GET_INFO, m.DeviceInfo()), target
    )
    if info.num_regions > MAX_REGIONS:
        raise ProtocolError(f"{info.num_regions} regions", operation="discover", target=target)
    regions: list[Region] = []
    fds: RegionFds = {}
    try:
        for index in range(info.num_regions):
            region, fd = _region(request, index, target)
            regions.append(region)
            if fd is not None:
                fds[index] = fd
        irqs = tuple(_irq(request, index, info.num_irqs, target) for index in IrqIndex)
    except BaseException:
        for fd in fds.values():
            os.close(fd)
        raise
    return Found(bool(info.flags & u.DEVICE_FLAG_RESET), tuple(regions), irqs), fds


def _plain(request: Request, command: Command, body: m.DeviceInfo | m.IrqInfo) -> Part:
    payload, fds = request(command, [body.encode()])
    fds.close()
    return payload


def _region(request: Request, index: int, target: str) -> tuple[Region, int | None]:
    """One region. A short reply says how much room the capabilities want; then ask again."""
    room = u.REGION_INFO.size
    for _ in range(2):
        ask = m.RegionInfo(index, argsz=room)
        payload, fds = request(Command.DEVICE_GET_REGION_INFO, [ask.encode()])
        with fds:
            info = decoded(m.RegionInfo.decode, payload, target)
            if info.index != index:
                raise ProtocolError(
                    f"asked for region {index}, got {info.index}", operation="discover"
                )
            if room < info.argsz <= MAX_REGION_INFO:
                room = info.argsz
                continue
            return _described(info, fds)
    raise ProtocolError(f"region {index} wants ever more room", operation="discover", target=target)


def _described(info: m.RegionInfo, fds: Descriptors) -> tuple[Region, int | None]:
    mappable = bool(info.flags & u.REGION_FLAG_MMAP) and len(fds) > 0
    given = info.areas if info.areas is not None else (Area(0, info.size),)
    areas = tuple(
        area
        for area in given
        # What is not whole pages, or not inside the region, cannot be mapped.
        if area.size and not (area.offset | area.size) % PAGE and area.end <= info.size
    )
    if not mappable or info.offset % PAGE:
        areas = ()
    region = Region(
        info.index,
        info.size,
        bool(info.flags & u.REGION_FLAG_READ),
        bool(info.flags & u.REGION_FLAG_WRITE),
        areas,
        info.offset if areas else 0,
    )
    if not areas:
        return region, None
    first, *others = fds.take()
    for fd in others:
        os.close(fd)
    return region, first


def _irq(request: Request, index: IrqIndex, known: int, target: str) -> IrqInfo:
    if index >= known:
        return IrqInfo(index, 0, eventfd=False)
    try:
        payload = _plain(request, Command.DEVICE_GET_IRQ_INFO, m.IrqInfo(index))
    except RemoteError:
        return IrqInfo(index, 0, eventfd=False)  # some servers refuse types that they lack
    info = decoded(m.IrqInfo.decode, payload, target)
    if info.index != index or info.count > MAX_VECTORS:
        raise ProtocolError(
            f"{info.count} vectors of interrupt type {info.index}",
            operation="discover",
            target=target,
        )
    return IrqInfo(index, info.count, bool(info.flags & u.IRQ_FLAG_EVENTFD))


def doorbells_of(entries: Sequence[m.IoFd], fds: Sequence[int]) -> list[Doorbell]:
    """A doorbell for each ioeventfd, with a descriptor of its own that the caller owns."""
    bells: list[Doorbell] = []
    try:
        for entry in entries:
            if entry.type != u.IO_FD_IOEVENTFD or entry.flags & u.IOEVENTFD_PIO:
                continue
            if entry.fd_index >= len(fds):
                raise ProtocolError(
                    f"descriptor {entry.fd_index} is missing", operation="doorbells"
                )
            value = entry.datamatch if entry.flags & u.IOEVENTFD_DATAMATCH else None
            info = DoorbellInfo(entry.offset, entry.size, value)
            bells.append(Doorbell(info, os.dup(fds[entry.fd_index])))
    except BaseException:
        for bell in bells:
            os.close(bell.fd)
        raise
    return bells
