# SPDX-License-Identifier: Apache-2.0
"""What a post costs: ring check, descriptors, doorbell; and what it costs in C.

A process that has slept until a completion finds caches and branch predictors cold, and the card
asleep on its doorbell, which has to be woken. Both are costs of sleeping, and they double the time
of whatever comes next. So posts are timed one by one, in bursts of three between two waits: the
figure is that of the second and third ones, as in a stream of batches, and the first ones are told
beside it. The peer is timed in the same way, with a card of its own that sleeps on an eventfd.
"""

from __future__ import annotations

import time

import numpy as np

from holdfast.bench.plan import WAIT, Run, engine_of
from holdfast.bench.result import Goal, Result, percentile, times
from holdfast.bench.traffic import Source, same
from holdfast.device import Device
from holdfast.drivers.xdma_ring import RING, Batch
from holdfast.errors import NotSupported
from holdfast.regs.xdma import BYPASS_BAR, Direction

SMALL = 64
"""Bytes of each descriptor."""
BURST = 3
BLOCKS = 10
"""How often Python and C take turns."""


class Poster:
    """Posts one batch of small descriptors again and again, and times each post."""

    def __init__(self, card: Device, descriptors: int) -> None:
        if BURST * descriptors >= RING:
            raise NotSupported(f"a burst of {descriptors} does not fit", operation="bench")
        self._source = Source(descriptors * SMALL, seed=4)
        self._buffer = card.alloc(descriptors * SMALL)
        self._onboard = card.bars[BYPASS_BAR].view(0, descriptors * SMALL)
        self._queue = engine_of(card).queue(Direction.H2C)
        at = np.arange(descriptors, dtype=np.uint64) * np.uint64(SMALL)
        lengths = np.full(descriptors, SMALL, np.uint64)
        host = np.uint64(int(self._buffer.iova)) + at
        self._batch = Batch.of(Direction.H2C, lengths, host, at)
        self.verified = True

    def block(self, count: int) -> tuple[list[int], list[int]]:
        """``count`` bursts: nanoseconds of the first posts, and of the following ones."""
        self._source.refresh()
        self._buffer.array[:] = self._source.data
        self._onboard[:] = 0
        first: list[int] = []
        following: list[int] = []
        post, batch, held = self._queue.post, self._batch, [self._buffer]
        clock = time.perf_counter_ns
        for _ in range(count):
            for number in range(BURST):
                begun = clock()
                transfer = post(batch, held)
                taken = clock() - begun
                (following if number else first).append(taken)
            transfer.wait(WAIT)
        self.verified &= same(self._onboard, self._source.data)
        return first, following


def _measure(run: Run, descriptors: int, at_most: float) -> Result:
    first: list[int] = []
    following: list[int] = []
    c_first: list[int] = []
    c_following: list[int] = []
    bursts = max(1, run.sizes.posts // BURST // BLOCKS)
    with run.open() as card:
        poster = Poster(card, descriptors)
        poster.block(10)
        for _ in range(BLOCKS):
            asleep, awake = poster.block(bursts)
            first += asleep
            following += awake
            told = run.peer.posts(descriptors, bursts * BURST, BURST)
            if told is not None:
                table = told.reshape(-1, BURST)
                c_first += table[:, 0].tolist()
                c_following += table[:, 1:].ravel().tolist()
    own = percentile(following, 0.5)
    theirs = percentile(c_following, 0.5) if c_following else None
    return Result(
        f"post_{descriptors}",
        own / 1000,
        "us",
        None if theirs is None else theirs / own,
        "the same post in C, ringing an eventfd" if c_following else "no C compiler: no peer",
        (Goal(at_most, "value", at_most=True), Goal(0.2)),
        poster.verified,
        {
            "us": times(following, 1e-3),
            "us_after_a_sleep": times(first, 1e-3),
            "c_us": times(c_following, 1e-3) if c_following else None,
            "c_us_after_a_sleep": times(c_first, 1e-3) if c_first else None,
        },
    )


def post_256(run: Run) -> list[Result]:
    """One post of 256 descriptors."""
    return [_measure(run, 256, 6.0)]


def post_32(run: Run) -> list[Result]:
    """One post of 32 descriptors."""
    return [_measure(run, 32, 4.0)]
