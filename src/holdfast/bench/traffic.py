# SPDX-License-Identifier: Apache-2.0
"""Bandwidth: how close the emulated engine comes to ``memcpy``.

The engine is a process of its own that copies between two shared mappings, so a CPU that copies
the very same bytes between the very same pages is its limit. ``dma_*`` moves contiguous pieces of
4 MiB, ``sg_*`` thousands of small ones at odd addresses.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.bench.peer import CPeer
from holdfast.bench.plan import WAIT, Run, engine_of
from holdfast.bench.result import Goal, Result, ratios, rounded
from holdfast.bench.rounds import Timings, run_rounds
from holdfast.device import Device
from holdfast.dma.sg import SgList
from holdfast.drivers.xdma_ring import RING, Batch
from holdfast.errors import NotSupported
from holdfast.regs.xdma import BYPASS_BAR, Direction
from holdfast.transfer import Transfer

PIECE = 4 << 20
DEPTH = 16
SLOT = 8192
"""Host bytes around each scattered piece, which begins anywhere in them."""
SHORTEST, LONGEST = 2048, 6144
IN_BATCH = 341
BATCHES = (RING - 1) // IN_BATCH
"""Batches in flight: as many as a ring has room for."""
GIB = float(1 << 30)

Bytes = npt.NDArray[np.uint8]


class Source:
    """Random bytes that are different in every round. ``data`` is private memory."""

    def __init__(self, nbytes: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._base = self._random.integers(0, 1 << 64, nbytes // 8, np.uint64)
        self._words = self._base.copy()
        self.data: Bytes = self._words.view(np.uint8)

    def refresh(self) -> None:
        key = self._random.integers(1, 1 << 64, dtype=np.uint64)
        np.bitwise_xor(self._base, key, out=self._words)


def same(found: Bytes, expected: Bytes) -> bool:
    """Whether two arrays of a multiple of 8 bytes hold the same bytes."""
    return np.array_equal(found.view(np.uint64), expected.view(np.uint64))


class Bulk:
    """Pieces of 4 MiB between one host buffer and the card's memory."""

    def __init__(self, card: Device, direction: Direction, nbytes: int) -> None:
        engine = engine_of(card)
        self.nbytes = nbytes
        self._direction = direction
        self._source = Source(nbytes, seed=1)
        self._buffer = card.alloc(nbytes)
        self._host: Bytes = self._buffer.array
        self._onboard = card.bars[BYPASS_BAR].view(0, nbytes)
        self._private = np.zeros(nbytes, np.uint8)
        self._queue = engine.queue(direction)
        self._batches = [
            engine.prepare(direction, self._buffer, at, offset=at, nbytes=min(PIECE, nbytes - at))
            for at in range(0, nbytes, PIECE)
        ]

    @property
    def _ends(self) -> tuple[Bytes, Bytes]:
        """Where from and where to."""
        if self._direction is Direction.H2C:
            return self._host, self._onboard
        return self._onboard, self._host

    def refresh(self) -> None:
        self._source.refresh()
        self._ends[0][:] = self._source.data

    def clear(self) -> None:
        self._ends[1][:] = 0
        self._private[:] = 0

    def contenders(self) -> Mapping[str, Callable[[], None]]:
        return {
            "deep": lambda: self._move(DEPTH),
            "single": lambda: self._move(1),
            "memcpy": lambda: self._copy(self._ends[1]),
            "memcpy_private": lambda: self._copy(self._private),
        }

    def _move(self, depth: int) -> None:
        running: deque[Transfer] = deque()
        for batch in self._batches:
            if len(running) == depth:
                running.popleft().wait(WAIT)
            running.append(self._queue.post(batch, [self._buffer]))
        while running:
            running.popleft().wait(WAIT)

    def _copy(self, into: Bytes) -> None:
        source = self._ends[0]
        for at in range(0, self.nbytes, PIECE):
            np.copyto(into[at : at + PIECE], source[at : at + PIECE])

    def verify(self, contender: str) -> bool:
        into = self._private if contender == "memcpy_private" else self._ends[1]
        return same(into, self._source.data)


class Pieces:
    """Where scattered pieces lie: ``host`` offsets in random slots, ``card`` offsets in a row."""

    def __init__(self, nbytes: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        drawn = random.integers(SHORTEST, LONGEST + 1, nbytes // SHORTEST, np.int64)
        count = int(np.searchsorted(np.cumsum(drawn), nbytes)) + 1
        lengths = drawn[:count]
        lengths[-1] -= int(lengths.sum()) - nbytes
        slots = random.permutation(count) * SLOT
        self.lengths = lengths.astype(np.uint64)
        self.host = (slots + random.integers(0, SLOT - lengths + 1)).astype(np.uint64)
        self.card = (np.cumsum(lengths) - lengths).astype(np.uint64)
        self.host_bytes = count * SLOT
        rows = zip(self.host.tolist(), self.card.tolist(), lengths.tolist(), strict=True)
        self._slices = [(slice(h, h + n), slice(c, c + n)) for h, c, n in rows]

    def __len__(self) -> int:
        return len(self.lengths)

    def scatter(self, packed: Bytes, image: Bytes) -> None:
        """Put the packed bytes where the pieces lie in a host image."""
        for at_host, at_card in self._slices:
            image[at_host] = packed[at_card]


class Scattered:
    """Small pieces of host memory at odd addresses, to and from consecutive card memory."""

    def __init__(self, card: Device, direction: Direction, nbytes: int, peer: CPeer) -> None:
        self.nbytes = nbytes
        self.pieces = Pieces(nbytes, seed=2)
        self.piece_seconds: list[float] = []
        self._direction = direction
        self._peer = peer
        self._source = Source(nbytes, seed=3)
        self._buffer = card.alloc(self.pieces.host_bytes)
        self._host: Bytes = self._buffer.array
        self._image = np.zeros(self.pieces.host_bytes, np.uint8)
        self._flat = np.zeros(nbytes, np.uint8)
        self._onboard = card.bars[BYPASS_BAR].view(0, nbytes)
        self._queue = engine_of(card).queue(direction)
        if len(self._buffer.sg) != 1:
            raise NotSupported("the buffer has more than one piece", operation="bench")
        begun = time.perf_counter()
        self._batches = self._build(int(self._buffer.iova))
        self.build_seconds = time.perf_counter() - begun

    def _build(self, iova: int) -> list[Batch]:
        pieces, batches = self.pieces, []
        for at in range(0, len(pieces), IN_BATCH):
            part = slice(at, at + IN_BATCH)
            sg = SgList(np.uint64(iova) + pieces.host[part], pieces.lengths[part])
            batches.append(Batch.build(self._direction, sg, int(pieces.card[at])))
        return batches

    def refresh(self) -> None:
        self._source.refresh()
        self.pieces.scatter(self._source.data, self._image)
        if self._direction is Direction.H2C:
            self._host[:] = self._image
        else:
            self._onboard[:] = self._source.data

    def clear(self) -> None:
        (self._onboard if self._direction is Direction.H2C else self._host)[:] = 0
        self._flat[:] = 0

    def contenders(self) -> Mapping[str, Callable[[], None]]:
        return {"sg": self._move, "memcpy": self._copy, "pieces": self._copy_pieces}

    def _move(self) -> None:
        running: deque[Transfer] = deque()
        for batch in self._batches:
            if len(running) == BATCHES:
                running.popleft().wait(WAIT)
            running.append(self._queue.post(batch, [self._buffer]))
        while running:
            running.popleft().wait(WAIT)

    def _copy(self) -> None:
        if self._direction is Direction.H2C:
            np.copyto(self._onboard, self._source.data)
        else:
            np.copyto(self._flat, self._onboard)

    def _copy_pieces(self) -> None:
        """In the C peer, which times itself and works on memory of its own."""
        pieces = self.pieces
        taken = self._peer.copy_pieces(
            pieces.host, pieces.lengths, pieces.host_bytes, self._direction is Direction.H2C
        )
        if taken is not None:
            self.piece_seconds.append(taken)

    def verify(self, contender: str) -> bool:
        if contender == "pieces":
            return True
        if self._direction is Direction.H2C:
            return same(self._onboard, self._source.data)
        if contender == "memcpy":
            return same(self._flat, self._source.data)
        return same(self._host, self._image)  # the gaps between the pieces, too


def _ratios(theirs: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    return ratios([other / mine for other, mine in zip(theirs, own, strict=True)])


def _gib(rates: list[float]) -> float:
    return rounded(statistics.median(rates) / GIB)


def dma_h2c(run: Run) -> list[Result]:
    """Host to card, 16 transfers of 4 MiB in flight."""
    return [_bulk(run, Direction.H2C)]


def dma_c2h(run: Run) -> list[Result]:
    """Card to host, 16 transfers of 4 MiB in flight."""
    return [_bulk(run, Direction.C2H)]


def _bulk(run: Run, direction: Direction) -> Result:
    with run.open() as card:
        work = Bulk(card, direction, run.sizes.nbytes)
        timings = run_rounds(work, run.sizes.rounds)
    return bulk_result(f"dma_{direction.name.lower()}", timings)


def bulk_result(name: str, timings: Timings) -> Result:
    """The figure of a contiguous direction."""
    deep = timings.ratio("deep", "memcpy")
    return Result(
        name,
        statistics.median(timings.rates("deep")) / GIB,
        "GiB/s",
        statistics.median(deep),
        "np.copyto of the same bytes between the same pages, in this process",
        (Goal(0.9),),
        timings.verified,
        {
            "bytes": timings.nbytes,
            "transfer_bytes": PIECE,
            "in_flight": min(DEPTH, -(-timings.nbytes // PIECE)),
            "ratio": ratios(deep),
            "memcpy_gib_s": _gib(timings.rates("memcpy")),
            "depth_1_gib_s": _gib(timings.rates("single")),
            "depth_1_ratio": ratios(timings.ratio("single", "memcpy")),
            "memcpy_private_gib_s": _gib(timings.rates("memcpy_private")),
            "ratio_to_memcpy_private": ratios(timings.ratio("deep", "memcpy_private")),
        },
    )


def sg_h2c(run: Run) -> list[Result]:
    """Scattered host memory to the card."""
    return [_scattered(run, Direction.H2C)]


def sg_c2h(run: Run) -> list[Result]:
    """The card to scattered host memory."""
    return [_scattered(run, Direction.C2H)]


def _scattered(run: Run, direction: Direction) -> Result:
    with run.open() as card:
        work = Scattered(card, direction, run.sizes.nbytes, run.peer)
        timings = run_rounds(work, run.sizes.rounds)
        own = timings.seconds["sg"]
        detail: dict[str, Any] = {
            "bytes": timings.nbytes,
            "descriptors": len(work.pieces),
            "lengths": [SHORTEST, LONGEST],
            "in_batch": IN_BATCH,
            "us_per_descriptor": rounded(statistics.median(own) * 1e6 / len(work.pieces)),
            "build_us_per_descriptor": rounded(work.build_seconds * 1e6 / len(work.pieces)),
            "memcpy_gib_s": _gib(timings.rates("memcpy")),
            "ratio": ratios(timings.ratio("sg", "memcpy")),
            "ratio_to_same_pieces_in_c": None,
            "same_pieces_in_c_ratio": None,
        }
        if pieces := work.piece_seconds[1:]:  # the first round is not counted
            whole = timings.seconds["memcpy"]
            detail["ratio_to_same_pieces_in_c"] = _ratios(pieces, own)
            detail["same_pieces_in_c_ratio"] = _ratios(whole, pieces)
    return Result(
        f"sg_{direction.name.lower()}",
        statistics.median(timings.rates("sg")) / GIB,
        "GiB/s",
        statistics.median(timings.ratio("sg", "memcpy")),
        "np.copyto of as many bytes in one piece, in this process",
        (Goal(0.5),),
        timings.verified,
        detail,
    )
