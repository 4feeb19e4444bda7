# SPDX-License-Identifier: Apache-2.0
"""One slab at fixed physical addresses: its file, its pages, and what a successor is told.

See ``dma.physical``, which makes them.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from holdfast.dma.slab import SlabMemory, extents_of, flat
from holdfast.kernel.handover import Incoming
from holdfast.kernel.io_uring import LARGEST_PIN
from holdfast.values import Bdf, Handover

NAME: Final = re.compile(r"holdfast-([0-9a-f]{32})-(.{12})-([0-9]{1,18})")
LARGEST: Final = 1 << 47
"""No file of a slab is larger: user addresses of x86-64 end here."""


@dataclass(slots=True, eq=False)
class Held:
    """One slab: its file, and what this process does to keep it. Only under ``lock``."""

    memory: SlabMemory
    path: Path
    file_size: int
    address: int | None = None
    slots: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def describe(held: Held) -> Handover:
    """What :func:`described` reads. The descriptor stays where it is owned."""
    notes = {
        "memory": "physical",
        "name": held.path.name,
        "bytes": held.file_size,
        "extents": flat(held.memory.extents),
        "addresses": held.memory.addresses,
        "slots": list(held.slots),
    }
    return Handover({"slab": held.memory.fd}, notes)


def described(found: Incoming, directory: Path, boot: str, bdf: Bdf) -> tuple[Held, int]:
    """A predecessor's slab, and the number in its name. The descriptor is still ``found``'s.

    ProtocolError if it cannot be a slab of this function in this boot.
    """
    found.require("memory", "physical")
    name = NAME.fullmatch(found.text("name"))
    if not name or (name[1], name[2]) != (boot, str(bdf)):
        raise found.wrong(f"{found.text('name')!r} is not of this function and boot")
    addresses = found.numbers("addresses") if found.has("addresses") else None
    memory = SlabMemory(found.fd("slab"), extents_of(found), addresses)
    held = Held(memory, directory / name[0], found.number("bytes"))
    held.slots = list(found.numbers("slots"))
    if held.slots and len(held.slots) != -(-held.file_size // LARGEST_PIN):
        raise found.wrong(f"{len(held.slots)} pins of {held.file_size} bytes")
    return held, int(name[3])


def pieces(held: Held) -> list[tuple[int, int]]:
    """Each slot of a slab, and the bytes that it pins."""
    starts = range(0, held.file_size, LARGEST_PIN)
    sizes = [min(LARGEST_PIN, held.file_size - at) for at in starts]
    return list(zip(held.slots, sizes, strict=False))


def coalesced(frames: npt.NDArray[np.uint64], page: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Extents ``(offset, size)`` of a file, and the physical address of each.

    ``frames`` are the addresses of its pages in order; pages that are neighbours in the file and in
    memory share an extent. All figures in bytes.
    """
    breaks = np.flatnonzero(np.diff(frames) != np.uint64(page)) + 1
    starts = np.concatenate((np.zeros(1, np.intp), breaks))
    counts = np.diff(starts, append=len(frames))
    extents = zip((starts * page).tolist(), (counts * page).tolist(), strict=True)
    return list(extents), frames[starts].tolist()
