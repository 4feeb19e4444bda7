# SPDX-License-Identifier: Apache-2.0
"""IOVAs rise, never overlap, and retired ones do not come back by themselves."""

from __future__ import annotations

import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from holdfast.dma.iova import IovaSpace
from holdfast.errors import IovaExhausted, UsageError
from holdfast.values import Iova

PAGE = 4096


def test_addresses_rise_with_a_guard_between_neighbours() -> None:
    space = IovaSpace(0x10000, 1 << 32)
    first, second = space.take(1), space.take(PAGE + 1)
    third = space.take(PAGE)
    assert (first, second, third) == (0x10000, 0x10000 + 2 * PAGE, 0x10000 + 5 * PAGE)
    assert isinstance(first, Iova)
    assert space.in_use == 4 * PAGE


def test_a_range_given_back_waits_for_the_wrap() -> None:
    space = IovaSpace(0, 8 * PAGE)
    first = space.take(PAGE)
    space.give_back(first, PAGE)
    assert space.take(PAGE) > first
    assert space.take(PAGE) > first
    assert space.take(PAGE) > first
    assert space.take(PAGE) == first


def test_a_range_given_back_ahead_of_the_cursor_waits_for_the_next_wrap_too() -> None:
    space = IovaSpace(0, 8 * PAGE)
    ranges = [space.take(PAGE) for _ in range(4)]
    for iova in ranges[:3]:
        space.give_back(iova, PAGE)
    assert space.take(PAGE) == ranges[0]
    space.give_back(ranges[3], PAGE)
    assert [space.take(PAGE), space.take(PAGE)] == ranges[1:3]
    space.give_back(ranges[0], PAGE)
    assert space.take(PAGE) == ranges[0]
    assert space.take(PAGE) == ranges[3]


def test_the_last_bytes_below_the_limit_can_be_had() -> None:
    space = IovaSpace(0, 4 * PAGE)
    assert space.take(4 * PAGE) == 0


def test_free_neighbours_are_one_range_after_the_wrap() -> None:
    space = IovaSpace(0, 8 * PAGE)
    for iova in [space.take(PAGE) for _ in range(4)]:
        space.give_back(iova, PAGE)
    assert space.take(8 * PAGE) == 0


def test_retired_ranges_return_only_when_reinstated() -> None:
    space = IovaSpace(0, 2 * PAGE)
    iova = space.take(2 * PAGE)
    space.retire(iova, 2 * PAGE)
    assert (space.in_use, space.retired) == (0, 2 * PAGE)
    with pytest.raises(IovaExhausted, match="retired 0x2000"):
        space.take(PAGE)
    space.reinstate(iova, 2 * PAGE)
    assert space.retired == 0
    assert space.take(2 * PAGE) == iova


def test_a_request_that_cannot_be_met_does_not_bring_addresses_back_sooner() -> None:
    space = IovaSpace(0, 16 * PAGE)
    first = space.take(PAGE)
    space.give_back(first, PAGE)
    second = space.take(PAGE)
    with pytest.raises(IovaExhausted):
        space.take(1 << 40)
    assert space.take(PAGE) > second


def test_a_smaller_request_still_wraps_after_a_larger_one_failed() -> None:
    space = IovaSpace(0, 8 * PAGE)
    ranges = [space.take(PAGE) for _ in range(4)]
    space.give_back(ranges[1], PAGE)
    for _ in range(2):
        with pytest.raises(IovaExhausted, match="largest free range 0x1000"):
            space.take(2 * PAGE)
    assert space.take(PAGE) == ranges[1]


@pytest.mark.parametrize("how", ["give_back", "retire", "reinstate"])
def test_only_whole_ranges_in_the_right_state_change_it(how: str) -> None:
    space = IovaSpace(0, 1 << 20)
    iova = space.take(2 * PAGE)
    change = getattr(space, how)
    for wrong, size in [(iova + PAGE, PAGE), (iova, PAGE), (iova, 3 * PAGE), (1 << 19, PAGE)]:
        with pytest.raises(UsageError):
            change(wrong, size)
    if how == "reinstate":
        space.retire(iova, 2 * PAGE)
    change(iova, 2 * PAGE)
    with pytest.raises(UsageError):
        change(iova, 2 * PAGE)


@pytest.mark.parametrize(("base", "limit"), [(1, PAGE), (0, 0), (PAGE, PAGE), (0, 100), (-PAGE, 0)])
def test_a_space_is_made_of_whole_granules(base: int, limit: int) -> None:
    with pytest.raises(UsageError):
        IovaSpace(base, limit)


@pytest.mark.parametrize("size", [0, -1])
def test_an_empty_range_is_refused(size: int) -> None:
    with pytest.raises(UsageError):
        IovaSpace(0, PAGE).take(size)


def test_a_hundred_thousand_live_ranges_do_not_slow_it_down() -> None:
    space = IovaSpace(0, 200_000 * PAGE)
    ranges = [space.take(PAGE) for _ in range(100_000)]
    for iova in ranges[::2]:
        space.give_back(iova, PAGE)
    space.take(PAGE)  # wraps: the one slow step
    start = time.perf_counter()
    for _ in range(20_000):
        space.give_back(space.take(PAGE), PAGE)
    # 3 us each when measured; a scan of the ranges would take milliseconds each.
    assert time.perf_counter() - start < 4


class Machine(RuleBasedStateMachine):
    """Random use of a small space against a set of pages."""

    LIMIT = 64

    def __init__(self) -> None:
        super().__init__()
        self.space = IovaSpace(PAGE, self.LIMIT * PAGE)
        self.live: dict[Iova, int] = {}
        self.retired: dict[Iova, int] = {}

    @rule(size=st.integers(1, 12 * PAGE))
    def take(self, size: int) -> None:
        before = self.pages()
        try:
            iova = self.space.take(size)
        except IovaExhausted:
            # Even the best packing has no room: no gap with its guards is large enough.
            assert not self.gap(before, -(-size // PAGE))
            return
        assert iova >= PAGE
        assert iova + size <= self.LIMIT * PAGE
        fresh = range(iova // PAGE, (iova + size - 1) // PAGE + 1)
        # With a free page to either side, as far as the space goes.
        assert not before & {*fresh, fresh[0] - 1, fresh[-1] + 1}
        self.live[iova] = size

    def pages(self) -> set[int]:
        return {
            page
            for iova, size in [*self.live.items(), *self.retired.items()]
            for page in range(iova // PAGE, (iova + size - 1) // PAGE + 1)
        }

    def gap(self, taken: set[int], pages: int) -> bool:
        """Whether ``pages`` free ones lie together, one more behind, and behind every guard."""
        guarded = taken | {page + 1 for page in taken}
        return any(
            not guarded & set(range(start, start + pages)) and start + pages not in taken
            for start in range(1, self.LIMIT - pages + 1)
        )

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        iova = data.draw(st.sampled_from(sorted(self.live)))
        self.space.give_back(iova, self.live.pop(iova))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        iova = data.draw(st.sampled_from(sorted(self.live)))
        self.retired[iova] = self.live.pop(iova)
        self.space.retire(iova, self.retired[iova])

    @precondition(lambda self: self.retired)
    @rule(data=st.data())
    def reinstate(self, data: st.DataObject) -> None:
        iova = data.draw(st.sampled_from(sorted(self.retired)))
        self.space.reinstate(iova, self.retired.pop(iova))

    @invariant()
    def counters_are_right(self) -> None:
        def rounded(sizes: dict[Iova, int]) -> int:
            return sum(-(-size // PAGE) * PAGE for size in sizes.values())

        assert self.space.in_use == rounded(self.live)
        assert self.space.retired == rounded(self.retired)


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRandomUse = Machine.TestCase
