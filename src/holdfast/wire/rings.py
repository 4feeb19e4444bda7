# SPDX-License-Identifier: Apache-2.0
"""Rings between a mediated client and its keeper: layout, index arithmetic, validation. Sans-IO.

Facts. Both ends have the rings mapped. The client may write anything anywhere in them at any
moment, also between two looks of the keeper at the same word, and may punch holes into the file.

Consequence. The keeper may believe nothing that it reads there, and must not read it twice: a
record that was good when it was checked need not be the one that is used. Nor may what it wrote
itself be read back.

Choice. There are two words in shared memory. The client writes how many records it has submitted,
the keeper how many completions; each end keeps its own count privately and never reads its own
word. Counts run freely modulo 2^64. :meth:`KeeperEnd.take` reads the client's word once, bounds
it, and copies the records into private memory; only the copy is looked at, and all of a batch at
once (:func:`check`). No word says how much the client has read: a client has at most
:data:`DEPTH` requests that it has not seen the end of, so the completions find room; those of a
client that cheats overwrite each other, which is its own loss.

Cost. Records are 64 bytes although 48 are used; x86-64 only, because the two words rely on stores
becoming visible in order.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

U64s = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.intp]

DEPTH: Final = 1024
"""Records in the submission ring, and the most requests that a client can have in flight."""
MAX_BYTES: Final = 1 << 20
"""Most bytes of one request: a long one must not hold up everybody else's. Larger transfers are
several requests."""

SUBMISSION = np.dtype(
    [
        ("tag", "<u8"),
        ("op", "<u4"),
        ("flags", "<u4"),
        ("buffer", "<u8"),
        ("offset", "<u8"),
        ("nbytes", "<u8"),
        ("card", "<u8"),
        ("reserved", "<u8", (2,)),
    ]
)
"""A request. ``tag`` is the client's and comes back with the completion; ``buffer`` is the number
of one of its slabs, ``offset`` and ``nbytes`` a piece of it, ``card`` the address on the card.
``flags`` and ``reserved`` are 0."""
COMPLETION = np.dtype([("tag", "<u8"), ("status", "<u4"), ("nbytes", "<u4")])
"""The end of a request: its tag, a :class:`Status`, and how many bytes were moved."""
assert SUBMISSION.itemsize == 64
assert COMPLETION.itemsize == 16

WORDS: Final = SUBMISSION.itemsize // 8
_SUBMITTED: Final = 0  # the client's count; each word has a cache line of its own
_COMPLETED: Final = 8  # the keeper's count
_HEADER: Final = 4096
COMPLETIONS: Final = 2 * DEPTH
"""Room for completions: a keeper that succeeds another may have to repeat some."""
_COMPLETIONS_AT: Final = _HEADER + DEPTH * SUBMISSION.itemsize
RING_BYTES: Final = _COMPLETIONS_AT + COMPLETIONS * COMPLETION.itemsize
"""Bytes of shared memory that one client's rings take: whole pages."""
assert RING_BYTES % 4096 == 0

_MASK: Final = (1 << 64) - 1
_ONE: Final = np.uint64(1)
_TWO: Final = np.uint64(2)
_SHIFT: Final = np.uint64(32)


class Op(enum.IntEnum):
    """What a request asks for. 0 is nothing, so that a punched page is no request."""

    TO_CARD = 1
    FROM_CARD = 2


class Status(enum.IntEnum):
    """How a request ended."""

    DONE = 0
    BAD_OP = 1  # unknown operation, flags or reserved bits
    FOREIGN = 2  # not a live buffer of this lease
    OUT_OF_BOUNDS = 3  # not inside the buffer, empty, or longer than MAX_BYTES
    DIRECTION = 4  # the buffer may not be written by the card
    ALIGNMENT = 5
    CARD_RANGE = 6  # outside the card's memory, or the lease's part of it
    OVERRUN = 7  # more submitted than the ring holds: all of it was dropped
    DEVICE = 8  # the engine stopped at it with an error


OVERRUN_TAG: Final = _MASK
"""The tag of a completion that stands for everything an overrun dropped."""


class BufferTable:
    """The buffers that a lease's requests may name. Immutable; any thread may read it.

    ``buffers`` are ``(number, pieces, writable)``: where the function sees each one, as
    ``(iova, size)`` in order, and whether the card may write there. No two have one number.
    """

    __slots__ = ("_bases", "_iovas", "_linear", "_numbers", "_sizes", "_starts", "_writable")

    def __init__(self, buffers: Iterable[tuple[int, Sequence[tuple[int, int]], bool]] = ()) -> None:
        known = sorted(buffers, key=lambda buffer: buffer[0])
        iovas = [int(iova) for _, pieces, _ in known for iova, _ in pieces]
        lengths = [size for _, pieces, _ in known for _, size in pieces]
        sizes = [sum(size for _, size in pieces) for _, pieces, _ in known]
        self._numbers = np.array([number for number, _, _ in known], np.uint64)
        self._sizes = np.array(sizes, np.uint64)
        self._writable = np.array([writable for _, _, writable in known], np.bool_)
        # All buffers behind each other: a place in that row finds the piece.
        self._linear = np.cumsum(self._sizes) - self._sizes
        self._iovas = np.array(iovas, np.uint64)
        ends = np.cumsum(np.array(lengths, np.uint64))
        self._starts = ends - np.array(lengths, np.uint64)
        simple = all(len(pieces) == 1 for _, pieces, _ in known)
        self._bases: U64s | None = self._iovas if simple else None

    def __len__(self) -> int:
        return len(self._numbers)

    def find(self, numbers: U64s) -> tuple[Indices, npt.NDArray[np.bool_], U64s]:
        """Index (any, if there is none), whether it is known, and size of each numbered buffer."""
        if not len(self):
            none = np.zeros(len(numbers), np.intp)
            return none, np.zeros(len(numbers), np.bool_), np.zeros(len(numbers), np.uint64)
        place = self._numbers.searchsorted(numbers)
        found = self._numbers.take(place, mode="clip") == numbers
        return place, found, self._sizes.take(place, mode="clip")

    def writable(self, place: Indices) -> npt.NDArray[np.bool_]:
        """Whether the card may write into these buffers."""
        return self._writable.take(place, mode="clip")

    @property
    def all_writable(self) -> bool:
        return bool(self._writable.all())

    def pieces(self, place: Indices, offset: U64s, nbytes: U64s) -> Pieces:
        """Where the function sees these checked ranges, in order."""
        if self._bases is not None:
            return Pieces(self._bases.take(place) + offset, nbytes, None)
        begin = self._linear.take(place) + offset
        end = begin + nbytes
        first = self._starts.searchsorted(begin, "right") - 1
        last = self._starts.searchsorted(end, "left") - 1
        counts = last - first + 1
        owner = np.repeat(np.arange(len(place)), counts)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        piece = first[owner] + number
        starts = np.maximum(self._starts[piece], begin[owner])
        # The next piece's start ends this one; behind the last there is only the range's own end.
        following = np.append(self._starts[1:], np.uint64(_MASK))
        stops = np.minimum(following[piece], end[owner])
        iovas = self._iovas[piece] + (starts - self._starts[piece])
        return Pieces(iovas, stops - starts, owner)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Ranges of bus memory. ``owner`` says which request each belongs to; None: one of each."""

    iovas: U64s
    lengths: U64s
    owner: Indices | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a lease's requests must keep to, besides its buffers.

    ``card_first`` up to ``card_end`` is its part of the card's memory; ``align`` (a power of two)
    goes for offsets, lengths and card addresses.
    """

    card_first: int
    card_end: int
    align: int = 1


@dataclass(frozen=True, slots=True)
class Checked:
    """A batch of records in private memory, with what was found out about each.

    ``status`` is None if all are good, else one :class:`Status` for each. The other arrays mean
    something only where the status is DONE.
    """

    tags: U64s
    op: U64s
    place: Indices
    offset: U64s
    nbytes: U64s
    card: U64s
    status: npt.NDArray[np.uint32] | None

    def __len__(self) -> int:
        return len(self.tags)

    def only(self, rows: Indices | slice) -> Checked:
        """Some of the records."""
        status = self.status[rows] if self.status is not None else None
        return Checked(
            self.tags[rows],
            self.op[rows],
            self.place[rows],
            self.offset[rows],
            self.nbytes[rows],
            self.card[rows],
            status,
        )


def check(records: U64s, buffers: BufferTable, limits: Limits) -> Checked:
    """Check a private copy of some records, shape ``(n, WORDS)``. Never fails, whatever they hold.

    A record is good only if it names a live buffer of the lease, stays inside it and inside the
    lease's part of the card, is aligned, and goes in a direction that the buffer allows. The good
    case costs one pass over the columns; why a record is bad is found out only if one is.
    """
    columns = np.ascontiguousarray(records.T)
    tags, op, buffer, offset, nbytes, card = columns[:6]  # op with the flags, which must be 0
    place, known, size = buffers.find(buffer)
    room = limits.card_end - limits.card_first
    most = np.uint64(max(0, min(MAX_BYTES, room)))
    inside = (nbytes - _ONE < most) & (nbytes <= size) & (offset <= size - nbytes)
    # An address below the first one wraps round to a very large distance.
    distance = card - np.uint64(limits.card_first)
    on_card = distance <= np.uint64(max(0, room)) - nbytes
    allowed = op - _ONE < _TWO
    good = known & inside & on_card & allowed
    if limits.align > 1:
        good &= ((offset | nbytes | card) & np.uint64(limits.align - 1)) == 0
    if not buffers.all_writable:
        good &= buffers.writable(place) | (op != Op.FROM_CARD)
    if columns[6:].any():
        good &= ~columns[6:].any(axis=0)
    checked = Checked(tags, op, place, offset, nbytes, card, None)
    if good.all():
        return checked
    status = _reasons(columns, checked, buffers, limits)
    # Whatever the reasons say, what the pass above did not find good is not carried out.
    status[~good & (status == Status.DONE)] = Status.BAD_OP
    return Checked(tags, op, place, offset, nbytes, card, status)


def _reasons(
    columns: U64s, found: Checked, buffers: BufferTable, limits: Limits
) -> npt.NDArray[np.uint32]:
    """Why each record is bad; the first reason that applies, in the order of :class:`Status`."""
    _, known, size = buffers.find(columns[2])
    offset, nbytes, card = found.offset, found.nbytes, found.card
    first, end = np.uint64(limits.card_first), np.uint64(limits.card_end)
    outside = (card < first) | (card > end) | (nbytes > end - np.minimum(card, end))
    reasons: list[tuple[Status, npt.NDArray[np.bool_]]] = [
        (Status.BAD_OP, (found.op - _ONE >= _TWO) | columns[6:].any(axis=0)),
        (Status.FOREIGN, ~known),
        (
            Status.OUT_OF_BOUNDS,
            (nbytes - _ONE >= np.uint64(MAX_BYTES)) | (nbytes > size) | (offset > size - nbytes),
        ),
        (Status.DIRECTION, (found.op == Op.FROM_CARD) & ~_writable(buffers, found.place)),
        (Status.ALIGNMENT, ((offset | nbytes | card) & np.uint64(limits.align - 1)) != 0),
        (Status.CARD_RANGE, outside),
    ]
    status = np.zeros(len(found), np.uint32)
    for reason, applies in reversed(reasons):
        status[applies] = reason
    return status


def _writable(buffers: BufferTable, place: Indices) -> npt.NDArray[np.bool_]:
    return buffers.writable(place) if len(buffers) else np.zeros(len(place), np.bool_)


class _End:
    """One end's view of the shared memory (:data:`RING_BYTES` of it)."""

    def __init__(self, memory: memoryview) -> None:
        whole = np.frombuffer(memory, np.uint8)[:RING_BYTES]
        self._words = memory[:_HEADER].cast("Q")
        self._records: U64s = whole[_HEADER:_COMPLETIONS_AT].view(np.uint64).reshape(DEPTH, WORDS)
        self._completions: U64s = whole[_COMPLETIONS_AT:].view(np.uint64).reshape(COMPLETIONS, 2)


class KeeperEnd(_End):
    """The keeper's end. ``consumed`` and ``produced`` are its own counts, never read back."""

    def __init__(self, memory: memoryview, consumed: int = 0, produced: int = 0) -> None:
        super().__init__(memory)
        self.consumed = consumed
        self.produced = produced

    def waiting(self) -> int:
        """Records submitted and not consumed, as the client says; more than DEPTH: an overrun."""
        submitted: int = self._words[_SUBMITTED]
        return (submitted - self.consumed) & _MASK

    def copy(self, count: int) -> U64s:
        """A private copy of the next ``count`` records (at most DEPTH). Consumes nothing."""
        at = self.consumed % DEPTH
        if at + count <= DEPTH:
            return self._records[at : at + count].copy()
        head = self._records[at:]
        return np.concatenate((head, self._records[: count - len(head)]))

    def consume(self, count: int) -> None:
        """The next ``count`` records have been dealt with."""
        self.consumed = (self.consumed + count) & _MASK

    def put(self, rows: U64s) -> None:
        """Enter the ends of requests, rows from :func:`completions`; not seen before
        :meth:`publish`."""
        for at in range(0, len(rows), COMPLETIONS):
            part = rows[at : at + COMPLETIONS]
            place = self.produced % COMPLETIONS
            end = place + len(part)
            if end <= COMPLETIONS:
                self._completions[place:end] = part
            else:
                self._completions[place:] = part[: COMPLETIONS - place]
                self._completions[: end - COMPLETIONS] = part[COMPLETIONS - place :]
            self.produced = (self.produced + len(part)) & _MASK

    def publish(self) -> None:
        """Let the client see what was put. Rings no bell."""
        self._words[_COMPLETED] = self.produced


class ClientEnd(_End):
    """The client's end. Never has more than DEPTH requests whose end it has not seen."""

    def __init__(self, memory: memoryview) -> None:
        super().__init__(memory)
        self.submitted = 0
        self.seen = 0

    def submit(self, rows: U64s) -> None:
        """Put records behind what was submitted; there must be room. The bell is the caller's."""
        at = self.submitted % DEPTH
        end = at + len(rows)
        if end <= DEPTH:
            self._records[at:end] = rows
        else:
            first = DEPTH - at
            self._records[at:] = rows[:first]
            self._records[: end - DEPTH] = rows[first:]
        self.submitted = (self.submitted + len(rows)) & _MASK
        # After the records: x86-64 makes stores visible in order.
        self._words[_SUBMITTED] = self.submitted

    def reap(self) -> npt.NDArray[Any] | None:
        """Completions that have not been seen yet, as :data:`COMPLETION`; None if there are none.

        A keeper that was replaced may tell of the same end twice.
        """
        completed: int = self._words[_COMPLETED]
        count = min((completed - self.seen) & _MASK, COMPLETIONS)
        if not count:
            return None
        at = (completed - count) % COMPLETIONS
        self.seen = completed
        if at + count <= COMPLETIONS:
            rows = self._completions[at : at + count].copy()
        else:
            head = self._completions[at:]
            rows = np.concatenate((head, self._completions[: count - len(head)]))
        return rows.view(COMPLETION)[:, 0]


def completions(tags: U64s, status: npt.ArrayLike, nbytes: npt.ArrayLike) -> U64s:
    """Rows for :meth:`KeeperEnd.put`."""
    rows = np.empty((len(tags), 2), np.uint64)
    rows[:, 0] = tags
    rows[:, 1] = np.asarray(status, np.uint64) | np.asarray(nbytes, np.uint64) << _SHIFT
    return rows


def records(
    op: Op, buffer: int, offset: npt.ArrayLike, nbytes: npt.ArrayLike, card: npt.ArrayLike
) -> U64s:
    """Records of requests of one kind on one buffer; the tags are left 0."""
    offsets = np.asarray(offset, np.uint64)
    rows = np.zeros((len(offsets), WORDS), np.uint64)
    rows[:, 1] = np.uint64(op)
    rows[:, 2] = np.uint64(buffer)
    rows[:, 3] = offsets
    rows[:, 4] = nbytes
    rows[:, 5] = card
    return rows


def feed(raw: bytes, buffers: BufferTable, limits: Limits) -> tuple[Checked, Pieces]:
    """Arbitrary ring contents through the checks that the keeper makes: for fuzzers.

    Copies what ``raw`` would be in shared memory, as the keeper does; returns the checked batch and
    the bus addresses that its good records lead to.
    """
    memory = bytearray(RING_BYTES)
    memory[: min(len(raw), RING_BYTES)] = raw[:RING_BYTES]
    end = KeeperEnd(memoryview(memory))
    checked = check(end.copy(min(end.waiting(), DEPTH)), buffers, limits)
    good = checked
    if checked.status is not None:
        good = checked.only((checked.status == Status.DONE).nonzero()[0])
    return checked, buffers.pieces(good.place, good.offset, good.nbytes)
