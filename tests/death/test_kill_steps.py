# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at every step of a client's life: the keeper serves on and the memory comes back.

Memory and descriptors are looked at from outside, in ``/proc``; what the keeper says of itself is
only asked for its states.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.device import Device
from holdfast.drivers.xdma_ring import Batch
from holdfast.errors import TransferFailed
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.kernel import packets
from holdfast.regs.xdma import Direction
from holdfast.torture import actors
from holdfast.torture.outside import Processes, settle
from holdfast.torture.stack import Stack
from holdfast.values import Target

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 15.0
SIZE = 256 << 10
RATE = 2 << 20
"""A transfer of SIZE takes an eighth of a second: time enough to die in the middle."""
SLOW = f"emu:xdma?memory=4M&link_rate={RATE}&link_chunk=4096"

Step = Callable[[str, Callable[[], None]], None]


def _reached(tell: Callable[[], None]) -> None:
    """Say so, and wait for the end."""
    tell()
    while True:
        time.sleep(60)


def after_connect(target: str, tell: Callable[[], None]) -> None:
    sock = packets.connect(str(embedded.socket_path(Target.parse(target))), LONG)
    with sock:
        _reached(tell)


def after_hello(target: str, tell: Callable[[], None]) -> None:
    from holdfast.keeper.opening import connect

    connect(Target.parse(target))
    _reached(tell)


def after_open(target: str, tell: Callable[[], None]) -> None:
    holdfast.open(target)
    _reached(tell)


def after_alloc(target: str, tell: Callable[[], None]) -> None:
    card = holdfast.open(target)
    buffers = [card.alloc(SIZE) for _ in range(20)]
    for buffer in buffers:
        buffer.array[:] = 1
    _reached(tell)


def after_pin(target: str, tell: Callable[[], None]) -> None:
    card = holdfast.open(target)
    pins = [card.pin(np.ones(SIZE, np.uint8)) for _ in range(20)]
    assert len(pins) == 20
    _reached(tell)


def amid_a_batch(target: str, tell: Callable[[], None]) -> None:
    """Descriptors are in the ring, and the doorbell was not rung."""
    card = holdfast.open(target)
    buffer = card.alloc(SIZE)
    queue = card.dma.queue(Direction.C2H)
    queue.ring.write(card.dma.prepare(Direction.C2H, buffer, 0))
    _reached(tell)


def after_the_doorbell(target: str, tell: Callable[[], None]) -> None:
    card = holdfast.open(target)
    buffer = card.alloc(SIZE)
    card.dma.from_card(buffer)
    _reached(tell)


def amid_a_transfer(target: str, tell: Callable[[], None]) -> None:
    card = holdfast.open(target)
    buffer = card.alloc(SIZE)
    buffer.array[:] = 0xEE
    card.dma.from_card(buffer)
    while buffer.array[0] == 0xEE:
        pass
    _reached(tell)


def while_waiting(target: str, tell: Callable[[], None]) -> None:
    card = holdfast.open(target)
    transfer = card.dma.from_card(card.alloc(SIZE))
    tell()
    transfer.wait()
    _reached(lambda: None)


def amid_a_relayed_transfer(target: str, tell: Callable[[], None]) -> None:
    card = holdfast.open(target)
    memory = np.full(SIZE, 0xEE, np.uint8)
    card.dma.from_card(card.pin(memory))
    while memory[0] == 0xEE:
        pass
    _reached(tell)


def while_streaming(target: str, tell: Callable[[], None]) -> None:
    card = holdfast.open(target)
    stream = card.dma.stream(rate=1 << 20, block_bytes=16 << 10, blocks=8)
    for block in stream:
        if block.number == 2:
            tell()


STEPS: list[Step] = [
    after_connect, after_hello, after_open, after_alloc, after_pin, amid_a_batch,
    after_the_doorbell, amid_a_transfer, while_waiting, amid_a_relayed_transfer, while_streaming,
]  # fmt: skip


def kill_at(step: Step, target: str) -> int:
    """Run a client up to a step and kill it there; returns its pid."""

    def body(_: int, writing: int) -> None:
        step(target, lambda: void(os.write(writing, b"x")))

    child = actors.spawn(body)
    try:
        assert child.read(1) == b"x", "the client ended before its step"
    finally:
        child.kill()
        child.reap()
    return child.pid


def void(_: object) -> None:
    return None


def unreleased(stack: Stack) -> int:
    return sum(lease["state"] != "released" for lease in stack.ps()["leases"])


def lease_of(stack: Stack, pid: int) -> dict[str, Any]:
    found = [lease for lease in stack.ps()["leases"] if lease["pid"] == pid]
    assert len(found) == 1
    return dict(found[0])


def round_trip(card: Device, address: int = 0) -> bool:
    source, back = card.alloc(4096), card.alloc(4096)
    source.array[:] = np.arange(4096) % 253
    card.dma.to_card(source, address).wait(LONG)
    card.dma.from_card(back, address).wait(LONG)
    return bool(np.array_equal(source.array, back.array))


@pytest.fixture(scope="module")
def slow() -> Any:
    with Stack(SLOW) as stack:
        with holdfast.open(SLOW) as card:
            card.bars[2].view()[:] = 0x77  # so that its pages are there before anything is counted
        yield stack


@pytest.mark.parametrize("step", STEPS, ids=lambda step: str(step.__name__))
def test_a_client_killed_at_any_step_leaves_nothing(slow: Stack, step: Step) -> None:
    assert settle(lambda: unreleased(slow), goal=0, timeout=LONG) == 0
    pids = slow.pids()
    before = Processes.look(pids)
    kill_at(step, slow.target)
    assert settle(lambda: unreleased(slow), goal=0, timeout=LONG) == 0
    assert slow.ps()["unaccounted_bytes"] == 0
    after = before

    def more() -> int:
        nonlocal after
        after = Processes.look(pids)
        return max(after.descriptors - before.descriptors, after.memfd_bytes - before.memfd_bytes)

    assert settle(more, goal=0, timeout=LONG) <= 0, (before, after)
    assert slow.pids() == pids
    with holdfast.open(slow.target, access="exclusive", timeout=LONG) as card:
        assert round_trip(card)


def test_drain_carries_a_dead_process_transfer_to_its_end(slow: Stack) -> None:
    def body(_: int, writing: int) -> None:
        card = holdfast.open(slow.target)
        source = card.alloc(SIZE)
        source.array[:] = 0xC3
        card.dma.to_card(source, 1 << 20)
        os.write(writing, b"x")
        time.sleep(60)

    with holdfast.open(slow.target, timeout=LONG) as card:
        window = card.bars[2].view(1 << 20, SIZE)
        window[:] = 0
        child = actors.spawn(body)
        assert child.read(1) == b"x"
        child.kill()
        child.reap()
        at_death = int(np.count_nonzero(window))
        assert settle(lambda: unreleased(slow), goal=1, timeout=LONG) == 1
        told = lease_of(slow, child.pid)
        assert at_death < SIZE, "the transfer was over before the kill"
        assert told["completed_after_death"]
        assert (window == 0xC3).all()
        states = [state for state, _, _ in told["log"]]
        assert states[-3:] == ["draining", "quiet", "released"]


def test_revoke_stops_a_dead_process_transfer(serve: Callable[..., Stack]) -> None:
    stack = serve(SLOW, "--policy", "revoke")
    pid = kill_at(amid_a_transfer, stack.target)
    assert settle(lambda: unreleased(stack), goal=0, timeout=LONG) == 0
    told = lease_of(stack, pid)
    assert told["in_flight_at_death"] > 0
    assert not told["completed_after_death"]
    entered = [state for state, _, _ in told["log"]]
    assert "stopping" in entered
    assert "draining" not in entered


def test_the_memory_of_the_dead_is_empty_for_the_next_lease(serve: Callable[..., Stack]) -> None:
    stack = serve(SLOW, "--arena", "16M")
    kill_at(after_alloc, stack.target)
    assert settle(lambda: unreleased(stack), goal=0, timeout=LONG) == 0
    with holdfast.open(stack.target, channels=0) as card:
        assert not card.alloc(12 << 20).array.any()


@pytest.mark.parametrize("direction", Direction)
def test_a_relayed_transfer_of_a_dead_process_touches_nothing(
    slow: Stack, direction: Direction
) -> None:
    memory = np.full(SIZE, 0xEE, np.uint8)  # at the same address in the child
    where = struct.Struct("<Q")

    def body(_: int, writing: int) -> None:
        card = holdfast.open(slow.target)
        pin = card.pin(memory)
        if direction is Direction.H2C:
            window = card.bars[2].view(0, SIZE)
            card.dma.to_card(pin)
            while window[0] == 0x11:
                pass
        else:
            card.dma.from_card(pin)
            while memory[0] == 0xEE:
                pass
        os.write(writing, where.pack(memory.ctypes.data))
        time.sleep(60)

    with holdfast.open(slow.target, timeout=LONG) as card:
        card.bars[2].view(0, SIZE)[:] = 0x11
    child = actors.spawn(body)
    assert where.unpack(child.read(where.size)) == (memory.ctypes.data,)
    child.kill()
    child.reap()
    assert settle(lambda: unreleased(slow), goal=0, timeout=LONG) == 0
    assert (memory == 0xEE).all()
    told = lease_of(slow, child.pid)
    with holdfast.open(slow.target, access="exclusive", timeout=LONG) as card:
        if direction is Direction.H2C:  # a write that hits nothing is posted: nobody is told
            assert not told["completed_after_death"]
            assert card.bars[2].view(0, SIZE)[-1] == 0x11
        assert round_trip(card)


def test_what_an_error_left_in_the_ring_does_not_hold_a_dead_lease(slow: Stack) -> None:
    def body(_: int, writing: int) -> None:
        card = holdfast.open(slow.target)
        buffer = card.alloc(4096)
        queue = card.dma.queue(Direction.C2H)
        bad = card.dma.prepare(Direction.C2H, buffer, 1 << 40)
        good = card.dma.prepare(Direction.C2H, buffer, 0)
        transfer = queue.post(bad, [buffer])
        queue.post(good, [buffer])
        queue.post(good, [buffer])
        with pytest.raises(TransferFailed):
            transfer.wait()
        os.write(writing, b"x")
        time.sleep(60)

    child = actors.spawn(body)
    assert child.read(1) == b"x"
    started = child.kill()
    child.reap()
    assert settle(lambda: unreleased(slow), goal=0, timeout=LONG) == 0
    released = [at for state, at, _ in lease_of(slow, child.pid)["log"] if state == "released"]
    assert released[0] - started < 5e9, "it waited for the deadline"


# -- orphans --------------------------------------------------------------------------------------


def orphan(target: str, keep: str) -> tuple[actors.Child, int]:
    """A client that dies and leaves a child with what it duplicated before the fork.

    Returns the client, whose pipes the orphan holds as well, and the orphan's pid.
    """
    number = struct.Struct("<q")

    def body(reading: int, writing: int) -> None:
        card = holdfast.open(target)
        engine, lease = card.dma, card.lease
        assert isinstance(lease, LeaseClient)
        buffer = card.alloc(SIZE)
        kept = {
            "lifeline": lambda: os.dup(lease.fileno()),
            "doorbell": lambda: os.dup(card._bells[0][1].fd),
        }[keep]()
        batch: Batch = engine.prepare(Direction.H2C, buffer, 0)
        engine.queue(Direction.H2C).ring.write(batch)
        pid = os.fork()
        if pid == 0:
            os.read(reading, 1)
            if keep == "doorbell":
                from holdfast.kernel import events

                events.ring(kept, 5)
            os.write(writing, b"r")
            os.read(reading, 1)
            os._exit(0)
        os.write(writing, number.pack(pid))
        time.sleep(60)

    child = actors.spawn(body)
    (pid,) = number.unpack(child.read(number.size))
    child.kill()
    return child, pid


@pytest.mark.parametrize("keep", ["lifeline", "doorbell"])
def test_an_orphan_with_duplicates_can_do_no_harm(serve: Callable[..., Stack], keep: str) -> None:
    stack = serve("emu:xdma?channels=1", "--arena", "32M")
    pids = stack.pids()
    before = Processes.look(pids)
    child, orphaned = orphan(stack.target, keep)
    assert settle(lambda: unreleased(stack), goal=0, timeout=LONG) == 0
    with holdfast.open(stack.target, timeout=LONG) as card:
        memory = card.alloc(10 << 20)
        memory.array[:] = 0x55
        child.tell(b"g")
        assert child.read(1) == b"r"
        assert [row["completed"] for row in card.command("channel_status")] == [0, 0]
        assert round_trip(card)
        assert (memory.array == 0x55).all()
    child.tell(b"e")
    child.reap()
    pidless = settle(lambda: os.path.exists(f"/proc/{orphaned}/fd"), goal=0, timeout=LONG)
    assert not pidless
    # The late hang-up must not close anything twice, nor leave anything open.
    assert (
        settle(lambda: Processes.look(pids).descriptors - before.descriptors, goal=0, timeout=LONG)
        <= 0
    )
    with holdfast.open(stack.target, timeout=LONG) as card:
        assert round_trip(card)
    assert stack.pids() == pids
