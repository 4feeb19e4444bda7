# SPDX-License-Identifier: Apache-2.0
"""What a mediator must not forget when its keeper is killed: one private memfd.

Facts. A keeper can be killed between any two instructions. What it had accepted for its clients,
and not yet told them the end of, must be told by its successor: once, or the client waits for
ever; and the request may be carried out again only as long as the client has not been told,
because after that its buffer may belong to something else.

Choice. Per lane a table of accepted requests, in order, between two counts ``done`` and ``posted``
that share one 64-bit word: a single store moves both. Rows are written before the word, so what
the word covers is whole. ``told`` lies between them: the ends of requests before it are being
told, and may have been, so they are told again and never carried out again. Per seat (client) how
far its submission ring was consumed, written after the table: a successor finds a request that is
in the table and not yet consumed by its sequence number, and does not take it twice.

Cost. 256 KiB of address space; the pages that nobody used are never allocated. Clients never get
this file.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import numpy.typing as npt

from holdfast.errors import Busy, ProtocolError
from holdfast.kernel import memfd
from holdfast.kernel.mapping import Mapping

U64s = npt.NDArray[np.uint64]

SLOTS: Final = 2048
"""Rows of a table: what is in flight, and once more while it is being posted anew."""
IN_FLIGHT: Final = SLOTS // 2
ROW: Final = 8
TAG, SEAT, SEQUENCE, HOST, CARD, LENGTH, NBYTES = range(7)
"""Words of a row. SEAT has the seat's number, and :data:`LAST` in the last row of a request."""
LAST: Final = 1 << 32
SEATS: Final = 2048
_SEAT_WORDS: Final = 4
_LEASE, _CONSUMED, _PRODUCED, _USED = range(_SEAT_WORDS)
_MAGIC: Final = 0x31_4D_46_48  # "HFM1"
_LOW: Final = 0xFFFF_FFFF
_LANE_HEADER: Final = 8
_HEADER: Final = 512  # words: a page
_SEATS_AT: Final = _HEADER
_ROWS_AT: Final = _SEATS_AT + SEATS * _SEAT_WORDS
_WORDS: Final = _ROWS_AT + 2 * SLOTS * ROW
STATE_BYTES: Final = 8 * _WORDS
assert STATE_BYTES % 4096 == 0


class LaneTable:
    """Accepted requests of one lane, oldest first. Used by the mediator's thread only."""

    def __init__(self, words: memoryview, rows: U64s) -> None:
        self._words = words
        self._rows = rows
        self.done = words[0] & _LOW
        self.posted = words[0] >> 32

    def __len__(self) -> int:
        return (self.posted - self.done) & _LOW

    def append(self, rows: U64s) -> None:
        """Accept: durable when it returns. At most IN_FLIGHT at a time."""
        self._write(rows)
        self._commit(self.done, self.posted + len(rows))

    def replace(self, rows: U64s) -> None:
        """In one step: these instead of everything there is."""
        self._write(rows)
        self._commit(self.posted, self.posted + len(rows))

    def _write(self, rows: U64s) -> None:
        at = self.posted % SLOTS
        end = at + len(rows)
        if end <= SLOTS:
            self._rows[at:end] = rows
        else:
            self._rows[at:] = rows[: SLOTS - at]
            self._rows[: end - SLOTS] = rows[SLOTS - at :]

    def _commit(self, done: int, posted: int) -> None:
        self._words[0] = (posted & _LOW) << 32 | done & _LOW
        self.done, self.posted = done & _LOW, posted & _LOW

    def oldest(self, count: int) -> U64s:
        """The first ``count`` rows; a view, or a copy where they wrap."""
        at = self.done % SLOTS
        if at + count <= SLOTS:
            return self._rows[at : at + count]
        return np.concatenate((self._rows[at:], self._rows[: at + count - SLOTS]))

    def begin_telling(self, count: int) -> None:
        """The end of the first ``count`` is about to be told."""
        self._words[1] = (self.done + count) & _LOW

    def told(self, count: int) -> None:
        """It was."""
        self._commit(self.done + count, self.posted)

    def half_told(self) -> int:
        """How many of the first rows a former keeper may have told of."""
        count = (self._words[1] - self.done) & _LOW
        return count if count <= len(self) else 0


class MediatorState:
    """The file and its parts. Owns ``fd``.

    Seats are used by the keeper's loop and the mediator's thread, but never one seat by both.
    """

    def __init__(self, fd: int) -> None:
        """Take over a descriptor made by :meth:`create`, here or in a keeper that is dead."""
        self.fd = fd
        self._mapping = Mapping(fd, STATE_BYTES, dont_fork=True)
        words = self._mapping.array.view(np.uint64)
        raw = self._mapping.array.data.cast("Q")
        if int(words[0]) != _MAGIC:
            raise ProtocolError("no state of a mediator", operation="resume mediation")
        rows = words[_ROWS_AT:].reshape(2, SLOTS, ROW)
        self.lanes = tuple(
            LaneTable(raw[_LANE_HEADER * (lane + 1) : _LANE_HEADER * (lane + 2)], rows[lane])
            for lane in range(2)
        )
        self._seats = words[_SEATS_AT:_ROWS_AT].reshape(SEATS, _SEAT_WORDS)
        self._raw_seats = raw[_SEATS_AT:_ROWS_AT]

    @classmethod
    def create(cls) -> MediatorState:
        fd = memfd.create("holdfast-mediator", STATE_BYTES)
        mapping = Mapping(fd, STATE_BYTES)
        mapping.array.view(np.uint64)[0] = _MAGIC
        mapping.close()
        return cls(fd)

    # -- seats ------------------------------------------------------------

    def take_seat(self, lease: int) -> int:
        """A free seat for a lease. Raises Busy if there is none."""
        free = np.flatnonzero(self._seats[:, _USED] == 0)
        if not len(free):
            raise Busy(f"{SEATS} clients have mediated leases", operation="open")
        seat = int(free[0])
        self._seats[seat] = 0
        self._seats[seat, _LEASE] = lease
        self._seats[seat, _USED] = 1
        return seat

    def free_seat(self, seat: int) -> None:
        self._seats[seat, _USED] = 0

    def find_seat(self, lease: int) -> int | None:
        """The seat that a former keeper gave to a lease."""
        mine = (self._seats[:, _USED] == 1) & (self._seats[:, _LEASE] == lease)
        found = np.flatnonzero(mine)
        return int(found[0]) if len(found) else None

    def counts(self, seat: int) -> tuple[int, int]:
        """Records consumed and completions produced."""
        return int(self._seats[seat, _CONSUMED]), int(self._seats[seat, _PRODUCED])

    def consumed(self, seat: int, count: int) -> None:
        self._raw_seats[seat * _SEAT_WORDS + _CONSUMED] = count

    def produced(self, seat: int, count: int) -> None:
        self._raw_seats[seat * _SEAT_WORDS + _PRODUCED] = count

    def close(self) -> None:
        """Let the file go. The descriptor is closed; idempotent."""
        if self.fd >= 0:
            self._mapping.close()
            os.close(self.fd)
            self.fd = -1
