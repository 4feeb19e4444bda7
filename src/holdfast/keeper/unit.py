# SPDX-License-Identifier: Apache-2.0
"""The functions that one keeper process must hold together, and what they share.

Facts. An IOMMU group opens once, and its functions see one I/O address space: what is mapped for
one of them, the others can reach. A client to which a BAR was mapped may have passed the window or
the device's descriptor on, and neither can be taken back.

Consequence. Functions of one group have one keeper process, which hands out IOVAs from one space.
And before a function whose registers are mapped goes from one user to another, somebody has to
prove that the first one has nothing left.

Choice. Only the kernel can prove it. Everything is closed and opened again: a group (or a device
bound to an iommufd) that opens has no other holder, and the kernel has reset the function
meanwhile (drivers/vfio/group.c ``vfio_group_fops_open``, vfio_main.c ``vfio_df_open``). If it does
not open, the new lease is refused, and tried again with the next one.

Cost. No function of the group can have a lease at that moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from holdfast.contracts import FunctionBackend
from holdfast.errors import Busy
from holdfast.values import Target

if TYPE_CHECKING:
    from holdfast.keeper.server import Keeper

REOPEN_DEADLINE = 60.0
"""Seconds that closing and opening everything may take: each close may reset a function."""


@dataclass(slots=True)
class Unit:
    """Keepers of one isolation unit, in one process and on one loop."""

    connect: Callable[[Target], FunctionBackend] | None = None
    """Opens a function anew; None if there is nothing that could be proven by it."""
    keepers: list[Keeper] = field(default_factory=list)
    user: int | None = None
    """The one user whose leases have had registers mapped since everything was opened last."""
    opened: bool = True
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def idle(self, seconds: float) -> bool:
        """Whether no keeper of the unit has had a client for so long."""
        return all(keeper.idle_for() >= seconds for keeper in self.keepers)

    def stop(self) -> None:
        """End them all."""
        for keeper in self.keepers:
            keeper.stop()

    async def hand_over(self, to: Keeper, uid: int | None) -> None:
        """See to it that nobody but user ``uid`` (None: nobody at all) can reach the registers of
        any function here.

        Under :attr:`lock`, until the lease exists for which it is done. Raises Busy while it cannot
        be proven; the functions are closed then, and tried again with the next lease.
        """
        mapped = any(region.areas for region in to.host.backend.regions)
        if self.connect is None or not mapped:
            return
        if not self.opened or self.user not in (None, uid):
            self._require_no_lease()
            await self._open_again(to)
        self.user = uid

    def _require_no_lease(self) -> None:
        for keeper in self.keepers:
            pids = [lease.peer.pid for lease in keeper.leases.values()]
            if pids:
                raise Busy(
                    f"user {self.user} still has leases (pid {pids})",
                    operation="open",
                    target=str(keeper.host.target),
                    hint="registers that are mapped into a process are for one user at a time",
                )

    async def _open_again(self, to: Keeper) -> None:
        for keeper in self.keepers:
            keeper.unwatch()
        await to.host.call_within(REOPEN_DEADLINE, self._reopen)
        for keeper in self.keepers:
            keeper.watch()

    def _reopen(self) -> None:
        """Close everything, then open it. Blocking."""
        assert self.connect is not None
        self.opened = False
        hosts = [keeper.host for keeper in self.keepers]
        for host in hosts:
            # The anchor's duplicates would hold the group as well as anybody's.
            host.holder.release("backend")
            host.backend.close()
        fresh: list[FunctionBackend] = []
        try:
            for host in hosts:
                fresh.append(self.connect(host.target))  # noqa: PERF401 - closed if one fails
            for host, backend in zip(hosts, fresh, strict=True):
                host.replace_backend(backend)
        except BaseException:
            for backend in fresh:
                backend.close()
            raise
        self.opened = True
