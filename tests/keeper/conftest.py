# SPDX-License-Identifier: Apache-2.0
"""A bench for the death protocol: one lease, on a function that misbehaves as it is told."""

from __future__ import annotations

import asyncio
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
from holdfast.keeper.access import BackendAccess
from holdfast.keeper.deadlines import Deadlines
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.journal import Journal
from holdfast.keeper.lease import Lease
from holdfast.keeper.memory import MemoryDesk
from holdfast.keeper.quiesce import Quiesce
from holdfast.keeper.state import Machine, State
from holdfast.kernel.pidfd import Peer
from holdfast.values import Access, Iova, LeaseId, Perm, Policy, Promises, Target

SIZE = 64 << 10
SHORT = Deadlines(
    drain=0.1, stop=0.1, isolate=0.1, reset=0.1, unmap=0.1, quarantine=0.01, quarantine_longest=0.02
)
TARGET = Target("emu", "fake")
BASE = 1 << 32


class NotHeld:
    """A ``Holder`` that holds nothing: these leases do not outlive their process."""

    def put(self, name: str, fds: Sequence[int] = (), note: object = None) -> None: ...

    def drop(self, name: str) -> None: ...

    def release(self, name: str) -> None: ...


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
    read_error: Exception | None = None
    stuck: threading.Event | None = None
    """Reads do not come back before it is set."""
    reads: int = 0
    posted: bool = False
    """Writes of its are on their way, until a read comes back behind them."""
    unmapped_too_soon: bool = False
    """Something was unmapped while they were."""
    mapped: dict[int, int] = field(default_factory=dict)
    resets: int = 0
    on_reset: Callable[[], None] = lambda: None
    command: int = 4
    regions = (SimpleNamespace(size=256),) * 9

    @property
    def promises(self) -> Promises:
        return Promises(strict_unmap=self.strict, reset=self.has_reset)

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        self.reads += 1
        if self.stuck is not None:
            self.stuck.wait()
        if self.read_error is not None:
            raise self.read_error
        self.posted = False
        return (self.command if offset == 4 else 0).to_bytes(count, "little")

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        if offset == 4:
            self.command = int.from_bytes(data, "little")

    def unmask_intx(self) -> None:
        return None

    def dma_map(self, iova: Iova, size: int, perm: Perm, fd: int, offset: int) -> None:
        self.mapped[iova] = size

    def dma_unmap(self, iova: Iova, size: int) -> int:
        self.unmapped_too_soon |= self.posted
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
        self.on_reset()

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
        self.function.on_reset = self.came_to_rest
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
        self.desk = MemoryDesk(self.host, self.journal, NotHeld(), Ledger(1 << 20, 100))
        self.lease = Lease(LeaseId(7), Peer(-1, 1, 0, 0), Machine(policy))
        self.lease.access, self.lease.channels = Access.SHARED, (0,)
        self.lease.claimed = claimed
        self.announced: list[str] = []
        self.others: list[int] = []

    def came_to_rest(self) -> None:
        """What a reset that stops DMA does."""
        if self.driver.reset_stops_dma:
            self.driver.busy = 0

    def settled(self, lease: Lease) -> None:
        """Nobody succeeds this one."""

    async def restored(self) -> None:
        """This keeper posts nothing."""

    def announce(self, what: str, text: str, *, but: Lease) -> None:
        self.announced.append(what)

    def at_work(self, *, but: Lease) -> list[int]:
        return self.others

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
def bench() -> Iterator[Callable[..., Bench]]:
    """``bench(driver, policy=, arena=, claimed=)``; ``driver`` is a key of :data:`DRIVERS`."""
    made: list[Bench] = []

    def make(driver: str = "final", **options: Any) -> Bench:
        made.append(Bench(DRIVERS[driver], **options))
        return made[-1]

    yield make
    for each in made:
        if each.driver.stuck is not None:
            each.driver.stuck.set()
        each.host.close()
        for lane in (each.host.driver_lane, each.host.function_lane, each.host.memory_lane):
            assert lane.join(5)


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """``await until(condition)``: what nobody tells of is looked at."""

    async def wait(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    return wait
