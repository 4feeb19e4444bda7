# SPDX-License-Identifier: Apache-2.0
"""An XDMA card whose keeper half loses its temper when told to: ``emu:moody_card.py:Moody``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from holdfast.driver import command
from holdfast.drivers.xdma import XdmaDriver
from holdfast.emu.xdma import Xdma
from holdfast.errors import HoldfastError, ProtocolError


class Moody(Xdma):
    """The card is as good as any."""

    driver = "MoodyDriver"


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("nobody can tell what happened")


class Hollow(HoldfastError):
    def __init__(self) -> None:
        pass  # without any of the fields that it should have


class Treacherous(int):
    """A number that is trouble for whoever looks at it."""

    def __bool__(self) -> bool:
        raise SystemExit(3)

    def __eq__(self, other: object) -> bool:
        raise SystemExit(3)

    def __lt__(self, other: object) -> bool:
        raise SystemExit(3)

    __hash__ = None  # type: ignore[assignment]


def _raise(error: BaseException) -> Callable[[], NoReturn]:
    def act() -> NoReturn:
        raise error

    return act


def _loop() -> None:
    while True:
        pass


MOODS: dict[str, Callable[[], Any]] = {
    "ValueError": _raise(ValueError("bug")),
    "unspeakable": _raise(Unspeakable()),
    "hollow": _raise(Hollow()),
    "ProtocolError": _raise(ProtocolError("x" * 100_000)),
    "SystemExit": _raise(SystemExit(3)),
    "KeyboardInterrupt": _raise(KeyboardInterrupt()),
    "CancelledError": _raise(asyncio.CancelledError()),
    "StopIteration": _raise(StopIteration()),
    "GeneratorExit": _raise(GeneratorExit()),
    "None": lambda: None,
    "negative": lambda: -1,
    "text": lambda: "quiet",
    "treacherous": lambda: Treacherous(0),
    "list": list,
    "loop": _loop,
}


class MoodyDriver(XdmaDriver):
    """The keeper half; a mood lasts until the card has been reset and set up again."""

    mood = ""

    def probe(self) -> None:
        self.mood = ""
        super().probe()

    @command
    def become(self, channels: Sequence[int], mood: str) -> None:
        """``mood`` is one of :data:`MOODS`, or ``wait PATH``: hang until that pipe is opened."""
        self.mood = mood

    def _act(self, otherwise: Callable[[], Any]) -> Any:
        if self.mood.startswith("wait "):
            os.close(os.open(self.mood.removeprefix("wait "), os.O_RDONLY))
            self.mood = ""
        return MOODS[self.mood]() if self.mood else otherwise()

    def in_flight(self, channels: Sequence[int]) -> int:
        answer: int = self._act(lambda: XdmaDriver.in_flight(self, channels))
        return answer

    def stop(self, channels: Sequence[int]) -> bool:
        answer: bool = self._act(lambda: XdmaDriver.stop(self, channels))
        return answer

    def drain(self, channels: Sequence[int]) -> None:
        self._act(lambda: XdmaDriver.drain(self, channels))


class Stillborn(Moody):
    """Its driver wants the whole process to end."""

    driver = "StillbornDriver"


class StillbornDriver(XdmaDriver):
    def probe(self) -> None:
        raise SystemExit(0)
