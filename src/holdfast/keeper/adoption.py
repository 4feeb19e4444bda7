# SPDX-License-Identifier: Apache-2.0
"""The leases of a keeper that was killed, as its successor takes them over."""

from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING

from holdfast.errors import HoldfastError
from holdfast.keeper.aftermath import give_channels_back
from holdfast.keeper.connection import Connection
from holdfast.keeper.held import find_handover
from holdfast.keeper.journal import Contents, Corrupt, Stage, What
from holdfast.keeper.lease import HeldPin, HeldSlab, Lease
from holdfast.keeper.map_state import REACHABLE, MapState
from holdfast.keeper.proving import Proving
from holdfast.keeper.unmapping import page_span
from holdfast.kernel import pidfd
from holdfast.values import LeaseId

if TYPE_CHECKING:
    from holdfast.keeper.server import Keeper


def adopt_leases(keeper: Keeper, contents: Contents) -> None:
    """Take every lease over: living ones go on, dying ones die from the beginning.

    The function may have been isolated for a lease whose memory is back since; whoever lives is
    told, and it is connected again. Loop only, before the first client is accepted.
    """
    leases = {number: _recall(keeper, number, contents) for number in sorted(contents.leases)}
    _adopt_memory(keeper, contents, leases)
    _adopt_pins(keeper, contents, leases)
    _forget_rest(keeper, contents)
    if not keeper.host.usable.is_set():
        keeper.host.keep(_reconnect_if_free(keeper))
    keeper.mediation.adopt(leases)
    for lease in leases.values():
        _go_on(keeper, lease, contents)


def _recall(keeper: Keeper, number: LeaseId, contents: Contents) -> Lease:
    held = keeper.continuity.scope.find(f"lease/{number}/pidfd")
    # The last thing that goes of a lease; one whose channels are withheld has none any more.
    fd = held[0][0] if held is not None else pidfd.open_self()
    lease = Lease.recall(contents.leases[number], fd)
    lease.recorder = keeper.log.step
    return lease


def _adopt_memory(keeper: Keeper, contents: Contents, leases: dict[LeaseId, Lease]) -> None:
    desk = keeper.desk
    for entry in contents.entries.values():
        if entry.what in (What.SLAB, What.CONTROL) and entry.state in REACHABLE:
            handover = find_handover(keeper.continuity.scope, f"slab/{entry.held}")
            if handover is None:
                raise Corrupt(f"slab {entry.held} is not held", operation="take over")
            memory = keeper.host.source.adopt(handover)
            slab = HeldSlab(entry.held, memory, entry.size, [entry.iova], entry, entry.seq)
            _give(leases[entry.lease], slab, entry.what)
            desk.ledger.adopt(entry.lease, entry.size, leases[entry.lease].peer.uid)
    for record in contents.memory.values():
        handover = find_handover(keeper.continuity.scope, f"slab/{record.number}")
        if handover is None:
            raise Corrupt(f"slab {record.number} is not held", operation="take over")
        memory = keeper.host.source.adopt(handover)
        iovas = desk.fixed_iovas(memory)
        slab = HeldSlab(record.number, memory, record.size, iovas, None, record.seq)
        _give(leases[record.lease], slab, record.what)
        desk.ledger.adopt(record.lease, record.size, leases[record.lease].peer.uid)


def _give(lease: Lease, slab: HeldSlab, what: What) -> None:
    if what is What.CONTROL:
        lease.control = slab
    else:
        lease.slabs[slab.number] = slab


def _adopt_pins(keeper: Keeper, contents: Contents, leases: dict[LeaseId, Lease]) -> None:
    scope = keeper.continuity.scope
    for entry in contents.entries.values():
        if entry.what in (What.RELAYED, What.IN_PLACE) and entry.state in REACHABLE:
            in_place = entry.what is What.IN_PLACE
            pin = HeldPin(entry.held, entry.iova, entry.size, entry, in_place)
            leases[entry.lease].pins[pin.number] = pin
            keeper.desk.ledger.adopt(entry.lease, entry.size, leases[entry.lease].peer.uid)
    for number, lease in leases.items():
        held = scope.find(f"lease/{number}/memory")
        if held is not None:
            lease.own_memory, lease.memory_held = held[0][0], True


def _forget_rest(keeper: Keeper, contents: Contents) -> None:
    """What was put with the anchor and never written down: nothing was ever done with it."""
    scope = keeper.continuity.scope
    slabs = {entry.held for entry in contents.entries.values() if entry.state in REACHABLE}
    slabs |= set(contents.memory)
    for name in scope.names("slab/"):
        if int(name.partition("/")[2]) not in slabs:
            scope.forget(name)
    for name in scope.names("lease/"):
        if LeaseId(int(name.split("/")[1])) not in contents.leases:
            scope.forget(name)


def _go_on(keeper: Keeper, lease: Lease, contents: Contents) -> None:
    if lease.stage is Stage.WITHHELD:
        ranges = [
            page_span(entry)
            for entry in contents.entries.values()
            if entry.lease == lease.number and entry.state is MapState.RETIRED
        ]
        _go_on_withholding(keeper, lease)
        deadlines = keeper.settings.deadlines
        proving = Proving(lease, keeper.host, keeper.desk, deadlines, keeper, ranges)
        keeper.host.keep(give_channels_back(proving))
        return
    keeper.leases[lease.number] = lease
    if lease is keeper.mediation.house:
        return  # its client was the predecessor, and is this keeper now
    held = keeper.continuity.scope.find(f"lease/{lease.number}/socket")
    if held is None:
        lease.signal(hung_up=True)
    if lease.stage is Stage.ENDING:
        keeper.end(lease, "its keeper was killed while it was dying")
    else:
        lease.note("taken over from a keeper that was killed")
        if held is None:
            keeper.end(lease, "its connection hung up")
    keeper.watch_client(lease)
    if held is not None:
        keeper.attend_again(lease, Connection(socket.socket(fileno=held[0][0]), keeper.traffic))


def _go_on_withholding(keeper: Keeper, lease: Lease) -> None:
    """The signs of death that a released lease still lacks; they were let go of when they came."""
    scope = keeper.continuity.scope
    if scope.find(f"lease/{lease.number}/socket") is None:
        lease.signal(hung_up=True)
    if scope.find(f"lease/{lease.number}/pidfd") is None:
        lease.signal(process_dead=True)
        os.close(lease.peer.pidfd)
    else:
        keeper.watch_client(lease)


async def _reconnect_if_free(keeper: Keeper) -> None:
    """A predecessor was killed with bus mastering off: who lives must know, and go on."""
    keeper.announce("isolated", "bus mastering was off when the keeper was killed", but=None)
    if keeper.dying:
        return  # the last of them turns it on
    try:
        await keeper.host.restore(keeper.settings.deadlines.reset)
    except HoldfastError as error:
        sys.stderr.write(f"holdfast: {keeper.host.target} is not usable again: {error}\n")
