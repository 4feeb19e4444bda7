# SPDX-License-Identifier: Apache-2.0
"""Mediated access: what the keeper's check and post cost, and what they leave of the bandwidth.

Small requests are 4 KiB each, in batches, with 256 in flight. Their keeper's cost is read from
processor clocks, not from the wall: the mediator's thread has one, and so has the process. Both
count everything between two looks, the wake-ups and the completions included.

A mediated and a direct lease of one function exclude each other, so the contenders take turns: each
opens its own lease, runs once without being timed, and closes it again.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

import holdfast
from holdfast.bench.plan import OPEN_TIMEOUT, WAIT, Run, engine_of
from holdfast.bench.result import Goal, Result, ratios, rounded
from holdfast.bench.traffic import DEPTH, GIB, PIECE, Source, same
from holdfast.device import Device
from holdfast.dma.buffer import Buffer
from holdfast.errors import NotSupported
from holdfast.mediated import MediatedEngine
from holdfast.regs.xdma import Direction
from holdfast.transfer import Transfer
from holdfast.wire.rings import Op

SMALL = 4096
IN_FLIGHT = 256
BATCHES = (64, 128)
"""Requests per batch. The goals are for the smaller."""

Post = Callable[[], Transfer]


def mediated_engine(card: Device) -> MediatedEngine:
    """The client half of a mediated lease."""
    if not isinstance(card.dma, MediatedEngine):
        raise NotSupported("the lease is not mediated", operation="bench", target=str(card))
    return card.dma


def open_card(run: Run, access: str) -> Device:
    """A lease of the shared card. The caller closes it."""
    return holdfast.open(run.stack.target, access=access, timeout=OPEN_TIMEOUT)


def pump(posts: Sequence[Post], depth: int) -> None:
    """Post one after the other, ``depth`` in flight, and wait for the last."""
    running: deque[Transfer] = deque()
    for post in posts:
        if len(running) == depth:
            running.popleft().wait(WAIT)
        running.append(post())
    while running:
        running.popleft().wait(WAIT)


# -- small requests ------------------------------------------------------------


class Small:
    """Requests of 4 KiB from one buffer, in batches; as many different ones as are in flight."""

    def __init__(self, card: Device, batch: int) -> None:
        engine = mediated_engine(card)
        self._card = card
        self.host = card.alloc(IN_FLIGHT * SMALL)
        self.host.array[:] = np.random.default_rng(batch).integers(0, 256, self.host.nbytes)
        places = np.arange(IN_FLIGHT, dtype=np.uint64) * np.uint64(SMALL)
        lengths = np.full(batch, SMALL)
        queue = engine.queue
        parts = [places[at : at + batch] for at in range(0, IN_FLIGHT, batch)]
        built = [engine.prepare_many(Op.TO_CARD, self.host, at, lengths, at) for at in parts]
        self.posts: list[Post] = [partial(queue.post, each, [self.host]) for each in built]
        self.batch = batch

    def run(self, requests: int) -> None:
        count = requests // self.batch
        rounds = [self.posts[at % len(self.posts)] for at in range(count)]
        pump(rounds, IN_FLIGHT // self.batch)

    def verify(self) -> bool:
        back = self._card.alloc(self.host.nbytes)
        self._card.dma.from_card(back).wait(WAIT)
        return same(back.array, self.host.array)


def _measure(run: Run, batch: int) -> dict[str, Any]:
    """Rate, and the keeper's processor time per request, of each round."""
    requests = run.sizes.requests
    rates: list[float] = []
    thread: list[float] = []
    keeper: list[float] = []
    with open_card(run, "mediated") as card:
        small = Small(card, batch)
        small.run(requests // 4)  # page faults, and the first laps of the rings
        for _ in range(run.sizes.rounds):
            before = run.stack.ps()["mediator"]
            begun = time.perf_counter()
            small.run(requests)
            taken = time.perf_counter() - begun
            after = run.stack.ps()["mediator"]
            count = after["requests"] - before["requests"]
            rates.append(count / taken)
            thread.append((after["cpu_s"] - before["cpu_s"]) / count * 1e6)
            keeper.append((after["keeper_cpu_s"] - before["keeper_cpu_s"]) / count * 1e6)
        verified = small.verify()
        small.posts.clear()
        small.host.free()
    return {"rate": rates, "thread_us": thread, "keeper_us": keeper, "verified": verified}


def mediated_small(run: Run) -> list[Result]:
    """Cost and rate of requests of 4 KiB."""
    found = {batch: _measure(run, batch) for batch in BATCHES}
    first = found[BATCHES[0]]
    detail = {
        f"batches_of_{batch}": {
            key: rounded(statistics.median(values[key]))
            for key in ("rate", "thread_us", "keeper_us")
        }
        for batch, values in found.items()
    }
    verified = all(values["verified"] for values in found.values())
    # The whole process: what the mediator makes the rest of the keeper do counts as well.
    cost = statistics.median(first["keeper_us"])
    rate = statistics.median(first["rate"])
    return [
        Result(
            "mediated_cpu",
            cost,
            "us",
            None,
            f"nothing; the keeper's processor time per request in batches of {BATCHES[0]}",
            (Goal(1.5, "value", at_most=True),),
            verified,
            detail,
        ),
        Result(
            "mediated_rate",
            rate,
            "1/s",
            None,
            f"nothing; requests of 4 KiB, {IN_FLIGHT} in flight in batches of {BATCHES[0]}",
            (Goal(150_000, "value"),),
            verified,
            {**detail, "rates": ratios(first["rate"])},
        ),
    ]


# -- bandwidth ------------------------------------------------------------


def _posts(card: Device, direction: Direction, buffer: Buffer, nbytes: int) -> list[Post]:
    """Transfers of 4 MiB, prepared."""
    pieces = [(at, min(PIECE, nbytes - at)) for at in range(0, nbytes, PIECE)]
    if card.lease.access == "mediated":
        mediated = mediated_engine(card)
        op = Op.TO_CARD if direction is Direction.H2C else Op.FROM_CARD
        return [
            partial(
                mediated.queue.post,
                mediated.prepare(op, buffer, at, offset=at, nbytes=count),
                [buffer],
            )
            for at, count in pieces
        ]
    direct = engine_of(card)
    queue = direct.queue(direction)
    return [
        partial(
            queue.post, direct.prepare(direction, buffer, at, offset=at, nbytes=count), [buffer]
        )
        for at, count in pieces
    ]


def _turn(run: Run, access: str, direction: Direction, source: Source) -> tuple[float, bool]:
    """One contender's turn: the better of two timed runs in seconds, and whether data is right."""
    nbytes = run.sizes.nbytes
    with open_card(run, access) as card:
        ours, theirs = card.alloc(nbytes), card.alloc(nbytes)
        ours.array[:] = source.data
        posts = _posts(card, Direction.H2C, ours, nbytes)
        back = _posts(card, Direction.C2H, theirs, nbytes)
        timed, other = (posts, back) if direction is Direction.H2C else (back, posts)
        pump(posts, DEPTH)
        pump(back, DEPTH)
        theirs.array[:] = 0
        seconds = []
        for _ in range(2):
            begun = time.perf_counter()
            pump(timed, DEPTH)
            seconds.append(time.perf_counter() - begun)
        if other is back:
            pump(other, DEPTH)
        right: npt.NDArray[np.uint8] = theirs.array
        return min(seconds), same(right, source.data)


def _bandwidth(run: Run, name: str, direction: Direction) -> list[Result]:
    source = Source(run.sizes.nbytes, seed=7)
    seconds: dict[str, list[float]] = {"mediated": [], "exclusive": []}
    verified = True
    for number in range(run.sizes.rounds):
        order = list(seconds) if number % 2 else list(reversed(seconds))
        for access in order:
            source.refresh()
            taken, right = _turn(run, access, direction, source)
            seconds[access].append(taken)
            verified &= right
    own, peer = seconds["mediated"], seconds["exclusive"]
    found = [theirs / mine for mine, theirs in zip(own, peer, strict=True)]
    return [
        Result(
            name,
            run.sizes.nbytes / statistics.median(own) / GIB,
            "GiB/s",
            statistics.median(found),
            "the same transfers of an exclusive lease, in turns",
            (Goal(0.95),),
            verified,
            {"ratio": ratios(found)},
        )
    ]


def mediated_h2c(run: Run) -> list[Result]:
    """Bandwidth to the card in transfers of 4 MiB."""
    return _bandwidth(run, "mediated_h2c", Direction.H2C)


def mediated_c2h(run: Run) -> list[Result]:
    """Bandwidth from the card."""
    return _bandwidth(run, "mediated_c2h", Direction.C2H)
