# SPDX-License-Identifier: Apache-2.0
"""The function as its keeper holds it: backend, driver, address space, memory, channels.

Blocking calls (registers, maps, resets, hole punches, driver code) never run on the keeper's event
loop: :meth:`FunctionHost.call` carries them to a worker thread with a deadline that is enforced
here, from outside. Driver calls are made one at a time; a driver that does not come back is
abandoned in its thread, and the caller goes on to a stronger measure.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from holdfast.contracts import Doorbell, FunctionBackend
from holdfast.dma.iova import IovaSpace
from holdfast.dma.physical import PhysicalFiles
from holdfast.dma.slab import Arena, OwnFiles, SlabSource
from holdfast.driver import Driver
from holdfast.errors import Busy, DeviceError, NotSupported
from holdfast.keeper.access import (
    BackendAccess,
    assign_bars,
    interrupt_type,
    set_bus_master,
    set_memory_space,
)
from holdfast.keeper.held import IRQ_CHUNK, FunctionProcess, Holder
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

_HIGH_BASE = 1 << 32
_LOW_BASE = 1 << 16
_TOP_BITS = 47
_MSI_WINDOW = 0xFEE0_0000


class StaysStuck(DeviceError):
    """A call did not come back within its deadline and was abandoned."""

    default_hint = "the function or its driver hangs; see holdfast ps"


def iova_range(dma_bits: int) -> tuple[int, int]:
    """First and last+1 IOVA for a function with ``dma_bits`` address bits.

    Above 4 GiB where the function can reach it, so that an IOVA is never mistaken for a small
    number; below the MSI window elsewhere, because writes there are interrupts (Intel SDM vol. 3,
    11.11.1).
    """
    if dma_bits >= 40:
        return _HIGH_BASE, 1 << min(dma_bits, _TOP_BITS)
    return _LOW_BASE, min(1 << dma_bits, _MSI_WINDOW)


def usable_range(
    base: int, limit: int, ranges: Sequence[tuple[int, int]], granule: int = 4096
) -> tuple[int, int]:
    """The largest part of ``base`` up to ``limit`` that lies in one of ``ranges`` (inclusive).

    No ranges: all of it. Raises DeviceError if nothing is left.
    """
    if not ranges:
        return base, limit
    parts = [(max(base, first), min(limit, last + 1)) for first, last in ranges]
    rounded = [(-(-start // granule) * granule, end // granule * granule) for start, end in parts]
    start, end = max(rounded, key=lambda part: part[1] - part[0])
    if start >= end:
        raise DeviceError(
            f"none of the addresses {base:#x}..{limit:#x} that the function has can be mapped",
            operation="take over",
            hint="the IOMMU maps: " + ", ".join(f"{a:#x}..{b:#x}" for a, b in ranges),
        )
    return start, end


def dma_bits(target: Target, driver: type[Driver]) -> int:
    """Address bits of a function's DMA: what its driver knows, or what the target says of it."""
    said = target.options.get("dma_bits") if target.scheme == "pci" else None
    return int(said) if said is not None else driver.dma_bits


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
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(16, thread_name_prefix="keeper")
    )
    driving: asyncio.Lock = field(default_factory=asyncio.Lock)
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from a grant to its answer and from a reset to its notice: a client that sees a notice
    and then an answer may rely on the answer."""
    usable: asyncio.Event = field(default_factory=_set_event)
    """Set while bus mastering is on."""
    reprobe: bool = False
    """A keeper was killed while bus mastering was off: it may have reset the function."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

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
    ) -> FunctionHost:
        """Take the function over: reset, driver probed, vectors wired, bus master on.

        Blocking. With ``arena_bytes`` all memory comes from one file that is mapped whole, the
        stand-in for a machine without an IOMMU; otherwise every slab is a file and a map of its
        own, or memory that the backend brings. ``space`` is shared with the other functions of an
        isolation unit. On error everything taken is let go, the backend excepted.

        Bus mastering stays off until the function was seen at rest, because it may still be at
        work for a keeper that is dead; and, if that left memory behind, until the death protocol
        has dealt with it.
        """
        access = BackendAccess(backend, str(target))
        _take_over(access, target)
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
            driver = driver_class(access)
            driver.probe()
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
                free_channels=set(range(driver.channels())),
                child=child,
            )
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
        _take_over(self.access, self.target)
        self.driver.probe()
        if self.irq_index is not None:
            backend.set_irqs(self.irq_index, 0, self.irq_fds)
        self.require_rest()
        set_bus_master(backend, self.target, on=True)

    def require_rest(self) -> None:
        """Wait until nothing is in flight on any channel; Busy if that cannot be seen. Blocking.

        A function without a driver passes: nothing is known of it, and nothing will be.
        """
        if type(self.driver).in_flight is Driver.in_flight:
            return
        every = tuple(range(self.driver.channels()))
        deadline = time.monotonic() + REST_DEADLINE
        while not self.driver.stop(every) and self.driver.in_flight(every):
            if time.monotonic() > deadline:
                raise Busy(
                    f"the function is still at work after {REST_DEADLINE:g} s",
                    operation="take over",
                    target=str(self.target),
                    hint="nothing proves it quiet: reset it, or power it off and on",
                )
            time.sleep(REST_POLL)

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
        """Run a blocking call in a worker thread; raises :class:`StaysStuck` after its deadline."""
        return await self.call_within(CALL_DEADLINE, lambda: function(*args, **kwargs))

    async def call_within(self, deadline: float, function: Callable[[], T]) -> T:
        """Like :meth:`call` with a deadline in seconds. The thread of a stuck call is abandoned."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self.pool.submit(_carry_out, function, loop, answer)
        late = StaysStuck(
            f"no answer within {deadline:g} s", operation="call", target=str(self.target)
        )
        watchdog = loop.call_later(deadline, _settle, answer, None, late)
        try:
            return await answer
        finally:
            watchdog.cancel()

    async def drive(self, deadline: float, function: Callable[[], T]) -> T:
        """Call driver code: one call at a time, with a deadline in seconds."""
        async with self.driving:
            return await self.call_within(deadline, function)

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine beside the loop until it ends or the keeper does."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # -- channels ------------------------------------------------------------

    def claim(self, access: Access, count: int | None) -> tuple[int, ...]:
        """Take channels out of the free set for a new lease, or raise :class:`Busy`."""
        every = self.driver.channels()
        if access is Access.SHARED and count == 0:
            return ()
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
                    f"driver {self.driver.name} cannot share the function",
                    operation="open",
                    target=str(self.target),
                    hint="open it with access='exclusive'",
                )
            wanted = self.driver.default_channels() if count is None else count
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
        return len(self.free_channels) != self.driver.channels()

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

    def isolate(self) -> None:
        """Clear bus master and read it back: the flushing read. Blocking."""
        set_bus_master(self.backend, self.target, on=False)

    def reconnect(self, *, probe: bool) -> None:
        """Let the function be a bus master again, after its quiet was proven. Blocking."""
        if probe:
            self.reprobe = False
            set_memory_space(self.backend)
            if self.backend.promises.assign_bars:
                assign_bars(self.access)
        set_bus_master(self.backend, self.target, on=True)
        if probe:
            self.driver.probe()
            if self.irq_index is not None:
                self.backend.set_irqs(self.irq_index, 0, self.irq_fds)

    def close(self) -> None:
        """Let everything go. Blocking, idempotent."""
        self.backend.close()
        if self.child is not None:
            self.child.end()
        for fd in self.irq_fds:
            os.close(fd)
        self.irq_fds.clear()
        self.source.close()
        self.pool.shutdown(wait=False, cancel_futures=True)


def _carry_out(
    function: Callable[[], Any], loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Any]
) -> None:
    """In a worker: call, and hand the outcome to the loop, where it may be too late."""
    value, error = None, None
    try:
        value = function()
    except BaseException as raised:  # noqa: BLE001 - it is raised again where it was asked for
        error = raised
    try:
        loop.call_soon_threadsafe(_settle, answer, value, error)
    except RuntimeError:
        pass  # the loop has ended; so has whoever asked


def _settle(answer: asyncio.Future[Any], value: object, error: BaseException | None) -> None:
    """Give an answer, unless it was given up or abandoned before."""
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(value)


def _take_over(access: BackendAccess, target: Target) -> None:
    """Bus master off, reset if there is one, registers reachable. Blocking."""
    backend = access.backend
    set_bus_master(backend, target, on=False)
    if backend.promises.reset:
        backend.reset()
        # Some resets bring the command register back as it was (drivers/pci/pci.c,
        # pci_dev_save_and_disable and pci_dev_restore).
        set_bus_master(backend, target, on=False)
    if backend.promises.assign_bars:
        assign_bars(access)
    set_memory_space(backend)
