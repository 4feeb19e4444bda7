# SPDX-License-Identifier: Apache-2.0
"""After a dead lease's memory is back: the function made usable again, its channels given back.

What was proven quiet comes back at once. A lease that ended UNMAPPED was not: its channels and
IOVAs are withheld until the engine is seen at rest, because a late write would land in whatever is
mapped at the same IOVA next. And a function that cannot be set up again now (its driver hangs, a
reset is still under way) is tried again, for as long as the keeper lives.
"""

from __future__ import annotations

import asyncio

from holdfast.errors import HoldfastError
from holdfast.keeper.journal import Stage
from holdfast.keeper.proving import Proving
from holdfast.keeper.state import QUIET_PROOFS, Fact
from holdfast.values import Policy


async def give_channels_back(proving: Proving) -> None:
    """Give a released lease's channels back, now or as soon as it can be."""
    proving.host.isolated.discard(proving.lease.number)
    if proving.lease.claimed:
        proving.lease.stage = Stage.WITHHELD
    if not await _try(proving):
        proving.host.keep(_try_again(proving))


async def _try_again(proving: Proving) -> None:
    pause = proving.deadlines.quarantine
    while not proving.host.proven_gone():
        await asyncio.sleep(pause)
        pause = min(2 * pause, proving.deadlines.quarantine_longest)
        if await _try(proving):
            return


async def _try(proving: Proving) -> bool:
    """Whether the function is usable (or a dead lease still keeps it from being so)."""
    lease, host = proving.lease, proving.host
    try:
        was_off = not host.usable.is_set()
        await host.restore(proving.deadlines.reset)
        if was_off and host.usable.is_set():
            await proving.announcer.restored()
        if lease.grant.vectors:
            await host.call(host.renew_vectors, lease.grant.vectors)
    except HoldfastError as error:
        said = f"the function is not usable again: {error.what}"
        if lease.log[-1].why != said:
            lease.note(said)
        return False
    proven = bool(lease.machine.facts & (QUIET_PROOFS | {Fact.FUNCTION_GONE}))
    if proven or lease.machine.policy is Policy.RELEASE:
        _unclaim(proving)
    elif not host.facts.tells:
        # Nothing is known of this function, so nothing will ever prove it quiet. What the dead
        # lease left behind can only reach IOVAs that are never handed out again.
        lease.note("IOVAs retired for good: no driver can prove the function quiet")
        _unclaim(proving)
    else:
        lease.note("channels and IOVAs withheld until proven quiet")
        host.keep(_withheld(proving))
    return True


async def _withheld(proving: Proving) -> None:
    """After UNMAPPED: wait for the engine's own idle, then reinstate IOVAs and channels.

    Not while somebody may still hold a window to the engine: what he posts names these IOVAs.
    """
    pause = proving.deadlines.quarantine
    while not proving.host.proven_gone():
        await asyncio.sleep(pause)
        pause = min(2 * pause, proving.deadlines.quarantine_longest)
        try:
            # Told to stop first: nobody waits for what it was at any more.
            if not await proving.stop() or not proving.cannot_post() or not await proving.at_rest():
                continue
            await proving.flush()  # what it sent before must not arrive at an address used again
        except HoldfastError:
            continue
        proving.desk.reinstate(proving.retired)
        _unclaim(proving)
        return


def _unclaim(proving: Proving) -> None:
    lease = proving.lease
    if lease.claimed:
        lease.claimed = False
        proving.host.unclaim(lease.access, lease.channels)
    lease.stage = Stage.ENDING
    proving.announcer.settled(lease)
