# SPDX-License-Identifier: Apache-2.0
"""The backend without an IOMMU on a real kernel, driving QEMU's edu. Runs inside a lab guest.

The machine is booted with its IOMMU off, has an edu whose ``dma_mask`` covers all of its memory,
and root runs the tests. ``HOLDFAST_LAB_EXPECT`` containing "uio" turns what is missing into a
failure. Content and the kernel's counts are the judges. Where a frame is not visible through any
file any more, edu itself reads it back.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from holdfast.backends.uio import UIO_DRIVER, UioBackend
from holdfast.contracts import FunctionBackend
from holdfast.dma.slab import SlabMemory
from holdfast.errors import (
    BadAccess,
    BadTarget,
    Busy,
    Closed,
    DeviceGone,
    NotSupported,
    OutOfMemory,
)
from holdfast.kernel import events, hugetlb, libc, pagemap, pci_sysfs
from holdfast.regs import edu
from holdfast.testing.conformance import BackendConformance
from holdfast.uapi import pci_regs
from holdfast.uapi.pci_regs import Command
from holdfast.values import CONFIG_REGION, Bdf, IrqIndex, Target

pytestmark = pytest.mark.guest

EXPECTED = "uio" in os.environ.get("HOLDFAST_LAB_EXPECT", "").split(",")
HUGE = hugetlb.HUGE_PAGE
POOL = 32
"""Huge pages that the tests need at least."""
COUNT = 4096
"""Bytes per transfer: all of edu's buffer."""
DEADLINE = 20.0
"""Seconds. A transfer of edu takes 100 ms of guest time."""
T = TypeVar("T")
Opening = Callable[[], UioBackend]
PATTERN = bytes(range(256)) * (COUNT // 256)
OTHER = bytes(reversed(PATTERN))


# -- the machine ------------------------------------------------------------


def absent(why: str) -> None:
    if EXPECTED:
        pytest.fail(f"{why}, though it is expected here")
    pytest.skip(why)


def bind(bdf: Bdf, driver: str | None) -> None:
    """Have the function bound to ``driver``, or to none."""
    directory = pci_sysfs.device_path(bdf)
    if pci_sysfs.function(bdf).driver == driver:
        return
    if (directory / "driver").exists():
        (directory / "driver/unbind").write_text(str(bdf))
    (directory / "driver_override").write_text((driver or "") + "\n")
    if driver is not None:
        Path("/sys/bus/pci/drivers_probe").write_text(str(bdf))
    if pci_sysfs.function(bdf).driver != driver:
        absent(f"{driver} does not bind")


@pytest.fixture(scope="module")
def bdf() -> Bdf:
    """An edu that nothing translates for, and huge pages."""
    found = [
        function
        for function in pci_sysfs.functions()
        if (function.vendor, function.device) == (edu.VENDOR, edu.DEVICE)
        and (not function.translated or function.iommu_type == "identity")
    ]
    if not found:
        absent("no edu without an IOMMU")
    try:
        hugetlb.mount_point()
    except NotSupported as error:
        absent(error.what)
    if hugetlb.pool().available < POOL:
        Path("/proc/sys/vm/nr_hugepages").write_text(str(POOL))
        if hugetlb.pool().available < POOL:
            absent("no memory for huge pages")
    return found[0].bdf


@pytest.fixture(autouse=True)
def swept(bdf: Bdf) -> Iterator[None]:
    """What a failed test leaves must not fail the next ones."""
    yield
    for file in hugetlb.mount_point().iterdir():
        file.unlink()


@pytest.fixture(params=[None, UIO_DRIVER], ids=["no_driver", "uio_pci_generic"])
def driver(request: pytest.FixtureRequest) -> str | None:
    return None if request.param is None else str(request.param)


def target_of(bdf: Bdf) -> Target:
    return Target.parse(f"pci:{bdf}?backend=uio&dma_bits=40")


@pytest.fixture
def backend(bdf: Bdf, driver: str | None) -> Iterator[UioBackend]:
    """A fresh backend; afterwards all its memory is back, no file is left, and nothing else."""
    bind(bdf, driver)
    with untouched():
        opened = UioBackend(target_of(bdf))
        yield opened
        opened.close()
        gc.collect()


@pytest.fixture
def opening(bdf: Bdf) -> Iterator[Opening]:
    """Opens a backend that is closed after the test at the latest."""
    with ExitStack() as opened:
        yield lambda: opened.enter_context(closing(UioBackend(target_of(bdf))))


@contextmanager
def untouched() -> Iterator[None]:
    """Huge pages, files, descriptors and threads are afterwards what they were before."""
    before = state()
    yield
    assert eventually(lambda: state() == before), f"{before} became {state()}"


def state() -> tuple[hugetlb.Pool, list[str], int, int]:
    files = sorted(os.listdir(hugetlb.mount_point()))
    return hugetlb.pool(), files, len(os.listdir("/proc/self/fd")), threading.active_count()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# -- edu ------------------------------------------------------------


def command(backend: FunctionBackend) -> int:
    return int.from_bytes(backend.region_read(CONFIG_REGION, pci_regs.COMMAND, 2), "little")


def master(backend: FunctionBackend, *, on: bool) -> None:
    word = command(backend)
    word = word | Command.MASTER if on else word & ~int(Command.MASTER)
    backend.region_write(CONFIG_REGION, pci_regs.COMMAND, word.to_bytes(2, "little"))
    assert bool(command(backend) & Command.MASTER) == on


def store(backend: FunctionBackend, offset: int, value: int, width: int = 8) -> None:
    backend.region_write(edu.BAR, offset, value.to_bytes(width, "little"))


def load(backend: FunctionBackend, offset: int, width: int = 8) -> int:
    return int.from_bytes(backend.region_read(edu.BAR, offset, width), "little")


def busy(backend: FunctionBackend) -> bool:
    return bool(load(backend, edu.DMA_COMMAND.offset) & edu.DmaCommand.START)


def start(backend: FunctionBackend, address: int, *, to_ram: bool, irq: bool = False) -> None:
    """Begin a transfer between ``address`` and edu's buffer; it moves 100 ms later."""
    ends = (edu.BUFFER_START, address) if to_ram else (address, edu.BUFFER_START)
    store(backend, edu.DMA_SOURCE.offset, ends[0])
    store(backend, edu.DMA_DESTINATION.offset, ends[1])
    store(backend, edu.DMA_COUNT.offset, COUNT)
    word = edu.DmaCommand.START
    word |= edu.DmaCommand.TO_RAM if to_ram else 0
    word |= edu.DmaCommand.IRQ if irq else 0
    store(backend, edu.DMA_COMMAND.offset, word)


def transfer(backend: FunctionBackend, address: int, *, to_ram: bool) -> None:
    start(backend, address, to_ram=to_ram)
    assert eventually(lambda: not busy(backend))


def put(memory: SlabMemory, data: bytes, offset: int = 0) -> None:
    with mmap.mmap(memory.fd, memory.size) as view:
        view[offset : offset + len(data)] = data


def get(memory: SlabMemory, count: int = COUNT, offset: int = 0) -> bytes:
    with mmap.mmap(memory.fd, memory.size) as view:
        return view[offset : offset + count]


def address_of(memory: SlabMemory) -> int:
    assert memory.addresses is not None
    return memory.addresses[0]


def read_frame(backend: UioBackend, address: int) -> bytes:
    """What is in memory at a physical address, by way of edu's buffer and a fresh slab."""
    window = backend.memory().take(COUNT)
    transfer(backend, address, to_ram=False)
    transfer(backend, address_of(window), to_ram=True)
    found = get(window)
    backend.memory().recycle(window)
    return found


def pages_of(memory: SlabMemory) -> set[int]:
    """The physical address of every huge page."""
    assert memory.addresses is not None
    return {
        address + step
        for address, (_, size) in zip(memory.addresses, memory.extents, strict=True)
        for step in range(0, size, HUGE)
    }


# -- other processes ------------------------------------------------------------


@contextmanager
def child(body: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    """A forked process that runs ``body(write_end)``; yields its pid and the pipe's read end."""
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(readable)
            body(writable)
            status = 0
        finally:
            os._exit(status)
    os.close(writable)
    try:
        yield pid, readable
    finally:
        os.close(readable)
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def said(readable: int) -> bytes:
    assert select.select([readable], [], [], DEADLINE)[0], "the child says nothing"
    return os.read(readable, 4096)


# -- the contract ------------------------------------------------------------


class TestUioBackend(BackendConformance):
    @pytest.fixture
    def backend(self, bdf: Bdf, driver: str | None) -> Iterator[FunctionBackend]:
        bind(bdf, driver)
        with untouched():
            backend = UioBackend(target_of(bdf))
            yield backend
            backend.close()
            gc.collect()


def test_registers_are_read_and_written_with_their_width(backend: UioBackend) -> None:
    assert load(backend, edu.IDENTIFICATION.offset, 4) == edu.IDENTIFICATION_VALUE
    store(backend, edu.LIVENESS.offset, 0x1234, 4)
    assert load(backend, edu.LIVENESS.offset, 4) == ~0x1234 & 0xFFFFFFFF
    store(backend, edu.DMA_SOURCE.offset, 0x11_2233_4455)
    assert load(backend, edu.DMA_SOURCE.offset) == 0x11_2233_4455
    assert backend.region_read_multi([(0, 0, 4), (0, 0x80, 8)])[1] == struct.pack(
        "<Q", 0x11_2233_4455
    )
    with pytest.raises(BadAccess):
        backend.region_read_multi([(0, 0, 16)])


def test_bus_master_is_off_when_opened_and_after_close(
    bdf: Bdf, driver: str | None, opening: Opening
) -> None:
    bind(bdf, driver)
    config = pci_sysfs.device_path(bdf) / "config"
    for _ in range(2):
        backend = opening()
        assert not command(backend) & Command.MASTER
        master(backend, on=True)
        backend.close()
        assert not config.read_bytes()[pci_regs.COMMAND] & Command.MASTER


def test_a_second_keeper_is_told_who_has_the_function(backend: UioBackend, bdf: Bdf) -> None:
    with pytest.raises(Busy, match=f"pid {os.getpid()} "):
        UioBackend(target_of(bdf))


# -- DMA ------------------------------------------------------------


def test_edu_moves_content_from_one_slab_to_another(backend: UioBackend) -> None:
    source, destination = backend.memory().take(HUGE), backend.memory().take(3 * HUGE)
    put(source, PATTERN, offset=HUGE - COUNT)
    master(backend, on=True)
    transfer(backend, address_of(source) + HUGE - COUNT, to_ram=False)
    assert destination.addresses is not None
    last = destination.addresses[-1] + destination.extents[-1][1] - COUNT
    transfer(backend, last, to_ram=True)
    assert get(destination, offset=3 * HUGE - COUNT) == PATTERN
    assert get(destination) == bytes(COUNT)
    for memory in (source, destination):
        backend.memory().recycle(memory)


def test_memory_that_the_function_cannot_reach_is_refused(backend: UioBackend) -> None:
    backend.memory().dma_bits = 21
    with pytest.raises(OutOfMemory, match=r"dma_bits=21.*dma_mask"):
        backend.memory().take(HUGE)
    assert backend.memory().held_bytes == 0


def test_too_few_huge_pages_name_the_command_that_helps(backend: UioBackend) -> None:
    pool = hugetlb.pool()
    wanted = pool.total + 3
    with pytest.raises(OutOfMemory, match=r"echo \d+ > /proc/sys/vm/nr_hugepages") as caught:
        backend.memory().take((pool.available + 3) * HUGE)
    assert f"echo {wanted} >" in caught.value.hint
    assert hugetlb.pool() == pool


@contextmanager
def hostile(fd: int, size: int) -> Iterator[Callable[[], None]]:
    """A client that does its worst to the file it was given, when it is called, and at once."""
    word = events.make()

    def body(out: int) -> None:
        events.wait(word, DEADLINE)
        mode = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
        libc.fallocate(fd, mode, 0, size)
        os.ftruncate(fd, 0)
        os.write(out, b"done")

    with child(body) as (_, readable):

        def strike() -> None:
            events.ring(word)
            assert said(readable) == b"done"

        yield strike
    events.close(word)


def in_flight(backend: UioBackend, attempt: Callable[[], T]) -> T:
    """What ``attempt`` answered while the transfer that it began was still in flight.

    A transfer takes 100 ms whatever the machine is busy with, so it may take more than one.
    """
    for _ in range(20):
        outcome = attempt()
        if busy(backend):
            return outcome
    pytest.fail("the transfer always ended too early")


def loaded(backend: UioBackend) -> None:
    """Put PATTERN into edu's buffer."""
    source = backend.memory().take(HUGE)
    put(source, PATTERN)
    master(backend, on=True)
    transfer(backend, address_of(source), to_ram=False)
    backend.memory().recycle(source)


def test_frames_survive_punch_and_truncate_while_dma_is_in_flight(backend: UioBackend) -> None:
    memory = backend.memory()
    loaded(backend)
    victims: list[SlabMemory] = []

    def attempt() -> SlabMemory:
        victims.append(memory.take(2 * HUGE))
        with hostile(victims[-1].fd, 2 * HUGE) as strike:
            start(backend, address_of(victims[-1]), to_ram=True)
            strike()
        return victims[-1]

    victim = in_flight(backend, attempt)
    assert os.fstat(victim.fd).st_size == 0
    others = [memory.take(HUGE) for _ in range(hugetlb.pool().available)]
    given = set().union(*map(pages_of, others))
    assert not pages_of(victim) & given, "a frame was given to somebody else"
    assert eventually(lambda: not busy(backend))
    assert all(get(other) == bytes(COUNT) for other in others)
    for other in others:
        memory.recycle(other)
    # No file shows the frame any more; the card still reaches it, and finds what it wrote.
    assert read_frame(backend, address_of(victim)) == PATTERN
    for each in victims:
        memory.recycle(each)  # this process lives on: no SIGBUS


def test_without_a_pin_the_frame_goes_to_the_next_one_and_is_overwritten(
    backend: UioBackend,
) -> None:
    """The negative control: the same file, the same transfer, and nobody's pin."""
    memory = backend.memory()
    loaded(backend)
    innocents: list[SlabMemory] = []

    def attempt() -> SlabMemory:
        fd = hugetlb.create(hugetlb.mount_point(), f"unpinned-{len(innocents)}", HUGE)
        address = hugetlb.map_whole(fd, HUGE)
        ctypes.memset(address, 0, 1)  # fault it in
        frame = int(pagemap.physical(address, HUGE, HUGE)[0])
        with hostile(fd, HUGE) as strike:
            start(backend, frame, to_ram=True)
            strike()
        innocents.append(memory.take(HUGE))
        while address_of(innocents[-1]) != frame:  # freed last, given out first: it is soon there
            innocents.append(memory.take(HUGE))
        put(innocents[-1], OTHER)
        hugetlb.unmap(address, HUGE)
        os.close(fd)
        return innocents[-1]

    innocent = in_flight(backend, attempt)
    assert get(innocent) == OTHER
    assert eventually(lambda: not busy(backend))
    assert get(innocent) == PATTERN, "somebody else's memory was not overwritten"
    for taken in innocents:
        memory.recycle(taken)
    for file in hugetlb.mount_point().glob("unpinned-*"):
        file.unlink()


# -- the keeper's own death ------------------------------------------------------------


def keeper(bdf: Bdf) -> Callable[[int], None]:
    """A keeper with two slabs, a transfer into the first one, and no time to clean up."""

    def body(out: int) -> None:
        backend = UioBackend(target_of(bdf))
        loaded(backend)
        first, second = backend.memory().take(2 * HUGE), backend.memory().take(HUGE)
        start(backend, address_of(first), to_ram=True)
        assert first.addresses is not None
        addresses = [*first.addresses, address_of(second)]
        os.write(out, struct.pack(f"<{len(addresses)}Q", *addresses))
        signal.pause()

    return body


def test_what_a_killed_keeper_leaves_is_found_and_not_used_before_it_is_recycled(
    bdf: Bdf, driver: str | None, opening: Opening
) -> None:
    bind(bdf, driver)
    (hugetlb.mount_point() / f"holdfast-{'0' * 32}-{bdf}-7").touch()  # of another boot
    with child(keeper(bdf)) as (pid, readable):
        told = said(readable)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    left = set(struct.unpack(f"<{len(told) // 8}Q", told))
    # Nobody turned bus master off where no driver is bound: the transfer goes on.
    word = (pci_sysfs.device_path(bdf) / "config").read_bytes()[pci_regs.COMMAND]
    assert bool(word & Command.MASTER) == (driver is None)
    backend = opening()
    memory = backend.memory()
    found = memory.leftovers()
    assert [slab.size for slab in found] == [2 * HUGE, HUGE]
    assert {at for slab in found for at in slab.addresses or ()} == left
    assert memory.held_bytes == memory.pinned_bytes == 3 * HUGE
    assert memory.leftovers() == found, "the same ones, as long as they are held"
    taken = [memory.take(HUGE) for _ in range(hugetlb.pool().available)]
    frames = set().union(*map(pages_of, found))
    assert not frames & set().union(*map(pages_of, taken))
    assert eventually(lambda: not busy(backend))
    for slab in taken:
        memory.recycle(slab)
    for slab in found:
        memory.recycle(slab)
    assert not memory.leftovers()
    assert memory.held_bytes == 0
    again = memory.take(3 * HUGE)
    assert pages_of(again) & frames, "recycled frames are used again"
    memory.recycle(again)
    backend.close()
    assert not [name for name in os.listdir(hugetlb.mount_point()) if name.startswith("holdfast")]


def test_a_transfer_of_a_killed_keeper_lands_in_what_it_left(bdf: Bdf, opening: Opening) -> None:
    bind(bdf, None)
    with child(keeper(bdf)) as (pid, readable):
        said(readable)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    files = sorted(hugetlb.mount_point().glob("holdfast-*"))
    assert [file.stat().st_size for file in files] == [2 * HUGE, HUGE]

    def landed() -> bool:
        with files[0].open("r+b") as file, mmap.mmap(file.fileno(), 2 * HUGE) as view:
            return view[:COUNT] == PATTERN

    assert eventually(landed)
    backend = opening()
    for slab in backend.memory().leftovers():
        backend.memory().recycle(slab)
    backend.close()


def test_leftovers_that_were_cut_are_held_as_they_are(bdf: Bdf, opening: Opening) -> None:
    bind(bdf, None)
    with child(keeper(bdf)) as (pid, readable):
        said(readable)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    files = sorted(hugetlb.mount_point().glob("holdfast-*"))
    os.truncate(files[0], 64 * HUGE)  # larger than all there is, and mostly holes
    os.truncate(files[1], 0)
    backend = opening()
    memory = backend.memory()
    assert eventually(lambda: not busy(backend))
    (slab,) = memory.leftovers()
    assert not files[1].exists()
    assert slab.addresses is None
    assert slab.size == memory.held_bytes == 2 * HUGE
    memory.recycle(slab)
    backend.close()
    assert not files[0].exists()
    # A dead process's ring lets go of its pages in a work item (io_uring.c, io_ring_exit_work).
    assert eventually(lambda: hugetlb.pool().free == hugetlb.pool().total)


# -- interrupts ------------------------------------------------------------


def test_intx_rings_an_eventfd_once_until_it_is_unmasked(bdf: Bdf, opening: Opening) -> None:
    bind(bdf, UIO_DRIVER)
    with untouched():
        backend = opening()
        assert backend.irqs[IrqIndex.INTX].count == 1
        bell, second = events.make(), events.make()
        backend.set_irqs(IrqIndex.INTX, 0, [bell])
        store(backend, edu.IRQ_RAISE.offset, 1, 4)
        assert events.wait(bell, DEADLINE)
        assert events.drain(bell) == 1
        assert command(backend) & Command.INTX_DISABLE
        # A caller that writes the register back does not undo the kernel's mask.
        backend.region_write(CONFIG_REGION, pci_regs.COMMAND, struct.pack("<H", Command.MEMORY))
        assert command(backend) & Command.INTX_DISABLE
        # The line is still up, so it comes again as soon as it is let through.
        backend.unmask_intx()
        assert events.wait(bell, DEADLINE)
        store(backend, edu.IRQ_ACKNOWLEDGE.offset, 1, 4)
        events.drain(bell)
        backend.set_irqs(IrqIndex.INTX, 0, [second])
        events.close(bell)
        master(backend, on=True)
        slab = backend.memory().take(COUNT)
        backend.unmask_intx()
        start(backend, address_of(slab), to_ram=True, irq=True)
        assert events.wait(second, DEADLINE)
        assert load(backend, edu.IRQ_STATUS.offset, 4) == edu.Cause.DMA
        assert not busy(backend)
        store(backend, edu.IRQ_ACKNOWLEDGE.offset, edu.Cause.DMA, 4)
        backend.set_irqs(IrqIndex.INTX, 0, [])
        assert command(backend) & Command.INTX_DISABLE
        backend.memory().recycle(slab)
        backend.close()
        events.close(second)
        gc.collect()


def test_without_a_driver_there_are_no_interrupts(bdf: Bdf, opening: Opening) -> None:
    bind(bdf, None)
    backend = opening()
    assert [info.count for info in backend.irqs] == [0] * len(IrqIndex)
    bell = events.make()
    with pytest.raises(BadAccess, match="--driver uio_pci_generic"):
        backend.set_irqs(IrqIndex.INTX, 0, [bell])
    events.close(bell)
    backend.close()


# -- the function leaves ------------------------------------------------------------


def remove(bdf: Bdf) -> None:
    (pci_sysfs.device_path(bdf) / "remove").write_text("1")


def rescan() -> None:
    Path("/sys/bus/pci/rescan").write_text("1")


def test_a_function_that_was_removed_is_gone_for_every_call(
    bdf: Bdf, driver: str | None, opening: Opening
) -> None:
    bind(bdf, driver)
    backend = opening()
    left = threading.Event()
    backend.on_gone = left.set
    slab = backend.memory().take(COUNT)
    remove(bdf)
    try:
        if driver is not None:
            assert left.wait(DEADLINE), "uio says so without being asked"
        with pytest.raises(DeviceGone):
            load(backend, edu.IDENTIFICATION.offset, 4)
        assert left.is_set()
        with pytest.raises(DeviceGone):
            backend.region_read(CONFIG_REGION, 0, 2)
        with pytest.raises(DeviceGone):
            store(backend, edu.LIVENESS.offset, 1, 4)
        backend.memory().recycle(slab)
        backend.close()
    finally:
        rescan()
    bind(bdf, driver)
    backend = opening()
    assert load(backend, edu.IDENTIFICATION.offset, 4) == edu.IDENTIFICATION_VALUE
    backend.close()


# -- who may ------------------------------------------------------------


LESS_PRIVILEGE = """
import ctypes, os, struct, sys
from pathlib import Path
from holdfast.backends.uio import UioBackend
from holdfast.errors import HoldfastError
from holdfast.kernel import hugetlb, pagemap
from holdfast.values import Bdf, Target
from holdfast.dma.physical import PhysicalFiles

CAP_SYS_ADMIN, VERSION = 21, 0x20080522
header = ctypes.create_string_buffer(struct.pack("<Ii", VERSION, 0))
data = ctypes.create_string_buffer(24)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.capget(header, data) == 0
sets = list(struct.unpack("<6I", data.raw[:24]))
for place in (0, 1):
    sets[place] &= ~(1 << CAP_SYS_ADMIN)
assert libc.capset(header, struct.pack("<6I", *sets)) == 0
target = Target.parse(sys.argv[1])
source = PhysicalFiles(hugetlb.mount_point(), target.bdf)
for attempt in (lambda: source.take(1), lambda: UioBackend(target)):
    try:
        attempt()
    except HoldfastError as error:
        print(type(error).__name__, error)
print(source.held_bytes, source.pinned_bytes)
"""


def test_without_cap_sys_admin_nobody_is_given_address_zero(bdf: Bdf) -> None:
    bind(bdf, None)
    with untouched():
        done = subprocess.run(
            [sys.executable, "-c", LESS_PRIVILEGE, str(target_of(bdf))],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    memory, function, held = done.stdout.splitlines()
    assert memory.startswith("NoPermission")
    assert "frame number 0" in memory
    assert "cap_sys_admin" in memory
    assert function.startswith("NoPermission")
    assert "64 bytes" in function
    assert held == "0 0"


def test_errors_name_the_function(bdf: Bdf, opening: Opening) -> None:
    with pytest.raises(BadTarget, match="no such PCI function"):
        UioBackend(Target.parse("pci:0000:7f:1f.7?backend=uio"))
    bind(bdf, None)
    backend = opening()
    backend.close()
    with pytest.raises(Closed, match=str(bdf)):
        backend.region_read(CONFIG_REGION, 0, 4)
