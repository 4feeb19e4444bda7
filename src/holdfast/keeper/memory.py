# SPDX-License-Identifier: Apache-2.0
"""Memory of leases: taken in the order reserve → journal → map → confirm, let go in reverse.

Every function that changes what the function can reach holds the lease's ``memory_lock``, so a
death that comes in the middle of a map waits for it and then undoes it. Whatever was reserved
counts as mapped until an unmap proved the opposite.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from dataclasses import dataclass, field
from functools import partial

from holdfast.dma.ledger import Ledger
from holdfast.errors import (
    BadBuffer,
    Closed,
    DeviceGone,
    HoldfastError,
    RemoteError,
    StaysStuck,
    UsageError,
)
from holdfast.keeper.function import CALL_DEADLINE, FunctionHost
from holdfast.keeper.journal import Entry, Journal
from holdfast.keeper.lease import HeldPin, HeldSlab, Lease
from holdfast.kernel import procfs
from holdfast.values import Iova, LeaseId, Perm

PAGE = 4096
MAP_DEADLINE = 120.0
"""Seconds that a map may take: the kernel clears and pins every page of it."""
PIN_LIMIT = 1 << 40
"""Largest range of its own memory that a client may pin at once, in bytes."""


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """``contracts.HostMemory`` over a client's own ``/proc/self/mem``.

    The descriptor stays tied to the client's address space: once that is gone, reads and writes
    move nothing, and the access fails instead of reaching anyone else (proc(5), fs/proc/base.c
    ``mem_rw``). Writes there ignore page protection, so the *map's* permission is what keeps a
    read-only array read-only; the backend checks it before it calls.
    """

    fd: int
    address: int

    def read(self, offset: int, count: int) -> bytes:
        data = os.pread(self.fd, count, self.address + offset)
        if len(data) != count:
            raise OSError(errno.EFAULT, f"{len(data)} of {count} bytes: the memory is gone")
        return data

    def write(self, offset: int, data: memoryview) -> None:
        written = os.pwrite(self.fd, data, self.address + offset)
        if written != len(data):
            raise OSError(errno.EFAULT, f"{written} of {len(data)} bytes: the memory is gone")


@dataclass(slots=True)
class _Unmapping:
    """A lease's unmaps, carried out in a thread that may be late: what is gone must not be lost."""

    entries: list[Entry]
    outcomes: list[int | HoldfastError] = field(default_factory=list)
    begun: bool = False
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class MemoryDesk:
    """Hands memory to leases and takes it back. Used by the keeper's loop only."""

    host: FunctionHost
    journal: Journal
    ledger: Ledger
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _unmapping: dict[LeaseId, _Unmapping] = field(default_factory=dict)

    # -- slabs ------------------------------------------------------------

    async def take_slab(self, lease: Lease, nbytes: int, *, control: bool = False) -> HeldSlab:
        """Memory for a lease, reachable by the function when this returns.

        Raises QuotaExceeded, OutOfMemory or IovaExhausted with nothing changed.
        """
        if nbytes <= 0:
            raise BadBuffer(f"{nbytes} bytes", operation="alloc", target=str(self.host.target))
        granule = self.host.source.granule
        size = -(-nbytes // granule) * granule
        async with lease.memory_lock:
            self._still_alive(lease, "alloc")
            self.ledger.charge(lease.number, size)
            try:
                slab = await self._map_slab(lease, size)
            except BaseException:
                self.ledger.discharge(lease.number, size)
                raise
            if control:
                lease.control = slab
            else:
                lease.slabs[slab.number] = slab
            return slab

    async def _map_slab(self, lease: Lease, size: int) -> HeldSlab:
        host = self.host
        number = next(self.numbers)
        if host.arena_iova is not None:
            memory = host.source.take(size)
            base = host.arena_iova
            return HeldSlab(number, memory, size, [base + offset for offset, _ in memory.extents])
        memory = await host.call_memory(host.source.take, size)
        if memory.addresses is not None:
            return HeldSlab(number, memory, size, [Iova(at) for at in memory.addresses])
        try:
            iova = host.space.take(size)
        except BaseException:
            host.source.recycle(memory)
            raise
        entry = self.journal.reserve(lease.number, iova, size)
        map_it = partial(host.backend.dma_map, iova, size, Perm.RW, memory.fd, 0)
        try:
            await host.call_within(MAP_DEADLINE, map_it)
        except BaseException:
            # In this order: if it cannot be undone, the memory stays out of use.
            await self._undo(entry)
            host.source.recycle(memory)
            raise
        return HeldSlab(number, memory, size, [iova], self.journal.confirm(entry))

    async def give_slab(self, lease: Lease, number: int) -> None:
        """Take a slab back from a living client. The function must be idle for this lease."""
        async with lease.memory_lock:
            slab = lease.slabs.get(number)
            if slab is None:
                raise UsageError(f"no slab {number}", operation="give slab back")
            if slab.entry is not None and not await self._unmap(slab.entry):
                raise HoldfastError("unmapped less than the slab", operation="give slab back")
            await self._recycle(lease, [slab])
            del lease.slabs[number]

    # -- pins ------------------------------------------------------------

    async def pin(self, lease: Lease, address: int, nbytes: int, *, writable: bool) -> HeldPin:
        """Let the function reach the client's own memory by message (relayed)."""
        self._check_range(address, nbytes)
        if lease.own_memory is None:
            raise BadBuffer(
                "the client sent no /proc/self/mem with its first pin",
                operation="pin",
                target=str(self.host.target),
            )
        perm = Perm.RW if writable else Perm.READ
        memory = ProcessMemory(lease.own_memory, address)
        async with lease.memory_lock:
            entry = self._reserve(lease, address, nbytes)
            try:
                await self.host.call(
                    self.host.backend.dma_map_memory, entry.iova, nbytes, perm, memory
                )
            except BaseException:
                await self._undo(entry)
                self.ledger.discharge(lease.number, nbytes)
                raise
            pin = HeldPin(next(self.numbers), entry.iova, nbytes, self.journal.confirm(entry))
            lease.pins[pin.number] = pin
            return pin

    async def reserve_pin(self, lease: Lease, address: int, nbytes: int) -> HeldPin:
        """Room for pages that the client is about to pin itself; from here on a death undoes it.

        The whole pages around the range: an I/O page table knows nothing smaller.
        """
        self._check_range(address, nbytes)
        first = address % PAGE
        async with lease.memory_lock:
            entry = self._reserve(lease, address - first, -(-(first + nbytes) // PAGE) * PAGE)
            pin = HeldPin(next(self.numbers), entry.iova, entry.size, entry, in_place=True)
            lease.pins[pin.number] = pin
            return pin

    def confirm_pin(self, lease: Lease, number: int) -> None:
        """The client's pages are pinned: from here on an unmap must find them."""
        pin = lease.pins.get(number)
        if pin is None or not pin.in_place:
            raise UsageError(f"no pin {number} was reserved", operation="pin")
        pin.entry = self.journal.confirm(pin.entry)

    def _check_range(self, address: int, nbytes: int) -> None:
        if not 0 < nbytes <= PIN_LIMIT or address + nbytes > 1 << 47:
            raise BadBuffer(
                f"{nbytes} bytes at {address:#x}", operation="pin", target=str(self.host.target)
            )

    def _reserve(self, lease: Lease, address: int, nbytes: int) -> Entry:
        """Charge, take an IOVA and write the intention down. Under the lease's memory lock."""
        self._still_alive(lease, "pin")
        # Keep the offset within the page, so that alignment means the same on both sides.
        first = address % PAGE
        self.ledger.charge(lease.number, nbytes)
        try:
            iova = self.host.space.take(-(-(first + nbytes) // PAGE) * PAGE)
        except BaseException:
            self.ledger.discharge(lease.number, nbytes)
            raise
        return self.journal.reserve(lease.number, iova + first, nbytes)

    async def unpin(self, lease: Lease, number: int) -> None:
        """Take a pin away; when this returns the function cannot reach the memory any more."""
        async with lease.memory_lock:
            pin = lease.pins.get(number)
            if pin is None:
                raise UsageError(f"no pin {number}", operation="unpin")
            if not await self._unmap(pin.entry):
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

    def accept_own_memory(self, lease: Lease, fd: int) -> None:
        """Take ownership of the client's /proc/self/mem after checking that it really is."""
        if lease.own_memory is not None or not procfs.is_memory_of(fd, lease.peer.pid):
            os.close(fd)
            if lease.own_memory is None:
                raise BadBuffer(
                    "the descriptor is not this client's /proc/self/mem", operation="pin"
                )
            return
        lease.own_memory = fd

    def adopt_leftovers(self, lease: Lease) -> None:
        """Put memory of a keeper that is dead on a lease's account, as if it were that lease's."""
        for memory in self.host.source.leftovers():
            iovas = [Iova(at) for at in memory.addresses or ()]
            slab = HeldSlab(next(self.numbers), memory, memory.size, iovas)
            self.ledger.adopt(lease.number, slab.size)
            lease.slabs[slab.number] = slab

    # -- the end of a lease ------------------------------------------------------------

    async def unmap_all(
        self, lease: Lease, *, retire: bool, deadline: float = CALL_DEADLINE
    ) -> bool:
        """Undo every mapping of a lease; True if each unmap took exactly what was mapped.

        With ``retire`` the IOVAs are not handed out again until :meth:`reinstate`. Raises
        StaysStuck after ``deadline`` seconds; what came of it is then found by the next call.
        """
        work = self._unmapping.get(lease.number)
        if work is not None and not work.done.is_set():
            raise StaysStuck("an earlier unmap has not come back", operation="unmap",
                             target=str(self.host.target))  # fmt: skip
        if work is None:
            entries = list(self.journal.entries(lease.number))
            if not entries:
                return True
            work = self._unmapping[lease.number] = _Unmapping(entries)
            try:
                await self.host.call_within(deadline, partial(self._unmap_now, work))
            finally:
                if not work.begun:
                    del self._unmapping[lease.number]
        del self._unmapping[lease.number]
        complete, problem = True, None
        for entry, outcome in zip(work.entries, work.outcomes, strict=True):
            if isinstance(outcome, HoldfastError):
                problem = problem or outcome  # the others are gone all the same, and recorded so
            else:
                # Nothing was there, but a client that lives may still do what was reserved for it.
                late = not entry.confirmed and not outcome and not lease.process_dead
                complete &= self._close(entry, outcome, retire=retire or late)
        if problem is not None:
            raise problem
        return complete

    async def free_all(self, lease: Lease) -> None:
        """Unpin, punch and recycle a lease's memory. Only behind the release gate."""
        for pin in lease.pins.values():
            self.ledger.discharge(lease.number, pin.size)
        lease.pins.clear()
        if lease.own_memory is not None:
            os.close(lease.own_memory)
            lease.own_memory = None
        await self._recycle(lease, list(lease.all_slabs()))
        lease.control = None  # not before: until they are gone they are this lease's
        lease.slabs.clear()

    def reinstate(self, ranges: list[tuple[Iova, int]]) -> None:
        """Retired IOVAs may be used again: the function has been proven quiet since."""
        for iova, size in ranges:
            self.host.space.reinstate(iova, size)

    # -- details ------------------------------------------------------------

    async def _unmap(self, entry: Entry) -> bool:
        """Undo one mapping; True if it took exactly what was mapped."""
        unmapped = await self.host.call(self._unmap_one, entry)
        return self._close(entry, unmapped, retire=False)

    def _unmap_now(self, work: _Unmapping) -> None:
        """Find out how many bytes each unmap takes away, or why it fails. Blocking."""
        work.begun = True
        try:
            for entry in work.entries:
                try:
                    work.outcomes.append(self._unmap_one(entry))
                except HoldfastError as error:
                    work.outcomes.append(error)
                except Exception as error:  # noqa: BLE001 - each entry has an outcome
                    said = f"{type(error).__name__}: {error}"
                    work.outcomes.append(HoldfastError(said, operation="unmap"))
        finally:
            work.done.set()

    def _unmap_one(self, entry: Entry) -> int:
        try:
            return self.host.backend.dma_unmap(entry.iova, entry.size)
        except RemoteError as error:
            if error.errno != errno.ENOENT:
                raise
            return 0
        except DeviceGone:
            # The mapping ended with the process that held it, but only the reaper can say so.
            return entry.size if self.host.proven_gone() else 0

    def _close(self, entry: Entry, unmapped: int, *, retire: bool) -> bool:
        if not entry.unmapped_in_full(unmapped):
            return False
        self.journal.close(entry)
        base, span = page_span(entry)
        if retire:
            self.host.space.retire(base, span)
        else:
            self.host.space.give_back(base, span)
        return True

    async def _undo(self, entry: Entry) -> None:
        """A map failed or was never tried: an unmap of size 0 is right here."""
        if not await self._unmap(entry):
            raise HoldfastError("a failed map could not be undone", operation="map")

    async def _recycle(self, lease: Lease, slabs: list[HeldSlab]) -> None:
        lease.punch_ns += await self.host.call_memory(self._punch, slabs)
        for slab in slabs:
            self.host.source.recycle(slab.memory)
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


def page_span(entry: Entry) -> tuple[Iova, int]:
    """The whole pages that an entry's range was taken from the address space as."""
    first = int(entry.iova) % PAGE
    return Iova(int(entry.iova) - first), -(-(first + entry.size) // PAGE) * PAGE
