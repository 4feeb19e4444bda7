# SPDX-License-Identifier: Apache-2.0
"""The journal never forgets a mapping before it is proven gone, and says when it is damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from holdfast.keeper.journal import (
    CAPACITY,
    RECORD,
    Contents,
    Corrupt,
    Entry,
    HostRecord,
    Journal,
    LeaseRecord,
    Mark,
    Memory,
    Stage,
    What,
)
from holdfast.keeper.map_state import IllegalMapping, MapState
from holdfast.values import Iova, LeaseId

PAGE = 4096
ONE = LeaseId(1)


def entry(lease: int = 1, page: int = 1, *, state: MapState = MapState.ANCHORED) -> Entry:
    return Entry(0, LeaseId(lease), Iova(page * PAGE), PAGE, held=page, seq=3, state=state)


@pytest.fixture
def journal() -> Iterator[Journal]:
    made = Journal.create()
    yield made
    made.close_file()


def successor(journal: Journal) -> Contents:
    """What another process would read."""
    again, contents = Journal.open(os.dup(journal.fd))
    again.close_file()
    return contents


@pytest.mark.parametrize(
    ("state", "unmapped", "gone"),
    [
        (MapState.RESERVED, 0, True),  # reserved and never mapped: nothing to find is right
        (MapState.RESERVED, PAGE, True),
        (MapState.RESERVED, PAGE - 1, False),
        (MapState.MAPPED, 0, False),
        (MapState.MAPPED, PAGE, True),
        (MapState.MAPPED, PAGE // 2, False),
        (MapState.MAPPED, 2 * PAGE, False),
        (MapState.UNMAPPING, 0, True),  # a keeper that died may have done it
        (MapState.UNMAPPING, PAGE, True),
        (MapState.UNMAPPING, PAGE // 2, False),
    ],
)
def test_what_an_unmap_must_take_away(state: MapState, unmapped: int, gone: bool) -> None:
    assert entry(state=state).unmapped_in_full(unmapped) is gone


def test_what_is_reserved_counts_until_it_is_closed(journal: Journal) -> None:
    reserved = journal.reserve(entry())
    assert journal.entries(ONE) == (reserved,)
    confirmed = journal.confirm(reserved)
    assert confirmed.confirmed
    assert journal.entries(ONE) == (confirmed,)
    journal.close(journal.unmapping(confirmed))
    assert journal.entries(ONE) == ()


@pytest.mark.parametrize("state", set(MapState) - {MapState.ANCHORED})
def test_nothing_is_reserved_that_the_anchor_has_not_acknowledged(
    journal: Journal, state: MapState
) -> None:
    with pytest.raises(IllegalMapping):
        journal.reserve(entry(state=state))
    assert journal.entries(ONE) == ()
    assert not successor(journal).entries
    journal.reserve(entry(state=MapState.HELD).anchored())  # the control


def test_an_entry_is_not_anchored_by_being_made_and_is_so_once() -> None:
    made = Entry(0, ONE, Iova(PAGE), PAGE)
    assert made.state is MapState.HELD
    with pytest.raises(IllegalMapping):
        made.anchored().anchored()


def test_nothing_is_closed_that_was_not_being_unmapped(journal: Journal) -> None:
    confirmed = journal.confirm(journal.reserve(entry()))
    with pytest.raises(IllegalMapping):
        journal.close(confirmed)
    assert journal.entries(ONE) == (confirmed,)


def test_a_successor_reads_everything_that_was_written(journal: Journal) -> None:
    mapped = journal.confirm(journal.reserve(entry()))
    going = journal.unmapping(journal.confirm(journal.reserve(entry(2, 5))))
    pin = replace(entry(2, 9), what=What.RELAYED, address=0x7FFF_0000_1234, writable=False)
    pin = journal.reserve(pin)
    retired = journal.retire(journal.unmapping(journal.reserve(entry(3, 20))))
    memory = Memory(77, LeaseId(2), 3 * PAGE, What.CONTROL, 8)
    journal.hold(memory)
    marks = Mark.CLAIMED | Mark.GOODBYE
    lease = LeaseRecord(
        LeaseId(2),
        Stage.ENDING,
        marks,
        1,
        2,
        4_000_000,
        1000,
        1001,
        0b1010,
        1 << 63,
        12345,
        1 << 62,
    )
    journal.lease(lease)
    journal.host(HostRecord(9, 4))
    found = successor(journal)
    assert found.host == HostRecord(9, 4)
    assert found.leases == {lease.number: lease}
    assert found.entries == {each.number: each for each in (mapped, going, pin, retired)}
    assert found.memory == {77: memory}


def test_what_was_ended_and_let_go_is_not_there_any_more(journal: Journal) -> None:
    marks = Mark.CLAIMED
    journal.lease(LeaseRecord(ONE, Stage.ALIVE, marks, 0, 0, 1, 0, 0, 0, 0, 0))
    journal.hold(Memory(1, ONE, PAGE, What.SLAB))
    retired = journal.retire(journal.unmapping(journal.reserve(entry())))
    journal.let_go(1)
    journal.end_lease(ONE)
    journal.reinstate(retired.iova)
    found = successor(journal)
    assert not found.leases
    assert not found.entries
    assert not found.memory


def test_a_successor_goes_on_writing_where_nothing_is(journal: Journal) -> None:
    kept = [journal.reserve(entry(1, page)) for page in range(40)]
    for each in kept[10:30]:
        journal.close(journal.unmapping(each))
    again, _ = Journal.open(os.dup(journal.fd))
    more = [again.reserve(entry(2, 100 + page)) for page in range(60)]
    found = successor(again)
    again.close_file()
    assert found.entries == {each.number: each for each in [*kept[:10], *kept[30:], *more]}


@given(place=st.integers(0, 5 * RECORD - 1), flip=st.integers(1, 255))
def test_any_damaged_byte_is_noticed(place: int, flip: int) -> None:
    journal = Journal.create()
    try:
        for page in range(4):
            journal.confirm(journal.reserve(entry(1, page)))
        byte = os.pread(journal.fd, 1, place)[0]
        os.pwrite(journal.fd, bytes([byte ^ flip]), place)
        with pytest.raises(Corrupt):
            Journal.open(os.dup(journal.fd))
    finally:
        journal.close_file()


@given(cut=st.integers(1, RECORD - 1))
def test_a_record_that_was_written_in_part_is_noticed(cut: int) -> None:
    journal = Journal.create()
    try:
        journal.reserve(entry())
        record = os.pread(journal.fd, RECORD, RECORD)
        assume(any(record[cut:]))
        os.pwrite(journal.fd, record[:cut] + bytes(RECORD - cut), RECORD)
        with pytest.raises(Corrupt):
            Journal.open(os.dup(journal.fd))
    finally:
        journal.close_file()


def test_a_file_that_was_never_a_journal_is_refused() -> None:
    fd = os.memfd_create("empty", os.MFD_CLOEXEC)
    os.ftruncate(fd, CAPACITY * RECORD)
    with pytest.raises(Corrupt):
        Journal.open(fd)


def test_a_record_that_is_there_twice_is_noticed(journal: Journal) -> None:
    journal.reserve(entry())
    os.pwrite(journal.fd, os.pread(journal.fd, RECORD, RECORD), 2 * RECORD)
    with pytest.raises(Corrupt):
        successor(journal)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "confirm", "close"]), st.integers(1, 3), st.integers(0, 9)
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_leases_never_see_each_others_entries(operations: list[tuple[str, int, int]]) -> None:
    journal = Journal.create()
    model: dict[LeaseId, dict[int, Entry]] = {}
    for what, number, place in operations:
        lease = LeaseId(number)
        mine = model.setdefault(lease, {})
        chosen = list(mine.values())[place % len(mine)] if mine else None
        if what == "reserve":
            made = journal.reserve(entry(number, place))
            mine[made.number] = made
        elif chosen is not None and what == "confirm" and not chosen.confirmed:
            mine[chosen.number] = journal.confirm(chosen)
        elif chosen is not None and what == "close":
            journal.close(journal.unmapping(chosen))
            del mine[chosen.number]
        for each, entries in model.items():
            assert journal.entries(each) == tuple(entries.values())
    written = {each.number: each for entries in model.values() for each in entries.values()}
    assert successor(journal).entries == written
    journal.close_file()
