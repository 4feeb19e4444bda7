# SPDX-License-Identifier: Apache-2.0
"""A successor's address space: what the predecessor handed out is never handed out again."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.dma.iova import IovaSpace
from holdfast.errors import IovaExhausted, UsageError

G = 4096
BASE, LIMIT = 16 * G, 80 * G


def taken(space: IovaSpace, *sizes: int) -> list[tuple[int, int]]:
    return [(int(space.take(size)), size) for size in sizes]


def exhausted(space: IovaSpace) -> list[tuple[int, int]]:
    """Take single granules until there are none."""
    found: list[tuple[int, int]] = []
    while True:
        try:
            found += taken(space, G)
        except IovaExhausted:
            return found


def test_the_cursor_starts_above_the_highest_claim() -> None:
    space = IovaSpace(BASE, LIMIT)
    space.claim(BASE + 20 * G, 3 * G)
    space.claim(BASE, G)
    assert space.take(G) == BASE + 24 * G
    assert space.in_use == 5 * G


def test_what_is_free_below_the_claims_comes_in_the_next_round() -> None:
    space = IovaSpace(BASE, LIMIT)
    space.claim(LIMIT - 2 * G, 2 * G)
    space.claim(BASE + 5 * G, G)
    assert space.take(4 * G) == BASE
    assert space.take(8 * G) == BASE + 7 * G


def test_a_retired_claim_comes_back_only_when_it_is_reinstated() -> None:
    space = IovaSpace(BASE, LIMIT)
    space.claim(BASE, LIMIT - BASE - G, retired=True)
    assert (space.in_use, space.retired) == (0, LIMIT - BASE - G)
    with pytest.raises(IovaExhausted):
        space.take(2 * G)
    with pytest.raises(UsageError):
        space.give_back(BASE, LIMIT - BASE - G)
    space.reinstate(BASE, LIMIT - BASE - G)
    assert space.take(2 * G) == BASE
    assert space.retired == 0


def test_a_claim_given_back_before_the_first_take_is_not_claimed_twice() -> None:
    space = IovaSpace(BASE, LIMIT)
    space.claim(BASE, G)
    space.give_back(BASE, G)
    with pytest.raises(UsageError, match="overlaps"):
        space.claim(BASE, G)
    assert space.in_use == 0
    assert space.take(G) == BASE + 2 * G
    ranges = exhausted(space)
    assert (BASE, G) in ranges


@pytest.mark.parametrize(
    ("iova", "size"),
    [
        (BASE - G, G),
        (BASE + 1, G),
        (LIMIT - G, 2 * G),
        (LIMIT, G),
        (BASE + 10 * G, G),
        (BASE + 9 * G, 2 * G),
        (BASE + 11 * G, G),  # where the guard of the one below is
        (BASE + 9 * G, G),  # its own guard would be the one above
        (BASE + 30 * G, 0),
        (BASE + 30 * G, -1),
        (1 << 64, G),
    ],
)
def test_foreign_and_overlapping_ranges_are_refused(iova: int, size: int) -> None:
    space = IovaSpace(BASE, LIMIT)
    space.claim(BASE + 10 * G, G)
    with pytest.raises(UsageError):
        space.claim(iova, size)
    assert (space.in_use, space.retired) == (G, 0)
    assert space.take(G) == BASE + 12 * G


def test_nothing_is_claimed_after_the_first_take() -> None:
    space = IovaSpace(BASE, LIMIT)
    space.take(G)
    with pytest.raises(UsageError, match="already"):
        space.claim(BASE + 10 * G, G)


def test_a_full_space_can_be_claimed_to_its_end() -> None:
    before = IovaSpace(BASE, LIMIT)
    ranges = exhausted(before)
    after = IovaSpace(BASE, LIMIT)
    for iova, size in ranges:
        after.claim(iova, size)
    with pytest.raises(IovaExhausted):
        after.take(1)
    after.give_back(*ranges[3])
    assert after.take(1) == ranges[3][0]


steps = st.lists(
    st.tuples(st.sampled_from(["take", "give", "retire"]), st.integers(1, 9)), max_size=60
)


@given(steps, st.randoms(use_true_random=False))
def test_a_successor_never_hands_out_what_its_predecessor_did(
    script: list[tuple[str, int]], random: Random
) -> None:
    """Whatever happened before, rounds that went round included."""
    before = IovaSpace(BASE, LIMIT)
    live: list[tuple[int, int]] = []
    retired: list[tuple[int, int]] = []
    for what, number in script:
        if what == "take":
            try:
                live += taken(before, number * G - number)
            except IovaExhausted:
                continue
        elif live:
            one = live.pop(number % len(live))
            (before.give_back if what == "give" else before.retire)(*one)
            retired += [one] if what == "retire" else []
    after = IovaSpace(BASE, LIMIT)
    claims = [(one, False) for one in live] + [(one, True) for one in retired]
    random.shuffle(claims)
    for (iova, size), gone in claims:
        after.claim(iova, size, retired=gone)
    assert (after.in_use, after.retired) == (before.in_use, before.retired)
    fresh = exhausted(after)
    top = max((iova + size for (iova, size), _ in claims), default=0)
    assert not fresh or fresh[0][0] >= top or not any(iova > top for iova, _ in fresh)
    everything = sorted(live + retired + fresh)
    for (start, size), (following, _) in pairwise(everything):
        assert -(-(start + size) // G) * G + G <= following
    # Nothing is lost: once all is given back, the whole space is there again.
    for one in live + fresh:
        after.give_back(*one)
    for one in retired:
        after.reinstate(*one)
    assert after.take(LIMIT - BASE) == BASE
