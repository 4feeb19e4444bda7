# SPDX-License-Identifier: Apache-2.0
"""A client is SIGKILLed in the middle of DMA, and its keeper drains.

Runs inside a lab guest, on QEMU's edu, whose transfer takes 100 ms. The write that was posted by a
living process lands in the memory of a dead one: looked at through a descriptor of the keeper's, or
read back through the card where the memory was the process's own. The test holds a duplicate of the
client's lease, so that the keeper must go on holding the memory until the test lets go: meanwhile
the machine's free memory and the kernel's count of pinned pages say the same.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

import holdfast
from holdfast.device import Device
from holdfast.drivers.edu import EduEngine
from holdfast.errors import HoldfastError
from holdfast.keeper import opening
from holdfast.kernel import procfs
from holdfast.kernel.mapping import Mapping
from holdfast.regs import edu as regs
from holdfast.regs.view import RegisterView
from holdfast.torture import edu_scene as scene
from holdfast.torture.actors import Child, spawn
from holdfast.torture.outside import settle

pytestmark = [
    pytest.mark.guest,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

EXPECTED = set(filter(None, os.environ.get("HOLDFAST_LAB_EXPECT", "").split(",")))
PATIENCE = 60.0
"""Seconds. An emulated guest on a busy host is slow; nothing here is about speed."""
ATTEMPTS = 2
BIG = 64 << 20
WINDOW_SLAB = 256 << 10
OFFSET = 5000 * 4096
"""Where in the big memory the transfer lands."""
COUNT = regs.BUFFER_SIZE - 64
AROUND = 8192
SEED = 1998
OWN = 0x11


def pattern() -> npt.NDArray[np.uint8]:
    """What the card is given, and gives back."""
    return np.random.default_rng(SEED).integers(0, 256, COUNT, np.uint8)


@pytest.fixture(params=["type1", "iommufd"])
def target(request: pytest.FixtureRequest) -> str:
    """An edu on the root bus by one backend."""
    backend = str(request.param)
    for found in scene.edus():
        if scene.alone(found) and found.bdf.bus == 0 and backend in scene.offered(found):
            return f"pci:{found.bdf}?backend={backend}"
    if backend in EXPECTED:
        pytest.fail(f"no edu for {backend}, though it is expected here")
    pytest.skip(f"no edu for {backend} here")


@dataclass
class Dying:
    """A client that started a transfer into memory of ``BIG`` bytes, and a hold on its lease."""

    child: Child
    lifeline: int
    bar: Mapping
    """The card's registers, which the test would not have otherwise."""
    lease: int = 0
    address: int = 0
    """IOVA of the big memory."""
    window: int = 0
    """IOVA of a small buffer of the same lease."""

    def let_go(self) -> None:
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1


@pytest.fixture
def stage(target: str) -> Iterator[tuple[scene.WarmStack, ExitStack]]:
    with scene.WarmStack(target) as stack, ExitStack() as exits:
        yield stack, exits


def die(stack: scene.WarmStack, exits: ExitStack, *, pinned: bool) -> Dying:
    """A client gives the card a pattern, has it written into the big memory, and is SIGKILLed."""
    ours, theirs = (exits.enter_context(end) for end in socket.socketpair())

    def body(_: int, writing: int) -> None:
        card, device = open_and_keep(stack.target)
        assert isinstance(card.dma, EduEngine)
        scene.give_lifeline(theirs, card)
        socket.send_fds(theirs, [b"x"], [device])
        source = card.alloc(COUNT)
        source.array[:] = pattern()
        card.dma.to_card(source).wait(PATIENCE)
        if pinned:
            mine = np.full(BIG, OWN, np.uint8)
            pin = card.pin(mine)
            assert pin.how == "in place"
            big = int(pin.iova)
        else:
            buffer = card.alloc(BIG)
            # Little is touched, so that the process has little to tear down when it dies.
            buffer.array[OFFSET - AROUND : OFFSET + COUNT + AROUND] = OWN
            big = int(buffer.iova)
        told = np.array([card.lease.number, big, int(source.iova)], np.int64)
        os.write(writing, told.tobytes())
        scene.post_to(card.bars[regs.BAR].registers, big + OFFSET, COUNT)
        # Not from outside: 100 ms are short where another process must be scheduled for it.
        os.kill(os.getpid(), signal.SIGKILL)

    child = spawn(body)
    exits.callback(_end, child)
    lifeline, device = scene.take_descriptor(ours), scene.take_descriptor(ours)
    dying = Dying(child, lifeline, Mapping(device, regs.BAR_SIZE, dont_fork=True))
    os.close(device)
    exits.callback(dying.let_go)
    exits.callback(dying.bar.revoke)  # while it is mapped here, no other keeper can come
    told = np.frombuffer(child.read(24, PATIENCE), np.int64)
    dying.lease, dying.address, dying.window = (int(value) for value in told)
    return dying


def open_and_keep(target: str) -> tuple[Device, int]:
    """A lease, and the descriptor of the function that came with it, which clients close."""
    kept: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "close_all", kept.extend)
        card = holdfast.open(target, access="exclusive", timeout=PATIENCE)
    return card, scene.device_among(kept)


def _end(child: Child) -> None:
    try:
        child.kill()
        child.reap()
    except (ProcessLookupError, ChildProcessError):
        pass  # it was killed and reaped by its test


def reached(stack: scene.WarmStack, dying: Dying, state: str) -> None:
    """Wait until the lease is in a state."""

    def elsewhere() -> int:
        return int(stack.lease(dying.lease)["state"] != state)

    assert settle(elsewhere, goal=0, timeout=PATIENCE) == 0, stack.lease(dying.lease)


def killed_and_drained(stack: scene.WarmStack, exits: ExitStack, *, pinned: bool) -> Dying:
    """A client that died in the window and whose lease is quiet, but held by the test.

    The write certainly came after the kill. Whether the keeper saw the card at work depends on how
    long the kernel takes to end a process; it is tried a few times.
    """
    for attempt in range(ATTEMPTS):
        dying = die(stack, exits, pinned=pinned)
        reached(stack, dying, "quiet")
        told = stack.lease(dying.lease)
        if told["in_flight_at_death"] or attempt == ATTEMPTS - 1:
            break
        released(stack, dying)
    assert bool(told["completed_after_death"]) == bool(told["in_flight_at_death"])
    assert told["process_dead"]
    assert not told["hung_up"]
    assert told["withheld"], "nothing would keep the memory"
    return dying


def free_memory() -> int:
    return procfs.meminfo()["MemFree"]


def released(stack: scene.WarmStack, dying: Dying) -> None:
    """Let go of the lease; the keeper gives the memory back."""
    dying.let_go()
    reached(stack, dying, "released")


def test_a_transfer_completes_into_the_page_of_a_dead_process_that_is_held_until_it_is_quiet(
    stage: tuple[scene.WarmStack, ExitStack],
) -> None:
    stack, exits = stage
    pins, free = scene.outstanding_pins(), free_memory()
    dying = killed_and_drained(stack, exits, pinned=False)

    fd = stack.slab_bytes(BIG)
    try:
        kept = Mapping(fd, BIG, writable=False).array
    finally:
        os.close(fd)
    expected = np.zeros(BIG, np.uint8)
    expected[OFFSET - AROUND : OFFSET + COUNT + AROUND] = OWN
    expected[OFFSET : OFFSET + COUNT] = pattern()
    assert np.array_equal(kept, expected)
    del kept, expected

    assert free - free_memory() > BIG * 3 // 4, "the memory is free already"
    assert scene.outstanding_pins() > pins
    released(stack, dying)
    # What is left are the processes of the stack, and what they have touched since.
    most = BIG * 5 // 8
    missing = settle(lambda: max(0, free - free_memory()), goal=most, timeout=PATIENCE)
    assert missing <= most, "the memory did not come back"
    assert settle(lambda: scene.outstanding_pins() - pins, goal=0, timeout=PATIENCE) == 0


def test_own_memory_pinned_in_place_outlives_its_process_and_takes_the_write(
    stage: tuple[scene.WarmStack, ExitStack],
) -> None:
    stack, exits = stage
    pins, free = scene.outstanding_pins(), free_memory()
    dying = killed_and_drained(stack, exits, pinned=True)

    # The process and its page tables are gone; only the card still reaches the page.
    assert np.array_equal(read_back(stack, dying, dying.address + OFFSET), pattern())
    around = read_back(stack, dying, dying.address + OFFSET - COUNT)
    assert np.all(around == OWN)

    assert free - free_memory() > BIG * 3 // 4, "the memory is free already"
    assert scene.outstanding_pins() > pins
    released(stack, dying)
    # What is left are the processes of the stack, and what they have touched since.
    most = BIG * 5 // 8
    missing = settle(lambda: max(0, free - free_memory()), goal=most, timeout=PATIENCE)
    assert missing <= most, "the memory did not come back"
    assert settle(lambda: scene.outstanding_pins() - pins, goal=0, timeout=PATIENCE) == 0


def read_back(stack: scene.WarmStack, dying: Dying, address: int) -> npt.NDArray[np.uint8]:
    """``COUNT`` bytes at an IOVA of the dead client's, through the card.

    By way of the small buffer of the same lease, which the keeper's descriptor shows.
    """
    bar = RegisterView(dying.bar.load, dying.bar.store)
    for post, where in ((scene.post_from, address), (scene.post_to, dying.window)):
        post(bar, where, COUNT)
        assert settle(lambda: int(scene.busy(bar)), goal=0, timeout=PATIENCE) == 0
    fd = stack.slab_bytes(WINDOW_SLAB)
    try:
        data = os.pread(fd, COUNT, 0)
    finally:
        os.close(fd)
    if len(data) != COUNT:
        raise HoldfastError("the slab is short", operation="read back")
    return np.frombuffer(data, np.uint8)
