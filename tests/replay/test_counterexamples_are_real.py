# SPDX-License-Identifier: Apache-2.0
"""What the search says of strategies, played with real processes, memory and a real function."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.replay.stories import WORST, cells, counterexample, model, shortest

from holdfast import replay
from holdfast.replay.walks import Told, follow, walk
from holdfast.spec.trace import Trace

WALKS = 3
STEPS = 60


@pytest.mark.parametrize(("key", "machine"), list(cells()))
def test_memory_shows_what_the_search_says(clean: None, key: str, machine: str) -> None:
    trace = shortest(key, machine)
    if trace is not None:
        outcome = replay.run(trace)
        assert outcome.corrupted_bytes, outcome
        assert outcome.agrees
        return
    for seed in range(WALKS):
        outcome = replay.run(walk(model(key, machine), f"{key} {machine} {seed}", STEPS, key))
        assert not outcome.corrupted, outcome
        assert not outcome.stray, outcome


@pytest.mark.parametrize(
    ("key", "machine"),
    [
        ("mlock", "7.x none"),
        ("mlock", "2.0 none"),
        ("ghost", "2.0 none"),
        ("decoy", "2.0 none"),
        ("reference-timed", "7.x strict"),
        ("longterm-timed", "7.x lazy"),
        ("unmap", "7.x lazy"),
        ("unmap-ats", "7.x strict"),
        ("unmap-default", "7.x strict"),
        ("completion", "7.x none"),
        ("dma-buf", "2.0 none"),
        ("bounce", "7.x strict"),
        ("reset-unflushed", "7.x none"),
        ("reset-believed", "7.x lazy"),
    ],
)
def test_somebody_innocent_is_hit_by_the_shortest_story(
    clean: None, key: str, machine: str
) -> None:
    outcome = replay.run(counterexample(key, machine))
    assert outcome.corrupted_bytes > 0
    assert [step.event for step in outcome.timeline][-1] == "land"


@pytest.mark.parametrize(
    ("key", "machine"), [("mlock", "7.x none"), ("longterm-timed", "7.x lazy")]
)
def test_a_write_into_a_free_page_is_found_in_it(clean: None, key: str, machine: str) -> None:
    outcome = replay.run(counterexample(key, machine, "S1"))
    assert outcome.stray
    assert outcome.agrees


@pytest.mark.parametrize(
    ("key", "machine"),
    [("reference", "2.0 none"), ("reference", "7.x strict"), ("reference-locked", "2.0 none")],
)
def test_a_process_waits_for_bytes_that_go_to_a_page_it_has_no_more(
    clean: None, key: str, machine: str
) -> None:
    outcome = replay.run(counterexample(key, machine, "S5"))
    assert outcome.lost
    assert outcome.agrees


@pytest.mark.parametrize(
    ("key", "machine"),
    [("mlock", "7.x none"), ("reference-timed", "7.x lazy"), ("unmap-default", "7.x strict")],
)
def test_the_plain_edu_by_its_own_clock_hits_them_as_well(
    clean: None, key: str, machine: str
) -> None:
    outcome = replay.run(counterexample(key, machine), "emu:edu")
    assert outcome.corrupted_bytes > 0
    assert outcome.agrees


# -- negative controls ------------------------------------------------------------


def told(trace: Trace) -> list[Told]:
    return [(step.event, step.args) for step in trace.steps]


@pytest.mark.parametrize("target", ["paced:edu", "emu:edu"])
@pytest.mark.parametrize(
    ("key", "machine"), [("reference-timed", "7.x none"), ("longterm-timed", "7.x lazy")]
)
def test_the_same_with_the_write_before_the_kill_hurts_nobody(
    clean: None, key: str, machine: str, target: str
) -> None:
    deadly = [one for one in told(counterexample(key, machine)) if one[0] not in _TRANSFER]
    at = [event for event, _ in deadly].index("kill")
    harmless: list[Told] = [*deadly[:at], *((e, {"d": 0}) for e in _TRANSFER), *deadly[at:]]
    trace = follow(model(key, machine), harmless, key)
    assert trace.breaks == ""
    outcome = replay.run(trace, target)
    assert outcome.agrees
    assert not outcome.corrupted


_TRANSFER = ("fetch", "first_write", "land")


def test_the_same_without_the_timeout_cannot_even_be_told() -> None:
    deadly = told(counterexample("reference-timed", "7.x none"))
    with pytest.raises(LookupError, match="timeout"):
        follow(model("reference", "7.x none"), deadly, "reference")


def test_the_same_without_the_write_hurts_nobody(clean: None) -> None:
    *before, last = told(counterexample("mlock", "7.x none"))
    assert last[0] == "land"
    assert replay.run(follow(model("mlock", "7.x none"), before, "mlock")).agrees


def test_a_story_that_claims_more_than_is_so_is_not_borne_out(clean: None) -> None:
    trace = counterexample("mlock", "7.x none")
    harmless = replace(trace, steps=trace.steps[:-1])
    assert harmless.breaks == WORST
    assert replay.run(harmless).agrees is False


def test_a_story_that_claims_less_than_is_so_is_not_borne_out(clean: None) -> None:
    outcome = replay.run(replace(counterexample("mlock", "7.x none"), breaks=""))
    assert outcome.agrees is False


# -- at random ------------------------------------------------------------


@pytest.mark.parametrize("bounds", ["table", "full"])
@pytest.mark.parametrize(
    ("key", "machine"),
    [
        ("mlock", "7.x none"),
        ("unmap", "7.x lazy"),
        ("dma-buf", "7.x strict"),
        ("ghost", "2.0 none"),
    ],
)
def test_whatever_happens_at_random_is_in_memory_as_in_the_model(
    clean: None, key: str, machine: str, bounds: str
) -> None:
    for seed in range(4):
        trace = walk(model(key, machine, bounds), f"{key} {machine} {seed}", STEPS, key)
        outcome = replay.run(trace)
        assert outcome.agrees is not False, (seed, outcome)
