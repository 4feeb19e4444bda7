# SPDX-License-Identifier: Apache-2.0
"""One mediated lease as the rest of the keeper sees it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from holdfast.errors import Busy
from holdfast.keeper.mediation_parts import Seat
from holdfast.kernel.mapping import Mapping

if TYPE_CHECKING:
    from holdfast.keeper.lease import Lease
    from holdfast.keeper.mediation import Mediation

REST_LOOKS: Final = 30
REST_POLL: Final = 0.001
"""How often to look whether a living client's slab is out of use, and seconds between two looks."""


@dataclass(slots=True, eq=False)
class MediatedLease:
    """One mediated lease: its seat, and what the death protocol asks of it. Loop only."""

    mediation: Mediation
    lease: Lease
    seat: Seat
    ring_fd: int
    mapping: Mapping
    heard: int
    """The client's end of the bell that is rung for it."""
    window: int | None = None
    rested: bool = False
    """The engine was seen at rest, or stopped, after the last request had finished."""

    def descriptors(self) -> list[int]:
        """Rings and bells; a successor of this keeper needs them in this order."""
        return [self.ring_fd, self.seat.submit, self.seat.done, self.heard]

    def note(self) -> dict[str, Any]:
        """The rest of it; JSON-able."""
        limits = self.seat.limits
        return {
            "window": self.window,
            "limits": [limits.card_first, limits.card_end, limits.align],
        }

    async def refresh(self) -> None:
        """The lease has got memory: requests may name it."""
        table = self.mediation.table_of(self.lease)
        await self.mediation.ask(lambda m: m.extend(self.seat, table))

    async def withdraw(self, slab: int) -> None:
        """Requests may not name this slab any more, and none that did is under way; or Busy."""
        table = self.mediation.table_of(self.lease, but=slab)
        if await self.mediation.ask(lambda m: m.withdraw(self.seat, table)):
            # What has finished may still be landing.
            for _ in range(REST_LOOKS):
                if await self.mediation.engine_at_rest():
                    return
                await asyncio.sleep(REST_POLL)
        await self.refresh()
        raise Busy(
            "transfers are in flight",
            operation="give slab back",
            target=str(self.mediation.host.target),
            hint="wait for them and try again; the slab goes with the lease at the latest",
        )

    async def freeze(self) -> int:
        """Read the ring no more; returns what is in flight."""
        return await self.mediation.ask(lambda m: m.freeze(self.seat))

    async def in_flight(self) -> int:
        """Requests accepted and not seen finished."""
        if self.mediation.mediator is None:
            # The channels went their own way to quiet, with the lease that held them.
            return 0 if self.mediation.house is None else self.seat.in_flight
        return await self.mediation.ask(lambda _: self.seat.in_flight)

    async def stop(self, deadline: float) -> bool:
        """See to it that nothing of this frozen lease is under way; True if that was proven.

        ``deadline`` seconds bound the stop of the channels, if there has to be one.
        """
        self.seat.dropped = True  # whatever happens to the channels, it is not posted again
        if not self.rested and not await self.in_flight():
            self.rested = await self.mediation.engine_at_rest()
        if not self.rested:
            self.rested = await self.mediation.restart(deadline) and not await self.in_flight()
        return self.rested
