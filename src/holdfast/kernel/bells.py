# SPDX-License-Identifier: Apache-2.0
"""Bells for a listener that is not trusted: ringing one never blocks.

An eventfd is one open file for both ends, flags included: who has it can clear O_NONBLOCK and fill
the counter, and the next write(2) by the other end blocks until somebody reads (fs/eventfd.c
``eventfd_write``). The ends of a pipe are two open files, so the flags of the writing end are the
ringer's alone. Cost: what was not taken adds up, to the pipe's 64 KiB.
"""

from __future__ import annotations

import contextlib
import os

from holdfast.kernel.failure import failure

_RING = (1).to_bytes(8, "little")


def make() -> tuple[int, int]:
    """The listener's end and the ringer's, close-on-exec. The caller owns both."""
    try:
        return os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise failure(error, "make bell") from error


def ring(fd: int) -> None:
    """Make the other end readable. If it is full, it is so already; if nobody is there, nobody
    hears it."""
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(fd, _RING)


def drain(fd: int) -> int:
    """Take all rings; how many there were. Returns 0 at once if there are none."""
    try:
        return len(os.read(fd, 1 << 16)) // len(_RING)
    except BlockingIOError:
        return 0
