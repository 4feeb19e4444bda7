# SPDX-License-Identifier: Apache-2.0
"""A function that no driver is for: registers, interrupts and memory, and no proof of quiet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import holdfast
from holdfast.errors import NotSupported
from holdfast.torture.stack import Stack

TARGET = f"emu:{Path(__file__).with_name('bare_card.py')}:BareCard"
SHORT = ("--drain-deadline", "0.1", "--stop-deadline", "0.1", "--isolate-deadline", "0.1")


def test_every_interrupt_of_a_function_without_driver_can_be_waited_for(
    serve: Callable[..., Stack],
) -> None:
    serve(TARGET, *SHORT)
    with holdfast.open(TARGET, timeout=10) as card:
        assert (card.driver, set(card.irqs)) == ("none", {0, 1})
        card.bars[0].store(0, 1)
        assert card.irqs[1].wait(10) == 1
        with pytest.raises(NotSupported):
            card.dma.to_card(card.alloc(64))


def test_it_is_handed_out_again_with_iovas_that_nobody_had(serve: Callable[..., Stack]) -> None:
    stack = serve(TARGET, *SHORT)
    seen = set()
    for _ in range(3):
        with holdfast.open(TARGET, timeout=10) as card:
            iova = int(card.alloc(4096).iova)
        assert iova not in seen, "an IOVA that was never proven quiet was handed out again"
        seen.add(iova)
    assert stack.ps()["unaccounted_bytes"] == 0


def test_in_an_arena_its_memory_is_quarantined(serve: Callable[..., Stack]) -> None:
    stack = serve(TARGET, *SHORT, "--arena", "1M")
    with holdfast.open(TARGET, timeout=10) as card:
        card.alloc(4096)
    with pytest.raises(holdfast.HoldfastError):
        holdfast.open(TARGET, timeout=0.5)
    assert stack.ps()["quarantined_bytes"] > 0
