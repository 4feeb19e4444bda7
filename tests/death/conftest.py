# SPDX-License-Identifier: Apache-2.0
"""A stage for deaths: a client that is killed in mid-DMA, and innocent memory to look into."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.device import Device
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack

LONG = 15.0
FOREIGN = actors.FOREIGN
INNOCENT = 0x55
EMPTY = 0
"""Memory that the keeper has given back although a living client still has it mapped. The card's
memory has no such byte."""
SIZES = {"edu": 512, "xdma": 64 << 10}


class Innocent:
    """A lease of memory only. It takes what the dead gave back, and looks for foreign bytes."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.device = device
        self.nbytes = nbytes
        self.memory: list[holdfast.Buffer] = []

    def take(self) -> None:
        """Memory with a pattern of its own: in an arena the very frames, if they are free."""
        self.memory.append(self.device.alloc(self.nbytes))
        self.memory[-1].array[:] = INNOCENT

    def foreign(self, seconds: float = 0.15) -> int:
        """Bytes of the memory that somebody else wrote, within the card's time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := self._count():
                return found
            time.sleep(0.005)  # nothing signals a write that must not come
        return self._count()

    def _count(self) -> int:
        return sum(
            int(np.count_nonzero((each.array != INNOCENT) & (each.array != EMPTY)))
            for each in self.memory
        )


class Scene:
    """One keeper, one function, and deaths."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.size = SIZES["edu" if ":edu" in stack.target else "xdma"]

    def fill_card(self) -> None:
        """The card's memory is foreign to everybody; one transfer is done."""
        with holdfast.open(self.stack.target, timeout=LONG) as card:
            source = card.alloc(self.size)
            source.array[:] = FOREIGN
            card.dma.to_card(source).wait(LONG)
        self.all_released()

    def all_released(self) -> None:
        unreleased = settle(
            lambda: sum(lease["state"] != "released" for lease in self.stack.ps()["leases"]),
            goal=0, timeout=LONG,
        )  # fmt: skip
        assert unreleased == 0, self.stack.ps()

    def kill_in_mid_dma(self, *, wait_for_data: bool = False) -> int:
        """A client posts a card-to-host transfer and is SIGKILLed; its pid."""

        def body(_: int, writing: int) -> None:
            card = holdfast.open(self.stack.target, timeout=LONG)
            buffer = card.alloc(self.size)
            buffer.array[:] = 0xEE
            card.dma.from_card(buffer)
            while wait_for_data and buffer.array[0] == 0xEE:
                pass
            os.write(writing, b"x")
            time.sleep(60)

        child = actors.spawn(body)
        try:
            assert child.read(1) == b"x"
        finally:
            child.kill()
            child.reap()
        return child.pid

    def lease(self, pid: int) -> dict[str, Any]:
        return next(dict(each) for each in self.stack.ps()["leases"] if each["pid"] == pid)

    def reached(self, pid: int, *states: str) -> dict[str, Any]:
        """Wait until a lease is in one of the states; what ps tells of it then."""
        found: dict[str, Any] = {}

        def missing() -> int:
            found.update(self.lease(pid))
            return found["state"] not in states

        assert settle(missing, goal=0, timeout=LONG) == 0, found
        return found

    @contextmanager
    def innocent(self) -> Iterator[Innocent]:
        with holdfast.open(self.stack.target, access="shared", channels=0, timeout=LONG) as device:
            yield Innocent(device, self.size)


def rungs(lease: dict[str, Any]) -> list[str]:
    """The states that a lease went through after its death, each once in a row."""
    entered: list[str] = []
    for state, _, _ in lease["log"]:
        if not entered or entered[-1] != state:
            entered.append(state)
    return entered[entered.index("frozen") + 1 :]


@pytest.fixture
def scene(serve: Callable[..., Stack]) -> Iterator[Callable[..., Scene]]:
    """``scene(target, *options)``: a stage of one's own."""
    with ExitStack():
        yield lambda target, *options: Scene(serve(target, *options))


@pytest.fixture
def rungs_of() -> Callable[[dict[str, Any]], list[str]]:
    return rungs
