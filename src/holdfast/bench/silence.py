# SPDX-License-Identifier: Apache-2.0
"""What the keeper hears of transfers: nothing, and a count that shows that it would be noticed.

Two witnesses. The keeper counts each packet that any client sends it (``ps``). From outside, the
kernel counts how often threads of the keeper were scheduled: a process that was told anything, by
whatever way, would have run. The control is a store to a register that traps: one packet for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import holdfast
from holdfast.bench.plan import OPEN_TIMEOUT, WAIT, Run, engine_of
from holdfast.bench.result import Goal, Result
from holdfast.bench.traffic import Source, same
from holdfast.device import Device
from holdfast.keeper.client import LeaseClient
from holdfast.kernel import procfs
from holdfast.regs.xdma import BYPASS_BAR, CONFIG_BAR, IRQ_USER_ENABLE_W1S, Direction

BLOCK = 16 << 10
"""Bytes of each transfer."""


def keeper_messages(run: Run) -> list[Result]:
    """Packets to the keeper during transfers of an exclusive lease, eventfds as doorbells."""
    count = run.sizes.transfers
    asker = run.stack.ask()
    try:
        with holdfast.open(run.target, access="exclusive", timeout=OPEN_TIMEOUT) as card:
            moves = _Moves(card)
            moves.many(1)
            heard, ran = _heard(asker, lambda: moves.many(count))
            # Sets no bit: an access like any other, without an effect.
            stores, store_ran = _heard(asker, lambda: _store(card, count))
            verified = moves.verified and stores == count
    finally:
        asker.close()
    return [
        Result(
            "keeper_messages",
            float(heard),
            "messages",
            None,
            f"nothing: {count} transfers each way; a trapped register store counts 1 each",
            (Goal(0.0, "value", at_most=True),),
            verified,
            {
                "transfers": 2 * count,
                "keeper_scheduled": ran,
                "control_stores": count,
                "control_messages": stores,
                "control_keeper_scheduled": store_ran,
            },
        )
    ]


class _Moves:
    """Transfers to the card and back, each waited for; what comes back is looked at."""

    def __init__(self, card: Device) -> None:
        self._source = Source(BLOCK, seed=11)
        self._out, self._back = card.alloc(BLOCK), card.alloc(BLOCK)
        self._onboard = card.bars[BYPASS_BAR].view(0, BLOCK)
        engine = engine_of(card)
        self._queues = [engine.queue(direction) for direction in Direction]
        self._batches = [
            engine.prepare(direction, buffer, 0)
            for direction, buffer in zip(Direction, (self._out, self._back), strict=True)
        ]
        self.verified = True

    def many(self, count: int) -> None:
        self._source.refresh()
        self._out.array[:] = self._source.data
        self._back.array[:] = 0
        self._onboard[:] = 0
        for _ in range(count):
            for queue, batch, buffer in zip(
                self._queues, self._batches, (self._out, self._back), strict=True
            ):
                queue.post(batch, [buffer]).wait(WAIT)
        self.verified &= same(self._back.array, self._source.data)


def _store(card: Device, count: int) -> None:
    bar = card.bars[CONFIG_BAR]
    for _ in range(count):
        bar.write(IRQ_USER_ENABLE_W1S, 0)


def _heard(asker: LeaseClient, work: Callable[[], None]) -> tuple[int, int]:
    """Packets that the keeper got meanwhile, those of the asking left out; and how often it ran."""
    told: list[dict[str, Any]] = [asker.ps(), asker.ps()]
    asking = told[1]["packets"] - told[0]["packets"]
    keeper = told[1]["keeper"]
    before = procfs.context_switches(keeper)
    work()
    ran = scheduled(before, procfs.context_switches(keeper))
    return asker.ps()["packets"] - told[1]["packets"] - asking, ran


def scheduled(before: dict[int, int], after: dict[int, int]) -> int:
    """How often threads ran between two looks, one that ended meanwhile at least once."""
    rises = sum(count - before.get(thread, 0) for thread, count in after.items())
    return rises + len(before.keys() - after.keys())
