# SPDX-License-Identifier: Apache-2.0
"""The death protocol carried out against a function that misbehaves in every way there is."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from holdfast.backends.unmapping import Outcome, one_by_one
from holdfast.contracts import FunctionBackend
from holdfast.dma.iova import IovaSpace
from holdfast.dma.ledger import Ledger
from holdfast.dma.slab import Arena, OwnFiles
from holdfast.driver import Driver, FunctionAccess
from holdfast.errors import DeviceError, DeviceGone, RemoteError
from holdfast.keeper import quiesce
from holdfast.keeper.access import BackendAccess
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.held import FunctionProcess
from holdfast.keeper.journal import Journal
from holdfast.keeper.lease import Lease
from holdfast.keeper.memory import MemoryDesk
from holdfast.keeper.quiesce import Deadlines, Quiesce
from holdfast.keeper.state import Fact, Machine, State
from holdfast.kernel.pidfd import Peer
from holdfast.values import Access, Iova, LeaseId, Perm, Policy, Promises, Target

SIZE = 64 << 10
SHORT = Deadlines(drain=0.1, stop=0.1, isolate=0.1, reset=0.1)


class NotHeld:
    """A ``Holder`` that holds nothing: these leases do not outlive their process."""

    def put(self, name: str, fds: Sequence[int] = (), note: object = None) -> None: ...

    def drop(self, name: str) -> None: ...

    def release(self, name: str) -> None: ...


TARGET = Target("emu", "fake")
BASE = 1 << 32


@dataclass
class FakeFunction:
    """As much of a backend as a death needs; remembers what was mapped."""

    strict: bool = True
    has_reset: bool = True
    unmap_short: bool = False
    unmap_error: Exception | None = None
    unmap_error_but: int | None = None
    """An IOVA whose unmap goes well all the same."""
    reset_error: Exception | None = None
    mapped: dict[int, int] = field(default_factory=dict)
    resets: int = 0
    command: int = 4
    regions = (SimpleNamespace(size=256),) * 9

    @property
    def promises(self) -> Promises:
        return Promises(strict_unmap=self.strict, reset=self.has_reset)

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        return (self.command if offset == 4 else 0).to_bytes(count, "little")

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        if offset == 4:
            self.command = int.from_bytes(data, "little")

    def unmask_intx(self) -> None:
        return None

    def dma_map(self, iova: Iova, size: int, perm: Perm, fd: int, offset: int) -> None:
        self.mapped[iova] = size

    def dma_unmap(self, iova: Iova, size: int) -> int:
        if self.unmap_error is not None and iova != self.unmap_error_but:
            raise self.unmap_error
        if self.unmap_short:
            return size - 4096
        return self.mapped.pop(iova, 0)

    def dma_unmap_many(self, ranges: Sequence[tuple[Iova, int]]) -> list[Outcome]:
        return one_by_one(self.dma_unmap, ranges)

    def reset(self) -> None:
        if self.reset_error is not None:
            raise self.reset_error
        self.resets += 1

    def close(self) -> None:
        self.mapped.clear()


class FakeDriver(Driver):
    """Answers as told. ``busy`` is what in_flight says; ``stops`` whether stop acknowledges."""

    name = "fake"

    def __init__(self, fn: FunctionAccess) -> None:
        super().__init__(fn)
        self.busy = 1
        self.stops = False
        self.finishes_on_drain = False
        self.error: Exception | None = None
        self.stuck: threading.Event | None = None
        self.calls: list[str] = []

    def channels(self) -> int:
        return 2

    def drain(self, channels: Sequence[int]) -> None:
        self.calls.append("drain")
        if self.finishes_on_drain:
            self.busy = 0

    def in_flight(self, channels: Sequence[int]) -> int:
        if self.stuck is not None:
            self.stuck.wait()
        if self.error is not None:
            raise self.error
        return self.busy

    def stop(self, channels: Sequence[int]) -> bool:
        self.calls.append("stop")
        if self.stops:
            self.busy = 0
        return self.stops


class FinalDriver(FakeDriver):
    stop_is_final = True


class TrustedReset(FakeDriver):
    reset_stops_dma = True


class Bench:
    """One lease with one slab, on a fake function."""

    def __init__(
        self, driver: type[FakeDriver] = FinalDriver, *, policy: Policy = Policy.DRAIN,
        arena: bool = False, claimed: bool = True,
    ) -> None:  # fmt: skip
        self.function = FakeFunction()
        self.driver = driver(cast(FunctionAccess, None))
        self.arena = Arena(1 << 20) if arena else None
        self.host = FunctionHost(
            target=TARGET,
            holder=NotHeld(),
            access=BackendAccess(cast(FunctionBackend, self.function), str(TARGET)),
            driver=self.driver,
            space=IovaSpace(BASE, 1 << 40),
            source=self.arena or OwnFiles(),
            arena_iova=Iova(BASE) if arena else None,
            irq_index=None,
            irq_fds=[],
            free_channels={1},
        )
        self.journal = Journal.create()
        self.desk = MemoryDesk(self.host, NotHeld(), self.journal, Ledger(1 << 20, 100))
        self.lease = Lease(LeaseId(7), Peer(-1, 1, 0, 0), Machine(policy))
        self.lease.access, self.lease.channels = Access.SHARED, (0,)
        self.lease.claimed = claimed
        self.announced: list[str] = []

    def announce(self, what: str, text: str, *, but: Lease) -> None:
        self.announced.append(what)

    def settled(self, lease: Lease) -> None:
        """Nobody succeeds this one."""

    @property
    def states(self) -> list[State]:
        """States entered, each once in a row."""
        entered: list[State] = []
        for step in self.lease.log:
            if not entered or entered[-1] is not step.state:
                entered.append(step.state)
        return entered

    @property
    def state(self) -> State:
        return self.lease.machine.state

    def both_signals(self) -> None:
        self.lease.signal(hung_up=True, process_dead=True)

    async def reached(self, wanted: State) -> None:
        async with asyncio.timeout(5):
            while self.state is not wanted:  # noqa: ASYNC110 - a lease tells nobody of its steps
                await asyncio.sleep(0.001)

    def die(self, then: Callable[[], Awaitable[None]] | None = None, slabs: int = 1) -> None:
        """Take memory, die, and walk the table to its end; ``then`` runs beside the walk."""

        async def walk() -> None:
            for _ in range(slabs):
                await self.desk.take_slab(self.lease, SIZE)
            work = asyncio.create_task(
                Quiesce(self.lease, self.host, self.desk, SHORT, self).run("killed")
            )
            if then is not None:
                await then()
            async with asyncio.timeout(5):
                await work

        asyncio.run(walk())
        assert self.state is State.RELEASED
        assert self.host.source.held_bytes == 0
        assert self.lease.nbytes == 0
        assert self.journal.entries(self.lease.number) == ()


DRIVERS: dict[str, type[FakeDriver]] = {
    "plain": FakeDriver,
    "final": FinalDriver,
    "trusted": TrustedReset,
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    """``bench(driver, policy=, arena=, claimed=)``; ``driver`` is a key of :data:`DRIVERS`."""
    monkeypatch.setattr(quiesce, "QUARANTINE_PERIOD", 0.01)
    made: list[Bench] = []

    def make(driver: type[FakeDriver] = FinalDriver, **options: Any) -> Bench:
        made.append(Bench(driver, **options))
        return made[-1]

    yield make
    for each in made:
        if each.driver.stuck is not None:
            each.driver.stuck.set()
        each.host.close()
        each.host.pool.shutdown(wait=True)


MakeBench = Callable[..., Bench]


def test_a_transfer_that_finishes_is_drained_and_everything_goes_back(bench: MakeBench) -> None:
    it = bench()
    it.driver.finishes_on_drain = True
    it.both_signals()
    it.die()
    assert it.states == [State.FROZEN, State.DRAINING, State.QUIET, State.RELEASED]
    assert (it.lease.in_flight_at_death, it.lease.completed_after_death) == (1, True)
    assert it.function.mapped == {}
    assert it.host.free_channels == {0, 1}
    assert it.announced == []


def test_a_drain_that_takes_too_long_becomes_a_stop(bench: MakeBench) -> None:
    it = bench()
    it.driver.stops = True
    it.both_signals()
    it.die()
    assert State.STOPPING in it.states
    assert not it.lease.completed_after_death
    assert Fact.STOP_ACKNOWLEDGED in it.lease.machine.facts


def test_revoke_stops_without_waiting(bench: MakeBench) -> None:
    it = bench(policy=Policy.REVOKE)
    it.driver.stops = True
    it.both_signals()
    it.die()
    assert it.states == [State.FROZEN, State.STOPPING, State.QUIET, State.RELEASED]
    assert "drain" not in it.driver.calls


def test_a_trusted_reset_quiets_what_cannot_be_stopped(bench: MakeBench) -> None:
    it = bench(TrustedReset)
    it.both_signals()
    it.die()
    assert it.states[-4:] == [State.ISOLATING, State.RESETTING, State.QUIET, State.RELEASED]
    assert it.function.resets == 1
    assert it.announced == ["isolated"]
    assert it.function.command & 4  # a bus master again
    assert it.host.usable.is_set()


@pytest.mark.parametrize("reason", ["no reset", "refused", "not trusted"])
def test_without_a_reset_that_counts_strict_unmapping_retires_the_iovas(
    bench: MakeBench, reason: str
) -> None:
    it = bench()
    it.function.has_reset = reason != "no reset"
    it.function.reset_error = RemoteError("refused", errno=1) if reason == "refused" else None
    it.both_signals()
    seen: list[int] = []

    async def then() -> None:
        await it.reached(State.RELEASED)
        seen.append(it.host.space.retired)

    it.die(then)
    assert it.states[-2:] == [State.UNMAPPED, State.RELEASED]
    assert seen == [SIZE]
    assert it.host.free_channels == {1}, "the channel was not proven quiet"
    assert it.function.mapped == {}


def test_channels_and_iovas_return_once_an_unmapped_lease_is_proven_quiet(
    bench: MakeBench,
) -> None:
    it = bench()
    it.function.has_reset = False
    it.both_signals()

    async def then() -> None:
        await it.reached(State.RELEASED)
        it.driver.busy = 0
        it.driver.stops = True
        async with asyncio.timeout(5):
            while it.host.space.retired or it.host.free_channels != {0, 1}:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    it.die(then)


@pytest.mark.parametrize("arena", [True, False])
def test_where_nothing_can_be_proven_everything_is_kept(bench: MakeBench, arena: bool) -> None:
    it = bench(arena=arena)
    it.function.strict = arena  # in an arena a strict translation is of no help
    it.function.reset_error = RemoteError("refused", errno=1)
    it.both_signals()

    async def then() -> None:
        await it.reached(State.QUARANTINE)
        assert it.lease.nbytes == SIZE
        assert it.host.source.held_bytes == SIZE
        it.driver.busy = 0  # at rest at last

    it.die(then)
    assert it.states[-3:] == [State.QUARANTINE, State.QUIET, State.RELEASED]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyError(3), DeviceError("unwell")])
def test_a_driver_that_raises_has_proven_nothing(bench: MakeBench, error: Exception) -> None:
    it = bench(TrustedReset)
    it.driver.error = error
    it.both_signals()
    it.die()
    assert State.RESETTING in it.states
    assert Fact.IDLE_CONFIRMED not in it.lease.machine.facts


def test_a_driver_that_hangs_is_left_behind(bench: MakeBench) -> None:
    it = bench(TrustedReset)
    it.driver.stuck = threading.Event()
    it.both_signals()
    it.die()
    assert Fact.RESET_TRUSTED in it.lease.machine.facts


@pytest.mark.parametrize("how", ["too little", "an error"])
def test_an_unmap_that_went_wrong_keeps_the_memory(bench: MakeBench, how: str) -> None:
    it = bench()
    it.driver.busy = 0
    it.function.unmap_short = how == "too little"
    it.function.unmap_error = RemoteError("no", errno=5) if how == "an error" else None
    it.both_signals()

    async def then() -> None:
        await it.reached(State.QUARANTINE)
        assert it.host.source.held_bytes == SIZE
        it.function.unmap_short, it.function.unmap_error = False, None

    it.die(then)


def test_what_was_unmapped_before_one_unmap_failed_is_not_unmapped_again(
    bench: MakeBench,
) -> None:
    it = bench()
    it.driver.busy = 0
    it.function.unmap_error = RemoteError("no", errno=5)
    it.function.unmap_error_but = BASE
    it.both_signals()

    async def then() -> None:
        await it.reached(State.QUARANTINE)
        assert [entry.iova > BASE for entry in it.journal.entries(it.lease.number)] == [True]
        assert it.host.source.held_bytes == 2 * SIZE
        it.function.unmap_error = None

    it.die(then, slabs=2)


@pytest.mark.parametrize("first", ["hung_up", "process_dead"])
def test_idle_is_not_quiet_while_someone_can_still_post(bench: MakeBench, first: str) -> None:
    it = bench(FakeDriver)  # whose stop could be undone
    it.driver.busy = 0
    it.driver.stops = True
    it.lease.signal(**{first: True})

    async def then() -> None:
        await it.reached(State.QUIET)
        while not any("other" in step.why for step in it.lease.log):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert it.lease.nbytes == SIZE
        it.both_signals()

    it.die(then)


def test_a_final_stop_makes_one_death_signal_enough(bench: MakeBench) -> None:
    it = bench(FinalDriver)
    it.driver.busy = 0
    it.driver.stops = True
    it.lease.signal(hung_up=True)
    it.die()


@pytest.mark.parametrize("sign", ["both signals", "goodbye"])
def test_the_engine_is_stopped_before_memory_goes_even_if_everyone_seems_gone(
    bench: MakeBench, sign: str
) -> None:
    # A duplicate of a doorbell may live on in another process, whatever the client said.
    it = bench(FinalDriver)
    it.driver.busy = 0
    it.driver.stops = True
    it.lease.signal(goodbye=True) if sign == "goodbye" else it.both_signals()
    it.die()
    assert it.driver.calls[-1] == "stop"


def test_a_lease_of_memory_only_needs_no_stop_and_no_second_signal(bench: MakeBench) -> None:
    it = bench(claimed=False)
    it.lease.signal(hung_up=True)
    it.die()
    assert "stop" not in it.driver.calls


def test_a_reaped_function_writes_no_more(bench: MakeBench) -> None:
    it = bench(arena=True)
    it.function.reset_error = DeviceGone("gone")
    it.driver.error = DeviceGone("gone")
    child = subprocess.Popen(["true"])
    it.host.child = FunctionProcess.of(child.pid)
    child.wait()
    it.lease.signal(hung_up=True)
    it.die()
    assert Fact.FUNCTION_GONE in it.lease.machine.facts


def test_a_function_that_hung_up_and_is_not_reaped_proves_nothing(bench: MakeBench) -> None:
    it = bench(arena=True)
    it.driver.error = DeviceGone("gone")
    it.function.reset_error = DeviceGone("gone")
    it.both_signals()

    async def then() -> None:
        await it.reached(State.QUARANTINE)
        assert it.lease.nbytes == SIZE
        it.driver.error = None
        it.driver.busy = 0

    it.die(then)


def test_the_negative_control_gives_memory_back_under_a_running_transfer(
    bench: MakeBench,
) -> None:
    it = bench(policy=Policy.RELEASE, arena=True)
    it.both_signals()
    it.die()
    assert it.states == [State.FROZEN, State.QUIET, State.RELEASED]
    assert it.driver.busy == 1
    assert "stop" not in it.driver.calls
