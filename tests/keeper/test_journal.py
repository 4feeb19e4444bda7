# SPDX-License-Identifier: Apache-2.0
"""The journal never forgets a mapping before it is proven gone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.keeper.journal import Entry, MemoryJournal
from holdfast.values import Iova, LeaseId

PAGE = 4096


def entry(*, confirmed: bool) -> Entry:
    return Entry(1, LeaseId(1), Iova(0x1000), PAGE, confirmed)


@pytest.mark.parametrize(
    ("confirmed", "unmapped", "gone"),
    [
        (False, 0, True),  # reserved and never mapped: nothing to find is right
        (False, PAGE, True),
        (False, PAGE - 1, False),
        (True, 0, False),
        (True, PAGE, True),
        (True, PAGE // 2, False),
        (True, 2 * PAGE, False),
    ],
)
def test_what_an_unmap_must_take_away(confirmed: bool, unmapped: int, gone: bool) -> None:
    assert entry(confirmed=confirmed).unmapped_in_full(unmapped) is gone


def test_what_is_reserved_counts_until_it_is_closed() -> None:
    journal = MemoryJournal()
    reserved = journal.reserve(LeaseId(1), Iova(0x1000), PAGE)
    assert journal.entries(LeaseId(1)) == (reserved,)
    confirmed = journal.confirm(reserved)
    assert confirmed.confirmed
    assert journal.entries(LeaseId(1)) == (confirmed,)
    journal.close(reserved)
    assert journal.entries(LeaseId(1)) == ()


def test_an_entry_is_closed_only_once() -> None:
    journal = MemoryJournal()
    first = journal.reserve(LeaseId(1), Iova(0x1000), PAGE)
    journal.close(first)
    with pytest.raises(KeyError):
        journal.close(first)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "confirm", "close"]), st.integers(1, 3), st.integers(0, 9)
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_leases_never_see_each_others_entries(operations: list[tuple[str, int, int]]) -> None:
    journal = MemoryJournal()
    model: dict[LeaseId, dict[int, Entry]] = {}
    for what, number, place in operations:
        lease = LeaseId(number)
        mine = model.setdefault(lease, {})
        chosen = list(mine.values())[place % len(mine)] if mine else None
        if what == "reserve":
            made = journal.reserve(lease, Iova(place * PAGE), PAGE)
            mine[made.number] = made
        elif chosen is not None and what == "confirm":
            mine[chosen.number] = journal.confirm(chosen)
        elif chosen is not None:
            journal.close(chosen)
            del mine[chosen.number]
        for each, entries in model.items():
            assert journal.entries(each) == tuple(entries.values())
