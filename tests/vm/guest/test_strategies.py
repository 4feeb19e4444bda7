# SPDX-License-Identifier: Apache-2.0
"""The strategies of 1998 and today on a real kernel: a quick part of docs/strategies.md.

Runs inside a lab guest. Which rows, says the machine: without an IOMMU the bug of 1998 must be
seen; with one, the keeper must hold and the one without patience must not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from holdfast.kernel import pci_sysfs
from holdfast.lab.guest import damage_expected
from holdfast.lab.strategies.report import mismatches
from holdfast.lab.strategies.rows import Event, Machine, Row, Verdict, rows_of
from holdfast.lab.strategies.trials import compile_programs, edu_functions, run_all

pytestmark = pytest.mark.guest

TRIALS = 2
NEEDED = {
    Machine.NONE: [
        (1, Event.KILL),
        (1, Event.MUNMAP),
        (1, Event.COLLAPSE),
        (2, Event.KILL),
        (2, Event.MUNMAP),
        (3, Event.KILL),
        (6, Event.KILL),
        (6, Event.REMOVE),
        (8, Event.KILL),
        (8, Event.REMOVE),
    ],
    Machine.VTD: [
        (14, Event.KILL),
        (14, Event.FORK),
        (15, Event.KILL),
        (15, Event.MUNMAP),
        (15, Event.DONTNEED),
        (15, Event.EXEC),
        (15, Event.OOM),
        (16, Event.KILL),
        (17, Event.KILL),
    ],
}
"""Row and event, by machine: what is run here."""
SLOW = {Event.COLLAPSE, Event.OOM}
"""Events that take longer than the card's 100 ms where oracles check each page."""


def cells() -> list[tuple[Row, Event]]:
    machine = Machine.VTD if os.environ.get("HOLDFAST_LAB_IOMMU") == "on" else Machine.NONE
    rows = {row.number: row for row in rows_of(machine)}
    oracles = os.environ.get("HOLDFAST_LAB_SCENARIO", "").startswith("full")
    needed = [cell for cell in NEEDED[machine] if not (oracles and cell[1] in SLOW)]
    return [(rows[number], event) for number, event in needed]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("strategies")
    compile_programs(directory)
    return directory


@pytest.fixture(autouse=True)
def drivers_as_before() -> Iterator[None]:
    before = [(one.bdf, one.driver, one.iommu_type) for one in pci_sysfs.functions()]
    yield
    assert [(one.bdf, one.driver, one.iommu_type) for one in pci_sysfs.functions()] == before


@pytest.mark.parametrize(
    ("row", "event"), cells(), ids=lambda value: str(getattr(value, "number", value))
)
def test_a_strategy_does_what_the_documentation_says(
    programs: Path, row: Row, event: Event
) -> None:
    if row.port and edu_functions()[1] is None:
        pytest.skip("needs a function behind a port")
    with ExitStack() as stack:
        if row.expected(event) is Verdict.CORRUPTED:
            stack.enter_context(damage_expected(f"strategy {row.number}, {event}"))
        boot = run_all(programs, trials=TRIALS, only=[row.number], events=[event])
    (seen,) = boot.observations
    assert not mismatches([boot], complete=False)
    if seen.verdict is Verdict.CORRUPTED and row.machine is Machine.NONE:
        assert seen.got_frame, "corrupted, but not the frame that the card was told to write to"
