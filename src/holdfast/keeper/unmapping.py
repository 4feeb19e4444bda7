# SPDX-License-Identifier: Apache-2.0
"""Mappings taken away, and judged by what was written down of them.

A call that is given up may still have its effect later; what came of it is then found by the next
one. An unmap that took less than was mapped leaves its entry in the journal as mapped.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from holdfast import steps
from holdfast.errors import DeviceGone, HoldfastError, RemoteError, StaysStuck
from holdfast.keeper.function import CALL_DEADLINE, FunctionHost
from holdfast.keeper.journal import Entry, Journal
from holdfast.keeper.lease import Lease
from holdfast.values import Iova, LeaseId

PAGE = 4096


@dataclass(slots=True)
class _Unmapping:
    """A lease's unmaps, carried out in a thread that may be late: what is gone must not be lost."""

    entries: list[Entry]
    """As they were before."""
    marks: list[Entry]
    """As they are written down meanwhile."""
    outcomes: list[int | HoldfastError] = field(default_factory=list)
    begun: bool = False
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class Unmapper:
    """Takes mappings away. Used by the keeper's loop only."""

    host: FunctionHost
    journal: Journal
    _unmapping: dict[LeaseId, _Unmapping] = field(default_factory=dict, init=False)

    async def unmap_all(
        self, lease: Lease, *, retire: bool, deadline: float = CALL_DEADLINE
    ) -> bool:
        """Undo every mapping of a lease; True if each unmap took exactly what was mapped.

        With ``retire`` the IOVAs are not handed out again until :meth:`reinstate`. Raises
        StaysStuck after ``deadline`` seconds; what came of it is then found by the next call.
        """
        if lease.everything:
            await self.host.call_within(deadline, self.host.backend.dma_unmap_all)
        work = self._unmapping.get(lease.number)
        if work is not None and not work.done.is_set():
            raise StaysStuck("an earlier unmap has not come back", operation="unmap",
                             target=str(self.host.target))  # fmt: skip
        if work is None:
            entries = list(self.journal.entries(lease.number))
            if not entries:
                return True
            work = self._unmapping[lease.number] = _Unmapping(
                entries, [self.journal.unmapping(entry) for entry in entries]
            )
            steps.reach("keeper.unmapping")
            try:
                await self.host.call_within(deadline, partial(self._unmap_now, work))
            finally:
                if not work.begun:
                    del self._unmapping[lease.number]
                    for entry, mark in zip(work.entries, work.marks, strict=True):
                        self._failed(entry, mark)
        del self._unmapping[lease.number]
        steps.reach("keeper.unmapped")
        complete, problem = True, None
        for entry, mark, outcome in zip(work.entries, work.marks, work.outcomes, strict=True):
            if isinstance(outcome, HoldfastError):
                problem = problem or outcome  # the others are gone all the same, and recorded so
                self._failed(entry, mark)
            else:
                # Nothing was there, but a client that lives may still do what was reserved for it.
                late = not entry.confirmed and not outcome and not lease.process_dead
                left = self._close(entry, mark, outcome, retire=retire or late)
                complete &= left is None
        if problem is not None:
            raise problem
        return complete

    async def unmap(self, entry: Entry) -> Entry | None:
        """Undo one mapping; None if it took exactly what was mapped, else what is still there."""
        mark = self.journal.unmapping(entry)
        steps.reach("keeper.unmapping")
        try:
            (unmapped,) = await self.host.call(self._unmap_many, [entry])
            if isinstance(unmapped, HoldfastError):
                raise unmapped
        except BaseException:
            self._failed(entry, mark)
            raise
        steps.reach("keeper.unmapped")
        return self._close(entry, mark, unmapped, retire=False)

    def _failed(self, entry: Entry, mark: Entry, unmapped: int = 0) -> Entry:
        """Record that what was mapped before is still there; what only may have been, still may."""
        return self.journal.still_mapped(mark) if entry.confirmed or unmapped else mark

    def _unmap_now(self, work: _Unmapping) -> None:
        """Find out how many bytes each unmap takes away, or why it fails. Blocking."""
        work.begun = True
        try:
            work.outcomes.extend(self._unmap_many(work.entries))
        except Exception as error:  # noqa: BLE001 - each entry has an outcome
            said = HoldfastError(f"{type(error).__name__}: {error}", operation="unmap")
            work.outcomes.extend([said] * len(work.entries))
        finally:
            work.done.set()

    def _unmap_many(self, entries: Sequence[Entry]) -> list[int | HoldfastError]:
        """Bytes that each unmap took away, or why it failed. Blocking."""
        asked = [(entry.iova, entry.size) for entry in entries]
        outcomes = self.host.backend.dma_unmap_many(asked)
        return [self._judged(*pair) for pair in zip(entries, outcomes, strict=True)]

    def _judged(self, entry: Entry, outcome: int | HoldfastError) -> int | HoldfastError:
        if isinstance(outcome, RemoteError) and outcome.errno == errno.ENOENT:
            return 0
        if isinstance(outcome, DeviceGone):
            # The mapping ended with the process that held it, but only the reaper can say so.
            return entry.size if self.host.proven_gone() else 0
        return outcome

    def _close(self, entry: Entry, mark: Entry, unmapped: int, *, retire: bool) -> Entry | None:
        """Judge an unmap by what ``entry`` was before it; None, or what is still there."""
        if not entry.unmapped_in_full(unmapped):
            return self._failed(entry, mark, unmapped)
        base, span = page_span(entry)
        if retire:
            self.journal.retire(mark)
            self.host.space.retire(base, span)
        else:
            self.journal.close(mark)
            self.host.space.give_back(base, span)
        return None

    async def undo(self, entry: Entry) -> None:
        """A map failed or was never tried: an unmap of size 0 is right here."""
        if await self.unmap(entry) is not None:
            raise HoldfastError("a failed map could not be undone", operation="map")


def page_span(entry: Entry) -> tuple[Iova, int]:
    """The whole pages that an entry's range was taken from the address space as."""
    first = int(entry.iova) % PAGE
    return Iova(int(entry.iova) - first), -(-(first + entry.size) // PAGE) * PAGE
