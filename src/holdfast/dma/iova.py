# SPDX-License-Identifier: Apache-2.0
"""I/O virtual addresses: handed out rising, so that a stale one stays meaningless for long.

Facts. A device that was not proven quiet may still write to an IOVA after its unmap. Such a write
faults while nothing is mapped there, but lands in whatever is mapped at the same IOVA next.

Consequence. An IOVA should come back as late as possible, and one of a lease that ended without
proof of quiet not at all.

Choice. A cursor walks up through the free ranges of one *round*. A range given back joins the next
round, however far ahead of the cursor it lies; only when nothing above the cursor is large enough
does a new round start, with all free ranges coalesced. *Retired* ranges are in no round until they
are reinstated. One granule stays free behind each range, so that an overrun meets no neighbour.

A successor *claims* what its predecessor had handed out, before it takes anything. It cannot know
how far the other cursor was in its round, so its own starts above everything claimed; what is free
below joins the next round.

Cost. What the cursor has passed over is unused until the next round. Within a round the first range
that is large enough is found in a tree of maxima, O(log n); starting a round is O(n log n), and
happens at most once for each range given back.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from holdfast.errors import IovaExhausted, UsageError
from holdfast.values import Iova


class _Round:
    """Free ranges in address order, taken from the bottom up. Never revisits what it passed.

    ``_tree`` holds at each inner node the larger of its two children, leaves at ``_leaves``.
    """

    __slots__ = ("_at", "_leaves", "_starts", "_tree")

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self._starts = [start for start, _ in ranges]
        self._leaves = 1 << max(len(ranges) - 1, 0).bit_length()
        self._tree = [0] * (2 * self._leaves)
        self._at = 0
        for index, (start, end) in enumerate(ranges):
            self._tree[self._leaves + index] = end - start
        for node in range(self._leaves - 1, 0, -1):
            self._tree[node] = max(self._tree[2 * node], self._tree[2 * node + 1])

    def largest(self) -> int:
        """Bytes in the largest range of the whole round, passed ones included."""
        return self._tree[1]

    def take(self, size: int) -> int | None:
        """The start of the first ``size`` bytes at or above the cursor, or None."""
        index = self._first(size)
        if index is None:
            return None
        self._at = index
        start = self._starts[index]
        self._starts[index] += size
        node = self._leaves + index
        self._tree[node] -= size
        while node := node >> 1:
            self._tree[node] = max(self._tree[2 * node], self._tree[2 * node + 1])
        return start

    def _first(self, size: int) -> int | None:
        """Index of the first range with ``size`` bytes, not below the cursor."""
        node = self._leaves + self._at
        # Up, until a subtree to the right (or the leaf itself) has room; then down, leftmost.
        while self._tree[node] < size:
            while node & 1:
                node >>= 1
            if not node:
                return None
            node += 1
        while node < self._leaves:
            node *= 2
            if self._tree[node] < size:
                node += 1
        return node - self._leaves

    def remaining(self) -> list[tuple[int, int]]:
        """Every range that is not used up, in address order, passed ones included."""
        sizes = self._tree[self._leaves : self._leaves + len(self._starts)]
        return [
            (start, start + size) for start, size in zip(self._starts, sizes, strict=True) if size
        ]


@dataclass(slots=True)
class _Taken:
    """A range out of the rounds: its size without the guard, and whether it is retired."""

    size: int
    retired: bool = False


class IovaSpace:
    """IOVAs from ``base`` up to, not including, ``limit``; all figures in bytes.

    Sizes are rounded up to ``granule``. Not thread-safe: its owner is the keeper's loop.
    """

    def __init__(self, base: int, limit: int, *, granule: int = 4096) -> None:
        if granule < 1 or base % granule or limit % granule or not 0 <= base < limit:
            raise UsageError(
                f"{base:#x}..{limit:#x} is no range of whole granules of {granule:#x}",
                operation="make IOVA space",
            )
        self.base = base
        self.limit = limit
        self.granule = granule
        self.in_use = 0
        """Bytes taken and neither given back nor retired; guards not counted."""
        self.retired = 0
        """Bytes that are retired; guards not counted."""
        # The guard of the topmost range may lie behind the limit.
        self._round = _Round([(base, limit + granule)])
        self._returned: list[tuple[int, int]] = []
        self._wrapped_largest: int | None = None
        """What the largest range of a new round would have, once a wrap was tried in vain."""
        self._taken: dict[int, _Taken] = {}
        self._claims: list[tuple[int, int]] | None = []
        """What was claimed, with guards, in address order; None once something was taken."""

    def claim(self, iova: int, size: int, *, retired: bool = False) -> None:
        """A range that a predecessor handed out (and retired): in use here from now on.

        In any order, but before the first :meth:`take`. UsageError, with nothing changed, if the
        range cannot have come from a space like this one, or overlaps one that was claimed, even
        if that was given back since.
        """
        start, rounded = int(iova), self._rounded(size)
        end = start + rounded + self.granule
        problem = ""
        if self._claims is None:
            problem = "something was taken already"
        elif size < 1 or start % self.granule or start < self.base:
            problem = "it cannot have been handed out"
        elif end > self.limit + self.granule:
            problem = "it ends behind the limit"
        else:
            place = bisect_left(self._claims, (start, end))
            before, behind = self._claims[:place][-1:], self._claims[place : place + 1]
            if (before and before[0][1] > start) or (behind and behind[0][0] < end):
                problem = "it overlaps another one"
        if problem or self._claims is None:
            raise UsageError(f"{size:#x} bytes at {start:#x}: {problem}", operation="claim IOVA")
        self._claims.insert(place, (start, end))
        self._taken[start] = _Taken(rounded, retired)
        if retired:
            self.retired += rounded
        else:
            self.in_use += rounded

    def take(self, size: int) -> Iova:
        """``size`` bytes above everything handed out in this round.

        Raises IovaExhausted with nothing changed.
        """
        if size < 1:
            raise UsageError(f"{size} bytes", operation="take IOVA")
        rounded = self._rounded(size)
        span = rounded + self.granule
        self._settle()
        start = self._round.take(span)
        if start is None:
            start = self._wrap(span)
        self._taken[start] = _Taken(rounded)
        self.in_use += rounded
        return Iova(start)

    def give_back(self, iova: int, size: int) -> None:
        """The function was proven quiet: the range may be used again in the next round."""
        taken = self._find(iova, size, retired=False, operation="give IOVA back")
        self.in_use -= taken.size
        self._return(iova)

    def retire(self, iova: int, size: int) -> None:
        """Never hand this range out again, unless it is reinstated."""
        taken = self._find(iova, size, retired=False, operation="retire IOVA")
        taken.retired = True
        self.in_use -= taken.size
        self.retired += taken.size

    def reinstate(self, iova: int, size: int) -> None:
        """The function has been proven quiet since: a retired range counts as given back."""
        taken = self._find(iova, size, retired=True, operation="reinstate IOVA")
        self.retired -= taken.size
        self._return(iova)

    def _settle(self) -> None:
        """Nothing is claimed any more: start above the claims, with what is free between them, and
        what was given back since, for the next round."""
        claims, self._claims = self._claims, None
        if not claims:
            return
        ends = [self.base] + [end for _, end in claims]
        starts = [start for start, _ in claims]
        self._returned += [gap for gap in zip(ends, starts, strict=False) if gap[0] < gap[1]]
        top = self.limit + self.granule
        self._round = _Round([(ends[-1], top)] if ends[-1] < top else [])

    def _rounded(self, size: int) -> int:
        return -(-size // self.granule) * self.granule

    def _find(self, iova: int, size: int, *, retired: bool, operation: str) -> _Taken:
        taken = self._taken.get(int(iova))
        if taken is None or taken.retired is not retired or taken.size != self._rounded(size):
            state = "retired" if retired else "in use"
            raise UsageError(
                f"{size:#x} bytes at {int(iova):#x} are not a range that is {state}",
                operation=operation,
            )
        return taken

    def _return(self, iova: int) -> None:
        taken = self._taken.pop(int(iova))
        self._wrapped_largest = None
        self._returned.append((int(iova), int(iova) + taken.size + self.granule))

    def _wrap(self, span: int) -> int:
        """Start a new round with everything free, unless that would not help either.

        A request that cannot be met leaves the cursor where it is: it must not bring forward the
        moment at which addresses come back.
        """
        if self._wrapped_largest is None or span <= self._wrapped_largest:
            fresh = _Round(_coalesced(self._round.remaining() + self._returned))
            start = fresh.take(span)
            if start is not None:
                self._round = fresh
                self._returned.clear()
                return start
            self._wrapped_largest = fresh.largest()
        largest = max(self._wrapped_largest - self.granule, 0)
        raise IovaExhausted(
            f"{span - self.granule:#x} bytes asked for; largest free range {largest:#x},"
            f" in use {self.in_use:#x}, retired {self.retired:#x},"
            f" of {self.limit - self.base:#x} in all",
            operation="take IOVA",
        )


def _coalesced(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, with neighbours joined."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
