# SPDX-License-Identifier: Apache-2.0
"""Buffers inside a slab: best fit, with neighbours joined when they come back."""

from __future__ import annotations

from bisect import bisect_left, insort

from holdfast.errors import UsageError


class Pool:
    """Cuts ``size`` bytes into pieces; offsets and sizes in bytes. Not thread-safe.

    Every piece starts at, and is rounded up to, a multiple of ``align`` (a power of two).
    """

    def __init__(self, size: int, *, align: int = 64) -> None:
        _require_power(align, "make pool")
        self.size = size - size % align
        self.align = align
        self.in_use = 0
        """Bytes taken, with their rounding."""
        self._taken: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        """End of each free piece to its offset."""
        self._offsets: dict[int, int] = {}
        """Offset of each free piece to its size."""
        self._by_size: list[tuple[int, int]] = []
        if self.size > 0:
            self._add(0, self.size)

    def take(self, nbytes: int, align: int) -> int | None:
        """The offset of ``nbytes`` free bytes at a multiple of ``align``; None if there are none.

        The smallest free piece that holds them is used, so that large ones stay whole.
        """
        _require_power(align, "take from pool")
        if nbytes < 1:
            raise UsageError(f"{nbytes} bytes", operation="take from pool")
        need = self._rounded(nbytes)
        step = max(align, self.align)
        # Only pieces smaller than need + step can fail for their alignment alone, so the walk is
        # short: it ends at the first piece of that size.
        for place in range(bisect_left(self._by_size, (need, 0)), len(self._by_size)):
            size, offset = self._by_size[place]
            start = -(-offset // step) * step
            if start + need <= offset + size:
                self._remove(offset)
                if start > offset:
                    self._add(offset, start - offset)
                if start + need < offset + size:
                    self._add(start + need, offset + size - start - need)
                self._taken[start] = need
                self.in_use += need
                return start
        return None

    def give_back(self, offset: int) -> None:
        """Free the piece that was taken at ``offset``. UsageError if there is none."""
        size = self._taken.pop(offset, None)
        if size is None:
            raise UsageError(f"nothing was taken at {offset:#x}", operation="give back to pool")
        self.in_use -= size
        end = offset + size
        before = self._ends.get(offset)
        if before is not None:
            self._remove(before)
            offset = before
        if end in self._offsets:
            end += self._remove(end)
        self._add(offset, end - offset)

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.align) * self.align

    def _add(self, offset: int, size: int) -> None:
        self._offsets[offset] = size
        self._ends[offset + size] = offset
        insort(self._by_size, (size, offset))

    def _remove(self, offset: int) -> int:
        size = self._offsets.pop(offset)
        del self._ends[offset + size]
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        return size


def _require_power(align: int, operation: str) -> None:
    if align < 1 or align & (align - 1):
        raise UsageError(f"alignment {align} is no power of two", operation=operation)
