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
there is none: then it is quarantined, and looked at again from time to time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from holdfast.driver import Driver
from holdfast.errors import DeviceGone, HoldfastError, NotSupported
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.lease import Lease
from holdfast.keeper.memory import MemoryDesk, page_span
from holdfast.keeper.state import FIRST_MEASURE, QUIET_PROOFS, Event, Fact, State
from holdfast.values import Iova, Policy

POLL_FIRST = 0.0003
POLL_LAST = 0.002
"""Seconds between two looks at a draining engine: short at first, then easy on the processor."""
QUARANTINE_PERIOD = 1.0
"""Seconds between two looks at a quarantined lease."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Bounds of each measure in seconds. Passing one only ever leads to a stronger measure."""

    drain: float = 10.0
    stop: float = 2.0
    isolate: float = 1.0
    reset: float = 5.0


class Announcer(Protocol):
    """Tells the other leases of a function-level step."""

    def announce(self, what: str, text: str, *, but: Lease) -> None: ...


@dataclass(slots=True)
class Quiesce:
    """Takes one lease from its death to the return of its memory."""

    lease: Lease
    host: FunctionHost
    desk: MemoryDesk
    deadlines: Deadlines
    announcer: Announcer
    retired: list[tuple[Iova, int]] = field(default_factory=list)
    was_reset: bool = False

    async def run(self, why: str) -> None:
        """Walk the table until the memory is back (or until the keeper ends)."""
        machine = self.lease.machine
        measures: dict[State, Callable[[], Awaitable[tuple[Event, str]]]] = {
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
        while machine.state is not State.RELEASED:
            event, said = await measures[machine.state]()
            machine.fire(event)
            self.lease.note(said or str(event))
        await self._give_channels_back()

    # -- measures, in the order of the ladder -------------------------------------------------

    async def _frozen(self) -> tuple[Event, str]:
        """Nothing more is posted for this lease; look what it had in flight."""
        try:
            await self.desk.unpin_relayed(self.lease)
            if self.lease.mediated is not None:
                await self.lease.mediated.freeze()
                self.lease.machine.observe(Fact.CANNOT_POST)  # its ring is read no more
            self.lease.in_flight_at_death = await self._in_flight()
        except HoldfastError as error:
            return FIRST_MEASURE[self.lease.machine.policy], f"in flight unknown: {error.what}"
        return (
            FIRST_MEASURE[self.lease.machine.policy],
            f"{self.lease.in_flight_at_death} in flight",
        )

    async def _draining(self) -> tuple[Event, str]:
        """Let it finish what was posted."""
        driver, channels = self.host.driver, self.lease.channels
        mediated = self.lease.mediated is not None
        try:
            async with asyncio.timeout(self.deadlines.drain):
                if not mediated:
                    await self._drive(lambda: driver.drain(channels))
                await self._wait_idle()
                failed = not mediated and await self._drive(lambda: driver.failed(channels))
        except TimeoutError:
            return Event.DEADLINE, "did not finish in time"
        except DeviceGone as error:
            return await self._gone(Event.DEADLINE, error)
        except HoldfastError as error:
            return Event.DEADLINE, error.what
        self.lease.machine.observe(Fact.IDLE_CONFIRMED)
        self.lease.completed_after_death = self.lease.in_flight_at_death > 0 and not failed
        return Event.IDLE, "nothing in flight, confirmed"

    async def _stopping(self) -> tuple[Event, str]:
        """Stop the engine for this lease's channels; only an acknowledgement counts."""
        try:
            stopped = await self._stop()
        except DeviceGone as error:
            return await self._gone(Event.NOT_STOPPED, error)
        except HoldfastError as error:
            return Event.NOT_STOPPED, error.what
        if not stopped:
            return Event.NOT_STOPPED, "the engine did not acknowledge"
        self.lease.machine.observe(Fact.STOP_ACKNOWLEDGED)
        return Event.STOPPED, "the engine acknowledged"

    async def _isolating(self) -> tuple[Event, str]:
        """Bus master off, flushing read, and see whether the engine comes to rest by itself."""
        async with self.host.starting:
            self._announce("isolated", "bus mastering is off while a dead lease is quieted")
            self.host.isolated.add(self.lease.number)
            self.host.usable.clear()
        try:
            async with asyncio.timeout(self.deadlines.isolate):
                await self.host.call(self.host.isolate)
                await self._wait_idle()
        except TimeoutError:
            return Event.DEADLINE, "bus master is off, the engine is not at rest"
        except DeviceGone as error:
            return await self._gone(Event.DEADLINE, error)
        except HoldfastError as error:
            return Event.DEADLINE, error.what
        self.lease.machine.observe(Fact.IDLE_CONFIRMED)
        return Event.IDLE, "bus master off, at rest"

    async def _resetting(self) -> tuple[Event, str]:
        """Reset; believed only if the driver says that a reset stops DMA. Else unmap, or keep."""
        said = "the function has no reset"
        if self.host.backend.promises.reset:
            self._announce("reset", "the function was reset to quiet a dead lease")
            try:
                await self.host.call_within(self.deadlines.reset, self.host.backend.reset)
                self.was_reset = True
                said = "the reset is not known to stop DMA"
                if self.host.driver.reset_stops_dma:
                    await self.host.call(self.host.isolate)
                    self.lease.machine.observe(Fact.RESET_TRUSTED)
                    return Event.RESET_DONE, "reset acknowledged"
            except DeviceGone as error:
                return await self._gone(Event.NO_PROOF, error)
            except HoldfastError as error:
                said = error.what
        if await self._unmap_strictly():
            return Event.UNREACHABLE, f"{said}; unmapped instead, IOVAs retired"
        return Event.NO_PROOF, said

    async def _quarantined(self) -> tuple[Event, str]:
        """Keep everything, and look again from time to time."""
        while True:
            await asyncio.sleep(QUARANTINE_PERIOD)
            if self.host.proven_gone():
                self.lease.machine.observe(Fact.FUNCTION_GONE)
                return Event.GONE, "the function's process is reaped"
            try:
                if not await self._at_rest():
                    continue
            except HoldfastError:
                continue
            self.lease.machine.observe(Fact.IDLE_CONFIRMED)
            return Event.IDLE, "at rest at last"

    async def _returning(self) -> tuple[Event, str]:
        """Unmap (checked), unpin, punch, recycle: the memory goes, if the gate is open."""
        lease = self.lease
        if lease.machine.withheld() and not await self._no_more_posts():
            return Event.NO_PROOF, "it was started again by someone who still held the lease"
        async with lease.memory_lock:
            try:
                if await self.desk.unmap_all(lease, retire=False):
                    lease.machine.observe(Fact.UNMAPPED_IN_FULL)
            except HoldfastError as error:
                return Event.NO_PROOF, f"unmap failed: {error.what}"
            if lease.machine.withheld():
                return Event.NO_PROOF, f"withheld: {', '.join(lease.machine.withheld())}"
            freed = lease.nbytes
            await self.desk.free_all(lease)
        return Event.FREED, f"{freed} bytes"

    # -- details ------------------------------------------------------------

    async def _no_more_posts(self) -> bool:
        """Idle is only quiet if nobody can post any more; False if somebody did meanwhile."""
        facts = self.lease.machine.facts
        enough = {Fact.CANNOT_POST, Fact.FUNCTION_GONE, Fact.STRICTLY_UNMAPPED}
        if facts & enough:
            return True
        self.lease.note("waiting for the other death signal: someone still holds the lease")
        while not facts & enough:
            self.lease.changed.clear()
            await self.lease.changed.wait()
        try:
            return await self._at_rest()
        except HoldfastError as error:
            self.lease.note(f"cannot tell whether it is still at rest: {error.what}")
            return False

    async def _at_rest(self) -> bool:
        """Whether nothing is in flight, twice; the second look is a stop where there is one.

        The stop is not for the engine, which rests, but for its doorbells: a duplicate may live on
        in a process that never had the lease's socket.
        """
        return not await self._in_flight() and (await self._stop() or not await self._in_flight())

    async def _stop(self) -> bool:
        driver, channels = self.host.driver, self.lease.channels
        if self.lease.mediated is not None:
            return await self.lease.mediated.stop(self.deadlines.stop)
        if not self.lease.claimed:
            self.lease.machine.observe(Fact.CANNOT_POST)  # it was given no channel and no register
            return True
        if not await self._drive(lambda: driver.stop(channels)):
            return False
        if driver.stop_is_final and not self.lease.maps_registers:
            self.lease.machine.observe(Fact.CANNOT_POST)
        return True

    async def _unmap_strictly(self) -> bool:
        """Under a strict translation, what is unmapped cannot be reached, quiet or not."""
        if not self.host.backend.promises.strict_unmap or self.host.arena_iova is not None:
            return False
        async with self.lease.memory_lock:
            entries = self.desk.journal.entries(self.lease.number)
            self.retired = [page_span(entry) for entry in entries]
            try:
                complete = await self.desk.unmap_all(self.lease, retire=True)
            except HoldfastError as error:
                self.lease.note(f"unmap failed: {error.what}")
                return False
        if complete:
            self.lease.machine.observe(
                Fact.STRICTLY_UNMAPPED, Fact.IOVAS_RETIRED, Fact.UNMAPPED_IN_FULL
            )
        return complete

    async def _give_channels_back(self) -> None:
        """Channels go back once idle; those of an unmapped lease are withheld until proven so."""
        lease, host = self.lease, self.host
        proven = bool(lease.machine.facts & (QUIET_PROOFS | {Fact.FUNCTION_GONE}))
        host.isolated.discard(lease.number)
        try:
            if not host.usable.is_set() and not host.isolated and not host.proven_gone():
                probe = self.was_reset
                await host.drive(self.deadlines.reset, lambda: host.reconnect(probe=probe))
                host.usable.set()
                if lease.mediated is not None:
                    # The others' requests were cut off as well.
                    await lease.mediated.mediation.restart()
            await host.call(host.renew_vectors, lease.grant.vectors)
        except HoldfastError as error:
            lease.note(f"the function is not usable again: {error.what}")
            return
        if proven or lease.machine.policy is Policy.RELEASE:
            self._unclaim()
        elif type(host.driver).in_flight is Driver.in_flight:
            # Nothing is known of this function, so nothing will ever prove it quiet. What the dead
            # lease left behind can only reach IOVAs that are never handed out again.
            lease.note("IOVAs retired for good: no driver can prove the function quiet")
            self._unclaim()
        else:
            lease.note("channels and IOVAs withheld until proven quiet")
            host.keep(self._withheld())

    async def _withheld(self) -> None:
        """After UNMAPPED: wait for the engine's own idle, then reinstate IOVAs and channels."""
        while True:
            await asyncio.sleep(QUARANTINE_PERIOD)
            try:
                # Told to stop first: nobody waits for what it was at any more.
                if not await self._stop() or not await self._at_rest():
                    continue
            except HoldfastError:
                if self.host.proven_gone():
                    return
                continue
            self.desk.reinstate(self.retired)
            self._unclaim()
            return

    def _unclaim(self) -> None:
        if self.lease.claimed:
            self.lease.claimed = False
            self.host.unclaim(self.lease.access, self.lease.channels)

    async def _wait_idle(self) -> None:
        """Return once the function was seen at rest."""
        pause = POLL_FIRST
        while not await self._at_rest():
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, POLL_LAST)

    async def _in_flight(self) -> int:
        driver, channels = self.host.driver, self.lease.channels
        if self.lease.mediated is not None:
            return await self.lease.mediated.in_flight()
        if not self.lease.claimed:
            return 0  # a lease of memory only cannot post
        return await self._drive(lambda: driver.in_flight(channels))

    async def _drive(self, call: Callable[[], object]) -> int:
        try:
            return int(bool_or_int(await self.host.drive(self.deadlines.stop, call)))
        except (HoldfastError, asyncio.CancelledError):
            raise
        except Exception as error:  # driver code may raise anything; it must not end the ladder
            raise NotSupported(
                f"the driver raised {type(error).__name__}: {error}", operation="quiesce"
            ) from error

    async def _gone(self, otherwise: Event, error: DeviceGone) -> tuple[Event, str]:
        """The function went away; proof only if its process has been reaped."""
        for _ in range(20):
            if self.host.proven_gone():
                self.lease.machine.observe(Fact.FUNCTION_GONE)
                return Event.GONE, "the function's process is reaped"
            await asyncio.sleep(0.01)
        return otherwise, error.what

    def _announce(self, what: str, text: str) -> None:
        if not self.lease.announced:
            self.lease.announced = True
            self.announcer.announce(what, text, but=self.lease)


def bool_or_int(value: object) -> int:
    """A driver's answer as a number; anything else is a driver error."""
    if value is None:
        return 0
    if isinstance(value, int):
        return int(value)
    raise TypeError(f"expected a number, not {type(value).__name__}")
