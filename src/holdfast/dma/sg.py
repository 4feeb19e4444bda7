# SPDX-License-Identifier: Apache-2.0
"""Scatter-gather lists: where a buffer lies on the bus, as two arrays.

A fragmented gigabyte is a quarter of a million entries, so every operation is a few NumPy passes
and none is a Python loop. Addresses are unsigned 64-bit integers throughout: mixing them with
Python's signed ones would make floats of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from holdfast.errors import BadTransfer
from holdfast.values import Iova

U64s = npt.NDArray[np.uint64]

_ONE: Final = np.uint64(1)
_TOP: Final = np.uint64((1 << 64) - 1)


class SgList:
    """Pieces of bus memory in order. Immutable, so any thread may read it.

    ``iovas`` and ``lengths`` are read-only arrays in bytes, of equal size; no piece is empty or
    wraps round the end of the address space. ``nbytes`` is the sum of the lengths.
    """

    __slots__ = ("iovas", "lengths", "nbytes")

    iovas: U64s
    lengths: U64s
    nbytes: int

    def __init__(self, iovas: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Copy two arrays of equal length; raises BadTransfer if a piece is impossible."""
        starts, sizes = np.array(iovas, np.uint64), np.array(lengths, np.uint64)
        if starts.ndim != 1 or starts.shape != sizes.shape:
            raise BadTransfer(f"shapes {starts.shape}, {sizes.shape}", operation="make SG list")
        if not sizes.all() or bool((sizes - _ONE > _TOP - starts).any()):
            raise BadTransfer("a piece is empty or wraps round", operation="make SG list")
        self._set(starts, sizes)

    def _set(self, iovas: U64s, lengths: U64s) -> None:
        iovas.flags.writeable = False
        lengths.flags.writeable = False
        self.iovas = iovas
        self.lengths = lengths
        self.nbytes = int(lengths.sum(dtype=np.uint64))

    @classmethod
    def _make(cls, iovas: U64s, lengths: U64s) -> Self:
        """Own two fresh arrays that are known to be right."""
        self = cls.__new__(cls)
        self._set(iovas, lengths)
        return self

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> Self:
        """From ``(iova, length)`` pairs in bytes."""
        pieces = list(pairs)
        return cls([int(iova) for iova, _ in pieces], [length for _, length in pieces])

    @classmethod
    def from_pages(
        cls, page_iovas: npt.ArrayLike, page_size: int, first_offset: int, nbytes: int
    ) -> Self:
        """``nbytes`` bytes from ``first_offset`` of the first page on, adjacent pages joined.

        ``page_iovas`` are the addresses of the pages, in the order of the memory they back; pages
        behind the last byte are ignored.
        """
        pages = np.asarray(page_iovas, np.uint64)
        count = -(-(first_offset + nbytes) // page_size) if nbytes else 0
        if not (0 <= first_offset < page_size and nbytes >= 0 and count <= pages.size):
            raise BadTransfer(
                f"{nbytes} bytes from {first_offset} on do not lie in {pages.size} pages"
                f" of {page_size}",
                operation="make SG list",
            )
        if not count:
            return cls._make(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        if int(pages[:count].max()) > (1 << 64) - page_size:
            raise BadTransfer("a page wraps round", operation="make SG list")
        breaks = pages[1:count] - pages[: count - 1] != np.uint64(page_size)
        starts = _run_starts(breaks)
        iovas = pages[starts]
        lengths = np.diff(starts, append=count).astype(np.uint64) * np.uint64(page_size)
        iovas[0] += np.uint64(first_offset)
        lengths[0] -= np.uint64(first_offset)
        lengths[-1] -= np.uint64(count * page_size - first_offset - nbytes)
        return cls._make(iovas, lengths)

    @classmethod
    def concat(cls, lists: Sequence[SgList]) -> Self:
        """The pieces of several lists behind each other; nothing is joined."""
        none = np.zeros(0, np.uint64)
        return cls._make(
            np.concatenate([none, *(each.iovas for each in lists)]),
            np.concatenate([none, *(each.lengths for each in lists)]),
        )

    def coalesce(self) -> SgList:
        """The same memory in the same order with adjacent pieces joined."""
        if len(self) < 2:
            return self
        starts = _run_starts(self.iovas[:-1] + self.lengths[:-1] != self.iovas[1:])
        return SgList._make(self.iovas[starts], np.add.reduceat(self.lengths, starts))

    def slice(self, offset: int, nbytes: int) -> SgList:
        """``nbytes`` bytes from ``offset`` on; raises BadTransfer if they are not all inside."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise BadTransfer(
                f"{nbytes} bytes at {offset} of {self.nbytes}", operation="slice SG list"
            )
        if not nbytes:
            return SgList._make(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        ends = np.cumsum(self.lengths, dtype=np.uint64)
        first = int(np.searchsorted(ends, np.uint64(offset), "right"))
        last = int(np.searchsorted(ends, np.uint64(offset + nbytes), "left"))
        iovas = self.iovas[first : last + 1].copy()
        lengths = self.lengths[first : last + 1].copy()
        # Last piece first: where it is also the first one, both ends are cut.
        lengths[-1] -= np.uint64(int(ends[last]) - offset - nbytes)
        skipped = np.uint64(offset - (int(ends[first]) - int(self.lengths[first])))
        iovas[0] += skipped
        lengths[0] -= skipped
        return SgList._make(iovas, lengths)

    def split(self, max_length: int, boundary: int | None = None) -> SgList:
        """Pieces of at most ``max_length`` bytes, none across a multiple of ``boundary``.

        Cuts as late as possible, so a piece that is longer than both limits is first cut at each
        boundary.
        """
        if max_length < 1 or (boundary is not None and boundary < 1):
            raise BadTransfer(f"pieces of {max_length} bytes", operation="split SG list")
        whole = self if boundary is None else self._split_at(boundary)
        limit = np.uint64(min(max_length, int(_TOP)))
        if not len(whole) or whole.lengths.max() <= limit:
            return whole
        counts = (whole.lengths - _ONE) // limit + _ONE
        origin, number = _repeated(counts)
        done = number * limit
        return SgList._make(
            whole.iovas[origin] + done, np.minimum(whole.lengths[origin] - done, limit)
        )

    def _split_at(self, boundary: int) -> SgList:
        if boundary > int(_TOP) or not len(self):
            return self
        step = np.uint64(boundary)
        last = self.iovas + (self.lengths - _ONE)
        origin, number = _repeated(last // step - self.iovas // step + _ONE)
        cell = (self.iovas[origin] // step + number) * step
        starts = np.maximum(self.iovas[origin], cell)
        # The last byte of a cell, not the first one behind it: that could be 2**64.
        ends = np.minimum(last[origin], cell + (np.minimum(step - _ONE, _TOP - cell)))
        return SgList._make(starts, ends - starts + _ONE)

    def __len__(self) -> int:
        """How many pieces."""
        return len(self.iovas)

    def __iter__(self) -> Iterator[tuple[Iova, int]]:
        """``(iova, length)`` of each piece."""
        for iova, length in zip(self.iovas.tolist(), self.lengths.tolist(), strict=True):
            yield Iova(iova), length

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SgList):
            return NotImplemented
        return np.array_equal(self.iovas, other.iovas) and np.array_equal(
            self.lengths, other.lengths
        )

    def __hash__(self) -> int:
        return hash((self.iovas.tobytes(), self.lengths.tobytes()))

    def __repr__(self) -> str:
        head = ", ".join(
            f"{iova:#x}+{length:#x}"
            for iova, length in zip(self.iovas[:4].tolist(), self.lengths[:4].tolist(), strict=True)
        )
        more = ", ..." if len(self) > 4 else ""
        return f"<SgList {self.nbytes} bytes in {len(self)}: {head}{more}>"


def _run_starts(breaks: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Indices at which a run begins; ``breaks[i]`` says that i + 1 does not continue i."""
    found = np.flatnonzero(breaks)
    starts = np.zeros(len(found) + 1, np.intp)
    np.add(found, 1, out=starts[1:])
    return starts


def _repeated(counts: U64s) -> tuple[npt.NDArray[np.intp], U64s]:
    """Each index as often as ``counts`` says, and which repetition it is."""
    signed = counts.astype(np.intp)
    origin = np.repeat(np.arange(len(signed)), signed)
    first = np.cumsum(signed) - signed
    return origin, (np.arange(len(origin)) - first[origin]).astype(np.uint64)
