# SPDX-License-Identifier: Apache-2.0
"""The window table as arrays: which window an address belongs to, for ten thousand at once."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from holdfast.emu.port import Bytes, U64s
from holdfast.emu.windows_copy import Addresses, copy_in_order, copy_list
from holdfast.emu.windows_open import Direct, Memory
from holdfast.kernel.mapping import Span
from holdfast.values import Perm

Places: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class Window:
    """One mapping. ``memory`` None: by message. ``gone`` once it was unmapped."""

    iova: int
    size: int
    perm: Perm
    memory: Memory | None
    gone: bool = False

    @property
    def end(self) -> int:
        return self.iova + self.size

    def close(self) -> None:
        """Give the memory back. Nothing may be using it."""
        memory, self.memory = self.memory, None
        if memory is not None:
            memory.close()


@dataclass(frozen=True, slots=True)
class Entries:
    """A scatter-gather list: ``lengths[i]`` bytes at ``iovas[i]`` and at ``local[offsets[i]]``."""

    iovas: U64s
    local: Bytes
    offsets: U64s
    lengths: U64s

    def __len__(self) -> int:
        return len(self.iovas)

    def run(self, start: int, stop: int) -> Entries:
        """Entries ``start`` to ``stop``."""
        part = slice(start, stop)
        return Entries(self.iovas[part], self.local, self.offsets[part], self.lengths[part])

    def joined(self) -> tuple[int, int, int] | None:
        """IOVA, local offset and length, if the entries continue each other on both sides.

        Only for entries that are :meth:`inside`.
        """
        iovas, offsets, lengths = self.iovas, self.offsets, self.lengths
        first, begin = int(iovas[0]), int(offsets[0])
        if len(iovas) == 1:
            return first, begin, int(lengths[0])
        if int(iovas[1]) != first + int(lengths[0]):  # most lists end here
            return None
        steps = lengths[:-1]
        if (iovas[1:] - iovas[:-1] != steps).any() or (offsets[1:] - offsets[:-1] != steps).any():
            return None
        # IOVAs may have wrapped around at 2**64; local offsets cannot.
        return first, begin, int(offsets[-1]) + int(lengths[-1]) - begin

    def inside(self) -> bool:
        """True if every entry lies inside the local memory."""
        if not len(self) or int(self.offsets.max()) + int(self.lengths.max()) <= self.local.size:
            return True
        room = np.uint64(self.local.size)
        over = (self.offsets > room) | (self.lengths > room - np.minimum(self.offsets, room))
        return not over.any()


class Table:
    """A snapshot of all windows, in IOVA order; ``starts`` are their addresses.

    Windows come and go with every client of the function, and most accesses need no more than a
    search in the list. The arrays, which look at each window, are made for the first list of
    entries that lies in several.
    """

    def __init__(self, windows: list[Window], starts: list[int]) -> None:
        self.windows = windows
        self._places = starts

    @cached_property
    def _starts(self) -> U64s:
        return np.array(self._places, np.uint64)

    @cached_property
    def _lasts(self) -> U64s:
        """Inclusive: 2**64 does not fit."""
        return np.array([window.end - 1 for window in self.windows], np.uint64)

    @cached_property
    def _allows(self) -> dict[Perm, Flags]:
        perms = np.array([window.perm for window in self.windows], np.uint8)
        return {perm: (perms & perm) != 0 for perm in (Perm.READ, Perm.WRITE)}

    @cached_property
    def _memories(self) -> list[Direct | None]:
        return [w.memory if isinstance(w.memory, Direct) else None for w in self.windows]

    @cached_property
    def _direct(self) -> Flags:
        return np.array([memory is not None for memory in self._memories], bool)

    @cached_property
    def _deltas(self) -> U64s:
        """Address minus IOVA, modulo 2**64: one wrapping addition turns an IOVA into an address."""
        deltas = [
            (memory.address - window.iova) % (1 << 64) if memory else 0
            for window, memory in zip(self.windows, self._memories, strict=True)
        ]
        return np.array(deltas, np.uint64)

    @cached_property
    def _aliased(self) -> bool:
        """True if one byte of a file is reachable through two direct windows."""
        spans = sorted(memory.span for memory in self._memories if memory is not None)
        return any(one[:2] == two[:2] and two[2] < one[3] for one, two in pairwise(spans))

    def find(self, iova: int) -> Window | None:
        """The window that holds this address."""
        place = bisect_right(self._places, iova) - 1
        window = self.windows[place] if place >= 0 else None
        return window if window is not None and iova < window.end else None

    def mapped(self, iova: int, size: int, need: Perm) -> Window | None:
        """The mapped window that wholly holds a permitted access, if there is one."""
        window = self.find(iova)
        if window is None or not size or iova + size > window.end or not window.perm & need:
            return None
        return window if isinstance(window.memory, Direct) else None

    def mapped_list(self, entries: Entries, need: Perm) -> Window | None:
        """The mapped window that holds a permitted list without empty entries, if there is one."""
        window = self.mapped(int(entries.iovas[0]), 1, need)
        if window is None:
            return None
        places = entries.iovas - np.uint64(window.iova)  # wraps below the window
        room = window.size - int(places.max())
        if room < int(entries.lengths.max()) and not (
            room > 0 and (entries.lengths <= np.uint64(window.size) - places).all()
        ):
            return None
        return window if entries.lengths.all() else None

    def resolve(self, entries: Entries, need: Perm) -> tuple[Places, Flags]:
        """Window index of each entry, and which entries lie wholly inside one mapped window.

        The others may still be good: empty, across windows, in a file or by message.
        """
        if not self.windows:
            return np.zeros(len(entries), np.int64), np.zeros(len(entries), bool)
        places = np.searchsorted(self._starts, entries.iovas, side="right") - 1
        lasts = entries.iovas + entries.lengths - np.uint64(1)  # wraps if empty or beyond 2**64
        known = np.maximum(places, 0)
        plain = (
            (places >= 0)
            & (lasts >= entries.iovas)
            & (lasts <= self._lasts[known])
            & self._direct[known]
            & self._allows[need][known]
        )
        return known, plain

    def used(self, places: Places) -> frozenset[Window]:
        """The windows behind these indexes."""
        hits = np.flatnonzero(np.bincount(places, minlength=len(self.windows)))
        return frozenset(self.windows[place] for place in hits.tolist())

    def copy_within(self, window: Window, entries: Entries, need: Perm) -> None:
        """Carry out entries that :meth:`mapped_list` found in this window."""
        assert isinstance(window.memory, Direct)
        places: Addresses = (entries.iovas - np.uint64(window.iova)).view(np.int64)
        self._copy(entries, window.memory.bytes, places, need)

    def copy(self, entries: Entries, places: Places, need: Perm) -> None:
        """Carry out entries that :meth:`resolve` called plain."""
        remote: Addresses = (entries.iovas + self._deltas[places]).view(np.int64)
        first = int(remote.min())
        size = int((remote + entries.lengths.view(np.int64)).max()) - first
        span = Span(first, size, writable=need is Perm.WRITE)
        self._copy(entries, np.asarray(span), remote - first, need)

    def _copy(self, entries: Entries, far: Bytes, places: Addresses, need: Perm) -> None:
        near, counts = entries.offsets.view(np.int64), entries.lengths.view(np.int64)
        if need is Perm.READ:
            copy_list(entries.local, near, far, places, counts)
        elif self._aliased:  # one byte behind two addresses: overlaps cannot be seen from here
            copy_in_order(far, places, entries.local, near, counts)
        else:
            copy_list(far, places, entries.local, near, counts)
