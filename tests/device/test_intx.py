# SPDX-License-Identifier: Apache-2.0
"""A function with INTx only: the line masks itself, and waiting anew unmasks it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import holdfast
from holdfast.device import Device
from holdfast.errors import WaitTimeout
from holdfast.torture.stack import Stack

TARGET = f"emu:{Path(__file__).with_name('intx_card.py')}:LineCard"


@pytest.fixture
def card(serve: Callable[..., Stack]) -> Iterator[Device]:
    serve(TARGET)
    with holdfast.open(TARGET) as device:
        yield device


def test_a_line_that_was_acknowledged_can_be_waited_for_again_and_again(card: Device) -> None:
    for _ in range(3):
        card.bars[0].store(0, 1)
        assert card.irqs[0].wait(10) == 1
        card.bars[0].store(4, 1)
    with pytest.raises(WaitTimeout):
        card.irqs[0].wait(0.05)


def test_a_line_that_nobody_acknowledged_is_raised_again_by_the_next_wait(card: Device) -> None:
    card.bars[0].store(0, 1)
    assert card.irqs[0].wait(10) == 1
    assert card.irqs[0].wait(10) == 1


def test_a_line_can_be_awaited(card: Device) -> None:
    async def twice() -> int:
        total = 0
        async for count in card.irqs[0]:
            total += count
            card.bars[0].store(4, 1)
            if total == 2:
                break
            card.bars[0].store(0, 1)
        return total

    card.bars[0].store(0, 1)
    assert asyncio.run(asyncio.wait_for(twice(), 10)) == 2
