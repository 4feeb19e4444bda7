# SPDX-License-Identifier: Apache-2.0
"""The set of states against a dictionary: numbers, what was new, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast.spec import store as module
from holdfast.spec.layout import U64
from holdfast.spec.store import Store

Packed = tuple[int, ...]
Hash = Callable[[list[U64]], U64]


def words_of(states: Sequence[Packed], count: int) -> list[U64]:
    return [np.array([state[at] for state in states], np.uint64) for at in range(count)]


def states_in(words: Sequence[U64]) -> list[Packed]:
    return list(zip(*(word.tolist() for word in words), strict=True))


class Checked:
    """A store and the dictionary that it must be like."""

    def __init__(self, words: int) -> None:
        self._words = words
        self._store = Store(words)
        self._plain: dict[Packed, int] = {}

    def add(self, states: Sequence[Packed]) -> None:
        known = set(self._plain)
        new, numbers = [], []
        for row, state in enumerate(states):
            if state not in self._plain:
                self._plain[state] = len(self._plain)
                new.append(row)
            numbers.append(self._plain[state])
        words = words_of(states, self._words)
        told, rows = self._store.add(words)
        assert told.tolist() == numbers, "numbers are given in the order of first appearance"
        assert rows.tolist() == new, "rows that were new"
        assert states_in(words) == list(states), "the batch is not changed"
        self.check()
        assert all(state in known for row, state in enumerate(states) if numbers[row] < len(known))

    def check(self) -> None:
        assert len(self._store) == self._store.count == len(self._plain)
        assert states_in(self._store.words()) == list(self._plain)


@contextmanager
def small(hashed: Hash | None = None, smallest: int = 2) -> Iterator[None]:
    """Stores begin tiny, so that they grow; and states may have few hashes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SMALLEST", smallest)
        if hashed is not None:
            patch.setattr(module, "_hashed", hashed)
        yield


def one_hash(words: list[U64]) -> U64:
    return np.zeros_like(words[0])


def few_hashes(words: list[U64]) -> U64:
    return words[0] & np.uint64(3)


def last_place(words: list[U64]) -> U64:
    """Everything begins at the end of the table, and goes on at its beginning."""
    return np.full_like(words[0], (1 << 64) - 1)


def backwards(words: list[U64]) -> U64:
    """Who comes later wants a place before, and is found there first."""
    return np.uint64((1 << 64) - 1) - words[0]


HASHES = (None, one_hash, few_hashes, last_place, backwards)


def batches(words: int) -> st.SearchStrategy[list[list[Packed]]]:
    """Few different states, so that most are there several times; some with high bits."""
    one = st.one_of(st.integers(0, 5), st.sampled_from([1 << 63, (1 << 64) - 1, 1 << 32]))
    state = st.tuples(*[one] * words)
    return st.lists(st.lists(state, max_size=12), max_size=6)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[int, list[list[Packed]]]:
    words = draw(st.integers(1, 4))
    return words, draw(batches(words))


@pytest.mark.parametrize("hashed", HASHES, ids=lambda each: each.__name__ if each else "as it is")
@settings(max_examples=35)
@given(rounds())
@example((1, [[]]))
@example((2, [[(3, 0), (3, 1), (3, 0), (2, 1)], [(3, 1), (7, 0), (3, 0)]]))
@example((1, [[(5,), (4,), (3,), (5,)], [(0,), (5,), (1,), (2,), (0,)], [(2,)]]))
def test_states_are_numbered_as_in_a_dictionary(
    hashed: Hash | None, drawn: tuple[int, list[list[Packed]]]
) -> None:
    words, told = drawn
    with small(hashed):
        checked = Checked(words)
        for states in told:
            checked.add(states)


def test_many_states_in_many_rounds_are_numbered_as_in_a_dictionary() -> None:
    """In the store's real sizes: it grows several times."""
    random = np.random.default_rng(1)
    checked = Checked(2)
    for size in (3, 5000, 1, 12000, 9000):
        states = random.integers(0, 150, (size, 2)) * (1 << 50)
        checked.add(list(map(tuple, states.tolist())))


@pytest.mark.parametrize("hashed", [one_hash, few_hashes])
def test_no_state_is_lost_when_all_of_them_collide_and_the_table_is_made_anew(
    hashed: Hash,
) -> None:
    with small(hashed):
        checked = Checked(1)
        for first in range(0, 200, 20):
            checked.add([(state,) for state in range(first + 20, first - 10, -1) if state >= 0])


def test_states_that_differ_in_one_word_only_are_different() -> None:
    checked = Checked(4)
    one = [tuple(int(at == word) << bit for at in range(4)) for word in range(4) for bit in (0, 63)]
    checked.add([(0, 0, 0, 0), *one, (0, 0, 0, 0), *one])


def test_a_state_that_is_all_zeros_is_new_once() -> None:
    checked = Checked(1)
    checked.add([(0,), (0,)])
    checked.add([(0,)])


def test_a_part_of_the_states_can_be_had_by_their_numbers() -> None:
    store = Store(2)
    store.add(words_of([(1, 2), (3, 4), (5, 6)], 2))
    assert states_in(store.words(1)) == [(3, 4), (5, 6)]
    assert states_in(store.words(0, 2)) == [(1, 2), (3, 4)]
    assert states_in(store.words(3)) == []


def test_what_was_handed_in_may_be_changed_afterwards() -> None:
    store = Store(1)
    words = words_of([(1,), (2,)], 1)
    store.add(words)
    words[0][:] = 9
    assert states_in(store.words()) == [(1,), (2,)]


def test_the_numbers_do_not_depend_on_the_hash() -> None:
    random = np.random.default_rng(2)
    told = [random.integers(0, 60, 40).tolist() for _ in range(5)]
    seen = []
    for hashed in HASHES:
        with small(hashed):
            store = Store(1)
            seen.append([store.add(words_of([(one,) for one in each], 1))[0].tolist()
                         for each in told])  # fmt: skip
    assert all(numbers == seen[0] for numbers in seen)
