# SPDX-License-Identifier: Apache-2.0
"""The memory that a vfio-user server may reach by message: a checked table of windows.

A server may send DMA_READ and DMA_WRITE for any window, also one that it got a descriptor for
(vfio-user specification, "DMA_READ"). Every access is checked against one window and its
permission before a byte moves.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from holdfast.contracts import HostMemory
from holdfast.errors import HoldfastError
from holdfast.kernel import memfd
from holdfast.kernel.mapping import PAGE, Window
from holdfast.values import Perm


class FileMemory:
    """A window's own mapping of a sealed file, for servers that prefer messages."""

    __slots__ = ("_window",)

    def __init__(self, window: Window) -> None:
        self._window = window

    def read(self, offset: int, count: int) -> bytes:
        return self._window.array[offset : offset + count].tobytes()

    def write(self, offset: int, data: memoryview) -> None:
        self._window.array.data[offset : offset + len(data)] = data


def of_file(fd: int, offset: int, size: int, perm: Perm) -> HostMemory | None:
    """Map a window of a sealed file; None if messages cannot be served from it.

    Keeps no duplicate of ``fd``. A file that could shrink is not mapped: whoever shrank it would
    kill this process with SIGBUS. Servers reach such a window through its descriptor only.
    """
    if offset % PAGE:
        return None
    try:
        memfd.require_sealed(fd, offset + size)
        return FileMemory(Window(fd, size, offset=offset, writable=bool(perm & Perm.WRITE)))
    except HoldfastError:
        return None


@dataclass(frozen=True, slots=True)
class Served:
    """One window. ``memory`` None: known, but not to be served by message."""

    iova: int
    size: int
    perm: Perm
    memory: HostMemory | None


class ServedMemory:
    """All windows of one backend. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._windows: list[Served] = []

    def add(self, window: Served) -> None:
        """Serve a window. ``OSError`` EEXIST if it overlaps another one."""
        with self._lock:
            place = bisect_left(self._starts, window.iova + window.size)
            if place:
                before = self._windows[place - 1]
                if before.iova + before.size > window.iova:
                    raise OSError(errno.EEXIST, "the window overlaps another one")
            self._starts.insert(place, window.iova)
            self._windows.insert(place, window)

    def remove(self, iova: int) -> None:
        """Stop serving the window that starts at ``iova``, if there is one."""
        with self._lock:
            place = bisect_left(self._starts, iova)
            if place < len(self._starts) and self._starts[place] == iova:
                del self._starts[place], self._windows[place]

    def clear(self) -> None:
        """Stop serving everything."""
        with self._lock:
            self._starts.clear()
            self._windows.clear()

    def read(self, iova: int, count: int) -> bytes:
        """Bytes for the function; ``OSError`` EFAULT or EPERM if it may not have them."""
        memory, offset = self._find(iova, count, Perm.READ)
        data = memory.read(offset, count)
        if len(data) != count:
            raise OSError(errno.EIO, f"the memory gave {len(data)} bytes for {count}")
        return data

    def write(self, iova: int, data: memoryview) -> None:
        """Bytes from the function; errors as for :meth:`read`, nothing is written then."""
        memory, offset = self._find(iova, len(data), Perm.WRITE)
        memory.write(offset, data)

    def _find(self, iova: int, count: int, need: Perm) -> tuple[HostMemory, int]:
        with self._lock:
            place = bisect_right(self._starts, iova) - 1
            window = self._windows[place] if place >= 0 else None
        if window is None or iova + count > window.iova + window.size:
            raise OSError(errno.EFAULT, f"{count} bytes at {iova:#x} are not mapped")
        if not window.perm & need:
            raise OSError(errno.EPERM, f"{iova:#x} is not mapped for this direction")
        if window.memory is None:
            raise OSError(errno.EFAULT, f"{iova:#x} can only be reached through its descriptor")
        return window.memory, iova - window.iova
