# SPDX-License-Identifier: Apache-2.0
"""The search against plain Python: what can be reached, in how many steps, and what breaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.spec.toys import WELL, Failed, Move, Plain, State, Toy, search, unpacked

from holdfast.spec import explore as module
from holdfast.spec.explore import Explored, explore
from holdfast.spec.layout import Batch, Field, Layout
from holdfast.spec.trace import path_to

# -- toys ------------------------------------------------------------


def counter(last: int = 9) -> Toy:
    """Counts up, and may begin again; 7 is too much."""
    layout = Layout([Field("x", 4)], {})

    def count(state: State) -> None:
        state["x"] += 1

    def reset(state: State) -> None:
        state["x"] = 0

    moves = [
        Move("count", lambda state: state["x"] < last, count),
        Move("reset", lambda state: state["x"] == last, reset),
    ]
    return Toy(layout, moves, [{"x": 0}], wrong={"much": lambda state: state["x"] >= 7})


def diamond() -> Toy:
    """Two things that happen in either order; the second to happen breaks something."""
    layout = Layout([Field("a", 1), Field("b", 1)], {})

    def become(name: str, other: str) -> Move:
        def then(state: State) -> Failed:
            state[name] = 1
            return frozenset({f"{name} last"} if state[other] else set())

        return Move(name, lambda state: not state[name], then)

    return Toy(layout, [become("a", "b"), become("b", "a")], [{"a": 0, "b": 0}])


def tokens(count: int, *, symmetric: bool, places: int = 3) -> Toy:
    """Tokens walk from place to place and note whom they have met: ``met[p, q]``."""
    layout = Layout(
        [Field("at", 2, "P"), Field("met", 1, "PQ")], {"P": count, "Q": count},
        "P" if symmetric else "", {"Q": "P"},
    )  # fmt: skip

    def walk(p: int) -> Move:
        def then(state: State) -> None:
            state[f"at[{p}]"] += 1

        return Move("walk", lambda state: state[f"at[{p}]"] < places - 1, then, args={"p": p})

    def meet(p: int, q: int) -> Move:
        def when(state: State) -> bool:
            together = state[f"at[{p}]"] == state[f"at[{q}]"] > 0
            return together and not state[f"met[{p}, {q}]"]

        def then(state: State) -> Failed:
            state[f"met[{p}, {q}]"] = 1
            return frozenset({"mutual"}) if state[f"met[{q}, {p}]"] else WELL

        return Move("meet", when, then, args={"p": p, "q": q})

    pairs = [(p, q) for p in range(count) for q in range(count) if p != q]
    moves = [*map(walk, range(count)), *(meet(p, q) for p, q in pairs)]
    start: State = {str(cell): 0 for cell in layout.cells.values()}

    def crowded(state: State) -> bool:
        return all(state[f"at[{p}]"] == places - 1 for p in range(count))

    return Toy(
        layout, moves, [start], wrong={"crowded": crowded}, symmetric="P" if symmetric else "",
        same={"Q": "P"},
    )  # fmt: skip


def edge_of_the_world(*, final: bool) -> Toy:
    """Beyond 3 there is a breach; and beyond it another, if the story goes on."""
    layout = Layout([Field("x", 3)], {})

    def go(state: State) -> Failed:
        state["x"] += 1
        return {4: frozenset({"edge"}), 6: frozenset({"fall"})}.get(state["x"], WELL)

    move = Move("go", lambda state: state["x"] < 7, go)
    return Toy(layout, [move], [{"x": 0}], final=frozenset({"edge"} if final else set()))


TOYS = {
    "counter": counter(),
    "diamond": diamond(),
    "tokens": tokens(3, symmetric=False),
    "tokens that are alike": tokens(3, symmetric=True),
    "a breach that is not final": edge_of_the_world(final=False),
    "a breach that is final": edge_of_the_world(final=True),
}


def orbits(found: Explored, first: int = 0, last: int | None = None) -> list[Any]:
    toy = found.model
    assert isinstance(toy, Toy)
    return [toy.orbit(state) for state in unpacked(toy.layout, found.batch(first, last))]


def agree(found: Explored, plain: Plain) -> None:
    """The search found what plain Python did."""
    assert found.complete
    assert found.states == plain.states == len(set(orbits(found)))
    bounds = found.levels
    assert bounds[-1] == found.states, "the last level is empty"
    levels = [set(orbits(found, *ends)) for ends in pairwise(bounds)]
    assert levels == plain.levels
    assert {name: breach.steps for name, breach in found.breaches.items()} == plain.breaks
    assert found.steps == len(plain.edges)
    if found.edges is not None:
        keys, events = orbits(found), [rule.event for rule in found.model.rules]
        steps = [(keys[a], keys[b], events[rule]) for a, b, rule in zip(*found.edges, strict=True)]
        assert Counter(steps) == Counter((a, b, events[rule]) for a, b, rule in plain.edges)


@contextmanager
def pieces_of(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", size)
        yield


# -- what is found ------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_states_levels_edges_and_breaches_are_those_of_plain_python(name: str) -> None:
    toy = TOYS[name]
    agree(explore(toy, keep_edges=True), search(toy))


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("name", TOYS)
def test_they_do_not_depend_on_the_pieces_in_which_levels_are_looked_at(
    name: str, size: int
) -> None:
    toy = TOYS[name]
    with pieces_of(size):
        agree(explore(toy, keep_edges=True), search(toy))


def test_a_counter_has_as_many_levels_as_numbers() -> None:
    found = explore(counter(), keep_edges=True)
    assert (found.states, found.steps, found.levels) == (10, 10, list(range(11)))
    assert found.breaches["much"].steps == 7
    assert found.edges is not None
    assert [list(map(int, edge)) for edge in zip(*found.edges, strict=True)][-1] == [9, 0, 1]


def test_a_diamond_has_four_states_four_steps_and_breaks_both_ways_in_two() -> None:
    found = explore(diamond())
    assert (found.states, found.steps, found.levels) == (4, 4, [0, 1, 3, 4])
    assert {name: each.steps for name, each in found.breaches.items()} == {
        "a last": 2, "b last": 2,
    }  # fmt: skip


def test_of_states_that_are_renamings_one_is_counted() -> None:
    alike, apart = explore(tokens(3, symmetric=True)), explore(tokens(3, symmetric=False))
    every = {TOYS["tokens that are alike"].orbit(state)
             for state in unpacked(apart.model.layout, apart.batch())}  # fmt: skip
    assert alike.states == len(every)
    assert apart.states / 6 <= alike.states < apart.states / 4
    assert {name: breach.steps for name, breach in alike.breaches.items()} == {
        name: breach.steps for name, breach in apart.breaches.items()
    }


def test_a_story_is_not_followed_beyond_a_final_breach() -> None:
    final, going = explore(edge_of_the_world(final=True)), explore(edge_of_the_world(final=False))
    assert set(final.breaches) == {"edge"}
    assert (final.states, final.steps) == (4, 3), "the step that breaks it leads nowhere"
    assert {name: breach.steps for name, breach in going.breaches.items()} == {
        "edge": 4, "fall": 6,
    }  # fmt: skip
    assert (going.states, going.steps) == (8, 7)


def test_states_beside_a_final_breach_are_followed() -> None:
    """One of the states to which a rule is applied together breaks it, the other does not."""
    layout = Layout([Field("x", 3)], {})

    def double(state: State) -> Failed:
        state["x"] *= 2
        return frozenset({"six"}) if state["x"] == 6 else WELL

    move = Move("double", lambda state: state["x"] in (2, 3), double)
    toy = Toy(layout, [move], [{"x": 2}, {"x": 3}], final=frozenset({"six"}))
    found = explore(toy)
    agree(found, search(toy))
    assert [state["x"] for state in unpacked(layout, found.batch())] == [2, 3, 4]
    assert found.breaches["six"].parent == 1


def test_several_beginnings_that_are_the_same_are_one() -> None:
    toy = counter()
    toy.start = [{"x": 3}, {"x": 5}, {"x": 3}]
    found = explore(toy)
    agree(found, search(toy))
    assert found.levels[1] == 2


def test_an_initial_state_can_break_an_invariant() -> None:
    toy = counter()
    toy.start = [{"x": 2}, {"x": 8}]
    breach = explore(toy).breaches["much"]
    assert (breach.steps, breach.parent, breach.words) == (0, -1, (8,))


NODES = st.integers(0, 11)
TARGETS = st.lists(st.none() | NODES, min_size=12, max_size=12)


@settings(max_examples=50)
@given(
    graph=st.lists(TARGETS, min_size=1, max_size=3),
    bad=st.sets(NODES, max_size=3),
    breaking=st.sets(st.tuples(st.integers(0, 2), NODES), max_size=3),
    final=st.booleans(),
    start=st.sets(NODES, min_size=1, max_size=2),
    size=st.sampled_from([1, 3, 1 << 15]),
)
def test_any_graph_is_searched_as_plain_python_does(
    graph: list[list[int | None]],
    bad: set[int],
    breaking: set[tuple[int, int]],
    final: bool,
    start: set[int],
    size: int,
) -> None:
    """Each rule is any partial function; some steps break "step", some states are "bad"."""

    def rule(number: int, to: list[int | None]) -> Move:
        def then(state: State) -> Failed:
            here, there = state["x"], to[state["x"]]
            assert there is not None
            state["x"] = there
            return frozenset({"step"}) if (number, here) in breaking else WELL

        return Move(f"rule {number}", lambda state: to[state["x"]] is not None, then)

    toy = Toy(
        Layout([Field("x", 4)], {}),
        [rule(number, to) for number, to in enumerate(graph)],
        [{"x": node} for node in sorted(start)],
        wrong={"bad": lambda state: state["x"] in bad},
        final=frozenset({"step"} if final else set()),
    )
    with pieces_of(size):
        agree(explore(toy, keep_edges=True), search(toy))


# -- how it is told about, and how it ends ----------------------------------------------------


def test_two_searches_are_equal_in_everything() -> None:
    for toy in TOYS.values():
        one, other = (explore(toy, keep_edges=True) for _ in range(2))
        assert one.levels == other.levels
        assert one.breaches == other.breaches
        assert one.parents.tolist() == other.parents.tolist()
        assert one.causes.tolist() == other.causes.tolist()
        assert one.edges is not None
        assert other.edges is not None
        for mine, theirs in zip(one.edges, other.edges, strict=True):
            assert mine.tolist() == theirs.tolist()
        for word, again in zip(one.store.words(), other.store.words(), strict=True):
            assert word.tolist() == again.tolist()


@pytest.mark.parametrize("name", TOYS)
def test_the_way_to_a_state_has_as_many_steps_as_its_level(name: str) -> None:
    toy = TOYS[name]
    found = explore(toy)
    assert len(found.parents) == len(found.causes) == found.states
    for level, (first, last) in enumerate(pairwise(found.levels)):
        for state in range(first, last):
            path = path_to(found, state)
            assert len(path) == level + 1
            assert path[0] < found.levels[1]
            assert path[-1] == state


@pytest.mark.parametrize("name", TOYS)
def test_a_parents_rule_leads_to_its_child(name: str) -> None:
    toy = TOYS[name]
    found = explore(toy)
    states, keys = unpacked(toy.layout, found.batch()), orbits(found)
    for child in range(found.levels[1], found.states):
        state = states[found.parents[child]]
        reached = {number: toy.orbit(after) for number, after, _ in toy.steps(state)}
        assert reached[int(found.causes[child])] == keys[child]


@pytest.mark.parametrize("name", TOYS)
def test_a_breach_is_made_by_a_step_of_its_parent(name: str) -> None:
    toy = TOYS[name]
    found = explore(toy)
    states = unpacked(toy.layout, found.batch())
    for breach in found.breaches.values():
        assert found.levels[breach.steps - 1] <= breach.parent < found.levels[breach.steps]
        after, broken = next(
            (after, broken) for number, after, broken in toy.steps(states[breach.parent])
            if number == breach.rule
        )  # fmt: skip
        assert breach.invariant in broken | toy.judged(after)
        batch = Batch([found.store.words(0, 1)[0] * 0 + word for word in breach.words])
        assert toy.orbit(unpacked(toy.layout, batch)[0]) == toy.orbit(after)


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_limit_ends_the_search_once_it_is_met(limit: int) -> None:
    found = explore(counter(), limit=limit)
    assert found.states == min(max(limit, 2), 10), "one level is looked at in any case"
    assert found.complete == (limit > 10)


def test_a_limit_is_looked_at_after_each_piece() -> None:
    whole = explore(tokens(3, symmetric=False))
    with pieces_of(1):
        found = explore(tokens(3, symmetric=False), limit=10)
    assert 10 <= found.states < 20 < whole.states
    assert not found.complete
    assert found.batch().words[0].tolist() == whole.batch(0, found.states).words[0].tolist()


def test_a_search_ends_with_the_level_in_which_what_it_looks_for_is_broken() -> None:
    found = explore(counter(), until=frozenset({"much", "moon"}))
    assert found.breaches["much"].steps == 7
    assert (found.states, found.complete) == (8, False)
    assert explore(counter(), until=frozenset({"moon"})).complete


def test_progress_is_told_states_and_level_and_can_end_the_search() -> None:
    told: list[tuple[int, int]] = []

    def progress(states: int, level: int) -> bool:
        told.append((states, level))
        return level < 3

    found = explore(counter(), progress=progress)
    assert told == [(2, 1), (3, 2), (4, 3)]
    assert (found.states, found.complete) == (4, False)


@pytest.mark.parametrize("looks", range(1, 9))
def test_a_search_that_was_ended_in_mid_level_is_not_complete(looks: int) -> None:
    """Also where what was looked at of the level leads to nothing new, and the rest might."""
    layout = Layout([Field("x", 3)], {})

    def turn(state: State) -> None:
        state["x"] ^= 1

    move = Move("turn", lambda state: state["x"] < 5, turn)
    toy = Toy(layout, [move], [{"x": x} for x in range(5)])
    asked: list[int] = []

    def progress(states: int, level: int) -> bool:
        asked.append(level)
        return len(asked) < looks

    with pieces_of(1):
        found = explore(toy, progress=progress)
    # Five states that lead to one another but for the last, from which there is one more.
    assert asked == [1, 1, 1, 1, 1, 2][:looks]
    assert found.complete == (looks >= 6)
    assert found.states == (6 if looks >= 5 else 5)
