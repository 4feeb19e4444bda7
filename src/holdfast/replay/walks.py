# SPDX-License-Identifier: Apache-2.0
"""Stories that are not counterexamples: at random, or told step by step.

A search finds the shortest way to break something, and for what holds it finds nothing to play. So
a model is also walked through at random, from a seed. What the model says of the walk's end must
be what is found in memory: either way, so that a replay which never finds anything would show.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from holdfast.spec.explore import steps_from
from holdfast.spec.layout import Batch
from holdfast.spec.model import StrategyModel
from holdfast.spec.rules import Rule
from holdfast.spec.trace import Step, Trace
from holdfast.spec.world import ACTIVE, Eng

Told = tuple[str, Mapping[str, int]]
"""An event and its arguments."""

JUDGED: Final = ("S1 with a victim", "S1r with a victim", "S1", "S1r")
"""After these nothing is claimed any more; the first that fits names the story."""
RARE: Final = frozenset(
    {
        "pull_out", "kill", "exec", "munmap", "dontneed", "hang", "wild", "wild_write", "k_crash",
        "hang_up",
    }
)  # fmt: skip
"""Events that end most of what could be seen, or repeat; a walk takes them less often."""
WANTED: Final = frozenset({"post", "fetch", "first_write", "last_write", "land"})
"""Events that all is about."""
_WEIGHTS: Final = dict.fromkeys(RARE, 1.0) | dict.fromkeys(WANTED, 8.0) | {"pull_out": 0.1}


def walk(
    model: StrategyModel, seed: str, steps: int, key: str, avoid: frozenset[str] = frozenset()
) -> Trace:
    """A story of at most so many steps, at random; it ends where something is corrupted.

    ``avoid``: events that it shall not have.
    """
    chance = random.Random(seed)  # noqa: S311 - reproducible, not secret
    initial = model.initial()
    here = _one(initial, chance.randrange(len(initial)))
    start, breaks = named(model, here), ""
    taken: list[Step] = []
    while len(taken) < steps and not breaks:
        ways = [
            (model.rules[number], after)
            for number, _, after in steps_from(model, here)
            if model.rules[number].event not in avoid
            and _can_be_played(model.rules[number], here, model)
        ]
        if not ways:
            break
        weights = [_WEIGHTS.get(rule.event, 4.0) for rule, _ in ways]
        rule, here = chance.choices(ways, weights)[0]
        taken.append(_step(model, rule, here))
        breaks = next((name for name in JUDGED if name in here.failed), "")
        here.failed.clear()
    return _trace(model, key, breaks, start, taken)


def follow(model: StrategyModel, told: Iterable[Told], key: str, *, lies: int = 0) -> Trace:
    """A story of these events. LookupError if one cannot happen where it stands."""
    initial = model.initial()
    here = _one(initial, min(lies, len(initial) - 1))
    start, breaks = named(model, here), ""
    taken: list[Step] = []
    for event, args in told:
        for number, _, after in steps_from(model, here):
            rule = model.rules[number]
            if rule.event == event and dict(rule.args) == dict(args):
                here = after
                break
        else:
            raise LookupError(f"{event} {dict(args)} cannot happen after {len(taken)} steps")
        taken.append(_step(model, rule, here))
        breaks = breaks or next((name for name in JUDGED if name in here.failed), "")
        here.failed.clear()
    return _trace(model, key, breaks, start, taken)


def _can_be_played(rule: Rule, here: Batch, model: StrategyModel) -> bool:
    """Whether the replay has the means for this step."""
    world = model.world
    on_its_way = any(here[world.fab[d]][0] for d in world.descriptors)
    if rule.event == "pull_out":
        return not on_its_way
    if rule.event == "wild_write":  # edu goes wild only where it writes, and remembers one place
        d = rule.args["d"]
        newest = not any(here[world.sw[later]][0] for later in world.descriptors if later > d)
        return newest and not here[world.reading[d]][0]
    if rule.event == "post":  # edu has one engine
        return not any(here[world.hw[d]][0] in ACTIVE for d in world.descriptors)
    return not (rule.event == "prove" and here[world.eng][0] == Eng.GONE and on_its_way)


def _one(states: Batch, row: int) -> Batch:
    return states.take(np.array([row], np.intp))


def _step(model: StrategyModel, rule: Rule, after: Batch) -> Step:
    return Step(rule.event, rule.actor, rule.text, dict(rule.args), named(model, after))


def _trace(
    model: StrategyModel, key: str, breaks: str, start: Mapping[str, int], steps: list[Step]
) -> Trace:
    setting = model.setting
    return Trace(key, str(setting.profile), str(setting.iommu), "", breaks, start, steps)


def named(model: StrategyModel, one: Batch) -> dict[str, int]:
    """Variables of a single state that are not 0, by name."""
    cells = model.layout.cells.values()
    return {str(cell): value for cell in cells if (value := int(one[cell][0]))}
