# SPDX-License-Identifier: Apache-2.0
"""What ``holdfast spec check`` and ``trace`` ask of the specification, and what comes of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

from holdfast.cli.spec_common import Watch, places
from holdfast.errors import UsageError
from holdfast.spec import invariants, liveness, table
from holdfast.spec.explore import Explored, explore
from holdfast.spec.model import StrategyModel
from holdfast.spec.setting import BOUNDS, Iommu, Profile, Setting
from holdfast.spec.strategy import Strategy
from holdfast.spec.table import VICTIM
from holdfast.spec.trace import Trace, path_to, steps_along, tell

USUAL: Final = "table"
"""The bounds in which verdicts are expected; strategies may need more of something."""
TEXTS: Final = {**invariants.TEXTS, **liveness.TEXTS}
_ORDER: Final = tuple(dict.fromkeys((VICTIM, "S1", "S1r with a victim", "S1r", *TEXTS)))
"""The gravest first: whose story is told where several break."""


def machine(
    strategy: type[Strategy], profile: str | None, iommu: str | None, bounds: str
) -> Setting:
    """The machine to explore; what is left open is chosen so that the strategy exists on it.

    Raises UsageError if it does not exist on such a one.
    """
    wanted = [
        Setting(each, kind, strategy.fitted(BOUNDS[bounds]) if bounds == USUAL else BOUNDS[bounds])
        for each in (Profile.NEW, Profile.OLD)
        for kind in Iommu
        if profile in (None, each) and iommu in (None, kind)
    ]
    for setting in wanted:
        if strategy.fits(setting):
            return setting
    raise UsageError(
        f"it does not exist on Linux {profile or 'of any profile'}, IOMMU {iommu or 'of any kind'}",
        operation="spec",
        target=strategy.key,
        hint=f"it exists on {'; '.join(places(strategy)) or 'nothing'}",
    )


def require_known(invariant: str | None) -> None:
    """Raises UsageError for a name that no invariant and no liveness property has."""
    if invariant is not None and invariant not in _ORDER:
        raise UsageError(f"no invariant is called {invariant!r}", operation="spec",
                         hint=f"one of {', '.join(sorted(_ORDER))}")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """What a search has found. Immutable."""

    strategy: type[Strategy]
    setting: Setting
    bounds: str
    invariant: str | None
    """The one that was asked for."""
    states: int
    levels: int
    steps: int
    seconds: float
    complete: bool
    """Everything was reached, or what was looked for was found."""
    breaks: dict[str, int]
    """Invariant to the length of the shortest story, the gravest first."""
    hangs: tuple[str, ...]
    """Liveness properties that fail."""
    trace: Trace | None
    """The story of the gravest breach; if nothing breaks, of a way to wait for ever."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "strategy": self.strategy.key,
            "profile": str(self.setting.profile),
            "iommu": str(self.setting.iommu),
            "bounds": self.bounds,
            "states": self.states,
            "levels": self.levels,
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "complete": self.complete,
            "breaks": self.breaks,
            "hangs": list(self.hangs),
            "trace": None if self.trace is None else self.trace.to_json(),
        }


def search(
    strategy: type[Strategy],
    setting: Setting,
    bounds: str,
    watch: Watch,
    *,
    limit: int | None = None,
    invariant: str | None = None,
) -> Found:
    """Look for everything that breaks, or for one invariant.

    Ends at the first victim, like the table: after that nothing else matters.
    """
    begun = time.monotonic()
    watch.begin(f"{strategy.key} on {setting}")
    if invariant in liveness.TEXTS:
        found, stories = _waiting(strategy, setting, watch)
        names: list[str] = []
        stories = {name: trace for name, trace in stories.items() if name == invariant}
        complete = found.complete
    else:
        goal = invariant or VICTIM
        model = StrategyModel(strategy, setting)
        found = explore(model, limit=limit, until=frozenset({goal}), progress=watch)
        names = [name for name in found.breaches if invariant in (None, name)]
        names.sort(key=_ORDER.index)
        complete = found.complete or goal in found.breaches
        stories = {}
        if complete and invariant is None:
            lives, stories = _waiting(strategy, setting, watch)
            complete = lives.complete
    trace = next(iter(stories.values()), None)
    if names:
        trace = tell(found, names[0], strategy=strategy.key, profile=setting.profile,
                     iommu=setting.iommu, bounds=bounds)  # fmt: skip
    return Found(
        strategy, setting, bounds, invariant, found.states, len(found.levels), found.steps,
        time.monotonic() - begun, complete,
        {name: found.breaches[name].steps for name in names}, tuple(stories), trace,
    )  # fmt: skip


def _waiting(
    strategy: type[Strategy], setting: Setting, watch: Watch
) -> tuple[Explored, dict[str, Trace]]:
    """Liveness properties that fail, each with the shortest way to where one can wait for ever.

    Explored by itself, as for the table.
    """
    found, first = table.waits(strategy, setting, watch)
    stories = {}
    for name, state in first.items():
        start, steps = steps_along(found, path_to(found, state), None)
        stories[name] = Trace(strategy.key, setting.profile, setting.iommu, "live", name, start,
                              steps)  # fmt: skip
    return found, stories
