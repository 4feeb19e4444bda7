# SPDX-License-Identifier: Apache-2.0
"""Negative controls: without one guard innocent memory is corrupted, and with it, it is not.

What is measured is the same as in the tests of the guards, so that those can fail.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import IovaExhausted
from holdfast.torture.stack import Stack

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
HERE = Path(__file__).parent
SCRIPT = HERE / "without_guard.py"
SHORT = (
    "--drain-deadline", "0.1", "--stop-deadline", "0.1", "--isolate-deadline", "0.1",
    "--reset-deadline", "1", "--quarantine-period", "0.1",
)  # fmt: skip
ARENA = ("--arena", "4M")
SLOW = "emu:xdma?memory=1M&link_rate=256K&link_chunk=4096"
WILD_EDU = "emu:edu?delay=0.02"


@contextmanager
def stage_without(on: Any, guards: str, target: str, *options: str) -> Iterator[Any]:
    """A stage whose keeper has lost guards; with none lost it is the ordinary command."""
    serve = (sys.executable, "-m", "holdfast", "serve")
    if guards:
        serve = (sys.executable, str(SCRIPT), guards, "serve")
    with Stack(target, options, serve) as stack:
        yield on(stack)


def foreign_after_a_death(stage: Any, seconds: float = 0.4) -> int:
    """Kill a client in mid-DMA; foreign bytes in memory that was taken after its end."""
    stage.fill_card()
    with stage.innocent() as innocent:
        stage.reached(stage.kill_in_mid_dma(wait_for_data=True), "released", "quarantine")
        if stage.waits:
            time.sleep(stage.waits)  # what must not happen in quarantine has had time to
        innocent.take()
        return int(innocent.foreign(seconds))


@pytest.mark.parametrize("lost", ["", "deadline_releases"])
def test_a_deadline_that_released_would_corrupt(staging: Any, lost: str) -> None:
    with stage_without(staging, lost, SLOW, *ARENA, "--drain-deadline", "0.02") as stage:
        assert bool(foreign_after_a_death(stage)) is bool(lost)


@pytest.mark.parametrize("lost", ["", "resets_are_believed"])
def test_a_reset_that_was_believed_would_corrupt(staging: Any, lost: str) -> None:
    faults = ("--test-faults", "wild,reset_keeps_dma@1")
    with stage_without(staging, lost, SLOW, *SHORT, *ARENA, *faults) as stage:
        assert bool(foreign_after_a_death(stage)) is bool(lost)


@pytest.mark.parametrize("lost", ["", "quarantine_ends"])
def test_a_quarantine_that_ended_by_itself_would_corrupt(staging: Any, lost: str) -> None:
    faults = ("--test-faults", "wild@2,refuse_reset@1")
    with stage_without(staging, lost, WILD_EDU, *SHORT, *ARENA, *faults) as stage:
        stage.waits = 0.5
        assert bool(foreign_after_a_death(stage)) is bool(lost)


@pytest.mark.parametrize("lost", ["few_iovas", "few_iovas,iovas_return"])
def test_an_iova_that_was_handed_out_again_would_corrupt(staging: Any, lost: str) -> None:
    """The wild card writes to where the dead client's memory was, and somebody else's is now.

    There is one place only: with the guard, nobody else gets it.
    """
    faults = ("--test-faults", "wild@2")
    with stage_without(staging, lost, WILD_EDU, *SHORT, *faults) as stage:
        if "iovas_return" in lost:
            assert foreign_after_a_death(stage) > 0
        else:
            with pytest.raises(IovaExhausted):
                foreign_after_a_death(stage)


@pytest.mark.parametrize("lost", ["", "engine_bars_are_mapped"])
def test_an_engine_whose_bar_was_mapped_without_translation_would_corrupt(
    staging: Any, orphaned: Any, lost: str
) -> None:
    target = f"emu:{HERE / 'mailbox_card.py'}:Mailbox"
    with stage_without(staging, lost, target, *ARENA) as stage, stage.innocent() as innocent:
        child = orphaned(target)
        stage.reached(child.pid, "released")
        innocent.take()
        child.tell(b"g")
        assert child.read(1) == b"y"
        assert bool(innocent.foreign()) is bool(lost)
        child.tell(b"e")
        child.reap()
