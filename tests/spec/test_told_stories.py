# SPDX-License-Identifier: Apache-2.0
"""A story is a real one: each of its steps can be taken where it stands, and does what it says.

Replayed without the search, its canonical forms and its parents: from the state as it is told, by
the one rule that is named. A story that no shorter one replaces ends in its breach, and in no step
before that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from tests.spec.test_search import TOYS, counter
from tests.spec.toys import Failed, Move, State, Toy, packed, unpacked

from holdfast.spec import table
from holdfast.spec.expected import EXPECTED
from holdfast.spec.explore import Explored, Model, explore
from holdfast.spec.layout import Batch, Field, Layout
from holdfast.spec.model import StrategyModel
from holdfast.spec.setting import Iommu, Setting
from holdfast.spec.strategy import Strategy
from holdfast.spec.trace import Step, Trace, path_to, steps_along, tell

NEVER_REACHED = 16
"""Steps. A story that is longer is not looked for here."""


def told(found: Explored, invariant: str) -> Trace:
    return tell(found, invariant, strategy="mine", profile="7.x", iommu="none", bounds="tiny")


def plain(state: Mapping[str, int]) -> State:
    return {name: value for name, value in state.items() if value}


def number(batch: Batch) -> list[int]:
    """A single state as its words."""
    return [int(word[0]) for word in batch.words]


def taken(model: Model, before: Mapping[str, int], step: Step) -> Batch:
    """What the rule that a step names makes of the state before it."""
    one, want = packed(model.layout, [before]), number(packed(model.layout, [step.after]))
    able = [
        rule
        for rule in model.rules
        if (rule.event, rule.actor, rule.text) == (step.event, step.actor, step.text)
        and dict(rule.args) == dict(step.args)
        and rule.guard(one).all()
    ]
    assert able, f"{step.event} cannot be taken"
    ends = []
    for rule in able:
        ends.append(packed(model.layout, [before]))
        rule.effect(ends[-1])
    assert want in map(number, ends), f"{step.event} does something else"
    return next(end for end in ends if number(end) == want)


def replayed(model: Model, start: Mapping[str, int], steps: Sequence[Step]) -> list[set[str]]:
    """Play a story; what is broken at its start, and by each of its steps or where it led."""
    beginnings = [plain(state) for state in unpacked(model.layout, model.initial())]
    assert dict(start) in beginnings
    states = [start, *(step.after for step in steps)]
    broken: list[set[str]] = [set() for _ in states]
    for name, where in model.judge(packed(model.layout, states)).items():
        for here, wrong in zip(broken, where.tolist(), strict=True):
            here |= {name} if wrong else set()
    for here, before, step in zip(broken[1:], states, steps, strict=False):
        here |= set(taken(model, before, step).failed)
    return broken


def is_real(found: Explored, invariant: str) -> None:
    trace = told(found, invariant)
    assert trace.breaks == invariant
    assert len(trace.steps) == found.breaches[invariant].steps
    *before, last = replayed(found.model, trace.start, trace.steps)
    assert invariant in last
    for broken in before:
        assert invariant not in broken, "it would be shorter"
        assert not broken & found.model.final or not found.model.final & last


# -- toys ------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_every_breach_of_a_toy_is_told_as_a_real_story(name: str) -> None:
    found = explore(TOYS[name])
    assert found.breaches
    for invariant in found.breaches:
        is_real(found, invariant)


@pytest.mark.parametrize("name", TOYS)
def test_the_way_to_a_state_of_a_toy_is_a_real_story_that_ends_there(name: str) -> None:
    toy = TOYS[name]
    found = explore(toy)
    every = list(enumerate(unpacked(toy.layout, found.batch())))
    for at, state in [*every[:: 1 + len(every) // 12], every[-1]]:
        start, steps = steps_along(found, path_to(found, at), None)
        replayed(toy, start, steps)
        end = dict.fromkeys(state, 0) | dict(steps[-1].after if steps else start)
        assert toy.orbit(end) == toy.orbit(state)


def test_names_stay_where_the_search_has_exchanged_them() -> None:
    """Who was the first to walk is the one who is seen to walk on."""
    toy = TOYS["tokens that are alike"]
    trace = told(explore(toy), "mutual")
    places: State = {}
    for step in trace.steps:
        for name, (before, after) in step.changed(places).items():
            if name.startswith("at"):
                assert step.event == "walk"
                assert name == f"at[{step.args['p']}]"
                assert after == before + 1
            else:
                assert (step.event, before, after) == ("meet", 0, 1)
        places = dict(step.after)


def test_an_initial_state_that_is_broken_is_told_as_a_story_without_steps() -> None:
    toy = counter()
    toy.start = [{"x": 2}, {"x": 8}]
    found = explore(toy)
    is_real(found, "much")
    assert told(found, "much").start == {"x": 8}


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_steps_of_one_name_the_one_is_told_that_the_search_followed(order: int) -> None:
    """Both lead to the same state; one of them ends the story."""
    layout = Layout([Field("x", 2)], {})

    def badly(state: State) -> Failed:
        state["x"] += 1
        return frozenset({"end"})

    def well(state: State) -> Failed:
        state["x"] += 1
        return frozenset({"three"} if state["x"] == 3 else set())

    able = (lambda state: state["x"] == 1), (lambda state: state["x"] < 3)
    moves = [Move("go", able[0], badly), Move("go", able[1], well, actor="another")]
    found = explore(Toy(layout, moves[::order], [{"x": 0}], final=frozenset({"end"})))
    is_real(found, "three")
    assert [step.actor for step in told(found, "three").steps] == ["another"] * 3
    assert [step.actor for step in told(found, "end").steps] == ["another", "somebody"]


def test_what_is_not_broken_has_no_story() -> None:
    with pytest.raises(KeyError):
        told(explore(counter()), "moon")


def test_a_story_that_is_written_and_read_is_as_real() -> None:
    found = explore(TOYS["tokens that are alike"])
    trace = Trace.from_json(told(found, "mutual").to_json())
    assert "mutual" in replayed(found.model, trace.start, trace.steps)[-1]


def test_a_story_that_was_tampered_with_cannot_be_replayed() -> None:
    """A negative control of the replay itself."""
    toy = TOYS["tokens"]
    trace = told(explore(toy), "mutual")
    skipped = [trace.steps[0], *trace.steps[2:]]
    with pytest.raises(AssertionError, match="cannot be taken"):
        replayed(toy, trace.start, skipped)
    lied = [replace(trace.steps[0], after={**trace.steps[0].after, "at[2]": 2}), *trace.steps[1:]]
    with pytest.raises(AssertionError, match="does something else"):
        replayed(toy, trace.start, lied)
    again = [*trace.steps, trace.steps[-1]]
    with pytest.raises(AssertionError, match="cannot be taken"):
        replayed(toy, trace.start, again)


# -- strategies ------------------------------------------------------------


def expected(kind: type[Strategy], setting: Setting) -> list[tuple[str, int]]:
    """What the table says that it breaks, and in how many steps."""
    text = EXPECTED[kind.key, setting.profile, setting.iommu]
    return [(name, int(length)) for name, length in re.findall(r" (S\d+) in (\d+)", text)]


def shallow() -> list[tuple[type[Strategy], Setting]]:
    """Cells of the table with a breach, in bounds in which it is found in a moment."""
    found = []
    for kind, setting in table.cells():
        lengths = [length for _, length in expected(kind, setting)]
        if not lengths or min(lengths) > NEVER_REACHED:
            continue
        # Paging and forks make many states, and are asked for by the shortest stories only.
        short = min(lengths) <= 8
        bounds = replace(setting.bounds, forks=int(short), crashes=0, iovas=1, paging=short)
        if setting.iommu is Iommu.LAZY and not short:
            bounds = replace(bounds, processes=1)  # somebody else takes the frame, then
        found.append((kind, replace(setting, bounds=bounds)))
    return found


CELLS = shallow()


@pytest.mark.parametrize(
    ("kind", "setting"),
    [pytest.param(kind, setting, id=f"{kind.key}-{setting}") for kind, setting in CELLS],
)
def test_every_breach_of_a_strategy_is_told_as_a_real_story(
    kind: type[Strategy], setting: Setting
) -> None:
    until = {name for name, _ in expected(kind, setting) if name != "S1"} | {table.VICTIM}
    found = explore(StrategyModel(kind, setting), limit=6000, until=frozenset(until))
    assert found.breaches
    for invariant in found.breaches:
        is_real(found, invariant)


def test_these_are_most_of_the_strategies_that_break() -> None:
    breaking = {key for key, text in EXPECTED.items() if "breaks" in text}
    assert len(CELLS) > 0.75 * len(breaking)
