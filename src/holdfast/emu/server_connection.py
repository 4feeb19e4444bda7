# SPDX-License-Identifier: Apache-2.0
"""One client of an emulated function: its messages in order, its memory, its interrupts.

Commands are carried out in order of arrival and answered in that order, also those that arrive
while an earlier answer has to wait. What is *received* goes on meanwhile: the answer that everybody
waits for may be that of a DMA message (vfio-user specification, "concurrency"). So requests queue
behind a waiting answer, in bounded number, and DMA answers pass them.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from holdfast.emu.port import DmaPort, Guest
from holdfast.emu.server_bells import Bells
from holdfast.emu.server_commands import Answer, Commands
from holdfast.emu.server_irqs import Irqs
from holdfast.emu.server_link import Link
from holdfast.emu.windows import Windows
from holdfast.errors import Closed, HoldfastError, ProtocolError
from holdfast.kernel.stream import Descriptors, Message, Stream
from holdfast.values import IrqIndex
from holdfast.wire.vfio_user import frame
from holdfast.wire.vfio_user import server as wire
from holdfast.wire.vfio_user.capabilities import SERVER, Capabilities
from holdfast.wire.vfio_user.frame import Header

MAX_QUEUED: Final = 1024
MAX_QUEUED_BYTES: Final = 4 << 20
MAX_QUEUED_FDS: Final = 256
"""What a client may pipeline behind an answer that has to wait."""

_log = logging.getLogger("holdfast.emu")


def size_of(head: bytes) -> int:
    """Whole size of the message with this header; ProtocolError if it cannot be."""
    return Header.decode(head).size


@dataclass(frozen=True, slots=True)
class _Waiting:
    header: Header
    answer: Answer


class Connection:
    """Serves one connected socket. Fulfils ``port.Host`` for the function.

    ``run`` is the socket thread; ``signal``, ``wired``, ``rewire``, ``wake`` may come from any
    thread, ``dma`` belongs to the engine thread. Owns the socket.
    """

    def __init__(
        self,
        guest: Guest,
        sock: socket.socket,
        wake_engine: Callable[[], None],
        capabilities: Capabilities = SERVER,
    ) -> None:
        self._guest = guest
        self._wake_engine = wake_engine
        self._stream = Stream(sock, size_of)
        self._twin: Stream | None = None
        self._session = wire.ServerSession(capabilities)
        self._session_lock = threading.Lock()
        self._nudge = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Between seeing the number of an eventfd and writing to it nobody may close it. Reentrant,
        # because a signal handler may interrupt the thread that holds it.
        self._life = threading.RLock()
        self._stopping = False
        self._attached = False
        self._link = Link(self._session, self._session_lock)
        self.windows = Windows(self._link, self._poke)
        self._irqs = Irqs(guest.irq_counts(), guest.intx_asserted)
        self._bells = Bells(guest)
        self._commands = Commands(guest, self.windows, self._irqs, self._bells, self._link)
        self._waiting: _Waiting | None = None
        self._queue: deque[tuple[wire.Event, Descriptors]] = deque()
        self._queued_bytes = 0
        self._queued_fds = 0

    # -- port.Host -------------------------------------------------------------------------------

    @property
    def dma(self) -> DmaPort:
        """The bus-master port."""
        return self.windows

    def signal(self, index: IrqIndex, vector: int) -> None:
        """Raise one interrupt vector; dropped if none is connected."""
        self._irqs.signal(index, vector)

    def wired(self, index: IrqIndex) -> bool:
        """True if any vector of this type has an eventfd."""
        return self._irqs.wired(index)

    def rewire(self) -> None:
        """The doorbell eventfds have changed."""
        self._bells.rewire()
        self._poke()

    def wake(self) -> None:
        """Have the engine thread work soon."""
        self._wake_engine()

    # -- life ------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Make :meth:`run` return soon. From any thread or a signal handler."""
        self._stopping = True
        with self._life:
            self._stream.interrupt()
            self._poke()

    def run(self) -> None:
        """Serve until the client leaves, breaks the protocol, or :meth:`stop`; then clean up."""
        try:
            while not self._stopping:
                self._wait()
                self._bells.drain()
                self._advance()
                self._receive(self._stream)
                if self._twin is not None:
                    self._receive(self._twin)
        except ConnectionError as error:
            _log.debug("client left: %s", error)
        except Closed:
            pass  # stopped while sending
        except ProtocolError as error:
            _log.warning("connection closed: %s", error)
        finally:
            self._clean_up()

    def _poke(self) -> None:
        with self._life:
            if self._nudge >= 0:
                os.eventfd_write(self._nudge, 1)

    def _wait(self) -> None:
        streams = [self._stream] if self._twin is None else [self._stream, self._twin]
        poller = select.poll()
        for fd in (self._nudge, self._bells.fileno(), *(s.wait_fd for s in streams)):
            poller.register(fd, select.POLLIN)
        patience = [s.patience() for s in streams]
        limits = [limit for limit in patience if limit is not None]
        ready = poller.poll(int(min(limits) * 1000) + 1 if limits else None)
        if any(fd == self._nudge for fd, _ in ready):
            os.eventfd_read(self._nudge)

    def _clean_up(self) -> None:
        """Nothing of this client stays: memory, descriptors, eventfds.

        First the engine is cut off, so that an access that waits for the client ends now.
        """
        self._stream.interrupt()
        if self._twin is not None:
            self._twin.interrupt()
        self._link.close()
        self.windows.unmap_all()
        while not self.windows.settled():
            self._wait_for_engine()
        serial = self.windows.fence(messages=True)
        while serial is not None and not self.windows.passed(serial):
            self._wait_for_engine()
        self._irqs.close()
        if self._attached:
            self._guest.detach()
        self._bells.close()
        for _, fds in self._queue:
            fds.close()
        self._queue.clear()
        with self._life:
            self._stream.close()
            if self._twin is not None:
                self._twin.close()
            nudge, self._nudge = self._nudge, -1
            os.close(nudge)

    def _wait_for_engine(self) -> None:
        poller = select.poll()
        poller.register(self._nudge, select.POLLIN)
        poller.poll()
        os.eventfd_read(self._nudge)

    # -- messages --------------------------------------------------------------------------------

    def _receive(self, stream: Stream) -> None:
        while not self._stopping and (message := stream.poll_message()) is not None:
            self._take(message, twin=stream is self._twin)
            self._advance()

    def _take(self, message: Message, *, twin: bool) -> None:
        try:
            with self._session_lock:
                event = self._session.receive(message.data, len(message.fds), twin=twin)
        except BaseException:
            message.fds.close()
            raise
        if isinstance(event, wire.DmaDone):
            message.fds.close()
            self._link.answered(event)
        elif isinstance(event, wire.Dropped):
            message.fds.close()
        elif self._waiting is None:
            self._handle(event, message.fds)
        else:
            self._enqueue(event, message)

    def _enqueue(self, event: wire.Event, message: Message) -> None:
        self._queue.append((event, message.fds))
        self._queued_bytes += len(message.data)
        self._queued_fds += len(message.fds)
        if (
            len(self._queue) > MAX_QUEUED
            or self._queued_bytes > MAX_QUEUED_BYTES
            or self._queued_fds > MAX_QUEUED_FDS
        ):
            raise ProtocolError("too much is pipelined behind a waiting command")

    def _advance(self) -> None:
        """Send the answer that waited, if it may go now, and carry on with what queued behind."""
        while self._waiting is not None:
            waiting = self._waiting
            if waiting.answer.ready is not None and not waiting.answer.ready():
                return
            self._waiting = None
            self._send(waiting.header, waiting.answer)
            while self._queue and self._waiting is None:
                event, fds = self._queue.popleft()
                self._handle(event, fds)
        self._queued_bytes = self._queued_fds = 0

    def _handle(self, event: wire.Event, fds: Descriptors) -> None:
        with fds:
            if isinstance(event, wire.Request):
                self._execute(event, fds)
            elif isinstance(event, wire.Negotiated):
                self._negotiated(event)
            elif isinstance(event, wire.Refused):
                if event.reply is not None:
                    self._stream.send(event.reply)
                if event.fatal:
                    raise ProtocolError(event.why, operation="negotiate")
                _log.debug("refused: %s", event.why)

    def _execute(self, request: wire.Request, fds: Descriptors) -> None:
        header = request.header
        try:
            answer = self._commands.execute(request, fds)
        except (OSError, HoldfastError) as error:
            _log.debug("%s failed: %s", request.command.name, error)
            if not header.no_reply:
                self._stream.send(frame.error_reply(header, error.errno or errno.EIO))
            return
        if answer.ready is not None and not answer.ready():
            self._waiting = _Waiting(header, answer)
        else:
            self._send(header, answer)

    def _send(self, header: Header, answer: Answer) -> None:
        if not header.no_reply:
            self._stream.send(frame.reply(header, answer.payload), answer.fds)

    def _negotiated(self, event: wire.Negotiated) -> None:
        """Send the VERSION reply; from here on the function has a host."""
        if event.twin:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                self._twin = Stream(ours, size_of)
                self._stream.send(event.reply, [theirs.fileno()])
        else:
            self._stream.send(event.reply)
        self._link.open(self._twin or self._stream)
        self._commands.max_fds = event.peer.max_msg_fds
        self._attached = True
        self._guest.attach(self)
