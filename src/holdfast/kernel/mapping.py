# SPDX-License-Identifier: Apache-2.0
"""Shared file mappings that live exactly as long as anything looks at them.

Facts. ``mmap.mmap`` maps one extent, and refuses to close while a view exists or, worse, is closed
under one by hand. Memory that a card writes may be scattered over a file, while NumPy wants it in
one piece. A device register must be accessed once, with its width.

Consequence. Whether memory is still mapped must follow from who can still touch it, and nothing
else; extents must be mapped behind each other; single accesses must not go through slices.

Choice. The mapping is made with libc and owned by a :class:`Span`, which every array over it has at
the end of its ``base`` chain. The kernel unmaps when the last view is collected. ``load`` and
``store`` go through casts of one memoryview, prepared once: CPython moves such an item with a
single load or store of its width on x86-64.

Cost. ``close()`` cannot force memory out of the address space: it only lets this object's
reference go.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Sequence
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from holdfast.errors import BadAccess, BadBuffer, Closed
from holdfast.kernel import libc
from holdfast.kernel.failure import failure

PAGE: Final = 4096
_HUGETLBFS_MAGIC: Final = 0x958458F6
"""linux/magic.h"""
_REACH: Final = 1 << 47
"""User addresses of x86-64 end here; no mapping can be larger."""


_DETACH: Final = 4 << 20
"""Bytes copied at a time when a mapping is detached; a multiple of the page."""


class Span:
    """``size`` bytes at ``address``, for NumPy to look at (``__array_interface__``).

    Every array made from it keeps it alive, through all slices, reshapes and memoryviews: so a
    finalizer on a Span runs when nobody can touch the bytes through it any more. ``keep`` is what
    has to live as long as the span.
    """

    __slots__ = ("__weakref__", "address", "keep", "size", "writable")

    def __init__(self, address: int, size: int, *, writable: bool = True, keep: Any = None) -> None:
        self.address = address
        self.size = size
        self.writable = writable
        self.keep = keep

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self.address, not self.writable),
        }


class Mapping:
    """A file mapped ``MAP_SHARED``. Keeps no duplicate of the descriptor.

    Loads, stores and array access may come from any thread; ``close`` makes later ones raise
    Closed. In a forked child a mapping with ``dont_fork`` is not there: only ``close`` it.

    Raises BadBuffer if an extent is misaligned or lies outside a regular file (touching it would be
    a SIGBUS), OutOfMemory or SystemFailure if the kernel refuses; nothing is mapped then.
    """

    __slots__ = ("_array", "_words", "address", "size")

    def __init__(
        self,
        fd: int,
        size: int,
        *,
        offset: int = 0,
        writable: bool = True,
        dont_fork: bool = False,
    ) -> None:
        self._map(fd, [(offset, size)], writable, dont_fork)

    @classmethod
    def extents(
        cls,
        fd: int,
        extents: Sequence[tuple[int, int]],
        *,
        writable: bool = True,
        dont_fork: bool = False,
    ) -> Self:
        """Map ``(offset, size)`` pieces of one file behind each other, in one address range.

        Offsets, and sizes of all but the last piece, are multiples of 4096.
        """
        self = cls.__new__(cls)
        self._map(fd, extents, writable, dont_fork)
        return self

    def _map(
        self, fd: int, extents: Sequence[tuple[int, int]], writable: bool, dont_fork: bool
    ) -> None:
        size = _check(fd, extents)
        address = _reserve_and_map(fd, extents, size, writable, dont_fork)
        span = Span(address, size, writable=writable)
        owner = os.getpid() if dont_fork else None
        # Not at exit: other threads may still look at the memory then.
        weakref.finalize(span, _unmap, address, size, owner).atexit = False
        self.address = address
        self.size = size
        self._array: npt.NDArray[np.uint8] | None = np.asarray(span)
        raw = self._array.data
        self._words: dict[int, memoryview[int]] = {
            1: raw,
            2: raw[: size & ~1].cast("H"),
            4: raw[: size & ~3].cast("I"),
            8: raw[: size & ~7].cast("Q"),
        }

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """All bytes as one array; it keeps the memory mapped."""
        if self._array is None:
            raise Closed("the mapping was closed", operation="map")
        return self._array

    def load(self, offset: int, width: int) -> int:
        """One load of ``width`` bytes (1, 2, 4, 8) at a naturally aligned ``offset`` in bytes."""
        index, rest = divmod(offset, width)
        try:
            if rest or index < 0:
                raise self._refused("load", offset, width)
            return self._words[width][index]
        except (KeyError, IndexError):
            raise self._refused("load", offset, width) from None

    def store(self, offset: int, width: int, value: int) -> None:
        """One store of ``value`` in ``width`` bytes at a naturally aligned ``offset`` in bytes."""
        index, rest = divmod(offset, width)
        try:
            if rest or index < 0:
                raise self._refused("store", offset, width)
            self._words[width][index] = value
        except (KeyError, IndexError):
            raise self._refused("store", offset, width) from None
        except (ValueError, TypeError) as error:  # does not fit, or the mapping is read-only
            raise BadAccess(f"{value:#x}: {error}", operation="store") from error

    def _refused(self, operation: str, offset: int, width: int) -> BadAccess | Closed:
        if self._array is None:
            return Closed("the mapping was closed", operation=operation)
        return BadAccess(
            f"{width} bytes at {offset:#x} of {self.size:#x}: outside, misaligned, or no width"
            " of 1, 2, 4 or 8",
            operation=operation,
        )

    def detach(self) -> None:
        """Put private memory with the same contents in the place of the file.

        Views stay where they are, and what they show stays as it is, whatever becomes of the file.
        What other threads write meanwhile may be lost. Raises OutOfMemory or SystemFailure; the
        rest then still is the file.
        """
        whole = self.array
        protection = libc.PROT_READ | libc.PROT_WRITE
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
        try:
            for at in range(0, self.size, _DETACH):
                size = min(_DETACH, self.size - at)
                fresh = libc.mmap(None, size, protection, flags, -1, 0)
                np.asarray(Span(fresh, size))[:] = whole[at : at + size]
                libc.move(fresh, size, self.address + at)
        except OSError as error:
            raise failure(error, "detach", "mapping") from error

    def revoke(self) -> None:
        """Take the file out of the address space, also from under views. Idempotent.

        Views stay valid; they read zeros and what is written to them is nobody's. Nothing in this
        process reaches the file through this mapping any more. Raises OutOfMemory or
        SystemFailure: then it still does.
        """
        if self._array is None:
            return
        protection = libc.PROT_READ | libc.PROT_WRITE
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE | libc.MAP_FIXED
        try:
            libc.mmap(self.address, self.size, protection, flags, -1, 0)
        except OSError as error:
            raise failure(error, "revoke", "mapping") from error

    def close(self) -> None:
        """Let this object's reference go; what views look at stays mapped. Idempotent."""
        self._words = {}
        self._array = None


class Window:
    """A piece of a file mapped ``MAP_SHARED``, for those who hold thousands and seldom look.

    A :class:`Mapping` has views of every width ready, which takes a page of Python objects; here
    they are made when they are asked for. Keeps no duplicate of the descriptor; unmapped when the
    last reference goes, views included. Raises like Mapping. Thread-safe.
    """

    __slots__ = ("_address", "_size", "_writable")

    def __init__(self, fd: int, size: int, *, offset: int = 0, writable: bool = True) -> None:
        self._size = 0
        extent = [(offset, size)]
        _check(fd, extent)
        self._address = _reserve_and_map(fd, extent, size, writable, dont_fork=False)
        self._size = size
        self._writable = writable

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """All bytes; the array and its views keep them mapped."""
        return np.asarray(Span(self._address, self._size, writable=self._writable, keep=self))

    def __del__(self) -> None:
        if self._size:
            libc.munmap(self._address, self._size)


def _check(fd: int, extents: Sequence[tuple[int, int]]) -> int:
    """The size of all extents together, after checking each."""
    try:
        status, page = os.fstat(fd), _page(fd)
    except OSError as error:
        raise failure(error, "map", f"descriptor {fd}") from error
    # Device descriptors have no size of their own.
    end = status.st_size if stat.S_ISREG(status.st_mode) else _REACH
    total = 0
    for number, (offset, size) in enumerate(extents):
        # munmap(2) takes huge pages only whole, so the last extent has to be of whole ones, too.
        whole = number < len(extents) - 1 or page > PAGE
        if offset < 0 or size < 1 or offset % page or (whole and size % page):
            raise BadBuffer(f"extent {offset:#x}+{size:#x} is misaligned or empty", operation="map")
        if offset + size > end:
            raise BadBuffer(
                f"extent {offset:#x}+{size:#x} ends behind the file's {end:#x} bytes",
                operation="map",
            )
        total += size
    if not 0 < total <= _REACH:
        raise BadBuffer(f"{total} bytes cannot be mapped", operation="map")
    return total


def _reserve_and_map(
    fd: int, extents: Sequence[tuple[int, int]], size: int, writable: bool, dont_fork: bool
) -> int:
    protection = libc.PROT_READ | (libc.PROT_WRITE if writable else 0)
    try:
        base = _reserve(size, _page(fd))
        try:
            at = base
            for offset, length in extents:
                # Replaces a part of our own reservation, so nothing else can be hit.
                libc.mmap(at, length, protection, libc.MAP_SHARED | libc.MAP_FIXED, fd, offset)
                at += length
            if dont_fork:
                libc.madvise(base, size, libc.MADV_DONTFORK)
        except BaseException:
            libc.munmap(base, size)
            raise
    except OSError as error:
        raise failure(error, "map", f"descriptor {fd}") from error
    return base


def _page(fd: int) -> int:
    """Bytes in the pages that a mapping of ``fd`` is made of: more than 4096 on hugetlbfs."""
    if libc.filesystem_magic(fd) != _HUGETLBFS_MAGIC:
        return PAGE
    return os.fstat(fd).st_blksize


def _reserve(size: int, page: int) -> int:
    """A range of addresses that is a multiple of ``page``, for nothing else to be put there."""
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
    if page == PAGE:
        return libc.mmap(None, size, libc.PROT_NONE, flags, -1, 0)
    found = libc.mmap(None, size + page, libc.PROT_NONE, flags, -1, 0)
    base = -(-found // page) * page
    if base > found:
        libc.munmap(found, base - found)
    libc.munmap(base + size, found + page - base)
    return base


def _unmap(address: int, size: int, owner: int | None) -> None:
    """Finalizer. ``owner`` is the only process that has the mapping, if it was not forked.

    In a child such a range is not ours: by now it may be somebody's heap.
    """
    if owner is None or owner == os.getpid():
        libc.munmap(address, size)
