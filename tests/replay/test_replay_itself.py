# SPDX-License-Identifier: Apache-2.0
"""The replay as a tool: what it refuses, what it notices, what it leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from tests.replay.stories import counterexample, model

from holdfast import replay
from holdfast.errors import NotSupported, UsageError
from holdfast.replay import playing
from holdfast.replay.failure import Disagreement
from holdfast.replay.outcome import Outcome
from holdfast.replay.walks import follow
from holdfast.spec.trace import Step, Trace


def changed(trace: Trace, at: int, **changes: Any) -> Trace:
    """The story with another step at one place."""
    steps = list(trace.steps)
    steps[at] = replace(steps[at], **changes)
    return replace(trace, steps=steps)


def test_an_unknown_event_is_refused_by_its_name(clean: None) -> None:
    with pytest.raises(NotSupported, match="comet"):
        replay.run(changed(counterexample("mlock", "7.x none"), 3, event="comet"))


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UsageError, match="emu:xdma"):
        replay.run(counterexample("mlock", "7.x none"), "emu:xdma")


def test_an_empty_story_is_refused(clean: None) -> None:
    with pytest.raises(UsageError, match="no steps"):
        replay.run(Trace("mlock", "7.x", "none", "table", ""))


def test_the_plain_edu_refuses_what_it_cannot_do(clean: None) -> None:
    with pytest.raises(NotSupported, match="bme_off"):
        replay.run(counterexample("reset-unflushed", "7.x none"), "emu:edu")


@pytest.mark.parametrize(
    ("after", "what"),
    [
        ({"ref[0]": 2}, "count of frame 0"),
        ({"map[0, 0]": 0}, "page tables"),
        ({"proc[0]": 2}, "lives"),
    ],
)
def test_a_figure_that_is_not_so_is_noticed(
    clean: None, after: Mapping[str, int], what: str
) -> None:
    trace = counterexample("mlock", "7.x none")
    told = {
        name: value for name, value in (dict(trace.steps[0].after) | dict(after)).items() if value
    }
    with pytest.raises(Disagreement, match=what):
        replay.run(changed(trace, 0, after=told))


def test_a_frame_that_is_not_free_is_given_to_nobody(clean: None) -> None:
    trace = counterexample("mlock", "7.x none")
    again = replace(trace, steps=[trace.steps[0], trace.steps[0]])
    with pytest.raises(Disagreement, match="not free"):
        replay.run(again)


def test_a_killed_process_is_really_gone(clean: None) -> None:
    events = [
        ("arrive", {"p": 0, "f": 0}), ("prepare", {"p": 0, "f": 0}), ("fork", {"p": 0, "q": 1}),
        ("kill", {"p": 1}), ("hook", {"p": 1}), ("zap", {"p": 1}), ("close", {"p": 1}),
        ("files", {"p": 1}), ("zombie", {"p": 1}), ("reap_process", {"p": 1}),
        ("exec", {"p": 0}),
    ]  # fmt: skip
    outcome = replay.run(follow(model("mlock", "7.x none"), events, "mlock"))
    assert outcome.agrees
    times = [(step.begun_ns, step.done_ns) for step in outcome.timeline]
    assert times == sorted(times)


def test_an_outcome_survives_json(clean: None) -> None:
    outcome = replay.run(counterexample("mlock", "7.x none"))
    told = json.loads(json.dumps(outcome.to_json()))
    assert told["agrees"] is True
    assert Outcome.from_json(told) == outcome


def test_a_story_survives_json_and_is_played_all_the_same(clean: None) -> None:
    trace = counterexample("unmap", "7.x strict")
    again = Trace.loads(json.dumps(trace.to_json()))
    assert replay.run(again).corrupted == replay.run(trace).corrupted


def test_what_does_not_end_is_ended(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "TIMEOUT", 0.2)

    def forever() -> dict[str, object]:
        os.fork()
        while True:
            os.read(os.pipe()[0], 1)

    with pytest.raises(Disagreement, match="not done"):
        playing.apart(forever)


def test_a_story_with_a_keeper_in_it_is_sent_to_where_it_can_be_played() -> None:
    step = Step("alloc", "keeper", "", {"p": 0, "f": 0}, {})
    with pytest.raises(NotSupported) as caught:
        replay.run(Trace("holdfast", "7.x", "none", "table", "S1", {}, [step]))
    assert "keeper:edu" in str(caught.value)


def test_a_story_of_a_million_frames_is_refused_before_any_memory_is_made() -> None:
    step = Step("arrive", "P0", "", {"p": 0, "f": 10**6}, {})
    with pytest.raises(UsageError, match="f = 1000000"):
        replay.run(Trace("mlock", "7.x", "none", "table", "S1", {}, [step]))
