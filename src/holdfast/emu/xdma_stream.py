# SPDX-License-Identifier: Apache-2.0
"""Stream sources behind the C2H channels: a sample generator, a FIFO, and cutting into packets.

Nothing runs at the sample rate. What the source produced by now follows from the clock; the FIFO
holds *ranges of byte numbers*; the samples are computed when they are taken. Between two looks
nobody took anything, so the arrivals up to the FIFO's depth were kept and the rest was dropped:
the same result as sample by sample.

A byte's number counts dropped bytes too, so a receiver of the counter pattern sees each gap.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holdfast.emu.port import Bytes
from holdfast.regs.xdma import DATA_WIDTH

UNBOUNDED = 1 << 62
"""What a source without a rate always has to give."""


class Source:
    """One source. Rates in bytes per second, sizes in bytes. The function's lock guards it."""

    def __init__(self) -> None:
        self.enabled = False
        self.sine = False
        self.rate = 0
        self.depth = 1 << 20
        self.packet = 0
        self.period = 1024
        self.restart(0.0)

    def restart(self, now: float) -> None:
        """Empty the FIFO and count from zero."""
        self.produced = 0
        self.overrun = 0
        self.level = 0
        self.into_packet = 0
        self._fifo: deque[list[int]] = deque()
        self._anchor(now)

    def _anchor(self, now: float) -> None:
        self._since = now
        self._before = self.produced

    def set_rate(self, rate: int, now: float) -> None:
        """Another rate from now on; 0 produces just what is taken."""
        self.sync(now)
        self.rate = rate
        self._anchor(now)

    def enable(self, on: bool, now: float) -> None:
        """A rising edge starts anew; switched off, what the FIFO holds stays."""
        self.sync(now)
        if on and not self.enabled:
            self.restart(now)
        self.enabled = on

    def sync(self, now: float) -> None:
        """Let everything produced up to ``now`` arrive."""
        if not self.enabled or not self.rate:
            return
        beats = int(self.rate * (now - self._since)) // DATA_WIDTH
        arrived = self._before + beats * DATA_WIDTH - self.produced
        kept = min(arrived, max(0, self.depth // DATA_WIDTH * DATA_WIDTH - self.level))
        if kept > 0:
            if self._fifo and sum(self._fifo[-1]) == self.produced:
                self._fifo[-1][1] += kept
            else:
                self._fifo.append([self.produced, kept])
            self.level += kept
        self.overrun += arrived - kept
        self.produced += arrived

    @property
    def available(self) -> int:
        """Bytes that can be taken now."""
        return UNBOUNDED if self.enabled and not self.rate else self.level

    def take(self, count: int) -> Bytes:
        """The next ``count`` bytes; no more than :attr:`available`."""
        if self.enabled and not self.rate:
            start = self.produced
            self.produced += count
            return self._samples(start, count)
        pieces = []
        self.level -= count
        while count:
            start, size = self._fifo[0]
            part = min(size, count)
            pieces.append(self._samples(start, part))
            if part == size:
                self._fifo.popleft()
            else:
                self._fifo[0] = [start + part, size - part]
            count -= part
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.uint8)

    def _samples(self, start: int, count: int) -> Bytes:
        width = 2 if self.sine else 4
        first, last = start // width, -(-(start + count) // width)
        if self.sine:
            period = max(2, min(self.period, 1 << 16))
            phase = (np.arange(last - first) + first % period) % period
            wave = np.sin(np.arange(period) * (2 * math.pi / period)) * 0x7FFF
            values = np.rint(wave).astype("<i2")[phase].view(np.uint8)
        else:
            numbers = np.arange(last - first, dtype="<u4")
            numbers += np.uint32(first & 0xFFFFFFFF)  # wraps, as the card's counter does
            values = numbers.view(np.uint8)
        skip = start - first * width
        samples: Bytes = values[skip : skip + count]
        return samples


@dataclass(frozen=True, slots=True)
class Cut:
    """How stream bytes fall into descriptors.

    ``delivered`` and ``eop`` are of the descriptors that were closed; ``partial`` the bytes that
    went into the next one, which stays open.
    """

    delivered: npt.NDArray[np.int64]
    eop: npt.NDArray[np.bool_]
    partial: int


def cut(room: npt.NDArray[np.int64], budget: int, packet: int, into_packet: int) -> Cut:
    """Lay ``budget`` bytes into descriptors that have ``room`` bytes left each.

    A descriptor closes when it is full or its packet ends: it never holds data of two packets
    (PG195, "DMA C2H Stream"). ``packet`` 0 means no packets; ``into_packet`` bytes of the current
    one were laid before.
    """
    if not packet:
        return _fill(room, budget)
    if not into_packet and len(room) and packet <= int(room.min()):
        # The usual case, a packet per descriptor: no loop.
        closed = min(len(room), budget // packet)
        partial = budget - closed * packet if closed < len(room) else 0
        return Cut(np.full(closed, packet, np.int64), np.ones(closed, np.bool_), partial)
    parts: list[Cut] = []
    left = packet - into_packet % packet
    while len(room):
        part = _fill(room, min(budget, left))
        used = int(part.delivered.sum()) + part.partial
        if used == left:
            part = _close(part)
        parts.append(part)
        budget -= used
        left = packet if used == left else left - used
        room = room[len(part.delivered) :]
        if part.partial or not budget:
            break
    return _join(parts)


def _fill(room: npt.NDArray[np.int64], budget: int) -> Cut:
    sums = np.cumsum(room)
    closed = int(np.searchsorted(sums, budget, "right"))
    used = int(sums[closed - 1]) if closed else 0
    partial = budget - used if closed < len(room) else 0
    return Cut(room[:closed], np.zeros(closed, np.bool_), partial)


def _close(part: Cut) -> Cut:
    """The packet ends here: mark the descriptor that holds its last byte, closing it if open."""
    if part.partial:
        delivered = np.append(part.delivered, part.partial)
        return Cut(delivered, np.append(part.eop, True), 0)
    filled = np.flatnonzero(part.delivered)
    eop = part.eop.copy()
    if len(filled):
        eop[filled[-1]] = True
    return Cut(part.delivered, eop, 0)


def _join(parts: list[Cut]) -> Cut:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Cut(np.zeros(0, np.int64), np.zeros(0, np.bool_), 0)
    return Cut(
        np.concatenate([part.delivered for part in parts]),
        np.concatenate([part.eop for part in parts]),
        parts[-1].partial,
    )
