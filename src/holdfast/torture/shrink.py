# SPDX-License-Identifier: Apache-2.0
"""The smallest schedule that still fails: delta debugging over cases, then over a case's parts.

Zeller's and Hildebrandt's ``ddmin`` (IEEE TSE 28(2), 2002): try parts and complements of ever finer
splits. Races make a failing schedule fail only sometimes, so a schedule counts as passing when it
passed :data:`TRIES` times, and a budget of runs bounds the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from holdfast.torture.schedule import NO_FAULTS, Case, Strike, Unit

T = TypeVar("T")
TRIES = 2
BUDGET = 60
"""Runs of a stack that shrinking may take."""


class Trial:
    """Asks whether a unit fails, a few times each, until the budget is used up."""

    def __init__(
        self, fails: Callable[[Unit], bool], budget: int = BUDGET, tries: int = TRIES
    ) -> None:
        self._fails = fails
        self._left = budget
        self._tries = tries
        self._known: dict[str, bool] = {}
        self.runs = 0

    def __call__(self, unit: Unit) -> bool:
        """Whether it failed. Without budget nothing fails any more, so that shrinking ends."""
        line = str(unit)
        if line in self._known:
            return self._known[line]
        for _ in range(self._tries):
            if not self._left:
                return False
            self._left -= 1
            self.runs += 1
            if self._fails(unit):
                self._known[line] = True
                return True
        self._known[line] = False
        return False


def ddmin(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> list[T]:
    """A part of ``items``, in order, that still fails, and of which no single item can go.

    ``items`` itself must fail.
    """
    left, parts = list(items), 2
    while len(left) > 1:
        size = -(-len(left) // parts)
        pieces = [left[at : at + size] for at in range(0, len(left), size)]
        smaller = next((piece for piece in pieces if fails(piece)), None)
        if smaller is not None:
            left, parts = smaller, 2
            continue
        rests = (
            [item for other in pieces[:at] + pieces[at + 1 :] for item in other]
            for at in range(len(pieces))
        )
        smaller = next((rest for rest in rests if len(pieces) > 2 and fails(rest)), None)
        if smaller is not None:
            left, parts = smaller, max(parts - 1, 2)
        elif size == 1:
            break
        else:
            parts = min(2 * parts, len(left))
    return left


def shrink(unit: Unit, suspects: Sequence[int], fails: Callable[[Unit], bool]) -> Unit:
    """The smallest unit found that still fails; ``unit`` itself if nothing smaller does.

    ``suspects``: cases (by index) that a failing run complained of. They are tried by themselves.
    """
    best = unit
    alone = next(
        (one for one in (unit.alone(unit.cases[at]) for at in suspects) if fails(one)), None
    )
    if alone is not None:
        best = alone
    elif len(unit.cases) > 1:
        best = unit.of(ddmin(unit.cases, lambda cases: fails(unit.of(cases))))
    return _simplify(best, fails)


def _simplify(unit: Unit, fails: Callable[[Unit], bool]) -> Unit:
    """Take away from the setting and from each case what is not needed for the failure."""
    found = True
    while found:
        smaller = next((simpler for simpler in _simpler(unit) if fails(simpler)), None)
        found = smaller is not None
        unit = smaller or unit
    return unit


def _simpler(unit: Unit) -> Iterator[Unit]:
    setting = unit.setting
    if setting.lanes > 1:
        yield replace(unit, setting=replace(setting, lanes=1))
    if setting.faulty:
        yield replace(unit, setting=replace(setting, faults=NO_FAULTS))
    for at, case in enumerate(unit.cases):
        for simpler in simpler_cases(case):
            yield unit.of([*unit.cases[:at], simpler, *unit.cases[at + 1 :]])


def simpler_cases(case: Case) -> Iterator[Case]:
    """Cases with one thing less: a strike, a role, a count, the fresh interpreter."""
    if case.fresh:
        yield replace(case, fresh=False)
    if len(case.strikes) > 1:
        for at in range(len(case.strikes)):
            yield replace(case, strikes=case.strikes[:at] + case.strikes[at + 1 :])
    for at, strike in enumerate(case.strikes):
        for simpler in _simpler_strikes(strike):
            strikes = (*case.strikes[:at], simpler, *case.strikes[at + 1 :])
            yield replace(case, strikes=strikes)


def _simpler_strikes(strike: Strike) -> Iterator[Strike]:
    if len(strike.kill) > 1:
        for role in sorted(strike.kill):
            yield replace(strike, kill=strike.kill - {role})
    if strike.count > 1:
        yield replace(strike, count=1)
        yield replace(strike, count=strike.count // 2)
