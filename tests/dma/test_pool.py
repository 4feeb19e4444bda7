# SPDX-License-Identifier: Apache-2.0
"""Pieces of a slab never overlap, and everything given back is whole again."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from holdfast.dma.pool import Pool
from holdfast.errors import UsageError


def test_pieces_are_rounded_and_counted() -> None:
    pool = Pool(4096)
    assert pool.take(1, 1) == 0
    assert pool.take(65, 64) == 64
    assert pool.take(64, 64) == 192
    assert pool.in_use == 256


def test_the_smallest_piece_that_fits_is_used() -> None:
    pool = Pool(4096)
    offsets = [pool.take(size, 64) for size in (512, 64, 128, 64)]
    assert offsets[0] is not None
    assert offsets[2] is not None
    pool.give_back(offsets[0])
    pool.give_back(offsets[2])
    assert pool.take(100, 64) == offsets[2]
    assert pool.take(100, 64) == offsets[0]


def test_a_larger_alignment_is_met_and_the_gap_stays_usable() -> None:
    pool = Pool(8192)
    assert pool.take(64, 64) == 0
    assert pool.take(64, 4096) == 4096
    assert pool.take(4032, 64) == 64


def test_an_alignment_that_only_a_larger_piece_has_is_found() -> None:
    pool = Pool(16384)
    first = pool.take(64, 64)
    second = pool.take(4096, 64)
    pool.take(64, 64)
    assert first is not None
    assert second is not None
    pool.give_back(second)  # free: exactly 4096 bytes, misaligned
    assert pool.take(4096, 4096) == 8192


def test_what_does_not_fit_is_none_and_nothing_changes() -> None:
    pool = Pool(4096)
    assert pool.take(4097, 64) is None
    assert pool.take(4096, 64) == 0
    assert pool.take(1, 1) is None


def test_a_slab_of_an_odd_size_has_no_piece_beyond_its_last_whole_line() -> None:
    pool = Pool(100)
    assert pool.take(64, 64) == 0
    assert pool.take(1, 1) is None
    assert Pool(10).take(1, 1) is None


def test_wrong_use_is_refused() -> None:
    pool = Pool(4096)
    offset = pool.take(100, 64)
    assert offset is not None
    with pytest.raises(UsageError):
        pool.give_back(offset + 64)
    pool.give_back(offset)
    with pytest.raises(UsageError):
        pool.give_back(offset)
    with pytest.raises(UsageError):
        pool.take(0, 64)
    with pytest.raises(UsageError):
        pool.take(64, 3)
    with pytest.raises(UsageError):
        Pool(4096, align=48)


class Machine(RuleBasedStateMachine):
    """Random use against a set of 64-byte lines."""

    LINES = 64

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(self.LINES * 64)
        self.live: dict[int, range] = {}

    def taken(self) -> set[int]:
        return {line for lines in self.live.values() for line in lines}

    @rule(nbytes=st.integers(1, 20 * 64), power=st.integers(0, 10))
    def take(self, nbytes: int, power: int) -> None:
        align, lines = 1 << power, -(-nbytes // 64)
        offset = self.pool.take(nbytes, align)
        if offset is None:
            step = max(align // 64, 1)
            assert not any(
                self.taken().isdisjoint(range(start, start + lines))
                for start in range(0, self.LINES - lines + 1, step)
            )
            return
        assert offset % max(align, 64) == 0
        fresh = range(offset // 64, offset // 64 + lines)
        assert fresh[-1] < self.LINES
        assert self.taken().isdisjoint(fresh)
        self.live[offset] = fresh

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[offset]
        self.pool.give_back(offset)

    @invariant()
    def the_count_is_right(self) -> None:
        assert self.pool.in_use == 64 * len(self.taken())

    def teardown(self) -> None:
        for offset in self.live:
            self.pool.give_back(offset)
        assert self.pool.take(self.LINES * 64, 64) == 0


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestRandomUse = Machine.TestCase
