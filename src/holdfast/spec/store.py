# SPDX-License-Identifier: Apache-2.0
"""The set of states seen so far: an exact hash table over packed states, many at a time.

Open addressing with linear probing. All states of a batch probe at once; of several that want the
same free place the first wins, and the others look again. States are compared in full, so two
that differ are never taken for one.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from holdfast.spec.layout import U64

_SMALLEST: Final = 1 << 12
_MULTIPLIERS: Final = (0x9E37_79B9_7F4A_7C15, 0xC2B2_AE3D_27D4_EB4F, 0x1656_67B1_9E37_79F9)

Ids = npt.NDArray[np.int32]


class Store:
    """States by number, in the order in which they were added. Not thread-safe."""

    def __init__(self, words: int) -> None:
        self.count = 0
        self._words = [np.empty(_SMALLEST, np.uint64) for _ in range(words)]
        self._table = np.zeros(2 * _SMALLEST, np.int32)  # number + 1; 0: free

    def __len__(self) -> int:
        return self.count

    def words(self, first: int = 0, last: int | None = None) -> list[U64]:
        """The states with numbers from ``first`` up to ``last``; views."""
        end = self.count if last is None else last
        return [word[first:end] for word in self._words]

    def add(self, words: list[U64]) -> tuple[Ids, npt.NDArray[np.intp]]:
        """Numbers of these states, and the rows of those that were new, in ascending order."""
        total = len(words[0])
        self._reserve(total)
        numbers = np.empty(total, np.int32)
        fresh: list[npt.NDArray[np.intp]] = []
        mask = np.uint64(len(self._table) - 1)
        place = (_hashed(words) & mask).astype(np.intp)
        pending = np.arange(total)
        while len(pending):
            here = place[pending]
            free = self._table[here] == 0
            if free.any():
                fresh.append(self._claim(words, here[free], pending[free]))
            found = self._table[here] - 1
            same = np.ones(len(pending), np.bool_)
            for mine, theirs in zip(words, self._words, strict=True):
                same &= mine[pending] == theirs[found]
            numbers[pending[same]] = found[same]
            pending = pending[~same]
            place[pending] = (place[pending] + 1) & int(mask)
        new = np.sort(np.concatenate(fresh)) if fresh else np.empty(0, np.intp)
        return self._in_order(numbers, new), new

    def _claim(
        self, words: list[U64], places: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.intp]:
        """Give each free place to the first row that wants it; the rows that got one."""
        backwards = slice(None, None, -1)  # of several writes to one place the last one stays
        self._table[places[backwards]] = -1 - rows[backwards]
        winners = self._table[places] == -1 - rows
        rows, places = rows[winners], places[winners]
        numbers = np.arange(self.count, self.count + len(rows), dtype=np.int32)
        self._table[places] = numbers + 1
        for word, mine in zip(self._words, words, strict=True):
            word[numbers] = mine[rows]
        self.count += len(rows)
        return rows

    def _in_order(self, numbers: Ids, new: npt.NDArray[np.intp]) -> Ids:
        """Number the states that were just added in the order of their rows.

        They were numbered in the order of probing, which would make parents depend on it.
        """
        first = self.count - len(new)
        if not len(new):
            return numbers
        rank = np.empty(len(new), np.int32)
        rank[numbers[new] - first] = np.arange(len(new), dtype=np.int32)
        if (rank == np.arange(len(new))).all():
            return numbers
        for word in self._words:
            word[first + rank] = word[first : self.count].copy()
        recent = self._table > first
        self._table[recent] = first + 1 + rank[self._table[recent] - 1 - first]
        late = numbers >= first
        numbers[late] = first + rank[numbers[late] - first]
        return numbers

    def _reserve(self, more: int) -> None:
        room = len(self._words[0])
        while room < self.count + more:
            room *= 2
        if room > len(self._words[0]):
            self._words = [
                np.concatenate([word, np.empty(room - len(word), np.uint64)])
                for word in self._words
            ]
        if 2 * (self.count + more) > len(self._table):
            self._rebuild(2 * room)

    def _rebuild(self, size: int) -> None:
        self._table = np.zeros(size, np.int32)
        place = (_hashed(self.words()) & np.uint64(size - 1)).astype(np.intp)
        pending = np.arange(self.count)
        while len(pending):
            here = place[pending]
            free = self._table[here] == 0
            self._table[here[free]] = pending[free] + 1
            pending = pending[self._table[here] != pending + 1]
            place[pending] = (place[pending] + 1) & (size - 1)


def _hashed(words: list[U64]) -> U64:
    mixed = np.zeros_like(words[0])
    for word, factor in zip(words, _MULTIPLIERS, strict=False):
        mixed = (mixed ^ word) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(_MULTIPLIERS[0])
    return mixed ^ mixed >> np.uint64(32)
