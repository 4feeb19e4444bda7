# SPDX-License-Identifier: Apache-2.0
"""Memory as a file: memfds that cannot change size, and holes punched into them.

A file that a peer could shrink makes every access through our own mapping a possible SIGBUS, so
what is handed out is sealed and what is taken in is checked. The seals fix the *size*, not the
pages: whoever holds the descriptor can still punch holes (fcntl(2), "File Sealing").
"""

from __future__ import annotations

import fcntl
import os

from holdfast.errors import BadBuffer
from holdfast.kernel import libc
from holdfast.kernel.failure import failure

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(name: str, size: int) -> int:
    """A zeroed memfd of exactly ``size`` bytes, close-on-exec, sealed against resizing.

    The caller owns the descriptor. No memory is allocated until pages are touched. ``name`` is
    what ``/proc/PID/fd`` shows, at most 249 bytes. Raises BadBuffer for a size that no file has.
    """
    if not 0 < size < 1 << 63:
        raise BadBuffer(f"{size} bytes", operation="create memfd", target=name)
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise failure(error, "create memfd", name) from error
    return fd


def punch(fd: int, offset: int, size: int) -> None:
    """Give the pages of ``size`` bytes at ``offset`` back to the kernel; they read as zero then.

    Blocks for about 0.2 s per GiB. Mappings of the range stay valid and see zeroes. A page that
    something else pins keeps its frame, but the file no longer shows it (fallocate(2)).
    """
    mode = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
    try:
        libc.fallocate(fd, mode, offset, size)
    except OSError as error:
        raise failure(error, "punch", f"descriptor {fd}") from error


def allocated(fd_or_path: int | str) -> int:
    """Bytes really allocated to a file: ``st_blocks`` in units of 512 (stat(3type))."""
    try:
        return os.stat(fd_or_path).st_blocks * 512
    except OSError as error:
        raise failure(error, "stat", str(fd_or_path)) from error


def require_sealed(fd: int, size: int) -> None:
    """Check that the file has at least ``size`` bytes and can never have fewer.

    Raises BadBuffer if it is smaller, is sealed against nothing, or is no memfd at all.
    """
    target = f"descriptor {fd}"
    try:
        present = os.fstat(fd).st_size
    except OSError as error:
        raise failure(error, "check memory file", target) from error
    if present < size:
        raise BadBuffer(
            f"the file has {present} bytes, {size} are needed",
            operation="check memory file",
            target=target,
        )
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:  # EINVAL: no file that can be sealed (fcntl(2))
        raise BadBuffer(
            "the file cannot be sealed",
            operation="check memory file",
            target=target,
            errno=error.errno,
            hint="pass a memfd that is sealed with F_SEAL_SHRINK",
        ) from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise BadBuffer(
            "the file could be shrunk under its mapping",
            operation="check memory file",
            target=target,
            hint="seal it with F_SEAL_SHRINK first",
        )
