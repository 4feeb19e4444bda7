# SPDX-License-Identifier: Apache-2.0
"""The plain ``emu:edu`` as the card of a story.

It moves everything at once a fixed time after the command: what a story has before the write must
happen within that time, or the run is void. It can be neither stopped nor caught between sending
and arriving, so it plays fewer stories; but nothing in it was made for them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from holdfast.emu.edu import WILD_PERIOD, Edu
from holdfast.emu.faults import FaultPlan
from holdfast.emu.function import Function
from holdfast.errors import HoldfastError, NotSupported
from holdfast.replay.card import PATIENCE, PacedCard
from holdfast.replay.failure import Disagreement

DELAY: Final = 0.4
"""Seconds that the plain edu leaves for what comes before its write."""
WILD_LOOK: Final = 20 * WILD_PERIOD


class ClockedCard(PacedCard):
    """The plain ``emu:edu``: after :data:`DELAY` it moves everything, whatever has happened."""

    target = "emu:edu"

    def __init__(self, *, honest: bool, events: Sequence[str] = ()) -> None:
        if honest and "reset" in events:
            raise _unlike_edu("reset: one that stops DMA")
        for event in ("stop", "stop_ack", "prove"):
            if event in events:
                raise _unlike_edu(event)
        # Its first transfer is the one that fills it.
        self._plan = ",".join(
            f"{name}@2" for name in ("wild", "hang") if name in events and "post" in events
        )
        self._due = 0.0
        self._landed: set[int] = set()
        self._flying: set[int] = set()
        self._destination = 0
        super().__init__(honest=False)

    def _function(self) -> Function:
        function = Edu(delay=DELAY)
        function.faults = FaultPlan.parse(self._plan)
        return function

    def _before_filling(self) -> None:
        return

    def _after_filling(self) -> None:
        return

    def master(self, *, on: bool) -> None:
        if not on and self._flying:
            raise _unlike_edu("bme_off: after a write has left the card")
        super().master(on=on)

    def _begin(self, d: int) -> None:
        self._due = time.monotonic() + DELAY

    def post(self, d: int, address: int, *, reading: bool) -> None:
        super().post(d, address, reading=reading)
        self._destination = address

    def send(self, d: int) -> None:
        if d not in self._landed:
            self._flying.add(d)

    def send_wild(self, d: int) -> None:
        self._flying.add(d)

    def read(self, d: int) -> None:
        self._wait_idle(DELAY + PATIENCE)

    def land(self, d: int) -> None:
        """Wait until the write that is under way was done. Void if it was before this was asked."""
        self._flying.discard(d)
        if d in self._landed and not self._wild:
            return  # edu moves all of a transfer at once, and it has
        if not self._wild and time.monotonic() >= self._due:
            raise Disagreement(
                f"the steps before took longer than {DELAY} s: edu's write was early",
                operation="land",
                hint="replay it on paced:edu, or on an idler machine",
            )
        self._landed.add(d)
        time.sleep(max(0.0, self._due - time.monotonic()))
        if self._wild:
            time.sleep(WILD_LOOK)  # it writes every millisecond and tells nobody
        else:
            self._wait_idle(PATIENCE)

    def peek(self, d: int) -> bytes:
        raise _unlike_edu("dma_read")

    def idle(self) -> bool:
        return self.gone or super().idle()

    def flushed(self) -> bool:
        return not self._flying

    def refused(self) -> int:
        """edu does not say."""
        return 0

    def stop(self) -> None:
        raise _unlike_edu("stop")

    def reset(self) -> None:
        """Acknowledged; DMA goes on. Whoever opens the card next turns bus mastering on again."""
        super().reset()
        super().master(on=True)

    def hang(self) -> None:
        """The plan has it from the start."""

    def wild(self) -> None:
        self._wild = True


def _unlike_edu(what: str) -> HoldfastError:
    return NotSupported(
        f"{what}: the plain edu cannot do that", operation="replay", hint="replay it on paced:edu"
    )
