# SPDX-License-Identifier: Apache-2.0
"""Other ways for memory to go than a plain death: each under a transfer of QEMU's edu.

Runs inside a lab guest. An orphan that still has the registers mapped, a client that takes its own
buffer out of its address space, the OOM killer, a function that is taken away. In each the transfer
is posted first, the memory goes within its 100 ms, and the question is the same: does anything land
where it should not, and does the lease end?
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.device import Device
from holdfast.drivers.edu import EduEngine
from holdfast.errors import DeviceGone, HoldfastError
from holdfast.keeper import opening
from holdfast.kernel import libc, pci_sysfs
from holdfast.kernel.mapping import Mapping, Span
from holdfast.kernel.pci_sysfs import PciFunction
from holdfast.regs import edu as regs
from holdfast.regs.view import RegisterView
from holdfast.torture import edu_scene as scene
from holdfast.torture.actors import Child, spawn
from holdfast.torture.edu_actors import WINDOW, Bystander, engine_of
from holdfast.torture.outside import settle

pytestmark = [
    pytest.mark.guest,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

EXPECTED = set(filter(None, os.environ.get("HOLDFAST_LAB_EXPECT", "").split(",")))
PATIENCE = 60.0
"""Seconds. An emulated guest on a busy host is slow; nothing here is about speed."""
SLAB = 256 << 10
COUNT = regs.BUFFER_SIZE - 64
FROM_CARD = 0xA5
OWN = 0x11
PAGE = 4096
LIMIT = 32 << 20
"""Bytes of memory that the client of the OOM killer may have."""

Place = tuple[PciFunction, str]


def find(backend: str, where: str) -> Place:
    """An edu by one backend: on the root bus, or behind a root port."""
    driver = "uio_pci_generic" if backend == "uio" else "vfio-pci"
    for found in scene.edus(driver):
        here = "root" if found.bdf.bus == 0 else "port" if found.reset_methods else ""
        if here != where or not scene.alone(found):
            continue
        if backend == "uio" and not found.translated:
            return found, f"pci:{found.bdf}?backend=uio&dma_bits=40"
        if backend in scene.offered(found):
            return found, f"pci:{found.bdf}?backend={backend}"
    if backend in EXPECTED:
        pytest.fail(f"no edu for {backend} ({where}), though it is expected here")
    pytest.skip(f"no edu for {backend} here")


@pytest.fixture(params=["type1", "iommufd"])
def target(request: pytest.FixtureRequest) -> str:
    return find(str(request.param), "root")[1]


@pytest.fixture(params=["type1", "iommufd", "uio"])
def any_target(request: pytest.FixtureRequest) -> str:
    return find(str(request.param), "root")[1]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with ExitStack() as exits:
        ours, theirs = (exits.enter_context(end) for end in socket.socketpair())
        yield ours, theirs


def opened(target: str) -> Device:
    """The whole function, its own buffer filled with ``FROM_CARD``."""
    card = holdfast.open(target, access="exclusive", timeout=PATIENCE)
    source = card.alloc(COUNT, align=PAGE)
    source.array[:] = FROM_CARD
    engine_of(card).to_card(source).wait(PATIENCE)
    return card


def reached(stack: scene.WarmStack, lease: int, *states: str) -> str:
    """Wait until a lease is in one of these states; which one it is."""

    def elsewhere() -> int:
        return int(stack.lease(lease)["state"] not in states)

    assert settle(elsewhere, goal=0, timeout=PATIENCE) == 0, stack.lease(lease)
    return str(stack.lease(lease)["state"])


def end(child: Child) -> None:
    child.kill()
    child.reap()


# -- an orphan with the registers ------------------------------------------------------------


def open_and_keep(target: str) -> tuple[Device, Mapping]:
    """A lease, and a window of one's own onto the registers, which forked children inherit."""
    kept: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "close_all", kept.extend)
        card = opened(target)
    return card, Mapping(scene.device_among(kept), regs.BAR_SIZE)


def test_what_an_orphan_with_the_registers_posts_does_not_reach_the_next_lease(
    target: str,
) -> None:
    with scene.WarmStack(target) as stack:
        order_reading, order_writing = os.pipe2(os.O_CLOEXEC)
        orphan_says, orphan_writing = os.pipe2(os.O_CLOEXEC)

        def parent(_: int, writing: int) -> None:
            card, window = open_and_keep(target)
            buffer = card.alloc(COUNT, align=PAGE)
            address = int(buffer.iova)
            orphan = os.fork()
            if orphan == 0:
                try:
                    os.close(order_writing)
                    os.read(order_reading, 1)
                    scene.post_to(RegisterView(window.load, window.store), address, COUNT)
                    os.write(orphan_writing, b"p")
                    os.read(order_reading, 1)
                finally:
                    os._exit(0)
            engine_of(card).from_card(buffer)
            told = np.array([card.lease.number, address, orphan], np.int64)
            os.write(writing, told.tobytes())
            signal.pause()

        def next_lease(reading: int, writing: int) -> None:
            with holdfast.open(target, access="exclusive", timeout=PATIENCE) as card:
                memory = card.alloc(SLAB)
                memory.array[:] = OWN
                os.write(writing, np.int64(memory.iova).tobytes())
                os.read(reading, 1)
                os.write(writing, b"=" if np.all(memory.array == OWN) else b"!")

        dying = spawn(parent)
        os.close(order_reading)
        os.close(orphan_writing)
        following: Child | None = None
        try:
            told = np.frombuffer(dying.read(24, PATIENCE), np.int64)
            lease, address, orphan = (int(value) for value in told)
            pidfd = os.pidfd_open(orphan)
            dying.kill()
            dying.reap()
            reached(stack, lease, "released")
            following = spawn(next_lease)
            given = int(np.frombuffer(following.read(8, PATIENCE), np.int64)[0])
            assert not given <= address < given + SLAB
            os.write(order_writing, b"p")
            assert os.read(orphan_says, 1) == b"p"
            time.sleep(2 * WINDOW)  # the card's own: nothing signals a write that must not come
            following.tell(b"j")
            assert following.read(1, PATIENCE) == b"="
        finally:
            if following is not None:
                end(following)
            os.close(order_writing)  # ends the orphan, too
            os.close(orphan_says)
        select.select([pidfd], [], [], PATIENCE)  # no keeper can come while it has the registers
        os.close(pidfd)


# -- a buffer that leaves its address space ----------------------------------------------------


def unmapped(address: int, size: int) -> None:
    """munmap, and anonymous memory in the same place at once."""
    libc.munmap(address, size)
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED
    libc.mmap(address, size, libc.PROT_READ | libc.PROT_WRITE, flags, -1, 0)
    np.asarray(Span(address, size))[:] = OWN


def not_needed(address: int, size: int) -> None:
    """MADV_DONTNEED: the page tables forget the memory, the file does not."""
    libc.madvise(address, size, DONTNEED)


DONTNEED = 4
"""MADV_DONTNEED (asm-generic/mman-common.h)."""


@pytest.mark.parametrize("leave", [unmapped, not_needed])
def test_a_buffer_that_its_client_unmaps_takes_the_write_all_the_same(
    any_target: str, leave: Callable[[int, int], None]
) -> None:
    slab = (2 << 20) if "backend=uio" in any_target else SLAB

    def body(reading: int, writing: int) -> None:
        card = opened(any_target)
        buffer = card.alloc(slab)
        address = buffer.array.ctypes.data
        scene.post_to(card.bars[regs.BAR].registers, int(buffer.iova) + slab - PAGE, COUNT)
        leave(address, slab)
        os.write(writing, np.int64(card.lease.number).tobytes())
        while scene.busy(card.bars[regs.BAR].registers):
            time.sleep(0.005)
        mine = np.asarray(Span(address, slab))
        clean = leave is not_needed or bool(np.all(mine == OWN))
        os.write(writing, b"=" if clean else b"!")
        os.read(reading, 1)
        del mine, buffer
        card.close()
        os.write(writing, b"c")

    with scene.WarmStack(any_target) as stack, Bystander(OWN) as bystander:
        child = spawn(body)
        try:
            lease = int(np.frombuffer(child.read(8, PATIENCE), np.int64)[0])
            assert child.read(1, PATIENCE) == b"="
            assert np.all(last_page(stack, slab) == FROM_CARD)
            child.tell(b"g")
            assert child.read(1, PATIENCE) == b"c"
        finally:
            end(child)
        reached(stack, lease, "released")
        for memory in (*bystander.arrays, *bystander.drained()):
            assert np.all(memory == OWN)


def last_page(stack: scene.WarmStack, slab: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """What landed in a slab's last page, by the keeper's own descriptor."""
    fd = stack.slab_bytes(slab)
    try:
        return np.frombuffer(os.pread(fd, COUNT, slab - PAGE), np.uint8)
    finally:
        os.close(fd)


def test_a_client_that_execs_under_a_transfer_holds_its_memory_until_it_ends(
    target: str,
) -> None:
    big = 2 * SLAB

    def body(_: int, writing: int) -> None:
        card = opened(target)
        buffer = card.alloc(big)
        os.write(writing, np.int64(card.lease.number).tobytes())
        scene.post_to(card.bars[regs.BAR].registers, int(buffer.iova) + big - PAGE, COUNT)
        os.execv(sys.executable, [sys.executable, "-S", "-c", "import signal; signal.pause()"])

    with scene.WarmStack(target) as stack:
        child = spawn(body)
        try:
            lease = int(np.frombuffer(child.read(8, PATIENCE), np.int64)[0])
            reached(stack, lease, "quiet")  # hung up, but its process lives: held
            told = stack.lease(lease)
            assert told["hung_up"]
            assert not told["process_dead"]
            assert np.all(last_page(stack, big) == FROM_CARD)
        finally:
            end(child)
        reached(stack, lease, "released")


# -- the OOM killer ------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Path]:
    """A memory cgroup of ``LIMIT`` bytes (cgroup v2)."""
    root = tmp_path / "cgroup"
    root.mkdir()
    mount = shutil.which("mount")
    command = [mount] if mount else ["busybox", "mount"]
    subprocess.run([*command, "-t", "cgroup2", "none", str(root)], check=True)
    inner = root / "holdfast-oom"
    try:
        (root / "cgroup.subtree_control").write_text("+memory")
        inner.mkdir()
        (inner / "memory.max").write_text(str(LIMIT))
        yield inner
    finally:
        if inner.exists():
            inner.rmdir()
        umount = [shutil.which("umount")] if mount else ["busybox", "umount"]
        subprocess.run([*map(str, umount), str(root)], check=True)


def test_the_oom_killer_takes_no_page_that_the_card_still_writes(
    target: str, group: Path, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Pinned in place: private memory, which the OOM reaper takes before the process has ended."""
    ours, theirs = pair
    pins = scene.outstanding_pins()
    size = LIMIT // 2

    def body(_: int, writing: int) -> None:
        card = opened(target)
        scene.give_lifeline(theirs, card)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        pin = card.pin(np.full(size, OWN, np.uint8))
        assert pin.how == "in place"
        memory = np.empty(2 * LIMIT, np.uint8)
        at = 0
        while int((group / "memory.current").read_text()) < LIMIT - (2 << 20):
            memory[at : at + (256 << 10) : PAGE] = 1
            at += 256 << 10
        os.write(writing, np.int64(card.lease.number).tobytes())
        scene.post_to(card.bars[regs.BAR].registers, int(pin.iova), COUNT)
        memory[at::PAGE] = 1  # bounded: twice the limit
        os._exit(3)

    with scene.WarmStack(target) as stack:
        child = spawn(body)
        lease = int(np.frombuffer(child.read(8, PATIENCE), np.int64)[0])
        lifeline = scene.take_descriptor(ours)
        try:
            status = child.reap()
            assert os.WIFSIGNALED(status)
            assert os.WTERMSIG(status) == signal.SIGKILL
            assert "oom_kill 1" in (group / "memory.events").read_text()
            with Bystander(OWN) as bystander:
                reached(stack, lease, "quiet")
                # The process and its page tables are gone, its pinned pages are not.
                assert scene.outstanding_pins() - pins >= size // (2 << 20)
                time.sleep(2 * WINDOW)  # the card's own
                for memory in (*bystander.arrays, *bystander.drained()):
                    assert np.all(memory == OWN)
        finally:
            os.close(lifeline)
        reached(stack, lease, "released")
        assert settle(lambda: scene.outstanding_pins() - pins, goal=0, timeout=PATIENCE) == 0


# -- a function that is taken away ------------------------------------------------------------


@pytest.mark.parametrize("backend", ["type1", "iommufd"])
def test_a_removal_waits_until_the_transfer_is_over_and_a_rescan_brings_the_function_back(
    backend: str,
) -> None:
    found, target = find(backend, "port")

    def body(_: int, writing: int) -> None:
        card = opened(target)
        buffer = card.alloc(SLAB)
        running = engine_of(card)
        scene.post_to(card.bars[regs.BAR].registers, int(buffer.iova), COUNT)
        os.write(writing, np.int64(time.monotonic_ns()).tobytes())
        while True:
            time.sleep(0.01)
            try:
                card.alloc(1)
            except DeviceGone:
                break
        del running
        os.write(writing, b"g")

    def remove(_: int, __: int) -> None:
        (pci_sysfs.device_path(found.bdf) / "remove").write_text("1")

    with scene.WarmStack(target), Bystander(OWN) as bystander:
        client = spawn(body)
        posted = int(np.frombuffer(client.read(8, PATIENCE), np.int64)[0])
        remover = spawn(remove)  # the kernel waits for VFIO, VFIO for its last user
        assert remover.reap() == 0
        removed = time.monotonic_ns()
        assert client.read(1, PATIENCE) == b"g"
        assert client.reap() == 0
        assert removed - posted > WINDOW * 1e9 * 0.9, "it was let go of in the transfer"
        assert not pci_sysfs.device_path(found.bdf).exists()
        for memory in (*bystander.arrays, *bystander.drained()):
            assert np.all(memory == OWN)
    bring_back(found)
    with scene.WarmStack(target):
        assert works(target)


def bring_back(found: PciFunction) -> None:
    """Find the function again, and bind it as it was."""
    Path("/sys/bus/pci/rescan").write_text("1")
    (pci_sysfs.device_path(found.bdf) / "driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(str(found.bdf))
    assert pci_sysfs.function(found.bdf).driver == "vfio-pci"


def works(target: str) -> bool:
    """Whether a transfer brings what the card was given."""

    def body(_: int, writing: int) -> None:
        card = opened(target)
        assert isinstance(card.dma, EduEngine)
        into = card.alloc(COUNT, align=PAGE)
        card.dma.from_card(into).wait(PATIENCE)
        os.write(writing, b"=" if np.all(into.array == FROM_CARD) else b"!")
        card.close()

    child = spawn(body)
    told = child.read(1, PATIENCE)
    if child.reap() != 0:
        raise HoldfastError("the client failed", operation="try the function")
    return told == b"="
