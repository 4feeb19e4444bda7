# SPDX-License-Identifier: Apache-2.0
"""The death protocol, carried out. Which step follows which is :mod:`holdfast.keeper.state`'s.

Facts. When a client dies, the card does not know. Its engine goes on with what was posted, for
microseconds or for ever; a completion may be signalled before the last write has landed; a stop or
a reset may be refused, or acknowledged without effect; and a child of the dead process may still
hold a doorbell.

Consequence. Between the death of a process and the return of its memory lies a series of
measures, each of which either yields an *observation* that the function is quiet, or leads to a
stronger measure. Time alone proves nothing.

Choice. One coroutine per dead lease walks the table. Each state has one function here that takes
the state's measure and answers with an event; what it observed it adds to the machine's facts, and
the machine refuses rows whose facts were not observed. Deadlines bound every measure from outside,
and a measure that fails, hangs or raises counts as not having proven anything.

Cost. A dead lease holds its memory and channels for as long as the proof takes, and for ever if
there is none: then it is quarantined, and looked at again ever more rarely, or when an operator
asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from holdfast import steps
from holdfast.errors import DeviceGone, HoldfastError
from holdfast.keeper import asking
from holdfast.keeper.aftermath import give_channels_back
from holdfast.keeper.deadlines import Deadlines
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.lease import Lease
from holdfast.keeper.memory import MemoryDesk
from holdfast.keeper.proving import Announcer, Proving
from holdfast.keeper.quarantine import Ask, Quarantined
from holdfast.keeper.state import FIRST_MEASURE, Event, Fact, State

Found = tuple[Event, str]
"""What a measure came to, and what to log of it."""


@dataclass(slots=True)
class Quiesce:
    """Takes one lease from its death to the return of its memory."""

    lease: Lease
    host: FunctionHost
    desk: MemoryDesk
    deadlines: Deadlines
    announcer: Announcer
    proving: Proving = field(init=False)
    disturbed: int = field(init=False)
    """The function-level measures before this death: a later one may cut its transfers off."""
    asks: list[Ask] = field(default_factory=list)
    """Who waits to hear what became of a look at the quarantine."""

    def __post_init__(self) -> None:
        self.proving = Proving(self.lease, self.host, self.desk, self.deadlines, self.announcer)
        self.disturbed = self.host.disturbed

    async def run(self, why: str) -> None:
        """Walk the table until the memory is back (or until the keeper ends)."""
        machine = self.lease.machine
        measures: dict[State, Callable[[], Awaitable[Found]]] = {
            State.FROZEN: self._frozen,
            State.DRAINING: self._draining,
            State.STOPPING: self._stopping,
            State.ISOLATING: self._isolating,
            State.RESETTING: self._resetting,
            State.QUIET: self._returning,
            State.UNMAPPED: self._returning,
            State.QUARANTINE: self._quarantined,
        }
        machine.fire(Event.DEATH)
        self.lease.note(why, self.lease.noticed_ns)
        async with self.lease.serving:
            pass  # what was being done for the client is done; frozen, it gets nothing more
        steps.reach("keeper.death.frozen")
        said = why
        while machine.state is not State.RELEASED:
            if machine.state is State.QUARANTINE:
                self.lease.quarantined = self.lease.quarantined or Quarantined(said)
                self.lease.quarantined.why = said
            event, said = await measures[machine.state]()
            machine.fire(event)
            said = said or str(event)
            self.lease.note(said)
        steps.reach("keeper.death.released")
        self._answer()
        await give_channels_back(self.proving)

    # -- measures, in the order of the ladder -------------------------------------------------

    async def _frozen(self) -> Found:
        """Nothing more is posted for this lease; look what it had in flight."""
        first = FIRST_MEASURE[self.lease.machine.policy]
        try:
            await self.desk.unpin_relayed(self.lease)
            if self.lease.mediated is not None:
                await self.lease.mediated.freeze()
                self.lease.machine.observe(Fact.CANNOT_POST)  # its ring is read no more
            self.lease.in_flight_at_death = await self.proving.in_flight()
        except HoldfastError as error:
            return first, f"in flight unknown: {error.what}"
        return first, f"{self.lease.in_flight_at_death} in flight"

    async def _draining(self) -> Found:
        """Let it finish what was posted."""
        driver, channels = self.host.driver, self.lease.channels
        try:
            async with asyncio.timeout(self.deadlines.drain):
                if self.lease.claimed:  # else it posts nothing by itself
                    await self.proving.drive(lambda: asking.drain(driver, channels))
                await self.proving.wait_idle()
        except TimeoutError:
            return Event.DEADLINE, "did not finish in time"
        except DeviceGone as error:
            return await self._gone(Event.DEADLINE, error)
        except HoldfastError as error:
            return Event.DEADLINE, error.what
        self.lease.machine.observe(Fact.IDLE_CONFIRMED)
        self.lease.completed_after_death = await self._completed()
        return Event.IDLE, "nothing in flight, confirmed"

    async def _completed(self) -> bool:
        """Whether what was in flight was carried out: for the figures only, it proves nothing."""
        driver, channels = self.host.driver, self.lease.channels
        if not self.lease.in_flight_at_death or self.host.disturbed != self.disturbed:
            return False
        if self.lease.mediated is not None:
            return True  # what fails is told as such, and taken out
        try:
            return not await self.proving.drive(lambda: asking.failed(driver, channels))
        except HoldfastError:
            return False

    async def _stopping(self) -> Found:
        """Stop the engine for this lease's channels; only an acknowledgement counts."""
        try:
            stopped = await self.proving.stop()
        except DeviceGone as error:
            return await self._gone(Event.NOT_STOPPED, error)
        except HoldfastError as error:
            return Event.NOT_STOPPED, error.what
        if not stopped:
            return Event.NOT_STOPPED, "the engine did not acknowledge"
        self.lease.machine.observe(Fact.STOP_ACKNOWLEDGED)
        return Event.STOPPED, "the engine acknowledged"

    async def _isolating(self) -> Found:
        """Bus master off, flushing read, and see whether the engine comes to rest by itself."""
        try:
            async with asyncio.timeout(self.deadlines.isolate):
                await self.proving.shut_off()
                await self.proving.wait_idle()
        except TimeoutError:
            return Event.DEADLINE, "bus master is off, the engine is not at rest"
        except DeviceGone as error:
            return await self._gone(Event.DEADLINE, error)
        except HoldfastError as error:
            return Event.DEADLINE, error.what
        self.lease.machine.observe(Fact.IDLE_CONFIRMED)
        return Event.IDLE, "bus master off, at rest"

    async def _resetting(self) -> Found:
        """Reset; believed only if the driver says that a reset stops DMA. Else unmap, or keep."""
        try:
            quiet, said = await self.proving.reset()
        except DeviceGone as error:
            return await self._gone(Event.NO_PROOF, error)
        if quiet:
            return Event.RESET_DONE, said
        if await self.proving.unmap_strictly():
            return Event.UNREACHABLE, f"{said}; unmapped instead, IOVAs retired"
        return Event.NO_PROOF, said

    async def _quarantined(self) -> Found:
        """Keep everything, and look again: from time to time, and when an operator asks."""
        held = self.lease.quarantined
        assert held is not None
        pause = self.deadlines.quarantine
        while True:
            self._answer()
            self.asks = await held.wait(pause)
            pause = min(2 * pause, self.deadlines.quarantine_longest)
            if self.asks:
                pause = self.deadlines.quarantine
            event, said = await self._look_again(force=any(ask.force for ask in self.asks))
            held.looks += 1
            if event is not None:
                return event, said
            if said != held.last:
                self.lease.note(f"looked again: {said}")
            held.last = said

    async def _look_again(self, *, force: bool) -> tuple[Event | None, str]:
        """Everything that can still prove a quarantined lease quiet; None if nothing did."""
        machine, proving = self.lease.machine, self.proving
        if self.host.proven_gone():
            machine.observe(Fact.FUNCTION_GONE)
            return Event.GONE, "the function's process is reaped"
        try:
            if await proving.at_rest():
                machine.observe(Fact.IDLE_CONFIRMED)
                return Event.IDLE, "at rest at last"
            said = "not at rest"
        except HoldfastError as error:
            said = error.what
        if await proving.unmap_strictly():
            return Event.UNREACHABLE, f"{said}; unmapped at last, IOVAs retired"
        if not (self.host.backend.promises.reset and self.host.facts.reset_stops_dma):
            return None, f"{said}; no reset would prove anything"
        if not force and not proving.may_disturb():
            return None, f"{said}; not reset, because other leases are at work"
        try:
            await proving.shut_off()
            quiet, said = await proving.reset()
        except HoldfastError as error:
            return None, error.what
        return (Event.RESET_DONE if quiet else None), said

    async def _returning(self) -> Found:
        """Flush, unmap (checked), unpin, punch, recycle: the memory goes, if the gate is open.

        The flush comes behind the last look at the engine, and ahead of the unmaps.
        """
        lease = self.lease
        if lease.machine.withheld() and not await self._no_more_posts():
            return Event.NO_PROOF, "it was started again by someone who still held the lease"
        if Fact.FLUSHED in lease.machine.withheld():
            try:
                await self.proving.flush()
            except DeviceGone as error:
                if not await self.proving.gone():
                    return Event.NO_PROOF, f"no read comes back: {error.what}"
            except HoldfastError as error:
                return Event.NO_PROOF, f"no read comes back: {error.what}"
        steps.reach("keeper.death.quiet")
        async with lease.memory_lock:
            try:
                if await self.desk.unmap_all(lease, retire=False, deadline=self.deadlines.unmap):
                    lease.machine.observe(Fact.UNMAPPED_IN_FULL)
            except HoldfastError as error:
                return Event.NO_PROOF, f"unmap failed: {error.what}"
            if lease.machine.withheld():
                return Event.NO_PROOF, f"withheld: {', '.join(lease.machine.withheld())}"
            freed = lease.nbytes
            steps.reach("keeper.death.unmapped")
            await self.desk.free_all(lease)
        return Event.FREED, f"{freed} bytes"

    # -- details ------------------------------------------------------------

    async def _no_more_posts(self) -> bool:
        """Idle is only quiet if nobody can post any more; False if somebody did meanwhile.

        What was seen before that was certain says nothing: whoever held the lease may have posted
        after the look, and died before its answer was taken note of. Then it is looked at again.
        """
        facts = self.lease.machine.facts
        unreachable = {Fact.FUNCTION_GONE, Fact.STRICTLY_UNMAPPED}
        if not self.proving.cannot_post() and not facts & unreachable:
            self.lease.note("waiting for the other death signal: someone still holds the lease")
        while not self.proving.cannot_post() and not facts & unreachable:
            self.lease.changed.clear()
            await self.lease.changed.wait()
        if self.proving.final or facts & unreachable:
            return True
        try:
            return await self.proving.at_rest()
        except HoldfastError as error:
            self.lease.note(f"cannot tell whether it is still at rest: {error.what}")
            return False

    async def _gone(self, otherwise: Event, error: DeviceGone) -> Found:
        """The function went away; proof only if its process has been reaped."""
        if await self.proving.gone():
            return Event.GONE, "the function's process is reaped"
        return otherwise, error.what

    def _answer(self) -> None:
        """Let whoever asked for a look see what came of it."""
        for ask in self.asks:
            ask.answer.set()
        self.asks = []
