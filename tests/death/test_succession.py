# SPDX-License-Identifier: Apache-2.0
"""Keepers, anchors and standbys are killed; clients go on with what they have."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from tests.conftest import eventually

import holdfast
from holdfast.device import Device
from holdfast.keeper.client import LeaseClient
from holdfast.torture.stack import Stack

SIZE = 256 << 10
LONG = 20.0
SLOW = "emu:xdma?memory=1M&link_rate=512K&link_chunk=4096"
"""A transfer of SIZE takes half a second."""


def ps(card: Device) -> dict[str, Any]:
    assert isinstance(card.lease, LeaseClient)
    return card.lease.ps()


def pattern(seed: int, size: int = SIZE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def kill(*pids: int) -> None:
    """SIGKILL all of them at once: none gets to react to another one's end."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@contextmanager
def opened(stack: Stack, **options: Any) -> Iterator[Device]:
    with holdfast.open(stack.target, timeout=LONG, **options) as card:
        yield card


def test_a_transfer_that_runs_completes_while_the_keeper_is_killed(
    serve: Callable[..., Stack],
) -> None:
    with opened(serve(SLOW)) as card:
        source, into = card.alloc(SIZE), card.alloc(SIZE)
        source.array[:] = pattern(1)
        transfer = card.dma.to_card(source)
        kill(ps(card)["keeper"])
        transfer.wait(LONG)
        card.dma.from_card(into).wait(LONG)
        assert np.array_equal(into.array, pattern(1))
        assert ps(card)["successions"] == 1


def test_a_transfer_from_own_memory_completes_while_the_keeper_is_killed(
    serve: Callable[..., Stack],
) -> None:
    with opened(serve(SLOW)) as card:
        source, into = pattern(2), np.zeros(SIZE, np.uint8)
        with card.pin(source) as pinned, card.pin(into) as back:
            assert pinned.how == "relayed"
            for transfer in (card.dma.to_card(pinned), card.dma.from_card(back)):
                time.sleep(0.05)  # into the middle of it
                kill(ps(card)["keeper"])
                transfer.wait(LONG)
        wrong = np.flatnonzero(into != source)
        assert not len(wrong), (len(wrong), wrong[0], wrong[-1])


def test_a_killed_keeper_is_back_within_half_a_second(serve: Callable[..., Stack]) -> None:
    with opened(serve("emu:xdma?memory=1M")) as card:
        before = ps(card)["keeper"]
        kill(before)
        begun = time.monotonic()
        told = ps(card)
        # The deadline is what is promised.
        assert time.monotonic() - begun < 0.5
        assert told["keeper"] != before
        assert not told["safe_mode"]


def test_requests_that_wait_while_the_keeper_is_killed_are_answered(
    serve: Callable[..., Stack],
) -> None:
    stack = serve("emu:xdma?memory=1M", "--safe-after", "1000")
    with opened(stack) as card, opened(stack) as other, ThreadPoolExecutor(2) as pool:
        done = False

        def busy(device: Device) -> int:
            rounds = 0
            while not done:
                buffer = device.alloc(300 << 10)
                own = pattern(rounds, 8192)
                with device.pin(own) as pin:
                    device.dma.to_card(pin).wait(LONG)
                assert device.command("channel_status")
                assert device.bars[1].load(0) >> 16 == 0x1FC0
                buffer.free()
                device.trim()
                rounds += 1
            return rounds

        working = [pool.submit(busy, device) for device in (card, other)]
        for _ in range(8):
            kill(stack.keeper_pid)
            time.sleep(0.05)  # anywhere in what comes next
        done = True
        assert all(work.result(LONG) for work in working)
        assert ps(card)["unaccounted_bytes"] == 0


def test_a_client_that_dies_while_there_is_no_keeper_is_noticed_by_the_successor(
    serve: Callable[..., Stack],
) -> None:
    stack = serve(SLOW)
    with opened(stack) as card:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                child = holdfast.open(stack.target, timeout=LONG)
                buffer = child.alloc(SIZE)
                child.dma.from_card(buffer)
                os.write(writing, b"x")
                signal.pause()
            finally:
                os._exit(1)
        os.close(writing)
        assert os.read(reading, 1) == b"x"
        os.close(reading)
        kill(ps(card)["keeper"], pid)
        os.waitpid(pid, 0)

        def state() -> str:
            return next(
                (lease["state"] for lease in ps(card)["leases"] if lease["pid"] == pid), "released"
            )

        assert eventually(lambda: state() == "released", LONG)
        assert ps(card)["unaccounted_bytes"] == 0
        lease = next(lease for lease in ps(card)["leases"] if lease["pid"] == pid)
        assert lease["completed_after_death"]


def test_a_lease_whose_keeper_is_killed_while_it_drains_is_drained_by_the_successor(
    serve: Callable[..., Stack],
) -> None:
    stack = serve("emu:xdma?memory=1M&link_rate=128K&link_chunk=4096")
    with opened(stack) as card:
        pid = os.fork()
        if not pid:
            try:
                child = holdfast.open(stack.target, timeout=LONG)
                child.dma.from_card(child.alloc(SIZE))
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        os.waitpid(pid, 0)

        def lease() -> dict[str, Any]:
            return next(lease for lease in ps(card)["leases"] if lease["pid"] == pid)

        assert eventually(lambda: lease()["state"] == "draining", LONG)
        kill(ps(card)["keeper"])
        assert lease()["state"] in ("frozen", "draining")
        assert eventually(lambda: lease()["state"] == "released", LONG)
        assert lease()["completed_after_death"]
        assert ps(card)["unaccounted_bytes"] == 0


@pytest.mark.parametrize("victims", [("anchor",), ("standby",), ("standby", "keeper")])
def test_whoever_else_is_killed_is_replaced_and_the_keeper_can_be_killed_again(
    serve: Callable[..., Stack], victims: tuple[str, ...]
) -> None:
    stack = serve("emu:xdma?memory=1M")
    with opened(stack) as card:
        told = ps(card)
        kill(*(told[victim] for victim in victims))
        assert eventually(lambda: all(ps(card)[victim] != told[victim] for victim in victims), LONG)
        kill(ps(card)["keeper"])
        source, into = card.alloc(SIZE), card.alloc(SIZE)
        source.array[:] = pattern(3)
        card.dma.to_card(source).wait(LONG)
        card.dma.from_card(into).wait(LONG)
        assert np.array_equal(into.array, source.array)
        assert ps(card)["unaccounted_bytes"] == 0


def test_nothing_is_mapped_while_there_is_no_anchor(serve: Callable[..., Stack]) -> None:
    with opened(serve("emu:xdma?memory=1M")) as card, ThreadPoolExecutor(1) as pool:
        anchor = ps(card)["anchor"]
        os.kill(anchor, signal.SIGSTOP)
        waiting = pool.submit(card.alloc, 9 << 20)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        os.kill(anchor, signal.SIGCONT)
        assert waiting.result(LONG).nbytes == 9 << 20


def test_three_crashes_within_ten_seconds_lead_to_safe_mode(serve: Callable[..., Stack]) -> None:
    stack = serve(SLOW)
    with opened(stack) as card:
        source = card.alloc(SIZE)
        for count in range(1, 4):
            transfer = card.dma.to_card(source)
            kill(ps(card)["keeper"])
            transfer.wait(LONG)  # what a lease was granted stays its own
            assert ps(card)["safe_mode"] is (count == 3)


def test_a_keeper_whose_loop_does_not_run_is_killed_and_succeeded(
    serve: Callable[..., Stack],
) -> None:
    stack = serve("emu:xdma?memory=1M", "--heartbeat", "1.5")
    with opened(stack) as card:
        before = ps(card)["keeper"]
        os.kill(before, signal.SIGSTOP)
        assert ps(card)["keeper"] != before
        assert eventually(lambda: not os.path.exists(f"/proc/{before}"))
