# SPDX-License-Identifier: Apache-2.0
"""Waiting for ever: which ways of it count, by hand and against every set of states of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.spec.toys import Move, State, Toy

from holdfast.spec.explore import Explored, explore
from holdfast.spec.layout import Field, Layout, Mask
from holdfast.spec.liveness import LeadsTo, _parts, hangs

FAIR, UNFAIR = True, False
Steps = Mapping[int, int]
"""From which state to which a rule leads."""
Rules = Sequence[tuple[Steps, bool]]


def graph(nodes: int, rules: Rules) -> Explored:
    """Every node is a beginning, so that its number is that of its state."""

    def move(number: int, to: Steps, fair: bool) -> Move:
        def then(state: State) -> None:
            state["x"] = to[state["x"]]

        return Move(f"rule {number}", lambda state: state["x"] in to, then, fair)

    toy = Toy(
        Layout([Field("x", 4)], {}),
        [move(number, to, fair) for number, (to, fair) in enumerate(rules)],
        [{"x": node} for node in range(nodes)],
    )
    found = explore(toy, keep_edges=True)
    assert found.batch().words[0].tolist() == list(range(nodes))
    return found


def mask(nodes: int, chosen: set[int]) -> Mask:
    return np.array([node in chosen for node in range(nodes)], np.bool_)


def waits(nodes: int, rules: Rules, cause: set[int], consequence: set[int]) -> int | None:
    promise = LeadsTo("L", mask(nodes, cause), mask(nodes, consequence))
    return hangs(graph(nodes, rules), promise)


# -- by hand ------------------------------------------------------------


def test_a_state_that_no_fair_rule_leaves_is_a_way_to_wait() -> None:
    assert waits(2, [({0: 1}, UNFAIR)], {0}, {1}) == 0


def test_a_fair_rule_is_taken_in_the_end() -> None:
    assert waits(2, [({0: 1}, FAIR)], {0}, {1}) is None


def test_a_state_that_nothing_leaves_is_a_way_to_wait() -> None:
    assert waits(2, [], {1}, {0}) == 1


def test_who_waits_goes_on_waiting_where_the_cause_is_gone() -> None:
    assert waits(4, [({1: 2}, FAIR), ({2: 3}, UNFAIR)], {1}, {3}) == 2


def test_waiting_ends_with_the_consequence_whatever_comes_then() -> None:
    assert waits(3, [({0: 1, 1: 2}, FAIR)], {0}, {1}) is None


def test_a_cause_that_is_its_own_consequence_is_no_waiting() -> None:
    assert waits(2, [], {0, 1}, {0, 1}) is None
    assert waits(2, [], {0, 1}, {0}) == 1


def test_what_no_cause_leads_to_is_no_waiting() -> None:
    assert waits(3, [({0: 1}, FAIR)], {0}, {1}) is None  # 2 is stuck, and nobody promised it


def test_a_round_of_rules_that_need_not_be_taken_is_a_way_to_wait() -> None:
    assert waits(3, [({0: 1, 1: 0}, FAIR), ({0: 2}, UNFAIR)], {0}, {2}) == 0


def test_a_fair_rule_that_is_possible_all_round_leads_out_of_the_round() -> None:
    assert waits(3, [({0: 1, 1: 0}, FAIR), ({0: 2, 1: 2}, FAIR)], {0}, {2}) is None


def test_a_fair_rule_that_is_possible_in_a_part_of_the_round_need_not_be_taken() -> None:
    assert waits(3, [({0: 1, 1: 0}, FAIR), ({1: 2}, FAIR)], {0}, {2}) == 0


def test_two_fair_rules_that_are_possible_in_turns_need_not_be_taken() -> None:
    """Rules are told apart by whom they are about: neither of them is possible all the time."""
    rules = [({0: 1, 1: 0}, FAIR), ({0: 2}, FAIR), ({1: 2}, FAIR)]
    assert waits(3, rules, {0}, {2}) == 0


def test_a_fair_rule_that_is_taken_within_the_round_has_been_taken() -> None:
    """From 0 it leads out, from 1 back to 0: who always goes on to 1 takes it there."""
    assert waits(3, [({0: 1, 1: 0}, FAIR), ({0: 2, 1: 0}, FAIR)], {0}, {2}) == 0


def test_a_step_that_stays_where_it_is_takes_its_rule() -> None:
    assert waits(2, [({0: 0}, FAIR)], {0}, {1}) == 0
    assert waits(2, [({0: 0}, UNFAIR), ({0: 1}, UNFAIR)], {0}, {1}) == 0


def test_a_step_that_stays_where_it_is_does_not_excuse_another_fair_rule() -> None:
    assert waits(2, [({0: 0}, FAIR), ({0: 1}, FAIR)], {0}, {1}) is None
    assert waits(2, [({0: 0}, UNFAIR), ({0: 1}, FAIR)], {0}, {1}) is None


def test_a_step_that_stays_within_a_round_takes_its_rule_there() -> None:
    """1 leads out by the rule that 0 can take without moving."""
    assert waits(3, [({0: 1, 1: 0}, FAIR), ({0: 0, 1: 2}, FAIR)], {0}, {2}) == 0


def test_a_round_that_cannot_be_left_but_is_the_consequence_is_none() -> None:
    assert waits(3, [({0: 1, 1: 2, 2: 1}, FAIR)], {0}, {1, 2}) is None
    assert waits(3, [({0: 1, 1: 2, 2: 1}, FAIR)], {0}, {1}) is None


def test_a_smaller_round_within_one_that_must_be_left_must_be_left_too() -> None:
    rules = [({0: 1, 1: 2, 2: 0}, FAIR), ({1: 0}, UNFAIR), ({0: 3, 1: 3, 2: 3}, FAIR)]
    assert waits(4, rules, {0}, {3}) is None


def test_of_several_ways_to_wait_the_one_that_is_reached_first_is_told() -> None:
    rules: Rules = [({1: 2, 2: 1}, FAIR), ({0: 1}, UNFAIR)]
    assert waits(5, rules, {2, 4}, {3}) == 1
    assert waits(5, rules, {4}, {3}) == 4
    assert waits(5, rules, {0}, {3}) == 0


def test_steps_are_asked_for() -> None:
    found = explore(graph(2, []).model)
    with pytest.raises(AssertionError, match="keep_edges=True"):
        hangs(found, LeadsTo("L", mask(2, {0}), mask(2, {1})))


# -- against brute force ------------------------------------------------------------


def reached(start: set[int], follow: Callable[[int], set[int]]) -> set[int]:
    found, left = set(start), list(start)
    while left:
        for node in follow(left.pop()) - found:
            found.add(node)
            left.append(node)
    return found


def by_brute_force(nodes: int, rules: Rules, cause: set[int], consequence: set[int]) -> int | None:
    """Look at every set of states: can one be in all of them, and in no other, for ever?

    That is so if one can get from each to each within the set (or stays in its only one), and
    each fair rule is impossible somewhere in it, or is taken within it.
    """

    def next_to(node: int) -> set[int]:
        return {to[node] for to, _ in rules if node in to} - consequence

    waiting = sorted(reached(cause - consequence, next_to))
    stuck: set[int] = set()
    for size in range(1, len(waiting) + 1):
        for chosen in map(set, combinations(waiting, size)):
            within = all(
                reached({node}, lambda at: next_to(at) & chosen) == chosen  # noqa: B023
                for node in chosen
            )
            fairly = all(
                any(node not in to or to[node] in chosen for node in chosen)
                for to, fair in rules
                if fair
            )
            if within and fairly:
                stuck |= chosen
    return min(stuck, default=None)


NODES = 6
NODE = st.integers(0, NODES - 1)
RULES = st.lists(st.tuples(st.dictionaries(NODE, NODE, max_size=NODES), st.booleans()), max_size=4)


@settings(max_examples=150)
@given(RULES, st.sets(NODE, min_size=1), st.sets(NODE, max_size=2))
@example([({0: 1, 1: 0}, True), ({0: 2, 1: 2}, True)], {0}, {2})
@example([({0: 1, 1: 0, 2: 3, 3: 2}, True), ({1: 2}, False), ({2: 4, 3: 4}, True)], {0}, {4})
def test_who_can_wait_for_ever_is_found_as_by_brute_force(
    rules: list[tuple[dict[int, int], bool]], cause: set[int], consequence: set[int]
) -> None:
    assert waits(NODES, rules, cause, consequence) == by_brute_force(
        NODES, rules, cause, consequence
    )


def parts(count: int, waiting: set[int], edges: Sequence[tuple[int, int]]) -> list[int]:
    ends = np.array(edges, np.int32).reshape(-1, 2)
    return list(map(int, _parts(count, mask(count, waiting), ends[:, 0], ends[:, 1])))


COUNT = 9
MEMBER = st.integers(0, COUNT - 1)
EDGES = st.lists(st.tuples(MEMBER, MEMBER), min_size=COUNT, max_size=2 * COUNT)


@settings(max_examples=100)
@given(EDGES, st.sets(MEMBER, max_size=2))
@example([(0, 1), (1, 0), (2, 3), (3, 2), (3, 0)], set())
def test_the_parts_of_a_graph_are_those_from_which_and_to_which_one_can_come(
    edges: list[tuple[int, int]], left_out: set[int]
) -> None:
    waiting = set(range(COUNT)) - left_out
    inside = [(a, b) for a, b in edges if a in waiting and b in waiting]
    after = {
        node: reached({node}, lambda at: {b for a, b in inside if a == at}) for node in waiting
    }
    told = parts(COUNT, waiting, edges)
    for node in range(COUNT):
        if node not in waiting:
            assert told[node] == -1
            continue
        mine = {other for other in after[node] if node in after[other]}
        assert (told[node] >= 0) == (len(mine) > 1), "a part has several states"
        if len(mine) > 1:
            assert {other for other in range(COUNT) if told[other] == told[node]} == mine
    numbers = {number for number in told if number >= 0}
    assert numbers == set(range(len(numbers)))


def test_rounds_of_any_length_are_found_without_recursion() -> None:
    length = 3000
    line = [(node, node + 1) for node in range(length - 1)]
    assert set(parts(length, set(range(length)), line)) == {-1}
    assert set(parts(length, set(range(length)), [*line, (length - 1, 0)])) == {0}


def test_two_rounds_with_a_way_from_one_to_the_other_are_two() -> None:
    told = parts(7, set(range(7)), [(0, 1), (1, 0), (1, 2), (2, 3), (3, 4), (4, 3), (4, 5)])
    assert told[0] == told[1] >= 0
    assert told[3] == told[4] >= 0
    assert told[0] != told[3]
    assert [told[node] for node in (2, 5, 6)] == [-1, -1, -1]
