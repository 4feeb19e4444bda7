# SPDX-License-Identifier: Apache-2.0
"""One lease's death on a shared card: the others do not notice, or are told and recover."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import DeviceReset

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 15.0
SLOW = "emu:xdma?memory=1M&link_rate=8M&link_chunk=4096"
ARENA = ("--arena", "8M")


class Neighbour:
    """A lease that keeps transferring, and checks every byte, until it is told to stop."""

    def __init__(self, target: str, place: int) -> None:
        self.card = holdfast.open(target, timeout=LONG)
        self.place = place
        self.done = self.resets = 0
        self.problem: BaseException | None = None
        self._stop = threading.Event()
        self._progress = threading.Condition()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        source, back = self.card.alloc(4096), self.card.alloc(4096)
        try:
            while not self._stop.is_set():
                source.array[:] = (np.arange(4096) + self.done) % 251
                back.array[:] = 0xFF
                try:
                    self.card.dma.to_card(source, self.place).wait(LONG)
                    self.card.dma.from_card(back, self.place).wait(LONG)
                except DeviceReset:
                    self.resets += 1
                    continue
                assert np.array_equal(source.array, back.array)
                with self._progress:
                    self.done += 1
                    self._progress.notify_all()
        except BaseException as error:  # noqa: BLE001 - it is raised again by close
            self.problem = error

    def moves_on(self, count: int = 3) -> bool:
        """Whether it gets so many more round trips done."""
        with self._progress:
            goal = self.done + count
            return self._progress.wait_for(lambda: self.done >= goal, LONG)

    def stalls(self) -> None:
        """Wait until it gets nothing done any more: nobody says so."""
        with self._progress:
            while self._progress.wait(0.1):
                pass

    def close(self) -> None:
        self._stop.set()
        self._thread.join(LONG)
        self.card.close()
        if self.problem is not None:
            raise self.problem


@pytest.mark.parametrize("policy", ["drain", "revoke"])
def test_below_the_function_level_nobody_notices_a_death(
    scene: Callable[..., Any], rungs_of: Callable[..., list[str]], policy: str
) -> None:
    stage = scene(SLOW, *ARENA, "--policy", policy)
    neighbours = [Neighbour(SLOW, place) for place in (0x80000, 0xC0000)]
    try:
        for _ in range(3):
            told = stage.reached(stage.kill_in_mid_dma(wait_for_data=True), "released")
            assert not {"isolating", "resetting"} & set(rungs_of(told))
            assert all(each.moves_on() for each in neighbours)
    finally:
        generations = [each.card.generation() for each in neighbours]
        for each in neighbours:
            each.close()
    assert [each.resets for each in neighbours] == [0, 0]
    assert generations == [0, 0], "no notice came"


def test_a_function_level_step_is_announced_and_the_others_recover_by_themselves(
    scene: Callable[..., Any], rungs_of: Callable[..., list[str]]
) -> None:
    stage = scene(
        SLOW, *ARENA, "--drain-deadline", "0.05", "--isolate-deadline", "0.05",
        "--test-faults", "hang@40-40",
    )  # fmt: skip
    neighbours = [Neighbour(SLOW, place) for place in (0x80000, 0xC0000)]
    try:
        assert all(each.moves_on() for each in neighbours)
        for each in neighbours:
            each.stalls()
        told = stage.reached(stage.kill_in_mid_dma(), "released")
        assert rungs_of(told)[-3:] == ["resetting", "quiet", "released"], told["log"]
        assert all(each.moves_on(30) for each in neighbours)
    finally:
        for each in neighbours:
            each.close()
    assert all(each.resets > 0 for each in neighbours), "their transfers were lost, and they knew"
