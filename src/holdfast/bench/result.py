# SPDX-License-Identifier: Apache-2.0
"""What a bench reports, and the few statistics that it needs.

Ratios read the same way everywhere: 1 is as good as the limit or the peer, more is better, less is
worse. For a rate it is own over peer, for a time peer over own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound for a figure's ``value`` or ``ratio``: a goal of the design, not a promise."""

    bound: float
    of: Literal["value", "ratio"] = "ratio"
    at_most: bool = False

    def met(self, figure: float | None) -> bool | None:
        """None if there is no figure to judge."""
        if figure is None:
            return None
        return figure <= self.bound if self.at_most else figure >= self.bound

    def text(self, unit: str) -> str:
        sign = "<=" if self.at_most else ">="
        return (
            f"ratio {sign} {self.bound:g}"
            if self.of == "ratio"
            else f"{sign} {self.bound:g} {unit}"
        )


@dataclass(frozen=True, slots=True)
class Result:
    """One figure. ``peer`` says what ``ratio`` compares with; ``ratio`` None: there was no peer.

    ``verified`` is None where no data was moved. ``detail`` holds spreads and side figures; plain
    numbers, strings, lists and dicts only.
    """

    name: str
    value: float
    unit: str
    ratio: float | None
    peer: str
    goals: tuple[Goal, ...] = ()
    verified: bool | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether all goals that can be judged are met; None if none can be."""
        judged = [goal.met(self.value if goal.of == "value" else self.ratio) for goal in self.goals]
        known = [verdict for verdict in judged if verdict is not None]
        return all(known) if known else None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": rounded(self.value),
            "unit": self.unit,
            "ratio": None if self.ratio is None else rounded(self.ratio),
            "peer": self.peer,
            "goal": ", ".join(goal.text(self.unit) for goal in self.goals) or None,
            "met": self.met,
            "verified": self.verified,
            "detail": self.detail,
        }


def rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def percentile(values: Iterable[float], fraction: float) -> float:
    """By nearest rank, so that it is a value that was seen."""
    ranked = sorted(values)
    return ranked[round((len(ranked) - 1) * fraction)]


def times(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median, p99 and largest of some times, multiplied by ``scale``."""
    return {
        "p50": rounded(percentile(values, 0.5) * scale),
        "p99": rounded(percentile(values, 0.99) * scale),
        "max": rounded(max(values) * scale),
        "n": len(values),
    }


def ratios(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes of the ratios of some rounds."""
    return {
        "median": rounded(statistics.median(values)),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
        "rounds": len(values),
    }
