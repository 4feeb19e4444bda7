# SPDX-License-Identifier: Apache-2.0
"""Frames are recycled last in, first out, and never twice."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.dma.arena import FramePool
from holdfast.errors import OutOfMemory, UsageError

F = 4096


def test_fresh_frames_come_from_the_start_in_one_extent() -> None:
    pool = FramePool(8, F)
    assert pool.take(3 * F - 1) == [(0, 3 * F)]
    assert pool.take(1) == [(3 * F, F)]
    assert pool.free_bytes == 4 * F


def test_the_frames_freed_last_come_first() -> None:
    pool = FramePool(8, F)
    first, _, third = pool.take(F), pool.take(F), pool.take(2 * F)
    pool.give_back(first)
    pool.give_back(third)
    assert pool.take(F) == [(2 * F, F)]
    assert pool.take(2 * F) == [(3 * F, F), (0, F)]


def test_the_next_lease_gets_exactly_the_memory_of_the_last_one() -> None:
    pool = FramePool(64, F)
    scattered = pool.take(4 * F)
    pool.give_back(scattered[:1])
    memory = pool.take(7 * F)
    pool.give_back(memory)
    assert pool.take(7 * F) == memory


def test_all_or_nothing() -> None:
    pool = FramePool(4, F)
    with pytest.raises(OutOfMemory, match="16385 bytes asked for, 16384 of 16384 are free"):
        pool.take(4 * F + 1)
    assert pool.take(4 * F) == [(0, 4 * F)]
    with pytest.raises(OutOfMemory):
        pool.take(1)


def test_a_part_of_an_extent_can_be_given_back() -> None:
    pool = FramePool(4, F)
    pool.take(4 * F)
    pool.give_back([(F, 2 * F)])
    assert pool.take(2 * F) == [(F, 2 * F)]


@pytest.mark.parametrize(
    "extents",
    [
        [(4 * F, F)],  # never taken
        [(0, F), (0, F)],  # twice in one call
        [(0, 2 * F), (F, F)],  # overlapping
        [(1, F)],
        [(0, 100)],
        [(-F, F)],
        [(0, 0)],
        [(0, 9 * F)],
        [(1 << 62, 1 << 62)],
    ],
)
def test_what_was_not_taken_cannot_be_freed(extents: list[tuple[int, int]]) -> None:
    pool = FramePool(8, F)
    pool.take(4 * F)
    with pytest.raises(UsageError):
        pool.give_back(extents)
    assert pool.free_bytes == 4 * F
    pool.give_back([(0, 4 * F)])
    assert pool.free_bytes == 8 * F


def test_a_double_free_is_an_error() -> None:
    pool = FramePool(8, F)
    extents = pool.take(2 * F)
    pool.give_back(extents)
    with pytest.raises(UsageError):
        pool.give_back(extents)


def test_nothing_can_be_asked_for_and_given_back_by_mistake() -> None:
    pool = FramePool(8, F)
    pool.give_back([])
    with pytest.raises(UsageError):
        pool.take(0)
    with pytest.raises(UsageError):
        FramePool(0, F)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_it_behaves_like_a_list_used_as_a_stack(steps: list[tuple[bool, int]]) -> None:
    pool, stack = FramePool(16, F), list(range(15, -1, -1))
    held: list[list[tuple[int, int]]] = []
    for take, number in steps:
        if take and number:
            if number > len(stack):
                with pytest.raises(OutOfMemory):
                    pool.take(number * F)
                continue
            extents = pool.take(number * F)
            frames = [f for o, s in extents for f in range(o // F, (o + s) // F)]
            assert frames == [stack.pop() for _ in range(number)]
            # As few extents as there are runs.
            assert len(extents) == 1 + sum(b != a + 1 for a, b in pairwise(frames))
            held.append(extents)
        elif not take and held:
            extents = held.pop(number % len(held))
            pool.give_back(extents)
            stack += [f for o, s in extents for f in range(o // F, (o + s) // F)][::-1]
        assert pool.free_bytes == len(stack) * F


def test_a_gigabyte_costs_milliseconds() -> None:
    pool = FramePool(1 << 18, F)
    start = time.perf_counter()
    pool.give_back(pool.take(1 << 30))
    assert time.perf_counter() - start < 0.5
