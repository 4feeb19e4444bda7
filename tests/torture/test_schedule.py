# SPDX-License-Identifier: Apache-2.0
"""Schedules: fixed by the seed, written as lines, read back from them the same."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.steps import ROLES, STEPS
from holdfast.torture.plan import UNIT, Wanted, can_die, control, plan, steps_of
from holdfast.torture.run import ready
from holdfast.torture.schedule import (
    ACCESSES,
    MEMORIES,
    MOMENT,
    MOST_LANES,
    Case,
    Setting,
    Strike,
    Unit,
)
from holdfast.values import Policy, Target

XDMA = "emu:xdma"
MANY = Wanted(XDMA, "xdma", 4000, 1)

strikes = st.builds(
    Strike,
    st.sampled_from([*STEPS, MOMENT]),
    st.frozensets(st.sampled_from(ROLES), min_size=1),
    st.integers(1, 100_000),
)
cases = st.builds(Case, st.lists(strikes, min_size=1, max_size=2).map(tuple), st.booleans())
settings = st.builds(
    Setting,
    st.sampled_from(Policy),
    st.sampled_from(MEMORIES),
    st.sampled_from(ACCESSES),
    st.sampled_from(["none", "hang@3", "wild,refuse_reset@7", "hang@2-5"]),
    st.integers(1, MOST_LANES),
)
units = st.builds(Unit, st.just(XDMA), settings, st.lists(cases, min_size=1).map(tuple))


@given(units)
def test_a_unit_is_read_back_from_its_line(unit: Unit) -> None:
    assert Unit.parse(unit.target, str(unit)) == unit
    assert "\n" not in str(unit)


@given(units)
def test_a_unit_can_be_sent_elsewhere(unit: Unit) -> None:
    assert pickle.loads(pickle.dumps(unit)) == unit


def test_a_case_alone_is_a_line_of_its_own() -> None:
    unit = plan(MANY)[0]
    alone = Unit.parse(XDMA, str(unit.alone(unit.cases[3])))
    assert alone.cases == (unit.cases[3],)
    assert alone.setting.lanes == 1
    assert alone.setting.policy is unit.setting.policy


@pytest.mark.parametrize(
    "line",
    [
        "",
        "drain/arena/shared/none/3",
        "drain/arena/shared/none client.posted=client",
        "later/arena/shared/none/3 client.posted=client",
        "drain/sea/shared/none/3 client.posted=client",
        "drain/arena/alone/none/3 client.posted=client",
        "drain/arena/shared/none/0 client.posted=client",
        "drain/arena/shared/none/99 client.posted=client",
        "drain/arena/shared/none/x client.posted=client",
        "drain/arena/shared//3 client.posted=client",
        "drain/arena/shared/none/3 client.posed=client",
        "drain/arena/shared/none/3 client.posted",
        "drain/arena/shared/none/3 client.posted=",
        "drain/arena/shared/none/3 client.posted=cat",
        "drain/arena/shared/none/3 client.posted#0=client",
        "drain/arena/shared/none/3 client.posted#=client",
        "drain/arena/shared/none/3 client.posted#-1=client",
        "drain/arena/shared/none/3 client.posted=client!stale",
        "drain/arena/shared/none/3 client.post=client&client.posted=client&client.wait=client",
    ],
)
def test_a_line_that_says_nothing_sensible_is_refused(line: str) -> None:
    with pytest.raises(UsageError):
        Unit.parse(XDMA, line)


# -- plans ------------------------------------------------------------


def test_the_seed_fixes_the_schedule() -> None:
    assert plan(MANY) == plan(MANY)
    other = plan(Wanted(XDMA, "xdma", 4000, 2))
    assert [str(unit) for unit in other] != [str(unit) for unit in plan(MANY)]


def test_a_plan_has_the_kills_that_were_asked_for() -> None:
    for kills in (1, 7, UNIT, UNIT + 1, 4000):
        made = plan(Wanted(XDMA, "xdma", kills, 5))
        assert sum(len(unit.cases) for unit in made) == kills
        assert [unit.number for unit in made] == list(range(1, len(made) + 1))


def test_every_step_gets_its_share_and_every_role_dies() -> None:
    strikes_of = [s for unit in plan(MANY) for case in unit.cases for s in case.strikes]
    steps = Counter(strike.step for strike in strikes_of)
    assert set(steps) == set(steps_of(MANY))
    elsewhere = {name for name in STEPS if name.startswith("keeper.mediation.")}
    elsewhere |= {"client.pin.reserved", "client.pin.placed"}  # real functions only
    assert set(steps_of(MANY)) == set(STEPS) - elsewhere | {MOMENT}
    assert min(steps.values()) > 4000 / len(steps) / 3
    died = Counter(role for strike in strikes_of for role in strike.kill)
    assert set(died) == set(ROLES)
    assert died["keeper"] > 400
    assert died["anchor"] > 200


def test_processes_die_alone_and_in_pairs() -> None:
    sizes = Counter(len(case.kill) for unit in plan(MANY) for case in unit.cases)
    assert sizes[1] > 1000
    assert sizes[2] > 500
    alone = plan(Wanted(XDMA, "xdma", 500, 1, pairs=False))
    assert all(len(s.kill) == 1 for unit in alone for case in unit.cases for s in case.strikes)


def test_at_least_one_client_in_a_hundred_is_a_fresh_interpreter() -> None:
    fresh = sum(case.fresh for unit in plan(MANY) for case in unit.cases)
    assert 0.01 * 4000 <= fresh <= 0.03 * 4000


def test_what_ends_a_stack_comes_last() -> None:
    made = plan(MANY)
    assert any(case.fatal for unit in made for case in unit.cases)
    for unit in made:
        assert not any(case.fatal for case in unit.cases[:-1])


def test_faults_are_mixed_in_and_the_settings_vary() -> None:
    made = plan(MANY)
    assert {unit.setting.memory for unit in made} == set(MEMORIES)
    assert {unit.setting.access for unit in made} == {"shared", "exclusive"}
    assert {unit.setting.policy for unit in made} == {Policy.DRAIN, Policy.REVOKE}
    assert any(unit.setting.faulty for unit in made)
    assert not any(u.setting.faulty for u in plan(Wanted(XDMA, "xdma", 4000, 1, faults="none")))
    hanging = plan(Wanted(XDMA, "xdma", 40, 1, faults="hang@9"))
    assert {unit.setting.faults for unit in hanging} == {"hang@9"}


def test_only_chosen_steps_and_actors_take_part() -> None:
    chosen = Wanted(
        XDMA, "xdma", 300, 1, steps="client.pos*", actors=frozenset({"client", "anchor"})
    )
    every = [case for unit in plan(chosen) for case in unit.cases]
    assert {s.step for case in every for s in case.strikes} <= {"client.posted", "client.post"}
    assert frozenset().union(*(case.kill for case in every)) == {"client", "anchor"}
    with pytest.raises(UsageError, match=r"client\.posted"):
        plan(Wanted(XDMA, "xdma", 1, 1, steps="nothing.*"))


def test_a_card_cannot_be_killed_and_neither_can_somebody_elses_server() -> None:
    assert can_die(Target.parse("pci:0000:03:00.0")) == {"client", "keeper"}
    assert "function" not in can_die(Target.parse("vfio-user:/run/x.sock"))
    made = plan(Wanted("pci:0000:03:00.0", "edu", 200, 1, actors=frozenset({"client", "keeper"})))
    for unit in made:
        assert unit.setting.access == "exclusive"
        assert unit.setting.memory == "files"
        for case in unit.cases:
            assert case.kill <= {"client", "keeper"}
            assert not any(strike.step.startswith("function.") for strike in case.strikes)


def test_the_control_is_named_so_and_kills_in_mid_dma() -> None:
    unit = control(MANY, 12)
    assert unit.setting.policy is Policy.RELEASE
    assert unit.setting.memory == "arena"
    assert len(unit.cases) == 12
    assert {str(case) for case in unit.cases} == {"client.doorbell#3=client"}


def test_an_emulated_function_gets_a_link_that_can_be_interrupted() -> None:
    assert "link_rate=" in ready("emu:xdma")
    assert "link_rate=1M" in ready("emu:xdma?link_rate=1M")
    assert ready("vfio-user:/run/x.sock") == "vfio-user:/run/x.sock"
