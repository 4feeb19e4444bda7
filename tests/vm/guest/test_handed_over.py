# SPDX-License-Identifier: Apache-2.0
"""A real edu handed from one process to the next, each killed with a transfer running.

Runs inside a lab guest. This process stands for the anchor: it only holds duplicates of what the
others hand over. Two keepers in turn are killed while edu is about to write; it must not notice.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from holdfast import backends
from holdfast.backends.uio import UIO_DRIVER
from holdfast.contracts import FunctionBackend
from holdfast.dma.slab import SlabMemory
from holdfast.errors import Busy
from holdfast.kernel import events, hugetlb, memfd, pci_sysfs
from holdfast.kernel.mapping import Mapping
from holdfast.kernel.pci_sysfs import PciFunction
from holdfast.regs import edu
from holdfast.uapi.pci_regs import COMMAND, Command
from holdfast.values import CONFIG_REGION, Handover, Iova, IrqIndex, Perm, Target

pytestmark = pytest.mark.guest

EXPECTED = set(filter(None, os.environ.get("HOLDFAST_LAB_EXPECT", "").split(",")))
PAGE = 4096
IOVA = 0x200_0000
COUNT = 2048
DEADLINE = 20.0
"""Seconds. A transfer of edu takes 100 ms of guest time."""
HUGE = hugetlb.HUGE_PAGE


def pattern(seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(COUNT)


@pytest.fixture(params=["type1", "iommufd", "uio"])
def way(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    reasons = {"type1": "/dev/vfio/vfio", "iommufd": "/dev/iommu"}
    if name not in EXPECTED:
        pytest.skip(f"no {name} here: {reasons.get(name, 'something translates')}")
    return name


@pytest.fixture
def function(way: str) -> PciFunction:
    """The edu on the root bus, with the driver that this way needs, and huge pages for uio."""
    found = next(
        one
        for one in pci_sysfs.functions()
        if (one.vendor, one.device) == (edu.VENDOR, edu.DEVICE) and one.bdf.bus == 0
    )
    driver = UIO_DRIVER if way == "uio" else "vfio-pci"
    if found.driver != driver:
        directory = pci_sysfs.device_path(found.bdf)
        if found.driver is not None:
            (directory / "driver/unbind").write_text(str(found.bdf))
        (directory / "driver_override").write_text(f"{driver}\n")
        Path("/sys/bus/pci/drivers_probe").write_text(str(found.bdf))
    if way == "uio" and hugetlb.pool().available < 4:
        Path("/proc/sys/vm/nr_hugepages").write_text("8")
    return pci_sysfs.function(found.bdf)


# -- handing over ------------------------------------------------------------


class Anchor:
    """Holds duplicates of everything that keepers tell it of, by name."""

    def __init__(self) -> None:
        self.kept: dict[str, Handover] = {}

    def fork(self, body: Callable[[Callable[[str, Handover], None]], None]) -> int:
        """Run a keeper until it waits to be killed; returns its pid."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def tell(name: str, handover: Handover) -> None:
            text = json.dumps([name, list(handover.fds), dict(handover.notes)]).encode()
            socket.send_fds(theirs, [text], list(handover.fds.values()))
            assert theirs.recv(1) == b"+", "nothing goes on before the anchor has it"

        pid = os.fork()
        if not pid:
            try:
                ours.close()
                body(tell)
                theirs.shutdown(socket.SHUT_WR)
                signal.pause()
            except BaseException:  # noqa: BLE001 - nothing may unwind into the test runner
                traceback.print_exc(file=sys.__stderr__)
            finally:
                os._exit(1)
        theirs.close()
        while True:
            text, fds, _, _ = socket.recv_fds(ours, 1 << 16, 16)
            if not text:
                break
            name, names, notes = json.loads(text)
            self.let_go(name)
            self.kept[name] = Handover(dict(zip(names, fds, strict=True)), notes)
            ours.send(b"+")
        ours.close()
        return pid

    def duplicate(self, name: str) -> Handover:
        kept = self.kept[name]
        return Handover({key: os.dup(fd) for key, fd in kept.fds.items()}, kept.notes)

    def let_go(self, name: str) -> None:
        if name in self.kept:
            for fd in self.kept.pop(name).fds.values():
                os.close(fd)


@pytest.fixture
def anchor() -> Iterator[Anchor]:
    anchor = Anchor()
    yield anchor
    for name in list(anchor.kept):
        anchor.let_go(name)
    for file in Path("/dev/hugepages").glob("holdfast-*"):
        file.unlink()


def kill(pid: int, look: Callable[[], None] = lambda: None) -> None:
    """Kill a keeper and wait until it is gone; ``look`` as soon as the signal was sent.

    With the kernel's memory oracles it takes a process longer to die than edu to transfer.
    """
    os.kill(pid, signal.SIGKILL)
    look()
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the keeper ended by itself"


# -- the device ------------------------------------------------------------


class Edu:
    """Registers through a backend; two pages of memory, at ``there``, seen by this process."""

    def __init__(
        self, backend: FunctionBackend, fd: int, there: int, slab: SlabMemory | None = None
    ) -> None:
        self.backend = backend
        self.slab = slab
        self.there = there
        self.size = os.fstat(fd).st_size
        self.view = Mapping(fd, self.size)

    def put(self, data: bytes) -> None:
        self.view.array[:COUNT] = np.frombuffer(data, np.uint8)

    def arrived(self) -> bytes:
        return self.view.array[PAGE : PAGE + COUNT].tobytes()

    def command(self) -> int:
        return int.from_bytes(self.backend.region_read(CONFIG_REGION, COMMAND, 2), "little")

    def set_command(self, bits: int) -> None:
        self.backend.region_write(
            CONFIG_REGION, COMMAND, (self.command() | bits).to_bytes(2, "little")
        )

    def start(self, *, to_ram: bool) -> None:
        """The first page into the device, or the device into the second; with an interrupt."""
        ends = (edu.BUFFER_START, self.there + PAGE) if to_ram else (self.there, edu.BUFFER_START)
        word = edu.DmaCommand.START | edu.DmaCommand.IRQ
        word |= edu.DmaCommand.TO_RAM if to_ram else 0
        registers = (edu.DMA_SOURCE, edu.DMA_DESTINATION, edu.DMA_COUNT, edu.DMA_COMMAND)
        for register, value in zip(registers, (*ends, COUNT, int(word)), strict=True):
            self.backend.region_write(edu.BAR, register.offset, value.to_bytes(8, "little"))

    def busy(self) -> bool:
        data = self.backend.region_read(edu.BAR, edu.DMA_COMMAND.offset, 4)
        return bool(int.from_bytes(data, "little") & edu.DmaCommand.START)

    def acknowledge(self) -> None:
        data = self.backend.region_read(edu.BAR, edu.IRQ_STATUS.offset, 4)
        self.backend.region_write(edu.BAR, edu.IRQ_ACKNOWLEDGE.offset, data)


class Scene:
    """One function and its memory, reached anew by each keeper."""

    def __init__(self, function: PciFunction, way: str, anchor: Anchor) -> None:
        self.target = Target.parse(f"pci:{function.bdf}?backend={way}")
        self.way = way
        self.anchor = anchor
        self.memory = memfd.create("handed-over", 2 * PAGE)
        self.done = events.make()
        self.irq = IrqIndex.INTX if way == "uio" else IrqIndex.MSI

    def first(self, tell: Callable[[str, Handover], None]) -> Edu:
        """What the first keeper does: take the function, hand everything over, then map."""
        backend = backends.connect(self.target)
        handover = backend.hand_over()
        assert handover is not None
        tell("function", handover)
        source = backend.memory()
        if source is None:
            device = Edu(backend, self.memory, IOVA)
            backend.dma_map(Iova(IOVA), 2 * PAGE, Perm.RW, self.memory, 0)
        else:
            slab = source.take(HUGE)
            tell("slab", source.describe(slab))
            assert slab.addresses is not None
            device = Edu(backend, slab.fd, slab.addresses[0], slab)
        backend.set_irqs(self.irq, 0, [self.done])
        device.set_command(Command.MEMORY | Command.MASTER)
        return device

    def next(self) -> Edu:
        """What a successor does."""
        backend = backends.resume(self.target, self.anchor.duplicate("function"))
        source = backend.memory()
        if source is None:
            return Edu(backend, self.memory, IOVA)
        slab = source.adopt(self.anchor.duplicate("slab"))
        assert source.leftovers() == []
        assert slab.addresses is not None
        return Edu(backend, slab.fd, slab.addresses[0], slab)

    def arrived(self) -> bytes:
        """What is in the second page, without a keeper."""
        slab = self.anchor.kept.get("slab")
        fd = self.memory if slab is None else slab.fds["slab"]
        view = Mapping(fd, os.fstat(fd).st_size)
        found = view.array[PAGE : PAGE + COUNT].tobytes()
        view.close()
        return found

    def close(self) -> None:
        os.close(self.memory)
        os.close(self.done)


@pytest.fixture
def scene(function: PciFunction, way: str, anchor: Anchor) -> Iterator[Scene]:
    scene = Scene(function, way, anchor)
    yield scene
    scene.close()


def wait_for(scene: Scene, device: Edu) -> None:
    """An interrupt: the one that was wired by the first keeper, or carried by this process."""
    assert events.wait(scene.done, DEADLINE)
    events.drain(scene.done)
    assert not device.busy()
    device.acknowledge()
    if scene.irq is IrqIndex.INTX:
        device.backend.unmask_intx()


def test_a_transfer_outlives_two_keepers_and_a_third_one_goes_on(scene: Scene) -> None:
    anchor = scene.anchor

    def first(tell: Callable[[str, Handover], None]) -> None:
        device = scene.first(tell)
        device.put(pattern(1))
        device.start(to_ram=False)
        wait_for(scene, device)
        device.start(to_ram=True)

    def second(tell: Callable[[str, Handover], None]) -> None:
        device = scene.next()
        assert device.command() & (Command.MASTER | Command.MEMORY) == 6
        if scene.way == "uio":
            device.backend.set_irqs(scene.irq, 0, [scene.done])
        wait_for(scene, device)
        assert device.arrived() == pattern(1)
        device.put(pattern(2))
        device.start(to_ram=False)

    def nothing_arrived() -> None:
        assert scene.arrived() == bytes(COUNT), "edu wrote before the keeper was killed"

    kill(anchor.fork(first), nothing_arrived)
    kill(anchor.fork(second))
    device = scene.next()
    backend = device.backend
    assert device.command() & Command.MASTER
    if scene.way == "uio":
        backend.set_irqs(scene.irq, 0, [scene.done])
    wait_for(scene, device)
    assert device.arrived() == pattern(1)
    device.start(to_ram=True)
    wait_for(scene, device)
    assert device.arrived() == pattern(2)

    # All of it is this process's to undo: interrupts, mappings, memory, the function.
    backend.set_irqs(scene.irq, 0, [])
    device.view.close()
    source = backend.memory()
    if source is None:
        assert backend.dma_unmap(Iova(IOVA), 2 * PAGE) == 2 * PAGE
    else:
        assert device.slab is not None
        source.recycle(device.slab)
        assert source.held_bytes == 0
        assert not list(Path("/dev/hugepages").glob("holdfast-*"))
    backend.close()


def test_the_function_is_nobody_elses_until_the_anchor_lets_it_go(scene: Scene) -> None:
    anchor = scene.anchor

    def first(tell: Callable[[str, Handover], None]) -> None:
        scene.first(tell)

    kill(anchor.fork(first))
    with pytest.raises(Busy):
        backends.connect(scene.target)
    anchor.let_go("function")
    anchor.let_go("slab")
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        with suppress(Busy):
            backends.connect(scene.target).close()
            return
    pytest.fail("it stays busy")
