# SPDX-License-Identifier: Apache-2.0
"""The verdicts that are expected: what is known of each strategy, in the cells of the table.

Reviewed by hand against what is known of each from kernels and from experiments; the numbers of
steps are those of the shortest stories. A change of the model that changes a cell changes this
file, and whoever reviews it sees what became of the claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from holdfast.spec.setting import Iommu, Profile

_HANGS: Final = "; may hang: L1 L2 L4"
"""Who waits for the card in the exit of its process, and lets go of nothing before."""

PLACES: Final = (
    (Profile.OLD, Iommu.NONE),
    (Profile.NEW, Iommu.NONE),
    (Profile.NEW, Iommu.LAZY),
    (Profile.NEW, Iommu.STRICT),
)
"""The columns of the table, in their order."""

_ROWS: Final[Mapping[str, tuple[str, str, str, str]]] = {
    "mlock": (
        "breaks S1 in 7",
        "breaks S1 in 7",
        "breaks S1 in 7",
        "breaks S1 in 7",
    ),
    "reserved": (
        "breaks S1 in 18" + _HANGS,
        "-",
        "-",
        "-",
    ),
    "ghost": (
        "breaks S1 in 7; may hang: L1 L4",
        "breaks S1 in 7; may hang: L1 L4",
        "-",
        "-",
    ),
    "ghost-files": (
        "breaks S1 in 7" + _HANGS,
        "breaks S1 in 7" + _HANGS,
        "-",
        "-",
    ),
    "decoy": (
        "breaks S1 in 7; may hang: L2",
        "-",
        "-",
        "-",
    ),
    "reference": (
        "breaks S5 in 7" + _HANGS,
        "breaks S5 in 8" + _HANGS,
        "breaks S3 in 16, S5 in 8" + _HANGS,
        "breaks S5 in 8" + _HANGS,
    ),
    "reference-timed": (
        "breaks S1 in 14",
        "breaks S1 in 14",
        "breaks S1 in 14",
        "breaks S1 in 16",
    ),
    "reference-locked": (
        "breaks S5 in 8" + _HANGS,
        "-",
        "-",
        "-",
    ),
    "longterm": (
        "-",
        "holds" + _HANGS,
        "breaks S3 in 16" + _HANGS,
        "holds" + _HANGS,
    ),
    "longterm-timed": (
        "-",
        "breaks S1 in 14",
        "breaks S1 in 14",
        "breaks S1 in 16",
    ),
    "longterm-charged": (
        "-",
        "-",
        "-",
        "breaks S11 in 5" + _HANGS,
    ),
    "notifier": (
        "-",
        "holds; may hang: L2",
        "holds; may hang: L2",
        "holds; may hang: L2",
    ),
    "sva": (
        "-",
        "-",
        "breaks S1 in 7",
        "holds",
    ),
    "unmap": (
        "-",
        "-",
        "breaks S1 in 13",
        "breaks S1 in 15",
    ),
    "unmap-retire": (
        "-",
        "-",
        "breaks S1 in 13",
        "holds",
    ),
    "unmap-ats": (
        "-",
        "-",
        "-",
        "breaks S1 in 13",
    ),
    "unmap-default": (
        "-",
        "-",
        "-",
        "breaks S1 in 16",
    ),
    "quiesce": (
        "-",
        "holds" + _HANGS,
        "breaks S3 in 14" + _HANGS,
        "holds" + _HANGS,
    ),
    "completion": (
        "-",
        "breaks S1 in 15" + _HANGS,
        "breaks S1 in 15" + _HANGS,
        "breaks S1 in 17" + _HANGS,
    ),
    "dma-buf": (
        "breaks S1 in 13",
        "breaks S1 in 13",
        "breaks S1 in 13",
        "breaks S1 in 15",
    ),
    "bounce": (
        "-",
        "breaks S1 in 14",
        "breaks S1 in 14",
        "breaks S1 in 16",
    ),
    "reset-unflushed": (
        "-",
        "breaks S1 in 14",
        "breaks S1 in 14",
        "breaks S1 in 16",
    ),
    "reset-believed": (
        "-",
        "breaks S1 in 16" + _HANGS,
        "breaks S1 in 16" + _HANGS,
        "breaks S1 in 18" + _HANGS,
    ),
    "reset": (
        "-",
        "holds" + _HANGS,
        "breaks S3 in 14" + _HANGS,
        "holds" + _HANGS,
    ),
    "quarantine": (
        "-",
        "holds",
        "breaks S3 in 14",
        "holds",
    ),
    "keeper-alone": (
        "-",
        "breaks S1 in 10; may hang: L1 L4",
        "-",
        "holds; may hang: L1 L4",
    ),
    "holdfast": (
        "-",
        "holds",
        "-",
        "holds",
    ),
    "holdfast-revoke": (
        "-",
        "holds",
        "-",
        "holds",
    ),
    "holdfast-reuse": (
        "-",
        "holds",
        "-",
        "breaks S1 in 23",
    ),
    "holdfast-believes": (
        "-",
        "breaks S1 in 25",
        "-",
        "breaks S1 in 31",
    ),
    "holdfast-hang-up": (
        "-",
        "breaks S1 in 18",
        "-",
        "breaks S1 in 23",
    ),
    "holdfast-lied": (
        "-",
        "breaks S1 in 22",
        "-",
        "breaks S9 in 17",
    ),
    "holdfast-release": (
        "-",
        "breaks S1 in 15",
        "-",
        "breaks S1 in 16; may hang: L5",
    ),
}

EXPECTED: Final[Mapping[tuple[str, Profile, Iommu], str]] = {
    (key, profile, iommu): text
    for key, texts in _ROWS.items()
    for (profile, iommu), text in zip(PLACES, texts, strict=True)
    if text != "-"
}
"""Key, profile and IOMMU to the text of the cell."""
