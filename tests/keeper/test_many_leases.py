# SPDX-License-Identifier: Apache-2.0
"""What the keeper does for each of many leases is done for those that are asked about only."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.keeper.lease import Lease
from holdfast.keeper.paging import first_after
from holdfast.keeper.sparse_event import SparseEvent
from holdfast.values import LeaseId


class FakeLease:
    """Counts how often it was described."""

    described = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def describe(self) -> dict[str, Any]:
        FakeLease.described += 1
        return {"lease": self.number, "state": "alive"}


def living(numbers: set[int]) -> dict[LeaseId, Lease]:
    return {LeaseId(number): cast(Lease, FakeLease(number)) for number in sorted(numbers)}


@given(
    st.sets(st.integers(1, 60)), st.sets(st.integers(1, 60)), st.integers(0, 60), st.integers(1, 9)
)
def test_a_page_has_the_lowest_numbers_in_order_and_describes_no_other_lease(
    alive: set[int], over: set[int], after: int, count: int
) -> None:
    FakeLease.described = 0
    ended = [{"lease": number, "state": "released"} for number in over - alive]
    page = first_after(after, count, reversed(ended), living(alive))
    wanted = sorted(number for number in alive | over if number > after)[:count]
    assert [lease["lease"] for lease in page] == wanted
    assert [lease["state"] for lease in page] == [
        "alive" if number in alive else "released" for number in wanted
    ]
    assert FakeLease.described == len(alive & set(wanted))


def test_a_sparse_event_wakes_all_who_wait_and_lets_later_ones_pass() -> None:
    async def scenario() -> None:
        event = SparseEvent()
        waiting = [asyncio.create_task(event.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        event.set()
        await asyncio.gather(*waiting)
        await event.wait()
        assert event.is_set()

    asyncio.run(scenario())


@pytest.mark.parametrize("waited_before", [False, True])
def test_a_cleared_sparse_event_waits_again(waited_before: bool) -> None:
    async def scenario() -> None:
        event = SparseEvent()
        if waited_before:
            task = asyncio.create_task(event.wait())
            await asyncio.sleep(0)
            event.set()
            await task
        event.set()
        event.clear()
        task = asyncio.create_task(event.wait())
        for _ in range(3):
            await asyncio.sleep(0)
        assert not task.done()
        event.set()
        await task

    asyncio.run(scenario())
