# SPDX-License-Identifier: Apache-2.0
"""Functions that misbehave while a lease dies: each ends in proof, in retirement or in quarantine.

Deadlines are short here; they only bound how long each measure is tried.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.device import Device
from holdfast.errors import (
    Busy,
    DeviceGone,
    DeviceReset,
    HoldfastError,
    IovaExhausted,
    KeeperGone,
    OutOfMemory,
    UsageError,
)
from holdfast.keeper.opening import connect
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack
from holdfast.transfer import Transfer
from holdfast.uapi import pci_regs
from holdfast.values import Target

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 15.0
SIZE = 64 << 10
SHORT = (
    "--drain-deadline", "0.2", "--stop-deadline", "0.2", "--isolate-deadline", "0.2",
    "--reset-deadline", "1",
)  # fmt: skip


def die_with_a_transfer(stack: Stack, *, wait_for_data: bool = False) -> int:
    """A client posts a card-to-host transfer and is killed; returns its pid."""

    def body(_: int, writing: int) -> None:
        card = holdfast.open(stack.target)
        buffer = card.alloc(SIZE if "xdma" in stack.target else 512)
        buffer.array[:] = 0xEE
        card.dma.from_card(buffer)
        while wait_for_data and buffer.array[0] == 0xEE:
            pass
        os.write(writing, b"x")
        time.sleep(60)

    child = actors.spawn(body)
    try:
        assert child.read(1) == b"x"
    finally:
        child.kill()
        child.reap()
    return child.pid


def lease_of(stack: Stack, pid: int) -> dict[str, Any]:
    return next(dict(lease) for lease in stack.ps()["leases"] if lease["pid"] == pid)


def reached(stack: Stack, pid: int, state: str) -> dict[str, Any]:
    """Wait until a lease is in a state."""
    assert settle(lambda: lease_of(stack, pid)["state"] != state, goal=0, timeout=LONG) == 0, (
        lease_of(stack, pid)
    )
    return lease_of(stack, pid)


def entered(lease: dict[str, Any]) -> list[str]:
    return [state for state, _, _ in lease["log"]]


def round_trip(card: Device, address: int = 0) -> bool:
    source, back = card.alloc(512), card.alloc(512)
    source.array[:] = np.arange(512) % 253
    card.dma.to_card(source, address).wait(LONG)
    card.dma.from_card(back, address).wait(LONG)
    return bool(np.array_equal(source.array, back.array))


def warm_up(stack: Stack) -> None:
    """One transfer, after which a fault plan that says ``@2`` takes hold."""
    with holdfast.open(stack.target) as card:
        card.dma.to_card(card.alloc(64)).wait(LONG)
    assert settle(
        lambda: sum(lease["state"] != "released" for lease in stack.ps()["leases"]),
        goal=0, timeout=LONG,
    ) == 0  # fmt: skip


def test_an_engine_that_hangs_is_reset_and_serves_again(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:xdma?memory=1M", *SHORT, "--test-faults", "hang@1")
    told = reached(stack, die_with_a_transfer(stack), "released")
    assert {"draining", "stopping"} <= set(entered(told))
    assert not told["completed_after_death"]
    with holdfast.open(stack.target, timeout=LONG) as card:
        assert card.bars[0].load(0)


def test_a_hang_without_a_reset_is_unmapped_and_its_addresses_are_retired(
    serve: Callable[..., Stack],
) -> None:
    stack = serve("emu:xdma?memory=1M", *SHORT, "--test-faults", "hang@2,refuse_reset@1")
    warm_up(stack)
    told = reached(stack, die_with_a_transfer(stack), "released")
    assert "unmapped" in entered(told)
    assert stack.ps()["unaccounted_bytes"] == 0
    assert 0 not in stack.ps()["free_channels"], "a hung channel was handed out again"


def test_a_hang_without_a_reset_on_an_arena_is_quarantined_and_admission_ends_at_the_bound(
    serve: Callable[..., Stack],
) -> None:
    stack = serve(
        "emu:xdma?memory=1M", *SHORT, "--arena", "16M", "--quarantine", "64K",
        "--test-faults", "hang@2,refuse_reset@1",
    )  # fmt: skip
    warm_up(stack)
    pid = die_with_a_transfer(stack)
    told = reached(stack, pid, "quarantine")
    assert told["bytes"] >= SIZE
    assert told["withheld"]
    assert stack.ps()["quarantined_bytes"] == told["bytes"]
    assert stack.ps()["unaccounted_bytes"] == 0
    with pytest.raises(HoldfastError, match="quarantine"):
        holdfast.open(stack.target, channels=0)


def test_a_reset_by_a_living_lease_does_not_wake_a_quarantined_one(
    serve: Callable[..., Stack],
) -> None:
    stack = serve(
        "emu:xdma?memory=1M", *SHORT, "--arena", "16M", "--test-faults", "hang@2,refuse_reset@1"
    )
    warm_up(stack)
    with holdfast.open(stack.target, timeout=LONG) as living:
        reached(stack, die_with_a_transfer(stack), "quarantine")
        with pytest.raises(Busy):
            living.reset()
        command = living.config.load(pci_regs.COMMAND, 2)
        assert not command & int(pci_regs.Command.MASTER), "bus master is on under a dead lease"


def test_edu_cannot_be_stopped_and_is_waited_for(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:edu?delay=0.5", *SHORT[2:], "--drain-deadline", "0.05")
    told = reached(stack, die_with_a_transfer(stack), "released")
    assert "isolating" in entered(told)
    with holdfast.open(stack.target, timeout=LONG) as device:
        assert round_trip(device)


def test_edu_that_hangs_is_never_believed(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:edu", *SHORT, "--arena", "1M", "--test-faults", "hang")
    told = reached(stack, die_with_a_transfer(stack), "quarantine")
    assert told["bytes"] > 0
    with pytest.raises(HoldfastError):
        holdfast.open(stack.target)


@pytest.mark.parametrize("policy", ["drain", "revoke"])
def test_a_wild_card_finds_nobodys_memory(serve: Callable[..., Stack], policy: str) -> None:
    # The link is slow, so that the stop comes in the middle; then the card goes on writing.
    stack = serve(
        "emu:xdma?memory=1M&link_rate=256K&link_chunk=4096", *SHORT, "--policy", policy,
        "--arena", "16M", "--test-faults", "wild",
    )  # fmt: skip
    pid = die_with_a_transfer(stack, wait_for_data=True)
    assert settle(
        lambda: lease_of(stack, pid)["state"] not in ("released", "quarantine"),
        goal=0, timeout=LONG,
    ) == 0  # fmt: skip
    with holdfast.open(stack.target, channels=0, timeout=LONG) as innocent:
        memory = innocent.alloc(8 << 20)
        memory.array[:] = 0x55
        deadline = time.monotonic() + 0.1
        while time.monotonic() < deadline:  # the card's time: a write that must not come
            assert (memory.array == 0x55).all()


# -- the keeper or the function is killed --------------------------------------------------------


async def _await(transfer: Transfer) -> Transfer:
    return await transfer


SLOW = "emu:xdma?memory=1M&link_rate=64K&link_chunk=4096"


@pytest.mark.parametrize("kind", ["wait", "await"])
@pytest.mark.parametrize(
    ("victims", "error"),
    [(("anchor", "keeper"), KeeperGone), (("function",), DeviceGone)],
    ids=["keeper and anchor", "function"],
)
def test_a_waiter_learns_at_once_that_nobody_keeps_or_is_its_function_any_more(
    serve: Callable[..., Stack], victims: tuple[str, ...], error: type[HoldfastError], kind: str
) -> None:
    stack = serve(SLOW)
    pids = stack.ps()
    card = holdfast.open(stack.target)
    transfer = card.dma.to_card(card.alloc(SIZE))
    with ThreadPoolExecutor(1) as pool:
        if kind == "wait":
            waiting = pool.submit(transfer.wait)
        else:
            waiting = pool.submit(asyncio.run, _await(transfer))
        for victim in victims:
            os.kill(pids[victim], signal.SIGSTOP)
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        with pytest.raises(error):
            waiting.result(2.0)
    for attempt in (
        lambda: transfer.wait(0),
        lambda: card.alloc(16 << 20),
        lambda: card.bars[0].load(0),
        lambda: card.command("channel_status"),
        lambda: card.dma.to_card(card.alloc(16), 0),
    ):
        with pytest.raises((error, KeeperGone)):
            attempt()
    card.close()


def test_an_embedded_keeper_that_was_killed_with_its_anchor_is_replaced(runtime: object) -> None:
    card = holdfast.open("emu:xdma?memory=1M")
    client = connect(Target.parse("emu:xdma?memory=1M"))
    told = client.ps()
    client.close()
    os.kill(told["keeper"], signal.SIGSTOP)
    os.kill(told["anchor"], signal.SIGKILL)
    os.kill(told["keeper"], signal.SIGKILL)
    with pytest.raises(KeeperGone):
        card.irqs[0].wait(LONG)
    card.close()
    with holdfast.open("emu:xdma?memory=1M", timeout=LONG) as again:
        assert round_trip(again)


# -- not enough ----------------------------------------------------------------------------------


def test_an_exhausted_arena_is_an_error_and_freeing_helps(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:xdma?memory=1M", "--arena", "4M")
    with holdfast.open(stack.target) as card:
        buffer = card.alloc(1 << 20)
        with pytest.raises(OutOfMemory):
            card.alloc(4 << 20)
        assert round_trip(card)
        buffer.free()
        card.trim()
        with holdfast.open(stack.target, channels=0) as other:
            assert other.alloc(1 << 20).nbytes == 1 << 20


def test_an_arena_too_small_for_the_rings_says_so(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:xdma?memory=1M", "--arena", "64K")
    with pytest.raises(OutOfMemory):
        holdfast.open(stack.target)
    with holdfast.open(stack.target, channels=0) as card:
        with pytest.raises(OutOfMemory):
            card.alloc(1 << 20)


def test_addresses_that_run_out_are_an_error_and_come_back(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:edu?delay=0.01", "--quota", "4G")
    with holdfast.open(stack.target) as device:
        with pytest.raises(IovaExhausted):
            device.alloc(1 << 28)
        for _ in range(40):  # more than there is, if nothing came back
            device.alloc(8 << 20).free()
            device.trim()
        assert round_trip(device)


def test_a_reset_by_another_lease_ends_transfers_and_both_can_go_on(
    serve: Callable[..., Stack],
) -> None:
    stack = serve(SLOW)
    with holdfast.open(stack.target) as one, holdfast.open(stack.target) as two:
        running = [one.dma.to_card(one.alloc(SIZE)), two.dma.to_card(two.alloc(SIZE))]
        two.reset()
        for transfer in running:
            with pytest.raises(DeviceReset):
                transfer.wait(LONG)
        assert round_trip(one)
        assert round_trip(two)


def test_threads_that_post_through_a_reset_by_another_lease_do_not_block_each_other(
    serve: Callable[..., Stack],
) -> None:
    stack = serve("emu:xdma?memory=1M")
    with holdfast.open(stack.target, channels=2) as one, holdfast.open(stack.target) as two:
        buffers = [one.alloc(4096) for _ in range(4)]
        stop = False

        def post(place: int) -> int:
            done = 0
            move = one.dma.to_card if place % 2 else one.dma.from_card
            while not stop:
                try:
                    move(buffers[place], 0, channel=place // 2).wait(LONG)
                    done += 1
                except DeviceReset:
                    continue
            return done

        with ThreadPoolExecutor(4) as pool:
            working = [pool.submit(post, place) for place in range(4)]
            try:
                for _ in range(10):
                    two.reset()
                    assert round_trip(two, 0x80000)
            finally:
                stop = True
            assert all(each.result(LONG) > 0 for each in working)


def test_a_lease_of_memory_only_cannot_reset_the_others(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:xdma?memory=1M")
    with holdfast.open(stack.target, channels=0) as guest:
        with pytest.raises(UsageError):
            guest.reset()
