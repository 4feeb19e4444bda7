# SPDX-License-Identifier: Apache-2.0
"""A client is SIGKILLed in the middle of DMA, and its keeper revokes.

Runs inside a lab guest, on QEMU's edu, which nothing stops once it was started. On the root bus it
has no reset; behind a root port it has one that is acknowledged and does not stop its DMA timer.
What remains is to take bus mastering away until the card's own busy bit clears, or to give up on it
and unmap: then its addresses must not be anybody's when bus mastering comes back and the write is
still to come.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pytest

import holdfast
from holdfast.drivers.edu import EduEngine
from holdfast.keeper.client import LeaseClient
from holdfast.keeper.deadlines import Deadlines
from holdfast.keeper.server import Settings
from holdfast.kernel.pci_sysfs import PciFunction
from holdfast.regs import edu as regs
from holdfast.torture import edu_scene as scene
from holdfast.torture.actors import Child, spawn
from holdfast.torture.edu_actors import WINDOW
from holdfast.torture.outside import settle
from holdfast.uapi.pci_regs import Command
from holdfast.values import Policy

pytestmark = [
    pytest.mark.guest,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

EXPECTED = set(filter(None, os.environ.get("HOLDFAST_LAB_EXPECT", "").split(",")))
PATIENCE = 60.0
"""Seconds. An emulated guest on a busy host is slow; nothing here is about speed."""
ATTEMPTS = 8
SLAB = 256 << 10
COUNT = regs.BUFFER_SIZE - 64
FROM_CARD = 0xA5
OWN = 0x11
TENANTS = 2
"""Slabs that the next tenant takes, at the addresses that come next."""

SLOW = "page_poison=1" in Path("/proc/cmdline").read_text(encoding="ascii")
"""Whether the kernel checks every page: then a reset, say, takes longer than the card's 100 ms."""

Place = tuple[PciFunction, str]


@pytest.fixture(params=["type1-root", "type1-port", "iommufd-root", "iommufd-port"])
def place(request: pytest.FixtureRequest) -> Place:
    """An edu, with the target that reaches it by one backend."""
    backend, _, where = str(request.param).partition("-")
    for found in scene.edus():
        on_root = found.bdf.bus == 0
        resettable = bool(found.reset_methods)
        wanted = (on_root, resettable) == (where == "root", where == "port")
        if wanted and scene.alone(found) and backend in scene.offered(found):
            return found, f"pci:{found.bdf}?backend={backend}"
    if backend in EXPECTED:
        pytest.fail(f"no edu for {backend} ({where}), though it is expected here")
    pytest.skip(f"no edu for {backend} here")


@dataclass(frozen=True)
class Dead:
    """What a client had that came to its end in its transfer."""

    lease: int
    address: int
    posted_ns: int
    """Before the command was written: the write comes 100 ms after that, or later."""

    def sleep_until_the_write_is_over(self) -> None:
        """The card's own time: nothing signals a write that must not come."""
        over = self.posted_ns + int(2.5 * WINDOW * 1e9)
        time.sleep(max(0, over - time.monotonic_ns()) / 1e9)

    @property
    def write_is_to_come(self) -> bool:
        return time.monotonic_ns() < self.posted_ns + int(WINDOW * 1e9)


class Client:
    """A client that fills the card, posts a card-to-host transfer and comes to its end at once.

    ``end``: "killed" (SIGKILL; ``give`` takes a duplicate of its lease), "hung up" (its end of the
    lease is shut down, the process lives on until it is killed), or "both". Not from outside: 100
    ms are short where another process must be scheduled for it. On a kernel that checks every page
    a process takes longer to die than the card to write, so the hang-up comes first there.
    """

    def __init__(self, stack: scene.WarmStack, end: str, give: socket.socket | None = None) -> None:
        def body(_: int, writing: int) -> None:
            card = holdfast.open(stack.target, access="exclusive", timeout=PATIENCE)
            assert isinstance(card.dma, EduEngine)
            assert isinstance(card.lease, LeaseClient)
            if give is not None:
                scene.give_lifeline(give, card)
            buffer = card.alloc(COUNT, align=4096)
            buffer.array[:] = FROM_CARD
            card.dma.to_card(buffer).wait(PATIENCE)
            buffer.array[:] = OWN
            told = np.array([card.lease.number, int(buffer.iova), time.monotonic_ns()], np.int64)
            os.write(writing, told.tobytes())
            sock = socket.socket(fileno=os.dup(card.lease.fileno()))
            scene.post_to(card.bars[regs.BAR].registers, int(buffer.iova), COUNT)
            if end != "killed":
                sock.shutdown(socket.SHUT_RDWR)
            if end != "hung up":
                os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()

        self._child = spawn(body)
        told = np.frombuffer(self._child.read(24, PATIENCE), np.int64)
        lease, address, posted = (int(value) for value in told)
        self.dead = Dead(lease, address, posted)

    def __enter__(self) -> Dead:
        return self.dead

    def __exit__(self, *exit_: object) -> None:
        self._child.kill()
        self._child.reap()


def wait_for(stack: scene.WarmStack, dead: Dead, state: str) -> list[str]:
    """Wait until a lease is in a state; returns the states it went through."""

    def elsewhere() -> int:
        return int(stack.lease(dead.lease)["state"] != state)

    assert settle(elsewhere, goal=0, timeout=PATIENCE) == 0, stack.lease(dead.lease)
    return [str(step[0]) for step in stack.lease(dead.lease)["log"]]


def reason(stack: scene.WarmStack, dead: Dead, state: str) -> str:
    """What the keeper wrote down when the lease entered a state."""
    return next(str(why) for name, _, why in stack.lease(dead.lease)["log"] if name == state)


def is_bus_master(found: PciFunction) -> bool:
    return bool(scene.command_register(found) & Command.MASTER)


@pytest.fixture
def lifelines() -> Iterator[tuple[socket.socket, socket.socket]]:
    with ExitStack() as exits:
        ours, theirs = (exits.enter_context(end) for end in socket.socketpair())
        yield ours, theirs


def is_isolated(stack: scene.WarmStack, dead: Dead, found: PciFunction) -> bool:
    """Whether the keeper took bus mastering away; if so, it is off, and nothing has landed.

    The lease is held by a sign of death that is missing, so everything is as the keeper left it.
    """
    wait_for(stack, dead, "quiet")
    began = [at for state, at, _ in stack.lease(dead.lease)["log"] if state == "isolating"]
    if not began or began[0] > dead.posted_ns + int(WINDOW / 2 * 1e9):
        return False  # it came with the write or after it
    assert reason(stack, dead, "quiet") == "bus master off, at rest"
    assert not is_bus_master(found)
    dead.sleep_until_the_write_is_over()
    assert np.all(contents(stack) == OWN)
    return True


def test_bus_mastering_is_off_until_the_card_of_a_killed_client_is_idle(
    place: Place,
    lifelines: tuple[socket.socket, socket.socket],
    record_property: Callable[[str, object], None],
) -> None:
    found, target = place
    ours, theirs = lifelines
    with scene.WarmStack(target, Settings(policy=Policy.REVOKE)) as stack:
        for _ in range(2):  # whether the keeper comes in time is the kernel's affair
            with Client(stack, "killed", theirs) as dead:
                lifeline = scene.take_descriptor(ours)
                try:
                    isolated = is_isolated(stack, dead, found)
                finally:
                    os.close(lifeline)
                wait_for(stack, dead, "released")
            if isolated:
                break
        record_property("isolated", isolated)
        work_there_and_back(stack)
        assert stack.ps()["quarantined_bytes"] == 0


def test_nothing_lands_when_a_client_hangs_up_and_the_keeper_comes_in_time(place: Place) -> None:
    found, target = place
    with scene.WarmStack(target, Settings(policy=Policy.REVOKE)) as stack:
        for _ in range(ATTEMPTS):
            with Client(stack, "hung up") as dead:
                isolated = is_isolated(stack, dead, found)
            wait_for(stack, dead, "released")
            if isolated:
                break
        else:
            pytest.fail("the keeper never came within the window")
        work_there_and_back(stack)
        assert stack.ps()["quarantined_bytes"] == 0


def contents(stack: scene.WarmStack) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The dead client's buffer, by the keeper's own descriptor."""
    fd = stack.slab_bytes(SLAB)
    try:
        return np.frombuffer(os.pread(fd, COUNT, 0), np.uint8)
    finally:
        os.close(fd)


def work_there_and_back(stack: scene.WarmStack) -> None:
    """The next lease of the whole function finds bus mastering on, and its own bytes only."""
    assert scene.there_and_back(stack.target, 1, PATIENCE)


def test_a_write_that_comes_after_all_reaches_no_next_tenant(
    place: Place, record_property: Callable[[str, object], None]
) -> None:
    """The card is given up before it is idle: unmapped, its addresses retired, bus master on."""
    _, target = place
    hasty = Settings(policy=Policy.REVOKE, deadlines=Deadlines(isolate=0.001))
    given_up = refused = in_time = 0
    with scene.WarmStack(target, hasty) as stack:
        for attempt in range(ATTEMPTS):
            with Tenant(stack) as tenant, KernelLog() as log, Client(stack, "both") as dead:
                unmapped = "unmapped" in wait_for(stack, dead, "released")
                addresses = tenant.take()
                came_first = dead.write_is_to_come
                dead.sleep_until_the_write_is_over()
                assert tenant.foreign_bytes() == 0
                given_up += unmapped
                if unmapped:
                    assert "IOVAs retired" in reason(stack, dead, "unmapped")
                    assert all(not at <= dead.address < at + SLAB for at in addresses)
                    refused += log.refused(dead.address)
                    in_time += came_first
            if refused and (in_time or attempt > 2):
                break
        record_property("refused_writes", refused)
        record_property("tenants_before_the_write", in_time)
        assert given_up, "the keeper never came within the window"
        assert refused or SLOW, "no write came after the card was given up"
        work_there_and_back(stack)  # and when it is idle at last, it is of use again


class KernelLog:
    """What the kernel says from now on. A context manager."""

    def __enter__(self) -> Self:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)
        return self

    def refused(self, address: int) -> bool:
        """Whether the IOMMU refused a write to an address (drivers/iommu/intel/dmar.c)."""
        said = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                said += os.read(self._fd, 8192)
        return f"fault addr {address:#x} ".encode() in said

    def __exit__(self, *exit_: object) -> None:
        os.close(self._fd)


class Tenant:
    """A process with a lease of memory only, which it takes when it is told to."""

    def __init__(self, stack: scene.WarmStack) -> None:
        def body(reading: int, writing: int) -> None:
            with holdfast.open(stack.target, access="shared", channels=0, timeout=PATIENCE) as own:
                os.write(writing, b"r")
                os.read(reading, 1)
                memory = [own.alloc(SLAB) for _ in range(TENANTS)]
                for piece in memory:
                    piece.array[:] = OWN
                os.write(writing, np.array([p.iova for p in memory], np.int64).tobytes())
                os.read(reading, 1)
                foreign = sum(int(np.count_nonzero(p.array != OWN)) for p in memory)
                os.write(writing, np.int64(foreign).tobytes())

        self._child: Child = spawn(body)
        assert self._child.read(1, PATIENCE) == b"r"

    def take(self) -> list[int]:
        """Take memory; returns where the card would see it."""
        self._child.tell(b"t")
        return [int(at) for at in np.frombuffer(self._child.read(8 * TENANTS, PATIENCE), np.int64)]

    def foreign_bytes(self) -> int:
        self._child.tell(b"j")
        return int(np.frombuffer(self._child.read(8, PATIENCE), np.int64)[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exit_: object) -> None:
        self._child.kill()
        self._child.reap()
