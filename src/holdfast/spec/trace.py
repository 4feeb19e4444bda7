# SPDX-License-Identifier: Apache-2.0
"""A story: the shortest order of events that leads to a breach, with the names that a reader needs.

The search keeps states in canonical form, in which frames and processes may be renamed from one
step to the next. Here the story is told again from its beginning with names that stay: of the steps
that lead to the next canonical state, the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np

from holdfast.spec.explore import Breach, Explored
from holdfast.spec.layout import U64, Batch

FORMAT: Final = "holdfast-trace-1"


@dataclass(frozen=True, slots=True)
class Step:
    """One event, and every variable as it is after it (those that are not 0)."""

    event: str
    actor: str
    text: str
    args: Mapping[str, int]
    after: Mapping[str, int]

    def changed(self, before: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """What the event changed: variable to (before, after)."""
        names = sorted(set(before) | set(self.after))
        return {
            name: (before.get(name, 0), self.after.get(name, 0))
            for name in names
            if before.get(name, 0) != self.after.get(name, 0)
        }


@dataclass(frozen=True, slots=True)
class Trace:
    """A story and where it happened. Immutable."""

    strategy: str
    profile: str
    iommu: str
    bounds: str
    breaks: str
    """The invariant that is broken at the end; empty if none is."""
    start: Mapping[str, int] = field(default_factory=dict)
    steps: Sequence[Step] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values, readable by :meth:`from_json` and by people."""
        return {
            "format": FORMAT,
            "strategy": self.strategy,
            "profile": self.profile,
            "iommu": self.iommu,
            "bounds": self.bounds,
            "breaks": self.breaks,
            "start": dict(self.start),
            "steps": [
                {
                    "event": step.event,
                    "actor": step.actor,
                    "text": step.text,
                    "args": dict(step.args),
                    "after": dict(step.after),
                }
                for step in self.steps
            ],
        }

    @classmethod
    def from_json(cls, told: Any) -> Self:
        """Read what :meth:`to_json` made. Raises ValueError for anything else."""
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            raise ValueError(f"not a trace: its format is not {FORMAT}")
        try:
            steps = [
                Step(
                    str(each["event"]), str(each["actor"]), str(each["text"]),
                    {str(k): int(v) for k, v in each["args"].items()},
                    {str(k): int(v) for k, v in each["after"].items()},
                )
                for each in told["steps"]
            ]  # fmt: skip
            return cls(
                str(told["strategy"]), str(told["profile"]), str(told["iommu"]),
                str(told["bounds"]), str(told["breaks"]),
                {str(k): int(v) for k, v in told["start"].items()}, steps,
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a whole trace: {type(error).__name__}: {error}") from error

    @classmethod
    def loads(cls, text: str) -> Self:
        """Read JSON text. Raises ValueError."""
        return cls.from_json(json.loads(text))


def path_to(found: Explored, state: int) -> list[int]:
    """Numbers of the states from the start to this one."""
    path = [state]
    while (parent := int(found.parents[path[-1]])) >= 0:
        path.append(parent)
    return path[::-1]


def steps_along(
    found: Explored, path: Sequence[int], end: Breach | None
) -> tuple[dict[str, int], list[Step]]:
    """Tell the states of a path as a story; ``end`` is a step that leads out of it."""
    here = _start(found, path[0])
    start = named(found, here)
    steps = []
    for number in path[1:]:
        want = tuple(int(word[number]) for word in found.store.words())
        here, step = _step(found, here, want, int(found.causes[number]), None)
        steps.append(step)
    if end is not None and end.rule >= 0:
        want = _canonical(found, Batch([_row(word) for word in end.words]))
        here, step = _step(found, here, want, end.rule, end.invariant)
        steps.append(step)
    return start, steps


def tell(
    found: Explored, invariant: str, *, strategy: str, profile: str, iommu: str, bounds: str
) -> Trace:
    """The shortest story that breaks an invariant. KeyError if nothing does."""
    breach = found.breaches[invariant]
    path = path_to(found, breach.parent if breach.parent >= 0 else _first(found, breach))
    start, steps = steps_along(found, path, breach)
    return Trace(strategy, profile, iommu, bounds, invariant, start, steps)


def _first(found: Explored, breach: Breach) -> int:
    """Number of the initial state that breaks an invariant by itself."""
    first = zip(*found.store.words(0, found.levels[1]), strict=True)
    return [tuple(map(int, words)) for words in first].index(breach.words)


def _row(word: int) -> U64:
    return np.array([word], np.uint64)


def _start(found: Explored, number: int) -> Batch:
    """An initial state as it is named, from its canonical form."""
    want = tuple(int(word[number]) for word in found.store.words())
    initial = found.model.initial()
    for row in range(len(initial)):
        one = Batch([word[row : row + 1].copy() for word in initial.words])
        if _canonical(found, one) == want:
            return one
    raise LookupError("no initial state leads there")


def _canonical(found: Explored, one: Batch) -> tuple[int, ...]:
    return tuple(int(word[0]) for word in found.model.layout.canonical(one.words))


def _step(
    found: Explored, here: Batch, want: tuple[int, ...], rule: int, breaks: str | None
) -> tuple[Batch, Step]:
    event = found.model.rules[rule].event
    for taken in found.model.rules:
        if taken.event != event or not taken.guard(here).all():
            continue
        after = here.take(np.arange(1))
        taken.effect(after)
        if _canonical(found, after) != want:
            continue
        if breaks is not None and not _breaks(found, after, breaks):
            continue
        if breaks is None and found.model.final & set(after.failed):
            continue  # it leads there, too, and the search did not follow it
        step = Step(taken.event, taken.actor, taken.text, dict(taken.args), named(found, after))
        return after, step
    raise LookupError(f"no step {event} leads on")


def _breaks(found: Explored, after: Batch, invariant: str) -> bool:
    """Whether a step, or the state that it led to, breaks an invariant."""
    if invariant in after.failed:
        return True
    judged = found.model.judge(after).get(invariant)
    return judged is not None and bool(judged.any())


def named(found: Explored, one: Batch) -> dict[str, int]:
    """Variables of a single state that are not 0, by name."""
    cells = found.model.layout.cells.values()
    return {str(cell): value for cell in cells if (value := int(one[cell][0]))}
