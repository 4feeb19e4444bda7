# SPDX-License-Identifier: Apache-2.0
"""What each command of a client does to an emulated function.

A handler returns an :class:`Answer`, or raises ``OSError``, which becomes an error reply. An answer
may have to wait (``ready``): an unmap until nobody uses the window, a reset until the engine's step
in progress is over.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from holdfast.emu.port import Guest, RegionDecl
from holdfast.emu.server_bells import Bells
from holdfast.emu.server_irqs import Irqs
from holdfast.emu.server_link import Link
from holdfast.emu.windows import Windows
from holdfast.kernel.stream import Descriptors
from holdfast.uapi import vfio_user as u
from holdfast.uapi.vfio_user import Command
from holdfast.values import CONFIG_REGION, IrqIndex, Perm
from holdfast.wire.vfio_user import messages as m
from holdfast.wire.vfio_user.frame import Parts
from holdfast.wire.vfio_user.server import Body, Request


@dataclass(frozen=True, slots=True)
class Answer:
    """A success reply: payload, descriptors to lend, and when it may go out (None: now)."""

    payload: Parts = field(default_factory=list)
    fds: tuple[int, ...] = ()
    ready: Callable[[], bool] | None = None


Handler: TypeAlias = Callable[["Commands", Body, Descriptors], Answer]


class Commands:
    """The commands of one connection. Only from the socket thread."""

    def __init__(
        self, guest: Guest, windows: Windows, irqs: Irqs, bells: Bells, link: Link
    ) -> None:
        self._guest = guest
        self._windows = windows
        self._irqs = irqs
        self._bells = bells
        self._link = link
        self._regions = list(guest.regions())
        self.max_fds = u.DEFAULT_MAX_MSG_FDS
        """Most descriptors that the client takes in one message."""

    def execute(self, request: Request, fds: Descriptors) -> Answer:
        """Carry out one request. Descriptors that it does not take stay in ``fds``."""
        if request.command in _AFTER_POSTED_WRITES:
            self._bells.drain()
        return _HANDLERS[request.command](self, request.body, fds)

    # -- memory ----------------------------------------------------------------------------------

    def dma_map(self, body: Body, fds: Descriptors) -> Answer:
        assert isinstance(body, m.DmaMap)
        file_io = bool(body.flags & u.DMA_FILE_IO)
        perm = Perm(body.flags & Perm.RW)
        (fd,) = fds.take() or (None,)
        self._windows.map(body.address, body.size, perm, fd, body.offset, file_io=file_io)
        return Answer()

    def dma_unmap(self, body: Body, _fds: Descriptors) -> Answer:
        assert isinstance(body, m.DmaUnmap)
        if body.flags & u.UNMAP_ALL:
            self._windows.unmap_all()
        else:
            self._windows.unmap(body.address, body.size)
        echo = m.DmaUnmap(body.flags, body.address, body.size)
        return Answer([echo.encode()], ready=self._windows.settled)

    # -- information -----------------------------------------------------------------------------

    def device_info(self, _body: Body, _fds: Descriptors) -> Answer:
        flags = u.DEVICE_FLAG_PCI | (u.DEVICE_FLAG_RESET if self._guest.has_reset else 0)
        count = len(self._guest.irq_counts())
        return Answer([m.DeviceInfo(flags, len(self._regions), count).encode()])

    def region_info(self, body: Body, _fds: Descriptors) -> Answer:
        assert isinstance(body, m.RegionInfo)
        declared = self._declared(body.index)
        region = declared.region
        if not region.size:
            return Answer([m.RegionInfo(body.index).encode()])
        flags = u.REGION_FLAG_READ * region.readable | u.REGION_FLAG_WRITE * region.writable
        if declared.fd is None or not region.areas or not self.max_fds:
            return Answer([m.RegionInfo(body.index, flags, region.size).encode()])
        info = m.RegionInfo(
            body.index,
            flags | u.REGION_FLAG_MMAP,
            region.size,
            region.file_offset,
            region.areas,
        )
        payload, complete = info.reply(body.argsz)
        # A client throws the descriptor of a cut reply away, so it gets none.
        return Answer([payload], (declared.fd,) if complete else ())

    def region_io_fds(self, body: Body, _fds: Descriptors) -> Answer:
        assert isinstance(body, m.RegionIoFds)
        self._declared(body.index)
        places: dict[int, int] = {}
        entries: list[m.IoFd] = []
        for bell in self._bells.offer(body.index):
            if bell.fd not in places:
                if len(places) == self.max_fds:
                    break
                places[bell.fd] = len(places)
            value = bell.info.value
            entries.append(
                m.IoFd(
                    bell.info.offset,
                    bell.info.size,
                    places[bell.fd],
                    flags=0 if value is None else u.IOEVENTFD_DATAMATCH,
                    datamatch=value or 0,
                )
            )
        reply = m.RegionIoFds.answer(body.index, tuple(entries), body.argsz)
        return Answer([reply.encode()], tuple(places) if reply.entries else ())

    def irq_info(self, body: Body, _fds: Descriptors) -> Answer:
        assert isinstance(body, m.IrqInfo)
        count = self._irqs.count(body.index)
        flags = u.IRQ_FLAG_EVENTFD
        if body.index == IrqIndex.INTX:
            flags |= u.IRQ_FLAG_MASKABLE | u.IRQ_FLAG_AUTOMASKED
        else:
            flags |= u.IRQ_FLAG_NORESIZE
        return Answer([m.IrqInfo(body.index, flags, count).encode()])

    # -- interrupts and reset --------------------------------------------------------------------

    def set_irqs(self, body: Body, fds: Descriptors) -> Answer:
        assert isinstance(body, m.IrqSet)
        self._irqs.apply(body, fds.take())
        return Answer()

    def reset(self, _body: Body, _fds: Descriptors) -> Answer:
        self._guest.reset()
        serial = self._windows.fence(messages=True)
        if serial is None:
            return Answer()
        # A reset ends what is under way. The client may be unable to answer DMA before it has our
        # reply; what was sent already reaches it before that, in order on the same stream.
        self._link.abort()
        return Answer(ready=lambda: self._windows.passed(serial))

    # -- access ----------------------------------------------------------------------------------

    def region_read(self, body: Body, _fds: Descriptors) -> Answer:
        assert isinstance(body, m.RegionAccess)
        data = b""
        if self._check_access(body, write=False):
            data = self._guest.region_read(body.region, body.offset, body.count)
        if len(data) != body.count:
            raise OSError(errno.EIO, f"the function gave {len(data)} bytes for {body.count}")
        echo = m.RegionAccess(body.offset, body.region, body.count, data)
        return Answer(echo.encode(), ready=self._config_fence(body))

    def region_write(self, body: Body, _fds: Descriptors) -> Answer:
        assert isinstance(body, m.RegionAccess)
        if self._check_access(body, write=True):
            self._guest.region_write(body.region, body.offset, bytes(body.data))
        echo = m.RegionAccess(body.offset, body.region, body.count)
        return Answer(echo.encode(), ready=self._config_fence(body))

    def write_multi(self, body: Body, fds: Descriptors) -> Answer:
        """Writes in order. The reply counts those done; an error reply means none was."""
        assert isinstance(body, m.WriteMulti)
        done = 0
        try:
            for write in body.writes:
                self.region_write(write, fds)
                done += 1
        except OSError:
            if not done:
                raise
        return Answer([u.WRITE_MULTI.pack(done)])

    def _declared(self, index: int) -> RegionDecl:
        if index >= len(self._regions):
            raise OSError(errno.EINVAL, f"there is no region {index}")
        return self._regions[index]

    def _check_access(self, body: m.RegionAccess, *, write: bool) -> bool:
        """False if there is nothing to do: count 0 is legal."""
        region = self._declared(body.region).region
        allowed = region.writable if write else region.readable
        if not allowed or body.offset + body.count > region.size:
            raise OSError(errno.EINVAL, f"{body.count} bytes at {body.offset:#x} are not there")
        return body.count > 0

    def _config_fence(self, body: m.RegionAccess) -> Callable[[], bool] | None:
        """Configuration accesses are answered after a copy in progress.

        So clearing the bus master bit and reading it back flushes, as it does on the bus: what the
        engine had begun is in memory when the read is answered. Register accesses do not wait; a
        status register would not be worth reading then.
        """
        if body.region != CONFIG_REGION:
            return None
        serial = self._windows.fence(messages=False)
        if serial is None:
            return None
        return lambda: self._windows.passed(serial)


_HANDLERS: Mapping[Command, Handler] = {
    Command.DMA_MAP: Commands.dma_map,
    Command.DMA_UNMAP: Commands.dma_unmap,
    Command.DEVICE_GET_INFO: Commands.device_info,
    Command.DEVICE_GET_REGION_INFO: Commands.region_info,
    Command.DEVICE_GET_REGION_IO_FDS: Commands.region_io_fds,
    Command.DEVICE_GET_IRQ_INFO: Commands.irq_info,
    Command.DEVICE_SET_IRQS: Commands.set_irqs,
    Command.REGION_READ: Commands.region_read,
    Command.REGION_WRITE: Commands.region_write,
    Command.REGION_WRITE_MULTI: Commands.write_multi,
    Command.DEVICE_RESET: Commands.reset,
}

_AFTER_POSTED_WRITES = frozenset(
    {
        Command.DMA_UNMAP,
        Command.REGION_READ,
        Command.REGION_WRITE,
        Command.REGION_WRITE_MULTI,
        Command.DEVICE_RESET,
    }
)
"""Doorbells rung before these must have been seen (see ``server_bells``)."""
