# SPDX-License-Identifier: Apache-2.0
"""The guest's side: compile the programs, put the card into each row's setting, run the trials.

Every trial is a program of its own that kills, judges and cleans up (see ``trial.h``); here trials
are repeated and counted. A trial in which the innocent process got its memory too late proves
nothing if it found nothing, and is repeated a bounded number of times. Runs as root in a lab guest:
it takes QEMU's edu from its driver, writes to frames that it does not own, and lets processes
be killed for want of memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec

from holdfast.errors import NotSupported, SystemFailure
from holdfast.kernel import pci_sysfs
from holdfast.kernel.pci_sysfs import SYSFS, PciFunction, device_path
from holdfast.kernel.sysfs_writes import Write, carry_out
from holdfast.lab.strategies.report import Boot, Observation
from holdfast.lab.strategies.rows import Event, Machine, Row, Setting, Verdict, rows_of

EDU: Final = (0x1234, 0x11E8)
DRIVERS: Final = {Setting.VFIO: "vfio-pci", Setting.UIO: "uio_pci_generic"}
COMPILERS: Final = ("tcc", "gcc", "cc")
TRIALS: Final = 3
PATIENCE: Final = 5
"""Times as many trials as wanted are run at most, until enough of them can be judged."""
TRIAL_TIMEOUT: Final = 30.0
"""Seconds. A trial takes half a second."""
DEMO_KILLS: Final = 5
DEMO_TIMEOUT: Final = 120.0
_ABSENT: Final = 4
"""Exit status of a program whose strategy this kernel does not have the means for."""
_HUGE_PAGES: Final = Path("/proc/sys/vm/nr_hugepages")
_WANTED_HUGE_PAGES: Final = 32

Progress = Callable[[str], None]


class Trial(msgspec.Struct, frozen=True):
    """What one trial saw, as ``trial.h`` prints it."""

    in_time: bool
    got_frame: bool
    foreign_words: int
    stamped: bool
    pages: int
    arrived: bool
    stuck: bool
    refused: int
    event_ms: float
    filled_ms: float

    @property
    def counts(self) -> bool:
        """Foreign words are proof at any time; their absence only if memory was filled in time."""
        return self.in_time or self.foreign_words > 0


def run_all(
    programs: Path,
    *,
    trials: int = TRIALS,
    only: Collection[int] | None = None,
    events: Collection[Event] = tuple(Event),
    progress: Progress = lambda _: None,
) -> Boot:
    """Run this machine's rows (or ``only`` those numbers) under their events; tell what was seen.

    ``programs`` is what :func:`compile_programs` filled. The functions have the drivers they had
    before when this returns. NotSupported if the machine has no edu; SystemFailure if a trial could
    not be carried out.
    """
    started = time.monotonic()
    root, port = edu_functions()
    machine = Machine.NONE if root.iommu_group is None else Machine.VTD
    observations: list[Observation] = []
    with ExitStack() as stack:
        place: tuple[str, Setting] | None = None
        for row in rows_of(machine):
            function = port if row.port else root
            wanted = [event for event in events if row.expected(event)]
            if (only is not None and row.number not in only) or function is None or not wanted:
                continue
            if place != (place := (str(function.bdf), row.setting)):
                stack.close()
                stack.enter_context(arranged(function, row.setting))
            for event in wanted:
                observations.append(observe(programs, row, event, function, trials))
                progress(f"{row.number} {event}: {observations[-1].cell()}")
    seconds = round(time.monotonic() - started, 1)
    return Boot(
        machine=machine,
        kernel=os.uname().release,
        observations=observations,
        seconds=seconds,
    )


# -- the machine ------------------------------------------------------------


def edu_functions() -> tuple[PciFunction, PciFunction | None]:
    """The edu on the root bus, and one behind a root port (which has a reset), if there is one."""
    found = [one for one in pci_sysfs.functions() if (one.vendor, one.device) == EDU]
    roots = [one for one in found if not one.reset_methods]
    ports = [one for one in found if "bus" in one.reset_methods]
    if not roots:
        raise NotSupported(
            "this machine has no edu on its root bus",
            operation="lab strategies",
            hint="run it in a lab guest: holdfast lab strategies",
        )
    return roots[0], ports[0] if ports else None


def compile_programs(directory: Path) -> None:
    """Compile every program into ``directory``. SystemFailure if that is not possible."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise SystemFailure(
            "there is no C compiler",
            operation="lab strategies",
            hint="apt-get install tcc libc6-dev",
        )
    for source in sorted(Path(__file__).parent.glob("*.c")):
        command = [compiler, "-o", str(directory / source.stem), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemFailure(done.stderr.strip()[-500:], operation="compile", target=source.name)


@contextmanager
def arranged(function: PciFunction, setting: Setting) -> Iterator[None]:
    """Have the function in a setting; it gets back its driver and its domain afterwards."""
    before = pci_sysfs.function(function.bdf).driver
    group, domain = function.iommu_group, function.iommu_type
    _bind(function, DRIVERS.get(setting))
    try:
        if setting is Setting.IDENTITY:
            _set_domain(group, "identity")
        yield
    finally:
        if setting is Setting.IDENTITY:
            _set_domain(group, domain)
        _bind(function, before)


def _bind(function: PciFunction, driver: str | None) -> None:
    path = device_path(function.bdf)
    address = str(function.bdf)
    current = pci_sysfs.function(function.bdf).driver
    if current == driver:
        return
    writes = [Write(path / "driver_override", (driver or "") + "\n")]
    if current is not None:
        writes.append(Write(path / "driver" / "unbind", address))
    if driver is not None:
        writes.append(Write(SYSFS / "bus/pci/drivers_probe", address))
    carry_out(writes, TRIAL_TIMEOUT)
    if (bound := pci_sysfs.function(function.bdf).driver) != driver:
        raise SystemFailure(
            f"bound to {bound}, not to {driver}", operation="bind", target=str(function.bdf)
        )


def _set_domain(group: int | None, kind: str | None) -> None:
    if group is not None and kind is not None:
        carry_out([Write(SYSFS / f"kernel/iommu_groups/{group}/type", kind)], TRIAL_TIMEOUT)


# -- trials ------------------------------------------------------------


def observe(
    programs: Path, row: Row, event: Event, function: PciFunction, trials: int
) -> Observation:
    """Run one cell: as many trials as wanted that can be judged, or as far as patience goes.

    Where corruption is expected, that much patience also goes into seeing it once.
    """
    if row.program == "demo":
        return _observe_holdfast(row, event, function)
    seen: list[Trial] = []
    for attempt in range(trials * PATIENCE):
        stamp = row.number << 7 | attempt
        found = _trial(programs, row, event, function, stamp)
        if isinstance(found, str):
            return Observation(row=row.number, event=event, trials=1, counted=0, absent=found)
        seen.append(found)
        shown = any(one.foreign_words for one in seen) or not _must_corrupt(row, event)
        if shown and sum(one.counts for one in seen) >= trials:
            break
    counted = [one for one in seen if one.counts]
    return Observation(
        row=row.number,
        event=event,
        trials=len(seen),
        counted=len(counted),
        corrupted=sum(one.foreign_words > 0 for one in counted),
        got_frame=sum(one.got_frame and one.foreign_words > 0 for one in counted),
        arrived=sum(one.arrived for one in counted),
        stuck=sum(one.stuck for one in counted),
        refused=sum(one.refused > 0 for one in counted),
        error=max((one.refused for one in counted), default=0),
    )


def _must_corrupt(row: Row, event: Event) -> bool:
    return row.expected(event) is Verdict.CORRUPTED


def _trial(
    programs: Path, row: Row, event: Event, function: PciFunction, stamp: int
) -> Trial | str:
    """One trial; or, as text, what this kernel does not have."""
    if row.variant == "hugetlb" and not _huge_pages():
        return "no huge pages"
    command = [str(programs / row.program), str(function.bdf), str(event), str(stamp), row.variant]
    text = _run(command, TRIAL_TIMEOUT, accept=(0, _ABSENT))
    if not text.startswith("{"):
        return text
    return msgspec.json.decode(text, type=Trial, strict=False)


def _huge_pages() -> bool:
    """Have some huge pages in the pool; whether there are."""
    if not _HUGE_PAGES.exists():
        return False
    if int(_HUGE_PAGES.read_text()) < _WANTED_HUGE_PAGES:
        _HUGE_PAGES.write_text(str(_WANTED_HUGE_PAGES))
    return int(_HUGE_PAGES.read_text()) > 1


def _run(command: Sequence[str], timeout: float, accept: Sequence[int] = (0,)) -> str:
    """A program's output (its complaint, if its status is accepted but not 0)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise SystemFailure(
            f"no end after {timeout:g} s", operation="lab strategies", target=" ".join(command)
        ) from error
    if done.returncode not in accept:
        raise SystemFailure(
            f"exit status {done.returncode}: {(done.stderr or done.stdout).strip()[-800:]}",
            operation="lab strategies",
            target=" ".join(command),
        )
    return done.stderr.strip() if done.returncode else done.stdout


def _observe_holdfast(row: Row, event: Event, function: PciFunction) -> Observation:
    """A row of Holdfast's own: the kill campaign that everybody can run, on this function."""
    policy, _, backend = row.variant.partition(" ")
    target = f"pci:{function.bdf}"
    if backend:
        _huge_pages()
        target += f"?backend={backend}&dma_bits=40"
    same = [one.variant.split(" ") for one in rows_of(row.machine) if one.program == row.program]
    told = _campaign(target, tuple(policy for policy, *rest in same if "".join(rest) == backend))
    figures = told[policy]
    return Observation(
        row=row.number,
        event=event,
        trials=figures["kills"],
        counted=figures["mid_dma_kills"],
        corrupted=figures["corrupted"],
        arrived=figures["completed_after_death"],
    )


@lru_cache
def _campaign(target: str, policies: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """The figures of one campaign, by policy. Python and NumPy start once for all of them."""
    with tempfile.TemporaryDirectory() as place:
        figures = Path(place, "demo.json")
        command = [sys.executable, "-m", "holdfast", "demo", "--target", target]
        command += ["--kills", str(DEMO_KILLS), "--json", str(figures)]
        for policy in policies:
            command += ["--policy", policy]
        # Status 1: it found something; what counts here is what it found.
        said = _run(command, DEMO_TIMEOUT * len(policies), accept=(0, 1))
        if not figures.exists():
            raise SystemFailure(said.strip()[-800:], operation="holdfast demo", target=target)
        told = json.loads(figures.read_text())["policies"]
    return {figures["policy"]: figures for figures in told}
