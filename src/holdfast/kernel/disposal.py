# SPDX-License-Identifier: Apache-2.0
"""Closing descriptors that somebody else chose.

Facts. close(2) can wait: for the daemon of a FUSE file system (``fuse_flush``), for the peer of a
TCP socket with ``SO_LINGER``, for the output of a terminal to drain. Who passes such a descriptor
to another process and closes its own copy makes *that* process wait in its close. The same happens
when a socket is closed in whose queue such a descriptor still lies, because its messages are thrown
away there (unix(7); net/unix/af_unix.c ``unix_release_sock``).

Consequence. A process that serves several clients on one thread must not close there what came from
one of them.

Choice. Such descriptors are closed by threads of their own, started when needed and ended when
idle: in the usual case one thread for a moment. A thread that is kept waiting is left alone, and
the next descriptor gets another one, up to :data:`MOST`.

Cost. Whoever can make this many closes wait at once keeps later descriptors open in this process
until one of them returns; they are counted (:func:`waiting`) and end with the process. Sockets do
not get that far: lingering is switched off first.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

MOST: Final = 16
"""Threads that may wait in a close at once."""
IDLE: Final = 0.2
"""Seconds after which a thread without work ends."""

_NO_LINGER: Final = struct.pack("=ii", 0, 0)

_condition = threading.Condition()
_queue: deque[int] = deque()
_threads = 0
_idle = 0


def discard(fds: Sequence[int]) -> None:
    """Close descriptors that came from a peer, without waiting for it. Never raises.

    They are no longer the caller's when this returns, and may stay open for a moment. Thread-safe.
    """
    if not fds:
        return
    with _condition:
        _queue.extend(fds)
        _condition.notify()
        _start_thread()


def hang_up(sock: socket.socket) -> None:
    """Close a connected Unix socket at once as its peer sees it, without waiting for anybody.

    What the peer sent and nobody received is thrown away, descriptors included.
    """
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # from here on nothing can be added to the queue
    try:
        unread = bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        unread = False
    if unread:
        discard([sock.detach()])
    else:
        sock.close()


def waiting() -> int:
    """Descriptors that are still to be closed."""
    with _condition:
        return len(_queue)


def _start_thread() -> None:
    """Under the lock: one more thread, unless one is idle or there are too many."""
    global _threads  # noqa: PLW0603 - the state of this module, under its lock
    if _idle or _threads >= MOST:
        return
    _threads += 1
    threading.Thread(target=_run, name="holdfast-discard", daemon=True).start()


def _run() -> None:
    global _threads, _idle  # noqa: PLW0603
    while True:
        with _condition:
            _idle += 1
            found = _condition.wait_for(lambda: _queue, IDLE)
            _idle -= 1
            if not found:
                _threads -= 1
                return
            fd = _queue.popleft()
            if _queue:
                # This one may be kept waiting: somebody else has to look after the others.
                _start_thread()
        _close(fd)


def _close(fd: int) -> None:
    with suppress(OSError):
        # With a family given, Python takes any descriptor; what is no socket refuses the option.
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        finally:
            sock.detach()
    with suppress(OSError):
        os.close(fd)


def _forget() -> None:
    """In a forked child, which has none of the threads; what is queued is closed by nobody."""
    global _condition, _threads, _idle  # noqa: PLW0603
    _condition = threading.Condition()
    _queue.clear()
    _threads = _idle = 0


os.register_at_fork(after_in_child=_forget)
