# SPDX-License-Identifier: Apache-2.0
"""The descriptor ring, read by a tiny engine that knows nothing of how it was written.

The reader follows PG195 and PG344: a descriptor starts with the magic number, names its successor,
and says how many descriptors behind the successor may be fetched in the same burst, which must be
contiguous and must not cross a 4 KiB page.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.dma.sg import SgList
from holdfast.driver import ControlMemory
from holdfast.drivers.xdma_ring import (
    BLOCK,
    CONTROL_BYTES,
    RING,
    Batch,
    Layout,
    Ring,
    prepare_ring,
)
from holdfast.regs.xdma import DESC_MAX_LENGTH, Direction

PAGE = 4096
DESCRIPTOR = struct.Struct("<IIQQQ")
COMPLETED, EOP, STOP = 1 << 1, 1 << 4, 1 << 0
Piece = tuple[int, int, int]


def pages_of(order: Sequence[int], base: int = 1 << 32) -> SgList:
    """Control memory whose pages lie in any order, with gaps between them."""
    return SgList.of([(base + 2 * PAGE * page, PAGE) for page in order])


def make_control(*, shuffled: bool) -> ControlMemory:
    data = memoryview(bytearray(2 * CONTROL_BYTES))
    count = len(data) // PAGE
    if shuffled:
        order = np.random.default_rng(1).permutation(count).tolist()
        return ControlMemory(data, pages_of(order))
    return ControlMemory(data, SgList.of([(1 << 32, len(data))]))


@dataclass
class Reader:
    """The engine: fetches along ``next``, as many as it was given credits for."""

    control: ControlMemory
    layout: Layout
    fetched: int = 0

    def __post_init__(self) -> None:
        self.at = self.control.iova(self.layout.ring)
        self.burst = BLOCK - 1
        self.last_flags: list[int] = []
        pieces = zip(self.control.sg.iovas.tolist(), self.control.sg.lengths.tolist(), strict=True)
        self.where: dict[int, int] = {}
        offset = 0
        for iova, length in pieces:
            for page in range(0, length, PAGE):
                self.where[iova + page] = offset + page
            offset += length

    def offset(self, iova: int) -> int:
        return self.where[iova & ~(PAGE - 1)] + iova % PAGE

    def fetch(self, given: int) -> Iterator[Piece]:
        for _ in range(given):
            if self.burst < 0:
                raise AssertionError("the burst ran over its announced length")
            raw = bytes(self.control.data[self.offset(self.at) :][: DESCRIPTOR.size])
            head, length, source, destination, following = DESCRIPTOR.unpack(raw)
            assert head >> 16 == 0xAD4B, "magic"
            assert not head & STOP, "a stopped channel would need the keeper again"
            adjacent = head >> 8 & 0x3F
            last_of_burst = self.burst == 0
            if last_of_burst:
                first, end = following, following + 32 * (adjacent + 1)
                assert (end - 1) // PAGE == first // PAGE, "a burst crosses a page"
                self.burst = adjacent
            else:
                assert following == self.at + 32, "a burst is not contiguous"
                self.burst -= 1
            self.last_flags.append(head & 0x1F)
            self.at = following
            self.fetched += 1
            yield source, destination, length

    def report(self, count: int, *, error: bool = False) -> None:
        word = count & 0xFFFFFF | (1 << 31 if error else 0)
        struct.pack_into("<I", self.control.data, self.layout.count, word)


def prepared(
    direction: Direction = Direction.H2C, *, place: int = 0, shuffled: bool = True
) -> tuple[Ring, Reader]:
    control = make_control(shuffled=shuffled)
    layout = Layout(place, direction)
    prepare_ring(control, layout)
    return Ring(control, layout), Reader(control, layout)


def batch_of(first: int, count: int, direction: Direction) -> tuple[Batch, list[Piece]]:
    host = np.arange(first, first + count, dtype=np.uint64) * np.uint64(PAGE)
    lengths = np.arange(512, 512 + count, dtype=np.uint64)
    card = np.arange(count, dtype=np.uint64) * np.uint64(0x1_0000) + np.uint64(1 << 40)
    pairs = (host, card) if direction is Direction.H2C else (card, host)
    expected = list(zip(pairs[0].tolist(), pairs[1].tolist(), lengths.tolist(), strict=True))
    return Batch.of(direction, lengths, host, card), expected


@given(
    st.sampled_from(Direction),
    st.booleans(),
    st.lists(st.integers(1, RING - 1), min_size=1, max_size=12),
)
def test_the_engine_reads_exactly_what_was_posted(
    direction: Direction, shuffled: bool, sizes: list[int]
) -> None:
    ring, reader = prepared(direction, place=1, shuffled=shuffled)
    for size in sizes:
        batch, expected = batch_of(reader.fetched, size, direction)
        assert ring.free == RING - 1
        ring.write(batch)
        assert ring.free == RING - 1 - size
        reader.last_flags.clear()
        assert list(reader.fetch(size)) == expected
        assert reader.last_flags == [0] * (size - 1) + [COMPLETED | EOP]
        reader.report(reader.fetched)
        assert ring.refresh() == reader.fetched


def test_posting_ahead_of_the_engine_leaves_what_it_has_not_read() -> None:
    ring, reader = prepared()
    first, expected_first = batch_of(0, 600, Direction.H2C)
    second, expected_second = batch_of(600, 423, Direction.H2C)
    ring.write(first)
    ring.write(second)
    assert ring.free == 0
    assert list(reader.fetch(1023)) == expected_first + expected_second


def test_old_completion_flags_do_not_survive_a_turn_of_the_ring() -> None:
    ring, reader = prepared()
    for number in range(RING):
        ring.write(batch_of(number, 1, Direction.H2C)[0])
        list(reader.fetch(1))
        reader.report(reader.fetched)
        ring.refresh()
    reader.last_flags.clear()
    ring.write(batch_of(0, RING - 1, Direction.H2C)[0])
    list(reader.fetch(RING - 1))
    assert reader.last_flags == [0] * (RING - 2) + [COMPLETED | EOP]


def test_the_count_is_followed_through_its_24_bits() -> None:
    ring, reader = prepared()
    ring.posted = ring.done = (1 << 24) - 5
    reader.report(ring.done + 3)
    assert ring.refresh() == (1 << 24) - 2
    reader.report(ring.done + 7)
    assert ring.refresh() == (1 << 24) + 5
    assert ring.refresh() == (1 << 24) + 5


def test_an_error_is_seen_beside_the_count() -> None:
    ring, reader = prepared()
    ring.write(batch_of(0, 4, Direction.H2C)[0])
    reader.report(2, error=True)
    assert ring.error
    assert ring.refresh() == 2


def test_preparing_anew_forgets_everything() -> None:
    control = make_control(shuffled=True)
    layout = Layout(0, Direction.C2H)
    prepare_ring(control, layout)
    ring, reader = Ring(control, layout), Reader(control, layout)
    ring.write(batch_of(0, 100, Direction.C2H)[0])
    reader.report(50, error=True)
    prepare_ring(control, layout)
    ring.restart()
    assert (ring.free, ring.error, ring.refresh()) == (RING - 1, False, 0)
    again = Reader(control, layout)
    batch, expected = batch_of(7, 3, Direction.C2H)
    ring.write(batch)
    assert list(again.fetch(3)) == expected


def test_rings_of_one_lease_do_not_overlap() -> None:
    spans = sorted(
        span
        for place in range(4)
        for direction in Direction
        for layout in [Layout(place, direction)]
        for span in (
            (layout.ring, layout.ring + RING * 32),
            (layout.metadata, layout.metadata + RING * 32),
            (layout.count, layout.count + 4),
        )
    )
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1][1] <= 4 * CONTROL_BYTES
    assert all(layout % 32 == 0 for layout, _ in spans)


@given(
    st.sampled_from(Direction),
    st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 30)), min_size=1, max_size=20),
    st.integers(0, 1 << 48),
)
def test_a_batch_covers_its_memory_once_and_in_order(
    direction: Direction, pieces: list[tuple[int, int]], address: int
) -> None:
    sg = SgList.of(pieces)
    batch = Batch.build(direction, sg, address)
    rows = batch.rows.view(np.uint32).reshape(len(batch), 8)[:, 1:6].tolist()
    assert batch.nbytes == sg.nbytes == sum(row[0] for row in rows)
    assert len(batch) == len(rows)
    card, place, left = address, 0, pieces[0][1]
    for length, source_lo, source_hi, destination_lo, destination_hi in rows:
        assert 0 < length <= DESC_MAX_LENGTH
        source, destination = source_hi << 32 | source_lo, destination_hi << 32 | destination_lo
        host, device = (
            (source, destination) if direction is Direction.H2C else (destination, source)
        )
        assert device == card
        iova, size = pieces[place]
        assert host == iova + size - left
        card += length
        left -= length
        if not left and place + 1 < len(pieces):
            place += 1
            left = pieces[place][1]
    assert left == 0


def test_control_memory_in_pieces_knows_where_every_byte_is() -> None:
    control = ControlMemory(memoryview(bytearray(4 * PAGE)), pages_of([3, 0, 2, 1], base=0))
    wanted = [0, PAGE - 1, PAGE, 2 * PAGE + 8, 4 * PAGE - 1]
    pages = [3, 3, 0, 2, 1]
    expected = [2 * PAGE * page + at % PAGE for page, at in zip(pages, wanted, strict=True)]
    assert [control.iova(at) for at in wanted] == expected
    assert control.iovas(np.array(wanted)).tolist() == expected


def test_metadata_slots_belong_to_their_descriptors() -> None:
    ring, reader = prepared(Direction.C2H)
    slot = RING - 1
    where = reader.layout.metadata + slot * 32
    reader.control.data[where : where + 8] = b"METADATA"
    assert ring.metadata[slot].tobytes() == b"METADATA"
    assert ring.metadata.shape == (RING, 8)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, RING - 1])
def test_batches_that_end_at_the_edges_of_blocks(size: int) -> None:
    ring, reader = prepared(shuffled=True)
    for _ in range(2 * RING // size + 2):
        batch, expected = batch_of(reader.fetched, size, Direction.H2C)
        ring.write(batch)
        assert list(reader.fetch(size)) == expected
        reader.report(reader.fetched)
        ring.refresh()
