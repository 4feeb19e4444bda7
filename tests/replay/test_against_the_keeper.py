# SPDX-License-Identifier: Apache-2.0
"""Stories of Holdfast's own composition, played against the keeper that there is.

What breaks the composition with a guard missing is an attack on the keeper that has it.
"""

from __future__ import annotations

import pytest
from tests.replay.stories import counterexample, model

from holdfast import replay
from holdfast.errors import NotSupported
from holdfast.keeper.state import State
from holdfast.replay import kept
from holdfast.replay.walks import follow, walk

KEEPER = kept.NAME


@pytest.mark.parametrize("key", ["holdfast-release", "holdfast-lied"])
def test_what_breaks_without_a_gate_or_under_a_lie_really_does(clean: None, key: str) -> None:
    outcome = replay.run(counterexample(key, "7.x none", bounds="small"), KEEPER)
    assert outcome.corrupted["another process"] > 0
    assert outcome.recycled
    assert outcome.leases["process 0"][-1] == State.RELEASED
    assert outcome.agrees


@pytest.mark.parametrize(
    ("key", "machine"),
    [
        ("holdfast-reuse", "7.x strict"),
        ("holdfast-believes", "7.x none"),
        ("holdfast-believes", "7.x strict"),
        ("holdfast-hang-up", "7.x none"),
        ("holdfast-hang-up", "7.x strict"),
    ],
)
def test_what_breaks_with_a_guard_missing_does_not_break_the_keeper(
    clean: None, key: str, machine: str
) -> None:
    outcome = replay.run(counterexample(key, machine, bounds="small"), KEEPER)
    assert not outcome.corrupted
    assert outcome.withheld, "it went all the way that only a weaker keeper would go"


def test_an_untrusted_reset_leads_to_quarantine_and_not_to_quiet(clean: None) -> None:
    story = counterexample("holdfast-believes", "7.x none", bounds="small")
    outcome = replay.run(story, KEEPER)
    states = outcome.leases["process 0"]
    assert states[states.index(State.RESETTING) + 1] == State.QUARANTINE


@pytest.mark.parametrize("key", ["holdfast", "holdfast-revoke"])
@pytest.mark.parametrize("machine", ["7.x none", "7.x strict"])
def test_the_keeper_harms_nobody_whatever_happens(clean: None, key: str, machine: str) -> None:
    avoid = kept.UNREACHABLE | {"pull_out"}
    story = walk(model(key, machine), f"{key} {machine} 1", 80, key, avoid)
    outcome = replay.run(story, KEEPER)
    assert not outcome.corrupted
    assert outcome.leases


BEGINNING = [
    ("arrive", {"p": 0}), ("alloc", {"p": 0, "f": 0}), ("anchor_ack", {"p": 0}),
    ("reserve", {"p": 0}), ("confirm", {"p": 0}), ("post", {"p": 0, "q": 0, "d": 0}),
    ("fetch", {"d": 0}), ("first_write", {"d": 0}),
]  # fmt: skip
DEATH = [
    ("kill", {"p": 0}), ("zap", {"p": 0}), ("files", {"p": 0}), ("zombie", {"p": 0}),
    ("step", {"p": 0, "row": 0}), ("step", {"p": 0, "row": 1}),
]  # fmt: skip
END = [("land", {"d": 0}), ("last_write", {"d": 0}), ("land", {"d": 0})]


def test_a_transfer_that_is_half_done_at_death_is_drained(clean: None) -> None:
    story = follow(model("holdfast", "7.x none"), [*BEGINNING, *DEATH, *END], "holdfast")
    outcome = replay.run(story, KEEPER)
    assert outcome.agrees
    assert not outcome.withheld
    assert outcome.leases["process 0"][:3] == [State.ALIVE, State.FROZEN, State.DRAINING]


def test_a_keeper_that_is_killed_is_succeeded_in_the_middle_of_a_death(clean: None) -> None:
    crash = [("k_crash", {}), ("k_restart", {}), ("step", {"p": 0, "row": 0})]
    story = follow(model("holdfast", "7.x none"), [*BEGINNING, *DEATH, *crash, *END], "holdfast")
    outcome = replay.run(story, KEEPER)
    assert outcome.agrees
    assert State.FROZEN in outcome.leases["process 0"]


def test_what_an_emulated_iommu_cannot_do_is_refused_by_its_name(clean: None) -> None:
    with pytest.raises(NotSupported, match="unmap_part"):
        replay.run(counterexample("holdfast-release", "7.x strict", bounds="small"), KEEPER)


def test_a_story_of_another_strategy_is_refused(clean: None) -> None:
    with pytest.raises(NotSupported, match="prepare"):
        replay.run(counterexample("mlock", "7.x none"), KEEPER)


def test_a_keeper_with_nobody_behind_it_takes_everything_with_it(clean: None) -> None:
    outcome = replay.run(counterexample("keeper-alone", "7.x none"))
    assert outcome.corrupted
    assert outcome.agrees
