# SPDX-License-Identifier: Apache-2.0
"""What the keeper does for each of many leases is done for those that are asked about only."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.keeper.sparse_event import SparseEvent


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
