# SPDX-License-Identifier: Apache-2.0
"""What a keeper tells of itself and its leases, as whoever asks may see them."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from holdfast.keeper.admission import visible
from holdfast.keeper.lease import Lease
from holdfast.kernel.pidfd import Peer
from holdfast.wire import lease as wire

if TYPE_CHECKING:
    from holdfast.keeper.server import Keeper


def tell(keeper: Keeper, after: int, viewer: Peer | None = None, run: int = 0) -> dict[str, Any]:
    """What ``holdfast ps`` prints: leases in the order of their numbers, a page at a time.

    As ``viewer`` may see them; None is the keeper itself. With ``run`` only those of one run.
    """
    every, more = page(keeper.history, keeper.leases.values(), after, viewer, run)
    host, link = keeper.host, keeper.link
    return {
        "target": str(host.target),
        "keeper": os.getpid(),
        "anchor": link.pid,
        "standby": link.standby,
        "safe_mode": keeper.continuity.safe_mode,
        "successions": keeper.continuity.counters.successions,
        "function": host.child.pid if host.child is not None else None,
        "driver": host.facts.name,
        "policy": str(keeper.settings.policy),
        "leases": every,
        "more": more,
        "opening": sum(bool(run) and lease.run == run for lease in keeper.greeted.values()),
        "free_channels": sorted(host.free_channels),
        "mediator": keeper.mediation.describe(),
        "quarantined_bytes": keeper.quarantined(),
        "unaccounted_bytes": keeper.unaccounted(),
        "packets": keeper.traffic.packets,
    }


def page(
    history: Iterable[dict[str, Any]],
    leases: Iterable[Lease],
    after: int,
    viewer: Peer | None,
    run: int,
) -> tuple[list[dict[str, Any]], bool]:
    """The first leases numbered above ``after``, ended or not, and whether there are more.

    With ``run`` only those of one ``holdfast run``. Only what is on the page is described: who asks
    again and again must not cost more than that.
    """
    ended = {
        int(told["lease"]): told
        for told in history
        if told["lease"] > after and (not run or told["run"] == run)
    }
    living = {
        int(lease.number): lease
        for lease in leases
        if lease.number > after and (not run or lease.run == run)
    }
    numbers = heapq.nsmallest(wire.PS_PAGE + 1, ended.keys() | living.keys())
    told = [
        living[number].describe() if number in living else ended[number]
        for number in numbers[: wire.PS_PAGE]
    ]
    shown = wire.page_of([visible(each, viewer, run) for each in told])
    return shown, len(numbers) > len(shown)
