# SPDX-License-Identifier: Apache-2.0
"""Memory behind a descriptor that a client passed: mapped if it is safe, else read and written.

The client keeps its own descriptor and may do to the file what it likes. Mapping is safe only if
the size can never fall below the window: an access behind the end of a file is a SIGBUS, which
Python cannot survive.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import Final, TypeAlias

import numpy as np

from holdfast.emu.port import Bytes
from holdfast.emu.windows_copy import copy_large
from holdfast.errors import BadBuffer
from holdfast.kernel import libc, memfd
from holdfast.kernel.mapping import PAGE, Span
from holdfast.values import Perm

HUGETLBFS_MAGIC: Final = 0x958458F6
"""linux/magic.h"""


class Direct:
    """A mapped file. Owns the mapping, keeps no descriptor.

    ``close`` unmaps at once: the caller knows that nobody is copying.
    """

    __slots__ = ("_base", "_length", "address", "bytes", "span")

    def __init__(self, fd: int, offset: int, size: int, perm: Perm, page: int) -> None:
        lead = offset % page
        length = -(-(lead + size) // page) * page  # huge pages unmap in whole pages only
        writable = bool(perm & Perm.WRITE)
        protection = libc.PROT_READ | (libc.PROT_WRITE if writable else 0)
        self._base = libc.mmap(None, length, protection, libc.MAP_SHARED, fd, offset - lead)
        self._length = length
        self.address = self._base + lead
        self.bytes: Bytes = np.asarray(Span(self.address, size, writable=writable))
        status = os.fstat(fd)
        self.span = (status.st_dev, status.st_ino, offset, offset + size)

    def read(self, offset: int, into: Bytes) -> None:
        copy_large(into, self.bytes[offset : offset + into.size])

    def write(self, offset: int, data: Bytes) -> None:
        copy_large(self.bytes[offset : offset + data.size], data)

    def close(self) -> None:
        self.bytes = np.zeros(0, np.uint8)
        libc.munmap(self._base, self._length)


class File:
    """A file read and written by system calls. Owns the descriptor."""

    __slots__ = ("_fd", "_offset")

    def __init__(self, fd: int, offset: int) -> None:
        self._fd = fd
        self._offset = offset

    def read(self, offset: int, into: Bytes) -> None:
        done = 0
        while done < into.size:
            got = os.preadv(self._fd, [into[done:].data], self._offset + offset + done)
            if got == 0:
                raise OSError(errno.ENXIO, "the file behind the window was cut short")
            done += got

    def write(self, offset: int, data: Bytes) -> None:
        done = 0
        while done < data.size:
            done += os.pwritev(self._fd, [data[done:].data], self._offset + offset + done)

    def close(self) -> None:
        os.close(self._fd)


Memory: TypeAlias = Direct | File


def discard(fd: int) -> None:
    """Close a descriptor that nobody wants."""
    os.close(fd)


def open_memory(
    fd: int, offset: int, size: int, perm: Perm, *, file_io: bool = False
) -> Memory | None:
    """The best safe way to ``size`` bytes at ``offset``; None if only messages remain.

    Takes ownership of ``fd`` in every case. ``OSError``: EINVAL if the file ends before the
    window, EACCES if it was not opened for what ``perm`` wants.
    """
    kept = False
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return None
        huge = libc.filesystem_magic(fd) == HUGETLBFS_MAGIC
        page = status.st_blksize if huge else PAGE
        # The last page of a file is there as a whole, however little of it the file fills.
        if offset + size > -(-status.st_size // page) * page:
            raise OSError(errno.EINVAL, "the file ends before the window does")
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        wrong = {os.O_RDONLY: Perm.WRITE, os.O_WRONLY: Perm.READ}.get(mode)
        if wrong is not None and perm & wrong:
            raise OSError(errno.EACCES, "the descriptor does not allow what the window does")
        if not file_io and mode != os.O_WRONLY and _cannot_shrink(fd, status.st_size):
            return Direct(fd, offset, size, perm, page)
        if huge:
            return None  # hugetlbfs has no write(2)
        kept = True
        return File(fd, offset)
    finally:
        if not kept:
            os.close(fd)


def _cannot_shrink(fd: int, size: int) -> bool:
    try:
        memfd.require_sealed(fd, size)
    except BadBuffer:
        return False
    return True
