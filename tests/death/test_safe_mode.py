# SPDX-License-Identifier: Apache-2.0
"""A keeper without a driver: what is leased goes on, what needs a driver is refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import HoldfastError, NotSupported
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 15.0
CRASHES = 3
"""So many within ten seconds bring a keeper into safe mode."""
XDMA = "emu:xdma?memory=1M&link_rate=1M&link_chunk=4096"
SHORT = ("--drain-deadline", "0.2", "--reset-deadline", "1", "--quarantine-period", "0.1")


def go_safe(stack: Stack) -> None:
    """Kill one keeper after the other."""
    for crashes in range(1, CRASHES + 1):
        os.kill(stack.keeper_pid, signal.SIGKILL)

        def still(crashes: int = crashes) -> int:
            try:
                return int(stack.ps()["successions"] != crashes)
            except HoldfastError:
                return 1  # there is none at this moment

        assert settle(still, goal=0, timeout=LONG) == 0
    told = stack.ps()
    assert told["safe_mode"]
    assert told["driver"] == "none"


@pytest.mark.parametrize("arena", [False, True], ids=["own files", "arena"])
def test_leases_live_on_without_a_driver_and_their_deaths_go_the_generic_ladder(
    staging: Callable[[Stack], Any], rungs_of: Callable[..., list[str]], arena: bool
) -> None:
    options = (*SHORT, *(("--arena", "4M") if arena else ()))
    with Stack(XDMA, options) as stack:
        stage = staging(stack)
        stage.fill_card()
        with stage.innocent() as innocent:
            card = holdfast.open(XDMA, timeout=LONG)
            source, back = card.alloc(4096), card.alloc(4096)
            source.array[:] = np.arange(4096) % 251
            go_safe(stack)

            # The client drives its channel itself, as ever: memory, registers, transfers.
            card.dma.to_card(source, 0x8000).wait(LONG)
            card.dma.from_card(back, 0x8000).wait(LONG)
            assert np.array_equal(source.array, back.array)
            assert card.alloc(512 << 10).nbytes == 512 << 10
            assert card.bars[1].load(0) >> 16 == 0x1FC0
            for needs_a_driver in (
                lambda: holdfast.open(XDMA),
                lambda: holdfast.open(XDMA, access="exclusive"),
                lambda: card.command("channel_status"),
                card.reset,
            ):
                with pytest.raises(NotSupported, match="safe mode"):
                    needs_a_driver()
            with holdfast.open(XDMA, access="shared", channels=0, timeout=LONG) as memory_only:
                assert memory_only.alloc(4096).nbytes == 4096

            number = card.lease.number
            card.dma.from_card(card.alloc(256 << 10))  # a quarter of a second
            card.close()
            end = "quarantine" if arena else "released"
            assert settle(lambda: _lease(stack, number)["state"] != end, goal=0, timeout=LONG) == 0
            innocent.take()
            told = _lease(stack, number)
            assert rungs_of(told)[-2:] == (
                ["resetting", "quarantine"] if arena else ["unmapped", "released"]
            )
            assert innocent.foreign(0.4) == 0
        assert stack.ps()["unaccounted_bytes"] == 0


def _lease(stack: Stack, number: int) -> dict[str, Any]:
    return next(dict(each) for each in stack.ps()["leases"] if each["lease"] == number)


def test_a_function_with_few_address_bits_keeps_its_leases_in_safe_mode(
    staging: Callable[[Stack], Any],
) -> None:
    with Stack("emu:edu?delay=0.05", SHORT) as stack:
        stage = staging(stack)
        stage.fill_card()
        with holdfast.open(stack.target, timeout=LONG) as device:
            buffer = device.alloc(512)
            before = int(buffer.iova)
            go_safe(stack)
            device.dma.from_card(buffer).wait(LONG)
            assert int(buffer.iova) == before
            more = device.alloc(512 << 10)
            assert int(more.iova) + more.nbytes <= 1 << 28, "the device could not reach it"
        stage.all_released()
