# SPDX-License-Identifier: Apache-2.0
"""The connection of a vfio-user client: requests from any thread, one thread that receives.

The receiving thread hands replies to whoever waits and carries out the server's DMA commands at any
time, also while requests wait: a client that served DMA only between its own requests would stop
the server, and so itself (vfio-user specification, "concurrency").

A DMA command stays in the socket until it was answered, and what has been done about it is noted
(``vfio_user_trail``): a process that is killed meanwhile leaves it to its successor. Replies are
taken at once.

A request that is not answered in time ends the connection: its outcome is unknown, and a function
that hangs is as good as gone. From then on everything raises :class:`DeviceGone`.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from holdfast.backends.vfio_user_memory import ServedMemory
from holdfast.backends.vfio_user_trail import Done, Trail
from holdfast.errors import (
    Closed,
    DeviceGone,
    HoldfastError,
    ProtocolError,
    RemoteError,
)
from holdfast.kernel.stream import Descriptors, Message, Stream
from holdfast.steps import reach
from holdfast.uapi.vfio_user import Command
from holdfast.wire.vfio_user import client as wire
from holdfast.wire.vfio_user.frame import Header, Part, Parts

_RETRY: Final = 0.005


@dataclass(slots=True)
class Slot:
    """One waiting requester. ``done`` is a lock used as a semaphore: the quickest wake-up."""

    command: Command
    done: threading.Lock = field(default_factory=threading.Lock)
    reply: wire.Reply | None = None
    fds: Descriptors = field(default_factory=Descriptors)


def size_of(head: bytes) -> int:
    """Whole size of the message with this header; ProtocolError if it cannot be."""
    return Header.decode(head).size


def is_command(head: bytes) -> bool:
    """Whether the message with this header is a command of the server."""
    return not Header.decode(head).is_reply


class ClientLink:
    """Owns the socket, the trail and the receiving thread. ``request`` may come from any thread."""

    def __init__(
        self,
        sock: socket.socket,
        session: wire.ClientSession,
        memory: ServedMemory,
        target: str,
        trail: Trail,
    ) -> None:
        """Takes ownership of ``sock`` and ``trail``."""
        self._session = session
        self._memory = memory
        self._trail = trail
        self._target = target
        self._lock = threading.Lock()
        self._slots: dict[int, Slot] = {}
        self._reason = ""
        self._closing = False
        self._told = False
        self._on_gone: Callable[[], None] | None = None
        self._stream = Stream(sock, size_of, hold=is_command)
        self._streams = [self._stream]
        self._threads: list[threading.Thread] = []
        self._receive_from(self._stream, twin=False)

    @property
    def on_gone(self) -> Callable[[], None] | None:
        return self._on_gone

    @on_gone.setter
    def on_gone(self, callback: Callable[[], None] | None) -> None:
        with self._lock:
            self._on_gone = callback
        if self._reason:
            self._tell()

    def add_twin(self, fd: int) -> None:
        """Serve DMA on the twin socket. Takes ownership of ``fd``."""
        try:
            twin = Stream(socket.socket(fileno=fd), size_of, hold=is_command)
        except OSError as error:
            os.close(fd)
            raise ProtocolError(
                "the twin is not a socket", operation="negotiate", target=self._target
            ) from error
        self._streams.append(twin)
        self._receive_from(twin, twin=True)

    def request(
        self,
        command: Command,
        payload: Parts,
        *,
        timeout: float,
        fds: Sequence[int] = (),
    ) -> tuple[Part, Descriptors]:
        """Send a command and wait for its reply: the payload, and descriptors the caller owns.

        Raises :class:`RemoteError` for an error reply, :class:`DeviceGone` if there is no answer
        within ``timeout`` seconds or the function is gone.
        """
        return self.finish(self.begin(command, payload, timeout=timeout, fds=fds), timeout=timeout)

    def begin(
        self,
        command: Command,
        payload: Parts,
        *,
        timeout: float,
        fds: Sequence[int] = (),
    ) -> Slot:
        """Send a command without waiting. Every slot must be finished."""
        slot = Slot(command)
        slot.done.acquire()
        with self._lock:
            self._check_alive(command)
            ident, parts = self._session.command(command, payload)
            self._slots[ident] = slot
            self._trail.sent(ident)
        try:
            self._stream.send(parts, fds, timeout)
        except (OSError, Closed) as error:  # WaitTimeout is an OSError, too
            self._lose(f"{command.name} could not be sent: {error}")
        reach("keeper.request_sent")
        return slot

    def pipeline(self, command: Command, bodies: Sequence[Parts], *, timeout: float) -> list[Part]:
        """Several commands at once; their replies in order. Raises what the first bad one says."""
        slots = [self.begin(command, body, timeout=timeout) for body in bodies]
        replies: list[Part] = []
        failed: HoldfastError | None = None
        for slot in slots:  # all of them: what came with a reply must be closed
            try:
                payload, fds = self.finish(slot, timeout=timeout)
                fds.close()
                replies.append(payload)
            except HoldfastError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return replies

    def finish(self, slot: Slot, *, timeout: float) -> tuple[Part, Descriptors]:
        """Wait for the reply to a command that :meth:`begin` sent."""
        command = slot.command
        if not slot.done.acquire(timeout=timeout):
            self._lose(f"{command.name} was not answered within {timeout:g} s")
            slot.done.acquire()
        reply = slot.reply
        if reply is None:
            slot.fds.close()
            raise self._gone(command)
        if reply.error is not None:
            slot.fds.close()
            raise RemoteError(
                f"{command.name} was refused",
                operation=command.name,
                target=self._target,
                errno=reply.error,
            )
        return reply.payload, slot.fds

    def close(self) -> None:
        """End the connection and the threads. Idempotent; ``on_gone`` is not called."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._lose("it was closed")
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        for stream in self._streams:
            stream.close()
        self._trail.close()

    def descriptors(self) -> dict[str, int]:
        """What a successor needs of this connection; all of it stays owned here."""
        names = ("socket", "twin")
        found = {name: stream.fileno() for name, stream in zip(names, self._streams, strict=False)}
        return found | {"trail": self._trail.fd}

    # -- the end ---------------------------------------------------------------------------------

    def _check_alive(self, command: Command) -> None:
        if self._closing:
            raise Closed("the backend was closed", operation=command.name, target=self._target)
        if self._reason:
            raise self._gone(command)

    def _gone(self, command: Command) -> HoldfastError:
        if self._closing:
            return Closed("the backend was closed", operation=command.name, target=self._target)
        return DeviceGone(self._reason, operation=command.name, target=self._target)

    def _lose(self, reason: str) -> None:
        """The connection is over. Wakes every requester; the first reason stays."""
        with self._lock:
            if self._reason:
                return
            self._reason = reason
            slots = list(self._slots.values())
            self._slots.clear()
        for slot in slots:
            slot.done.release()
        for stream in self._streams:
            stream.interrupt()
        if not self._closing:
            self._tell()

    def _tell(self) -> None:
        with self._lock:
            callback = self._on_gone
            if callback is None or self._told or self._closing:
                return
            self._told = True
        callback()

    # -- receiving -------------------------------------------------------------------------------

    def _receive_from(self, stream: Stream, *, twin: bool) -> None:
        thread = threading.Thread(
            target=self._receive, args=(stream, twin), name="holdfast-vfio-user", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _receive(self, stream: Stream, twin: bool) -> None:
        reason = "the receiving thread failed"
        try:
            while True:
                self._take(stream, stream.receive(), twin)
        except ConnectionError:
            reason = "the server hung up"
        except Closed:
            reason = "it was interrupted"
        except HoldfastError as error:
            reason = f"the server broke the protocol: {error.what}"
        finally:
            self._lose(reason)

    def _take(self, stream: Stream, message: Message, twin: bool) -> None:
        with message.fds as fds:
            with self._lock:
                event = self._session.receive(message.data, twin=twin)
                slot = (
                    self._slots.pop(event.msg_id, None) if isinstance(event, wire.Reply) else None
                )
            if isinstance(event, wire.Reply):
                if slot is not None:
                    slot.reply, slot.fds = event, Descriptors(fds.take())
                    slot.done.release()
            elif isinstance(event, wire.DmaRequest):
                self._serve(stream, event, twin)
            elif isinstance(event, wire.Refused) and event.reply is not None:
                stream.send(event.reply)
        if message.held:
            stream.release()
            self._trail.taken(twin)
            reach("keeper.relay_taken")

    def _serve(self, stream: Stream, request: wire.DmaRequest, twin: bool) -> None:
        """Carry out and answer a command, or what a predecessor left to be done of it."""
        reach("keeper.relay_found")
        done = self._trail.done(twin, request)
        if done == Done.ANSWERED:
            return
        answer = self._carry_out(request, twin, already=done == Done.CARRIED_OUT)
        if answer is not None:
            stream.send(answer)
        reach("keeper.relay_answered")
        self._trail.answered(twin)
        reach("keeper.relay_noted")

    def _carry_out(self, request: wire.DmaRequest, twin: bool, *, already: bool) -> Parts | None:
        access, data = request.access, b""
        try:
            if not request.write:
                data = self._memory.read(access.address, access.count)
            elif not already:
                self._memory.write(access.address, memoryview(access.data))
        except OSError as error:
            return self._session.failed(request, error.errno or errno.EIO)
        reach("keeper.relay_done")
        self._trail.carried_out(twin, request)
        reach("keeper.relay_carried")
        return self._session.done(request, data)


def connect(path: str, timeout: float) -> socket.socket:
    """A socket connected to the server at ``path``; :class:`DeviceGone` if nobody takes it."""
    target = f"vfio-user:{path}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = time.monotonic() + timeout
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
                return sock
            except BlockingIOError as error:
                # The server's queue is full. A Unix socket is never "in progress" and cannot be
                # polled for this, so try again.
                if time.monotonic() >= deadline:
                    raise DeviceGone(
                        f"the server took no connection within {timeout:g} s",
                        operation="connect",
                        target=target,
                        hint="it serves one client at a time: is another one connected?",
                    ) from error
                time.sleep(_RETRY)
    except OSError as error:
        sock.close()
        raise DeviceGone(
            error.strerror or str(error),
            operation="connect",
            target=target,
            errno=error.errno,
            hint="is the server running, and is this its socket?",
        ) from error
    except BaseException:
        sock.close()
        raise
