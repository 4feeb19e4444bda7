# SPDX-License-Identifier: Apache-2.0
"""Whole messages with descriptors over an ``AF_UNIX`` stream socket.

Facts. A stream has no message boundaries. A process that is killed between reading a header and
reading its payload leaves the rest in the socket, and whoever holds the same socket next is out of
step for ever. Descriptors travel with the first byte of the message that they belong to; a read
that covers this byte without room for them closes them silently (unix(7)). ``poll`` reports half a
message as readable, again and again.

Consequence. A message must leave the socket in one system call, and only when all of it is there.
Waiting for the second half must neither consume the first one nor spin.

Choice. Look at the header with ``MSG_PEEK``; ask how much is queued (``FIONREAD``); once it is
enough, take exactly one message with one ``recvmsg``. While a message is incomplete, wait for an
*edge*: an epoll instance reports each arrival once. Send with one ``sendmsg`` that never blocks,
after ``poll`` has promised room: an ``AF_UNIX`` socket is writable while at most a quarter of its
send buffer is used (net/unix/af_unix.c, unix_writable), and three quarters of the buffer asked for
here hold the largest message of the protocols that use this class.

A message whose sender waits until it was carried out must outlive whoever is killed while doing so.
Such messages (``hold``) are handed out while they stay in the socket, and taken with a call of
their own, :meth:`Stream.release`: until then a successor finds them again.

Cost. One system call more for each message, and another for a held one of more than 2 KiB. A peer
that feeds a message in many small writes can fill its send buffer before the message is complete;
then neither side would move. So a message that stops growing for :data:`STALL` seconds is read in
pieces after all, and for this one message the promise above does not hold. The same goes for the
rest of a message whose descriptors came with a first write of their own: the kernel ends a
``recvmsg`` behind such a write.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import socket
import termios
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self

from holdfast.errors import Closed, ProtocolError, UsageError, WaitTimeout

STALL: Final = 0.25
"""Seconds without growth after which an incomplete message is read in pieces."""

SCM_MAX_FD: Final = 253
"""Most descriptors in one message (include/net/scm.h). The receive buffer has room for all, so
MSG_CTRUNC can only mean that this process has no descriptor numbers left."""

BUFFER: Final = 1 << 20
"""Send and receive buffer asked for, in bytes. The kernel caps it (net.core.wmem_max, commonly
208 KiB) and then doubles it for its own overhead."""

_PEEK: Final = 2048
_ONE_WRITE: Final = 32 * 1024
"""A sendmsg up to this size becomes one buffer in the kernel: taken in full or not at all."""

_ROOM: Final = socket.CMSG_SPACE(SCM_MAX_FD * 4)


class Descriptors:
    """Descriptors that came with a message. What nobody takes is closed by :meth:`close`.

    Also a context manager. Not thread-safe.
    """

    __slots__ = ("_fds",)

    def __init__(self, fds: Sequence[int] = ()) -> None:
        self._fds = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def __getitem__(self, index: int) -> int:
        """Look at a descriptor; it stays owned here."""
        return self._fds[index]

    def take(self) -> list[int]:
        """All descriptors; the caller owns them from now on."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        """Close what was not taken. Idempotent."""
        for fd in self.take():
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True)
class Message:
    """One whole message. Whoever receives it owns ``fds`` and has to close them.

    ``held``: it is still in the socket, without its descriptors if it has any, and nothing more is
    received until :meth:`Stream.release`.
    """

    data: bytes
    fds: Descriptors
    held: bool = False


class Stream:
    """One end of a connection, cut into messages.

    ``size_of`` gets the first ``head`` bytes of a message and returns its whole size in bytes, at
    least ``head``; it raises :class:`ProtocolError` for sizes it does not like, so nothing is ever
    allocated that it did not approve. ``hold`` gets the same bytes and says whether the message is
    to stay in the socket until it was dealt with. The stream owns the socket. One thread receives;
    any number send. ``interrupt`` and ``close`` may come from any thread, ``interrupt`` from a
    signal handler.

    A peer that is gone shows as ``ConnectionError``. After that, or after a ProtocolError, the
    stream is of no further use and should be closed.
    """

    def __init__(
        self,
        sock: socket.socket,
        size_of: Callable[[bytes], int],
        *,
        head: int = 16,
        hold: Callable[[bytes], bool] | None = None,
    ) -> None:
        # MSG_DONTWAIT does what is needed for each call; O_NONBLOCK would be shared with every
        # other process that holds this socket.
        sock.setblocking(True)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        self._sock = sock
        self._size_of = size_of
        self._head = head
        self._hold = hold
        self._held = 0
        self._scratch = bytearray()
        self._sending = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._edge: select.epoll | None = None
        self._waiting = False
        self._seen = 0
        self._since = 0.0
        self._piece: bytearray | None = None
        self._piece_fds: list[int] = []

    @property
    def socket(self) -> socket.socket:
        """The socket, for passing a duplicate on. The stream keeps owning it."""
        return self._sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def interrupt(self) -> None:
        """Make every present and later wait of this stream raise :class:`Closed`."""
        wake = self._wake
        if wake >= 0:
            os.eventfd_write(wake, 1)

    def close(self) -> None:
        """Close the socket and everything received but not handed out. Idempotent.

        No other thread may be inside this object any more: interrupt it and join it first.
        """
        if self._wake < 0:
            return
        self._sock.close()
        wake, self._wake = self._wake, -1
        os.close(wake)
        if self._edge is not None:
            self._edge.close()
        for fd in self._piece_fds:
            os.close(fd)
        self._piece_fds = []

    # -- receiving -------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> Message:
        """Wait for the next message; :class:`WaitTimeout` after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            message = self.poll_message()
            if message is not None:
                return message
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise WaitTimeout("no message came", operation="receive", hint="is it running?")
            self.wait(left)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until :meth:`poll_message` is worth calling again, at most ``timeout`` seconds."""
        poller = select.poll()
        poller.register(self.wait_fd, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        limits = [limit for limit in (timeout, self.patience()) if limit is not None]
        ready = poller.poll(_milliseconds(min(limits)) if limits else None)
        if any(fd == self._wake for fd, _ in ready):
            raise Closed("the wait was interrupted", operation="receive")

    @property
    def wait_fd(self) -> int:
        """What to poll for reading before the next :meth:`poll_message`. Ask anew each time."""
        if self._waiting and self._edge is not None:
            return self._edge.fileno()
        return self._sock.fileno()

    def patience(self) -> float | None:
        """Seconds after which to call :meth:`poll_message` again although nothing happened."""
        if not self._waiting:
            return None
        return max(0.0, self._since + STALL - time.monotonic())

    def poll_message(self) -> Message | None:
        """Take the next message if all of it is there, else None. Never blocks.

        UsageError while a held message was not released.
        """
        if self._held:
            raise UsageError("the message before is still held", operation="receive")
        if self._piece is not None:
            return self._next_piece()
        if self._waiting and self._edge is not None:
            self._edge.poll(0)  # spend the edge first: whatever arrives from here on makes another
        try:
            peeked = self._sock.recv(_PEEK, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        if not peeked:
            raise ConnectionResetError(errno.ECONNRESET, "the peer hung up")
        size = self._size_of(peeked[: self._head]) if len(peeked) >= self._head else 0
        if size and (len(peeked) >= size or self._queued() >= size):
            self._waiting = False
            if self._hold is not None and self._hold(peeked[: self._head]):
                return self._peek(peeked, size)
            return self._take(size)
        return self._incomplete(size)

    def _peek(self, peeked: bytes, size: int) -> Message:
        """Hand out ``size`` queued bytes and leave them where they are."""
        if len(peeked) < size:
            peeked = self._sock.recv(size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            if len(peeked) < size:  # cut by descriptors: see _take
                return self._take(size)
        self._held = size
        return Message(peeked[:size], Descriptors(), held=True)

    def release(self) -> None:
        """Take the message that is held out of the socket, if one is. Receiving thread only.

        Descriptors that came with it are closed: no held message is meant to have any.
        """
        # Into memory that is there: a fault in the middle of the call could end it half-way.
        size, self._held = self._held, 0
        if len(self._scratch) < size:
            self._scratch = bytearray(size)
        while size:
            done = self._sock.recv_into(self._scratch, size, socket.MSG_DONTWAIT)
            if not done:
                raise ConnectionResetError(errno.ECONNRESET, "the peer hung up")
            size -= done

    def _queued(self) -> int:
        raw = fcntl.ioctl(self._sock, termios.FIONREAD, b"\0\0\0\0")
        return int.from_bytes(raw, "little")

    def _incomplete(self, size: int) -> Message | None:
        """Half a message is queued: get ready to wait for more, or give up and take pieces."""
        queued, now = self._queued(), time.monotonic()
        if not self._waiting:
            self._arm()
            self._waiting, self._seen, self._since = True, queued, now
            return self.poll_message()  # once more, behind the edge
        if self._hung_up() and (not size or self._queued() < size):
            raise ConnectionResetError(errno.ECONNRESET, "the peer hung up inside a message")
        if queued > self._seen:
            self._seen, self._since = queued, now
        elif now - self._since >= STALL:
            self._waiting = False
            self._piece = bytearray()
            return self._next_piece()
        return None

    def _arm(self) -> None:
        if self._edge is None:
            self._edge = select.epoll(flags=select.EPOLL_CLOEXEC)
            events = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
            self._edge.register(self._sock.fileno(), events)

    def _hung_up(self) -> bool:
        poller = select.poll()
        poller.register(self._sock.fileno(), select.POLLRDHUP)
        return bool(poller.poll(0))

    def _take(self, size: int) -> Message:
        """Take ``size`` queued bytes: one recvmsg, unless descriptors cut the message in two."""
        data, fds = self._recvmsg(size)
        parts = [data]
        try:
            while (left := size - sum(map(len, parts))) > 0:
                data, more = self._recvmsg(left)
                fds += more
                parts.append(data)
                _bound(fds)
        except BaseException:
            Descriptors(fds).close()
            raise
        return Message(parts[0] if len(parts) == 1 else b"".join(parts), Descriptors(fds))

    def _next_piece(self) -> Message | None:
        piece = self._piece
        assert piece is not None
        while True:
            whole = len(piece) >= self._head
            size = self._size_of(bytes(piece[: self._head])) if whole else self._head
            if whole and len(piece) >= size:
                break
            try:
                data, fds = self._recvmsg(size - len(piece))
            except BlockingIOError:
                return None
            piece += data
            self._piece_fds += fds
            _bound(self._piece_fds)
        fds, self._piece, self._piece_fds = self._piece_fds, None, []
        return Message(bytes(piece), Descriptors(fds))

    def _recvmsg(self, size: int) -> tuple[bytes, list[int]]:
        flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        data, ancillary, happened, _ = self._sock.recvmsg(size, _ROOM, flags)
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if happened & socket.MSG_CTRUNC or not data:
            Descriptors(fds.tolist()).close()
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the peer hung up")
            raise ProtocolError(
                "descriptors were lost on the way",
                operation="receive",
                hint="raise the limit of open files (ulimit -n)",
            )
        return data, fds.tolist()

    # -- sending ---------------------------------------------------------------------------------

    def send(
        self,
        parts: Sequence[bytes | memoryview],
        fds: Sequence[int] = (),
        timeout: float | None = None,
    ) -> None:
        """Send one message, descriptors with its first byte; the caller keeps its descriptors.

        Waits while the peer does not read: at most ``timeout`` seconds, then raises
        :class:`WaitTimeout` with nothing sent, or ``ConnectionError`` if a part had gone out.
        """
        left = [memoryview(part).cast("B") for part in parts if len(part)]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        total = sum(map(len, left))
        at_once = total <= _ONE_WRITE
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._sending:
            sent = 0
            while sent < total:
                if not at_once:
                    self._writable(deadline, started=sent > 0)
                try:
                    done = self._sock.sendmsg(
                        left, rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
                    )
                except BlockingIOError:
                    at_once = False
                    continue
                sent += done
                left, rights = _rest(left, done), []

    def _writable(self, deadline: float | None, *, started: bool) -> None:
        poller = select.poll()
        poller.register(self._sock.fileno(), select.POLLOUT)
        poller.register(self._wake, select.POLLIN)
        left = None if deadline is None else deadline - time.monotonic()
        ready = poller.poll(None if left is None else _milliseconds(left))
        if any(fd == self._wake for fd, _ in ready):
            raise Closed("the wait was interrupted", operation="send")
        if not ready and started:
            raise ConnectionAbortedError(errno.ETIMEDOUT, "the peer stopped reading in a message")
        if not ready:
            raise WaitTimeout("the peer does not read", operation="send", hint="is it stopped?")


def _bound(fds: list[int]) -> None:
    if len(fds) > SCM_MAX_FD:
        raise ProtocolError(f"{len(fds)} descriptors with one message", operation="receive")


def _rest(parts: list[memoryview], done: int) -> list[memoryview]:
    """What is left of a gather list after ``done`` bytes."""
    for index, part in enumerate(parts):
        if done < len(part):
            return [part[done:], *parts[index + 1 :]]
        done -= len(part)
    return []


def _milliseconds(seconds: float) -> int:
    return max(0, int(seconds * 1000 + 0.999))
