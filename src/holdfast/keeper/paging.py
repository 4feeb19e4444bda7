# SPDX-License-Identifier: Apache-2.0
"""Which leases go into one answer to ``ps``: only those are described."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from heapq import nsmallest
from itertools import chain
from typing import Any

from holdfast.keeper.lease import Lease
from holdfast.values import LeaseId


def first_after(
    after: int,
    count: int,
    ended: Iterable[dict[str, Any]],
    living: Mapping[LeaseId, Lease],
) -> list[dict[str, Any]]:
    """The ``count`` leases with the lowest numbers above ``after``, ended or living, in order.

    ``ended`` are descriptions. With a thousand leases it is the describing that takes time, on the
    loop that serves all of them.
    """
    told = {int(one["lease"]): one for one in ended if one["lease"] > after}
    numbers = nsmallest(count, chain(told, (int(one) for one in living if one > after)))
    return [told.get(number) or living[LeaseId(number)].describe() for number in numbers]
