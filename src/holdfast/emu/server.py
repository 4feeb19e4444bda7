# SPDX-License-Identifier: Apache-2.0
"""The vfio-user server: puts an emulated function behind a socket.

Two threads. The *socket thread* (the caller of ``serve_*``) receives messages, touches registers,
maps memory, answers. The *engine thread* does the function's DMA. They meet in the window table and
in the function's own lock. A register access must be answered quickly while the engine copies, so
copies release the interpreter lock where they are large, and :func:`tune_process` makes Python
switch threads more often.

A client that leaves takes its memory and interrupts with it; the function keeps its state and
waits for the next client (vfio-user specification, "disconnect").
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from holdfast.emu.port import Guest
from holdfast.emu.server_connection import Connection
from holdfast.errors import DmaFault
from holdfast.kernel import packets
from holdfast.wire.vfio_user.capabilities import SERVER, Capabilities

SWITCH_INTERVAL: Final = 0.0002
"""Seconds after which a computing thread offers the interpreter to another. Python's default of
5 ms would be the latency of a register read beside a busy engine."""

BACKLOG: Final = 8
"""Clients that can wait in the queue while one is served."""

_FAULT_PAUSE: Final = 0.01

_log = logging.getLogger("holdfast.emu")


def tune_process() -> None:
    """Set up the interpreter for serving. For a process that does nothing else."""
    sys.setswitchinterval(SWITCH_INTERVAL)


class _Engine:
    """The thread that does the function's work. ``wake`` is a lock used as a binary semaphore:
    the quickest way from one Python thread to another."""

    def __init__(self, guest: Guest, on_error: Callable[[], None]) -> None:
        self._guest = guest
        self._bell = threading.Lock()
        self._bell.acquire()
        self._stopping = False
        self._on_error = on_error
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="holdfast-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:
            pass  # rung already

    def stop(self) -> None:
        """End the thread after the step in progress."""
        self._stopping = True
        self.wake()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                pause = self._step()
                if pause is None:
                    self._bell.acquire()
                elif pause > 0:
                    self._bell.acquire(timeout=min(pause, threading.TIMEOUT_MAX))
        except BaseException as error:  # noqa: BLE001  (raised again by serve)
            self.error = error
            self._on_error()

    def _step(self) -> float | None:
        try:
            return self._guest.work()
        except DmaFault as fault:
            # Counted by the port; a function that does not care goes on with its next step, but
            # one that fails at every step must not take a processor for it.
            _log.debug("%s", fault)
            return _FAULT_PAUSE


class Server:
    """Serves one function to one client at a time.

    ``serve_socket`` or ``serve_path`` is called once; ``stop`` may come from any thread or a signal
    handler. The server borrows the function: closing it is the caller's.
    """

    def __init__(self, guest: Guest, *, capabilities: Capabilities = SERVER) -> None:
        self._guest = guest
        self._capabilities = capabilities
        self._stopping = False
        self._connection: Connection | None = None
        self._wake = -1
        # Between seeing the number of an eventfd and writing to it nobody may close it. Reentrant,
        # because a signal handler may interrupt the thread that holds it.
        self._life = threading.RLock()

    def stop(self) -> None:
        """Make ``serve_*`` clean up and return. Later ones return at once."""
        self._stopping = True
        connection = self._connection
        if connection is not None:
            connection.stop()
        with self._life:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def serve_socket(self, conn: socket.socket) -> None:
        """Serve one connected ``AF_UNIX`` stream socket until the client leaves. Takes ownership.

        Raises what the function's ``work`` raised, if it failed.
        """
        with conn, self._engine() as engine:
            self._serve(conn, engine)

    def serve_path(self, path: str | os.PathLike[str], *, once: bool = False) -> None:
        """Listen at ``path`` (mode 0600) and serve clients one after the other until ``stop``.

        With ``once``, return after the first. A socket file that nobody listens on is replaced;
        raises :class:`Busy` if a server answers there or something else is in the way. The socket
        file is removed at the end.
        """
        name = os.fspath(path)
        listener = packets.listen(name, BACKLOG, socket.SOCK_STREAM)
        listener.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            identity = os.stat(name).st_ino
            with self._engine() as engine:
                while (conn := self._accept(listener)) is not None:
                    with conn:
                        self._serve(conn, engine)
                    if once:
                        return
        finally:
            listener.close()
            with self._life:
                wake, self._wake = self._wake, -1
                os.close(wake)
            _remove(name, identity)

    @contextmanager
    def _engine(self) -> Iterator[_Engine]:
        engine = _Engine(self._guest, self.stop)
        engine.start()
        try:
            yield engine
        finally:
            engine.stop()
        if engine.error is not None:
            raise engine.error

    def _serve(self, conn: socket.socket, engine: _Engine) -> None:
        connection = Connection(self._guest, conn, engine.wake, self._capabilities)
        self._connection = connection
        try:
            if self._stopping:  # it came before there was a connection to tell
                connection.stop()
            connection.run()
        finally:
            self._connection = None

    def _accept(self, listener: socket.socket) -> socket.socket | None:
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while not self._stopping:
            poller.poll()
            try:
                return listener.accept()[0]
            except BlockingIOError:
                continue  # woken to stop, or the client went away again
        return None


def _remove(name: str, identity: int) -> None:
    try:
        if os.stat(name).st_ino == identity:
            os.unlink(name)
    except FileNotFoundError:
        pass
