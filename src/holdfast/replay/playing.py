# SPDX-License-Identifier: Apache-2.0
"""Play a story from its beginning to its end, in processes of its own."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any, Final

from holdfast.errors import HoldfastError, NotSupported, UsageError, from_fields, to_fields
from holdfast.kernel.process import become_subreaper
from holdfast.replay import kept
from holdfast.replay.acts import Acts
from holdfast.replay.card import PacedCard
from holdfast.replay.clocked import ClockedCard
from holdfast.replay.failure import Disagreement
from holdfast.replay.outcome import Outcome, Played
from holdfast.replay.plan import plan
from holdfast.replay.stage import Stage
from holdfast.spec.trace import Trace
from holdfast.torture.actors import spawn
from holdfast.torture.stack import kill_tree

CARDS: Final[dict[str, type[PacedCard]]] = {card.target: card for card in (PacedCard, ClockedCard)}
TARGETS: Final = (*CARDS, kept.NAME)
TIMEOUT: Final = 60.0
"""Seconds for a whole story."""


def run(trace: Trace, target: str = PacedCard.target) -> Outcome:
    """Play a story.

    ``target``: ``paced:edu``, whose every step is commanded; ``emu:edu``, which goes by the clock
    and cannot play everything; ``keeper:edu`` for stories of Holdfast's own composition, against
    the keeper that there is (:mod:`holdfast.replay.kept`).

    Forks: the story runs in processes of its own, all of which have ended when this returns or
    raises. UsageError or NotSupported name an event that cannot be played; :class:`Disagreement`
    means that reality did not do what the story says, and is no verdict.
    """
    if target not in TARGETS:
        raise UsageError(
            f"no target {target!r}", operation="replay", hint=f"choose from {', '.join(TARGETS)}"
        )
    return Outcome.from_json(apart(lambda: play(trace, target).to_json()))


def play(trace: Trace, target: str) -> Outcome:
    """Play a story in this very process, which must have no threads, and children of its own."""
    if target == kept.NAME:
        return kept.play(trace)
    events = [step.event for step in trace.steps]
    for event in events:
        try:
            Acts.require(event)
        except NotSupported as error:
            if "alloc" in events:
                error.hint = f"this story has Holdfast's keeper in it: play it on {kept.NAME}"
            raise
    outcome = Outcome.of(trace, target)
    stage = Stage(plan(trace), CARDS[target], events)
    acts = Acts(stage, outcome)
    try:
        before = trace.start
        for number, step in enumerate(trace.steps, 1):
            begun = time.monotonic_ns()
            try:
                acts.act(step, before)
                stage.obey(step.after)
                stage.compare(step.after)
            except HoldfastError as error:
                error.target = f"step {number} ({step.event})"
                raise
            outcome.timeline.append(Played(step.event, step.text, begun, time.monotonic_ns()))
            before = step.after
        stage.look(outcome)
        outcome.refused = stage.card.refused()
    finally:
        stage.close()
    return outcome


def apart(body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run ``body`` in a forked process that inherits the orphans below it; what it returned.

    Raises what it raised, if that is a HoldfastError. After :data:`TIMEOUT` it and everything
    below it are killed.
    """

    def conduct(_: int, writing: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        told: dict[str, Any]
        try:
            become_subreaper()
            told = {"outcome": body()}
        except HoldfastError as error:
            told = {"error": to_fields(error)}
        except Exception as error:  # noqa: BLE001  (told to who waits for it)
            what = f"{type(error).__name__}: {error}"
            told = {"error": to_fields(Disagreement(what, operation="replay"))}
        data = json.dumps(told).encode()
        while data:
            data = data[os.write(writing, data) :]

    child = spawn(conduct)
    data = b""
    try:
        deadline = time.monotonic() + TIMEOUT
        while select.select([child.reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
            piece = os.read(child.reading, 1 << 16)
            if not piece:
                break
            data += piece
        else:
            raise Disagreement(f"not done after {TIMEOUT:g} s", operation="replay")
    finally:
        kill_tree(child.pid)
        child.reap()
    if not data:
        raise Disagreement("the process that plays it failed", operation="replay")
    told = json.loads(data)
    if "outcome" in told:
        return dict(told["outcome"])
    fields = told["error"]
    error = from_fields(fields)
    raise (
        Disagreement(error.what, operation=error.operation, target=error.target, hint=error.hint)
        if fields["kind"] == Disagreement.__name__
        else error
    )
