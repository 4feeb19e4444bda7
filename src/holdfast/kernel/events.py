# SPDX-License-Identifier: Apache-2.0
"""Eventfds: 64-bit counters to ring and to wait for (eventfd(2)).

Every function may be called from any thread. A descriptor that is no eventfd, or was closed, is a
plain ``OSError``.
"""

from __future__ import annotations

import math
import os
import select
import sys
import time

from holdfast.kernel.failure import failure

_LONGEST_POLL = 1 << 30
"""Milliseconds; poll(2) takes an int."""


def make() -> int:
    """A new counter at 0, nonblocking and close-on-exec. The caller owns the descriptor."""
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise failure(error, "create eventfd") from error


def ring(fd: int, count: int = 1) -> None:
    """Add ``count`` (at least 1) in one system call.

    BlockingIOError if the counter would pass 2**64 - 2: nothing was added.
    """
    os.eventfd_write(fd, count)


def drain(fd: int) -> int:
    """Take the whole count and leave 0; returns 0 at once if there is nothing.

    Never blocks: O_NONBLOCK belongs to the open file, and whoever else has it may have cleared it.
    """
    word = bytearray(8)
    try:
        if os.preadv(fd, [word], -1, os.RWF_NOWAIT) != len(word):
            return 0
    except BlockingIOError:
        return 0
    return int.from_bytes(word, sys.byteorder)


def wait(fd: int, timeout: float | None) -> bool:
    """Block until ``fd`` is readable; False after ``timeout`` seconds. Takes nothing.

    Works for any descriptor that can be polled. A signal whose handler returns does not shorten
    the wait; one whose handler raises (KeyboardInterrupt) ends it.
    """
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = _LONGEST_POLL
        if deadline is not None:
            # Rounded up, so that the last round does not spin through a fraction of 1 ms.
            left = min(math.ceil(max(deadline - time.monotonic(), 0) * 1000), _LONGEST_POLL)
        if poller.poll(left):
            return True
        if deadline is not None and time.monotonic() >= deadline:
            return False


def close(fd: int) -> None:
    """Close an eventfd that the caller owns."""
    os.close(fd)
