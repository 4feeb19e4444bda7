# SPDX-License-Identifier: Apache-2.0
"""Memory of leases: taken in the order reserve → journal → map → confirm, let go in reverse.

Every function that changes what the function can reach holds the lease's ``memory_lock``, so a
death that comes in the middle of a map waits for it and then undoes it. Whatever was reserved
counts as mapped until an unmap proved the opposite.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from holdfast import steps
from holdfast.dma.ledger import Ledger
from holdfast.dma.slab import SlabMemory
from holdfast.errors import (
    BadBuffer,
    Closed,
    HoldfastError,
    UsageError,
)
from holdfast.keeper.held import Holder, put_handover
from holdfast.keeper.journal import Entry, Memory, What
from holdfast.keeper.lease import HeldPin, HeldSlab, Lease
from holdfast.keeper.map_state import MapState
from holdfast.keeper.process_memory import OwnMemory, ProcessMemory
from holdfast.keeper.unmapping import PAGE, Unmapper
from holdfast.kernel import disposal, limits, procfs
from holdfast.values import Iova, Perm

MAP_DEADLINE = 120.0
"""Seconds that a map may take: the kernel clears and pins every page of it."""
DESCRIPTORS_KEPT = 256
"""Descriptors that slabs do not take: new clients and the death protocol need some."""
PIN_LIMIT = 1 << 40
"""Largest range of its own memory that a client may pin at once, in bytes."""


@dataclass(slots=True)
class MemoryDesk(Unmapper):
    """Hands memory to leases and takes it back. Used by the keeper's loop only."""

    holder: Holder
    ledger: Ledger
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    # -- slabs ------------------------------------------------------------

    async def take_slab(
        self, lease: Lease, nbytes: int, *, control: bool = False, seq: int = 0
    ) -> HeldSlab:
        """Memory for a lease, reachable by the function when this returns.

        Held by the anchor before anything is mapped. ``seq`` is the request that this answers.

        Raises QuotaExceeded, OutOfMemory or IovaExhausted with nothing changed.
        """
        if nbytes <= 0:
            raise BadBuffer(f"{nbytes} bytes", operation="alloc", target=str(self.host.target))
        limits.require_descriptors(
            DESCRIPTORS_KEPT, operation="alloc", target=str(self.host.target)
        )
        granule = self.host.source.granule
        size = -(-nbytes // granule) * granule
        async with lease.memory_lock:
            self._still_alive(lease, "alloc")
            self.ledger.charge(lease.number, size, lease.peer.uid)
            try:
                what = What.CONTROL if control else What.SLAB
                slab = await self._map_slab(lease, size, what, seq)
            except BaseException:
                self.ledger.discharge(lease.number, size)
                raise
            if control:
                lease.control = slab
            else:
                lease.slabs[slab.number] = slab
            return slab

    async def _map_slab(self, lease: Lease, size: int, what: What, seq: int) -> HeldSlab:
        host = self.host
        number = next(self.numbers)
        memory = await host.call_memory(self._take_held, number, size)
        if host.arena_iova is not None or memory.addresses is not None:
            return self._fixed_slab(lease, number, memory, size, what, seq)
        try:
            iova = host.space.take(size)
        except BaseException:
            self._let_go(number, memory)
            raise
        entry = Entry(0, lease.number, iova, size, what, held=number, seq=seq)
        entry = self.journal.reserve(entry.anchored())  # _take_held has returned
        steps.reach("keeper.alloc.reserved")
        map_it = partial(host.backend.dma_map, iova, size, Perm.RW, memory.fd, 0)
        try:
            await host.call_within(MAP_DEADLINE, map_it)
        except BaseException:
            # In this order: if it cannot be undone, the memory stays out of use.
            await self.undo(entry)
            self._let_go(number, memory)
            raise
        steps.reach("keeper.alloc.mapped")
        entry = self.journal.confirm(entry)
        steps.reach("keeper.alloc.confirmed")
        return HeldSlab(number, memory, size, [iova], entry, seq)

    def _take_held(self, number: int, size: int) -> SlabMemory:
        """Memory that does not end with this process. Blocking."""
        memory = self.host.source.take(size)
        try:
            put_handover(self.holder, f"slab/{number}", self.host.source.describe(memory))
        except BaseException:
            self.host.source.recycle(memory)
            raise
        return memory

    def _fixed_slab(
        self, lease: Lease, number: int, memory: SlabMemory, size: int, what: What, seq: int
    ) -> HeldSlab:
        """Memory that the function can reach anyway: there is nothing to map."""
        self.journal.hold(Memory(number, lease.number, size, what, seq))
        return HeldSlab(number, memory, size, self.fixed_iovas(memory), None, seq)

    def fixed_iovas(self, memory: SlabMemory) -> list[Iova]:
        """Where the function sees memory that needs no map."""
        if memory.addresses is not None:
            return [Iova(at) for at in memory.addresses]
        base = self.host.arena_iova
        assert base is not None
        return [base + offset for offset, _ in memory.extents]

    def _let_go(self, number: int, memory: SlabMemory) -> None:
        self.holder.drop(f"slab/{number}")
        self.host.source.recycle(memory)

    async def give_slab(self, lease: Lease, number: int) -> None:
        """Take a slab back from a living client. The function must be idle for this lease."""
        async with lease.memory_lock:
            slab = lease.slabs.get(number)
            if slab is None:
                raise UsageError(f"no slab {number}", operation="give slab back")
            if slab.entry is not None:
                slab.entry = await self.unmap(slab.entry)
                if slab.entry is not None:
                    raise HoldfastError("unmapped less than the slab", operation="give slab back")
            await self._recycle(lease, [slab])
            del lease.slabs[number]

    # -- pins ------------------------------------------------------------

    async def pin(
        self, lease: Lease, address: int, nbytes: int, *, writable: bool, seq: int = 0
    ) -> HeldPin:
        """Let the function reach the client's own memory by message (relayed)."""
        self._check_range(address, nbytes)
        if lease.own_memory is None or not lease.memory_held:
            raise BadBuffer(
                "the client sent no /proc/self/mem with its first pin",
                operation="pin",
                target=str(self.host.target),
            )
        perm = Perm.RW if writable else Perm.READ
        lease.relay = lease.relay or OwnMemory(lease.own_memory)
        memory = ProcessMemory(lease.own_memory, address, lease.relay)
        async with lease.memory_lock:
            wanted = Entry(0, lease.number, Iova(0), nbytes, What.RELAYED, next(self.numbers),
                           address, writable, seq)  # fmt: skip
            entry = self._reserve(lease, wanted.anchored())  # memory_held
            try:
                await self.host.call(
                    self.host.backend.dma_map_memory, entry.iova, nbytes, perm, memory
                )
            except BaseException:
                await self.undo(entry)
                self.ledger.discharge(lease.number, nbytes)
                raise
            steps.reach("keeper.pin.mapped")
            pin = HeldPin(entry.held, entry.iova, nbytes, self.journal.confirm(entry))
            steps.reach("keeper.pin.confirmed")
            lease.pins[pin.number] = pin
            return pin

    async def reserve_pin(
        self, lease: Lease, address: int, nbytes: int, *, seq: int = 0
    ) -> HeldPin:
        """Room for pages that the client is about to pin itself; from here on a death undoes it.

        The whole pages around the range: an I/O page table knows nothing smaller.
        """
        self._check_range(address, nbytes)
        first = address % PAGE
        async with lease.memory_lock:
            size = -(-(first + nbytes) // PAGE) * PAGE
            wanted = Entry(0, lease.number, Iova(0), size, What.IN_PLACE, next(self.numbers),
                           address - first, seq=seq)  # fmt: skip
            # The pages will hang on the way to the function, which was held before any lease was.
            entry = self._reserve(lease, wanted.anchored())
            pin = HeldPin(entry.held, entry.iova, entry.size, entry, in_place=True)
            lease.pins[pin.number] = pin
            return pin

    def confirm_pin(self, lease: Lease, number: int) -> None:
        """The client's pages are pinned: from here on an unmap must find them."""
        pin = lease.pins.get(number)
        if pin is None or not pin.in_place:
            raise UsageError(f"no pin {number} was reserved", operation="pin")
        if not pin.entry.confirmed:
            pin.entry = self.journal.confirm(pin.entry)

    def _check_range(self, address: int, nbytes: int) -> None:
        if not 0 < nbytes <= PIN_LIMIT or address + nbytes > 1 << 47:
            raise BadBuffer(
                f"{nbytes} bytes at {address:#x}", operation="pin", target=str(self.host.target)
            )

    def _reserve(self, lease: Lease, wanted: Entry) -> Entry:
        """Charge, take an IOVA and write the intention down. Under the lease's memory lock."""
        self._still_alive(lease, "pin")
        # Keep the offset within the page, so that alignment means the same on both sides.
        first = wanted.address % PAGE
        self.ledger.charge(lease.number, wanted.size, lease.peer.uid)
        try:
            iova = self.host.space.take(-(-(first + wanted.size) // PAGE) * PAGE)
        except BaseException:
            self.ledger.discharge(lease.number, wanted.size)
            raise
        entry = self.journal.reserve(replace(wanted, iova=iova + first))
        steps.reach("keeper.pin.reserved")
        return entry

    async def unpin(self, lease: Lease, number: int) -> None:
        """Take a pin away; when this returns the function cannot reach the memory any more."""
        async with lease.memory_lock:
            pin = lease.pins.get(number)
            if pin is None:
                raise UsageError(f"no pin {number}", operation="unpin")
            left = await self.unmap(pin.entry)
            if left is not None:
                pin.entry = left
                raise HoldfastError("unmapped less than the pin", operation="unpin")
            del lease.pins[number]
            self.ledger.discharge(lease.number, pin.size)

    async def unpin_relayed(self, lease: Lease) -> None:
        """Take every relayed pin of an ended lease away, before anything else.

        Its process may live on and use that memory for something else; if it is dead, the memory
        is gone. Either way there is nothing to drain into. Pages pinned in place are still there,
        and stay until the function is quiet. Raises if a pin could not be unmapped: its entry stays
        in the journal, and :meth:`unmap_all` tries again.
        """
        for pin in list(lease.pins.values()):
            if not pin.in_place:
                await self.unpin(lease, pin.number)

    async def unpin_all(self, lease: Lease) -> None:
        """Take every pin of a lease away whose client says goodbye."""
        for number in list(lease.pins):
            await self.unpin(lease, number)

    async def accept_own_memory(self, lease: Lease, fd: int) -> None:
        """Take ownership of the client's /proc/self/mem after checking that it really is.

        Raises if the anchor does not acknowledge it; sent once more, that is tried again.
        """
        if lease.own_memory is not None or not procfs.is_memory_of(fd, lease.peer.pid):
            disposal.discard([fd])
            if lease.own_memory is None:
                raise BadBuffer(
                    "the descriptor is not this client's /proc/self/mem", operation="pin"
                )
        else:
            lease.own_memory = fd
        if not lease.memory_held:
            held = [lease.own_memory]
            await self.host.call(self.holder.put, f"lease/{lease.number}/memory", held)
            lease.memory_held = True

    def adopt_memory(self, lease: Lease, left: Iterable[SlabMemory]) -> None:
        """Put memory of a keeper that is dead on a lease's account, as if it were that lease's."""
        for memory in left:
            fixed = memory.addresses is not None or self.host.arena_iova is not None
            iovas = self.fixed_iovas(memory) if fixed else []
            slab = HeldSlab(next(self.numbers), memory, memory.size, iovas)
            self.journal.hold(Memory(slab.number, lease.number, slab.size, What.SLAB))
            self.ledger.adopt(lease.number, slab.size, lease.peer.uid)
            lease.slabs[slab.number] = slab

    async def settle(self, lease: Lease) -> None:
        """Undo what a keeper that was killed had begun for a living client and not answered.

        What cannot be undone stays the lease's, until it ends.
        """
        async with lease.memory_lock:
            for slab in list(lease.all_slabs()):
                if slab.entry is None or slab.entry.state is MapState.MAPPED:
                    continue
                slab.entry = await self.unmap(slab.entry)
                if slab.entry is None:
                    lease.slabs.pop(slab.number, None)
                    lease.control = None if lease.control is slab else lease.control
                    await self._recycle(lease, [slab])
            for pin in list(lease.pins.values()):
                reserved = pin.entry.state is MapState.RESERVED
                if pin.entry.confirmed or (pin.in_place and reserved):
                    continue  # in place: its client is at it
                left = await self.unmap(pin.entry)
                if left is None:
                    del lease.pins[pin.number]
                    self.ledger.discharge(lease.number, pin.size)
                else:
                    pin.entry = left

    # -- the end of a lease ------------------------------------------------------------

    async def free_all(self, lease: Lease) -> None:
        """Unpin, punch and recycle a lease's memory. Only behind the release gate."""
        for pin in lease.pins.values():
            self.ledger.discharge(lease.number, pin.size)
        lease.pins.clear()
        if lease.own_memory is not None:
            self.holder.drop(f"lease/{lease.number}/memory")
            os.close(lease.own_memory)
            lease.own_memory = lease.relay = None
        await self._recycle(lease, list(lease.all_slabs()))
        lease.control = None  # not before: until they are gone they are this lease's
        lease.slabs.clear()

    def reinstate(self, ranges: list[tuple[Iova, int]]) -> None:
        """Retired IOVAs may be used again: the function has been proven quiet since."""
        for iova, size in ranges:
            self.host.space.reinstate(iova, size)
            self.journal.reinstate(iova)

    # -- details ------------------------------------------------------------

    async def _recycle(self, lease: Lease, slabs: list[HeldSlab]) -> None:
        lease.punch_ns += await self.host.call_memory(self._punch, slabs)
        steps.reach("keeper.death.punched")
        for slab in slabs:
            if slab.entry is None:
                self.journal.let_go(slab.number)  # before anybody else can get it
            self._let_go(slab.number, slab.memory)
            self.ledger.discharge(lease.number, slab.size)

    def _punch(self, slabs: list[HeldSlab]) -> int:
        """Give pages back to the kernel; returns the nanoseconds it took. Blocking."""
        begun = time.monotonic_ns()
        for slab in slabs:
            self.host.source.punch(slab.memory)
        return time.monotonic_ns() - begun

    def _still_alive(self, lease: Lease, operation: str) -> None:
        if not lease.alive:
            raise Closed("the lease has ended", operation=operation, target=str(self.host.target))
