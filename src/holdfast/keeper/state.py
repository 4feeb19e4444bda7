# SPDX-License-Identifier: Apache-2.0
"""The death protocol as a table. Pure: no clock, no descriptors, no device.

Facts. The kernel frees a dead process's memory without asking the card, a card goes on writing
after its process is gone, a signalled completion may still have writes on their way, a reset may be
acknowledged without stopping DMA, and a register window can outlive the process that mapped it.

Consequence. "The client is dead" and even "the driver asked it to stop" say nothing about memory.
Memory may go only when a *fact about the function* was observed.

Choice. A lease walks the states below. Each row names the event that takes it, and what must have
been observed (:class:`Fact`) before the row may be taken. Rows that lead towards release carry
facts; rows taken on a timeout carry none and only ever lead to a stronger measure. The last gate,
:data:`RELEASE_GATE`, is the same for every policy except for the negative control ``release``,
whose gate is empty: that one difference is what the demonstration shows.

An engine at rest has sent everything, but what it sent may not have arrived: bridges hold posted
writes, and nobody answers them. So quiet that is read off the engine counts together with a read
that came back *afterwards* (:attr:`Fact.FLUSHED`): the completion of a read must not pass posted
writes sent before it (PCI Express Base, 2.4.1; PCI Local Bus 3.0, 3.2.5). A function that is gone
cannot be read, and of one that is strictly unmapped nothing arrives: there it is not asked for.

Cost. A function that cannot be proven quiet keeps its memory: quarantined, counted and shown.

The same tables are what the documentation draws and what a model checker explores; nothing else in
the keeper decides when memory may go.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from holdfast.values import Policy


class State(enum.StrEnum):
    """Where a lease is between life and the return of its memory."""

    ALIVE = "alive"
    FROZEN = "frozen"
    DRAINING = "draining"
    STOPPING = "stopping"
    ISOLATING = "isolating"  # bus master off
    RESETTING = "resetting"
    QUIET = "quiet"
    UNMAPPED = "unmapped"
    QUARANTINE = "quarantine"
    RELEASED = "released"


class Event(enum.StrEnum):
    """What can happen to a lease."""

    DEATH = "death"  # pidfd, hang-up or an orderly close
    DRAIN = "drain"
    REVOKE = "revoke"
    RELEASE = "release without proof"
    IDLE = "idle confirmed"
    DEADLINE = "deadline"
    STOPPED = "stop acknowledged"
    NOT_STOPPED = "stop not acknowledged"
    RESET_DONE = "reset acknowledged and trusted"
    UNREACHABLE = "unmapped under a strict translation"
    NO_PROOF = "nothing proves quiet"
    GONE = "the function is gone"
    FREED = "memory returned"


class Fact(enum.StrEnum):
    """What the keeper has observed. Facts are only ever added to a lease, never assumed."""

    IDLE_CONFIRMED = "the driver saw nothing in flight, twice"
    STOP_ACKNOWLEDGED = "the engine acknowledged the stop"
    RESET_TRUSTED = "a reset that stops DMA was acknowledged"
    FUNCTION_GONE = "the process that was the function is reaped"
    STRICTLY_UNMAPPED = "every mapping is gone and the translation is strict"
    FLUSHED = "a read came back from the function since it was seen at rest"
    CANNOT_POST = "both death signals came, or the stop cannot be undone by a stale holder"
    UNMAPPED_IN_FULL = "each unmap returned exactly the mapped size"
    IOVAS_RETIRED = "the IOVAs will not be handed out again"


QUIET_PROOFS = frozenset({Fact.IDLE_CONFIRMED, Fact.STOP_ACKNOWLEDGED, Fact.RESET_TRUSTED})
FORGOTTEN = QUIET_PROOFS | {Fact.FLUSHED}
"""What does not count any more once a lease is in quarantine."""


@dataclass(frozen=True, slots=True)
class Row:
    """One edge: in ``source``, on ``event``, go to ``target`` if all ``needs`` were observed."""

    source: State
    event: Event
    target: State
    needs: frozenset[Fact] = frozenset()


def _row(source: State, event: Event, target: State, *needs: Fact) -> Row:
    return Row(source, event, target, frozenset(needs))


TABLE: tuple[Row, ...] = (
    _row(State.ALIVE, Event.DEATH, State.FROZEN),
    _row(State.FROZEN, Event.DRAIN, State.DRAINING),
    _row(State.FROZEN, Event.REVOKE, State.STOPPING),
    _row(State.FROZEN, Event.RELEASE, State.QUIET),
    _row(State.DRAINING, Event.IDLE, State.QUIET, Fact.IDLE_CONFIRMED),
    _row(State.DRAINING, Event.DEADLINE, State.STOPPING),
    _row(State.STOPPING, Event.STOPPED, State.QUIET, Fact.STOP_ACKNOWLEDGED),
    _row(State.STOPPING, Event.NOT_STOPPED, State.ISOLATING),
    _row(State.ISOLATING, Event.IDLE, State.QUIET, Fact.IDLE_CONFIRMED),
    _row(State.ISOLATING, Event.DEADLINE, State.RESETTING),
    _row(State.RESETTING, Event.RESET_DONE, State.QUIET, Fact.RESET_TRUSTED),
    _row(
        State.RESETTING,
        Event.UNREACHABLE,
        State.UNMAPPED,
        Fact.STRICTLY_UNMAPPED,
        Fact.IOVAS_RETIRED,
    ),
    _row(State.RESETTING, Event.NO_PROOF, State.QUARANTINE),
    *(
        _row(state, Event.GONE, State.QUIET, Fact.FUNCTION_GONE)
        for state in (
            State.DRAINING,
            State.STOPPING,
            State.ISOLATING,
            State.RESETTING,
            State.QUARANTINE,
        )
    ),
    _row(State.QUIET, Event.FREED, State.RELEASED),
    _row(State.QUIET, Event.NO_PROOF, State.QUARANTINE),
    _row(State.UNMAPPED, Event.FREED, State.RELEASED),
    _row(State.QUARANTINE, Event.IDLE, State.QUIET, Fact.IDLE_CONFIRMED),
    _row(State.QUARANTINE, Event.RESET_DONE, State.QUIET, Fact.RESET_TRUSTED),
    _row(
        State.QUARANTINE,
        Event.UNREACHABLE,
        State.UNMAPPED,
        Fact.STRICTLY_UNMAPPED,
        Fact.IOVAS_RETIRED,
    ),
)
"""Every edge a lease can take. The diagram in ``docs/death-protocol.md`` is drawn from it."""

_INDEX = {(row.source, row.event): row for row in TABLE}
assert len(_INDEX) == len(TABLE), "two rows for one state and event"


@dataclass(frozen=True, slots=True)
class Gate:
    """What must have been observed before memory goes: all facts of one of ``ways``."""

    ways: tuple[frozenset[Fact], ...]

    def missing(self, facts: Iterable[Fact]) -> tuple[Fact, ...]:
        """What is not yet observed on the shortest way; empty if the gate is open.

        FLUSHED makes no way longer than another: it comes by itself once the rest of it is there.
        """
        seen = frozenset(facts)
        lacking = [way - seen for way in self.ways]
        least = [way for way in lacking if not any(other < way for other in lacking)]
        shortest = min(least, key=lambda way: len(way - {Fact.FLUSHED}))
        return tuple(sorted(shortest))


_SAFE = Gate(
    (
        *(
            frozenset({proof, Fact.FLUSHED, Fact.CANNOT_POST, Fact.UNMAPPED_IN_FULL})
            for proof in sorted(QUIET_PROOFS)
        ),
        frozenset({Fact.FUNCTION_GONE, Fact.UNMAPPED_IN_FULL}),
        frozenset({Fact.STRICTLY_UNMAPPED, Fact.IOVAS_RETIRED, Fact.UNMAPPED_IN_FULL}),
    )
)

RELEASE_GATE: Mapping[Policy, Gate] = {
    Policy.DRAIN: _SAFE,
    Policy.REVOKE: _SAFE,
    Policy.RELEASE: Gate((frozenset(),)),
}
"""The guard on the last edge. ``release`` is the negative control: the guard removed."""

FIRST_MEASURE: Mapping[Policy, Event] = {
    Policy.DRAIN: Event.DRAIN,
    Policy.REVOKE: Event.REVOKE,
    Policy.RELEASE: Event.RELEASE,
}
"""What a policy does first with a frozen lease."""


class IllegalStep(Exception):
    """The event has no row in this state, or a fact that the row needs was not observed."""


@dataclass(slots=True)
class Machine:
    """One lease's walk through :data:`TABLE`. Not thread-safe: used by the keeper's loop only."""

    policy: Policy
    state: State = State.ALIVE
    facts: set[Fact] = field(default_factory=set)
    last: Event | None = None
    gate: Gate | None = None

    def observe(self, *facts: Fact) -> None:
        """Add observed facts."""
        self.facts.update(facts)

    def fire(self, event: Event) -> State:
        """Take the row for ``event``; stays put and raises :class:`IllegalStep` if none is open."""
        row = _INDEX.get((self.state, event))
        if row is None:
            raise IllegalStep(f"no row for {event!r} in state {self.state!r}")
        lacking = row.needs - self.facts
        if lacking:
            raise IllegalStep(f"{self.state} on {event}: not observed: {sorted(lacking)}")
        if row.target is State.RELEASED and self.withheld():
            raise IllegalStep(f"release gate closed: {self.withheld()}")
        self.state = row.target
        self.last = event
        if self.state is State.QUARANTINE:
            # What led here contradicts what was seen of the engine before: it must be seen anew,
            # and flushed anew, because a read pushes only what was sent before it.
            self.facts -= FORGOTTEN
        return self.state

    def withheld(self) -> tuple[Fact, ...]:
        """What the release gate still waits for."""
        gate = self.gate if self.gate is not None else RELEASE_GATE[self.policy]
        return gate.missing(self.facts)
