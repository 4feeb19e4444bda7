# SPDX-License-Identifier: Apache-2.0
"""The function as its keeper holds it: backend, driver, address space, memory, channels.

Blocking calls (registers, maps, resets, hole punches, driver code) never run on the keeper's event
loop: :meth:`FunctionHost.call` carries them to a thread with a deadline that is enforced from
outside (:mod:`holdfast.keeper.workers`). Driver calls are made one at a time; a driver that does
not come back is left behind, further calls fail at once until it does, and the callers go on to
stronger measures.

In *safe mode* no driver's code runs at all: the base class stands in, which knows nothing. Living
leases keep what they have, deaths go the generic ladder, and what needs a driver is refused.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

from holdfast.contracts import Doorbell, FunctionBackend
from holdfast.dma.iova import IovaSpace
from holdfast.dma.physical import PhysicalFiles
from holdfast.dma.slab import Arena, OwnFiles, SlabSource
from holdfast.driver import Driver
from holdfast.errors import Busy, NotSupported, RemoteError
from holdfast.keeper import asking
from holdfast.keeper.access import (
    BackendAccess,
    assign_bars,
    interrupt_type,
    set_bus_master,
    set_memory_space,
    take_over,
)
from holdfast.keeper.addresses import dma_bits, iova_range, usable_range
from holdfast.keeper.asking import DriverFacts, guarded
from holdfast.keeper.held import IRQ_CHUNK, FunctionProcess, Holder, hold_backend
from holdfast.keeper.workers import Lane
from holdfast.kernel import events
from holdfast.uapi import pci_regs
from holdfast.values import CONFIG_REGION, Access, Iova, IrqIndex, Perm, Target

P = ParamSpec("P")
T = TypeVar("T")

CALL_DEADLINE = 10.0
"""Seconds that an ordinary call to the function or its driver may take."""

REST_DEADLINE = 10.0
"""Seconds that a function which is taken over may take to finish what it was at."""
REST_POLL = 0.002


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(slots=True)
class FunctionHost:
    """One function. Built by :meth:`start`; used by the keeper's loop only."""

    target: Target
    holder: Holder
    access: BackendAccess
    driver: Driver
    space: IovaSpace
    source: SlabSource
    arena_iova: Iova | None
    irq_index: IrqIndex | None
    irq_fds: list[int]
    free_channels: set[int]
    whole: bool = True
    """True while no lease has exclusive use."""
    isolated: set[int] = field(default_factory=set)
    """Leases on whose account bus mastering is off."""
    child: FunctionProcess | None = None
    """The process that emulates the function, if a keeper started it."""
    safe: bool = False
    """Safe mode: no driver's code runs."""
    disturbed: int = 0
    """Function-level measures so far: each may have cut off what was in flight anywhere."""
    was_reset: bool = False
    """A reset may have cleared what the driver had set up since the function was last usable."""
    resetting: bool = False
    """A reset is under way, perhaps one that nobody waits for any more."""
    facts: DriverFacts = field(init=False)
    driver_lane: Lane = field(init=False)
    function_lane: Lane = field(init=False)
    memory_lane: Lane = field(init=False)
    driving: asyncio.Lock = field(default_factory=asyncio.Lock)
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from a grant to its answer and from a reset to its notice: a client that sees a notice
    and then an answer may rely on the answer."""
    restoring: asyncio.Lock = field(default_factory=asyncio.Lock)
    usable: asyncio.Event = field(default_factory=_set_event)
    """Set while bus mastering is on."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        target = str(self.target)
        self.facts = DriverFacts.of(self.driver)
        self.driver_lane = Lane("driver", 1, target=target)
        self.function_lane = Lane("function", 16, 16, target=target)
        self.memory_lane = Lane("memory", 4, 4, target=target)

    @classmethod
    def start(
        cls,
        target: Target,
        holder: Holder,
        backend: FunctionBackend,
        driver_class: type[Driver],
        arena_bytes: int = 0,
        child: FunctionProcess | None = None,
        space: IovaSpace | None = None,
        *,
        safe: bool = False,
    ) -> FunctionHost:
        """Take the function over: reset, driver probed, vectors wired, bus master on.

        Blocking. With ``arena_bytes`` all memory comes from one file that is mapped whole, the
        stand-in for a machine without an IOMMU; otherwise every slab is a file and a map of its
        own, or memory that the backend brings. ``space`` is shared with the other functions of an
        isolation unit. On error everything taken is let go, the backend excepted. With ``safe`` the
        driver class is not used: see the module's text on safe mode.

        Bus mastering stays off until the function was seen at rest, because it may still be at
        work for a keeper that is dead; and, if that left memory behind, until the death protocol
        has dealt with it.
        """
        access = BackendAccess(backend, str(target))
        take_over(access, target)
        bits = dma_bits(target, driver_class)
        base, limit = usable_range(*iova_range(bits), backend.iova_ranges)
        arena = Arena(arena_bytes) if arena_bytes else None
        source: SlabSource = arena or backend.memory() or OwnFiles()
        if isinstance(source, PhysicalFiles):
            # What lies beyond is not refused by the function, but reached somewhere else.
            source.dma_bits = min(source.dma_bits, bits)
        try:
            if arena is not None:
                holder.put("arena", [arena.fd], {"size": arena_bytes, "iova": base})
                backend.dma_map(Iova(base), arena_bytes, Perm.RW, arena.fd, 0)
            driver = guarded(lambda: _bring_up(Driver if safe else driver_class, access))
            host = cls(
                target=target,
                holder=holder,
                access=access,
                driver=driver,
                space=space or IovaSpace(base + arena_bytes, limit),
                source=source,
                arena_iova=Iova(base) if arena_bytes else None,
                irq_index=None,
                irq_fds=[],
                free_channels=set(),
                child=child,
                safe=safe,
            )
            host.free_channels = set(range(host.facts.channels))
            host._wire_interrupts()
            if source.leftovers():
                host.usable.clear()
            else:
                host.require_rest()
                set_bus_master(backend, target, on=True)
        except BaseException:
            source.close()
            raise
        return host

    @property
    def backend(self) -> FunctionBackend:
        """The way to the function; another one after :meth:`replace_backend`."""
        return self.access.backend

    def replace_backend(self, backend: FunctionBackend) -> None:
        """Go on with the function through another backend, after the former was closed. Blocking.

        Only without leases: every mapping went with the former backend.
        """
        self.access.backend = backend
        hold_backend(self.holder, backend)
        take_over(self.access, self.target)
        guarded(self.driver.probe)
        if self.irq_index is not None:
            backend.set_irqs(self.irq_index, 0, self.irq_fds)
        self.require_rest()
        set_bus_master(backend, self.target, on=True)

    def require_rest(self) -> None:
        """Wait until nothing is in flight on any channel; Busy if that cannot be seen. Blocking.

        A function without a driver passes: nothing is known of it, and nothing will be.
        """
        if not self.facts.tells:
            return
        every = tuple(range(self.facts.channels))
        deadline = time.monotonic() + REST_DEADLINE
        while not guarded(lambda: self.rests(every)):
            if time.monotonic() > deadline:
                raise Busy(
                    f"the function is still at work after {REST_DEADLINE:g} s",
                    operation="take over",
                    target=str(self.target),
                    hint="nothing proves it quiet: reset it, or power it off and on",
                )
            time.sleep(REST_POLL)

    def rests(self, channels: Sequence[int]) -> bool:
        """Stop channels that nobody uses: acknowledged, or nothing was in flight?

        Driver code: blocking, for :meth:`drive` or under :func:`~holdfast.keeper.asking.guarded`.
        """
        driver = self.driver
        return asking.stop(driver, channels) or not asking.in_flight(driver, channels)

    def _wire_interrupts(self) -> None:
        index = interrupt_type(self.backend, self.driver.irq_index)
        if index is not None:
            self.irq_index = index
            self.irq_fds = [events.make() for _ in range(self.backend.irqs[index].count)]
            self.hold_irqs(range(len(self.irq_fds)))
            self.backend.set_irqs(index, 0, self.irq_fds)

    def hold_irqs(self, vectors: Sequence[int]) -> None:
        """Have the eventfds of these vectors outlive this process. Blocking."""
        for piece in sorted({vector // IRQ_CHUNK for vector in vectors}):
            first = piece * IRQ_CHUNK
            self.holder.put(f"irqs/{piece}", self.irq_fds[first : first + IRQ_CHUNK])

    # -- calls off the loop ------------------------------------------------------------

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call to the function in a thread; StaysStuck after its deadline."""
        return await self.call_within(CALL_DEADLINE, lambda: function(*args, **kwargs))

    async def call_within(self, deadline: float, function: Callable[[], T]) -> T:
        """Like :meth:`call` with a deadline in seconds. The thread of a stuck call is abandoned."""
        return await self.function_lane.call(deadline, function)

    async def call_memory(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like :meth:`call` for the keeper's own memory, beside a function that hangs."""
        return await self.memory_lane.call(CALL_DEADLINE, lambda: function(*args, **kwargs))

    async def drive(self, deadline: float, function: Callable[[], T]) -> T:
        """Call driver code: one call at a time, with a deadline in seconds.

        Whatever it raises arrives as a HoldfastError. StaysStuck at once while an earlier call has
        not come back.
        """
        self.driver_lane.require()
        async with self.driving:
            return await self.driver_lane.call(deadline, partial(guarded, function))

    def require_driver(self, operation: str) -> None:
        """Raise if there is no driver to ask: in safe mode, or while it hangs."""
        if self.safe:
            raise NotSupported(
                "the keeper is in safe mode: no driver is loaded",
                operation=operation,
                target=str(self.target),
                hint="close the leases that are left and let the keeper end, then open it again",
            )
        self.driver_lane.require()

    async def restore(self, deadline: float) -> None:
        """Make the function usable again unless a dead lease still keeps it off.

        Raises what keeps it from being so; it may be tried again.
        """
        async with self.restoring:
            if not self.usable.is_set() and not self.isolated and not self.proven_gone():
                await self.drive(deadline, self.reconnect)
                self.usable.set()

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine beside the loop until it ends or the keeper does."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # -- channels ------------------------------------------------------------

    def claim(self, access: Access, count: int | None) -> tuple[int, ...]:
        """Take channels out of the free set for a new lease, or raise :class:`Busy`."""
        every = self.facts.channels
        if access is Access.SHARED and count == 0:
            return ()
        self.require_driver("open")
        if not self.whole:
            raise self._busy("another lease has exclusive use of the function")
        if access is Access.EXCLUSIVE:
            if self._shared_users:
                raise self._busy("other leases use the function or still drain")
            self.whole = False
            taken = tuple(sorted(self.free_channels))
        else:
            if not every:
                raise NotSupported(
                    f"driver {self.facts.name} cannot share the function",
                    operation="open",
                    target=str(self.target),
                    hint="open it with access='exclusive'",
                )
            wanted = self.facts.default_channels if count is None else count
            if wanted > every:
                raise NotSupported(
                    f"{wanted} channels asked for, the function has {every}",
                    operation="open",
                    target=str(self.target),
                )
            if wanted > len(self.free_channels):
                raise self._busy("every channel is leased or still drains")
            taken = tuple(sorted(self.free_channels)[:wanted])
        self.free_channels -= set(taken)
        return taken

    @property
    def _shared_users(self) -> bool:
        return len(self.free_channels) != self.facts.channels

    def unclaim(self, access: Access, channels: Sequence[int]) -> None:
        """Give channels back that are proven idle (or were never granted)."""
        self.free_channels |= set(channels)
        if access is Access.EXCLUSIVE:
            self.whole = True

    def _busy(self, why: str) -> Busy:
        return Busy(why, operation="open", target=str(self.target),
                    hint="close the other lease, wait (timeout=...), see holdfast ps")  # fmt: skip

    # -- pieces of a lease ------------------------------------------------------------

    def bells_for(self, wanted: Sequence[tuple[int, int]]) -> list[tuple[int, Doorbell]]:
        """Fresh doorbells at ``(bar, offset)``; the caller owns the descriptors. Blocking."""
        found: list[tuple[int, Doorbell]] = []
        for bar in sorted({bar for bar, _ in wanted}):
            for bell in self.backend.doorbells(bar):
                if (bar, bell.info.offset) in wanted:
                    found.append((bar, bell))
                else:
                    os.close(bell.fd)
        return found

    def renew_vectors(self, vectors: Sequence[int]) -> None:
        """Wire new eventfds, so that a former holder cannot steal interrupts. Blocking."""
        if self.irq_index is None or not vectors:
            return
        stale = [self.irq_fds[vector] for vector in vectors]
        for vector in vectors:
            self.irq_fds[vector] = events.make()
        self.hold_irqs(vectors)
        for vector, fd in zip(vectors, stale, strict=True):
            self.backend.set_irqs(self.irq_index, vector, [self.irq_fds[vector]])
            os.close(fd)

    def proven_gone(self) -> bool:
        """True if the function was a process of ours and has ended: it writes no more."""
        return self.child is not None and self.child.gone()

    def is_master(self) -> bool:
        """Whether the function may be a bus master. Blocking."""
        word = self.backend.region_read(CONFIG_REGION, pci_regs.COMMAND, 2)
        return bool(int.from_bytes(word, "little") & pci_regs.Command.MASTER)

    def power_off(self) -> None:
        """End the process that is the function, if it is ours, and reap it. Blocking.

        For one that has hung up: nobody is served by it any more, but it may still have memory.
        """
        if self.child is not None:
            self.child.end()

    def isolate(self) -> None:
        """Clear bus master and read it back: the flushing read. Blocking."""
        set_bus_master(self.backend, self.target, on=False)

    def reset(self) -> None:
        """Function-level reset. Blocking; refused (RemoteError) it has changed nothing."""
        self.resetting = True
        try:
            self.backend.reset()
            self.was_reset = True
        except RemoteError:
            raise  # it was answered: no reset took place
        except BaseException:
            self.was_reset = True
            raise
        finally:
            self.resetting = False

    def look_after_reset(self) -> bool:
        """Make registers reachable after a reset; whether bus mastering was still off. Blocking.

        If it came back on, the reset did not do what a reset does. It is off when this returns.
        """
        command = self.backend.region_read(CONFIG_REGION, pci_regs.COMMAND, 2)
        self.isolate()
        set_memory_space(self.backend)
        if self.backend.promises.assign_bars:
            assign_bars(self.access)
        return not int.from_bytes(command, "little") & pci_regs.Command.MASTER

    def reconnect(self) -> None:
        """Let the function be a bus master again, after its quiet was proven. Blocking.

        Driver code, for :meth:`drive`: after a reset the function is set up again. Raises Busy
        while a reset is still under way that might undo it, or a dead lease is not quiet.
        """
        if self.resetting or self.isolated:
            raise Busy("a reset is under way" if self.resetting else "a dead lease is not quiet",
                       operation="turn bus mastering on", target=str(self.target))  # fmt: skip
        probe, self.was_reset = self.was_reset, False
        try:
            if probe:
                set_memory_space(self.backend)
                if self.backend.promises.assign_bars:
                    assign_bars(self.access)
                self.driver.probe()
                if self.irq_index is not None:
                    self.backend.set_irqs(self.irq_index, 0, self.irq_fds)
            set_bus_master(self.backend, self.target, on=True)
        except BaseException:
            self.was_reset |= probe
            raise

    def close(self) -> None:
        """Let everything go. Blocking, idempotent."""
        self.backend.close()
        if self.child is not None:
            self.child.end()
        for fd in self.irq_fds:
            os.close(fd)
        self.irq_fds.clear()
        self.source.close()
        for lane in (self.driver_lane, self.function_lane, self.memory_lane):
            lane.close()


def _bring_up(driver_class: type[Driver], access: BackendAccess) -> Driver:
    """Make the driver and have it look for its function. Blocking; driver code."""
    driver = driver_class(access)
    driver.probe()
    return driver
