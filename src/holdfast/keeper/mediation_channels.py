# SPDX-License-Identifier: Apache-2.0
"""The channels that a keeper posts on for mediated leases, and the thread that does it.

What stops, starts and hands over the channels is here; who has leases is
:mod:`holdfast.keeper.mediation`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final, TypeVar

from holdfast.contracts import Doorbell
from holdfast.errors import Closed, HoldfastError, StaysStuck
from holdfast.keeper import asking
from holdfast.keeper.describe import close_bells, control_memory
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.lease import Lease
from holdfast.keeper.mediation_state import MediatorState
from holdfast.keeper.mediator import Mediator
from holdfast.kernel import events
from holdfast.poster import Poster

T = TypeVar("T")

DEADLINE: Final = 5.0
"""Seconds for a call of the mediator's thread or of the driver."""
RETRY: Final = 1.0
"""Seconds between two attempts to start a channel that failed."""


class SharedChannels:
    """Channels of one function, while the keeper holds it for mediated leases. Loop only.

    ``house`` is the lease by which it does.
    """

    def __init__(self, host: FunctionHost) -> None:
        self.host = host
        self.house: Lease | None = None
        self.mediator: Mediator | None = None
        self._state: MediatorState | None = None
        self._poster: Poster | None = None
        self._bells: list[tuple[int, Doorbell]] = []
        self._restarting = asyncio.Lock()
        self._begun = 0
        self._succeeded = 0
        """Numbers of the restart that began last, and of the last one that succeeded."""
        self._recovering = False
        self._loop = asyncio.get_running_loop()

    async def ask(self, function: Callable[[Mediator], T]) -> T:
        """Have the mediator's thread call something; StaysStuck if it does not in time."""
        mediator = self.mediator
        if mediator is None:
            raise Closed("nothing is mediated", operation="mediate", target=str(self.host.target))
        try:
            async with asyncio.timeout(DEADLINE):
                return await asyncio.wrap_future(mediator.call(lambda: function(mediator)))
        except TimeoutError:
            raise StaysStuck(
                f"no answer within {DEADLINE:g} s", operation="mediate", target="mediator"
            ) from None

    async def engine_at_rest(self) -> bool:
        """Whether the driver sees nothing in flight for anybody."""
        house, driver = self.house, self.host.driver
        if house is None:
            return True
        return not await self.host.drive(DEADLINE, lambda: asking.in_flight(driver, house.channels))

    async def restart(self, deadline: float = DEADLINE) -> bool:
        """Stop the channels, start them anew, post again what living clients had in flight.

        False if the function did not acknowledge the stop; ``deadline`` seconds bound it. Then
        nothing is posted until a later attempt succeeds: a channel that was told to stop may be
        stopped by now. One that began after it was asked for serves everybody who asked.
        """
        house, driver = self.house, self.host.driver
        if house is None:
            return True
        asked = self._begun
        async with self._restarting:
            if self._succeeded > asked:
                return True
            self._begun += 1
            await self.ask(Mediator.pause)
            stopped = False
            try:
                stopped = await self.host.drive(
                    deadline, lambda: asking.stop(driver, house.channels)
                )
                if stopped:
                    await self.ask(Mediator.detach)
                    await self._start()
                    self._succeeded = self._begun
            except BaseException:
                stopped = False
                raise
            finally:
                if not stopped:
                    self._in_trouble("the engine did not acknowledge a stop")
            return stopped

    async def _start(self) -> None:
        """Grant the stopped channels anew and hand them to the mediator."""
        host, driver, house = self.host, self.host.driver, self.house
        assert house is not None
        with ExitStack() as stack:
            control = control_memory(house, stack)
            house.grant = await host.drive(
                DEADLINE, lambda: driver.grant(house.channels[:1], control)
            )
            fresh = await host.call(host.bells_for, house.grant.bells)
            try:
                poster = await host.drive(
                    DEADLINE,
                    lambda: driver.poster(house.channels[:1], control, _ringer(fresh)),
                )
                vectors = [
                    -1 if lane.vector is None else host.irq_fds[lane.vector]
                    for lane in poster.lanes
                ]
                await self.ask(lambda m: m.install(poster, vectors))
            except BaseException:
                close_bells(fresh)
                raise
        old, self._bells = self._bells, fresh
        close_bells(old)
        self._poster = poster

    def _trouble(self, why: str) -> None:
        """Called from the mediator's thread: it has paused."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._in_trouble, why)

    def _in_trouble(self, why: str) -> None:
        if not self._recovering and self.mediator is not None:
            self._recovering = True
            self.host.keep(self._recover(why))

    async def _recover(self, why: str) -> None:
        """Start the channels anew, as soon as the function can be used."""
        try:
            while (house := self.house) is not None and self.mediator is not None:
                house.note(why)
                await self.host.usable.wait()
                with contextlib.suppress(HoldfastError):
                    if await self.restart():
                        return
                await asyncio.sleep(RETRY)
        finally:
            self._recovering = False

    def describe(self) -> dict[str, Any] | None:
        """What ``ps`` tells of the mediator, if there is one: work done, processor seconds used by
        its thread and by the whole keeper."""
        mediator = self.mediator
        if mediator is None:
            return None
        return {
            "requests": mediator.requests,
            "batches": mediator.batches,
            "cpu_s": mediator.cpu_seconds(),
            "keeper_cpu_s": time.process_time(),
        }

    def _end_thread(self) -> None:
        mediator, self.mediator = self.mediator, None
        if mediator is not None:
            mediator.close()  # it never blocks, so neither does this
        if self._state is not None:
            self._state.close()
            self._state = None
        self._poster = None
        close_bells(self._bells)
        self._bells = []

    def close(self) -> None:
        """The keeper ends: nothing is posted any more. Idempotent."""
        self._end_thread()


def _ringer(
    doorbells: list[tuple[int, Doorbell]],
) -> Callable[[int, int], Callable[[int], None] | None]:
    """Finds a doorbell's bell by BAR and offset."""
    found = {(bar, bell.info.offset): bell.fd for bar, bell in doorbells}

    def bell(bar: int, offset: int) -> Callable[[int], None] | None:
        fd = found.get((bar, offset))
        return None if fd is None else lambda count: events.ring(fd, count)

    return bell
