# SPDX-License-Identifier: Apache-2.0
"""Packed states against plain ones: where variables lie, and what a renaming makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.spec.toys import State, packed, renamed, renamings, unpacked

from holdfast.spec.layout import NOTHING, U8, WORD, Batch, Cell, Field, Layout, Mask

AXES = ("", "P", "F", "D", "PF", "PQ", "DF", "QFD", "PP")
SAME = {"Q": "P"}


@dataclass
class Case:
    """A layout and how it was asked for."""

    fields: list[Field]
    sizes: dict[str, int]
    symmetric: str
    layout: Layout

    @property
    def cells(self) -> list[Cell]:
        return list(self.layout.cells.values())

    def renamings(self) -> list[dict[str, str]]:
        return list(renamings(self.layout, self.symmetric, SAME))


@st.composite
def cases(draw: st.DrawFn, symmetric: tuple[str, ...] = ("", "P", "F", "PF")) -> Case:
    shapes = st.tuples(st.integers(1, 8), st.sampled_from(AXES))
    shape = draw(st.lists(shapes, min_size=1, max_size=7))
    fields = [Field(f"v{number}", bits, axes) for number, (bits, axes) in enumerate(shape)]
    members = draw(st.integers(1, 3))
    sizes = {"P": members, "Q": members, "F": draw(st.integers(1, 3)), "D": draw(st.integers(0, 2))}
    chosen = draw(st.sampled_from(symmetric))
    return Case(fields, sizes, chosen, Layout(fields, sizes, chosen, SAME))


def states_of(draw: st.DrawFn | Any, case: Case, count: int) -> list[State]:
    """Some states, all variables of which are anything that fits."""
    size = count * len(case.cells)
    values = iter(draw(st.binary(min_size=size, max_size=size)))
    return [
        {str(cell): next(values) & ((1 << cell.bits) - 1) for cell in case.cells}
        for _ in range(count)
    ]


@st.composite
def filled(draw: st.DrawFn) -> tuple[Case, list[State]]:
    case = draw(cases())
    return case, states_of(draw, case, draw(st.integers(1, 4)))


def canonical(case: Case, states: list[State]) -> list[State]:
    batch = packed(case.layout, states)
    return unpacked(case.layout, Batch(case.layout.canonical(batch.words)))


# -- where variables lie ------------------------------------------------------------


@settings(max_examples=35)
@given(cases())
def test_no_variable_straddles_words_or_shares_a_bit(case: Case) -> None:
    taken = [0] * case.layout.words
    for cell in case.cells:
        assert cell.shift + cell.bits <= WORD
        bits = ((1 << cell.bits) - 1) << cell.shift
        assert not taken[cell.word] & bits
        taken[cell.word] |= bits
    assert all(taken) or not case.cells, "a word that nothing lies in"


@settings(max_examples=35)
@given(cases())
def test_every_field_has_a_variable_for_each_index_and_no_other(case: Case) -> None:
    wanted = {
        (field.name, index): field.bits
        for field in case.fields
        for index in np.ndindex(*(case.sizes[axis] for axis in field.axes))
    }
    assert {key: cell.bits for key, cell in case.layout.cells.items()} == wanted
    assert len({str(cell) for cell in case.cells}) == len(case.cells)
    for field in case.fields:
        group = case.layout.group(field.name)
        mine = {index: cell for (name, index), cell in case.layout.cells.items()
                if name == field.name}  # fmt: skip
        assert {index: group[index] for index in mine} == mine
        assert bool(group) == bool(mine)


def test_a_variable_that_does_not_fit_into_what_is_left_begins_the_next_word() -> None:
    layout = Layout([Field("a", 7, "I"), Field("b", 3)], {"I": 10})
    cells = layout.group("a")
    assert [(cells[i].word, cells[i].shift) for i in (8, 9)] == [(0, 56), (1, 0)]
    assert layout.words == 2


def test_two_fields_of_one_name_are_refused() -> None:
    with pytest.raises(AssertionError, match="two fields of one name"):
        Layout([Field("a", 1), Field("a", 2)], {})


# -- reading and writing ------------------------------------------------------------


@settings(max_examples=35)
@given(filled(), st.data())
def test_what_was_written_is_read_back_and_nothing_else_changes(
    drawn: tuple[Case, list[State]], data: st.DataObject
) -> None:
    case, states = drawn
    if not case.cells:
        return
    batch = packed(case.layout, states)
    count = len(states)
    for _ in range(data.draw(st.integers(1, 6))):
        cell = data.draw(st.sampled_from(case.cells))
        ones = (1 << cell.bits) - 1
        told = [each & ones for each in data.draw(st.binary(min_size=count, max_size=count))]
        where = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
        kind = data.draw(st.sampled_from(["number", "numbers", "truths"]))
        value: int | U8 | Mask = told[0]
        if kind == "number":
            told = [told[0]] * count
        elif kind == "numbers":
            value = np.array(told, np.uint8)
        else:
            told = [each & 1 for each in told]
            value = np.array(told, np.bool_)
        if data.draw(st.booleans()):
            batch[cell] = value
            where = [True] * count
        else:
            batch.put(cell, value, np.array(where))
        for state, new, here in zip(states, told, where, strict=True):
            if here:
                state[str(cell)] = new
        assert unpacked(case.layout, batch) == states
    # What is remembered of columns and what lies in words is the same.
    assert unpacked(case.layout, Batch(batch.words)) == states
    batch.forget_columns()
    assert unpacked(case.layout, batch) == states


@settings(max_examples=35)
@given(filled(), st.integers(0, 255))
def test_comparisons_are_those_of_the_values(drawn: tuple[Case, list[State]], value: int) -> None:
    case, states = drawn
    batch = packed(case.layout, states)
    for cell in case.cells:
        plain = [state[str(cell)] for state in states]
        assert batch.eq(cell, value).tolist() == [each == value for each in plain]
        assert batch.ne(cell, value).tolist() == [each != value for each in plain]
        assert batch.ge(cell, value).tolist() == [each >= value for each in plain]
        assert batch.lt(cell, value).tolist() == [each < value for each in plain]
        assert batch.on(cell).tolist() == [each != 0 for each in plain]
        assert batch.off(cell).tolist() == [each == 0 for each in plain]
        assert batch.among(cell, (value, 0)).tolist() == [each in (value, 0) for each in plain]


def test_a_variable_that_a_model_does_not_have_is_0_and_swallows_what_is_written() -> None:
    layout = Layout([Field("a", 8), Field("b", 3, "F")], {"F": 2})
    batch = packed(layout, [{"a": 200, "b[0]": 5, "b[1]": 2}, {"a": 1, "b[0]": 0, "b[1]": 7}])
    before = unpacked(layout, batch)
    absent = layout.group("moon")
    assert not absent
    for cell in (absent[()], absent[0], absent[1, 2], layout.group("b")[2], NOTHING):
        batch[cell] = 1
        batch[cell] = np.array([1, 0], np.uint8)
        batch.put(cell, 1, batch.true())
        assert batch[cell].tolist() == [0, 0]
        assert batch.off(cell).all()
        assert not batch.ge(cell, 1).any()
    assert unpacked(layout, batch) == before
    assert unpacked(layout, Batch(batch.words)) == before


def test_a_value_that_does_not_fit_is_refused_and_does_not_spill_into_its_neighbour() -> None:
    layout = Layout([Field("a", 2), Field("b", 2)], {})
    batch = packed(layout, [{"a": 1, "b": 0}])
    cell = layout.group("a")[()]
    with pytest.raises(AssertionError, match="does not fit into a"):
        batch[cell] = 4
    with pytest.raises(AssertionError, match="does not fit into a"):
        batch[cell] = np.array([4], np.uint8)
    with pytest.raises(AssertionError, match="does not fit into a"):
        batch.put(cell, batch[cell] - 2, batch.true())
    assert unpacked(layout, batch) == [{"a": 1, "b": 0}]


def test_states_that_were_taken_out_are_copies() -> None:
    layout = Layout([Field("a", 4)], {})
    batch = packed(layout, [{"a": 1}, {"a": 2}, {"a": 3}])
    cell = layout.group("a")[()]
    some = batch.take(np.array([2, 0]))
    some[cell] = 9
    assert unpacked(layout, some) == [{"a": 9}, {"a": 9}]
    assert unpacked(layout, batch) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_batch_that_views_stored_words_leaves_them_as_they_are() -> None:
    layout = Layout([Field("a", 4)], {})
    stored = packed(layout, [{"a": 1}]).words
    batch = Batch([word[:] for word in stored])
    batch[layout.group("a")[()]] = 9
    assert unpacked(layout, Batch(stored)) == [{"a": 1}]


def test_what_a_step_breaks_adds_up_over_its_parts() -> None:
    batch = Batch([np.zeros(3, np.uint64)])
    batch.fail("S1", np.array([True, False, False]))
    batch.fail("S1", np.array([False, False, True]))
    batch.fail("S2", batch.false())
    assert {name: where.tolist() for name, where in batch.failed.items()} == {
        "S1": [True, False, True]
    }


# -- renaming ------------------------------------------------------------


@settings(max_examples=35)
@given(filled())
def test_the_canonical_form_is_the_same_for_every_renaming(
    drawn: tuple[Case, list[State]],
) -> None:
    case, states = drawn
    wanted = canonical(case, states)
    for renaming in case.renamings():
        assert canonical(case, [renamed(state, renaming) for state in states]) == wanted


@settings(max_examples=35)
@given(filled())
def test_the_canonical_form_is_one_of_the_renamings_and_its_own_canonical_form(
    drawn: tuple[Case, list[State]],
) -> None:
    case, states = drawn
    forms = canonical(case, states)
    assert canonical(case, forms) == forms
    for state, form in zip(states, forms, strict=True):
        assert form in [renamed(state, renaming) for renaming in case.renamings()]


@settings(max_examples=35)
@given(filled())
def test_the_canonical_form_is_the_least_renaming_and_the_states_are_not_touched(
    drawn: tuple[Case, list[State]],
) -> None:
    case, states = drawn
    batch = packed(case.layout, states)
    before = [word.copy() for word in batch.words]
    forms = case.layout.canonical(batch.words)
    for word, was in zip(batch.words, before, strict=True):
        assert (word == was).all()

    def number(row: int, words: list[Any]) -> int:
        return sum(int(word[row]) << WORD * at for at, word in enumerate(words))

    for row, state in enumerate(states):
        every = [packed(case.layout, [renamed(state, each)]).words for each in case.renamings()]
        assert number(row, forms) == min(number(0, words) for words in every)


@settings(max_examples=35)
@given(cases())
def test_there_is_a_renaming_for_each_order_of_members_but_the_first(case: Case) -> None:
    assert len(case.layout.renamings) == len(case.renamings()) - 1


def test_nothing_is_renamed_where_nothing_is_interchangeable() -> None:
    layout = Layout([Field("a", 2, "P")], {"P": 3})
    assert layout.renamings == []
    words = packed(layout, [{"a[0]": 3, "a[1]": 0, "a[2]": 1}]).words
    assert layout.canonical(words) is words


def test_a_second_index_over_the_same_members_is_renamed_with_the_first() -> None:
    fields, sizes = [Field("kin", 1, "PQ"), Field("age", 3, "P")], {"P": 3, "Q": 3}
    layout = Layout(fields, sizes, "P", {"Q": "P"})
    # 0 has what 1 had; 1 is the oldest. Renamed: 2 has what 0 had, and 0 is the oldest.
    here = {"kin[0, 1]": 1, "age[0]": 2, "age[1]": 7}
    there = {"kin[2, 0]": 1, "age[2]": 2, "age[0]": 7}
    other = {"kin[1, 0]": 1, "age[0]": 2, "age[1]": 7}  # the oldest has what the other had
    forms = layout.canonical(packed(layout, [here, there, other]).words)
    first, second, third = zip(*(word.tolist() for word in forms), strict=True)
    assert first == second != third


@pytest.mark.parametrize("symmetric", ["P", "PF"])
def test_fields_over_several_words_move_as_one(symmetric: str) -> None:
    fields = [Field("a", 8, "PF"), Field("b", 7, "P"), Field("c", 5, "F"), Field("d", 6)]
    sizes = {"P": 3, "F": 4}
    layout = Layout(fields, sizes, symmetric)
    assert layout.words == 3
    case = Case(fields, sizes, symmetric, layout)
    names = [str(cell) for cell in case.cells]
    state = {name: at * 5 % 32 for at, name in enumerate(names)}
    every = [renamed(state, each) for each in case.renamings()]
    forms = canonical(case, every)
    assert all(form == forms[0] for form in forms)
    assert forms[0] in every
