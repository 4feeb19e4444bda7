# SPDX-License-Identifier: Apache-2.0
"""Mediated leases: what the keeper's loop does for them around the mediator's thread.

Facts. Clients that do not trust each other share channels that none of them may touch. When one of
them dies, its requests are among those of the others, in the same hardware queue; there is no
command that takes single ones out.

Choice. The keeper itself holds the function, by a lease like any other (the *house* lease, whose
process is the keeper): it begins with the first mediated lease and ends with the last, through the
same death protocol. A mediated lease has no channel, no register and no doorbell, only memory and
a pair of rings. The death protocol asks here instead of the driver:

* *nothing can be posted any more* holds as soon as the ring is not read any more;
* *in flight* is what the mediator has accepted and not seen finished: its own table, not the
  client's word;
* *stop* stops the channels, and when the function has acknowledged it starts them anew with what
  the others had in flight. They notice a pause. This is also what confirms that what was reported
  finished has landed, unless the engine happens to be at rest.

Cost. A death under load costs the others one stop and start, a few milliseconds. While a mediated
lease exists the function has no other kind of lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from holdfast.errors import Busy, Closed, NotSupported, StaysStuck
from holdfast.keeper.journal import Stage
from holdfast.keeper.lease import Lease
from holdfast.keeper.mediated_lease import MediatedLease
from holdfast.keeper.mediation_channels import DEADLINE, SharedChannels
from holdfast.keeper.mediation_parts import Seat
from holdfast.keeper.mediation_state import MediatorState
from holdfast.keeper.mediator import Mediator
from holdfast.keeper.state import Machine
from holdfast.kernel import bells, events, memfd, pidfd
from holdfast.kernel.mapping import Mapping as FileMapping
from holdfast.poster import Poster
from holdfast.values import Access, LeaseId, Policy
from holdfast.wire.rings import RING_BYTES, BufferTable, KeeperEnd, Limits

if TYPE_CHECKING:
    from holdfast.keeper.held import Scope
    from holdfast.keeper.server import Keeper

STATE = "mediation"
"""Under which name the anchor holds the mediator's state."""


class Mediation(SharedChannels):
    """Everything mediated of one function. Loop only."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        super().__init__(keeper.host)
        self._moved_out = asyncio.Event()
        self._coming = 0
        """Leases that are about to get their rings: the keeper does not move out before them."""
        self.leases: dict[int, MediatedLease] = {}

    # -- leases ------------------------------------------------------------

    def preferred(self, lease: Lease) -> bool:
        """Whether a client that does not say gets a mediated lease: there are several users."""
        if not self.host.driver.mediates:
            return False
        others = (other for other in self.keeper.leases.values() if other is not self.house)
        return bool(self.leases) or any(other.peer.uid != lease.peer.uid for other in others)

    async def begin(self, lease: Lease) -> None:
        """Give a new lease its rings. Under the unit's lock; the keeper admits it next.

        Raises NotSupported if the driver cannot mediate, Busy if others use the function directly
        or every window of the card is taken. On error nothing is left.
        """
        driver = self.host.driver
        if not driver.mediates:
            raise NotSupported(
                f"driver {driver.name} cannot post for clients",
                operation="open mediated",
                target=str(self.host.target),
                hint="open it with access='shared' or 'exclusive'",
            )
        self._coming += 1
        try:
            await self._begin(lease)
        finally:
            self._coming -= 1
            self._move_out_if_empty()

    async def _begin(self, lease: Lease) -> None:
        # Whoever had registers mapped until now must have nothing left of them.
        await self.keeper.unit.hand_over(self.keeper, None)
        if self.house is not None and not self.house.alive:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DEADLINE):
                    await self._moved_out.wait()
        if self.house is None or self.mediator is None:
            await self._move_in()
        await self._seat(lease)

    async def _seat(self, lease: Lease) -> None:
        assert self._state is not None
        assert self._poster is not None
        window, limits = self._window(self._poster)
        number = self._state.take_seat(int(lease.number))
        with ExitStack() as undo:
            undo.callback(self._state.free_seat, number)
            ring_fd = memfd.create("holdfast-rings", RING_BYTES)
            undo.callback(os.close, ring_fd)
            submit = events.make()
            undo.callback(events.close, submit)
            heard, done = bells.make()
            undo.callback(os.close, heard)
            undo.callback(os.close, done)
            mapping = FileMapping(ring_fd, RING_BYTES, dont_fork=True)
            end = KeeperEnd(mapping.array.data)
            seat = Seat(number, end, submit, done, limits, self.keeper.settings.requests)
            held = MediatedLease(self, lease, seat, ring_fd, mapping, heard, window)
            # Before the client can have them.
            await self.host.call(self._scope.put, _rings_of(lease), held.descriptors(), held.note())
            undo.callback(self._scope.drop, _rings_of(lease))
            await self.ask(lambda m: m.admit(seat))
            undo.pop_all()
        self.leases[int(lease.number)] = held
        lease.mediated = held

    def _window(self, poster: Poster) -> tuple[int | None, Limits]:
        """A part of the card's memory that no other lease has."""
        windows = self.keeper.settings.card_windows
        if windows == 1:
            return None, Limits(0, poster.card_bytes, poster.align)
        taken = {held.window for held in self.leases.values()}
        free = [window for window in range(windows) if window not in taken]
        size = poster.card_bytes // windows // poster.align * poster.align
        if not free or not size:
            raise Busy(
                f"the {windows} parts of the card's memory are taken",
                operation="open mediated",
                target=str(self.host.target),
                hint="wait (timeout=...), or serve with fewer --card-windows",
            )
        return free[0], Limits(free[0] * size, (free[0] + 1) * size, poster.align)

    def leave(self, lease: Lease) -> None:
        """A mediated lease is released (or was never admitted): its rings go."""
        if lease is self.house:
            self.house = None
            self._moved_out.set()
        held = self.leases.pop(int(lease.number), None)
        if held is None:
            return
        self.host.keep(self._forget(held))

    async def _forget(self, held: MediatedLease) -> None:
        with contextlib.suppress(Closed, StaysStuck):
            await self.ask(lambda m: m.leave(held.seat))
        self._scope.drop(_rings_of(held.lease))
        for fd in held.descriptors():
            os.close(fd)
        held.mapping.close()
        self._move_out_if_empty()

    def table_of(self, lease: Lease, but: int | None = None) -> BufferTable:
        """The slabs that a lease's requests may name."""
        return BufferTable(
            (
                slab.number,
                [
                    (int(iova), size)
                    for iova, (_, size) in zip(slab.iovas, slab.memory.extents, strict=True)
                ],
                True,
            )
            for slab in lease.slabs.values()
            if slab.number != but
        )

    # -- the house lease ------------------------------------------------------------

    async def _move_in(self) -> None:
        """Take the function for the keeper itself, and start a channel for everybody."""
        self.house = house = self._lease_the_function()
        try:
            pidfd_name = f"lease/{house.number}/pidfd"
            await self.host.call(self._scope.put, pidfd_name, [house.peer.pidfd])
            need = self.host.facts.control_bytes
            if need:
                await self.keeper.desk.take_slab(house, need, control=True)
            self._state = MediatorState.create()
            held = [self._state.fd], {"house": int(house.number)}
            await self.host.call(self._scope.put, STATE, *held)
            self.mediator = Mediator(self._state, self._trouble)
            await self._start()
        except BaseException:
            self._move_out()
            raise

    def _move_out_if_empty(self) -> None:
        """After the last mediated lease: the function can be leased otherwise again."""
        if not self.leases and not self._coming:
            self._move_out()

    def _move_out(self) -> None:
        house = self.house
        if house is None or not house.alive:
            return
        self._scope.drop(STATE)
        self._end_thread()
        house.signal(hung_up=True, goodbye=True)
        self._moved_out.clear()
        self.keeper.end(house, "no mediated lease is left")

    def _lease_the_function(self) -> Lease:
        """The whole function for nobody but the keeper. Raises Busy if others have any of it."""
        channels = self.host.claim(Access.EXCLUSIVE, None)
        peer = pidfd.Peer(
            pid=os.getpid(), uid=os.getuid(), gid=os.getgid(), pidfd=pidfd.open_self()
        )
        lease = self.keeper.new_lease(peer)
        lease.machine = Machine(Policy.DRAIN)
        lease.claimed = True
        lease.access, lease.channels = Access.EXCLUSIVE, channels
        lease.note("the keeper posts for mediated leases")
        self.keeper.journal.lease(lease.record())
        self.keeper.leases[lease.number] = lease
        return lease

    # -- succession ------------------------------------------------------------

    def adopt(self, leases: Mapping[LeaseId, Lease]) -> None:
        """Go on where a keeper that was killed stopped; ``leases`` have their memory already.

        The channels are brought to rest, and what was accepted and not told finished is posted
        again. If they do not come to rest, nothing is posted, and it is tried again until they do
        or the death protocol has dealt with them.
        """
        found = self._scope.find(STATE)
        if found is None:
            return
        (fd,), note = found
        house = leases.get(LeaseId(note["house"]))
        if house is None or house.stage is not Stage.ALIVE:
            self._scope.forget(STATE)  # it was moving out: nobody had a mediated lease any more
            return
        self.house = house
        self._state = state = MediatorState(fd)
        self.mediator = mediator = Mediator(state, self._trouble)
        for lease in leases.values():
            if (held := self._scope.find(_rings_of(lease))) is not None:
                self._seat_again(lease, mediator, state, *held)
        mediator.call(mediator.reinstate)
        self.host.keep(self._recover("taken over from a keeper that was killed"))

    def _seat_again(
        self, lease: Lease, mediator: Mediator, state: MediatorState, fds: Sequence[int], note: Any
    ) -> None:
        number = int(lease.number)
        row = state.find_seat(number)
        row = state.take_seat(number) if row is None else row
        ring_fd, submit, done, heard = fds
        mapping = FileMapping(ring_fd, RING_BYTES, dont_fork=True)
        seat = Seat(
            row,
            KeeperEnd(mapping.array.data, *state.counts(row)),
            submit,
            done,
            Limits(*note["limits"]),
            self.keeper.settings.requests,
            self.table_of(lease),
            frozen=lease.stage is not Stage.ALIVE,
        )
        held = MediatedLease(self, lease, seat, ring_fd, mapping, heard, note["window"])
        self.leases[number] = held
        lease.mediated = held
        mediator.call(lambda: mediator.admit(seat))

    @property
    def _scope(self) -> Scope:
        return self.keeper.continuity.scope


def _rings_of(lease: Lease) -> str:
    """Under which name the anchor holds a lease's rings."""
    return f"lease/{lease.number}/rings"
