# SPDX-License-Identifier: Apache-2.0
"""A function behind a vfio-user socket: Holdfast's own emulated ones, libvfio-user, SPDK, QEMU.

Fulfils ``contracts.FunctionBackend``. The descriptors of DMA windows go to the server, which maps
them; memory without a descriptor is served by message (``vfio_user_link``). The stream stays whole
if this process is killed at any instruction (``kernel.stream``), so a successor that holds the same
descriptors (:meth:`VfioUserBackend.hand_over`) can go on with :meth:`VfioUserBackend.resume`.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Self, TypeVar

from holdfast.backends.region_access import checked, existing, require_small
from holdfast.backends.vfio_user_discover import decoded, discover, doorbells_of
from holdfast.backends.vfio_user_handover import KIND, describe, take_up
from holdfast.backends.vfio_user_link import ClientLink, connect
from holdfast.backends.vfio_user_memory import Served, ServedMemory, of_file
from holdfast.backends.vfio_user_trail import Trail
from holdfast.contracts import Doorbell, FileWindow, Handover, HostMemory, MemoryWindow, RegionMap
from holdfast.errors import (
    BadAccess,
    Busy,
    NotSupported,
    ProtocolError,
    RemoteError,
    UsageError,
)
from holdfast.kernel.stream import SCM_MAX_FD, Descriptors
from holdfast.uapi import vfio_user as u
from holdfast.uapi.vfio_user import Command
from holdfast.values import Iova, IrqIndex, IrqInfo, Perm, Promises, Region, Target
from holdfast.wire.vfio_user import messages as m
from holdfast.wire.vfio_user.capabilities import CLIENT, Capabilities
from holdfast.wire.vfio_user.client import ClientSession
from holdfast.wire.vfio_user.frame import Part, Parts

TIMEOUT: Final = 5.0
"""Seconds for one request. A function that takes longer is treated as gone."""

RESET_TIMEOUT: Final = 30.0
"""Seconds for DEVICE_RESET, which may take long (vfio-user specification)."""

_BULK: Final = 4096
"""Accesses above this size go one after the other, see :meth:`VfioUserBackend._bulk_access`."""

_PIPELINED: Final = 64
"""Requests in flight at once; more could fill the socket buffers in both directions."""

_MULTI: Final = 200
"""Writes in one REGION_WRITE_MULTI, as other clients send them."""

_IO_FDS_ROOM: Final = u.IO_FDS.size + 48 * 64

_T = TypeVar("_T")


def open_target(target: Target) -> VfioUserBackend:
    """For the registry: ``vfio-user:/path/to.sock``."""
    return VfioUserBackend.connect(target.rest)


class VfioUserBackend:
    """One function behind one socket. Any thread; ``close`` must come last.

    Owns the socket and the descriptors of mappable regions. After :class:`DeviceGone` was raised
    once, every call raises it.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        target: str = KIND,
        timeout: float = TIMEOUT,
        reset_timeout: float = RESET_TIMEOUT,
        capabilities: Capabilities = CLIENT,
    ) -> None:
        """Negotiate on a fresh connection and read what the function is. Takes ownership.

        Raises :class:`DeviceGone`, :class:`ProtocolError` or :class:`RemoteError`; the socket is
        closed then.
        """
        self._configure(target, timeout, reset_timeout)
        self._session = ClientSession(capabilities)
        try:
            trail = Trail()
        except BaseException:
            sock.close()
            raise
        self._link = ClientLink(sock, self._session, self._memory, target, trail)
        try:
            self._negotiate()
            self._found, self._region_fds = discover(self._request, target)
        except BaseException:
            self._link.close()
            raise

    @classmethod
    def connect(cls, path: str | os.PathLike[str], *, timeout: float = TIMEOUT) -> Self:
        """Connect to the server at ``path``; waits up to ``timeout`` seconds for it to accept."""
        name = os.fspath(path)
        return cls(connect(name, timeout), target=f"vfio-user:{name}", timeout=timeout)

    @classmethod
    def resume(
        cls,
        handover: Handover,
        *,
        target: str = KIND,
        timeout: float = TIMEOUT,
        memories: Iterable[MemoryWindow] = (),
        files: Iterable[FileWindow] = (),
    ) -> Self:
        """Go on with a connection that a predecessor negotiated; see ``backends.resume``.

        Replies to the predecessor's requests are dropped. Waits for the last of them: up to the
        time that a reset may take.
        """
        self = cls.__new__(cls)
        self._configure(target, timeout, RESET_TIMEOUT)
        self._session, self._link = take_up(handover, self._memory, memories, files, target)
        try:
            info: Parts = [m.DeviceInfo().encode()]
            self._link.request(Command.DEVICE_GET_INFO, info, timeout=RESET_TIMEOUT)[1].close()
            self._found, self._region_fds = discover(self._request, target)
        except BaseException:
            self._link.close()
            raise
        return self

    def _configure(self, target: str, timeout: float, reset_timeout: float) -> None:
        self._target = target
        self._timeout = timeout
        self._reset_timeout = reset_timeout
        self._bulk = threading.Lock()
        self._memory = ServedMemory()

    def _negotiate(self) -> None:
        payload, fds = self._request(Command.VERSION, [self._session.hello()])
        with fds:
            twin = self._session.accept(payload, len(fds))
            if twin is not None:
                taken = fds.take()
                try:
                    self._link.add_twin(taken[twin])
                finally:
                    for place, fd in enumerate(taken):
                        if place != twin:
                            os.close(fd)

    # -- what it is ------------------------------------------------------------------------------

    @property
    def peer(self) -> Capabilities:
        """What the server told about itself."""
        return self._session.peer

    @property
    def promises(self) -> Promises:
        # A server must have stopped all use of a window before it answers the unmap
        # (vfio-user specification, DMA_UNMAP).
        return Promises(strict_unmap=True, reset=self._found.reset, assign_bars=True)

    iova_ranges = ()
    request_fd = None  # a server goes away without asking

    @property
    def isolation(self) -> str:
        return self._target

    def dma_context(self) -> None:
        return None

    def memory(self) -> None:
        return None

    @property
    def regions(self) -> Sequence[Region]:
        return self._found.regions

    @property
    def irqs(self) -> Sequence[IrqInfo]:
        return self._found.irqs

    @property
    def on_gone(self) -> Callable[[], None] | None:
        return self._link.on_gone

    @on_gone.setter
    def on_gone(self, callback: Callable[[], None] | None) -> None:
        self._link.on_gone = callback

    # -- regions ---------------------------------------------------------------------------------

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Read bytes; what exceeds the peer's limit is split into several accesses."""
        self._check_access(index, offset, count, write=False)
        with self._bulk_access(count):
            pieces = [
                self._read_piece(index, at, min(self._session.data_limit, offset + count - at))
                for at in range(offset, offset + count, self._session.data_limit)
            ]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def region_read_multi(self, reads: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Small reads as ``(index, offset, count)``, in order, many on their way at once."""
        for index, offset, count in reads:
            self._check_access(index, offset, count, write=False)
            require_small(count, "region_read_multi", self._target)
        found: list[bytes] = []
        for at in range(0, len(reads), _PIPELINED):
            batch = reads[at : at + _PIPELINED]
            bodies = [m.RegionAccess(offset, index, count) for index, offset, count in batch]
            replies = self._link.pipeline(
                Command.REGION_READ, [body.encode() for body in bodies], timeout=self._timeout
            )
            for (index, offset, count), payload in zip(batch, replies, strict=True):
                found.append(self._checked_read(index, offset, count, payload))
        return found

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write bytes; what exceeds the peer's limit is split into several accesses."""
        self._check_access(index, offset, len(data), write=True)
        view = memoryview(data)
        limit = self._session.data_limit
        with self._bulk_access(len(data)):
            for at in range(0, len(view), limit):
                piece = view[at : at + limit]
                body = m.RegionAccess(offset + at, index, len(piece), piece)
                self._ask(Command.REGION_WRITE, body.encode())

    def region_write_multi(self, writes: Sequence[tuple[int, int, bytes]]) -> None:
        """Writes of up to 8 bytes each as ``(index, offset, data)``, in order.

        One message for many where the server offers it (REGION_WRITE_MULTI), else one for each.
        Returns after all were taken; raises :class:`RemoteError` if one was refused, with the
        writes before it done.
        """
        for index, offset, data in writes:
            self._check_access(index, offset, len(data), write=True)
            require_small(len(data), "region_write_multi", self._target)
        if not self._session.peer.write_multiple:
            for index, offset, data in writes:
                self.region_write(index, offset, data)
            return
        for at in range(0, len(writes), _MULTI):
            batch = tuple(
                m.RegionAccess(offset, index, len(data), data)
                for index, offset, data in writes[at : at + _MULTI]
            )
            reply = self._ask(Command.REGION_WRITE_MULTI, [m.WriteMulti(batch).encode()])
            done = u.WRITE_MULTI.unpack_from(reply)[0] if len(reply) >= u.WRITE_MULTI.size else 0
            if done != len(batch):
                raise RemoteError(
                    f"write {at + done} of {len(writes)} was refused",
                    operation="REGION_WRITE_MULTI",
                    target=self._target,
                )

    def region_map(self, index: int) -> RegionMap | None:
        fd = self._region_fds.get(index)
        return None if fd is None else RegionMap(fd, self._found.regions[index])

    def doorbells(self, index: int) -> Sequence[Doorbell]:
        """Eventfds of a region's doorbells; the caller owns them. Empty if the server has none."""
        existing(self._found.regions, index, "doorbells", self._target)
        room = _IO_FDS_ROOM
        for _ in range(2):  # the second time with the room that the first answer asked for
            body = m.RegionIoFds(index, argsz=room)
            try:
                payload, fds = self._request(Command.DEVICE_GET_REGION_IO_FDS, [body.encode()])
            except RemoteError:
                return []  # a server without this command
            with fds:
                reply = self._decoded(m.RegionIoFds.decode_reply, payload)
                if reply.entries or not reply.count:
                    return doorbells_of(reply.entries, [fds[i] for i in range(len(fds))])
            room = min(reply.argsz, 1 << 16)
        return []

    # -- interrupts ------------------------------------------------------------------------------

    def set_irqs(self, index: IrqIndex, start: int, eventfds: Sequence[int]) -> None:
        """Wire vectors; the caller keeps its eventfds. Empty: disable the type."""
        if not eventfds:
            off = m.IrqSet(u.IRQ_DATA_NONE | u.IRQ_ACTION_TRIGGER, index, 0, 0)
            self._ask(Command.DEVICE_SET_IRQS, [off.encode()])
            return
        count = self._found.irqs[index].count
        if start < 0 or start + len(eventfds) > count:
            raise BadAccess(
                f"vectors {start} to {start + len(eventfds) - 1} of {count}", operation="set_irqs"
            )
        most = min(self._session.peer.max_msg_fds, SCM_MAX_FD)
        if not most:
            raise NotSupported("the server takes no descriptors", operation="set_irqs")
        for at in range(0, len(eventfds), most):
            batch = list(eventfds[at : at + most])
            body = m.IrqSet(
                u.IRQ_DATA_EVENTFD | u.IRQ_ACTION_TRIGGER, index, start + at, len(batch)
            )
            self._ask(Command.DEVICE_SET_IRQS, [body.encode()], batch)

    def unmask_intx(self) -> None:
        """INTx was handled. It masks itself when it is signalled; without this it comes once."""
        body = m.IrqSet(u.IRQ_DATA_NONE | u.IRQ_ACTION_UNMASK, IrqIndex.INTX, 0, 1)
        self._ask(Command.DEVICE_SET_IRQS, [body.encode()])

    # -- DMA -------------------------------------------------------------------------------------

    def dma_map(self, iova: Iova, size: int, perm: Perm, fd: int, offset: int) -> None:
        """Pass a file to the function; see ``contracts.FunctionBackend``."""
        if not self._session.peer.max_msg_fds:
            raise NotSupported("the server takes no descriptors", operation="dma_map")
        self._map(iova, size, perm, of_file(fd, offset, size, perm), offset, [fd])

    def dma_map_memory(self, iova: Iova, size: int, perm: Perm, memory: HostMemory) -> None:
        """Serve ``memory`` by message until it is unmapped; see ``contracts.FunctionBackend``."""
        self._map(iova, size, perm, memory, 0, [])

    def _map(
        self,
        iova: Iova,
        size: int,
        perm: Perm,
        memory: HostMemory | None,
        offset: int,
        fds: list[int],
    ) -> None:
        if size < 1 or iova < 0 or iova + size > 1 << 64:
            raise UsageError(f"{size} bytes at {iova!r} cannot be mapped", operation="dma_map")
        try:
            # First: the function may use the window before its reply has come back.
            self._memory.add(Served(iova, size, perm, memory))
        except OSError as error:
            raise Busy(str(error.strerror), operation="dma_map", errno=error.errno) from error
        try:
            body = m.DmaMap(int(perm), offset, iova, size)
            self._ask(Command.DMA_MAP, [body.encode()], fds)
        except BaseException:
            self._memory.remove(iova)
            raise

    def dma_unmap(self, iova: Iova, size: int) -> int:
        """Take a mapping away; the bytes that the function says it unmapped.

        :class:`RemoteError` with ENOENT if nothing of exactly this size is mapped there.
        """
        body = m.DmaUnmap(0, iova, size)
        payload = self._ask(Command.DMA_UNMAP, [body.encode()])
        if not payload:
            # What libvfio-user answers for a function that does no DMA. There are no partial
            # unmaps, so a success means the whole window.
            self._memory.remove(iova)
            return size
        reply = self._decoded(m.DmaUnmap.decode_reply, payload)
        if reply.address != iova:
            raise ProtocolError(
                f"asked to unmap {iova!r}, the server unmapped {reply.address:#x}",
                operation="dma_unmap",
                target=self._target,
            )
        self._memory.remove(iova)
        return reply.size

    def dma_unmap_all(self) -> None:
        """Take every mapping away (vfio-user specification, DMA_UNMAP, "unmap all")."""
        self._ask(Command.DMA_UNMAP, [m.DmaUnmap(u.UNMAP_ALL, 0, 0).encode()])
        self._memory.clear()

    # -- the whole function ----------------------------------------------------------------------

    def hand_over(self) -> Handover:
        """The sockets, the trail, and what the server can do."""
        return describe(self._link, self._session.peer)

    def reset(self) -> None:
        """DEVICE_RESET; :class:`RemoteError` if the function refuses."""
        _, fds = self._link.request(Command.DEVICE_RESET, [], timeout=self._reset_timeout)
        fds.close()

    def close(self) -> None:
        """Hang up. The server unmaps everything. Idempotent."""
        self._link.close()
        self._memory.clear()
        fds, self._region_fds = self._region_fds, {}
        for fd in fds.values():
            os.close(fd)

    # -- details ---------------------------------------------------------------------------------

    def _request(self, command: Command, payload: Parts) -> tuple[Part, Descriptors]:
        return self._link.request(command, payload, timeout=self._timeout)

    def _ask(self, command: Command, payload: Parts, fds: Sequence[int] = ()) -> Part:
        """A request whose reply carries no descriptors (any that come are closed)."""
        reply, extra = self._link.request(command, payload, timeout=self._timeout, fds=fds)
        extra.close()
        return reply

    def _decoded(self, decode: Callable[[Part], _T], payload: Part) -> _T:
        return decoded(decode, payload, self._target)

    def _read_piece(self, index: int, offset: int, count: int) -> bytes:
        body = m.RegionAccess(offset, index, count)
        payload = self._ask(Command.REGION_READ, body.encode())
        return self._checked_read(index, offset, count, payload)

    def _checked_read(self, index: int, offset: int, count: int, payload: Part) -> bytes:
        reply = self._decoded(_access_reply, payload)
        if (reply.offset, reply.region, reply.count) != (offset, index, count):
            raise ProtocolError(
                f"asked for {count} bytes, got {reply.count}",
                operation="region_read",
                target=self._target,
            )
        return bytes(reply.data)

    def _check_access(self, index: int, offset: int, count: int, *, write: bool) -> None:
        checked(self._found.regions, index, offset, count, write=write, target=self._target)

    def _bulk_access(self, count: int) -> AbstractContextManager[object]:
        """Large accesses go one at a time: what is in flight stays below the socket buffers.

        Else several threads' writes and the replies to several others' reads could fill both
        directions, with either side waiting in its send.
        """
        return self._bulk if count > _BULK else nullcontext()


def _access_reply(payload: Part) -> m.RegionAccess:
    return m.RegionAccess.decode(payload, data=True)
