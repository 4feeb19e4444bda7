# SPDX-License-Identifier: Apache-2.0
"""What a lease in quarantine is looked at for, what is believed of it, and who may ask."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from holdfast.errors import NoPermission, RemoteError, StaysStuck, UsageError
from holdfast.keeper.deadlines import Deadlines
from holdfast.keeper.lease import FIRST_STEPS, LAST_STEPS, MOST_WHY, Lease
from holdfast.keeper.server import Keeper
from holdfast.keeper.state import Fact, Machine, State
from holdfast.kernel.pidfd import Peer
from holdfast.values import LeaseId, Policy

MakeBench = Callable[..., Any]
REFUSED = RemoteError("refused", errno=1)


def looks(it: Any, count: int) -> bool:
    held = it.lease.quarantined
    return held is not None and held.looks >= count


def test_a_reset_is_tried_again_while_the_function_is_off_anyway(
    bench: MakeBench, until: Any
) -> None:
    it = bench("trusted", arena=True)
    it.others = [9]
    it.function.reset_error = REFUSED
    it.both_signals()

    async def then() -> None:
        await until(lambda: looks(it, 2))
        assert not it.host.usable.is_set()
        it.function.reset_error = None

    it.die(then)
    assert Fact.RESET_TRUSTED in it.lease.machine.facts
    assert it.announced == ["isolated"]
    assert it.host.usable.is_set()


@pytest.mark.parametrize("force", [False, True])
def test_a_function_that_others_use_is_not_reset_unless_forced_and_announced(
    bench: MakeBench, until: Any, force: bool
) -> None:
    # It came to rest, but its memory cannot be unmapped; then somebody starts it again.
    it = bench("trusted", arena=False)
    it.function.strict = False
    it.function.unmap_error = REFUSED
    it.driver.busy = 0
    it.others = [9]
    it.both_signals()

    async def then() -> None:
        await until(lambda: it.state is State.QUARANTINE)
        it.driver.busy = 1
        it.function.unmap_error = None
        await until(lambda: looks(it, 2) and it.driver.busy == 1)
        assert it.function.resets == 0
        assert it.announced == []
        assert "other leases are at work" in it.lease.quarantined.last
        if force:
            ask = it.lease.quarantined.ask(force=True)
            async with asyncio.timeout(5):
                await ask.answer.wait()
        else:
            it.others = []

    it.die(then)
    assert it.function.resets == 1
    assert it.announced == ["isolated"]
    assert Fact.RESET_TRUSTED in it.lease.machine.facts


def test_quarantine_is_left_by_an_unmap_that_works_at_last(bench: MakeBench, until: Any) -> None:
    it = bench("final")
    it.function.reset_error = REFUSED
    it.function.unmap_error = REFUSED
    it.both_signals()
    retired: list[int] = []

    async def then() -> None:
        await until(lambda: it.state is State.QUARANTINE)
        it.function.unmap_error = None
        await until(lambda: it.state is State.RELEASED)
        retired.append(it.host.space.retired)

    it.die(then)
    assert it.states[-3:] == [State.QUARANTINE, State.UNMAPPED, State.RELEASED]
    assert retired == [64 << 10]


def test_what_was_seen_before_quarantine_counts_no_more(bench: MakeBench, until: Any) -> None:
    it = bench("plain", arena=True)
    it.function.has_reset = False
    it.driver.busy, it.driver.stops = 0, True
    it.lease.signal(hung_up=True)

    async def then() -> None:
        await until(lambda: any("other death signal" in step.why for step in it.lease.log))
        assert Fact.IDLE_CONFIRMED in it.lease.machine.facts
        it.driver.busy, it.driver.stops = 1, False  # whoever holds the window started it again
        it.both_signals()
        await until(lambda: it.state is State.QUARANTINE)
        assert Fact.IDLE_CONFIRMED not in it.lease.machine.facts
        it.driver.busy, it.driver.stops = 0, True

    it.die(then)


@pytest.mark.parametrize("contradiction", ["bus mastering", "the engine"])
def test_a_reset_that_is_contradicted_is_not_believed(bench: MakeBench, contradiction: str) -> None:
    it = bench("trusted")
    it.both_signals()

    def keeps_dma() -> None:
        if contradiction == "bus mastering":
            it.driver.busy = 0
            it.function.command |= 4

    it.function.on_reset = keeps_dma
    it.die()
    assert Fact.RESET_TRUSTED not in it.lease.machine.facts
    assert it.states[-2:] == [State.UNMAPPED, State.RELEASED]
    why = next(step.why for step in it.lease.log if step.state is State.UNMAPPED)
    assert ("bus mastering came back on" in why) is (contradiction == "bus mastering")
    assert ("1 in flight" in why) is (contradiction == "the engine")


def test_bus_mastering_stays_off_while_a_reset_that_is_late_may_undo_it(
    bench: MakeBench, until: Any
) -> None:
    it = bench("final")
    release = threading.Event()
    it.function.on_reset = release.wait
    it.both_signals()

    async def then() -> None:
        await until(lambda: it.state is State.RELEASED)
        await until(lambda: any("a reset is under way" in step.why for step in it.lease.log))
        assert not it.function.command & 4
        release.set()
        await until(it.host.usable.is_set)
        assert it.function.command & 4

    it.die(then)


def test_an_unmap_that_comes_back_late_is_not_lost(bench: MakeBench, until: Any) -> None:
    it = bench("final")
    it.driver.busy, it.driver.stops = 0, True
    it.function.strict = False
    release = threading.Event()
    unmap = it.function.dma_unmap

    def slow(iova: int, size: int) -> int:
        release.wait()
        return int(unmap(iova, size))

    it.function.dma_unmap = slow
    it.both_signals()

    async def then() -> None:
        await until(lambda: it.state is State.QUARANTINE)
        with pytest.raises(StaysStuck):
            await it.desk.unmap_all(it.lease, retire=False)
        release.set()

    it.die(then)
    assert it.states[-3:] == [State.QUARANTINE, State.QUIET, State.RELEASED]
    assert it.function.mapped == {}


def test_a_transfer_that_another_leases_reset_cut_off_has_not_completed(
    bench: MakeBench, until: Any
) -> None:
    it = bench("final")
    it.both_signals()

    async def then() -> None:
        await until(lambda: it.lease.in_flight_at_death == 1)
        it.host.disturbed += 1
        it.driver.busy, it.driver.stops = 0, True

    it.die(then)
    assert it.lease.in_flight_at_death == 1
    assert not it.lease.completed_after_death


def test_nobody_but_the_keepers_user_may_ask() -> None:
    keeper = cast(Keeper, SimpleNamespace(host=SimpleNamespace(target="emu:x"), leases={}))
    for force in (False, True):
        with pytest.raises(NoPermission):
            asyncio.run(Keeper.retry(keeper, 1, os.geteuid() + 1, force=force))
    with pytest.raises(UsageError, match="not in quarantine"):
        asyncio.run(Keeper.retry(keeper, 1, os.geteuid(), force=False))


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, 1e6])
def test_a_bound_that_is_no_time_is_refused(value: float) -> None:
    with pytest.raises(UsageError):
        Deadlines(stop=value)


def test_a_first_period_above_the_longest_is_refused() -> None:
    with pytest.raises(UsageError, match="quarantine"):
        Deadlines(quarantine=3, quarantine_longest=2)
    assert Deadlines(quarantine=2, quarantine_longest=2).quarantine == 2


def test_a_log_keeps_its_beginning_and_its_end_and_stays_small() -> None:
    lease = Lease(LeaseId(1), Peer(-1, 1, 0, 0), Machine(Policy.DRAIN))
    for number in range(500):
        lease.note(f"{number} " + "x" * 10_000)
    numbers = [int(step.why.split()[0]) for step in lease.log]
    assert numbers == [*range(FIRST_STEPS), *range(500 - LAST_STEPS, 500)]
    assert all(len(step.why) <= MOST_WHY for step in lease.log)
