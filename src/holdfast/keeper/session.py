# SPDX-License-Identifier: Apache-2.0
"""One client's requests, answered in order.

A request that fails has no effect and is answered with the error's fields. A message that the
protocol does not allow ends the session: :class:`~holdfast.errors.ProtocolError` passes through to
the keeper, which hangs up. Descriptors that came with a message are closed unless it consumed them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from holdfast import steps
from holdfast.dma.sg import SgList
from holdfast.driver import Grant
from holdfast.errors import (
    Busy,
    DeviceError,
    HoldfastError,
    NotSupported,
    ProtocolError,
    UsageError,
    to_fields,
)
from holdfast.keeper import asking, control, listing
from holdfast.keeper.connection import Connection
from holdfast.keeper.describe import (
    Bells,
    close_bells,
    describe_bells,
    describe_lease,
    describe_slab,
)
from holdfast.keeper.lease import HeldPin, HeldSlab, Lease
from holdfast.keeper.session_function import COMMAND_DEADLINE, FunctionRequests
from holdfast.kernel import disposal
from holdfast.values import Access
from holdfast.wire import lease as wire

if TYPE_CHECKING:
    from holdfast.keeper.server import Keeper

H = TypeVar("H", HeldSlab, HeldPin)


_WITHOUT_LEASE = wire.Open | wire.Ps | wire.Retry | wire.Close
"""What may be asked before a lease is opened."""


class Session(FunctionRequests):
    """Serves one connection until it hangs up. Loop only."""

    def __init__(
        self, keeper: Keeper, lease: Lease, connection: Connection, *, adopted: bool = False
    ) -> None:
        self.keeper = keeper
        self.host = keeper.host
        self.desk = keeper.desk
        self.lease = lease
        self.connection = connection
        self.closed_orderly = False
        self._opened = adopted
        self._adopted = adopted
        self._first = adopted
        """What comes now may have been carried out by a predecessor."""
        self._last_seq = 0
        self._handlers: dict[type[wire.Message], Callable[[Any, list[int]], Awaitable[None]]] = {
            wire.Open: self._open,
            wire.TakeSlab: self._take_slab,
            wire.GiveSlab: self._give_slab,
            wire.Pin: self._pin,
            wire.PinDone: self._pin_done,
            wire.Unpin: self._unpin,
            wire.RegionRead: self.region_read,
            wire.RegionWrite: self.region_write,
            wire.Unmask: self.unmask,
            wire.Command: self.command,
            wire.Regrant: self._regrant,
            wire.Reset: self.reset,
            wire.Ps: self._ps,
            wire.Retry: self._retry,
            wire.Close: self._close,
        }

    async def serve(self) -> None:
        """Answer until hang-up. A frozen lease's messages are read and dropped."""
        while not self.closed_orderly:
            packet, fds = await self.connection.receive()
            if not packet:
                return
            try:
                async with self.lease.serving:
                    if self._opened and not self.lease.alive:
                        continue
                    await self._answer(wire.decode_request(packet), fds)
            finally:
                disposal.discard(fds)

    async def _answer(self, request: wire.Request, fds: list[int]) -> None:
        handler = self._handlers.get(type(request))
        if handler is None:
            raise ProtocolError(f"{type(request).__name__} is out of place", operation="serve")
        if self._adopted and request.seq:
            if request.seq == self._last_seq:
                return  # asked again before it could see the answer
            self._last_seq = request.seq
        try:
            if not self._opened and not isinstance(request, _WITHOUT_LEASE):
                raise UsageError("open a lease first", operation=type(request).__name__)
            await handler(request, fds)
            steps.reach("keeper.answered")
            self._first = self._first and not request.seq
        except ProtocolError:
            raise
        except HoldfastError as error:
            self._first = False
            self.connection.send(wire.Failed(seq=request.seq, error=to_fields(error)))
        except Exception as error:  # noqa: BLE001 - a driver's fault must not look like a hang-up
            told = DeviceError(
                f"{type(error).__name__}: {error}",
                operation=type(request).__name__,
                target=str(self.host.target),
                hint=f"this is a fault in driver {self.host.facts.name} or in the keeper",
            )
            self.connection.send(wire.Failed(seq=request.seq, error=to_fields(told)))

    def notify(self, what: str, text: str) -> None:
        """Tell the client of something it did not ask for."""
        self.connection.send(wire.Notice(what=what, text=text))

    # -- opening ------------------------------------------------------------

    async def _open(self, request: wire.Open, _: list[int]) -> None:
        lease, host = self.lease, self.host
        if self._opened and self._first:
            await self._open_again(request)
            return
        if self._opened:
            raise UsageError("this connection has its lease already", operation="open")
        self.keeper.require_room()  # first, because the reason may last
        if not host.usable.is_set():
            hangs = ", and its driver hangs" if host.driver_lane.stuck else ""
            raise Busy(
                f"the function is being quieted{hangs}",
                operation="open",
                target=str(host.target),
                hint="wait (timeout=...), see holdfast ps",
            )
        default = Access.SHARED if host.facts.channels else Access.EXCLUSIVE
        if request.access is None and request.channels is None:
            default = Access.MEDIATED if self.keeper.mediation.preferred(lease) else default
        lease.access = request.access or default
        # One at a time from the proof that nobody else holds it to the lease that does.
        async with self.keeper.unit.lock:
            await self._claim(request)
        # From here on the lease exists: if anything below fails, it ends like any other.
        self._opened = True
        lease.note("opened")
        steps.reach("keeper.admitted")
        await self._start_channels(request.seq)

    async def _open_again(self, request: wire.Open) -> None:
        """A predecessor had admitted the lease, and was killed before it could say so."""
        await self._wait_usable()
        await self._start_channels(request.seq)

    async def _start_channels(self, seq: int) -> None:
        """Make the lease's channels ready, and answer with the whole of the lease."""
        async with self.host.starting:
            try:
                bells = await self._grant()
            except HoldfastError as error:
                # Say why, then hang up: the client must not take this for a keeper that died.
                self.connection.send(wire.Failed(seq=seq, error=to_fields(error)))
                self.connection.close()
                return
            steps.reach("keeper.granted")
            try:
                self._send_opened(seq, bells)
            finally:
                close_bells(bells)

    async def _claim(self, request: wire.Open) -> None:
        """Take what the lease is for, and let the lease begin; or raise with nothing taken."""
        lease, host = self.lease, self.host
        if lease.access is Access.MEDIATED:
            if request.channels:
                raise UsageError("a mediated lease has no channels", operation="open",
                                 target=str(host.target))  # fmt: skip
            await self.keeper.mediation.begin(lease)
        else:
            if lease.access is Access.EXCLUSIVE or request.channels != 0:
                await self.keeper.unit.hand_over(self.keeper, lease.peer.uid)
            lease.channels = host.claim(lease.access, request.channels)
            lease.claimed = lease.access is Access.EXCLUSIVE or bool(lease.channels)
        try:
            await host.call(self.keeper.anchor_client, lease, self)
            self.keeper.admit(lease, self)
        except BaseException:
            if lease.mediated is not None:
                self.keeper.mediation.leave(lease)
            else:
                host.unclaim(lease.access, lease.channels)
            raise

    async def _grant(self) -> Bells:
        """Make the lease's channels ready: idle, with rings of their own and fresh doorbells."""
        lease, host = self.lease, self.host
        if not lease.claimed:
            return []
        host.require_driver("start channels")
        await host.drive(COMMAND_DEADLINE, self._require_idle)
        need = host.facts.control_bytes * max(1, len(lease.channels))
        if need and lease.control is None:
            await self.desk.take_slab(lease, need, control=True)
        lease.grant = await host.drive(COMMAND_DEADLINE, self._granted)
        lease.granted = True
        self.keeper.journal.lease(lease.record())
        return await host.call(host.bells_for, lease.grant.bells)

    def _granted(self) -> Grant:
        slab, driver = self.lease.control, self.host.driver
        if slab is None:
            return driver.grant(self.lease.channels, None)
        sizes = [size for _, size in slab.memory.extents]
        sg = SgList.of(zip(slab.iovas, sizes, strict=True))
        with control.writable(slab.memory, sg) as memory:
            grant = driver.grant(self.lease.channels, memory)
            memory.flush()
        return grant

    def _require_idle(self) -> None:
        if not self.host.facts.tells:
            return  # a function of which nothing is known: nothing to ask
        if not self.host.rests(self.lease.channels):
            raise Busy("the engine is not at rest", operation="open", target=str(self.host.target))

    def _send_opened(self, seq: int, bells: Bells) -> None:
        fds: list[int] = []
        opened = describe_lease(self.lease, self.host, bells, fds)
        quota = self.keeper.settings.quota
        self.keeper.journal.lease(self.lease.record())  # it may have got registers to map
        self.connection.send(msgspec.structs.replace(opened, seq=seq, quota=quota), fds)

    async def _regrant(self, request: wire.Regrant, _: list[int]) -> None:
        while True:
            await self._wait_usable()
            async with self.host.starting:
                if self.host.usable.is_set():
                    return await self._regrant_now(request)

    async def _wait_usable(self) -> None:
        try:
            async with asyncio.timeout(COMMAND_DEADLINE):
                await self.host.usable.wait()
        except TimeoutError:
            raise Busy(
                "bus mastering stays off: a dead lease is not quiet",
                operation="start channels anew",
                target=str(self.host.target),
                hint="see holdfast ps",
            ) from None

    async def _regrant_now(self, request: wire.Regrant) -> None:
        bells = await self._grant()
        fds: list[int] = []
        told = describe_bells(bells, fds)
        try:
            self.connection.send(
                wire.Regranted(seq=request.seq, bells=told, grant=dict(self.lease.grant.info)),
                fds,
            )
        finally:
            close_bells(bells)

    async def _close(self, request: wire.Close, _: list[int]) -> None:
        # Once this is answered the client may use its pinned memory for something else.
        if any(pin.in_place for pin in self.lease.pins.values()):
            await self._let_finish()
        await self.desk.unpin_all(self.lease)
        self.closed_orderly = True
        if self._opened:
            self.lease.goodbye = True
            self.keeper.journal.lease(self.lease.record())
        self.connection.send(wire.Done(seq=request.seq))

    async def _let_finish(self) -> None:
        """Wait a while for what is in flight: what is cut off by an unmap may fault the function.

        The unmap that follows does not depend on it.
        """
        driver, channels = self.host.driver, self.lease.channels
        pause = 0.0003
        with contextlib.suppress(HoldfastError, TimeoutError):
            async with asyncio.timeout(COMMAND_DEADLINE):
                while await self.host.drive(
                    COMMAND_DEADLINE, lambda: asking.in_flight(driver, channels)
                ):
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 0.002)

    # -- memory ------------------------------------------------------------

    async def _take_slab(self, request: wire.TakeSlab, _: list[int]) -> None:
        slab = self._answered(self.lease.slabs, request.seq)
        if slab is None:
            self.keeper.require_room("alloc")
            slab = await self.desk.take_slab(self.lease, request.nbytes, seq=request.seq)
        if self.lease.mediated is not None:
            await self.lease.mediated.refresh()
        fds: list[int] = []
        info = describe_slab(slab, fds)
        self.connection.send(wire.SlabTaken(seq=request.seq, info=info), fds)

    def _answered(self, held: dict[int, H], seq: int) -> H | None:
        """What a predecessor had ready for this very request, and could not tell."""
        if self._first:
            for one in held.values():
                if one.seq == seq:
                    return one
        return None

    async def _give_slab(self, request: wire.GiveSlab, _: list[int]) -> None:
        if self._first and request.slab not in self.lease.slabs:
            self.connection.send(wire.Done(seq=request.seq))  # a predecessor had taken it back
            return
        driver, channels = self.host.driver, self.lease.channels
        busy = 0
        if self.lease.claimed:
            busy = await self.host.drive(
                COMMAND_DEADLINE, lambda: asking.in_flight(driver, channels)
            )
        if busy:
            raise Busy(
                "transfers of this lease are in flight",
                operation="give slab back",
                target=str(self.host.target),
                hint="wait for them; the slab goes with the lease at the latest",
            )
        if self.lease.mediated is not None:
            await self.lease.mediated.withdraw(request.slab)
        await self.desk.give_slab(self.lease, request.slab)
        self.connection.send(wire.Done(seq=request.seq))

    async def _pin(self, request: wire.Pin, fds: list[int]) -> None:
        self.require_direct("pin", "copy through a buffer: the client half of the lease does")
        if fds:
            await self.desk.accept_own_memory(self.lease, fds.pop(0))
        address, nbytes = request.address, request.nbytes
        context = self.host.backend.dma_context()
        known = self._answered(self.lease.pins, request.seq)
        if context is None:
            pin = known or await self.desk.pin(
                self.lease, address, nbytes, writable=request.writable, seq=request.seq
            )
            self.connection.send(wire.Pinned(seq=request.seq, pin=pin.number, iova=int(pin.iova)))
            return
        if not self.lease.claimed:
            raise NotSupported("a lease of memory only cannot pin in place", operation="pin",
                               target=str(self.host.target))  # fmt: skip
        pin = known or await self.desk.reserve_pin(self.lease, address, nbytes, seq=request.seq)
        here = wire.PinHere(
            seq=request.seq,
            pin=pin.number,
            iova=int(pin.iova),
            size=pin.size,
            kind=context.kind,
            ioas=context.ioas,
        )
        self.connection.send(here, [context.fd])

    async def _pin_done(self, request: wire.PinDone, _: list[int]) -> None:
        try:
            self.desk.confirm_pin(self.lease, request.pin)
        except UsageError as error:  # nobody waits for an answer
            raise ProtocolError(error.what, operation="pin") from error

    async def _unpin(self, request: wire.Unpin, _: list[int]) -> None:
        if not self._first or request.pin in self.lease.pins:
            await self.desk.unpin(self.lease, request.pin)
        self.connection.send(wire.Done(seq=request.seq))

    async def _ps(self, request: wire.Ps, _: list[int]) -> None:
        await self.host.call(self.keeper.link.refresh)
        told = listing.tell(self.keeper, request.after, self.lease.peer, request.run)
        told["you"] = int(self.lease.number)
        self.connection.send(wire.Result(seq=request.seq, value=told))

    async def _retry(self, request: wire.Retry, _: list[int]) -> None:
        told = await self.keeper.retry(request.lease, self.lease.peer.uid, force=request.force)
        self.connection.send(wire.Result(seq=request.seq, value=told))
