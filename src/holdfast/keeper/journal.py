# SPDX-License-Identifier: Apache-2.0
"""What is mapped, written down before it is: reserve → journal → map → confirm.

Kernels and vfio-user servers cannot list their mappings, so whoever must undo them needs a record
that is never behind the truth. An entry is *reserved* before the function can reach the memory and
*confirmed* after the map call returned. At a death everything reserved counts as mapped: an unmap
that finds nothing is right for a reserved entry and a failure for a confirmed one.

This journal lives in the keeper's memory; :class:`Journal` is the seam at which one that outlives
the keeper takes its place. Used by the keeper's loop only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from holdfast.values import Iova, LeaseId


@dataclass(frozen=True, slots=True)
class Entry:
    """One mapping: ``size`` bytes at ``iova`` for a lease."""

    number: int
    lease: LeaseId
    iova: Iova
    size: int
    confirmed: bool = False

    def unmapped_in_full(self, unmapped: int) -> bool:
        """Whether an unmap that took away ``unmapped`` bytes leaves nothing of this entry."""
        return unmapped == self.size or (unmapped == 0 and not self.confirmed)


class Journal(Protocol):
    """Where mappings are recorded. Each call is durable when it returns."""

    def reserve(self, lease: LeaseId, iova: Iova, size: int) -> Entry: ...

    def confirm(self, entry: Entry) -> Entry: ...

    def close(self, entry: Entry) -> None: ...

    def entries(self, lease: LeaseId) -> Iterable[Entry]: ...


class MemoryJournal:
    """A journal that ends with its process."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._by_lease: dict[LeaseId, dict[int, Entry]] = {}

    def reserve(self, lease: LeaseId, iova: Iova, size: int) -> Entry:
        """Record an intention to map; from here on a death undoes it."""
        entry = Entry(next(self._numbers), lease, iova, size)
        self._by_lease.setdefault(lease, {})[entry.number] = entry
        return entry

    def confirm(self, entry: Entry) -> Entry:
        """Record that the map call succeeded."""
        confirmed = replace(entry, confirmed=True)
        self._by_lease[entry.lease][entry.number] = confirmed
        return confirmed

    def close(self, entry: Entry) -> None:
        """Record that the mapping is gone."""
        mine = self._by_lease[entry.lease]
        del mine[entry.number]
        if not mine:
            del self._by_lease[entry.lease]

    def entries(self, lease: LeaseId) -> tuple[Entry, ...]:
        """Everything that may still be mapped for a lease."""
        return tuple(self._by_lease.get(lease, {}).values())
