# SPDX-License-Identifier: Apache-2.0
"""Descriptor fetching of the XDMA core, many at a time.

Facts. A list is a chain of *blocks*: n descriptors that lie behind each other, where n - 1 was
announced beforehand (register 0x88 for the first block, ``Nxt_adj`` of the previous block's last
descriptor for the others). Only a block's last descriptor says where the next block is; the inner
ones may hold anything in ``next`` (the mainline Linux driver leaves them unset). Other drivers
build rings whose blocks have one descriptor each, every ``next`` pointing 32 bytes further.
Source: PG344, "Descriptors".

Consequence. Followed to the letter, the second kind of list costs one read per descriptor, and one
Python iteration too.

Choice. Read ahead in a straight line as far as the budget (credits) goes, then keep the leading
part that the chain really runs through: it goes on as long as every block end points at its
neighbour. Reading ahead stays within the 4 KiB page, which is as mappable as its first byte, or
within the range through which this list was seen to run before (from the second lap of a ring on,
one read fetches all of it). The rest of what was read is dropped, not used later: software may
still be writing it.

Cost. A descriptor may be read twice, and where a window ends inside a page a refused read is
repeated with the exact length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.emu.port import DmaPort
from holdfast.errors import DmaFault
from holdfast.regs import xdma as regs

Descriptors = npt.NDArray[Any]
"""One-dimensional, dtype :data:`holdfast.regs.xdma.DESCRIPTOR`."""

DEPTH = 1024
"""Descriptors that the core buffers: more are never fetched ahead."""
_PAGE = 4096
_FETCHES = 4  # pieces joined into one batch: a ring's tail and head, and a short ring's laps
# Plain integers: an IntFlag costs a microsecond per operation, and more beside an array.
_STOP = int(regs.Desc.STOP)
_UNREACHABLE = int(regs.Status.DESC_UNSUPPORTED_REQUEST)
_BAD_MAGIC = int(regs.Status.MAGIC_STOPPED)
_NOTHING: Descriptors = np.zeros(0, regs.DESCRIPTOR)


class Fetcher:
    """Where one channel is in its descriptor list. Only the engine thread calls it."""

    def __init__(self) -> None:
        self._known = (0, 0)
        self.start(0, 0)
        self.ended = True

    def start(self, address: int, adjacent: int) -> None:
        """Begin a list: the first descriptor's address, and how many follow it directly."""
        self.address = address
        self.left = 1 + adjacent
        self.ended = False
        """A Stop descriptor was fetched, or the list broke: nothing more will be."""
        self.error = 0
        """Why the list broke, as a status bit; effective once all fetched before is done."""
        self._known = (address, address)

    def fetch(self, dma: DmaPort, budget: int) -> Descriptors:
        """Fetch up to ``budget`` descriptors, at least one unless the list has ended."""
        pieces: list[Descriptors] = []
        for _ in range(_FETCHES):
            if budget < 1 or self.ended:
                break
            piece = self._fetch_run(dma, min(budget, DEPTH))
            if len(piece):
                pieces.append(piece)
                budget -= len(piece)
        if len(pieces) < 2:
            return pieces[0] if pieces else _NOTHING
        # As bytes: to join records, NumPy would compare their fields first.
        joined = np.concatenate([piece.view(np.uint8) for piece in pieces])
        return joined.view(regs.DESCRIPTOR)

    def _fetch_run(self, dma: DmaPort, budget: int) -> Descriptors:
        if self.address % regs.DESC_SIZE:
            return self._break(_UNREACHABLE)
        in_page = (_PAGE - self.address % _PAGE) // regs.DESC_SIZE
        sure = min(budget, self.left, in_page)
        low, high = self._known
        ahead = (high - self.address) // regs.DESC_SIZE if low <= self.address < high else 0
        hoped = min(budget, max(in_page, ahead))
        raw = _read(dma, self.address, hoped)
        if raw is None and hoped > sure:
            raw = _read(dma, self.address, sure)
        if raw is None:
            return self._break(_UNREACHABLE)
        return self._take(raw)

    def _break(self, why: int) -> Descriptors:
        self.ended = True
        self.error = why
        return _NOTHING

    def _take(self, raw: Descriptors) -> Descriptors:
        """Keep the leading part that belongs to the chain, and move on behind it."""
        if len(raw) == 1:
            return self._take_one(raw)
        control = raw["control"]
        bad = (control & regs.DESC_MAGIC_MASK) != regs.DESC_MAGIC
        ends = (bad | ((control & _STOP) != 0)).nonzero()[0]
        stopped = False
        if len(ends):
            first = int(ends[0])
            if bad[first] and first == 0:
                return self._break(_BAD_MAGIC)
            # A wrong magic further on counts only if the chain leads there: the next fetch tells.
            stopped = not bad[first]
            raw = raw[: first + stopped]
        begin = self.address
        taken = self._advance(raw)
        self.ended = stopped and taken == len(raw)
        self._learn(begin, begin + taken * regs.DESC_SIZE)
        return raw[:taken]

    def _take_one(self, raw: Descriptors) -> Descriptors:
        """The same for a list that is posted descriptor by descriptor: without array operations."""
        control = int(raw["control"][0])
        if control & regs.DESC_MAGIC_MASK != regs.DESC_MAGIC:
            return self._break(_BAD_MAGIC)
        begin = self.address
        if self.left > 1:
            self.address += regs.DESC_SIZE
            self.left -= 1
        else:
            self.address = int(raw["next"][0])
            self.left = 1 + regs.DESC_ADJACENT.get(control)
        self.ended = bool(control & _STOP)
        self._learn(begin, begin + regs.DESC_SIZE)
        return raw

    def _advance(self, raw: Descriptors) -> int:
        """How many of ``raw`` the chain runs through; sets ``address`` and ``left`` behind them."""
        count = len(raw)
        adjacent = (raw["control"] & regs.DESC_ADJACENT.mask) >> regs.DESC_ADJACENT.lo
        neighbour = np.uint64(self.address) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
            regs.DESC_SIZE
        )
        jumps = (raw["next"] != neighbour).nonzero()[0]
        holds = adjacent.nonzero()[0]
        end = self.left - 1  # index of the current block's last descriptor
        while True:
            at = int(jumps.searchsorted(end))
            target = int(jumps[at]) if at < len(jumps) else count - 1
            end = _block_end(adjacent, holds, end, target)
            if end == target or end >= count:
                break
            # That jump was an inner descriptor's, whose next field means nothing.
        if end >= count:
            self.address += count * regs.DESC_SIZE
            self.left = end - (count - 1)
            return count
        self.address = int(raw["next"][end])
        self.left = 1 + int(adjacent[end])
        return end + 1

    def _learn(self, begin: int, end: int) -> None:
        low, high = self._known
        if low <= begin <= high:
            self._known = (low, max(high, end))
        else:
            self._known = (begin, end)


def _block_end(
    adjacent: npt.NDArray[Any], holds: npt.NDArray[np.intp], end: int, target: int
) -> int:
    """Follow block ends from ``end`` until one is at ``target`` or beyond.

    ``holds`` are the indices with a non-zero count: between them every descriptor is a block of
    its own, and is passed in one stride.
    """
    while end < target:
        at = int(holds.searchsorted(end))
        if at == len(holds) or holds[at] >= target:
            return target
        end = int(holds[at])
        end += 1 + int(adjacent[end])
    return end


def _read(dma: DmaPort, address: int, count: int) -> Descriptors | None:
    raw = np.empty(count * regs.DESC_SIZE, np.uint8)
    try:
        dma.read(address, raw)
    except DmaFault:
        return None
    return raw.view(regs.DESCRIPTOR)
