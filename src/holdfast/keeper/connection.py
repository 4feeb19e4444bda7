# SPDX-License-Identifier: Apache-2.0
"""One client's socket, on the keeper's event loop.

A client may be slow or hostile: it may never read, flood, or send nonsense. Sending never waits:
what the socket does not take is queued up to a bound, and a client over the bound is hung up on.
Receiving takes one packet at a time, so a client that floods only slows itself down.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Sequence

from holdfast.errors import ProtocolError, ResourceError, to_fields
from holdfast.kernel import disposal, packets
from holdfast.wire import lease as wire

BACKLOG_LIMIT = 64
"""Most packets that wait for a client that does not read."""
TURN = 4
"""Most packets that are taken from a client before everybody else has had a turn."""


class Connection:
    """Packets to and from one client. Loop only. Owns the socket; closing is idempotent."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._watched = False
        self._backlog: deque[tuple[bytes, list[int]]] = deque()
        self._closed = False
        self._taken = 0

    async def receive(self) -> tuple[bytes, list[int]]:
        """The next packet and its descriptors, which the caller owns; empty bytes at hang-up."""
        while not self._closed:
            if self._taken >= TURN:
                # A client that sends faster than it is served would never be waited for.
                self._taken = 0
                await asyncio.sleep(0)
                continue
            try:
                packet = packets.receive(self.sock, wire.MAX_PACKET, wire.MAX_FDS)
                self._taken += 1
                return packet
            except BlockingIOError:
                self._taken = 0
                await self._readable()
            except (ConnectionError, ProtocolError):
                break
        return b"", []

    async def _readable(self) -> None:
        """Wait until there is something to read. The watch stays on between packets: a client
        that asks and waits, asks again only after its answer."""
        if not self._watched:
            self._loop.add_reader(self._fd, self._wake)
            self._watched = True
        self._waiter = self._loop.create_future()
        await self._waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            if not waiter.done():
                waiter.set_result(None)
        elif not self._closed:
            # Nobody is ready for more: do not be told again and again.
            self._loop.remove_reader(self._fd)
            self._watched = False

    def send(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        """Send a packet with descriptors (the caller keeps its own). Never waits."""
        if self._closed:
            return
        packet = wire.encode(message)
        try:
            if not self._backlog and self._try(packet, fds):
                return
        except ResourceError as error:
            self.send(wire.Failed(seq=message.seq, error=to_fields(error)))
            return
        if len(self._backlog) >= BACKLOG_LIMIT:
            self.close()
            return
        self._backlog.append((packet, [os.dup(fd) for fd in fds]))
        self._loop.add_writer(self._fd, self._flush)

    def _try(self, packet: bytes, fds: Sequence[int]) -> bool:
        try:
            packets.send(self.sock, packet, fds)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS and fds:
                raise ResourceError(
                    "too many descriptors are on their way to clients that do not take them",
                    operation="send",
                    errno=error.errno,
                    hint="see holdfast ps for stopped clients",
                ) from error
            # Hung up; the receiving side will see it.
        return True

    def _flush(self) -> None:
        while self._backlog:
            packet, fds = self._backlog[0]
            try:
                if not self._try(packet, fds):
                    return
            except ResourceError:
                self.close()  # what it waits for cannot be said any more
                return
            self._backlog.popleft()
            _close_all(fds)
        self._loop.remove_writer(self._fd)

    def close(self) -> None:
        """Hang up. A receiver that waits sees the end."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._wake()
        for _, fds in self._backlog:
            _close_all(fds)
        self._backlog.clear()
        disposal.hang_up(self.sock)
        self._wake()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
