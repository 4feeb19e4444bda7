# SPDX-License-Identifier: Apache-2.0
"""The guest suites: which machines the tests in tests/vm/guest run on, and what counts as passed.

A suite that ran nothing, or skipped what this machine has, proves nothing; so the judgement is made
here from the guest's own per-test results, not from an exit status alone:

* every test passed, and there were some;
* a test was skipped only for the lack of something that this machine does lack, in words that
  :data:`LACKING` knows, or because a backend's contract has nothing to test there;
* on the built kernel, whose memory oracles speak only through the kernel's log, no line of the log
  fits :data:`TROUBLE`. A test that corrupts memory on purpose says so in the log itself
  (:func:`holdfast.lab.guest.damage_expected`).
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from holdfast.errors import UsageError
from holdfast.lab.guest import DAMAGE_BEGINS, DAMAGE_ENDS
from holdfast.lab.machine import Guest
from holdfast.lab.runner import run

TESTS: Final = "tests/vm/guest"
REPORTS: Final = "tests-*.xml"
LOG: Final = "dmesg.txt"

LACKING: Final = {
    "type1": r"\btype1\b|/dev/vfio/vfio",
    "iommufd": r"\biommufd\b|/dev/iommu\b",
    "uio": r"\buio",
    "iommu": r"\bno IOMMU\b",
    "no-iommu": r"\bno-iommu\b|\bwithout an IOMMU\b|\bhas an IOMMU\b",
    "oracles": r"\boracles\b",
    "port": r"\broot port\b",
    "bridge": r"\bshare a group\b|\bin one group\b",
}
"""What a machine may have (backends, translation, the built kernel's oracles, places), and how a
reason for skipping says that it has not."""
_NOTHING_TO_TEST: Final = re.compile(r"this (backend|function) |without translation ")
"""Reasons of holdfast.testing.conformance: properties of the backend, not of the machine."""
TROUBLE: Final = re.compile(
    r"\bWARNING\b|\bBUG\b|\bOops\b|page_poison|pagealloc: |iommu.*(leak|mapped)"
)
"""Lines of a kernel log that mean something is wrong. ``pagealloc:`` are the complaints of
mm/page_poison.c, ``iommu: Detected page leak`` that of drivers/iommu/iommu-debug-pagealloc.c."""
_HARMLESS: Final = re.compile(
    r"command line: |Unknown kernel command line|iommu: Debugging page allocations", re.IGNORECASE
)
_ORACLES: Final = (
    "iommu.debug_pagealloc=1 debug_pagealloc=on page_poison=1 page_owner=on printk.devkmsg=on"
)
_WITH: Final = Guest(functions=("edu", "edu@port", "edu@bridge", "edu@bridge"), timeout=1500)
_WITHOUT: Final = Guest(
    functions=("edu,dma_mask=0xffffffffff",),
    iommu=False,
    driver="uio_pci_generic",
    hugepages=64,
    timeout=1500,
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A machine, and what it has."""

    name: str
    guest: Guest
    features: frozenset[str]
    leave_out: tuple[str, ...] = ()
    """Files that have nothing to do on this machine."""
    watched: bool = False
    """Whether the kernel's log is held against :data:`TROUBLE`."""

    @property
    def environment(self) -> dict[str, str]:
        """What the tests inside are told beyond what every command is."""
        backends = ("type1", "iommufd", "uio")
        return {
            "HOLDFAST_LAB_EXPECT": ",".join(name for name in backends if name in self.features),
            "HOLDFAST_LAB_SCENARIO": self.name,
        }


def _full(guest: Guest) -> Guest:
    return Guest(
        kernel="full",
        functions=guest.functions,
        iommu=guest.iommu,
        driver=guest.driver,
        hugepages=guest.hugepages,
        append=_ORACLES,
        timeout=guest.timeout,
    )


_FOR_VFIO: Final = ("test_vfio_backends.py", "test_keeper_on_hardware.py")
_FOR_UIO: Final = ("test_uio_backend.py",)
_PLACES: Final = frozenset({"iommu", "port", "bridge"})
SCENARIOS: Final = (
    Scenario("stock-iommu", _WITH, _PLACES | {"type1"}, _FOR_UIO),
    Scenario("stock-no-iommu", _WITHOUT, frozenset({"no-iommu", "uio"}), _FOR_VFIO),
    Scenario(
        "full-iommu",
        _full(_WITH),
        _PLACES | {"type1", "iommufd", "oracles"},
        _FOR_UIO,
        watched=True,
    ),
    Scenario(
        "full-no-iommu",
        _full(_WITHOUT),
        frozenset({"no-iommu", "uio", "oracles"}),
        _FOR_VFIO,
        watched=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Case:
    """What became of one test. ``verdict``: passed, failed, error or skipped; ``why`` of it."""

    name: str
    verdict: str
    why: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a guest suite did."""

    scenario: Scenario
    status: int
    cases: tuple[Case, ...]
    log: str
    filtered: bool = False
    """Whether only some tests were asked for; then there may be none."""
    trouble: tuple[str, ...] = field(default=())

    def problems(self) -> list[str]:
        """Everything that keeps this from counting as passed; empty if nothing does."""
        found = [
            f"{case.name}: {case.verdict}: {case.why}"
            for case in self.cases
            if case.verdict in {"failed", "error"}
        ]
        found += [
            f"{case.name}: skipped, though {self.scenario.name} has what it needs: {case.why}"
            for case in self.cases
            if case.verdict == "skipped" and not excused(case.why, self.scenario.features)
        ]
        if not self.filtered and not any(case.verdict == "passed" for case in self.cases):
            found.append("no test passed: none ran")
        if self.status > 1 or (self.status and not found):
            found.append(f"pytest ended with status {self.status}")
        return found + [f"kernel log: {line}" for line in self.trouble]

    def summary(self) -> str:
        """One line."""
        counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
        for case in self.cases:
            counts[case.verdict] += 1
        told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        log = f"; {len(self.trouble)} lines of trouble in the kernel's log"
        return f"{self.scenario.name}: {told or 'no tests'}{log if self.scenario.watched else ''}"


def run_scenario(
    scenario: Scenario,
    results: Path,
    *,
    output: Callable[[bytes], None],
    progress: Callable[[str], None] | None = None,
    keyword: str = "",
) -> Report:
    """Boot the scenario's guest, run the tests inside, and read what they reported.

    ``results`` takes what the guest leaves: the report, the kernel's log, the tests' own files.
    Errors are those of :func:`holdfast.lab.run`.
    """
    results.mkdir(parents=True, exist_ok=True)
    command = ["python3", "-m", "holdfast.lab.inside", *files_of(scenario), "--"]
    # Of the older form of reports, because that takes a test's own properties.
    command += ["-o", "junit_family=xunit1", "--durations=5"]
    # A test that hangs says where, long before its file is ended.
    command += ["-o", "faulthandler_timeout=180"]
    command += ["-k", keyword] if keyword else []
    status = run(
        scenario.guest,
        command,
        output=output,
        results=results,
        environment=scenario.environment,
        console=results / "console.txt",
        progress=progress or (lambda _: None),
    )
    log = (results / LOG).read_text(encoding="utf-8", errors="replace")
    return Report(
        scenario,
        status,
        tuple(case for path in sorted(results.glob(REPORTS)) for case in cases(path.read_bytes())),
        log,
        filtered=bool(keyword),
        trouble=tuple(log_trouble(log)) if scenario.watched else (),
    )


def files_of(scenario: Scenario) -> list[str]:
    """The scenario's test files, relative to the source tree; UsageError without one."""
    tests = Path(__file__).resolve().parents[3] / TESTS
    names = sorted(path.name for path in tests.glob("test_*.py"))
    if not names:
        raise UsageError("there are no guest tests here", operation="lab", hint="use a checkout")
    return [f"{TESTS}/{name}" for name in names if name not in scenario.leave_out]


def cases(junit: bytes) -> Iterable[Case]:
    """The tests of a JUnit XML report, as pytest writes it."""
    root = ET.fromstring(junit)  # noqa: S314 - our own guest's
    for element in root.iter("testcase"):
        name = f"{element.get('classname', '')}::{element.get('name', '')}"
        verdict, why = "passed", ""
        for child in element:
            if child.tag in {"failure", "error", "skipped"}:
                verdict = {"failure": "failed"}.get(child.tag, child.tag)
                why = child.get("message", "").partition("\n")[0]
        yield Case(name, verdict, why, float(element.get("time", "0")))


def excused(why: str, features: frozenset[str]) -> bool:
    """Whether a reason for skipping names something that the machine does not have."""
    if _NOTHING_TO_TEST.match(why):
        return True
    return any(re.search(pattern, why) for name, pattern in LACKING.items() if name not in features)


def log_trouble(log: str) -> list[str]:
    """Lines of a kernel log that mean something is wrong, but for damage done on purpose."""
    found = []
    expected = False
    for line in log.splitlines():
        if DAMAGE_BEGINS in line:
            expected = True
        elif DAMAGE_ENDS in line:
            expected = False
        elif not expected and TROUBLE.search(line) and not _HARMLESS.search(line):
            found.append(line.strip())
    return found
