# SPDX-License-Identifier: Apache-2.0
"""The server's side of a connection: received messages become typed requests.

States: *fresh* (only VERSION is understood) → *ready* (anything but VERSION) → *closed* (after a
fatal event). A request that is malformed but well framed is refused and the connection lives on;
a broken frame or a failed negotiation ends it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from holdfast.errors import ProtocolError
from holdfast.uapi import vfio_user as u
from holdfast.uapi.vfio_user import Command
from holdfast.wire.vfio_user import frame, messages
from holdfast.wire.vfio_user.capabilities import SERVER, Capabilities, Version
from holdfast.wire.vfio_user.frame import MAX_DATA, Header, MalformedError, Part, Parts
from holdfast.wire.vfio_user.ids import Outstanding

Body: TypeAlias = (
    messages.DmaMap
    | messages.DmaUnmap
    | messages.DeviceInfo
    | messages.RegionInfo
    | messages.RegionIoFds
    | messages.IrqInfo
    | messages.IrqSet
    | messages.RegionAccess
    | messages.WriteMulti
    | None
)


@dataclass(frozen=True, slots=True)
class Request:
    """A well-formed command. ``body`` is None for DEVICE_RESET only."""

    header: Header
    body: Body

    @property
    def command(self) -> Command:
        return Command(self.header.command)


@dataclass(frozen=True, slots=True)
class Negotiated:
    """VERSION was accepted. Send ``reply``; with ``twin``, attach one end of a socket pair."""

    peer: Capabilities
    reply: Parts
    twin: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A command that gets an error reply (None if it asked for no reply). ``fatal``: then close."""

    reply: Parts | None
    why: str
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class DmaDone:
    """The client answered DMA ``ticket``: ``data`` for a read, or the errno of its refusal."""

    ticket: int
    error: int | None
    data: Part = b""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A reply that nobody waits for any more."""


Event: TypeAlias = Request | Negotiated | Refused | DmaDone | Dropped

_DECODERS: dict[Command, Callable[[Part], Body]] = {
    Command.DMA_MAP: messages.DmaMap.decode,
    Command.DMA_UNMAP: messages.DmaUnmap.decode,
    Command.DEVICE_GET_INFO: messages.DeviceInfo.decode,
    Command.DEVICE_GET_REGION_INFO: messages.RegionInfo.decode,
    Command.DEVICE_GET_REGION_IO_FDS: messages.RegionIoFds.decode_request,
    Command.DEVICE_GET_IRQ_INFO: messages.IrqInfo.decode,
    Command.DEVICE_SET_IRQS: messages.IrqSet.decode,
    Command.REGION_READ: lambda payload: messages.RegionAccess.decode(payload, data=False),
    Command.REGION_WRITE: lambda payload: messages.RegionAccess.decode(payload, data=True),
    Command.REGION_WRITE_MULTI: messages.WriteMulti.decode,
    Command.DEVICE_RESET: lambda _payload: None,
}


@dataclass(frozen=True, slots=True)
class _Dma:
    address: int
    count: int
    write: bool


class ServerSession:
    """What the messages of one client mean. Not thread-safe; owns no descriptor."""

    def __init__(self, own: Capabilities = SERVER) -> None:
        self._own = own
        self._ready = False
        self._dma: Outstanding[_Dma] = Outstanding()
        self.peer = Capabilities()

    @property
    def ready(self) -> bool:
        """True once VERSION was accepted."""
        return self._ready

    @property
    def dma_chunk(self) -> int:
        """Most bytes of one DMA message: the client's limit and our own."""
        return min(self.peer.max_data_xfer_size, MAX_DATA)

    def receive(self, data: Part, fds: int = 0, *, twin: bool = False) -> Event:
        """Interpret one whole message that came with ``fds`` descriptors.

        Raises :class:`ProtocolError` if its header breaks the framing. Data in the event are views
        of ``data``. ``twin`` tells that it came over the twin socket, which carries replies only.
        """
        header = Header.decode(data)
        if header.size != len(data):
            raise ProtocolError(f"message of {header.size} bytes was framed as {len(data)}")
        payload = memoryview(data)[frame.HEADER_SIZE :]
        if header.is_reply:
            return self._dma_reply(header, payload)
        try:
            if twin:
                raise MalformedError("the twin socket carries the server's commands only")
            if not self._ready:
                return self._negotiate(header, payload, fds)
            return self._request(header, payload, fds)
        except MalformedError as error:
            answer = None if header.no_reply else frame.error_reply(header, error.errno)
            return Refused(answer, str(error), fatal=not self._ready)

    def _negotiate(self, header: Header, payload: Part, fds: int) -> Event:
        if header.command != Command.VERSION or fds or header.no_reply:
            raise MalformedError("the first message must be VERSION, without descriptors")
        asked = Version.decode(payload)
        if asked.major != u.MAJOR:
            raise MalformedError(f"version {asked.major}.{asked.minor} is not spoken here")
        peer = asked.capabilities
        twin = self._own.twin_socket and peer.twin_socket and peer.max_msg_fds > 0
        answer = replace(
            self._own,
            twin_socket=twin,
            twin_fd_index=0 if twin else None,
            # Some clients warn of names they did not send themselves.
            write_multiple=self._own.write_multiple and peer.write_multiple,
        )
        self.peer, self._ready = peer, True
        version = Version(u.MAJOR, min(asked.minor, u.MINOR), answer)
        return Negotiated(peer, frame.reply(header, [version.encode()]), twin)

    def _request(self, header: Header, payload: Part, fds: int) -> Request:
        try:
            decode = _DECODERS[Command(header.command)]
        except (ValueError, KeyError):
            raise MalformedError(f"command {header.command} is not supported") from None
        most = {Command.DMA_MAP: 1, Command.DEVICE_SET_IRQS: self._own.max_msg_fds}
        if fds > most.get(Command(header.command), 0):
            raise MalformedError(f"{fds} descriptors with {Command(header.command).name}")
        body = decode(payload)
        if isinstance(body, messages.IrqSet):
            self._check_irq_fds(body, fds)
        if isinstance(body, messages.RegionAccess) and body.count > MAX_DATA:
            raise MalformedError(f"region access of {body.count} bytes; the limit is {MAX_DATA}")
        if isinstance(body, messages.DmaMap):
            by_fd = body.flags & (u.DMA_MMAP | u.DMA_FILE_IO)
            if by_fd and not fds:
                raise MalformedError("DMA_MAP: the flags want a descriptor and there is none")
        return Request(header, body)

    @staticmethod
    def _check_irq_fds(body: messages.IrqSet, fds: int) -> None:
        wanted = (0, body.count) if body.data_kind == u.IRQ_DATA_EVENTFD else (0,)
        if fds not in wanted:
            raise MalformedError(f"DEVICE_SET_IRQS: {fds} descriptors for {body.count} vectors")

    # -- the server's own commands ---------------------------------------------------------------

    def dma_read(self, address: int, count: int) -> tuple[int, Parts]:
        """A DMA_READ of at most :attr:`dma_chunk` bytes: its ticket and what to send."""
        return self._dma_command(Command.DMA_READ, _Dma(address, count, write=False), b"")

    def dma_write(self, address: int, data: Part) -> tuple[int, Parts]:
        """A DMA_WRITE of at most :attr:`dma_chunk` bytes: its ticket and what to send."""
        return self._dma_command(Command.DMA_WRITE, _Dma(address, len(data), write=True), data)

    def forget(self, ticket: int) -> None:
        """Give up waiting; a late answer is dropped."""
        self._dma.take(ticket)

    def _dma_command(self, command: Command, what: _Dma, data: Part) -> tuple[int, Parts]:
        ticket = self._dma.add(what)
        body = messages.DmaAccess(what.address, what.count, data)
        return ticket, frame.message(ticket, command, body.encode())

    def _dma_reply(self, header: Header, payload: Part) -> DmaDone | Dropped:
        asked = self._dma.get(header.msg_id)
        if asked is None or header.command != (
            Command.DMA_WRITE if asked.write else Command.DMA_READ
        ):
            return Dropped()
        self._dma.take(header.msg_id)
        if header.failure is not None:
            return DmaDone(header.msg_id, header.failure)
        if asked.write and len(payload) in (0, 12):  # older clients echo less than 16 bytes
            return DmaDone(header.msg_id, None)
        try:
            echo = messages.DmaAccess.decode(payload, data=not asked.write)
        except MalformedError:
            return DmaDone(header.msg_id, errno.EPROTO)
        if (echo.address, echo.count) != (asked.address, asked.count):
            return DmaDone(header.msg_id, errno.EPROTO)
        return DmaDone(header.msg_id, None, echo.data)
