# SPDX-License-Identifier: Apache-2.0
"""The client's side of a connection: matches replies, checks the server's DMA commands.

Two id spaces meet on one socket: our commands and the server's. They are told apart by the type
bits of the header, never by the id (vfio-user specification, "Header").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from holdfast.errors import ProtocolError
from holdfast.uapi import vfio_user as u
from holdfast.uapi.vfio_user import Command
from holdfast.wire.vfio_user import frame
from holdfast.wire.vfio_user.capabilities import CLIENT, Capabilities, Version
from holdfast.wire.vfio_user.frame import MAX_DATA, Header, MalformedError, Part, Parts
from holdfast.wire.vfio_user.ids import Outstanding
from holdfast.wire.vfio_user.messages import DmaAccess


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to our command ``msg_id``: its payload, or the errno of an error reply."""

    msg_id: int
    error: int | None
    payload: Part = b""


@dataclass(frozen=True, slots=True)
class DmaRequest:
    """The server reads (``write`` False) or writes memory. Answer with :meth:`ClientSession.done`
    or :meth:`ClientSession.failed`."""

    header: Header
    access: DmaAccess
    write: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A command of the server that gets an error reply, or None if it asked for no reply."""

    reply: Parts | None
    why: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A reply that nobody waits for: late, or meant for a predecessor on the same socket."""


Event: TypeAlias = Reply | DmaRequest | Refused | Dropped


class ClientSession:
    """What the messages of one server mean. Not thread-safe; owns no descriptor."""

    def __init__(self, own: Capabilities = CLIENT, *, first_id: int = 1) -> None:
        self._own = own
        self._sent: Outstanding[Command] = Outstanding(first_id)
        self.peer = Capabilities()

    @property
    def data_limit(self) -> int:
        """Most data bytes of one region access."""
        return min(self.peer.max_data_xfer_size, MAX_DATA)

    # -- our commands ----------------------------------------------------------------------------

    def hello(self) -> bytes:
        """Payload of the VERSION request: the first message, alone until it is answered."""
        return Version(u.MAJOR, u.MINOR, self._own).encode()

    def accept(self, payload: Part, fds: int) -> int | None:
        """Take the server's VERSION reply. Returns the index of the twin socket's descriptor.

        Raises :class:`ProtocolError` if the answer contradicts what was asked; then close.
        """
        try:
            answer = Version.decode(payload)
        except MalformedError as error:
            raise ProtocolError(str(error), operation="negotiate") from error
        if answer.major != u.MAJOR or answer.minor > u.MINOR:
            raise ProtocolError(
                f"the server answered version {answer.major}.{answer.minor}", operation="negotiate"
            )
        caps = answer.capabilities
        index = caps.twin_fd_index
        if caps.twin_socket and (not self._own.twin_socket or index is None or index >= fds):
            raise ProtocolError("the twin socket's descriptor is missing", operation="negotiate")
        self.peer = caps
        return index if caps.twin_socket else None

    def command(
        self, command: Command, payload: Parts, *, no_reply: bool = False
    ) -> tuple[int, Parts]:
        """A command: its id and what to send."""
        if no_reply:
            ident = self._sent.fresh()
            return ident, frame.message(ident, command, payload, u.NO_REPLY)
        ident = self._sent.add(command)
        return ident, frame.message(ident, command, payload)

    def forget(self, msg_id: int) -> None:
        """Give up waiting; a late reply is dropped."""
        self._sent.take(msg_id)

    # -- the server's messages -------------------------------------------------------------------

    def receive(self, data: Part, *, twin: bool = False) -> Event:
        """Interpret one whole message; :class:`ProtocolError` if its header breaks the framing."""
        header = Header.decode(data)
        if header.size != len(data):
            raise ProtocolError(f"message of {header.size} bytes was framed as {len(data)}")
        payload = memoryview(data)[frame.HEADER_SIZE :]
        if header.is_reply:
            if twin or self._sent.get(header.msg_id) != header.command:
                return Dropped()
            self._sent.take(header.msg_id)
            return Reply(header.msg_id, header.failure, payload)
        write = header.command == Command.DMA_WRITE
        try:
            if not write and header.command != Command.DMA_READ:
                raise MalformedError(f"command {header.command} is not for a client")
            access = DmaAccess.decode(payload, data=write)
            if access.count > MAX_DATA or access.address + access.count > 1 << 64:
                raise MalformedError(f"DMA of {access.count} bytes at {access.address:#x}")
        except MalformedError as error:
            answer = None if header.no_reply else frame.error_reply(header, error.errno)
            return Refused(answer, str(error))
        return DmaRequest(header, access, write)

    @staticmethod
    def done(request: DmaRequest, data: Part = b"") -> Parts | None:
        """The success reply: echo of address and count, and the data of a read."""
        if request.header.no_reply:
            return None
        echo = DmaAccess(request.access.address, request.access.count, data)
        return frame.reply(request.header, echo.encode())

    @staticmethod
    def failed(request: DmaRequest, number: int) -> Parts | None:
        """The error reply."""
        return None if request.header.no_reply else frame.error_reply(request.header, number)
