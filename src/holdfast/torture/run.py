# SPDX-License-Identifier: Apache-2.0
"""A whole torture campaign: plan, units on an executor, tally, and the shrinking of what failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

from holdfast.errors import UsageError
from holdfast.torture import tally as tallies
from holdfast.torture.eyes import Eyes
from holdfast.torture.outside import Machine, settle
from holdfast.torture.plan import Wanted, control, plan
from holdfast.torture.pool import run_all
from holdfast.torture.schedule import Unit
from holdfast.torture.shrink import Trial, shrink
from holdfast.torture.stack import SERVE, Stack
from holdfast.torture.tally import Problem, Tally
from holdfast.torture.unit import SETTLE, Found
from holdfast.torture.unit import run as run_unit
from holdfast.values import Target

DRIVERS = ("xdma", "edu")
DEFAULTS = {
    "xdma": {"memory": str(1 << 20), "link_rate": str(16 << 20), "link_chunk": "16384"},
    "edu": {"delay": "0.02"},
}
"""Options of emulated functions, where the target says nothing: a link slow enough that a process
can die in the middle of a transfer, a delay short enough that thousands can."""
CONTROL_KILLS = 12
CONTROL_RATE = str(4 << 20)
"""Bytes per second of the control's link: what is in flight must still come when a busy machine has
noticed the death, given the memory away and let the victim fill it."""


def ready(target: str) -> str:
    """The target as the campaign uses it: an emulated function gets its options."""
    parsed = Target.parse(target)
    if parsed.scheme != "emu" or parsed.rest not in DEFAULTS:
        return str(parsed)
    options = {**DEFAULTS[parsed.rest], **parsed.options}
    return f"emu:{parsed.rest}?" + "&".join(f"{key}={value}" for key, value in options.items())


def _slow(target: str) -> str:
    parsed = Target.parse(target)
    if "link_rate" not in parsed.options:
        return target
    options = {**parsed.options, "link_rate": CONTROL_RATE}
    return f"emu:{parsed.rest}?" + "&".join(f"{key}={value}" for key, value in options.items())


def driver_of(target: str, serve: Sequence[str] = SERVE) -> str:
    """Which driver a target has; a keeper is started to ask, if the target does not say.

    Raises UsageError if it is none that the campaign has a client's life for.
    """
    parsed = Target.parse(target)
    if parsed.scheme == "emu" and parsed.rest in DRIVERS:
        return parsed.rest
    with Stack(target, serve=serve):
        eyes = Eyes(target)
        name = str(eyes.ps()["driver"])
        eyes.close()
    if name not in DRIVERS:
        raise UsageError(
            f"its driver is {name!r}, and torture knows the lives of clients of "
            f"{' and '.join(DRIVERS)}",
            operation="torture",
            target=target,
        )
    return name


@dataclass(slots=True)
class Campaign:
    """What a campaign did and found."""

    target: str
    seed: int
    units: list[Unit]
    found: list[Found]
    tallies: list[Tally]
    control: Tally | None = None
    """The negative control; None if it could show nothing on this target."""
    control_found: Found | None = None
    machine_leaked_bytes: int = 0
    """Memory of the whole machine that nothing explains."""
    shrunk: list[dict[str, Any]] = field(default_factory=list)
    """For each failing unit that was shrunk: its number, the line left, and how many runs."""
    seconds: float = 0.0

    @property
    def problems(self) -> list[Problem]:
        """Everything that must not be, the control that found nothing included."""
        found = [problem for told in self.tallies for problem in told.problems]
        if self.control is not None and not self.control.outcome.corrupted:
            found.append(Problem(0, None, "the negative control did not corrupt anything", ""))
        if self.machine_leaked_bytes:
            what = f"{self.machine_leaked_bytes} bytes of the machine's memory are unexplained"
            found.append(Problem(0, None, what, ""))
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "seed": self.seed,
            "policies": [told.to_json() for told in self.tallies],
            "control": self.control.to_json() if self.control else None,
            "machine_leaked_bytes": self.machine_leaked_bytes,
            "shrunk": self.shrunk,
            "seconds": round(self.seconds, 1),
        }


def run_campaign(
    wanted: Wanted,
    executor: Executor,
    progress: Callable[[int], None] = lambda _: None,
    *,
    with_control: bool = True,
    serve: Sequence[str] = SERVE,
) -> Campaign:
    """Plan and run. The same ``wanted`` has the same schedule anywhere."""
    units = plan(wanted)
    if with_control and Target.parse(wanted.target).scheme == "emu":
        negative = control(replace(wanted, target=_slow(wanted.target)), CONTROL_KILLS)
    else:
        negative = None
    return run_units(wanted.target, wanted.driver, wanted.seed, units, executor, progress,
                     negative=negative, serve=serve)  # fmt: skip


def run_units(
    target: str,
    driver: str,
    seed: int,
    units: list[Unit],
    executor: Executor,
    progress: Callable[[int], None] = lambda _: None,
    *,
    negative: Unit | None = None,
    serve: Sequence[str] = SERVE,
) -> Campaign:
    """Run given units; the negative control, if there is one, beside them."""
    started = time.monotonic()
    before = Machine.look()
    every = [*units, negative] if negative is not None else units
    found = run_all(every, driver, executor, progress, serve)
    told = controlled = None
    if negative is not None:
        controlled = found.pop()
        [told] = tallies.tally([negative], [controlled])
    left = settle(lambda: Machine.look().leaked_since(before, frozenset()), goal=0, timeout=SETTLE)
    return Campaign(
        target,
        seed,
        units,
        found,
        tallies.tally(units, found),
        told,
        controlled,
        left,
        seconds=time.monotonic() - started,
    )


def shrink_failures(
    campaign: Campaign,
    driver: str,
    progress: Callable[[Unit], None] = lambda _: None,
    *,
    most: int = 3,
    serve: Sequence[str] = SERVE,
) -> None:
    """Shrink the first ``most`` failing units; their lines are added to the campaign."""
    by_number = {unit.number: unit for unit in campaign.units}
    failing: dict[int, list[Problem]] = {}
    for told in campaign.tallies:
        for problem in told.problems:
            if problem.unit:
                failing.setdefault(problem.unit, []).append(problem)

    def fails(unit: Unit) -> bool:
        progress(unit)
        return bool(tallies.problems_of(unit, run_unit(unit, driver, serve=serve)))

    for number in sorted(failing)[:most]:
        trial = Trial(fails)
        suspects = sorted({p.case for p in failing[number] if p.case is not None})
        smallest = shrink(by_number[number], suspects[:4], trial)
        campaign.shrunk.append({"unit": number, "line": str(smallest), "runs": trial.runs})
