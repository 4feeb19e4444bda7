# SPDX-License-Identifier: Apache-2.0
"""Go on where a killed keeper left a function, its memory and its clients.

Facts. A killed keeper leaves no word. What it held is still held, by the anchor: its connection to
the function, its clients' sockets, their memory. The function may be in the middle of DMA for
clients that live, and these wait for nothing worse than an answer.

Consequence. A successor may not ask the function to start anew, may not trust what its predecessor
had *observed*, and must know what it had *begun*.

Choice. Descriptors come from the anchor, everything else from the journal. The function is read and
not written to. Each lease is what it was: a living one goes on, and its client, told by a notice,
asks again for what was not answered; what was begun for that request and not finished is undone
first. A dying one walks the death protocol from its beginning, with everything in flight. If the
journal cannot be relied on, nothing in it counts: bus mastering is turned off, everything is
unmapped, every client is hung up on, and all memory there is belongs to one lease without a
client, until the function is proven quiet.

Cost. A request that had reached the function but was not answered is carried out twice: a client's
register write may happen twice if its keeper is killed within it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

from holdfast import backends, steps
from holdfast.contracts import FileWindow, FunctionBackend, MemoryWindow
from holdfast.dma.iova import IovaSpace
from holdfast.dma.slab import Arena, OwnFiles, SlabMemory, SlabSource
from holdfast.driver import Driver
from holdfast.errors import DeviceGone, HoldfastError, StaysStuck
from holdfast.keeper.access import BackendAccess, set_bus_master
from holdfast.keeper.asking import guarded
from holdfast.keeper.bringing_up import bring_up, find_driver
from holdfast.keeper.continuity import Continuity, Inherited
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.held import FunctionProcess, Scope, find_handover, hold_backend
from holdfast.keeper.journal import Contents, Corrupt, HostRecord, Journal, What
from holdfast.keeper.map_state import REACHABLE, MapState
from holdfast.keeper.process_memory import OwnMemory, ProcessMemory
from holdfast.keeper.standby import Orders
from holdfast.keeper.unmapping import page_span
from holdfast.kernel import events
from holdfast.values import Access, Iova, IrqIndex, LeaseId, Perm, Target

RESUME_DEADLINE = 5.0
"""Seconds that a driver may take to find out where it is; then there is no driver."""


def inherit(
    target: Target,
    scope: Scope,
    orders: Orders,
    siblings: Sequence[Target],
    space: IovaSpace | None,
) -> Inherited:
    """The function that a predecessor kept, undisturbed. Blocking.

    Raises DeviceGone if the function is gone. ``space``: as for ``bring_up``.
    """
    steps.reach("keeper.adopting")
    if scope.find("backend") is None:
        # It was closed on purpose, between two users, when nobody had a lease.
        return bring_up(target, scope, siblings=siblings, space=space, safe=orders.safe)
    process = _process(scope)
    try:
        journal, contents = Journal.open(_only(scope, "journal"))
    except Corrupt as error:
        sys.stderr.write(f"holdfast: {target}: {error}: starting from what the anchor holds\n")
        return _from_wreck(target, scope, orders, process, space)
    counters = HostRecord(contents.host.last_lease, orders.successions)
    journal.host(counters)
    backend = _resume(target, scope, process, _memories(scope, contents), _files(scope, contents))
    host = _host(target, scope, orders, backend, process, space)
    for entry in contents.entries.values():
        host.space.claim(*page_span(entry), retired=entry.state is MapState.RETIRED)
    for record in contents.leases.values():
        channels = {number for number in range(64) if record.channels >> number & 1}
        host.free_channels -= channels
        if channels and list(Access)[record.access] is Access.EXCLUSIVE:
            host.whole = False
    return Inherited(host, Continuity(scope, journal, counters, orders.safe), contents)


# -- pieces ------------------------------------------------------------


def _only(scope: Scope, name: str) -> int:
    """The one descriptor held under a name."""
    found = scope.find(name)
    if found is None or len(found[0]) != 1:
        raise Corrupt(f"the anchor does not hold {name!r}", operation="take over")
    return found[0][0]


def _process(scope: Scope) -> FunctionProcess | None:
    found = scope.find("process")
    return FunctionProcess(int(found[1]), found[0][0]) if found is not None else None


def _resume(
    target: Target,
    scope: Scope,
    process: FunctionProcess | None,
    memories: Sequence[MemoryWindow] = (),
    files: Sequence[FileWindow] = (),
) -> FunctionBackend:
    """The backend over the predecessor's descriptors; a function that does not answer is ended."""
    handover = find_handover(scope, "backend")
    assert handover is not None
    try:
        backend = backends.resume(target, handover, memories, files)
    except DeviceGone:
        if process is not None:
            process.end()
        raise
    hold_backend(scope, backend)
    return backend


def _memories(scope: Scope, contents: Contents) -> list[MemoryWindow]:
    """What the function reaches by message: the own memory of living clients."""
    windows: list[MemoryWindow] = []
    owns: dict[LeaseId, OwnMemory] = {}
    for entry in contents.entries.values():
        held = scope.find(f"lease/{entry.lease}/memory")
        if entry.what is What.RELAYED and entry.state in REACHABLE and held is not None:
            perm = Perm.RW if entry.writable else Perm.READ
            if entry.lease not in owns:
                owns[entry.lease] = OwnMemory(held[0][0])
            memory = ProcessMemory(held[0][0], entry.address, owns[entry.lease])
            windows.append((entry.iova, entry.size, perm, memory))
    return windows


def _files(scope: Scope, contents: Contents) -> list[FileWindow]:
    """What the function has a descriptor of."""
    windows: list[FileWindow] = []
    for entry in contents.entries.values():
        held = scope.find(f"slab/{entry.held}")
        if entry.what in (What.SLAB, What.CONTROL) and entry.state in REACHABLE and held:
            windows.append((entry.iova, entry.size, Perm.RW, held[0][0], 0))
    arena = scope.find("arena")
    if arena is not None:
        (fd,), note = arena
        windows.append((Iova(note["iova"]), note["size"], Perm.RW, fd, 0))
    return windows


def _host(
    target: Target,
    scope: Scope,
    orders: Orders,
    backend: FunctionBackend,
    process: FunctionProcess | None,
    space: IovaSpace | None,
) -> FunctionHost:
    """The function with its driver, sources and interrupts, read and not written to."""
    access = BackendAccess(backend, str(target))
    resumed = None if orders.safe else _driver(target, access)
    driver = resumed or Driver(access)
    arena = scope.find("arena")
    source: SlabSource
    if arena is not None:
        (fd,), note = arena
        source = Arena.resume(fd, note["size"])
    else:
        source = backend.memory() or OwnFiles()
    up = scope.find("up")
    assert up is not None
    kind = up[1]["irq_index"]
    host = FunctionHost(
        target=target,
        holder=scope,
        access=access,
        driver=driver,
        space=space or IovaSpace(up[1]["base"], up[1]["limit"]),
        source=source,
        arena_iova=Iova(arena[1]["iova"]) if arena is not None else None,
        irq_index=IrqIndex(kind) if kind is not None else None,
        irq_fds=list(_irqs(scope)),
        free_channels=set(range(driver.channels())),
        child=process,
        safe=resumed is None,
    )
    if host.irq_index is not None and _carries_interrupts(scope):
        backend.set_irqs(host.irq_index, 0, host.irq_fds)
        for fd in host.irq_fds:
            events.ring(fd, 1)  # one may have been lost meanwhile
    if not host.is_master():
        host.usable.clear()
        host.was_reset = True  # perhaps
    return host


def _carries_interrupts(scope: Scope) -> bool:
    """Whether interrupts came through the predecessor itself (no IOMMU), and so come no more."""
    found = scope.find("backend")
    return found is not None and found[1]["notes"].get("backend") == "uio"


def _irqs(scope: Scope) -> Iterator[int]:
    """The eventfds that the function rings already, in the order of their vectors."""
    for name in sorted(scope.names("irqs/"), key=lambda name: int(name.rpartition("/")[2])):
        found = scope.find(name)
        assert found is not None
        yield from found[0]


def _driver(target: Target, access: BackendAccess) -> Driver | None:
    """The driver, as it must be in the middle of its work. None if that cannot be had."""
    found: SimpleQueue[Driver | HoldfastError] = SimpleQueue()

    def resume() -> None:
        try:
            found.put(guarded(partial(_resumed, target, access)))
        except HoldfastError as error:
            found.put(error)

    # One that hangs must not keep this process from ending, either.
    threading.Thread(target=resume, name="resume", daemon=True).start()
    try:
        driver = found.get(timeout=RESUME_DEADLINE)
    except Empty:
        driver = StaysStuck(f"no answer within {RESUME_DEADLINE:g} s", operation="resume")
    if isinstance(driver, DeviceGone):
        raise driver
    if isinstance(driver, HoldfastError):
        sys.stderr.write(f"holdfast: {target}: its driver cannot go on ({driver}): none is used\n")
        return None
    return driver


def _resumed(target: Target, access: BackendAccess) -> Driver:
    driver = find_driver(target, access.backend)(access)
    driver.resume()
    return driver


# -- without a journal ------------------------------------------------------------


def _from_wreck(
    target: Target,
    scope: Scope,
    orders: Orders,
    process: FunctionProcess | None,
    space: IovaSpace | None,
) -> Inherited:
    """Bus master off, unmap all, and keep all memory that the anchor holds."""
    backend = _resume(target, scope, process)
    set_bus_master(backend, target, on=False)
    host = _host(target, scope, orders, backend, process, space)
    if host.arena_iova is None:  # else it stands for memory that cannot be unmapped
        try:
            backend.dma_unmap_all()
        except HoldfastError as error:  # tried again, and until then nothing is given back
            sys.stderr.write(f"holdfast: {target}: not everything could be unmapped: {error}\n")
    lost: list[SlabMemory] = []
    for name in scope.names("slab/"):
        handover = find_handover(scope, name)
        assert handover is not None
        with suppress(HoldfastError):  # an anchor that was killed, too, may hold half of it
            lost.append(host.source.adopt(handover))
    for name in scope.names("lease/"):
        scope.forget(name)
    journal = Journal.create()
    scope.put("journal", [journal.fd])
    counters = HostRecord(orders.successions << 20, orders.successions)
    journal.host(counters)
    host.usable.clear()
    return Inherited(host, Continuity(scope, journal, counters, orders.safe), lost=lost, wreck=True)
