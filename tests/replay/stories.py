# SPDX-License-Identifier: Apache-2.0
"""Stories for replay tests: strategies on machines, searched when a test needs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from holdfast.spec.explore import explore
from holdfast.spec.keeper import VARIANTS
from holdfast.spec.model import StrategyModel
from holdfast.spec.setting import BOUNDS, Iommu, Profile, Setting
from holdfast.spec.strategies import SIMPLE
from holdfast.spec.trace import Trace, tell

WORST = "S1 with a victim"
KEYS = {strategy.key: strategy for strategy in (*SIMPLE, *VARIANTS)}
SMALL = {**BOUNDS, "small": replace(BOUNDS["table"], forks=0, crashes=0)}
"""Composition is large: without forks and crashes its stories are found in a second."""


def model(key: str, machine: str, bounds: str = "table") -> StrategyModel:
    """``machine``: kernel and IOMMU, as in "7.x lazy"."""
    profile, iommu = machine.split()
    return StrategyModel(KEYS[key], Setting(Profile(profile), Iommu(iommu), SMALL[bounds]))


def shortest(key: str, machine: str, invariant: str = WORST, bounds: str = "table") -> Trace | None:
    """The shortest story that breaks an invariant; None if nothing does."""
    found = explore(model(key, machine, bounds), until=frozenset({invariant}))
    if invariant not in found.breaches:
        return None
    profile, iommu = machine.split()
    return tell(found, invariant, strategy=key, profile=profile, iommu=iommu, bounds=bounds)


def counterexample(key: str, machine: str, invariant: str = WORST, bounds: str = "table") -> Trace:
    """The same where there is one."""
    trace = shortest(key, machine, invariant, bounds)
    assert trace is not None, f"{key} on {machine} does not break {invariant}"
    return trace


def cells() -> Iterator[Any]:
    """Every strategy on every machine that it is for."""
    for strategy in SIMPLE:
        for profile in Profile:
            for iommu in Iommu:
                if strategy.fits(Setting(profile, iommu, BOUNDS["table"])):
                    name = f"{strategy.key}-{profile}-{iommu}"
                    yield pytest.param(strategy.key, f"{profile} {iommu}", id=name)
