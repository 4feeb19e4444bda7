# SPDX-License-Identifier: Apache-2.0
"""What can be observed of a function on behalf of one dead lease, and how.

Every method here either observes something, and adds it to the facts of the lease's machine, or
says that it did not. None decides what follows; that is the table's (:mod:`holdfast.keeper.state`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from holdfast.errors import DeviceError, DeviceGone, HoldfastError
from holdfast.keeper import asking
from holdfast.keeper.deadlines import Deadlines
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.lease import Lease
from holdfast.keeper.memory import MemoryDesk
from holdfast.keeper.state import Fact
from holdfast.keeper.unmapping import page_span
from holdfast.uapi import pci_regs
from holdfast.values import CONFIG_REGION, Iova

T = TypeVar("T")

POLL_FIRST = 0.0003
POLL_LAST = 0.002
"""Seconds between two looks at a draining engine: short at first, then easy on the processor."""
GONE_POLLS = 20
GONE_POLL = 0.01
"""How often, and after how many seconds each, a function that hung up is looked for."""
NOBODYS = 0xF800
"""Bits of the command register that read 0 (PCI Local Bus 3.0, 6.2.2). Set, it is the host that
made the answer up: all ones, because the function gave none."""


class Announcer(Protocol):
    """Knows the other leases, and tells them of a function-level step."""

    def announce(self, what: str, text: str, *, but: Lease) -> None: ...

    def settled(self, lease: Lease) -> None:
        """How far a lease is whose memory is back has changed."""
        ...

    async def restored(self) -> None:
        """The function is usable again: what the keeper itself posts may go on."""
        ...

    def at_work(self, *, but: Lease) -> list[int]:
        """Other leases that would lose what they have in flight by a function-level step."""
        ...


@dataclass(slots=True)
class Proving:
    """Looks at one function for one lease. Used by the keeper's loop only."""

    lease: Lease
    host: FunctionHost
    desk: MemoryDesk
    deadlines: Deadlines
    announcer: Announcer
    retired: list[tuple[Iova, int]] = field(default_factory=list)
    """IOVAs of this lease that were taken out of use."""
    final: bool = False
    """What was last seen of the engine was seen when nobody could post any more. Else it may have
    been started again since, and be at work although every fact is there."""

    # -- the engine ------------------------------------------------------------

    async def drive(self, call: Callable[[], T]) -> T:
        """Ask the driver, within the deadline of one call."""
        return await self.host.drive(self.deadlines.stop, call)

    async def in_flight(self) -> int:
        """What the driver says is in flight; raises if it cannot tell."""
        driver, channels = self.host.driver, self.lease.channels
        if self.lease.mediated is not None:
            return await self.lease.mediated.in_flight()
        if not self.lease.claimed:
            return 0  # a lease of memory only cannot post
        return await self.drive(lambda: asking.in_flight(driver, channels))

    async def stop(self) -> bool:
        """Stop the engine for this lease; True if that was acknowledged."""
        driver, channels, facts = self.host.driver, self.lease.channels, self.host.facts
        certain = self.cannot_post()
        if self.lease.mediated is not None:
            self.final = certain
            return await self.lease.mediated.stop(self.deadlines.stop)
        if not self.lease.claimed:
            self.lease.machine.observe(Fact.CANNOT_POST)  # it was given no channel and no register
            self.final = True
            return True
        if not await self.drive(lambda: asking.stop(driver, channels)):
            return False
        if facts.stop_is_final and not self.lease.maps_registers:
            self.lease.machine.observe(Fact.CANNOT_POST)
            certain = True
        self.final = certain
        return True

    def cannot_post(self) -> bool:
        """Whether it is known that nobody can start the engine for this lease any more."""
        return Fact.CANNOT_POST in self.lease.machine.facts

    async def at_rest(self) -> bool:
        """Whether nothing is in flight, twice; the second look is a stop where there is one.

        The stop is not for the engine, which rests, but for its doorbells: a duplicate may live on
        in a process that never had the lease's socket.
        """
        if await self.in_flight():
            return False
        if await self.stop():
            return True
        self.final = self.cannot_post()
        return not await self.in_flight()

    async def wait_idle(self) -> None:
        """Return once the function was seen at rest."""
        pause = POLL_FIRST
        while not await self.at_rest():
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, POLL_LAST)

    # -- the function ------------------------------------------------------------

    async def gone(self) -> bool:
        """Whether the function is no more, after it hung up; seen only if its process is reaped.

        A process that has hung up can still have memory mapped. It serves nobody any more, so if it
        is ours it is ended: that is this function's slot power.
        """
        for _ in range(GONE_POLLS):
            if self.host.proven_gone():
                break
            await asyncio.sleep(GONE_POLL)
        else:
            try:
                await self.host.call_memory(self.host.power_off)
            except HoldfastError as error:
                self.lease.note(f"its process does not end: {error.what}")
        if self.host.proven_gone():
            self.lease.machine.observe(Fact.FUNCTION_GONE)
            return True
        return False

    async def shut_off(self) -> None:
        """Bus mastering off for everybody, announced, and kept off on this lease's account."""
        async with self.host.starting:
            if not self.lease.announced:
                self.lease.announced = True
                text = "bus mastering is off while a dead lease is quieted"
                self.announcer.announce("isolated", text, but=self.lease)
            self.host.isolated.add(self.lease.number)
            self.host.usable.clear()
            self.host.disturbed += 1
        await self.host.call(self.host.isolate)

    async def flush(self) -> None:
        """Have a read come back from the function, and ahead of it whatever it had sent; or raise.

        Only of use behind a look that found it at rest. See :mod:`holdfast.keeper.state` for why.
        It is the command register that is read, because VFIO answers others, the vendor id for
        one, without asking the function (drivers/vfio/pci/vfio_pci_config.c,
        init_pci_cap_basic_perm). The order holds within a traffic class, and configuration
        requests have class 0 (PCI Express Base, 2.2.7): what a function sends in another one is
        not pushed.
        """
        host = self.host
        word = await host.call(host.backend.region_read, CONFIG_REGION, pci_regs.COMMAND, 2)
        command = int.from_bytes(word, "little")
        if command & NOBODYS:
            raise DeviceError(
                f"nothing answers: command reads {command:#06x}",
                operation="flush",
                target=f"{host.target} config",
            )
        self.lease.machine.observe(Fact.FLUSHED)

    async def reset(self) -> tuple[bool, str]:
        """Reset the function, if it has a reset: whether that proves it quiet, and why not.

        Believed only if the driver declares that a reset stops DMA, bus mastering did not come back
        on, and the engine does not contradict. Raises DeviceGone.
        """
        host = self.host
        if not host.backend.promises.reset:
            return False, "the function has no reset"
        host.disturbed += 1
        self.final = self.cannot_post()
        try:
            await host.call_within(self.deadlines.reset, host.reset)
            stayed_off = await host.call(host.look_after_reset)
        except DeviceGone:
            raise
        except HoldfastError as error:
            return False, error.what
        if not host.facts.reset_stops_dma:
            return False, "the reset is not known to stop DMA"
        if not stayed_off:
            return False, "the reset was acknowledged, but bus mastering came back on"
        try:
            left = await self.in_flight()
        except DeviceGone:
            raise
        except HoldfastError:
            left = 0  # no answer contradicts nothing: there is the driver's general word
        if left:
            return False, f"the reset was acknowledged, but {left} in flight"
        self.lease.machine.observe(Fact.RESET_TRUSTED)
        return True, "reset acknowledged"

    def may_disturb(self) -> bool:
        """Whether a function-level step hurts nobody: it is off already, or nobody else uses it."""
        return not self.host.usable.is_set() or not self.announcer.at_work(but=self.lease)

    # -- memory ------------------------------------------------------------

    async def unmap_strictly(self) -> bool:
        """Under a strict translation, what is unmapped cannot be reached, quiet or not."""
        if not self.host.backend.promises.strict_unmap or self.host.arena_iova is not None:
            return False
        journal, number = self.desk.journal, self.lease.number
        async with self.lease.memory_lock:
            entries = list(journal.entries(number))
            try:
                complete = await self.desk.unmap_all(
                    self.lease, retire=True, deadline=self.deadlines.unmap
                )
            except HoldfastError as error:
                self.lease.note(f"unmap failed: {error.what}")
                complete = False
            left = {entry.number for entry in journal.entries(number)}
            self.retired += [page_span(entry) for entry in entries if entry.number not in left]
        if complete:
            self.lease.machine.observe(
                Fact.STRICTLY_UNMAPPED, Fact.IOVAS_RETIRED, Fact.UNMAPPED_IN_FULL
            )
        return complete
