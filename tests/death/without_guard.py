# SPDX-License-Identifier: Apache-2.0
"""The ``holdfast`` command with one guard of the death protocol taken out, named first.

The memory of innocents must then be found corrupt: a guard whose loss nobody notices guards
nothing.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, cast

from holdfast.cli import main
from holdfast.dma.iova import IovaSpace
from holdfast.keeper import describe, function, state
from holdfast.keeper.proving import Proving
from holdfast.keeper.quiesce import Quiesce
from holdfast.keeper.state import Event, Fact, State


def deadline_releases() -> None:
    """A drain that takes too long leads to release."""
    index = cast(dict[Any, state.Row], state._INDEX)
    key = State.DRAINING, Event.DEADLINE
    index[key] = replace(index[key], target=State.QUIET)
    for policy in state.RELEASE_GATE:
        cast(Any, state.RELEASE_GATE)[policy] = state.Gate((frozenset(),))


def resets_are_believed() -> None:
    """An acknowledged reset counts, whatever bus mastering and the engine say."""

    async def reset(self: Proving) -> tuple[bool, str]:
        self.final = self.cannot_post()
        await self.host.call_within(self.deadlines.reset, self.host.reset)
        self.lease.machine.observe(Fact.RESET_TRUSTED)
        return True, "reset acknowledged"

    Proving.reset = reset  # type: ignore[method-assign]


def iovas_return() -> None:
    """I/O addresses of a lease that was not proven quiet are handed out again, and soon."""
    IovaSpace.retire = IovaSpace.give_back  # type: ignore[method-assign]


def few_iovas() -> None:
    """The control of that: few addresses, so that one that returns is met at once."""
    vars(function)["usable_range"] = lambda *_: (1 << 16, 9 << 16)


def quarantine_ends() -> None:
    """Quarantine is left after the first look, whatever it found."""

    async def look(self: Quiesce, *, force: bool) -> tuple[Event | None, str]:
        self.proving.final = self.proving.cannot_post()
        self.lease.machine.observe(Fact.IDLE_CONFIRMED)
        return Event.IDLE, "it has been long enough"

    Quiesce._look_again = look  # type: ignore[method-assign]


def engine_bars_are_mapped() -> None:
    """Clients map the engine's registers where nothing translates."""
    describe.may_be_mapped = lambda *_: True


GUARDS = {
    each.__name__: each
    for each in (
        deadline_releases,
        resets_are_believed,
        iovas_return,
        few_iovas,
        quarantine_ends,
        engine_bars_are_mapped,
    )
}

if __name__ == "__main__":
    for name in sys.argv.pop(1).split(","):
        GUARDS[name]()
    main()
