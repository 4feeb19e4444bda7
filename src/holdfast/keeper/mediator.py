# SPDX-License-Identifier: Apache-2.0
"""Requests of clients that do not trust each other, on one engine: checked, posted, finished.

Facts. A post takes tens of microseconds whether it is of one request or of a hundred. The keeper's
event loop must not wait for it, and it must not wait for the loop. A client can submit as fast as
it can write memory.

Choice. One thread per function. It sleeps on the clients' bells and on the engine's interrupts,
and goes round the clients that have something: each turn takes one batch from one ring, bounded in
requests and in bytes (deficit round robin: Shreedhar and Varghese, SIGCOMM 1995), copies it, checks
the copy, writes down what it accepts and posts it. What is on its way in the engine is bounded as
well, so a client that floods delays another's next request by that much and no more. Finished
requests are told in batches, with one ring of each client's bell.

The thread never blocks and calls no driver code but :mod:`holdfast.poster`'s. Everything else (a
client comes or goes, the engine was stopped and started anew) is handed to it as a call
(:meth:`.worker.Worker.call`), so that nothing here needs a lock.

Cost. A batch holds the interpreter lock for some tens of microseconds at a time. Requests of one
client in the same direction are carried out in order; in different directions they are not.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final

import numpy as np

from holdfast.keeper.mediation_parts import (
    LAST_ROW,
    SEAT_MASK,
    Running,
    Seat,
    ends,
    plan,
    sort_out,
    statuses,
    whole_ends,
    within,
)
from holdfast.keeper.mediation_state import CARD, HOST, LENGTH, SEAT, SEQUENCE, TAG, MediatorState
from holdfast.keeper.worker import Worker
from holdfast.kernel import bells
from holdfast.poster import Poster
from holdfast.steps import reach
from holdfast.wire import rings
from holdfast.wire.rings import BufferTable, Checked, Op, Status, U64s

TURN_REQUESTS: Final = 256
TURN_BYTES: Final = 2 << 20
"""What a client may post before it is the next one's turn."""
WINDOW_REQUESTS: Final = 768  # on their way in one direction; for bytes: Running.window
ROUNDS: Final = 8  # turns between two looks at what has finished
POLL: Final = 0.001  # seconds between two looks at a lane without an interrupt
_TO_CARD: Final = np.uint64(Op.TO_CARD)


class _Turn(Enum):
    NOTHING = 0  # the ring is empty
    OVER = 1  # it had its share
    MORE = 2  # it has not, and there may be room
    STUCK = 3  # its quota is used up
    FULL = 4  # there is no room for its next request


class Mediator(Worker):
    """The thread of one function. Owns neither the state nor the seats' descriptors.

    ``trouble`` is called from the thread when it has paused because the engine stopped with an
    error, or the poster raised.
    """

    def __init__(self, state: MediatorState, trouble: Callable[[str], None]) -> None:
        self._state = state
        self._trouble = trouble
        self._seats: dict[int, Seat] = {}
        self._turns: deque[Seat] = deque()
        self._news: list[Seat] = []
        self._leaving: list[Seat] = []
        self._lanes: list[Running] = []
        self._vectors: list[int] = []
        self._polled = False
        self._paused = True
        self.batches = 0
        self.requests = 0
        super().__init__("mediator")

    # -- calls to hand over: only in the thread ------------------------------------------------

    def admit(self, seat: Seat) -> None:
        """Begin to read a client's ring."""
        self._seats[seat.number] = seat
        if not seat.frozen:
            self.watch(seat.submit, lambda: self._list(seat))
            self._list(seat)  # it may have rung before

    def freeze(self, seat: Seat) -> int:
        """Never read this client's ring again. Returns how many of its requests are in flight."""
        if not seat.frozen:
            seat.frozen = True
            self.unwatch(seat.submit)
            with contextlib.suppress(ValueError):
                self._turns.remove(seat)
        return seat.in_flight

    def extend(self, seat: Seat, buffers: BufferTable) -> None:
        """Let requests name these buffers."""
        seat.buffers = buffers

    def withdraw(self, seat: Seat, buffers: BufferTable) -> bool:
        """Let requests name only these buffers from now on; False if any request is in flight."""
        if seat.in_flight:
            return False
        seat.buffers = buffers
        return True

    def leave(self, seat: Seat) -> None:
        """Forget a client. What it may have in flight ends untold, and keeps its seat."""
        self.freeze(seat)
        seat.dropped = True
        del self._seats[seat.number]
        self._leaving.append(seat)
        self._free_seats()

    def _free_seats(self) -> None:
        for seat in self._leaving:
            if not seat.in_flight:
                self._state.free_seat(seat.number)
        self._leaving = [seat for seat in self._leaving if seat.in_flight]

    def pause(self) -> None:
        """Post nothing until :meth:`install`. What has finished is still told."""
        self._paused = True

    def detach(self) -> None:
        """The engine is stopped: tell what it has finished and what it failed at, then look at the
        lanes no more, because their memory is about to be prepared anew."""
        self._paused = True
        self._reap()
        for running in self._lanes:
            if running.lane.error() and len(running.table):
                self._fail_oldest(running)
            for seat, _, _ in running.segments:
                seat.in_flight = 0
        self._lanes = []
        self._free_seats()
        self._ring_bells()

    def install(self, poster: Poster, vectors: Sequence[int]) -> None:
        """Go on with channels that were stopped and started anew, through ``poster``.

        ``vectors`` are the eventfds of its lanes' interrupts, -1 where there is none. What was
        accepted and is not finished is posted again: its buffers still belong to it. What belongs
        to a seat that was dropped, or is not there, is forgotten.
        """
        for fd in self._vectors:
            self.unwatch(fd)
        self._vectors.clear()
        tables = self._state.lanes
        self._lanes = [
            Running(lane, table, table.posted)
            for lane, table in zip(poster.lanes, tables, strict=True)
        ]
        for seat in self._seats.values():
            seat.in_flight = 0
        self._polled = False
        for running, fd in zip(self._lanes, vectors, strict=True):
            if fd < 0:
                self._polled = True
            else:
                self._vectors.append(fd)
                self.watch(fd, running.lane.acknowledge)
            self._post_again(running)
        self._paused = False
        self._list_all()

    def reinstate(self) -> None:
        """In a successor, once its seats are admitted: tell again what may have been told."""
        for table in self._state.lanes:
            count = table.half_told()
            for seat, rows in self._by_seat(table.oldest(count)):
                self._tell(seat, ends(rows))
            table.told(count)
            rows = table.oldest(len(table))
            for seat, mine in self._by_seat(rows):
                consumed = np.uint64(seat.end.consumed)
                ahead = mine[mine[:, SEQUENCE] - consumed < np.uint64(1 << 63), SEQUENCE]
                seat.known |= frozenset(ahead.tolist())
                seat.in_flight += int(np.count_nonzero(mine[:, SEAT] & LAST_ROW))
            reach("keeper.mediation.reinstate")
        for seat in self._seats.values():
            self._note(seat)  # it may have been told, and not woken
        self._ring_bells()

    # -- the thread ------------------------------------------------------------------------------

    def _awake(self, fd: int) -> None:
        try:
            super()._awake(fd)
        except Exception as error:  # noqa: BLE001 - as below
            self._stumble(f"{type(error).__name__}: {error}")

    def _round(self) -> bool:
        try:
            self._reap()
            more = self._serve()
            self._ring_bells()
        except Exception as error:  # noqa: BLE001 - a driver's fault must not end the thread
            self._stumble(f"{type(error).__name__}: {error}")
            return False
        return more

    def _patience(self) -> float | None:
        busy = self._polled and any(len(running.table) for running in self._lanes)
        return POLL if busy else None

    def _stumble(self, why: str) -> None:
        if not self._paused:
            self._paused = True
            self._trouble(why)

    def _list(self, seat: Seat) -> None:
        if not seat.listed and not seat.frozen:
            seat.listed = True
            self._turns.append(seat)

    def _list_all(self) -> None:
        for seat in self._seats.values():
            self._list(seat)

    # -- taking ------------------------------------------------------------------------------

    def _serve(self) -> bool:
        """Give each client its turn; True if there may be more to do at once."""
        if self._paused:
            return False
        stuck = 0
        for _ in range(ROUNDS):
            if stuck >= len(self._turns):
                return False
            seat = self._turns[0]
            turn = self._take(seat)
            if turn is _Turn.FULL:
                # Whoever is next must not fill the gap that this one waits to grow.
                return False
            if turn is _Turn.NOTHING:
                self._turns.popleft()
                seat.listed = seat.in_turn = False
                seat.deficit = 0
            elif turn is not _Turn.MORE:
                self._turns.rotate(-1)
                seat.in_turn = False
                stuck = stuck + 1 if turn is _Turn.STUCK else 0
        return True

    def _take(self, seat: Seat) -> _Turn:
        """One batch of the client whose turn it is."""
        waiting = seat.end.waiting()
        if not waiting:
            return _Turn.NOTHING
        if waiting > rings.DEPTH:
            self._overrun(seat, waiting)
            return _Turn.OVER
        if not seat.in_turn:
            seat.in_turn = True
            seat.deficit += TURN_BYTES
        own = min(waiting, TURN_REQUESTS, seat.quota - seat.in_flight)
        if own <= 0:
            seat.deficit = 0  # its quota keeps it, not the others
            return _Turn.STUCK
        first, second = self._lanes
        fullest = max(len(first.table), len(second.table))
        room = min(first.room(), second.room(), WINDOW_REQUESTS - fullest)
        if room <= 0:
            return _Turn.FULL
        batch = rings.check(seat.end.copy(min(own, room)), seat.buffers, seat.limits)
        reach("keeper.mediation.check")
        window = min(first.window - first.nbytes, second.window - second.nbytes)
        taken, used = within(batch, min(seat.deficit, window))
        cut = taken < len(batch)
        if cut and not taken:
            return _Turn.FULL if window < seat.deficit else _Turn.OVER
        accepted = self._accept(seat, batch.only(slice(0, taken)) if cut else batch, room)
        if not accepted:
            return _Turn.FULL
        seat.deficit = max(0, seat.deficit - used)
        self.batches += 1
        self.requests += accepted
        return _Turn.MORE if cut and window < seat.deficit + used else _Turn.OVER

    def _accept(self, seat: Seat, batch: Checked, room: int) -> int:
        """Write down, consume, post; and turn away what is bad. Returns how many were consumed."""
        sequence = np.arange(len(batch), dtype=np.uint64) + np.uint64(seat.end.consumed)
        good, bad = batch, None
        if batch.status is not None or seat.known:
            good, bad, sequence = sort_out(seat, batch, sequence)
        pieces = seat.buffers.pieces(good.place, good.offset, good.nbytes) if len(good) else None
        if pieces is not None and pieces.owner is not None and len(pieces.iovas) > room:
            # In pieces it is more than fits: as many whole requests as do.
            fitting = int(pieces.owner[room])
            if batch.status is None and not seat.known and fitting:
                return self._accept(seat, batch.only(slice(0, fitting)), room)
            return self._accept(seat, batch.only(slice(0, 1)), room) if len(batch) > 1 else 0
        parts: list[tuple[Running, U64s]] = []
        if pieces is not None:
            op = good.op if pieces.owner is None else good.op[pieces.owner]
            parts = self._by_lane(op, plan(seat, good, pieces, sequence))
        for running, rows in parts:
            running.table.append(rows)
            reach("keeper.mediation.accept")
        if bad is not None and len(bad):
            self._tell(seat, rings.completions(bad.tags, statuses(bad), 0))
        seat.end.consume(len(batch))
        self._state.consumed(seat.number, seat.end.consumed)
        seat.known = frozenset()
        reach("keeper.mediation.consume")
        for running, rows in parts:
            self._post(running, seat, rows, whole=pieces is None or pieces.owner is None)
        return len(batch)

    def _by_lane(self, op: U64s, rows: U64s) -> list[tuple[Running, U64s]]:
        to_card, from_card = self._lanes
        outward = op == _TO_CARD
        number = int(np.count_nonzero(outward))
        if number == len(rows):
            return [(to_card, rows)]
        if not number:
            return [(from_card, rows)]
        return [(to_card, rows[outward]), (from_card, rows[~outward])]

    def _post(self, running: Running, seat: Seat, rows: U64s, whole: bool) -> None:
        """Hand accepted rows to the engine; they are in the table."""
        count = len(rows) if whole else int(np.count_nonzero(rows[:, SEAT] & LAST_ROW))
        seat.in_flight += count
        running.given(int(rows[:, LENGTH].sum()))
        segments = running.segments
        if segments and segments[-1][0] is seat and segments[-1][2] == whole:
            segments[-1] = (seat, segments[-1][1] + len(rows), whole)
        else:
            segments.append((seat, len(rows), whole))
        running.lane.post(rows[:, HOST], rows[:, CARD], rows[:, LENGTH])
        reach("keeper.mediation.post")

    def _overrun(self, seat: Seat, waiting: int) -> None:
        """The client says it submitted more than there is room for: none of it means anything."""
        seat.end.consume(waiting)
        self._state.consumed(seat.number, seat.end.consumed)
        tag = np.array([rings.OVERRUN_TAG], np.uint64)
        self._tell(seat, rings.completions(tag, int(Status.OVERRUN), 0))

    def _post_again(self, running: Running) -> None:
        """After a stop: what living clients had in flight, in its order."""
        table = running.table
        rows = table.oldest(len(table))
        numbers = (rows[:, SEAT] & SEAT_MASK).tolist()
        seats = [self._seats.get(number) for number in numbers]
        kept = [place for place, seat in enumerate(seats) if seat is not None and not seat.dropped]
        rows = rows[kept].copy()
        table.replace(rows)
        running.base = (table.posted - len(rows)) & 0xFFFF_FFFF
        at = 0
        while at < len(kept):
            seat = seats[kept[at]]
            end = at
            while end < len(kept) and seats[kept[end]] is seat:
                end += 1
            if seat is not None:
                self._post(running, seat, rows[at:end], whole=False)
            at = end

    # -- telling ------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Tell the ends of what the engine has finished."""
        for running in self._lanes:
            table, lane = running.table, running.lane
            count = (running.base + lane.completed() - table.done) & 0xFFFF_FFFF
            count = min(count, len(table))  # whatever the function says
            if count:
                table.begin_telling(count)
                rows = table.oldest(count)
                running.moved(int(rows[:, LENGTH].sum()))
                self._tell_finished(running, rows)
                table.told(count)
                reach("keeper.mediation.told")
            if not self._paused and lane.error():
                self._stumble("the engine stopped with an error")

    def _tell_finished(self, running: Running, rows: U64s) -> None:
        at = 0
        segments = running.segments
        while at < len(rows):
            seat, count, whole = segments[0]
            part = rows[at : at + count]
            if len(part) == count:
                segments.popleft()
            else:
                segments[0] = (seat, count - len(part), whole)
            at += len(part)
            told = whole_ends(part) if whole else ends(part)
            seat.in_flight -= len(told)
            self._tell(seat, told)

    def _fail_oldest(self, running: Running) -> None:
        """The engine is stopped, with an error, at the oldest request: that one has failed."""
        table = running.table
        rows = table.oldest(len(table))
        lasts = np.flatnonzero(rows[:, SEAT] & LAST_ROW)
        count = int(lasts[0]) + 1
        seat = running.segments[0][0]
        table.begin_telling(count)
        seat.in_flight -= 1
        self._tell(seat, rings.completions(rows[count - 1 : count, TAG], int(Status.DEVICE), 0))
        table.told(count)

    def _tell(self, seat: Seat, ends: U64s) -> None:
        """Put completions into a client's ring; its bell is rung at the end of the round."""
        if seat.dropped:
            return  # nobody reads it, and it may be unmapped
        seat.end.put(ends)
        reach("keeper.mediation.put")
        # Before the client can see them: what a successor goes on from is never behind that.
        self._state.produced(seat.number, seat.end.produced)
        reach("keeper.mediation.produce")
        seat.end.publish()
        reach("keeper.mediation.publish")
        self._note(seat)

    def _note(self, seat: Seat) -> None:
        if not seat.news:
            seat.news = True
            self._news.append(seat)

    def _ring_bells(self) -> None:
        for seat in self._news:
            seat.news = False
            bells.ring(seat.done)
        self._news.clear()

    def _by_seat(self, rows: U64s) -> list[tuple[Seat, U64s]]:
        numbers = rows[:, SEAT] & SEAT_MASK
        return [
            (self._seats[number], rows[numbers == number])
            for number in np.unique(numbers).tolist()
            if number in self._seats
        ]
