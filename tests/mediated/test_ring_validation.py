# SPDX-License-Identifier: Apache-2.0
"""Ring contents of any kind: what is accepted lies in the lease's own buffers and card range."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.wire import rings
from holdfast.wire.rings import (
    DEPTH,
    MAX_BYTES,
    RING_BYTES,
    BufferTable,
    ClientEnd,
    KeeperEnd,
    Limits,
    Op,
    Status,
)

MASK = (1 << 64) - 1
Buffers = dict[int, tuple[list[tuple[int, int]], bool]]

pages = st.integers(1, 5).map(lambda count: count * 4096)
pieces = st.lists(st.tuples(st.integers(1, 1 << 20).map(lambda at: at << 24), pages), min_size=1,
                  max_size=4)  # fmt: skip
tables = st.dictionaries(
    st.integers(1, 9) | st.just(5 | 3 << 32), st.tuples(pieces, st.booleans()), max_size=4
)
limits = st.builds(
    lambda first, size, align: Limits(first, first + size, align),
    st.sampled_from([0, 4096, 1 << 40]),
    st.sampled_from([0, 64, 8192, 1 << 20]),
    st.sampled_from([1, 4, 64]),
)
near = st.sampled_from([0, 1, 63, 64, 4095, 4096, 8192, 1 << 20, (1 << 20) + 1, 1 << 40, MASK])
word = near | st.integers(0, 20480) | st.integers(0, MASK)
record = st.tuples(
    st.integers(0, MASK),
    st.sampled_from([1, 2, 1, 2, 0, 3, 1 | 1 << 32, MASK]),
    st.integers(0, 10) | st.just(5 | 3 << 32),
    word,
    word,
    word,
    st.sampled_from([0, 0, 0, 1]),
)


def table_of(buffers: Buffers) -> BufferTable:
    return BufferTable((number, found, writable) for number, (found, writable) in buffers.items())


def rows_of(found: list[tuple[int, ...]]) -> npt.NDArray[np.uint64]:
    rows = np.zeros((len(found), rings.WORDS), np.uint64)
    for row, (tag, op, buffer, offset, nbytes, card, reserved) in zip(rows, found, strict=True):
        row[:] = (tag, op, buffer, offset, nbytes, card, reserved, 0)
    return rows


def verdict(row: tuple[int, ...], buffers: Buffers, limit: Limits) -> Status:
    """The rules again, one record at a time, with integers that do not wrap."""
    _, op, buffer, offset, nbytes, card, reserved = row
    if op not in (1, 2) or reserved:
        return Status.BAD_OP
    if buffer not in buffers:
        return Status.FOREIGN
    found, writable = buffers[buffer]
    if not 0 < nbytes <= MAX_BYTES or offset + nbytes > sum(size for _, size in found):
        return Status.OUT_OF_BOUNDS
    if op == Op.FROM_CARD and not writable:
        return Status.DIRECTION
    if any(value % limit.align for value in (offset, nbytes, card)):
        return Status.ALIGNMENT
    if card < limit.card_first or card + nbytes > limit.card_end:
        return Status.CARD_RANGE
    return Status.DONE


@given(st.lists(record, min_size=1, max_size=20), tables, limits)
@settings(max_examples=150)
def test_each_record_gets_the_verdict_of_the_plain_rules(
    found: list[tuple[int, ...]], buffers: Buffers, limit: Limits
) -> None:
    checked = rings.check(rows_of(found), table_of(buffers), limit)
    got = checked.status.tolist() if checked.status is not None else [0] * len(found)
    assert got == [verdict(row, buffers, limit) for row in found]


def piece_by_piece(buffers: Buffers, number: int, offset: int, nbytes: int) -> list[int]:
    """Bus addresses of every 64th byte and the last of a range."""
    whole = np.concatenate([np.arange(iova, iova + size) for iova, size in buffers[number][0]])
    return [int(at) for at in whole[offset : offset + nbytes]]


@given(tables.filter(bool), st.data())
@settings(max_examples=60)
def test_pieces_are_the_bytes_that_were_named(buffers: Buffers, data: st.DataObject) -> None:
    named = []
    for number, (found, _) in data.draw(st.permutations(sorted(buffers.items()))):
        size = sum(each for _, each in found)
        offset = data.draw(st.integers(0, size - 1))
        named.append((number, offset, data.draw(st.integers(1, size - offset))))
    table = table_of(buffers)
    numbers, offsets, lengths = (np.array(column, np.uint64) for column in zip(*named, strict=True))
    place, known, _ = table.find(numbers)
    assert known.all()
    got = table.pieces(place, offsets, lengths)
    owner = got.owner if got.owner is not None else np.arange(len(got.iovas))
    for at, (number, offset, nbytes) in enumerate(named):
        mine = owner == at
        spans = zip(got.iovas[mine].tolist(), got.lengths[mine].tolist(), strict=True)
        assert [b for iova, size in spans for b in range(iova, iova + size)] == piece_by_piece(
            buffers, number, offset, nbytes
        )


@given(st.binary(max_size=RING_BYTES), tables, limits, st.integers(0, 2 * DEPTH))
@settings(max_examples=100)
def test_no_bytes_lead_outside_of_the_buffers(
    raw: bytes, buffers: Buffers, limit: Limits, submitted: int
) -> None:
    head = submitted.to_bytes(8, "little")
    checked, got = rings.feed(head + raw[8:], table_of(buffers), limit)
    assert len(checked) <= DEPTH
    inside = np.zeros(len(got.iovas), np.bool_)
    for found, _ in buffers.values():
        for iova, size in found:
            inside |= (got.iovas >= iova) & (got.iovas + got.lengths <= iova + size)
    assert inside.all()


def ends() -> tuple[KeeperEnd, ClientEnd]:
    memory = memoryview(bytearray(RING_BYTES))
    return KeeperEnd(memory), ClientEnd(memory)


def test_records_and_completions_pass_through_whole_laps_in_order() -> None:
    keeper, client = ends()
    random = np.random.default_rng(5)
    sent = told = 0
    while told < 5 * DEPTH:
        count = int(random.integers(1, DEPTH - (sent - told) + 1)) if sent - told < DEPTH else 0
        rows = rings.records(Op.TO_CARD, 1, np.zeros(count), 1, 0)
        rows[:, 0] = np.arange(sent, sent + count)
        client.submit(rows)
        sent += count
        taken = int(random.integers(0, keeper.waiting() + 1))
        tags = keeper.copy(taken)[:, 0]
        keeper.consume(taken)
        keeper.put(rings.completions(tags, 0, 1))
        keeper.publish()
        seen: Any = client.reap()
        if taken:
            assert seen["tag"].tolist() == list(range(told, told + taken))
            told += taken
        else:
            assert seen is None


def test_a_copy_does_not_change_when_the_client_scribbles_later() -> None:
    keeper, client = ends()
    client.submit(rings.records(Op.TO_CARD, 1, [0, 1], [7, 8], 0))
    copied = keeper.copy(2)
    client._records[:] = MASK
    assert copied[:, 4].tolist() == [7, 8]


def test_a_count_that_the_ring_cannot_hold_is_seen_as_such() -> None:
    keeper, client = ends()
    for lie in (DEPTH + 1, MASK, 1 << 63):
        client._words[0] = lie
        assert keeper.waiting() > DEPTH


def test_what_a_keeper_writes_is_not_read_back() -> None:
    keeper, client = ends()
    tags = np.arange(3, dtype=np.uint64)
    keeper.put(rings.completions(tags, 0, 1))
    client._words[8] = MASK
    keeper.put(rings.completions(tags, 0, 1))
    keeper.publish()
    assert keeper.produced == 6
    assert client._words[8] == 6
