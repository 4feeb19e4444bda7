# SPDX-License-Identifier: Apache-2.0
"""A counterexample as a story: whose each frame is, what the card is at, and what broke."""

from __future__ import annotations

import re
from functools import cache

import pytest

from holdfast.keeper.map_state import MapState
from holdfast.keeper.state import Fact, State
from holdfast.spec import invariants, story
from holdfast.spec.explore import Explored, explore
from holdfast.spec.model import StrategyModel
from holdfast.spec.scene import Scene
from holdfast.spec.setting import BOUNDS, Iommu, Profile, Setting
from holdfast.spec.strategies import (
    SIMPLE,
    CountedTimed,
    LongtermCharged,
    Mlock,
    Unmap,
    UnmapDefault,
)
from holdfast.spec.strategy import Strategy
from holdfast.spec.trace import Step, Trace, tell
from holdfast.spec.world import FACTS, LEASE_STATES, MAP_STATES, Kept

VICTIM = "S1 with a victim"


@cache
def explored(key: str, iommu: Iommu) -> Explored:
    kind = next(each for each in SIMPLE if each.key == key)
    return explore(StrategyModel(kind, Setting(Profile.NEW, iommu, BOUNDS["table"])))


def trace_of(kind: type[Strategy], iommu: Iommu, invariant: str) -> Trace:
    found = explored(kind.key, iommu)
    return tell(found, invariant, strategy=kind.key, profile="7.x", iommu=iommu, bounds="table")


def made(*steps: Step, breaks: str = "", iommu: str = "none") -> Trace:
    return Trace("mine", "7.x", iommu, "table", breaks, {}, steps)


def test_every_step_is_numbered_and_told() -> None:
    trace = trace_of(CountedTimed, Iommu.NONE, VICTIM)
    told = " ".join(story.render(trace).split())
    for at, step in enumerate(trace.steps, 1):
        assert f"{at}. {step.actor} {' '.join(step.text.split())}" in told


def test_the_owner_of_a_frame_is_said_whenever_it_changes() -> None:
    text = story.render(trace_of(CountedTimed, Iommu.NONE, VICTIM))
    assert re.findall(r"frame 0: (.*)", text) == [
        "FREE -> P0's buffer",
        "P0's buffer -> P0's buffer, held for DMA",
        "P0's buffer, held for DMA -> held for P0's DMA",
        "held for P0's DMA -> FREE",
        "FREE -> P1's buffer",
    ]


def test_the_end_says_what_broke_and_whose_page_was_hit() -> None:
    trace = trace_of(CountedTimed, Iommu.NONE, VICTIM)
    last = story.verdict(trace)
    assert last.startswith(f"{VICTIM} is broken: {invariants.TEXTS['S1']}.")
    assert "descriptor 0 of P0 was meant for frame 0, which was given back since" in last
    assert "It went to frame 0, which is now P1's buffer. P1, who has nothing to do with it" in last
    assert " ".join(story.render(trace).split()).endswith(last)


def test_a_translation_that_lingers_is_told() -> None:
    text = story.render(trace_of(CountedTimed, Iommu.LAZY, VICTIM))
    assert "IOVA 0: -> frame 0  (was: unmapped)" in text
    assert "IOVA 0: unmapped, IOTLB still -> frame 0" in text


@pytest.mark.parametrize(
    ("kind", "iommu", "invariants"),
    [
        (Mlock, Iommu.NONE, ["S1 with a victim", "S1", "S2", "S4", "S5"]),
        (CountedTimed, Iommu.NONE, ["S1 with a victim", "S3"]),
        (Unmap, Iommu.STRICT, ["S1 with a victim", "S4'"]),
        (UnmapDefault, Iommu.STRICT, ["S1 with a victim", "S7"]),
        (LongtermCharged, Iommu.STRICT, ["S11"]),
    ],
    ids=lambda each: getattr(each, "key", ""),
)
def test_how_it_broke_is_explained(
    kind: type[Strategy], iommu: Iommu, invariants: list[str]
) -> None:
    for invariant in invariants:
        trace = trace_of(kind, iommu, invariant)
        assert story.explained(Scene(trace)), invariant
        assert "None" not in story.verdict(trace)


def test_lines_fit_the_width() -> None:
    trace = trace_of(CountedTimed, Iommu.STRICT, VICTIM)
    for width in (60, 80, 100):
        assert max(map(len, story.render(trace, width).splitlines())) <= width


def test_a_completion_is_taken_note_of_by_its_owner() -> None:
    state = {"owner[0, 1]": 1, "sw[0]": 2, "proc[1]": 1}
    trace = made(
        Step("signal", "device", "signal", {"d": 0}, state),
        Step("reap", "process", "seen", {"d": 0}, state | {"sw[0]": 3}),
    )
    assert Scene(trace).actor(2) == "P1"
    assert "2. P1       seen" in story.render(trace)


def test_the_keepers_variables_have_names() -> None:
    lease, mapping = LEASE_STATES.index(State.DRAINING), MAP_STATES.index(MapState.UNMAPPING)
    fact = FACTS.index(Fact.FLUSHED)
    after = {"lease[0]": lease, "mapping[0]": mapping, f"fact[0, {fact}]": 1, "keeper": Kept.DOWN}
    text = story.render(made(Step("x", "keeper", "something happens", {"p": 0}, after)))
    assert "lease of P0: none -> draining" in text
    assert "mapping of P0: none -> unmapping" in text
    assert f"facts of P0: {Fact.FLUSHED}" in " ".join(text.split())
    assert "keeper: runs -> is dead" in text


def test_variables_and_values_that_are_not_known_are_shown_as_they_are() -> None:
    after = {"moon[3]": 2, "tide": 1, "lease[0]": 15, "eng": 7, "hw[0]": 7, "owner[0, 0]": 1,
             "fact[0, 99]": 1, "map[0]": 1, "odd [name": 4}  # fmt: skip
    trace = made(Step("x", "moon", "it rises", {"p": 0, "z": 9}, after), breaks="S77")
    text = story.render(trace)
    for part in ("moon[3]: 0 -> 2", "tide: 0 -> 1", "lease of P0: none -> state 15", "state 7",
                 "fact 99", "map[0]: 0 -> 1", "odd [name: 0 -> 4", "S77 is broken."):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("invariant", ["", *story.TEXTS, "nothing known"])
def test_a_story_without_steps_or_arguments_is_told(invariant: str) -> None:
    assert story.render(made(breaks=invariant)).startswith("mine on Linux 7.x, IOMMU none")
    bare = made(Step("land", "fabric", "it arrives", {}, {}), breaks=invariant)
    assert "1. fabric   it arrives" in story.render(bare)


def test_a_trace_that_was_written_and_read_tells_the_same() -> None:
    trace = trace_of(Mlock, Iommu.NONE, VICTIM)
    assert story.render(Trace.from_json(trace.to_json())) == story.render(trace)
