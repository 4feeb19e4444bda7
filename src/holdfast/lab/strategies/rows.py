# SPDX-License-Identifier: Apache-2.0
"""Every strategy that can be run for real, the events it is put under, and what is expected.

The table of docs/strategies.md and the programs that are run both come from here. A cell that is
not run has a reason instead of an expectation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Event(StrEnum):
    """What happens to the application while the card's transfer is running."""

    KILL = "kill"
    MUNMAP = "munmap"
    DONTNEED = "dontneed"
    REMOVE = "remove"
    EXEC = "exec"
    FORK = "fork"
    OOM = "oom"
    COLLAPSE = "collapse"

    @property
    def heading(self) -> str:
        return _TITLES[self]


_TITLES: Final = {
    Event.KILL: "SIGKILL",
    Event.MUNMAP: "munmap",
    Event.DONTNEED: "MADV_DONTNEED",
    Event.REMOVE: "hole punched",
    Event.EXEC: "exec",
    Event.FORK: "fork, then write",
    Event.OOM: "OOM kill",
    Event.COLLAPSE: "moved by the kernel",
}


class Verdict(StrEnum):
    """What became of an innocent process's memory, or why there was no danger."""

    CORRUPTED = "corrupted"
    """Foreign bytes were found."""
    HOLDS = "holds"
    """None were found."""
    STUCK = "stuck"
    """None were found, and the release that was waited for never came."""
    REFUSED = "refused"
    """The kernel refused the call: the event did not take place."""
    ABSENT = "absent"
    """This kernel does not have what the strategy is made of."""


class Machine(StrEnum):
    """What stands between the card and memory."""

    NONE = "no IOMMU"
    VTD = "VT-d"


class Setting(StrEnum):
    """What the function has to be before a row is run."""

    BARE = "bare"
    """No driver; the IOMMU, if there is one, as the kernel sets it up for drivers."""
    IDENTITY = "identity"
    """No driver; the IOMMU passes addresses through."""
    VFIO = "vfio"
    """Bound to vfio-pci."""
    UIO = "uio"
    """Bound to uio_pci_generic."""


Cells = Mapping[Event, Verdict | str]
"""What is expected; or, as plain text, why the cell is not run."""


@dataclass(frozen=True, slots=True)
class Row:
    """One strategy on one machine. ``number`` is unique; the documentation refers to it.

    ``program`` is the name of a C source here, or ``demo`` for Holdfast's own kill campaign;
    ``variant`` its variant, or the campaign's policy and the options of its target. ``port``: the
    function behind a root port, which has a reset.
    """

    number: int
    name: str
    holder: str
    machine: Machine
    program: str
    cells: Cells
    variant: str = ""
    setting: Setting = Setting.BARE
    port: bool = False

    def expected(self, event: Event) -> Verdict | None:
        """The verdict expected of a cell; None if it is not run."""
        cell = self.cells[event]
        return cell if isinstance(cell, Verdict) else None

    def reason(self, event: Event) -> str:
        """Why a cell is not run; empty if it is."""
        cell = self.cells[event]
        return "" if isinstance(cell, Verdict) else cell


_BAD: Final = Verdict.CORRUPTED
_GOOD: Final = Verdict.HOLDS

NO_FILE: Final = "private memory has no file to punch"
NO_COPY: Final = "a shared mapping is not copied on write"
NO_MOVE: Final = "the kernel moves neither a driver's pages nor huge pages this way"
NO_HOLE: Final = "a driver's pages are no page cache"
AS_ABOVE: Final = "the keeper's mistake comes after the application's end, however it ended"
AS_ROW_2: Final = "as in row 2; this row is about the release"
OWN_TESTS: Final = "the memory is the keeper's file, pinned, as in rows 8 and 15; tests cover it"
BLOCKED: Final = "the IOMMU refuses the transfer, so there is nothing to be seen"
AS_ROW_1: Final = "as in row 1, because the IOMMU passes everything through"


def _cells(*cells: Verdict | str) -> Cells:
    """One cell per event, in the order of :class:`Event`."""
    return dict(zip(Event, cells, strict=True))


def _only_kill(verdict: Verdict, reason: str) -> Cells:
    return {event: verdict if event is Event.KILL else reason for event in Event}


_PINNED_FILE: Final = _cells(
    _GOOD, _GOOD, _GOOD, _GOOD, _GOOD, NO_COPY, _GOOD, Verdict.REFUSED
)  # fmt: skip
_PINNED_PRIVATE: Final = _cells(
    _GOOD, _GOOD, _GOOD, NO_FILE, _GOOD, _GOOD, _GOOD, Verdict.REFUSED
)  # fmt: skip

ROWS: Final = (
    Row(
        1,
        "mlock only",
        "nobody",
        Machine.NONE,
        "mlock",
        _cells(_BAD, _BAD, _BAD, NO_FILE, _BAD, _BAD, _BAD, _BAD),
    ),
    Row(
        2,
        "ghost that shares the address space",
        "a process made by clone(CLONE_VM)",
        Machine.NONE,
        "ghost",
        _cells(_GOOD, _BAD, _BAD, NO_FILE, _GOOD, _BAD, _BAD, _BAD),
    ),
    Row(
        3,
        "ghost that shares descriptors too and waits for release",
        "a process made by clone(CLONE_VM, CLONE_FILES)",
        Machine.NONE,
        "ghost",
        _only_kill(Verdict.STUCK, AS_ROW_2),
        variant="files",
    ),
    Row(
        4,
        "pages of a driver that frees them at release",
        "the application's open file",
        Machine.NONE,
        "driver",
        _cells(_BAD, _GOOD, _GOOD, NO_HOLE, _BAD, NO_COPY, _BAD, NO_MOVE),
        variant="alone",
    ),
    Row(
        5,
        "the same, and a keeper holds the file too",
        "the keeper's open file",
        Machine.NONE,
        "driver",
        _cells(_GOOD, _GOOD, _GOOD, NO_HOLE, _GOOD, NO_COPY, _GOOD, NO_MOVE),
        variant="keeper",
    ),
    Row(
        6,
        "keeper-owned memfd",
        "the keeper's open file",
        Machine.NONE,
        "owned",
        _cells(_GOOD, _GOOD, _GOOD, _BAD, _GOOD, NO_COPY, _GOOD, _BAD),
        variant="memfd",
    ),
    Row(
        7,
        "keeper-owned huge pages (hugetlb)",
        "the keeper's open file",
        Machine.NONE,
        "owned",
        _cells(_GOOD, _GOOD, _GOOD, _BAD, _GOOD, NO_COPY, _GOOD, NO_MOVE),
        variant="hugetlb",
    ),
    Row(
        8,
        "keeper-owned memfd, registered with io_uring",
        "the keeper's io_uring: a long-term pin",
        Machine.NONE,
        "owned",
        _PINNED_FILE,
        variant="uring",
    ),
    Row(
        9,
        "keeper-owned memfd, made a dma-buf by udmabuf",
        "the keeper's dma-buf: a long-term pin",
        Machine.NONE,
        "owned",
        _PINNED_FILE,
        variant="udmabuf",
    ),
    Row(
        10,
        "keeper that resets the card and believes it",
        "the keeper's open file, until the reset is acknowledged",
        Machine.NONE,
        "reset",
        _only_kill(_BAD, AS_ABOVE),
        port=True,
    ),
    Row(
        11,
        "**Holdfast**, `?backend=uio`, policy drain",
        "its keeper: huge pages, pinned; released when the driver says idle",
        Machine.NONE,
        "demo",
        _only_kill(_GOOD, OWN_TESTS),
        variant="drain uio",
        setting=Setting.UIO,
    ),
    Row(
        12,
        "mlock only, behind the kernel's default domain",
        "nobody",
        Machine.VTD,
        "mlock",
        _only_kill(_GOOD, BLOCKED),
    ),
    Row(
        13,
        "mlock only, IOMMU in passthrough",
        "nobody",
        Machine.VTD,
        "mlock",
        _only_kill(_BAD, AS_ROW_1),
        setting=Setting.IDENTITY,
    ),
    Row(
        14,
        "VFIO pins, the application alone",
        "the application's open files",
        Machine.VTD,
        "vfio",
        _PINNED_PRIVATE,
        variant="alone",
        setting=Setting.VFIO,
    ),
    Row(
        15,
        "VFIO pins, and a keeper that waits until the card is idle",
        "the keeper's open files",
        Machine.VTD,
        "vfio",
        _PINNED_PRIVATE,
        variant="keeper",
        setting=Setting.VFIO,
    ),
    Row(
        16,
        "VFIO keeper that unmaps after a timeout and reuses the IOVA",
        "the keeper's open files, until the time is up",
        Machine.VTD,
        "vfio",
        _only_kill(_BAD, AS_ABOVE),
        variant="timeout",
        setting=Setting.VFIO,
    ),
    Row(
        17,
        "VFIO keeper that resets the card, believes it and reuses the IOVA",
        "the keeper's open files, until the reset is acknowledged",
        Machine.VTD,
        "vfio",
        _only_kill(_BAD, AS_ABOVE),
        variant="reset",
        setting=Setting.VFIO,
        port=True,
    ),
    Row(
        18,
        "**Holdfast**, VFIO, policy drain",
        "its keeper: memory pinned by VFIO; released when the driver says idle",
        Machine.VTD,
        "demo",
        _only_kill(_GOOD, OWN_TESTS),
        variant="drain",
        setting=Setting.VFIO,
    ),
    Row(
        19,
        "**Holdfast**, VFIO, policy revoke",
        "its keeper: bus master off, released when that is confirmed",
        Machine.VTD,
        "demo",
        _only_kill(_GOOD, OWN_TESTS),
        variant="revoke",
        setting=Setting.VFIO,
    ),
)


def rows_of(machine: Machine) -> list[Row]:
    """The rows of one machine, in order."""
    return [row for row in ROWS if row.machine is machine]
