# SPDX-License-Identifier: Apache-2.0
"""What a torture campaign came to: which findings are faults, and the published figures.

A record says what was seen; whether that may be depends on the case. A client whose function was
killed ends with an error, and rightly; one whose keeper was killed must not. Under a fault plan
resets, refusals and quarantine are the right answers, and corruption is as wrong as ever.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.steps import ROLES
from holdfast.torture.campaign import Outcome, spread
from holdfast.torture.drift import drifts
from holdfast.torture.schedule import Case, Unit
from holdfast.torture.unit import Found
from holdfast.values import Policy

ENOUGH = 8
"""Attempts after which a step that was never reached is a fault of the campaign."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that must not be: in which unit, in which of its cases (None: in none), and what.

    ``line`` replays it.
    """

    unit: int
    case: int | None
    what: str
    line: str


@dataclass(slots=True)
class StepCount:
    """How often a step was armed and reached, and who died there."""

    armed: int = 0
    hit: int = 0
    killed: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Tally:
    """Everything of one policy. :meth:`to_json` has the published names."""

    policy: str
    outcome: Outcome
    steps: dict[str, StepCount] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    sigkills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    kill_to_detected_ms: list[float] = field(default_factory=list)
    keeper_back_ms: list[float] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add(self, what: str, count: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + count

    def to_json(self) -> dict[str, Any]:
        return {
            **self.outcome.to_json(),
            **self.counts,
            "sigkills": self.sigkills,
            "kill_to_detected_ms": spread(self.kill_to_detected_ms),
            "keeper_back_ms": spread(self.keeper_back_ms),
            "steps": {
                name: {"armed": count.armed, "hit": count.hit, "killed": count.killed}
                for name, count in sorted(self.steps.items())
            },
            "problems": [
                {"unit": it.unit, "case": it.case, "what": it.what, "line": it.line}
                for it in self.problems
            ],
        }


_COUNTS = (
    "cases", "missed", "late", "fresh", "residue", "client_errors", "survivor_rounds",
    "survivor_errors", "successions", "left_processes", "faulty_cases",
)  # fmt: skip
_SUMS = ("leaked_bytes", "leaked_fds", "unaccounted_bytes")
_OF_UNIT = (*_SUMS, "hung_leases", "left_processes")


def tally(units: Sequence[Unit], found: Iterable[Found]) -> list[Tally]:
    """One tally for each policy, in the order in which they appear."""
    by_number = {unit.number: unit for unit in units}
    tallies: dict[str, Tally] = {}
    for one in found:
        unit = by_number[one.number]
        told = tallies.get(one.policy)
        if told is None:
            told = tallies[one.policy] = Tally(one.policy, Outcome(one.policy))
            told.counts = dict.fromkeys(_COUNTS, 0)
        _add_unit(told, unit, one)
    for told in tallies.values():
        if told.policy != Policy.RELEASE:
            _require_reached(told)
    return list(tallies.values())


def problems_of(unit: Unit, found: Found) -> list[Problem]:
    """What is wrong with one unit; empty if it is as it should be."""
    problems = [
        Problem(unit.number, None, f"{name} = {getattr(found, name)}", str(unit))
        for name in _OF_UNIT
        if getattr(found, name)
    ]

    if found.leaked:
        what = f"descriptors: {', '.join(found.leaked)}"
        problems.append(Problem(unit.number, None, what, str(unit)))

    def wrong(what: str) -> None:
        problems.append(Problem(unit.number, None, what, str(unit)))

    if found.quarantined_bytes and not unit.setting.faulty:
        wrong(f"quarantined_bytes = {found.quarantined_bytes}")
    if found.problem:
        wrong(found.problem)
    for drift in drifts(found.log):
        wrong(drift)
    if found.survivor.get("error") or found.survivor.get("wrong"):
        wrong(f"survivor: {found.survivor}")
    for record in found.records:
        case = unit.cases[record["case"]]
        problems += [
            Problem(unit.number, record["case"], what, str(unit.alone(case)))
            for what in _faults_of(record, case, faulty=unit.setting.faulty)
        ]
    return problems


def _faults_of(record: dict[str, Any], case: Case, *, faulty: bool) -> list[str]:
    faults = []
    if record["foreign"]:
        faults.append(f"corrupted: {record['foreign']} foreign bytes in a victim's memory")
    if record["residue"]:
        faults.append(f"{record['residue']} bytes of somebody else in new memory")
    if record["hung"]:
        faults.append(f"lease {record['lease']} was never released")
    if record["quarantined"] and not faulty:
        faults.append(f"lease {record['lease']} is in quarantine")
    meant = record["late"] or any("client" in hit["killed"] for hit in record["hits"])
    if record["signal"] and not (record["signal"] == signal.SIGKILL and meant):
        faults.append(f"the client died of signal {record['signal']}")
    if not faulty and not case.fatal:
        if record["error"]:
            faults.append(record["error"])
        elif record["exit"]:
            faults.append(f"the client ended with status {record['exit']}")
        if record["late"]:
            faults.append("the client came to no end")
    return faults


# -- figures ------------------------------------------------------------


def _add_unit(told: Tally, unit: Unit, found: Found) -> None:
    outcome = told.outcome
    told.problems += problems_of(unit, found)
    outcome.drifted += drifts(found.log)
    for name in _SUMS:
        setattr(outcome, name, getattr(outcome, name) + getattr(found, name))
    hung = sum(record["hung"] for record in found.records)
    outcome.hung_leases += max(found.hung_leases, hung)
    outcome.quarantined_bytes += 0 if unit.setting.faulty else found.quarantined_bytes
    told.add("left_processes", found.left_processes)
    outcome.seconds += found.seconds
    told.add("survivor_rounds", found.survivor.get("rounds", 0))
    told.add("survivor_errors", bool(found.survivor.get("error") or found.survivor.get("wrong")))
    told.add("successions", sum(entry.get("what") == "succession" for entry in found.happened))
    told.keeper_back_ms += keeper_back(found)
    leases = {lease["lease"]: lease for lease in found.leases}
    for record in found.records:
        _add_record(told, unit, record, leases.get(record["lease"]))


def _add_record(
    told: Tally, unit: Unit, record: dict[str, Any], lease: dict[str, Any] | None
) -> None:
    outcome, case = told.outcome, unit.cases[record["case"]]
    outcome.kills += bool(record["hits"])
    outcome.corrupted += record["foreign"] > 0
    outcome.corrupted_bytes += record["foreign"]
    for what in ("missed", "late", "residue"):
        told.add(what, int(record[what] > 0))
    told.add("cases")
    told.add("fresh", case.fresh)
    told.add("faulty_cases", unit.setting.faulty)
    told.add("client_errors", int(bool(record["error"]) and not case.fatal
                                  and not unit.setting.faulty))  # fmt: skip
    for strike in case.strikes:
        told.steps.setdefault(strike.step, StepCount()).armed += 1
    for hit in record["hits"]:
        count = told.steps[hit["step"]]
        count.hit += 1
        for role in hit["killed"]:
            count.killed[role] = count.killed.get(role, 0) + 1
            told.sigkills[role] += 1
    if lease is not None and lease["pid"] == record["pid"] and record["signal"]:
        _add_lease(told, record, lease)


def killed_at(record: dict[str, Any]) -> int:
    """When a record's client was killed (CLOCK_MONOTONIC nanoseconds); 0: it was not."""
    at = [hit["at_ns"] for hit in record["hits"] if "client" in hit["killed"]]
    return min(at) if at else 0


def states_of(lease: dict[str, Any]) -> dict[str, int]:
    """When a lease entered each state last, frozen first (CLOCK_MONOTONIC nanoseconds).

    A successor treats everything as in flight and goes through the states again.
    """
    entered = {state: at for state, at, _ in lease["log"]}
    return entered | {state: at for state, at, _ in reversed(lease["log"]) if state == "frozen"}


def _add_lease(told: Tally, record: dict[str, Any], lease: dict[str, Any]) -> None:
    outcome, at = told.outcome, killed_at(record)
    if not at:
        return
    outcome.mid_dma_kills += lease.get("in_flight_at_death", 0) > 0
    outcome.completed_after_death += bool(lease.get("completed_after_death"))
    entered = states_of(lease)
    quiet = entered.get("quiet", entered.get("unmapped"))
    if "frozen" in entered:
        told.kill_to_detected_ms.append((entered["frozen"] - at) / 1e6)
    if quiet is not None:
        outcome.kill_to_quiet_ms.append((quiet - at) / 1e6)
        if "released" in entered:
            outcome.quiet_to_released_ms.append((entered["released"] - quiet) / 1e6)


def keeper_back(found: Found) -> list[float]:
    """Milliseconds from each kill of a keeper to its successor's word that it took over."""
    kills = sorted(
        hit["at_ns"]
        for record in found.records
        if not record["fatal"]
        for hit in record["hits"]
        if "keeper" in hit["killed"]
    )
    back = sorted(
        entry["at_ns"] for entry in found.happened if entry.get("what") in ("succession", "start")
    )
    spans = []
    for at in kills:
        later = [moment for moment in back if moment > at]
        if later:
            spans.append((later[0] - at) / 1e6)
    return spans


def _require_reached(told: Tally) -> None:
    """A step that is armed again and again and never reached shows nothing."""
    for name, count in sorted(told.steps.items()):
        if count.armed >= ENOUGH and not count.hit:
            told.problems.append(
                Problem(0, None, f"step {name} was armed {count.armed} times, never reached", "")
            )
