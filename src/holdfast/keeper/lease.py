# SPDX-License-Identifier: Apache-2.0
"""A lease: who holds it, what it holds, and what has happened to it so far."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.dma.slab import SlabMemory
from holdfast.driver import Grant
from holdfast.keeper.journal import Entry, LeaseRecord, Mark, Stage
from holdfast.keeper.process_memory import OwnMemory
from holdfast.keeper.quarantine import Quarantined
from holdfast.keeper.sparse_event import SparseEvent
from holdfast.keeper.state import Fact, Machine, State
from holdfast.kernel.pidfd import Peer
from holdfast.values import Access, Iova, LeaseId, Policy

MOST_WHY = 300
"""Characters of a reason in the log: it travels in every answer to ps."""
FIRST_STEPS, LAST_STEPS = 16, 32
"""How much of a log is kept. What a lease in quarantine goes through for days is not."""

if TYPE_CHECKING:
    from holdfast.keeper.mediated_lease import MediatedLease


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a lease's log: state entered, CLOCK_MONOTONIC nanoseconds, and why."""

    state: State
    at_ns: int
    why: str


@dataclass(slots=True)
class HeldSlab:
    """A slab of this lease. ``entry`` is None for memory that has no map of its own.

    ``seq`` is the request that it answered.
    """

    number: int
    memory: SlabMemory
    size: int
    iovas: list[Iova]
    entry: Entry | None = None
    seq: int = 0


@dataclass(slots=True)
class HeldPin:
    """Client memory that the function reaches at ``iova``.

    Relayed, the function's accesses come to the keeper as messages. In place, the client's pages
    are pinned in the I/O address space, and stay so after its death.
    """

    number: int
    iova: Iova
    size: int
    entry: Entry
    in_place: bool = False

    @property
    def seq(self) -> int:
        """The request that it answered."""
        return self.entry.seq


@dataclass(slots=True)
class Lease:
    """Everything the keeper knows of one lease. Used by the keeper's loop only."""

    number: LeaseId
    peer: Peer
    machine: Machine
    access: Access = Access.SHARED
    channels: tuple[int, ...] = ()
    claimed: bool = False
    grant: Grant = field(default_factory=Grant)
    control: HeldSlab | None = None
    slabs: dict[int, HeldSlab] = field(default_factory=dict)
    pins: dict[int, HeldPin] = field(default_factory=dict)
    own_memory: int | None = None
    """The client's /proc/self/mem, once it sent it."""
    memory_held: bool = False
    """The anchor has acknowledged that."""
    relay: OwnMemory | None = None
    """What relayed pins are reached through."""
    maps_registers: bool = False
    """It was given the engine's BAR to map: a window that can outlive it in a child or a passed
    descriptor."""
    command: str = ""
    """The name of its process, from when it lived."""
    quarantined: Quarantined | None = None
    """What is known of its quarantine, once it came there."""
    log: list[Step] = field(default_factory=list)
    in_flight_at_death: int = 0
    completed_after_death: bool = False
    announced: bool = False
    noticed_ns: int = 0
    """When the first sign of its end was seen (CLOCK_MONOTONIC)."""
    punch_ns: int = 0
    """Time that giving its pages back to the kernel took."""
    changed: SparseEvent = field(default_factory=SparseEvent)
    serving: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a request is answered: the death protocol begins behind it, never beside it."""
    memory_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while memory is taken or let go, so that a death never races with a map."""
    mediated: MediatedLease | None = None
    """Its rings, if the keeper posts for it."""
    stage: Stage = Stage.ALIVE
    """How far it is, as the journal says."""
    goodbye: bool = False
    everything: bool = False
    """It stands for whatever may be mapped: nobody knows what that is."""
    granted: bool = False
    """Its channels were started for it once."""
    recorder: Callable[[Lease, Step], None] | None = None
    """Told of each step, besides the log."""
    lifeline: int = 0
    """Inode of the client's end of the lease's socket, as the client says."""
    run: int = 0
    """Token of the ``holdfast run`` that its process is a part of, as the client says; 0: none."""
    hung_up: bool = False
    process_dead: bool = False

    @property
    def alive(self) -> bool:
        return self.machine.state is State.ALIVE

    @property
    def nbytes(self) -> int:
        """Bytes of DMA memory held for this lease."""
        return sum(slab.size for slab in self.all_slabs())

    def all_slabs(self) -> Iterator[HeldSlab]:
        if self.control is not None:
            yield self.control
        yield from self.slabs.values()

    def note(self, why: str, at_ns: int = 0) -> None:
        """Log that the present state was entered (or explained), now or when it was noticed."""
        step = Step(self.machine.state, at_ns or time.monotonic_ns(), why[:MOST_WHY])
        self.log.append(step)
        if len(self.log) > FIRST_STEPS + LAST_STEPS:
            del self.log[FIRST_STEPS]
        if self.recorder is not None:
            self.recorder(self, step)

    def signal(
        self, *, hung_up: bool = False, process_dead: bool = False, goodbye: bool = False
    ) -> None:
        """Record a sign of the end.

        Hang-up and pidfd together mean that nobody can post any more; so does a goodbye, which a
        client says after it has unmapped its windows and closed its doorbells.
        """
        self.hung_up |= hung_up
        self.process_dead |= process_dead
        self.goodbye |= goodbye
        self.noticed_ns = self.noticed_ns or time.monotonic_ns()
        if self.goodbye or (self.hung_up and self.process_dead):
            self.machine.observe(Fact.CANNOT_POST)
        self.changed.set()

    def record(self) -> LeaseRecord:
        """What a successor must know of it."""
        marks = (
            Mark.CLAIMED * self.claimed
            | Mark.MAPS_REGISTERS * self.maps_registers
            | Mark.GOODBYE * self.goodbye
            | Mark.GRANTED * self.granted
            | Mark.ANNOUNCED * self.announced
        )
        return LeaseRecord(
            self.number,
            self.stage,
            Mark(marks),
            list(Access).index(self.access),
            list(Policy).index(self.machine.policy),
            self.peer.pid,
            self.peer.uid,
            self.peer.gid,
            _mask(self.channels),
            _mask(self.grant.vectors),
            self.lifeline,
            self.noticed_ns,
            self.run,
        )

    @classmethod
    def recall(cls, record: LeaseRecord, pidfd: int) -> Lease:
        """A lease of a keeper that died, as it was written down. Owns ``pidfd``.

        What was observed of the function's quiet does not count any more: everything may be in
        flight. That its client said goodbye does.
        """
        lease = cls(
            record.number,
            Peer(pidfd=pidfd, pid=record.pid, uid=record.uid, gid=record.gid),
            Machine(list(Policy)[record.policy]),
            access=list(Access)[record.access],
            channels=_bits(record.channels),
            claimed=Mark.CLAIMED in record.marks,
            grant=Grant(vectors=_bits(record.vectors)),
            maps_registers=Mark.MAPS_REGISTERS in record.marks,
            granted=Mark.GRANTED in record.marks,
            stage=record.stage,
            lifeline=record.lifeline,
            noticed_ns=record.noticed_ns,
            run=record.run,
        )
        if Mark.GOODBYE in record.marks:
            lease.signal(goodbye=True)
        return lease

    def outcome(self) -> dict[str, Any]:
        """Where it has come to, and the latest reason for it."""
        why = self.log[-1].why
        if self.machine.state is State.QUARANTINE and self.quarantined is not None:
            why = self.quarantined.last or why
        return {"lease": int(self.number), "state": str(self.machine.state), "why": why}

    def describe(self) -> dict[str, Any]:
        """What ``holdfast ps`` shows of this lease."""
        held = self.quarantined if self.machine.state is State.QUARANTINE else None
        return {
            "lease": int(self.number),
            "pid": self.peer.pid,
            "command": self.command,
            "uid": self.peer.uid,
            "state": str(self.machine.state),
            "policy": str(self.machine.policy),
            "access": str(self.access),
            "channels": list(self.channels),
            "bytes": self.nbytes,
            "pins": len(self.pins),
            "requests": self.mediated.seat.in_flight if self.mediated is not None else 0,
            "lifeline": self.lifeline,
            "run": self.run,
            "withheld": [str(fact) for fact in self.machine.withheld()] if not self.alive else [],
            "quarantine": held.describe(self.nbytes) if held is not None else None,
            "in_flight_at_death": self.in_flight_at_death,
            "completed_after_death": self.completed_after_death,
            "punch_ns": self.punch_ns,
            "hung_up": self.hung_up,
            "process_dead": self.process_dead,
            "log": [(str(step.state), step.at_ns, step.why) for step in self.log],
        }


def _mask(numbers: Iterable[int]) -> int:
    return sum(1 << number for number in numbers)


def _bits(mask: int) -> tuple[int, ...]:
    return tuple(number for number in range(mask.bit_length()) if mask >> number & 1)
