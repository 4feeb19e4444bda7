# SPDX-License-Identifier: Apache-2.0
"""A client's own memory, as a function reaches it by message."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable
from typing import TypeVar

from holdfast.kernel import bounded

T = TypeVar("T")

PATIENCE = 3.0
"""Seconds that one access may take. The pages of a client that lives are there, or come from a
disk; only a client that serves them itself can be slower."""


class OwnMemory:
    """A client's open ``/proc/self/mem``, and whether it comes back from accesses. Thread-safe.

    Has a duplicate of ``fd``, which stays open as long as an access is out.
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self._stuck = False
        weakref.finalize(self, os.close, self._fd)

    def read(self, address: int, count: int) -> bytes:
        """At most ``count`` bytes; ``OSError`` if they cannot be had now."""
        return self._bounded(lambda: os.pread(self._fd, count, address))

    def write(self, address: int, data: bytes) -> int:
        """How many bytes were written; ``OSError`` if nothing is known to be."""
        return self._bounded(lambda: os.pwrite(self._fd, data, address))

    def _bounded(self, access: Callable[[], T]) -> T:
        if self._stuck:
            raise OSError(errno.EIO, "an earlier access to this memory never returned")
        try:
            return bounded.call(access, PATIENCE)
        except TimeoutError as error:
            self._stuck = True
            raise OSError(errno.EIO, "the access does not return") from error


class ProcessMemory:
    """``contracts.HostMemory`` over a client's own ``/proc/self/mem``, from ``address`` on.

    The descriptor stays tied to the client's address space: once that is gone, reads and writes
    move nothing, and the access fails instead of reaching anyone else (proc(5), fs/proc/base.c
    ``mem_rw``). Writes there ignore page protection, so the *map's* permission is what keeps a
    read-only array read-only; the backend checks it before it calls.

    A client can make an access wait for ever (userfaultfd(2), a mapped file of FUSE), and with it
    the thread that serves everybody's DMA. So it is carried out elsewhere, and given up after
    :data:`PATIENCE`; from then on nothing is tried with this client any more. ``own`` is shared by
    all pins of a lease.
    """

    def __init__(self, fd: int, address: int, own: OwnMemory | None = None) -> None:
        self._own = own or OwnMemory(fd)
        self._address = address

    def read(self, offset: int, count: int) -> bytes:
        data = self._own.read(self._address + offset, count)
        if len(data) != count:
            raise OSError(errno.EFAULT, f"{len(data)} of {count} bytes: the memory is gone")
        return data

    def write(self, offset: int, data: memoryview) -> None:
        # A copy: the caller's buffer has somebody else's bytes by the time a late write is done.
        written = self._own.write(self._address + offset, bytes(data))
        if written != len(data):
            raise OSError(errno.EFAULT, f"{written} of {len(data)} bytes: the memory is gone")
