# SPDX-License-Identifier: Apache-2.0
"""Shrinking: what is left still fails, and nothing more can go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from holdfast.torture.plan import Wanted, plan
from holdfast.torture.schedule import Case, Unit
from holdfast.torture.shrink import Trial, ddmin, shrink, simpler_cases

UNIT = plan(Wanted("emu:xdma", "xdma", 480, 3))[0]


@given(st.sets(st.integers(0, 40), min_size=1, max_size=4), st.integers(41, 80))
def test_exactly_what_is_needed_is_left(needed: set[int], count: int) -> None:
    def fails(items: Sequence[int]) -> bool:
        return needed <= set(items)

    assert ddmin(range(count), fails) == sorted(needed)


def failing_with(*lines: str) -> Callable[[Unit], bool]:
    """A unit fails if, for each of these cases, it has one with at least its strikes."""
    needed = [Case.parse(line) for line in lines]

    def covers(case: Case, wanted: Case) -> bool:
        return all(
            any(
                had.step == strike.step and had.kill >= strike.kill and had.count >= strike.count
                for had in case.strikes
            )
            for strike in wanted.strikes
        )

    return lambda unit: all(any(covers(c, wanted) for c in unit.cases) for wanted in needed)


def with_cases(*lines: str) -> Unit:
    extra = tuple(Case.parse(line) for line in lines)
    return UNIT.of([*UNIT.cases[:20], extra[0], *UNIT.cases[20:40], *extra[1:]])


def test_a_case_that_fails_by_itself_is_found_at_once() -> None:
    unit = with_cases("client.trim#7=client+anchor&keeper.adopted#9=keeper!fresh")
    fails = failing_with("keeper.adopted#3=keeper")
    trial = Trial(fails)
    smallest = shrink(unit, [20], trial)
    [case] = smallest.cases
    assert str(case) == "keeper.adopted#4=keeper"  # halving, 9 comes down to 4 and no further
    assert smallest.setting.lanes == 1
    assert fails(smallest)
    assert trial.runs < 30


def test_two_cases_that_fail_together_are_found_among_many() -> None:
    unit = with_cases("client.trim#7=client+anchor!fresh", "keeper.adopted#8=keeper+anchor")
    fails = failing_with("client.trim#7=client", "keeper.adopted=keeper")
    smallest = shrink(unit, [], Trial(fails, budget=400))
    assert {str(case) for case in smallest.cases} == {
        "client.trim#7=client", "keeper.adopted=keeper",
    }  # fmt: skip
    assert len(smallest.cases) == 2


def test_what_does_not_fail_again_is_left_as_it_was() -> None:
    assert shrink(UNIT, [3], Trial(lambda _: False)) == UNIT


def test_the_budget_bounds_the_runs() -> None:
    seen = 0

    def fails(_: Unit) -> bool:
        nonlocal seen
        seen += 1
        return False

    shrink(UNIT, [0, 1], Trial(fails, budget=9))
    assert seen == 9


def test_a_race_gets_a_second_chance() -> None:
    answers = iter([False, True])
    assert Trial(lambda _: next(answers))(UNIT)


def test_each_simpler_case_is_simpler() -> None:
    case = Case.parse("client.post#4=client+keeper&keeper.death.quiet=keeper!fresh")
    simpler = [str(one) for one in simpler_cases(case)]
    assert len(simpler) == len(set(simpler))
    assert str(case) not in simpler
    assert "client.post=client+keeper&keeper.death.quiet=keeper!fresh" in simpler
    assert all(len(one) <= len(str(case)) for one in simpler)
