# SPDX-License-Identifier: Apache-2.0
"""A mediated client dies with requests under way: its memory stays, and the others go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.device import Device
from holdfast.keeper.client import LeaseClient
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack
from holdfast.transfer import Transfer
from holdfast.wire.rings import Op

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 15.0
SLOW = "emu:xdma?memory=4M&link_rate=8M&link_chunk=4096"
"""A request of 1 MiB takes 1/8 s."""
SHORT = (
    "--drain-deadline", "0.2", "--stop-deadline", "0.2", "--isolate-deadline", "0.2",
    "--reset-deadline", "1",
)  # fmt: skip


def mediated(stack: Stack) -> Device:
    return holdfast.open(stack.target, access="mediated", timeout=LONG)


def die_with_requests(stack: Stack, mib: int = 4) -> int:
    """A client posts some MiB and is killed while they are under way; returns its pid."""

    def body(_: int, writing: int) -> None:
        card = mediated(stack)
        buffer = card.alloc(mib << 20)
        buffer.array[:] = 0xEE
        for at in range(0, mib << 20, 1 << 20):
            card.dma.from_card(buffer, 0, offset=at, nbytes=1 << 20)
        while not in_flight(stack, card.lease.number):
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


def in_flight(stack: Stack, number: int) -> int:
    told = next(lease for lease in stack.ps()["leases"] if lease["lease"] == number)
    return int(told["requests"])


def released(stack: Stack, pid: int) -> dict[str, Any]:
    """What is told of a dead client's lease once its memory is back."""

    def lease() -> dict[str, Any]:
        return next(dict(lease) for lease in stack.ps()["leases"] if lease["pid"] == pid)

    assert settle(lambda: lease()["state"] != "released", goal=0, timeout=LONG) == 0, lease()
    return lease()


def states(lease: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for state, _, _ in lease["log"]:
        if not found or found[-1] != state:
            found.append(state)
    return found


def keep_busy(card: Device, mib: int = 2) -> tuple[Any, list[Transfer]]:
    """Requests whose data can be looked at afterwards."""
    source = card.alloc(mib << 20)
    source.array[:] = np.random.default_rng(1).integers(0, 256, mib << 20, np.uint8)
    running = [
        card.dma.to_card(source, 2 << 20, offset=at, nbytes=64 << 10)
        for at in range(0, mib << 20, 64 << 10)
    ]
    return source, running


def test_drain_lets_what_was_posted_finish_and_nobody_notices(serve: Callable[..., Stack]) -> None:
    stack = serve(SLOW)
    with mediated(stack) as card:
        source, running = keep_busy(card)
        lease = released(stack, die_with_requests(stack))
        assert states(lease)[:3] == ["alive", "frozen", "draining"]
        assert states(lease)[-2:] == ["quiet", "released"]
        assert lease["in_flight_at_death"] > 0
        assert lease["completed_after_death"]
        assert lease["requests"] == 0
        for transfer in running:
            transfer.wait(LONG)
        back = card.alloc(64 << 10)
        card.dma.from_card(back, 2 << 20).wait(LONG)
        assert np.array_equal(back.array, source.array[-(64 << 10) :])
        assert card.generation() == 0


def test_revoke_takes_the_dead_client_s_requests_out_of_the_queue(
    serve: Callable[..., Stack],
) -> None:
    stack = serve(SLOW, "--policy", "revoke")
    with mediated(stack) as card:
        source, running = keep_busy(card)
        begun = time.monotonic()
        lease = released(stack, die_with_requests(stack, 64))
        # All of it takes eight seconds.
        assert time.monotonic() - begun < 6
        assert states(lease) == ["alive", "frozen", "stopping", "quiet", "released"]
        assert not lease["completed_after_death"]
        for transfer in running:
            transfer.wait(LONG)
        back = card.alloc(64 << 10)
        card.dma.from_card(back, 2 << 20).wait(LONG)
        assert np.array_equal(back.array, source.array[-(64 << 10) :])
        assert card.generation() == 0


def test_a_reset_is_announced_and_the_others_requests_survive_it(
    serve: Callable[..., Stack],
) -> None:
    # A request of the dead client takes 1 s: neither drain nor stop is through in time.
    stack = serve("emu:xdma?memory=4M&link_rate=1M&link_chunk=4096", *SHORT)
    with mediated(stack) as card:
        warm = card.alloc(4096)
        card.dma.to_card(warm).wait(LONG)
        pid = die_with_requests(stack, 2)
        source = card.alloc(8192)
        source.array[:] = np.arange(8192) % 251
        transfer = card.dma.to_card(source, 2 << 20)
        lease = released(stack, pid)
        assert "resetting" in states(lease)
        transfer.wait(LONG)
        back = card.alloc(8192)
        card.dma.from_card(back, 2 << 20).wait(LONG)
        assert np.array_equal(back.array, source.array)
        assert card.generation() > 0
        assert stack.ps()["quarantined_bytes"] == 0


def test_memory_waits_for_the_last_write_that_was_reported_too_early(
    serve: Callable[..., Stack],
) -> None:
    stack = serve("emu:xdma?memory=4M&link_rate=2M", "--arena", "32M", "--test-faults",
                  "early_completion")  # fmt: skip
    pid = die_with_requests(stack, 1)
    with mediated(stack) as card:
        lease = released(stack, pid)
        assert lease["completed_after_death"]
        # The frames that were given back last are given out first.
        mine = card.alloc(2 << 20)
        mine.array[:] = 0x11
        late = time.monotonic() + 0.1
        while time.monotonic() < late:
            assert (mine.array == 0x11).all()


def test_a_frozen_ring_is_not_read_any_more(serve: Callable[..., Stack]) -> None:
    stack = serve(SLOW)
    with mediated(stack) as card:
        orphan = holdfast.open(stack.target, access="mediated")
        client = orphan.lease
        assert isinstance(client, LeaseClient)
        host = orphan.alloc(4096)
        queue = orphan.dma.queue
        batch = orphan.dma.prepare(Op.TO_CARD, host)
        number = orphan.lease.number
        end, bell = queue._end, os.dup(queue._bell.fd)
        client._sock.close()  # it hangs up, and goes on writing into its rings
        try:
            rows = batch.records.copy()
            for _ in range(50):
                end.submit(rows)
                os.eventfd_write(bell, 1)
            assert released_number(stack, number)["requests"] == 0
            end.submit(rows)
            os.eventfd_write(bell, 1)
            for transfer in keep_busy(card, 1)[1]:
                transfer.wait(LONG)
        finally:
            os.close(bell)
            orphan.orphan()
            client.drop()


def released_number(stack: Stack, number: int) -> dict[str, Any]:
    def lease() -> dict[str, Any]:
        return next(dict(lease) for lease in stack.ps()["leases"] if lease["lease"] == number)

    assert settle(lambda: lease()["state"] != "released", goal=0, timeout=LONG) == 0, lease()
    return lease()


def test_the_function_is_free_again_after_the_last_mediated_lease(
    serve: Callable[..., Stack],
) -> None:
    stack = serve(SLOW)
    released(stack, die_with_requests(stack, 1))
    with holdfast.open(stack.target, access="exclusive", timeout=LONG) as card:
        assert card.bars
        card.dma.to_card(card.alloc(4096)).wait(LONG)
    told = stack.ps()
    assert told["unaccounted_bytes"] == 0


def test_a_killed_keeper_s_clients_go_on_with_what_was_in_flight(
    serve: Callable[..., Stack],
) -> None:
    stack = serve(SLOW)
    with mediated(stack) as card, mediated(stack) as other:
        source, running = keep_busy(card)
        small = other.alloc(4096)
        small.array[:] = 0x42
        for _ in range(2):
            killed = stack.ps()["keeper"]
            os.kill(killed, signal.SIGKILL)
            other.dma.to_card(small, 0).wait(LONG)
            assert stack.ps()["keeper"] != killed
        for transfer in running:
            transfer.wait(LONG)
        back = card.alloc(64 << 10)
        card.dma.from_card(back, 2 << 20).wait(LONG)
        assert np.array_equal(back.array, source.array[-(64 << 10) :])
        there = other.alloc(4096)
        other.dma.from_card(there, 0).wait(LONG)
        assert (there.array == 0x42).all()
    assert settle(lambda: len(living(stack)), goal=0, timeout=LONG) == 0
    assert stack.ps()["unaccounted_bytes"] == 0


def test_a_client_and_its_keeper_die_together(serve: Callable[..., Stack]) -> None:
    stack = serve(SLOW)
    with mediated(stack) as card:
        source, running = keep_busy(card)
        pid = die_with_requests(stack)
        os.kill(stack.ps()["keeper"], signal.SIGKILL)
        released(stack, pid)
        for transfer in running:
            transfer.wait(LONG)
        back = card.alloc(64 << 10)
        card.dma.from_card(back, 2 << 20).wait(LONG)
        assert np.array_equal(back.array, source.array[-(64 << 10) :])
        assert stack.ps()["unaccounted_bytes"] == 0


def living(stack: Stack) -> list[int]:
    return [lease["lease"] for lease in stack.ps()["leases"] if lease["state"] != "released"]
