# SPDX-License-Identifier: Apache-2.0
"""``device.dma`` of a mediated lease: requests that the keeper checks and posts.

The client has no register, no doorbell and no descriptor: it writes records into a ring that it
shares with its keeper and rings a bell (:mod:`holdfast.wire.rings`). It works on any function
whose driver can post for others, and looks the same on all of them.

A transfer is as many records as its memory needs (at most 1 MiB each). Records of one direction
are carried out in order, those of different directions are not; a transfer is done when all its
records are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from holdfast.bar import Bell
from holdfast.dma.buffer import Buffer
from holdfast.dma.pin import Pin
from holdfast.driver import Engine
from holdfast.errors import (
    BadTransfer,
    Closed,
    HoldfastError,
    RingFull,
    TransferFailed,
)
from holdfast.interrupt import Interrupt
from holdfast.transfer import Held, Queue, Transfer
from holdfast.wire import rings
from holdfast.wire.rings import DEPTH, MAX_BYTES, ClientEnd, Op, Status, U64s

if TYPE_CHECKING:
    from holdfast.device import Device

_ONE: Final = np.uint64(1)
_SLOT: Final = np.uint64(DEPTH - 1)
assert DEPTH & (DEPTH - 1) == 0

_WHY: Final = {
    Status.BAD_OP: "the request has an operation or flags that do not exist",
    Status.FOREIGN: "the buffer is not (or no longer) one of this lease's",
    Status.OUT_OF_BOUNDS: "it does not lie inside its buffer, or is empty or too long",
    Status.DIRECTION: "the card may not write into that buffer",
    Status.ALIGNMENT: "offset, length or card address are not aligned",
    Status.CARD_RANGE: "it leaves the card's memory, or the part that this lease may use",
    Status.OVERRUN: "more was submitted than the ring holds",
}


@dataclass(frozen=True, slots=True)
class Batch:
    """Records ready to be posted, any number of times. Made by :meth:`MediatedEngine.prepare`.

    ``records`` is uint64[n, 8] without tags, all of one direction; ``nbytes`` is what they move.
    """

    op: Op
    records: U64s
    nbytes: int

    def __len__(self) -> int:
        return len(self.records)

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """Several batches of one direction as one."""
        ops = {batch.op for batch in batches}
        if len(ops) != 1:
            raise BadTransfer("a batch has one direction", operation="join batches")
        rows = np.concatenate([batch.records for batch in batches])
        return cls(ops.pop(), rows, sum(batch.nbytes for batch in batches))


@dataclass(slots=True)
class _Lane:
    """One direction. Tags are ``2 * count + direction``; ends may come out of order if some
    records were refused."""

    direction: int
    posted: int = 0
    finished: int = 0
    """All records before this count have ended."""
    ended: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(DEPTH, np.bool_))
    failed: dict[int, int] = field(default_factory=dict)
    transfers: deque[tuple[int, int, Transfer]] = field(default_factory=deque)
    """First count, count behind the last, and the transfer."""

    def note(self, counts: U64s, status: npt.NDArray[np.uint32]) -> None:
        """Records have ended. What was told before, or never posted, is ignored."""
        ahead = counts - np.uint64(self.finished)
        known = ahead < np.uint64(self.posted - self.finished)
        if not known.all():
            counts, status = counts[known], status[known]
        self.ended[(counts & _SLOT).astype(np.intp)] = True
        for at in status.nonzero()[0].tolist():
            self.failed[int(counts[at])] = int(status[at])
        self._advance()

    def _advance(self) -> None:
        """Move ``finished`` past everything that has ended without a gap."""
        open_ = self.posted - self.finished
        at = self.finished % DEPTH
        for part in (self.ended[at : at + open_], self.ended[: max(0, at + open_ - DEPTH)]):
            count = len(part) if part.all() else int(part.argmin())
            part[:count] = False
            self.finished += count
            if count < len(part):
                return


class MediatedQueue(Queue):
    """All requests of a mediated lease. Thread-safe."""

    def __init__(self, device: Device, end: ClientEnd, bell: Bell, interrupt: Interrupt) -> None:
        lease = device.lease

        def generation() -> int:
            lease.generation()  # raises if the lease has ended
            return 0  # what was in flight survives a reset: the keeper posts it again

        super().__init__(interrupt, generation)
        self.device = device
        self._end = end
        self._bell = bell
        self._lanes = {Op.TO_CARD: _Lane(0), Op.FROM_CARD: _Lane(1)}

    @property
    def in_flight(self) -> int:
        """Transfers not known to be finished."""
        return sum(len(lane.transfers) for lane in self._lanes.values())

    @property
    def requests(self) -> int:
        """Records not known to have ended."""
        return sum(lane.posted - lane.finished for lane in self._lanes.values())

    def post(self, batch: Batch, held: Sequence[Held]) -> Transfer:
        """Submit a batch. RingFull (nothing submitted) if it is more than the ring has room for.

        ``held`` is kept alive and usable until the function is done with the batch.
        """
        count = len(batch)
        self._generation()
        with self._lock:
            if count > DEPTH - self.requests:
                self.reap()
                if count > DEPTH - self.requests:
                    raise RingFull(
                        f"{count} requests, {DEPTH - self.requests} of {DEPTH} can be posted",
                        operation="post",
                        target=str(self.device.target),
                    )
            lane = self._lanes[batch.op]
            first = lane.posted
            transfer = self.keep(first + count, batch.nbytes, held)
            self._transfers.pop()
            lane.transfers.append((first, first + count, transfer))
            rows = batch.records.copy()
            rows[:, 0] = np.arange(2 * first + lane.direction, 2 * (first + count), 2)
            lane.posted += count
            self._end.submit(rows)
            self._bell.ring(1)
        return transfer

    def reap(self) -> None:
        """Finish what the keeper says has ended. Never blocks."""
        with self._lock:
            told = self._end.reap()
            if told is None:
                self._generation()
                return
            tags, status = told["tag"], told["status"]
            outward = (tags & _ONE) == 0
            for lane in self._lanes.values():
                mine = outward if lane.direction == 0 else ~outward
                if mine.any():
                    # 2**64 - 1 stands for no request; as a count it is far beyond any.
                    lane.note(tags[mine] >> _ONE, status[mine])
                    self._finish(lane)

    def _finish(self, lane: _Lane) -> None:
        while lane.transfers and lane.transfers[0][1] <= lane.finished:
            first, end, transfer = lane.transfers.popleft()
            error = self._error(lane, first, end) if lane.failed else None
            if error is None:
                for memory in transfer._held:
                    if isinstance(memory, Bounce):
                        memory.deliver()
            transfer._finish(error)

    def _error(self, lane: _Lane, first: int, end: int) -> HoldfastError | None:
        """The first failure among some records; forgets them."""
        mine = sorted(count for count in lane.failed if first <= count < end)
        statuses = [lane.failed.pop(count) for count in mine]
        if not statuses:
            return None
        operation = "H2C transfer" if lane.direction == 0 else "C2H transfer"
        target = str(self.device.target)
        place = f"request {mine[0] - first} of {end - first}"
        if statuses[0] == Status.DEVICE:
            what = f"the engine stopped with an error at {place}"
            return TransferFailed(what, operation=operation, target=target)
        why = _WHY.get(Status(statuses[0]), "refused") if statuses[0] in _KNOWN else "refused"
        what = f"the keeper refused {place}: {why}"
        return BadTransfer(what, operation=operation, target=target)

    def lose(self, error: HoldfastError) -> None:
        """The device is being closed: nobody will tell the end of what is in flight."""
        with self._lock:
            for lane in self._lanes.values():
                while lane.transfers:
                    lane.transfers.popleft()[2]._finish(error)


_KNOWN: Final = frozenset(int(status) for status in Status)


class Bounce:
    """A pin's stand-in for one transfer: a buffer that is copied to or from at its ends."""

    def __init__(self, pin: Pin, buffer: Buffer, piece: slice, *, to_card: bool) -> None:
        self.buffer = buffer
        self._pin = pin
        self._piece = piece
        self._to_card = to_card

    def hold(self) -> object:
        """Copy what goes to the card, and keep both ends."""
        kept = self._pin.hold()
        if self._to_card:
            self.buffer.array[:] = self._pin.array[self._piece]
        return kept

    def deliver(self) -> None:
        """What came from the card is there."""
        if not self._to_card:
            self._pin.array[self._piece] = self.buffer.array

    def release(self) -> None:
        self._pin.release()


class MediatedEngine(Engine):
    """``device.dma`` of a mediated lease. Thread-safe.

    ``card`` is the part of the card's memory that requests may name: first address, and the one
    behind the last.
    """

    def __init__(
        self,
        device: Device,
        end: ClientEnd,
        bell: Bell,
        interrupt: Interrupt,
        card: tuple[int, int],
    ) -> None:
        super().__init__(device)
        self.card = card
        self._queue: MediatedQueue | None = MediatedQueue(device, end, bell, interrupt)

    @property
    def queue(self) -> MediatedQueue:
        """What batches are posted to."""
        if self._queue is None or self.device.closed:
            raise Closed("the device is closed", operation="transfer", target=self._target())
        return self._queue

    def to_card(
        self,
        source: Buffer | Pin,
        address: int = 0,
        *,
        offset: int = 0,
        nbytes: int | None = None,
        **options: Any,
    ) -> Transfer:
        """Copy ``nbytes`` from ``offset`` of a buffer to card address ``address``.

        Raises BadTransfer, Closed or RingFull with nothing posted.
        """
        return self._move(Op.TO_CARD, source, address, offset, nbytes)

    def from_card(
        self,
        into: Buffer | Pin,
        address: int = 0,
        *,
        offset: int = 0,
        nbytes: int | None = None,
        **options: Any,
    ) -> Transfer:
        """Copy ``nbytes`` from card address ``address`` to ``offset`` of a buffer."""
        if not getattr(into, "writable", True):
            raise BadTransfer(
                "read-only memory cannot be the destination",
                operation="from_card",
                target=self._target(),
                hint="pin a writable array",
            )
        return self._move(Op.FROM_CARD, into, address, offset, nbytes)

    def _move(
        self, op: Op, memory: Buffer | Pin, address: int, offset: int, nbytes: int | None
    ) -> Transfer:
        count = self._check(memory, address, offset, nbytes)
        if isinstance(memory, Pin):
            buffer = self.device.alloc(count)
            piece = slice(offset, offset + count)
            bounce = Bounce(memory, buffer, piece, to_card=op is Op.TO_CARD)
            return self.queue.post(self.prepare(op, buffer, address), [bounce, buffer])
        batch = self.prepare(op, memory, address, offset=offset, nbytes=count)
        return self.queue.post(batch, [memory])

    def prepare(
        self,
        op: Op,
        memory: Buffer,
        address: int = 0,
        *,
        offset: int = 0,
        nbytes: int | None = None,
        piece: int = MAX_BYTES,
    ) -> Batch:
        """Build the records of a transfer once, to post them many times.

        ``piece`` is the most bytes of one record.
        """
        count = self._check(memory, address, offset, nbytes)
        starts = np.arange(0, count, min(piece, MAX_BYTES), dtype=np.uint64)
        lengths = np.diff(starts, append=np.uint64(count))
        return self._batch(op, memory, starts + np.uint64(offset), lengths, address + starts)

    def prepare_many(
        self,
        op: Op,
        memory: Buffer,
        offsets: npt.ArrayLike,
        lengths: npt.ArrayLike,
        addresses: npt.ArrayLike,
    ) -> Batch:
        """Build a record for each of many pieces of one buffer. Vectorised.

        Nothing is checked here but the shapes: the keeper refuses what is out of place.
        """
        arrays = [np.asarray(each, np.uint64) for each in (offsets, lengths, addresses)]
        if len({each.shape for each in arrays}) != 1 or arrays[0].ndim != 1 or not len(arrays[0]):
            raise BadTransfer(
                f"shapes {[each.shape for each in arrays]}",
                operation="prepare transfer",
                target=self._target(),
            )
        return self._batch(op, memory, *arrays)

    def _batch(self, op: Op, memory: Buffer, offsets: U64s, lengths: U64s, card: U64s) -> Batch:
        slab, start = memory.place
        rows = rings.records(op, slab, offsets + np.uint64(start), lengths, card)
        return Batch(op, rows, int(lengths.sum()))

    def _check(self, memory: Buffer | Pin, address: int, offset: int, nbytes: int | None) -> int:
        """How many bytes are meant; BadTransfer if they are not there."""
        memory.require_open()
        count = memory.nbytes - offset if nbytes is None else nbytes
        first, end = self.card
        if count <= 0 or offset < 0 or offset + count > memory.nbytes:
            raise BadTransfer(
                f"{count} bytes at {offset} of a buffer of {memory.nbytes} bytes",
                operation="transfer",
                target=self._target(),
                hint="ask for at least one byte inside the buffer",
            )
        if not first <= address <= end - count:
            raise BadTransfer(
                f"{count} bytes at card address {address:#x}",
                operation="transfer",
                target=self._target(),
                hint=f"this lease may use {first:#x} up to {end:#x}",
            )
        return count

    def close(self) -> None:
        """Let the rings go, so that their memory is unmapped before the lease ends."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.lose(Closed("the device was closed", operation="transfer"))
