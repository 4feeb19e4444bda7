# SPDX-License-Identifier: Apache-2.0
"""Verdicts: every strategy on every machine, and which of them are expected.

Safety is explored with frames and processes interchangeable; liveness by itself, in smaller bounds
without symmetry. The search for a breach ends when an innocent process's memory was written to:
what is broken after that is of no interest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from holdfast.spec import expected
from holdfast.spec.catalogue import STRATEGIES
from holdfast.spec.explore import Explored, explore
from holdfast.spec.liveness import hangs
from holdfast.spec.model import StrategyModel
from holdfast.spec.promises import promises
from holdfast.spec.setting import BOUNDS, Bounds, Iommu, Profile, Setting
from holdfast.spec.strategy import Strategy

Progress = Callable[[int, int], bool]

VICTIM: Final = "S1 with a victim"
LIVE: Final = Bounds(descriptors=1, kills=1, forks=0, paging=False, symmetry=False)
"""What liveness is explored in."""


EXPECTED: Final = expected.EXPECTED


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one strategy in one setting."""

    strategy: str
    setting: Setting
    states: int
    steps: int
    complete: bool
    """Everything was reached (or the search ended at its goal, a victim)."""
    breaks: dict[str, int]
    """Invariant to the number of steps of the shortest story; also ``S1 with a victim``."""
    hangs: tuple[str, ...]
    """Liveness properties that fail."""

    @property
    def holds(self) -> bool:
        """No invariant is broken. It may still wait for ever."""
        return not self.breaks

    def text(self) -> str:
        """For a cell of the table. Where memory is corrupted nothing else matters."""
        if "S1" in self.breaks:
            said = f"breaks S1 in {self.breaks['S1']}"
        elif self.breaks:
            said = "breaks " + ", ".join(
                f"{name} in {n}" for name, n in sorted(self.breaks.items())
            )
        else:
            said = "holds"
        return f"{said}; may hang: {' '.join(self.hangs)}" if self.hangs else said

    def to_json(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "profile": str(self.setting.profile),
            "iommu": str(self.setting.iommu),
            "states": self.states,
            "steps": self.steps,
            "complete": self.complete,
            "breaks": dict(self.breaks),
            "hangs": list(self.hangs),
            "text": self.text(),
        }


def cells(
    profiles: Iterable[Profile] = tuple(Profile),
    iommus: Iterable[Iommu] = tuple(Iommu),
    keys: Iterable[str] = tuple(STRATEGIES),
) -> list[tuple[type[Strategy], Setting]]:
    """Every combination that exists, in the bounds of the table. KeyError for an unknown key."""
    every = [
        (STRATEGIES[key], Setting(profile, iommu, STRATEGIES[key].fitted(BOUNDS["table"])))
        for key in keys
        for profile in profiles
        for iommu in iommus
    ]
    return [(strategy, setting) for strategy, setting in every if strategy.fits(setting)]


def explored(
    strategy: type[Strategy],
    setting: Setting,
    progress: Progress = lambda _states, _level: True,
    limit: int | None = None,
) -> Explored:
    """Every order of events, up to the first victim."""
    model = StrategyModel(strategy, setting)
    return explore(model, limit=limit, until=frozenset({VICTIM}), progress=progress)


def waits(
    strategy: type[Strategy],
    setting: Setting,
    progress: Progress = lambda _states, _level: True,
) -> tuple[Explored, dict[str, int]]:
    """Liveness: what was explored for it, and of each property that fails the first state in which
    (or round which) one can wait for ever."""
    # One process is enough for a keeper: it waits for nobody else's.
    bounds = replace(LIVE, processes=1 if strategy.keeps else LIVE.processes)
    model = StrategyModel(strategy, replace(setting, bounds=bounds))
    found = explore(model, keep_edges=True, progress=progress)
    broken: dict[str, int] = {}
    if found.complete:
        for promise in promises(model.world, found.batch()):
            state = hangs(found, promise)
            if state is not None:
                broken[promise.name] = min(state, broken.get(promise.name, state))
    return found, dict(sorted(broken.items()))


def judge(
    strategy: type[Strategy],
    setting: Setting,
    progress: Progress = lambda _states, _level: True,
) -> Verdict:
    """Explore one strategy in one setting: safety, then liveness."""
    found = explored(strategy, setting, progress)
    breaks = {name: breach.steps for name, breach in found.breaches.items()}
    complete = found.complete or VICTIM in breaks
    fails = tuple(waits(strategy, setting, progress)[1]) if complete else ()
    return Verdict(strategy.key, setting, found.states, found.steps, complete, breaks, fails)
