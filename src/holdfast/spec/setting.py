# SPDX-License-Identifier: Apache-2.0
"""On what machine, with what card, and how much of everything."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

MANY: Final = 9
"""As often as one likes."""


class Profile(enum.StrEnum):
    """How the kernel ends a process and manages its pages."""

    OLD = "2.0"
    """Linux 2.0: areas are closed and zapped one by one in ascending order, then files are closed;
    pages are swapped out whatever their count; PG_reserved is honoured (mm/memory.c)."""
    NEW = "7.x"
    """Linux 6 and 7: notifiers, then all pages, then areas, then files, ``release`` in task work;
    the OOM killer may take pages first; pages without long-term pins are moved."""


class Iommu(enum.StrEnum):
    """What stands between card and memory."""

    NONE = "none"
    LAZY = "lazy"
    """An unmap leaves entries in the IOTLB until a later flush."""
    STRICT = "strict"
    """An unmap returns when nothing of the mapping is left in the IOTLB."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much there is of everything, and how often what is rare may happen."""

    frames: int = 2
    processes: int = 2
    descriptors: int = 2
    iovas: int = 2
    kills: int = 2
    """How many processes may be killed (or exit)."""
    forks: int = 1
    crashes: int = 1
    """How often the keeper may be killed."""
    reads: bool = False
    """Descriptors may also read memory: disclosure (S1r)."""
    ats: bool = False
    """The card has a translation cache of its own (PCIe Address Translation Services)."""
    hangs: bool = True
    """The card may stop silently, go wild, or be pulled out."""
    detail: bool = False
    """A keeper's world in every detail: each step of an exit apart, signals, early takers."""
    paging: bool = True
    """The kernel swaps, migrates, reaps; processes unmap, discard, exec."""
    symmetry: bool = True
    """Frames and processes are interchangeable."""


BOUNDS: Final = {
    "table": Bounds(descriptors=1, kills=1),
    "full": Bounds(reads=True, ats=True, detail=True),
    "core": Bounds(forks=0, crashes=0, hangs=False, paging=False, symmetry=False),
}
"""Named configurations: of the table, of everything, and of the part that is modelled twice."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One machine: kernel, IOMMU, and how much of everything."""

    profile: Profile = Profile.NEW
    iommu: Iommu = Iommu.NONE
    bounds: Bounds = Bounds()

    @property
    def old(self) -> bool:
        return self.profile is Profile.OLD

    @property
    def translated(self) -> bool:
        return self.iommu is not Iommu.NONE

    def __str__(self) -> str:
        return f"{self.profile}, IOMMU {self.iommu}"
