# SPDX-License-Identifier: Apache-2.0
"""Requests of a client that go to the function itself: registers, commands, reset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.errors import BadAccess, Busy, NotSupported, UsageError
from holdfast.keeper.connection import Connection
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.lease import Lease
from holdfast.uapi import pci_regs
from holdfast.values import CONFIG_REGION, Access, IrqIndex
from holdfast.wire import lease as wire

if TYPE_CHECKING:
    from holdfast.keeper.server import Keeper

COMMAND_DEADLINE = 5.0
"""Seconds that a driver command may take."""


class FunctionRequests:
    """What a session answers by asking the function. Loop only."""

    keeper: Keeper
    host: FunctionHost
    lease: Lease
    connection: Connection

    def require_direct(self, operation: str, hint: str) -> None:
        if self.lease.mediated is not None:
            raise NotSupported("a mediated lease only posts requests", operation=operation,
                               target=str(self.host.target), hint=hint)  # fmt: skip

    async def region_read(self, request: wire.RegionRead, _: list[int]) -> None:
        self._check_region(request.index, request.offset, request.count)
        data = await self.host.call(
            self.host.backend.region_read, request.index, request.offset, request.count
        )
        self.connection.send(wire.Data(seq=request.seq, data=data))

    async def region_write(self, request: wire.RegionWrite, _: list[int]) -> None:
        self._check_region(request.index, request.offset, len(request.data))
        if request.index == CONFIG_REGION:
            self._check_config_write(request.offset, len(request.data))
        await self.host.call(
            self.host.backend.region_write, request.index, request.offset, request.data
        )
        self.connection.send(wire.Done(seq=request.seq))

    def _check_config_write(self, offset: int, count: int) -> None:
        """The header is the keeper's: a client that sets bus master undoes a dead lease's stop."""
        target = f"{self.host.target} config"
        if self.lease.access is not Access.EXCLUSIVE:
            raise NotSupported("only an exclusive lease may write", operation="write",
                               target=target)  # fmt: skip
        if offset < pci_regs.STD_HEADER_SIZE and offset + count > pci_regs.COMMAND:
            raise BadAccess(
                f"{count} bytes at {offset:#x} touch the header, which belongs to the keeper",
                operation="write",
                target=target,
                hint="command register and base addresses are set up when the function is opened",
            )

    async def unmask(self, request: wire.Unmask, _: list[int]) -> None:
        if self.host.irq_index is IrqIndex.INTX and self.lease.grant.vectors:
            await self.host.call(self.host.backend.unmask_intx)
        self.connection.send(wire.Done(seq=request.seq))

    def _check_region(self, index: int, offset: int, count: int) -> None:
        regions = self.host.backend.regions
        identity = self.lease.mediated is not None and index == CONFIG_REGION
        if not self.lease.claimed and not identity:
            raise NotSupported("a lease without channels has no registers", operation="access")
        if index >= len(regions) or offset + count > regions[index].size:
            raise BadAccess(
                f"{count} bytes at {offset:#x} of region {index}",
                operation="access",
                target=str(self.host.target),
            )

    async def command(self, request: wire.Command, _: list[int]) -> None:
        self.require_direct("command", "commands act on channels of one's own")
        self.host.require_driver("command")
        channels = self.lease.channels

        def carry_out() -> object:
            commands = self.host.driver.commands()
            found = commands.get(request.name)
            if found is None:
                raise NotSupported(
                    f"driver {self.host.facts.name} has no command {request.name!r}",
                    operation="command",
                    target=str(self.host.target),
                    hint=f"it has: {', '.join(sorted(commands)) or 'none'}",
                )
            try:
                return found(channels, **request.args)
            except (TypeError, ValueError) as error:
                raise UsageError(str(error), operation=f"command {request.name}") from error

        value = await self.host.drive(COMMAND_DEADLINE, carry_out)
        self.connection.send(wire.Result(seq=request.seq, value=value))

    async def reset(self, request: wire.Reset, _: list[int]) -> None:
        host = self.host
        if not self.lease.claimed:
            raise NotSupported("a lease without channels cannot reset", operation="reset")
        async with host.starting:
            if not host.usable.is_set():
                # Setting the function up again would turn bus mastering on under a dead lease
                # that is not proven quiet.
                raise Busy(
                    "a dead lease is being quieted", operation="reset", target=str(host.target)
                )
            host.require_driver("reset")
            host.disturbed += 1
            await host.call(host.reset)
            try:
                await host.drive(COMMAND_DEADLINE, host.reconnect)
            finally:
                # Told after the fact: who starts its channels anew upon this must not lose them.
                self.keeper.announce("reset", "another lease reset the function", but=self.lease)
        self.connection.send(wire.Done(seq=request.seq))
