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
import subprocess
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

from holdfast import pci
from holdfast.contracts import Doorbell, FunctionBackend
from holdfast.dma.iova import IovaSpace
from holdfast.dma.slab import Arena, OwnFiles, SlabSource
from holdfast.driver import Driver
from holdfast.errors import Busy, DeviceError, NotSupported
from holdfast.kernel import events
from holdfast.regs.view import RegisterView, check_access
from holdfast.uapi import pci_regs
from holdfast.uapi.pci_regs import Command
from holdfast.values import CONFIG_REGION, Access, Iova, IrqIndex, Perm, Target

P = ParamSpec("P")
T = TypeVar("T")

CALL_DEADLINE = 10.0
"""Seconds that an ordinary call to the function or its driver may take."""

_HIGH_BASE = 1 << 32
_LOW_BASE = 1 << 16
_TOP_BITS = 47


class StaysStuck(DeviceError):
    """A call did not come back within its deadline and was abandoned."""

    default_hint = "the function or its driver hangs; see holdfast ps"


def iova_range(dma_bits: int) -> tuple[int, int]:
    """First and last+1 IOVA for a function with ``dma_bits`` address bits.

    Above 4 GiB where the function can reach it, so that an IOVA is never mistaken for a small
    number and never meets the MSI window at 0xfee00000.
    """
    if dma_bits >= 40:
        return _HIGH_BASE, 1 << min(dma_bits, _TOP_BITS)
    return _LOW_BASE, 1 << dma_bits


@dataclass(slots=True)
class _Access:
    """``driver.FunctionAccess`` over a backend."""

    backend: FunctionBackend
    name: str

    def bar(self, index: int) -> RegisterView:
        return self._view(index, f"{self.name} BAR{index}")

    def config(self) -> RegisterView:
        return self._view(CONFIG_REGION, f"{self.name} config")

    def bar_size(self, index: int) -> int:
        return self.backend.regions[index].size

    def vector_count(self, preferred: IrqIndex) -> int:
        found = interrupt_type(self.backend, preferred)
        return self.backend.irqs[found].count if found is not None else 0

    def _view(self, index: int, label: str) -> RegisterView:
        size = self.backend.regions[index].size

        def load(offset: int, width: int) -> int:
            check_access(offset, width, size, target=label, operation="load")
            return int.from_bytes(self.backend.region_read(index, offset, width), "little")

        def store(offset: int, width: int, value: int) -> None:
            check_access(offset, width, size, target=label, operation="store")
            self.backend.region_write(index, offset, value.to_bytes(width, "little"))

        def loads(accesses: Sequence[tuple[int, int]]) -> list[int]:
            for offset, width in accesses:
                check_access(offset, width, size, target=label, operation="load")
            found = self.backend.region_read_multi([(index, *access) for access in accesses])
            return [int.from_bytes(data, "little") for data in found]

        def stores(accesses: Sequence[tuple[int, int, int]]) -> None:
            for offset, width, _ in accesses:
                check_access(offset, width, size, target=label, operation="store")
            self.backend.region_write_multi(
                [(index, at, value.to_bytes(width, "little")) for at, width, value in accesses]
            )

        return RegisterView(load, store, label, loads, stores)


def interrupt_type(backend: FunctionBackend, preferred: IrqIndex) -> IrqIndex | None:
    """The type of interrupts to use: what the driver prefers, else MSI, else INTx."""
    for index in (preferred, IrqIndex.MSI, IrqIndex.INTX):
        info = backend.irqs[index]
        if info.count and info.eventfd:
            return index
    return None


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(slots=True)
class FunctionHost:
    """One function. Built by :meth:`start`; used by the keeper's loop only."""

    target: Target
    backend: FunctionBackend
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
    child: subprocess.Popen[bytes] | None = None
    """The process that emulates the function, if the keeper started it."""
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(16, thread_name_prefix="keeper")
    )
    driving: asyncio.Lock = field(default_factory=asyncio.Lock)
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from a grant to its answer and from a reset to its notice: a client that sees a notice
    and then an answer may rely on the answer."""
    usable: asyncio.Event = field(default_factory=_set_event)
    """Set while bus mastering is on."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @classmethod
    def start(
        cls,
        target: Target,
        backend: FunctionBackend,
        driver_class: type[Driver],
        arena_bytes: int,
        child: subprocess.Popen[bytes] | None = None,
    ) -> FunctionHost:
        """Take the function over: reset, memory and bus master on, driver probed, vectors wired.

        Blocking. With ``arena_bytes`` all memory comes from one file that is mapped whole, the
        stand-in for a machine without an IOMMU; otherwise every slab is a file and a map of its
        own. On error everything taken is let go, the backend excepted.
        """
        access = _Access(backend, str(target))
        if backend.promises.reset:
            backend.reset()
        assign_bars(access)
        set_bus_master(backend, target, on=True)
        base, limit = iova_range(driver_class.dma_bits)
        arena = Arena(arena_bytes) if arena_bytes else None
        source: SlabSource = arena or OwnFiles()
        try:
            if arena is not None:
                backend.dma_map(Iova(base), arena_bytes, Perm.RW, arena.fd, 0)
            driver = driver_class(access)
            driver.probe()
            host = cls(
                target=target,
                backend=backend,
                driver=driver,
                space=IovaSpace(base + arena_bytes, limit),
                source=source,
                arena_iova=Iova(base) if arena_bytes else None,
                irq_index=None,
                irq_fds=[],
                free_channels=set(range(driver.channels())),
                child=child,
            )
            host._wire_interrupts()
        except BaseException:
            source.close()
            raise
        return host

    def _wire_interrupts(self) -> None:
        index = interrupt_type(self.backend, self.driver.irq_index)
        if index is not None:
            self.irq_index = index
            self.irq_fds = [events.make() for _ in range(self.backend.irqs[index].count)]
            self.backend.set_irqs(index, 0, self.irq_fds)

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
        if self.irq_index is None:
            return
        for vector in vectors:
            fresh = events.make()
            self.backend.set_irqs(self.irq_index, vector, [fresh])
            os.close(self.irq_fds[vector])
            self.irq_fds[vector] = fresh

    def proven_gone(self) -> bool:
        """True if the function was a process of ours and has been reaped: it writes no more."""
        return self.child is not None and self.child.poll() is not None

    def isolate(self) -> None:
        """Clear bus master and read it back: the flushing read. Blocking."""
        set_bus_master(self.backend, self.target, on=False)

    def reconnect(self, *, probe: bool) -> None:
        """Let the function be a bus master again, after its quiet was proven. Blocking."""
        if probe:
            assign_bars(_Access(self.backend, str(self.target)))
        set_bus_master(self.backend, self.target, on=True)
        if probe:
            self.driver.probe()
            if self.irq_index is not None:
                self.backend.set_irqs(self.irq_index, 0, self.irq_fds)

    def close(self) -> None:
        """Let everything go. Blocking, idempotent."""
        self.backend.close()
        if self.child is not None:
            self.child.kill()
            self.child.wait()
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


def set_bus_master(backend: FunctionBackend, target: Target, *, on: bool) -> None:
    """Set memory space and bus master on, or bus master off, and check that it took.

    Memory space stays on when bus master goes off: clients may have BARs mapped. The read back
    pushes posted writes out of the function (PCI Local Bus 3.0, section 3.2.5).
    """
    seen = pci.set_command(
        partial(backend.region_read, CONFIG_REGION),
        partial(backend.region_write, CONFIG_REGION),
        Command.MEMORY | Command.MASTER if on else Command.MASTER,
        on,
    )
    if bool(seen & Command.MASTER) != on:
        raise DeviceError(
            f"bus master did not turn {'on' if on else 'off'}: command reads {seen:#06x}",
            operation="set bus master",
            target=f"{target} config",
        )


def assign_bars(access: _Access) -> None:
    """Give every memory BAR an address, as firmware would.

    Servers that behave like real hardware decode a BAR only once it has an address. Any
    size-aligned, non-overlapping addresses do: nothing else shares this function's bus.
    """
    config = access.config()
    address = 0xC000_0000
    for index in range(6):
        size = access.bar_size(index)
        if not size:
            continue
        kind = config.load(pci_regs.BASE_ADDRESS_0 + 4 * index, 4)
        if kind & pci_regs.BASE_ADDRESS_SPACE_IO:
            continue
        address = (address + size - 1) & ~(size - 1)
        config.store(pci_regs.BASE_ADDRESS_0 + 4 * index, 4, address & 0xFFFF_FFFF)
        if kind & pci_regs.BASE_ADDRESS_MEM_TYPE_64:
            config.store(pci_regs.BASE_ADDRESS_0 + 4 * index + 4, 4, address >> 32)
        address += size
