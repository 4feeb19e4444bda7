# SPDX-License-Identifier: Apache-2.0
"""What came of playing a story."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from holdfast.spec.trace import Trace


@dataclass(frozen=True, slots=True)
class Played:
    """One step as it was played. Times are CLOCK_MONOTONIC, nanoseconds."""

    event: str
    text: str
    begun_ns: int
    done_ns: int


@dataclass(slots=True)
class Outcome:
    """Bytes, by who found them. Content is the only judge."""

    strategy: str
    breaks: str
    """What the story says is broken at its end; empty: nothing."""
    target: str
    corrupted: dict[str, int] = field(default_factory=dict)
    """Foreign bytes in memory that somebody has, by who has it."""
    stray: dict[str, int] = field(default_factory=dict)
    """Bytes that changed in frames which nobody had: the next one's memory."""
    lost: dict[str, int] = field(default_factory=dict)
    """Bytes that a living process waited for and that went somewhere else."""
    disclosed: dict[str, int] = field(default_factory=dict)
    """Bytes that the card read and that were somebody else's."""
    refused: int = 0
    """Writes that found no window, or no bus mastering."""
    leases: dict[str, list[str]] = field(default_factory=dict)
    """Of a story played against a keeper: the states that its leases went through."""
    withheld: list[str] = field(default_factory=list)
    """Of the same: what the story says and the keeper did not do or allow."""
    recycled: bool = False
    """Of the same: somebody got memory where somebody else's had been."""
    timeline: list[Played] = field(default_factory=list)

    @property
    def corrupted_bytes(self) -> int:
        return sum(self.corrupted.values())

    @property
    def agrees(self) -> bool | None:
        """Whether reality bears out what the story says is broken.

        None if the story ends before anything could be seen in memory (a page that *may* be
        written to is not one that was).
        """
        innocent = not (self.corrupted or self.stray)
        match self.breaks:
            case "S1 with a victim":
                return bool(self.corrupted)
            case "S1":
                return not innocent
            case "S1r with a victim":
                return bool(self.disclosed)
            case "S5":
                return bool(self.lost)
            case "":
                return innocent and not self.disclosed
        return None if innocent else False

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        begin = self.timeline[0].begun_ns if self.timeline else 0
        return {
            "strategy": self.strategy,
            "breaks": self.breaks,
            "target": self.target,
            "agrees": self.agrees,
            "corrupted": dict(self.corrupted),
            "stray": dict(self.stray),
            "lost": dict(self.lost),
            "disclosed": dict(self.disclosed),
            "refused": self.refused,
            "leases": {name: list(states) for name, states in self.leases.items()},
            "withheld": list(self.withheld),
            "recycled": self.recycled,
            "began_ns": begin,
            "timeline": [
                [step.event, step.text, step.begun_ns, step.done_ns] for step in self.timeline
            ],
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_json` made."""
        return cls(
            told["strategy"], told["breaks"], told["target"], told["corrupted"], told["stray"],
            told["lost"], told["disclosed"], told["refused"], told["leases"], told["withheld"],
            told["recycled"],
            [Played(*step) for step in told["timeline"]],
        )  # fmt: skip

    @classmethod
    def of(cls, trace: Trace, target: str) -> Self:
        return cls(trace.strategy, trace.breaks, target)


def worst(found: dict[str, int], who: str, count: int) -> None:
    """Remember the largest count that somebody found."""
    if count > found.get(who, 0):
        found[who] = count
