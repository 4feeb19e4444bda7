# SPDX-License-Identifier: Apache-2.0
"""A driver that hangs, loops, raises or answers nonsense in the keeper cannot stop the ladder."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import Busy, DriverFailed, StaysStuck
from holdfast.keeper.client import LeaseClient
from holdfast.torture.stack import Stack

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 15.0
CARD = Path(__file__).with_name("moody_card.py")
TARGET = f"emu:{CARD}:Moody?memory=1M"
SHORT = (
    "--drain-deadline", "0.1", "--stop-deadline", "0.2", "--isolate-deadline", "0.1",
    "--reset-deadline", "1", "--quarantine-period", "0.05", "--quarantine-longest", "0.1",
)  # fmt: skip
MOODS = (
    "ValueError", "unspeakable", "hollow", "ProtocolError", "SystemExit", "KeyboardInterrupt",
    "CancelledError", "StopIteration", "GeneratorExit", "None", "negative", "text", "treacherous",
    "list",
)  # fmt: skip


def become(stage: Any, mood: str) -> None:
    with holdfast.open(stage.stack.target, timeout=LONG) as card:
        card.command("become", mood=mood)


def round_trip(card: holdfast.Device) -> None:
    source, back = card.alloc(4096), card.alloc(4096)
    source.array[:] = np.arange(4096) % 251
    card.dma.to_card(source, 0x1000).wait(LONG)
    card.dma.from_card(back, 0x1000).wait(LONG)
    assert np.array_equal(source.array, back.array)


def test_nonsense_and_every_exception_is_a_failed_measure_and_nothing_more(
    scene: Callable[..., Any], rungs_of: Callable[..., list[str]]
) -> None:
    """One keeper lives through all of them: each ends in the reset, which is the card's own."""
    stage = scene(TARGET, *SHORT)
    keeper = stage.stack.keeper_pid
    for mood in MOODS:
        become(stage, mood)  # its own lease dies of it, too
        stage.all_released()
        for lease in stage.stack.ps()["leases"]:
            assert not lease["completed_after_death"]
        told = stage.stack.ps()["leases"][-1]
        assert rungs_of(told)[-3:] == ["resetting", "quiet", "released"], (mood, told["log"])
        assert any("driver raised" in why or "answered" in why for _, _, why in told["log"]), mood
        with holdfast.open(stage.stack.target, timeout=LONG) as card:
            round_trip(card)  # in a good mood again since it was set up anew
        stage.all_released()
    assert stage.stack.keeper_pid == keeper
    assert stage.stack.ps()["unaccounted_bytes"] == 0


def test_a_driver_that_hangs_is_left_behind_and_asked_again_once_it_is_back(
    scene: Callable[..., Any], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    stage = scene(TARGET, *SHORT)
    with holdfast.open(TARGET, timeout=LONG) as living, stage.innocent() as innocent:
        round_trip(living)
        # Nobody dies yet; a lease with a hanging driver does.
        become(stage, f"wait {pipe}")
        told = stage.reached(os.getpid(), "alive", "released")  # ps is answered
        assert told
        stage_leases = stage.stack.ps()["leases"]
        stage.stack.ps()
        number = stage_leases[-1]["lease"]
        last = _released(stage.stack, number)
        why = [said for _, _, said in last["log"]]
        assert any("no answer from the driver within 0.2 s" in said for said in why), why
        assert any("has not come back" in said for said in why), why
        # Meanwhile: memory for others, and clear errors for who needs the driver.
        innocent.take()
        assert innocent.device.alloc(1 << 20).nbytes == 1 << 20
        begun = time.monotonic()
        with pytest.raises(Busy, match="its driver hangs"):
            holdfast.open(TARGET)
        assert time.monotonic() - begun < 5
        with pytest.raises(StaysStuck):
            living.command("channel_status")
        os.close(os.open(pipe, os.O_WRONLY))
        round_trip(living)  # recovers by itself
        assert innocent.foreign(0) == 0
    with holdfast.open(TARGET, timeout=LONG) as card:
        round_trip(card)


def _released(stack: Stack, number: int) -> dict[str, Any]:
    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline:
        (lease,) = [each for each in stack.ps()["leases"] if each["lease"] == number]
        if lease["state"] == "released":
            return dict(lease)
        time.sleep(0.01)
    raise AssertionError(lease)


def test_a_driver_that_loops_slows_the_keeper_and_does_not_stop_it(
    scene: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    stage = scene(TARGET, *SHORT)
    client = stage.stack.ask()
    try:
        before = _ps_ms(client)
        become(stage, "loop")
        number = stage.stack.ps()["leases"][-1]["lease"]
        _released(stage.stack, number)
        after = _ps_ms(client)
    finally:
        client.close()
    record_property("ps_ms", (round(before, 2), round(after, 2)))
    sys.stderr.write(f"ps: {before:.2f} ms, beside a driver that loops {after:.2f} ms\n")
    # A step takes two turns of the interpreter or so; by itself Python would give one every 5 ms.
    assert after < before + 100
    with pytest.raises(Busy, match="its driver hangs"):
        holdfast.open(TARGET)


def _ps_ms(client: LeaseClient) -> float:
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        client.ps()
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times)


def test_a_function_that_does_not_answer_holds_up_nobody_who_does_not_need_it(
    serve: Callable[..., Stack],
) -> None:
    stack = serve("emu:xdma?memory=1M", "--arena", "16M")
    function = stack.ps()["function"]
    openers = [holdfast.open(stack.target, timeout=LONG) for _ in range(4)]
    others = holdfast.open(stack.target, channels=0, timeout=LONG)
    with ThreadPoolExecutor(len(openers)) as pool:
        os.kill(function, signal.SIGSTOP)
        try:
            waiting = [pool.submit(card.bars[1].load, 0) for card in openers]
            begun = time.monotonic()
            assert others.alloc(1 << 20).nbytes == 1 << 20
            others.close()  # and its memory is punched and released
            assert time.monotonic() - begun < 2
            assert not any(each.done() for each in waiting)
        finally:
            os.kill(function, signal.SIGCONT)
        assert all(each.result(LONG) for each in waiting)
    for card in openers:
        round_trip(card)
        card.close()


def test_a_driver_that_wants_to_end_the_process_when_it_is_probed_is_an_error(
    serve: Callable[..., Stack],
) -> None:
    with pytest.raises(DriverFailed, match="SystemExit"):
        serve(f"emu:{CARD}:Stillborn?memory=1M")
