# SPDX-License-Identifier: Apache-2.0
"""Interleaved rounds: contenders take turns at the same work, and every outcome is looked at.

Facts. On a shared machine the speed of memory changes by tens of per cent within seconds. A
destination that already holds the right bytes hides a transfer that did nothing.

Choice. In each round every contender runs once, in an order that rotates, and ratios are formed
within the round. Each round has data of its own, and the destination is cleared before each turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol


class Work(Protocol):
    """Something to move, and a way to see that it was moved."""

    nbytes: int

    def refresh(self) -> None:
        """New source data for a round."""
        ...

    def clear(self) -> None:
        """Wipe the destinations."""
        ...

    def contenders(self) -> Mapping[str, Callable[[], None]]:
        """Name to what is timed."""
        ...

    def verify(self, contender: str) -> bool:
        """Whether the contender's destination now holds exactly what it must."""
        ...


class Timings:
    """Seconds per contender and round, and whether all data was right."""

    def __init__(self, nbytes: int, seconds: dict[str, list[float]], verified: bool) -> None:
        self.nbytes = nbytes
        self.seconds = seconds
        self.verified = verified

    def rates(self, contender: str) -> list[float]:
        """Bytes per second in each round."""
        return [self.nbytes / each for each in self.seconds[contender]]

    def ratio(self, contender: str, peer: str) -> list[float]:
        """Speed of a contender over that of a peer, round by round."""
        pairs = zip(self.seconds[contender], self.seconds[peer], strict=True)
        return [theirs / own for own, theirs in pairs]


def run_rounds(work: Work, rounds: int) -> Timings:
    """Run ``rounds`` rounds after one that is not counted (page faults, first lap of a ring)."""
    contenders = work.contenders()
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    verified = True
    for number in range(rounds + 1):
        work.refresh()
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            work.clear()
            begun = time.perf_counter()
            contenders[name]()
            taken = time.perf_counter() - begun
            verified &= work.verify(name)
            if number:
                seconds[name].append(taken)
    return Timings(work.nbytes, seconds, verified)
