# SPDX-License-Identifier: Apache-2.0
"""Physical addresses of this process's memory, from /proc/self/pagemap.

One 64-bit entry for every 4 KiB: bits 0-54 the frame number, 62 swapped, 63 present
(Documentation/admin-guide/mm/pagemap.rst). Without CAP_SYS_ADMIN the frame number reads as 0 and
nothing else tells (fs/proc/task_mmu.c, ``pagemap_read``): taken at its word, a card would be
programmed with physical address 0. So 0 is an error here.

An address is only worth anything while the page is pinned: it may be moved the moment after.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import numpy.typing as npt

from holdfast.errors import BadBuffer, HoldfastError, NoPermission, SystemFailure
from holdfast.kernel.failure import failure

_ENTRY: Final = 8
_UNIT: Final = 4096
"""Bytes that one entry stands for."""
_FRAME: Final = (1 << 55) - 1
_SWAPPED: Final = 1 << 62
_PRESENT: Final = 1 << 63
_AT_ONCE: Final = 1 << 20
"""Bytes of entries read at a time: 512 MiB of memory."""

_FIX: Final = "run as root, or give it the capability: setcap cap_sys_admin+ep on the interpreter"


def physical(address: int, nbytes: int, page: int = _UNIT) -> npt.NDArray[np.uint64]:
    """The physical address of every page of ``page`` bytes in ``nbytes`` at ``address``.

    The memory must be mapped here, faulted in and pinned; ``address`` and ``nbytes`` are multiples
    of ``page``, and that of 4096. Every page must be contiguous in physical memory, as huge pages
    are. Raises NoPermission if the kernel hides the addresses, BadBuffer if a page is not present
    or not in one piece.
    """
    if page < _UNIT or page % _UNIT or address % page or nbytes % page or nbytes < 1:
        raise BadBuffer(
            f"{nbytes:#x} bytes at {address:#x} are no whole pages of {page:#x}",
            operation="translate",
        )
    entries = _entries(address // _UNIT, nbytes // _UNIT)
    if (entries & np.uint64(_SWAPPED)).any() or not (entries & np.uint64(_PRESENT)).all():
        raise BadBuffer(
            "a page is not in memory: it was not faulted in, or taken out of the file meanwhile",
            operation="translate",
            target=f"{nbytes:#x} bytes at {address:#x}",
        )
    frames = entries & np.uint64(_FRAME)
    if not frames.all():
        raise hidden()
    by_page = frames.reshape(-1, page // _UNIT)
    first = by_page[:, 0]
    if (by_page - first[:, None] != np.arange(page // _UNIT, dtype=np.uint64)).any():
        raise BadBuffer(
            f"the memory does not consist of pages of {page:#x} bytes",
            operation="translate",
            target=f"{nbytes:#x} bytes at {address:#x}",
        )
    return first * np.uint64(_UNIT)


def hidden() -> HoldfastError:
    """The error for a kernel that shows no frame numbers to this process."""
    return NoPermission(
        "the kernel hides physical addresses from this process (frame number 0)",
        operation="translate",
        target="/proc/self/pagemap",
        hint=_FIX,
    )


def _entries(first: int, count: int) -> npt.NDArray[np.uint64]:
    """``count`` entries from page number ``first``."""
    found = np.empty(count, np.dtype("<u8"))
    room = found.view(np.uint8).data
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(room):
                piece = room[done : done + _AT_ONCE]
                got = os.preadv(fd, [piece], first * _ENTRY + done)
                if not got:
                    raise SystemFailure(
                        f"{done} of {len(room)} bytes",
                        operation="read",
                        target="/proc/self/pagemap",
                    )
                done += got
        finally:
            os.close(fd)
    except PermissionError as error:
        # The file itself is closed to a process that is not dumpable (fs/proc/base.c).
        raise hidden() from error
    except OSError as error:
        raise failure(error, "read", "/proc/self/pagemap") from error
    return found
