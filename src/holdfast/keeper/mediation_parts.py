# SPDX-License-Identifier: Apache-2.0
"""Pieces of the mediator: a client's seat, a lane that runs, and what is worked out of a batch."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from holdfast.keeper.mediation_state import (
    CARD,
    HOST,
    IN_FLIGHT,
    LAST,
    LENGTH,
    NBYTES,
    ROW,
    SEAT,
    SEQUENCE,
    TAG,
    LaneTable,
)
from holdfast.poster import Lane
from holdfast.wire.rings import BufferTable, Checked, KeeperEnd, Limits, Pieces, Status, U64s

WINDOW_SECONDS: Final = 0.008
WINDOW_FIRST: Final = 8 << 20
WINDOW_LEAST: Final = 2 << 20
WINDOW_MOST: Final = 48 << 20
"""What may be on its way in one direction: so many seconds' worth of bytes, within bounds."""
LAST_ROW: Final = np.uint64(LAST)
SEAT_MASK: Final = np.uint64(LAST - 1)
_SHIFT: Final = np.uint64(32)


@dataclass(slots=True, eq=False)
class Seat:
    """One client's place at the mediator. Once admitted it is the thread's.

    ``number`` is its row in the state; ``submit`` the eventfd that the client rings, ``done`` the
    end to ring of the bell that it hears; ``quota`` the most requests it has in flight.
    """

    number: int
    end: KeeperEnd
    submit: int
    done: int
    limits: Limits
    quota: int
    buffers: BufferTable = field(default_factory=BufferTable)
    in_flight: int = 0
    frozen: bool = False
    """Its ring is not read any more."""
    dropped: bool = False
    """What it has in flight is not posted again."""
    listed: bool = False
    in_turn: bool = False
    """It has got what it may post in this turn."""
    deficit: int = 0
    news: bool = False
    known: frozenset[int] = frozenset()
    """Sequence numbers that a former keeper had accepted and not yet consumed."""


@dataclass(slots=True)
class Running:
    """A lane with its table. ``base`` is the table's count when the lane was started."""

    lane: Lane
    table: LaneTable
    base: int
    nbytes: int = 0
    """Bytes of what is on its way."""
    window: int = WINDOW_FIRST
    """How many there may be."""
    since: float = 0.0
    """When it was looked at last, or began to have something to do."""
    segments: deque[tuple[Seat, int, bool]] = field(default_factory=deque)
    """Whose the rows of the table are: seat, rows, whether each row is a whole request."""

    def room(self) -> int:
        return min(self.lane.room(), IN_FLIGHT - len(self.table))

    def given(self, nbytes: int) -> None:
        """Some bytes are being posted."""
        if not self.nbytes:
            self.since = time.monotonic()
        self.nbytes += nbytes

    def moved(self, nbytes: int) -> None:
        """Some bytes have finished since the last look: fit the window to the engine's pace.

        What is on its way is what another client's next request must wait for, so it is bounded in
        time; but a fast engine must not run dry while its completions are told.
        """
        now = time.monotonic()
        pace = int(nbytes / max(now - self.since, 1e-6) * WINDOW_SECONDS)
        self.window = min(max((3 * self.window + pace) // 4, WINDOW_LEAST), WINDOW_MOST)
        self.nbytes -= nbytes
        self.since = now


def plan(seat: Seat, good: Checked, pieces: Pieces, sequence: U64s) -> U64s:
    """Rows for a table: where each piece of each request goes."""
    owner = pieces.owner
    rows = np.empty((len(pieces.iovas), ROW), np.uint64)
    rows[:, HOST] = pieces.iovas
    rows[:, LENGTH] = pieces.lengths
    rows[:, SEAT] = seat.number | LAST
    if owner is None:
        rows[:, TAG], rows[:, SEQUENCE] = good.tags, sequence
        rows[:, CARD], rows[:, NBYTES] = good.card, good.nbytes
        return rows
    before = np.cumsum(pieces.lengths) - pieces.lengths
    begins = np.searchsorted(owner, np.arange(len(good)))
    rows[:, TAG], rows[:, SEQUENCE] = good.tags[owner], sequence[owner]
    rows[:, CARD] = good.card[owner] + before - before[begins][owner]
    rows[:, NBYTES] = good.nbytes[owner]
    rows[:-1, SEAT][owner[1:] == owner[:-1]] = seat.number
    return rows


def within(batch: Checked, budget: int) -> tuple[int, int]:
    """How many leading records fit a budget of bytes (bad ones cost none), and their bytes."""
    nbytes = batch.nbytes
    if batch.status is not None:
        nbytes = np.where(batch.status == Status.DONE, nbytes, np.uint64(0))
    total = int(nbytes.sum())
    if total <= budget:
        return len(batch), total
    sums = np.cumsum(nbytes)
    taken = int(sums.searchsorted(np.uint64(max(0, budget)), "right"))
    return taken, int(sums[taken - 1]) if taken else 0


def sort_out(seat: Seat, batch: Checked, sequence: U64s) -> tuple[Checked, Checked, U64s]:
    """The good records with their sequence numbers, and the bad ones; known ones are neither."""
    status = batch.status
    good = np.ones(len(batch), np.bool_) if status is None else status == Status.DONE
    bad = ~good
    if seat.known:
        new = ~np.isin(sequence, np.array(sorted(seat.known), np.uint64))
        good &= new
        bad &= new
    rows = good.nonzero()[0]
    return batch.only(rows), batch.only(bad.nonzero()[0]), sequence[rows]


def statuses(bad: Checked) -> npt.NDArray[np.uint32]:
    """The reasons of bad records."""
    assert bad.status is not None
    return bad.status


def whole_ends(rows: U64s) -> U64s:
    """Completions of rows that are a request each."""
    ends = np.empty((len(rows), 2), np.uint64)
    ends[:, 0] = rows[:, TAG]
    np.left_shift(rows[:, NBYTES], _SHIFT, out=ends[:, 1])
    return ends


def ends(rows: U64s) -> U64s:
    """Completions of the requests that end in these rows."""
    return whole_ends(rows[(rows[:, SEAT] & LAST_ROW) != 0])
