# SPDX-License-Identifier: Apache-2.0
"""Logs of keepers: what the specification allows is accepted, and what it does not is refused."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tests.conftest import eventually

import holdfast
from holdfast.keeper.state import Fact
from holdfast.spec.behaviour import Behaviours, Drift, check, parse
from holdfast.spec.tables import DRAIN, REVOKE, Tables
from holdfast.torture import edu_actors
from holdfast.torture.actors import Child, spawn
from holdfast.torture.stack import Stack

LONG = 20.0


@functools.cache
def behaviours(policy: str, strict: bool, without: Fact | None = None) -> Behaviours:
    tables = Tables.of(policy)
    return Behaviours(policy, strict=strict, tables=tables.without(without) if without else tables)


Told = dict[str, Any]
NO_POST, IDLE, FLUSHED, IN_FULL = "CANNOT_POST", "IDLE_CONFIRMED", "FLUSHED", "UNMAPPED_IN_FULL"
STRICTLY, RETIRED, GONE = "STRICTLY_UNMAPPED", "IOVAS_RETIRED", "FUNCTION_GONE"
STOPPED, RESET = "STOP_ACKNOWLEDGED", "RESET_TRUSTED"


def step(state: str, event: str, *facts: str, keeper: int = 100, lease: int = 1) -> Told:
    return {
        "at_ns": 5, "lease": lease, "pid": 7, "state": state, "event": event,
        "facts": list(facts), "policy": DRAIN, "why": "because", "keeper": keeper,
    }  # fmt: skip


def later(steps: Sequence[Told], **change: Any) -> list[Told]:
    return [{**each, **change} for each in steps]


def start(*, strict: bool) -> Told:
    return {"at_ns": 1, "what": "start", "anchor": 2, "function": 3, "strict": strict,
            "keeper": 100}  # fmt: skip


def lines(steps: Sequence[Told], *, strict: bool = False) -> list[str]:
    return [json.dumps(each) + "\n" for each in (start(strict=strict), *steps)]


def drifts(steps: Sequence[Told], *, strict: bool = False) -> list[Drift]:
    return check(parse(lines(steps, strict=strict)), behaviours)


# -- logs as they should be ------------------------------------------------------------

ALIVE = step("alive", "")
FROZEN = step("frozen", "death")
FROZEN_SURE = step("frozen", "death", NO_POST)
DRAINING = step("draining", "drain", NO_POST)
QUIET = step("quiet", "idle confirmed", NO_POST, IDLE)
RELEASED = step("released", "memory returned", NO_POST, IDLE, FLUSHED, IN_FULL)
DRAINED = [ALIVE, FROZEN, DRAINING, QUIET, RELEASED]

STOPPING = step("stopping", "deadline", NO_POST)
ISOLATING = step("isolating", "stop not acknowledged", NO_POST)
RESETTING = step("resetting", "deadline", NO_POST)
QUARANTINED = step("quarantine", "nothing proves quiet", NO_POST)
LADDER = [ALIVE, FROZEN, step("draining", "drain"), STOPPING, ISOLATING, RESETTING]
DOWN_AND_BACK = [*LADDER, QUARANTINED, QUIET, RELEASED]
DOWN_TWICE = [*LADDER, QUARANTINED, QUIET, QUARANTINED, QUIET, RELEASED]
RESET_AT_LAST = [
    *LADDER, QUARANTINED, step("quiet", "reset acknowledged and trusted", NO_POST, RESET),
    step("released", "memory returned", NO_POST, RESET, FLUSHED, IN_FULL),
]  # fmt: skip

UNMAPPED_FACTS = (NO_POST, STRICTLY, RETIRED, IN_FULL)
UNMAPPED = [
    *LADDER, step("unmapped", "unmapped under a strict translation", *UNMAPPED_FACTS),
    step("released", "memory returned", *UNMAPPED_FACTS),
]  # fmt: skip

REVOKED = later([
    ALIVE, FROZEN_SURE, step("stopping", "revoke", NO_POST),
    step("quiet", "stop acknowledged", NO_POST, STOPPED),
    step("released", "memory returned", NO_POST, STOPPED, FLUSHED, IN_FULL),
], policy=REVOKE)  # fmt: skip

PULLED_OUT = [
    ALIVE, FROZEN, DRAINING, step("quiet", "the function is gone", NO_POST, GONE),
    step("released", "memory returned", NO_POST, GONE, IN_FULL),
]  # fmt: skip
PULLED_OUT_OF_QUARANTINE = [
    *LADDER, QUARANTINED, *PULLED_OUT[3:],
]  # fmt: skip

SUCCEEDED = [*DRAINED[:3], *later([ALIVE, *DRAINED[1:]], keeper=101)]
SUCCEEDED_TWICE = [
    *LADDER, *later(DRAINED[1:4], keeper=101), *later([FROZEN, *DOWN_TWICE[2:]], keeper=102),
]  # fmt: skip
SUCCEEDED_BEHIND_A_LINE = [*DRAINED[:2], *later(DRAINED[1:], keeper=101)]

GOOD = {
    "drain": (DRAINED, False),
    "drain, translated": (DRAINED, True),
    "nothing more can be posted from the beginning": ([FROZEN_SURE, *DRAINED[2:]], False),
    "revoke": (REVOKED, False),
    "the ladder down to quarantine and back": (DOWN_AND_BACK, False),
    "down to quarantine twice": (DOWN_TWICE, False),
    "quarantine ends with a reset": (RESET_AT_LAST, False),
    "unmapped under a strict translation": (UNMAPPED, True),
    "the function is gone": (PULLED_OUT, False),
    "the function is gone, in quarantine": (PULLED_OUT_OF_QUARANTINE, False),
    "a successor takes over in mid-drain": (SUCCEEDED, False),
    "two successors": (SUCCEEDED_TWICE, False),
    "a keeper that was killed before it wrote its line": (SUCCEEDED_BEHIND_A_LINE, False),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_log_of_what_should_happen_is_accepted(name: str) -> None:
    steps, strict = GOOD[name]
    assert drifts(steps, strict=strict) == []


@pytest.mark.parametrize("name", GOOD)
def test_a_log_that_ends_anywhere_is_accepted(name: str) -> None:
    """The keeper may be in the middle of it, or have been killed for good."""
    steps, strict = GOOD[name]
    for end in range(len(steps)):
        assert drifts(steps[:end], strict=strict) == []


@pytest.mark.parametrize("name", GOOD)
def test_an_explanation_is_no_step(name: str) -> None:
    steps, strict = GOOD[name]
    twice = [again for each in steps for again in (each, {**each, "why": "still", "at_ns": 6})]
    assert drifts(twice, strict=strict) == []


def test_leases_are_told_apart() -> None:
    both = [each for pair in zip(DRAINED, later(DRAINED, lease=2), strict=True) for each in pair]
    assert drifts(both) == []
    wrong = [each for each in both if (each["lease"], each["state"]) != (2, "quiet")]
    assert [drift.lease for drift in drifts(wrong)] == [2]


# -- logs that were tampered with ------------------------------------------------------------


def refused(steps: Sequence[Told], *, strict: bool = False) -> Drift:
    (drift,) = drifts(steps, strict=strict)
    return drift


@pytest.mark.parametrize(
    "name",
    [
        "drain", "drain, translated", "revoke", "the ladder down to quarantine and back",
        "unmapped under a strict translation", "the function is gone",
    ],
)  # fmt: skip
def test_a_step_that_is_missing_is_noticed_at_the_next_one(name: str) -> None:
    steps, strict = GOOD[name]
    for at in range(1, len(steps) - 1):
        drift = refused([*steps[:at], *steps[at + 1 :]], strict=strict)
        assert (drift.number, drift.line.state) == (at + 1, steps[at + 1]["state"])
        assert drift.why.startswith(("nothing leads there; possible: ", "released with"))


@pytest.mark.parametrize("fact", RELEASED["facts"])
def test_a_release_without_any_one_of_its_facts_is_refused(fact: str) -> None:
    facts = [each for each in RELEASED["facts"] if each != fact]
    drift = refused([*DRAINED[:4], {**RELEASED, "facts": facts}])
    assert (drift.lease, drift.number) == (1, 5)
    assert str(drift).startswith("lease 1, its step 5 (released on 'memory returned'): ")


def test_a_release_that_was_not_flushed_is_refused_and_says_with_what() -> None:
    drift = refused([*DRAINED[:4], step("released", "memory returned", NO_POST, IDLE, IN_FULL)])
    assert drift.why == (
        "released with CANNOT_POST, IDLE_CONFIRMED, UNMAPPED_IN_FULL, which cannot be all that was "
        "observed"
    )


def test_quiet_without_proof_is_refused() -> None:
    drift = refused([*DRAINED[:3], step("quiet", "idle confirmed", NO_POST), RELEASED])
    assert drift.number == 4
    assert drift.why == "with CANNOT_POST observed, which cannot be all"


def test_a_state_that_was_skipped_is_refused_and_says_what_was_possible() -> None:
    drift = refused([ALIVE, FROZEN, QUIET, RELEASED])
    assert drift.number == 3
    assert drift.why == "nothing leads there; possible: draining/drain"


def test_unmapped_without_a_strict_translation_is_refused() -> None:
    drift = refused(UNMAPPED, strict=False)
    assert (drift.number, drift.line.state) == (7, "unmapped")
    assert drift.why.startswith("nothing leads there; possible: ")


def test_a_log_that_does_not_say_that_it_is_strict_is_not() -> None:
    log = parse(lines(UNMAPPED)[1:])
    assert log.strict is None
    assert [drift.number for drift in check(log, behaviours)] == [7]


@pytest.mark.parametrize(
    ("at", "fact"),
    [(1, IDLE), (1, FLUSHED), (1, IN_FULL), (2, FLUSHED), (2, STOPPED), (2, RESET), (3, STOPPED)],
)
def test_a_fact_that_cannot_be_known_yet_is_refused(at: int, fact: str) -> None:
    steps = list(DRAINED)
    steps[at] = {**steps[at], "facts": [*steps[at]["facts"], fact]}
    drift = refused(steps)
    assert drift.number == at + 1
    assert fact in drift.why


def test_facts_that_quarantine_forgets_are_refused_there() -> None:
    drift = refused([*DRAINED[:4], {**QUARANTINED, "facts": [NO_POST, IDLE, FLUSHED]}])
    assert drift.number == 5
    assert "FLUSHED" in drift.why


def test_what_a_successor_may_do_again_its_predecessor_may_not() -> None:
    again = [*DRAINED[:3], *DRAINED[1:]]
    assert drifts(SUCCEEDED) == []
    drift = refused(again)
    assert (drift.number, drift.line.state) == (4, "frozen")


def test_a_successor_does_not_begin_in_the_middle() -> None:
    drift = refused([*DRAINED[:3], *later(DRAINED[3:], keeper=101)])
    assert (drift.number, drift.line.state) == (4, "quiet")
    assert drift.why == "nothing leads there; possible: frozen/death"


def test_nothing_comes_after_the_release() -> None:
    drift = refused([*DRAINED, QUARANTINED])
    assert drift.number == 6
    assert refused([*DRAINED, FROZEN]).number == 6


def test_another_policys_measure_is_refused() -> None:
    drift = refused(later(REVOKED, policy=DRAIN))
    assert (drift.number, drift.line.state) == (3, "stopping")
    drift = refused(later(DRAINED, policy=REVOKE))
    assert (drift.number, drift.line.state) == (3, "draining")


def test_only_the_first_line_that_is_not_explained_is_told() -> None:
    assert refused([FROZEN, QUIET, DRAINING, QUIET]).number == 2


# -- negative controls ------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "steps"),
    [
        pytest.param(
            Fact.FLUSHED,
            [*DRAINED[:4], step("released", "memory returned", NO_POST, IDLE, IN_FULL)],
            id="flushed",
        ),
        pytest.param(
            Fact.IDLE_CONFIRMED,
            [*DRAINED[:3], step("quiet", "idle confirmed", NO_POST)],
            id="idle confirmed",
        ),
    ],
)
def test_tables_without_a_guard_accept_what_the_real_ones_refuse(
    without: Fact, steps: list[Told]
) -> None:
    log = parse(lines(steps))
    assert check(log, behaviours)
    assert not check(log, lambda policy, strict: behaviours(policy, strict, without))


# -- what is not a log ------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        "nonsense",
        '{"lease": 1',
        "5",
        "null",
        "[]",
        json.dumps({**FROZEN, "state": "asleep"}),
        json.dumps({**FROZEN, "event": "boredom"}),
        json.dumps({**FROZEN, "facts": ["HEARSAY"]}),
        json.dumps({**FROZEN, "facts": None}),
        json.dumps({**FROZEN, "lease": "first"}),
        json.dumps({**FROZEN, "keeper": None}),
        *(json.dumps({k: v for k, v in FROZEN.items() if k != key}) for key in FROZEN
          if key != "pid"),
    ],
)  # fmt: skip
def test_a_line_that_is_none_is_named(wrong: str) -> None:
    text = [*lines([ALIVE]), "\n", wrong, *lines([FROZEN])]
    with pytest.raises(ValueError, match=r"^line 4: "):
        parse(text)


def test_a_log_says_what_was_in_it() -> None:
    log = parse([*lines(DRAINED, strict=True), "", *lines(later(REVOKED, lease=2), strict=True)])
    assert log.strict is True
    assert log.policies == {1: DRAIN, 2: REVOKE}
    assert [line.state for line in log.leases[1]] == [each["state"] for each in DRAINED]
    last = log.leases[1][-1]
    assert (last.event, last.keeper, last.at_ns) == ("memory returned", 100, 5)
    assert last.facts == frozenset(RELEASED["facts"])


def test_an_empty_log_is_one() -> None:
    log = parse([])
    assert (log.leases, log.policies, log.strict) == ({}, {}, None)
    assert check(log, behaviours) == []


# -- a real one ------------------------------------------------------------


def killed_in_mid_dma(stack: Stack) -> None:
    child: Child = spawn(edu_actors.client(stack.target))
    child.tell(b"g")
    edu_actors.client_started(child)
    child.kill()
    child.reap()


def states(stack: Stack) -> list[str]:
    return [lease["state"] for lease in stack.ps()["leases"]]


def test_a_real_keepers_log_is_a_behaviour_of_the_specification(
    serve: Callable[..., Stack],
) -> None:
    """One client is killed in mid-DMA, one closes; then one is killed, and the keeper too."""
    stack = serve("emu:edu?delay=0.3")
    killed_in_mid_dma(stack)
    with holdfast.open(stack.target, access="exclusive", timeout=LONG) as card:
        buffer = card.alloc(64)
        buffer.array[:] = 1
        edu_actors.engine_of(card).to_card(buffer).wait(LONG)
    assert eventually(lambda: states(stack) == ["released"] * 2, LONG)
    keeper = stack.keeper_pid
    killed_in_mid_dma(stack)
    assert eventually(lambda: stack.log.read_text().count("draining") >= 3, LONG)
    os.kill(keeper, signal.SIGKILL)
    # Only a lease that still lives is taken over.
    assert eventually(lambda: states(stack) == ["released"], LONG)
    text = stack.log.read_text().splitlines()
    log = parse(text)
    assert len(log.leases) == 3
    assert log.strict
    assert len({line.keeper for lines in log.leases.values() for line in lines}) == 2
    assert check(log, behaviours) == []
    without = [each for each in text if json.loads(each).get("state") != "quiet"]
    assert len(check(parse(without), behaviours)) == 3
