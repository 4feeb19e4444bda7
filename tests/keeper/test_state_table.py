# SPDX-License-Identifier: Apache-2.0
"""The death protocol's table: what it must hold to, and that each of its facts is needed.

The rules here are written down a second time on purpose, without looking at the table: what proves
quiet, and what has to be known before memory goes. A table from which any fact was deleted breaks
one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.keeper import state
from holdfast.keeper.state import (
    FIRST_MEASURE,
    RELEASE_GATE,
    TABLE,
    Event,
    Fact,
    Gate,
    IllegalStep,
    Machine,
    Row,
    State,
)
from holdfast.values import Policy

GUARDED = (Policy.DRAIN, Policy.REVOKE)
EVIDENCE: Mapping[Event, frozenset[Fact]] = {
    Event.IDLE: frozenset({Fact.IDLE_CONFIRMED}),
    Event.STOPPED: frozenset({Fact.STOP_ACKNOWLEDGED}),
    Event.RESET_DONE: frozenset({Fact.RESET_TRUSTED}),
    Event.GONE: frozenset({Fact.FUNCTION_GONE}),
    Event.UNREACHABLE: frozenset({Fact.STRICTLY_UNMAPPED, Fact.IOVAS_RETIRED}),
}
"""What must have been seen before an event may lead towards release."""
FAILURES = frozenset({Event.DEADLINE, Event.NOT_STOPPED, Event.NO_PROOF})
TOWARDS_RELEASE = frozenset({State.QUIET, State.UNMAPPED, State.RELEASED})
LADDER = (
    State.FROZEN,
    State.DRAINING,
    State.STOPPING,
    State.ISOLATING,
    State.RESETTING,
    State.QUARANTINE,
)

SUBSETS = [
    frozenset(chosen)
    for size in range(len(Fact) + 1)
    for chosen in itertools.combinations(Fact, size)
]


def safe_to_release(facts: frozenset[Fact]) -> bool:
    """Nothing is mapped, and the function is no more, cannot reach it, or has come to rest.

    The last for good, and with everything that it had sent arrived.
    """
    at_rest = facts & {Fact.IDLE_CONFIRMED, Fact.STOP_ACKNOWLEDGED, Fact.RESET_TRUSTED}
    return Fact.UNMAPPED_IN_FULL in facts and (
        Fact.FUNCTION_GONE in facts
        or {Fact.STRICTLY_UNMAPPED, Fact.IOVAS_RETIRED} <= facts
        or (bool(at_rest) and {Fact.CANNOT_POST, Fact.FLUSHED} <= facts)
    )


def violations(rows: Sequence[Row], gates: Mapping[Policy, Gate]) -> list[str]:
    """Every way in which a table and its gates break the rules; empty for good ones."""
    found = []
    for row in rows:
        if row.target is State.RELEASED and row.event is not Event.FREED:
            found.append(f"{row}: released without the memory being returned")
        if row.event in FAILURES and row.target in TOWARDS_RELEASE:
            found.append(f"{row}: a failure leads towards release")
        if (
            row.event in FAILURES
            and row.source in LADDER
            and row.target in LADDER
            and LADDER.index(row.target) <= LADDER.index(row.source)
        ):
            found.append(f"{row}: a failure leads to no stronger measure")
        needed = EVIDENCE.get(row.event, frozenset())
        if row.target in TOWARDS_RELEASE and not needed <= row.needs:
            found.append(f"{row}: taken without {sorted(needed - row.needs)}")
    for policy in GUARDED:
        found += [
            f"{policy}: the gate is open with {sorted(facts)}"
            for facts in SUBSETS
            if gates[policy].missing(facts) == () and not safe_to_release(facts)
        ]
    return found


def test_the_table_keeps_every_rule() -> None:
    assert violations(TABLE, RELEASE_GATE) == []


@pytest.mark.parametrize("policy", GUARDED)
def test_the_gate_opens_for_everything_that_is_safe(policy: Policy) -> None:
    shut = [
        facts
        for facts in SUBSETS
        if safe_to_release(facts) and RELEASE_GATE[policy].missing(facts) != ()
    ]
    assert shut == []


ROW_FACTS = [
    pytest.param(number, fact, id=f"{row.source}-{row.event}-{fact.name}")
    for number, row in enumerate(TABLE)
    for fact in sorted(row.needs)
]


@pytest.mark.parametrize(("number", "fact"), ROW_FACTS)
def test_deleting_a_fact_from_a_row_is_noticed(number: int, fact: Fact) -> None:
    mutated = list(TABLE)
    mutated[number] = replace(TABLE[number], needs=TABLE[number].needs - {fact})
    assert violations(mutated, RELEASE_GATE)


GATE_FACTS = [
    pytest.param(policy, number, fact, id=f"{policy}-way{number}-{fact.name}")
    for policy in GUARDED
    for number, way in enumerate(RELEASE_GATE[policy].ways)
    for fact in sorted(way)
]


@pytest.mark.parametrize(("policy", "number", "fact"), GATE_FACTS)
def test_deleting_a_fact_from_the_gate_is_noticed(policy: Policy, number: int, fact: Fact) -> None:
    ways = list(RELEASE_GATE[policy].ways)
    ways[number] -= {fact}
    assert violations(TABLE, {**RELEASE_GATE, policy: Gate(tuple(ways))})


@pytest.mark.parametrize("policy", GUARDED)
def test_replacing_the_gate_by_the_negative_controls_is_noticed(policy: Policy) -> None:
    assert violations(TABLE, {**RELEASE_GATE, policy: RELEASE_GATE[Policy.RELEASE]})


@pytest.mark.parametrize(
    "row", [row for row in TABLE if row.event in FAILURES], ids=lambda row: f"{row.source}"
)
def test_letting_a_failure_lead_to_quiet_is_noticed(row: Row) -> None:
    mutated = [replace(each, target=State.QUIET) if each is row else each for each in TABLE]
    assert violations(mutated, RELEASE_GATE)


def _reach(start: State, rows: Iterable[Row]) -> set[State]:
    seen, todo = {start}, [start]
    edges = list(rows)
    while todo:
        here = todo.pop()
        for row in edges:
            if row.source is here and row.target not in seen:
                seen.add(row.target)
                todo.append(row.target)
    return seen


def test_every_state_is_reached_and_none_is_a_dead_end() -> None:
    assert _reach(State.ALIVE, TABLE) == set(State)
    for each in State:
        assert State.RELEASED in _reach(each, TABLE), f"{each} is a dead end"
    assert not [row for row in TABLE if row.source is State.RELEASED]


def test_every_policy_has_a_first_measure_and_only_the_control_skips_the_proof() -> None:
    assert set(FIRST_MEASURE) == set(Policy) == set(RELEASE_GATE)
    targets = {
        policy: next(
            row.target
            for row in TABLE
            if row.source is State.FROZEN and row.event is FIRST_MEASURE[policy]
        )
        for policy in Policy
    }
    assert targets == {
        Policy.DRAIN: State.DRAINING,
        Policy.REVOKE: State.STOPPING,
        Policy.RELEASE: State.QUIET,
    }


STEPS = st.lists(
    st.tuples(st.sampled_from(Event), st.frozensets(st.sampled_from(Fact), max_size=2)),
    max_size=40,
)


@given(st.sampled_from(GUARDED), STEPS)
def test_no_order_of_events_releases_without_proof(
    policy: Policy, steps: list[tuple[Event, frozenset[Fact]]]
) -> None:
    machine = Machine(policy)
    for event, facts in steps:
        if event is Event.RELEASE:
            continue  # the negative control's own event: no guarded policy begins with it
        machine.observe(*facts)
        before = machine.state
        try:
            machine.fire(event)
        except IllegalStep:
            assert machine.state is before
        if machine.state in (State.QUIET, State.RELEASED):
            assert machine.facts & set().union(*EVIDENCE.values())
        if machine.state is State.RELEASED:
            assert safe_to_release(frozenset(machine.facts))


def test_a_timeout_carries_no_fact_and_leads_to_the_next_stronger_measure() -> None:
    rows = [row for row in TABLE if row.event is Event.DEADLINE]
    assert {row.source for row in rows} == {State.DRAINING, State.ISOLATING}
    for row in rows:
        assert row.needs == frozenset()
        assert row.target not in TOWARDS_RELEASE
        assert LADDER.index(row.target) == LADDER.index(row.source) + 1


@given(
    st.sampled_from(GUARDED),
    st.lists(st.sampled_from(sorted(FAILURES)), max_size=30),
    st.frozensets(st.sampled_from(Fact)),
)
def test_no_number_of_failures_and_timeouts_leads_to_release(
    policy: Policy, failures: list[Event], facts: frozenset[Fact]
) -> None:
    """Not even with every fact observed: something must have said so."""
    machine = Machine(policy, facts=set(facts))
    machine.fire(Event.DEATH)
    machine.fire(FIRST_MEASURE[policy])
    for event in failures:
        try:
            machine.fire(event)
        except IllegalStep:
            continue
        assert machine.state in LADDER


@given(st.sampled_from(GUARDED), STEPS)
def test_released_is_never_reached_without_a_whole_way_of_the_gate(
    policy: Policy, steps: list[tuple[Event, frozenset[Fact]]]
) -> None:
    machine = Machine(policy)
    nothing: frozenset[Fact] = frozenset()
    for event, facts in [(Event.DEATH, nothing), (FIRST_MEASURE[policy], nothing), *steps]:
        machine.observe(*facts)
        try:
            machine.fire(event)
        except IllegalStep:
            continue
        if machine.state is State.QUARANTINE:
            counted = state.QUIET_PROOFS | {Fact.FLUSHED}
            assert not machine.facts & counted, "what was seen before counts no more"
        if machine.state is State.RELEASED:
            assert any(way <= machine.facts for way in RELEASE_GATE[policy].ways)


def test_a_row_without_its_fact_is_refused_and_the_machine_stays_put() -> None:
    machine = Machine(Policy.DRAIN)
    machine.fire(Event.DEATH)
    machine.fire(Event.DRAIN)
    with pytest.raises(IllegalStep, match="not observed"):
        machine.fire(Event.IDLE)
    assert machine.state is State.DRAINING
    machine.observe(Fact.IDLE_CONFIRMED)
    assert machine.fire(Event.IDLE) is State.QUIET


def test_the_release_gate_names_what_it_waits_for() -> None:
    machine = Machine(Policy.DRAIN, State.QUIET, {Fact.IDLE_CONFIRMED, Fact.UNMAPPED_IN_FULL})
    assert machine.withheld() == (Fact.FLUSHED, Fact.CANNOT_POST)
    for fact in (Fact.CANNOT_POST, Fact.FLUSHED):
        with pytest.raises(IllegalStep, match="release gate closed"):
            machine.fire(Event.FREED)
        machine.observe(fact)
    assert machine.fire(Event.FREED) is State.RELEASED


@pytest.mark.parametrize("policy", GUARDED)
def test_what_a_gate_waits_for_is_a_way_through_it(policy: Policy) -> None:
    gate = RELEASE_GATE[policy]
    for facts in SUBSETS:
        missing = gate.missing(facts)
        assert bool(missing) is not any(way <= facts for way in gate.ways)
        assert any(way <= facts | set(missing) for way in gate.ways)


@pytest.mark.parametrize("proof", sorted(state.QUIET_PROOFS))
def test_a_read_is_waited_for_where_the_engine_proved_quiet_and_nowhere_else(proof: Fact) -> None:
    machine = Machine(Policy.DRAIN, State.QUIET, {Fact.CANNOT_POST})
    assert Fact.FUNCTION_GONE not in machine.withheld(), "its way is no shorter by the read"
    machine.observe(proof)
    assert machine.withheld() == (Fact.FLUSHED, Fact.UNMAPPED_IN_FULL)
    machine.observe(Fact.FUNCTION_GONE)
    assert machine.withheld() == (Fact.UNMAPPED_IN_FULL,)
    unmapped = {proof, Fact.STRICTLY_UNMAPPED, Fact.IOVAS_RETIRED, Fact.UNMAPPED_IN_FULL}
    assert Machine(Policy.DRAIN, State.UNMAPPED, unmapped).withheld() == ()


def test_a_read_before_quarantine_does_not_count_after_it() -> None:
    """It pushed what had been sent until then; what led to quarantine may have sent more."""
    seen = {Fact.IDLE_CONFIRMED, Fact.FLUSHED, Fact.CANNOT_POST, Fact.UNMAPPED_IN_FULL}
    machine = Machine(Policy.DRAIN, State.QUIET, seen)
    machine.fire(Event.NO_PROOF)
    assert machine.facts == {Fact.CANNOT_POST, Fact.UNMAPPED_IN_FULL}
    machine.observe(Fact.IDLE_CONFIRMED)
    machine.fire(Event.IDLE)
    assert machine.withheld() == (Fact.FLUSHED,)
    with pytest.raises(IllegalStep, match="release gate closed"):
        machine.fire(Event.FREED)


def test_the_negative_control_releases_with_no_fact_at_all() -> None:
    machine = Machine(Policy.RELEASE)
    for event in (Event.DEATH, Event.RELEASE, Event.FREED):
        machine.fire(event)
    assert machine.state is State.RELEASED
    assert machine.facts == set()


def test_a_lease_leaves_quarantine_only_by_proof() -> None:
    leaving = [row for row in TABLE if row.source is State.QUARANTINE]
    assert {row.event for row in leaving} == {
        Event.IDLE,
        Event.RESET_DONE,
        Event.GONE,
        Event.UNREACHABLE,
    }
    assert all(row.needs for row in leaving)


def test_the_proofs_that_the_keeper_accepts_are_the_known_ones() -> None:
    assert (
        frozenset({Fact.IDLE_CONFIRMED, Fact.STOP_ACKNOWLEDGED, Fact.RESET_TRUSTED})
        == state.QUIET_PROOFS
    )
