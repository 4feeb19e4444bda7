# SPDX-License-Identifier: Apache-2.0
"""One page of leases, as whoever asks may see them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

from holdfast.keeper.admission import visible
from holdfast.keeper.lease import Lease
from holdfast.kernel.pidfd import Peer
from holdfast.wire import lease as wire


def page(
    history: Iterable[dict[str, Any]],
    leases: Iterable[Lease],
    after: int,
    viewer: Peer | None,
    run: str,
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
