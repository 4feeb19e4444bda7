# SPDX-License-Identifier: Apache-2.0
"""VFIO backends on a real kernel with an IOMMU, driving QEMU's edu. Runs inside a lab guest.

The machine has an edu on the root bus, and for some tests one behind a root port and two behind one
conventional bridge. ``HOLDFAST_LAB_EXPECT`` names the backends that must work here ("type1",
"iommufd"): what is missing then fails instead of being skipped.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from holdfast import backends
from holdfast.backends import pci
from holdfast.backends.vfio_device import VfioBackend
from holdfast.errors import (
    BadBuffer,
    Busy,
    Closed,
    DeviceError,
    HoldfastError,
    NotSupported,
    OutOfMemory,
    ResourceError,
)
from holdfast.kernel import dma_pin, events, iommufd, memfd, pci_sysfs, vfio_type1
from holdfast.kernel.mapping import Mapping
from holdfast.kernel.pci_sysfs import PciFunction
from holdfast.regs import edu
from holdfast.testing.conformance import BackendConformance
from holdfast.uapi import pci_regs
from holdfast.values import CONFIG_REGION, Bdf, Iova, IrqIndex, Perm, Target

pytestmark = pytest.mark.guest

EXPECTED = set(filter(None, os.environ.get("HOLDFAST_LAB_EXPECT", "").split(",")))
NODES = {"type1": "/dev/vfio/vfio", "iommufd": "/dev/iommu"}
WAYS = [way for way, node in NODES.items() if os.path.exists(node) or way in EXPECTED]
PAGE = 4096
IOVA = Iova(0x200_0000)
COUNT = 2048
"""Bytes per transfer: below edu's buffer, which starts at its device address 0x40000."""
DEADLINE = 20.0
"""Seconds. A transfer of edu takes 100 ms of guest time."""


# -- functions and backends ------------------------------------------------------------


def is_edu(function: PciFunction) -> bool:
    return (function.vendor, function.device) == (edu.VENDOR, edu.DEVICE)


def give_to_vfio(function: PciFunction) -> PciFunction:
    if function.driver != "vfio-pci":
        directory = pci_sysfs.device_path(function.bdf)
        (directory / "driver_override").write_text("vfio-pci")
        Path("/sys/bus/pci/drivers_probe").write_text(str(function.bdf))
    return pci_sysfs.function(function.bdf)


def functions() -> list[PciFunction]:
    return [give_to_vfio(function) for function in pci_sysfs.functions() if is_edu(function)]


def absent(why: str, *, expected: bool) -> None:
    if expected:
        pytest.fail(f"{why}, though it is expected here")
    pytest.skip(why)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each backend that this guest offers or must offer."""
    name = str(request.param)
    if not os.path.exists(NODES[name]):
        pytest.fail(f"there is no {NODES[name]}, though {name} is expected here")
    return name


@pytest.fixture
def lone() -> PciFunction:
    """The edu on the root bus."""
    found = [function for function in functions() if function.bdf.bus == 0]
    if not found:
        absent("no edu on the root bus", expected=bool(EXPECTED))
    return found[0]


@pytest.fixture
def resettable() -> PciFunction:
    """An edu behind a root port, where a bus reset concerns it alone."""
    found = [function for function in functions() if function.reset_methods]
    if not found:
        absent("no edu behind a root port", expected=False)
    return found[0]


@pytest.fixture
def pair() -> list[PciFunction]:
    """Two edus of one group."""
    found = functions()
    groups = Counter(function.iommu_group for function in found)
    shared = [function for function in found if groups[function.iommu_group] > 1]
    if len(shared) < 2:
        absent("no two edus in one group", expected=False)
    return shared[:2]


def target(function: PciFunction, way: str) -> Target:
    return Target.parse(f"pci:{function.bdf}?backend={way}")


def connect(function: PciFunction, way: str) -> VfioBackend:
    backend = backends.connect(target(function, way))
    assert isinstance(backend, VfioBackend)
    return backend


@pytest.fixture
def backend(lone: PciFunction, way: str) -> Iterator[VfioBackend]:
    with closing(connect(lone, way)) as found:
        yield found


@pytest.fixture
def memory() -> Iterator[int]:
    fd = memfd.create("guest", 16 * PAGE)
    yield fd
    os.close(fd)


@contextmanager
def child(body: Callable[[int], None]) -> Iterator[int]:
    """A forked process that runs ``body`` with the end of a pipe, and is killed afterwards.

    Entered once it wrote to the pipe; until then anything it holds may not be held yet.
    """
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(ready)
            body(tell)
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert events.wait(ready, DEADLINE)
        assert os.read(ready, 1) == b"+", "the child failed"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Edu:
    """The device's registers, through the backend."""

    def __init__(self, backend: VfioBackend) -> None:
        self.backend = backend
        self.command(pci_regs.Command.MEMORY | pci_regs.Command.MASTER)

    def command(self, value: int) -> None:
        self.backend.region_write(CONFIG_REGION, pci_regs.COMMAND, value.to_bytes(2, "little"))

    def read(self, offset: int) -> int:
        return int.from_bytes(self.backend.region_read(edu.BAR, offset, 4), "little")

    def start(self, source: int, destination: int, count: int, command: int) -> None:
        words = {
            edu.DMA_SOURCE: source,
            edu.DMA_DESTINATION: destination,
            edu.DMA_COUNT: count,
            edu.DMA_COMMAND: command | edu.DmaCommand.START,
        }
        self.backend.region_write_multi(
            [(edu.BAR, reg.offset, value.to_bytes(8, "little")) for reg, value in words.items()]
        )

    def fetch(self, iova: int, count: int = COUNT, *, irq: bool = False) -> None:
        """Memory to the device's buffer."""
        self.start(iova, edu.BUFFER_START, count, edu.DmaCommand.IRQ if irq else 0)

    def store(self, iova: int, count: int = COUNT) -> None:
        """The device's buffer to memory."""
        self.start(edu.BUFFER_START, iova, count, edu.DmaCommand.TO_RAM)

    def busy(self) -> bool:
        return bool(self.read(edu.DMA_COMMAND.offset) & edu.DmaCommand.START)

    def settle(self) -> None:
        """Wait until it is idle: it has no event for transfers without an interrupt."""
        deadline = time.monotonic() + DEADLINE
        while self.busy():
            assert time.monotonic() < deadline, "edu does not finish"
            time.sleep(0.01)


def pattern(seed: int, count: int = COUNT) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def pins() -> int:
    """Pages pinned for long in the whole system (/proc/vmstat), after a fold of per-CPU counts."""
    Path("/proc/sys/vm/stat_refresh").write_text("1", encoding="ascii")
    lines = Path("/proc/vmstat").read_text(encoding="ascii").split()
    counts = dict(zip(lines[::2], map(int, lines[1::2]), strict=True))
    return counts["nr_foll_pin_acquired"] - counts["nr_foll_pin_released"]


# -- the contract ------------------------------------------------------------


class TestContract(BackendConformance):
    """The edu on the root bus. It overrides the suite's fixture with this module's."""

    @pytest.fixture
    def backend(self, lone: PciFunction, way: str) -> Iterator[VfioBackend]:
        with closing(connect(lone, way)) as found:
            yield found


class TestContractWithReset(BackendConformance):
    """The edu behind a root port."""

    @pytest.fixture
    def backend(self, resettable: PciFunction, way: str) -> Iterator[VfioBackend]:
        with closing(connect(resettable, way)) as found:
            yield found


def test_what_it_promises_follows_the_function(
    lone: PciFunction, way: str, backend: VfioBackend
) -> None:
    assert backend.promises.strict_unmap
    assert backend.promises.reset == bool(lone.reset_methods)
    assert not backend.promises.assign_bars
    assert backend.isolation == f"group {lone.iommu_group}"
    assert backend.memory() is None
    context = backend.dma_context()
    assert context is not None
    assert context.kind == way
    assert backend.iova_ranges
    first, last = backend.iova_ranges[0]
    assert first <= IOVA <= last
    if not backend.promises.reset:
        with pytest.raises(NotSupported):
            backend.reset()


def test_without_an_option_the_newest_way_is_chosen(lone: PciFunction) -> None:
    way = pci.choose(Target.parse(f"pci:{lone.bdf}"), lone)
    with closing(backends.connect(Target.parse(f"pci:{lone.bdf}"))) as backend:
        context = backend.dma_context()
        assert context is not None
        assert context.kind == way == ("iommufd" if os.path.exists("/dev/iommu") else "type1")


# -- registers, interrupts, DMA ------------------------------------------------------------


def test_a_mapped_bar_and_a_read_show_the_same_register(backend: VfioBackend) -> None:
    device = Edu(backend)
    mapped = backend.region_map(edu.BAR)
    assert mapped is not None
    area = mapped.region.areas[0]
    assert (area.offset, area.size) == (0, edu.BAR_SIZE)
    bar = Mapping(mapped.fd, area.size, offset=mapped.region.file_offset)
    assert bar.load(edu.IDENTIFICATION.offset, 4) == edu.IDENTIFICATION_VALUE
    assert device.read(edu.IDENTIFICATION.offset) == edu.IDENTIFICATION_VALUE
    bar.store(edu.LIVENESS.offset, 4, 0x1234_5678)
    assert device.read(edu.LIVENESS.offset) == ~0x1234_5678 & 0xFFFF_FFFF
    bar.close()


def test_registers_cannot_be_reached_while_memory_space_is_off(backend: VfioBackend) -> None:
    device = Edu(backend)
    device.command(0)
    with pytest.raises(DeviceError, match="turn memory space on"):
        device.read(edu.IDENTIFICATION.offset)
    device.command(pci_regs.Command.MEMORY)
    assert device.read(edu.IDENTIFICATION.offset) == edu.IDENTIFICATION_VALUE


def test_a_register_that_reads_all_ones_is_no_sign_of_being_gone(backend: VfioBackend) -> None:
    called: list[int] = []
    backend.on_gone = lambda: called.append(1)
    assert Edu(backend).read(0x70) == 0xFFFF_FFFF
    assert not called


def test_data_goes_to_the_function_and_back_and_interrupts_by_eventfd(
    backend: VfioBackend, memory: int
) -> None:
    device = Edu(backend)
    view = Mapping(memory, 2 * PAGE)
    view.array[:COUNT] = np.frombuffer(pattern(1), np.uint8)
    backend.dma_map(IOVA, PAGE, Perm.READ, memory, 0)
    backend.dma_map(IOVA + PAGE, PAGE, Perm.WRITE, memory, PAGE)
    done = events.make()
    backend.set_irqs(IrqIndex.MSI, 0, [done])
    try:
        device.fetch(IOVA, irq=True)
        assert events.wait(done, DEADLINE)
        assert events.drain(done) == 1
        assert not device.busy()
        device.store(IOVA + PAGE)
        device.settle()
        assert view.array[PAGE : PAGE + COUNT].tobytes() == pattern(1)
    finally:
        backend.set_irqs(IrqIndex.MSI, 0, [])
        os.close(done)
        view.close()
    assert backend.dma_unmap(IOVA, PAGE) == PAGE
    assert backend.dma_unmap(IOVA + PAGE, PAGE) == PAGE


def test_a_kernel_that_cannot_pin_files_is_served_through_a_mapping(
    lone: PciFunction, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What iommufd did before it had IOMMU_IOAS_MAP_FILE: the pins must outlive the mapping."""
    if "iommufd" not in WAYS:
        absent("no /dev/iommu", expected=False)
    monkeypatch.setattr(iommufd, "has_map_file", lambda *_: False)
    before = pins()
    with closing(connect(lone, "iommufd")) as backend:
        device = Edu(backend)
        view = Mapping(memory, PAGE)
        view.array[:COUNT] = np.frombuffer(pattern(4), np.uint8)
        backend.dma_map(IOVA, PAGE, Perm.RW, memory, 0)
        assert pins() == before + 1
        device.fetch(IOVA)
        device.settle()
        view.array[:] = 0
        device.store(IOVA)
        device.settle()
        assert view.array[:COUNT].tobytes() == pattern(4)
        assert backend.dma_unmap(IOVA, PAGE) == PAGE
        view.close()
    assert pins() == before


def test_intx_comes_once_until_it_is_unmasked(backend: VfioBackend) -> None:
    device = Edu(backend)
    fd = events.make()
    raise_it = (edu.BAR, edu.IRQ_RAISE.offset, b"\1\0\0\0")
    calm_it = (edu.BAR, edu.IRQ_ACKNOWLEDGE.offset, b"\xff\xff\xff\xff")
    backend.region_write(*calm_it)  # what earlier transfers left
    with pytest.raises(NotSupported):
        backend.unmask_intx()
    backend.set_irqs(IrqIndex.INTX, 0, [fd])
    try:
        with pytest.raises(Busy, match="INTX is wired"):
            backend.set_irqs(IrqIndex.MSI, 0, [fd])
        backend.region_write(*raise_it)
        assert events.wait(fd, DEADLINE)
        assert events.drain(fd) == 1
        backend.region_write(*raise_it)
        assert not events.wait(fd, 0.2), "it came again though nobody unmasked it"
        backend.unmask_intx()  # the device still holds the line
        assert events.wait(fd, DEADLINE)
        events.drain(fd)
        backend.region_write(*calm_it)
        backend.unmask_intx()
    finally:
        backend.set_irqs(IrqIndex.INTX, 0, [])
        os.close(fd)
    assert device.read(edu.IRQ_STATUS.offset) == 0


def test_a_write_after_an_unmap_does_not_land(backend: VfioBackend, memory: int) -> None:
    device = Edu(backend)
    view = Mapping(memory, PAGE)
    for unmapped in (False, True):
        view.array[:] = 0x5A
        backend.dma_map(IOVA, PAGE, Perm.RW, memory, 0)
        device.store(IOVA)
        if unmapped:
            assert backend.dma_unmap(IOVA, PAGE) == PAGE
            assert device.busy(), "the transfer was over before the unmap"
        device.settle()
        landed = not bool((view.array == 0x5A).all())
        assert landed is not unmapped
        if not unmapped:
            assert backend.dma_unmap(IOVA, PAGE) == PAGE
    view.close()


def test_memory_mapped_for_reading_only_is_not_written(backend: VfioBackend, memory: int) -> None:
    device = Edu(backend)
    view = Mapping(memory, PAGE)
    view.array[:] = 0x5A
    backend.dma_map(IOVA, PAGE, Perm.READ, memory, 0)
    device.store(IOVA)
    device.settle()
    assert bool((view.array == 0x5A).all())
    assert backend.dma_unmap(IOVA, PAGE) == PAGE
    view.close()


# -- limits ------------------------------------------------------------


def test_what_is_no_whole_page_or_outside_the_file_is_refused(
    backend: VfioBackend, memory: int
) -> None:
    before = pins()
    for iova, size, offset in (
        (IOVA + 1, PAGE, 0),
        (IOVA, PAGE - 1, 0),
        (IOVA, PAGE, 512),
        (IOVA, 0, 0),
    ):
        with pytest.raises(BadBuffer):
            backend.dma_map(Iova(iova), size, Perm.RW, memory, offset)
    with pytest.raises(HoldfastError):
        backend.dma_map(IOVA, 2 * PAGE, Perm.RW, memory, 15 * PAGE)
    with pytest.raises(HoldfastError, match=r"outside the IOVAs|already") as refused:
        backend.dma_map(Iova(0xFEE0_0000), PAGE, Perm.RW, memory, 0)
    assert refused.value.errno
    assert pins() == before


def test_the_map_limit_of_a_container_is_named(lone: PciFunction, memory: int) -> None:
    limit = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
    if not limit.exists():
        absent("no type1", expected="type1" in EXPECTED)
    old = limit.read_text(encoding="ascii")
    limit.write_text("3", encoding="ascii")
    try:
        with closing(connect(lone, "type1")) as backend:
            for number in range(3):
                backend.dma_map(IOVA + number * PAGE, PAGE, Perm.RW, memory, 0)
            with pytest.raises(ResourceError, match="no more maps"):
                backend.dma_map(IOVA + 3 * PAGE, PAGE, Perm.RW, memory, 0)
            assert backend.dma_unmap(IOVA, PAGE) == PAGE
            backend.dma_map(IOVA, PAGE, Perm.RW, memory, 0)
    finally:
        limit.write_text(old, encoding="ascii")


def test_the_limit_of_locked_memory_is_known_before_the_kernel_says_no(
    backend: VfioBackend, memory: int
) -> None:
    """In a child without CAP_IPC_LOCK and with room for 8 pages: exactly 8 can be mapped."""
    context = backend.dma_context()
    assert context is not None

    def limited(tell: int) -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 * PAGE, 8 * PAGE))
        os.seteuid(12345)  # drops the effective capabilities
        with pytest.raises(OutOfMemory, match="RLIMIT_MEMLOCK is 32768") as refused:
            backend.dma_map(IOVA, 9 * PAGE, Perm.RW, memory, 0)
        assert "prlimit --pid" in refused.value.hint
        if context.kind == "type1":  # and the kernel agrees
            with pytest.raises(OutOfMemory):
                vfio_type1.map_file(context.fd, IOVA, 9 * PAGE, Perm.RW, memory, 0)
        backend.dma_map(IOVA, 8 * PAGE, Perm.RW, memory, 0)
        with pytest.raises(OutOfMemory, match="32768 are pinned already"):
            backend.dma_map(IOVA + 8 * PAGE, PAGE, Perm.RW, memory, 0)
        os.write(tell, b"+")

    with child(limited):
        # The child made the map; who holds the same context takes it away.
        assert backend.dma_unmap(IOVA, 8 * PAGE) == 8 * PAGE


# -- who holds it ------------------------------------------------------------


def test_whoever_keeps_a_descriptor_is_named(lone: PciFunction, way: str) -> None:
    backend = connect(lone, way)
    with child(lambda tell: void(os.write(tell, b"+"))) as pid:  # inherits every descriptor
        backend.close()
        with pytest.raises(Busy, match=rf"pid {pid} \(") as refused:
            connect(lone, way)
        assert refused.value.errno
    connect(lone, way).close()


def test_whoever_keeps_a_mapped_bar_is_named(lone: PciFunction, way: str) -> None:
    backend = connect(lone, way)
    mapped = backend.region_map(edu.BAR)
    assert mapped is not None
    with child(lambda tell: keep_bar(mapped.fd, mapped.region.file_offset, tell)) as pid:
        backend.close()
        with pytest.raises(Busy, match=rf"pid {pid} \("):
            connect(lone, way)
    connect(lone, way).close()


def keep_bar(fd: int, offset: int, tell: int) -> None:
    kept.append(mmap.mmap(fd, PAGE, offset=offset))
    os.closerange(3, tell)
    os.closerange(tell + 1, 1000)
    os.write(tell, b"+")


kept: list[mmap.mmap] = []


def void(_: object) -> None:
    return None


def test_a_closed_function_says_so_and_leaves_nothing_behind(
    lone: PciFunction, way: str, memory: int
) -> None:
    before, pinned = len(os.listdir("/proc/self/fd")), pins()
    backend = connect(lone, way)
    backend.dma_map(IOVA, PAGE, Perm.RW, memory, 0)
    backend.set_irqs(IrqIndex.MSI, 0, [])
    backend.close()
    for call in (lambda: backend.dma_unmap(IOVA, PAGE), backend.dma_context):
        with pytest.raises(Closed):
            call()
    assert backend.request_fd is None
    assert len(os.listdir("/proc/self/fd")) == before
    assert pins() == pinned


def test_a_sibling_with_a_kernel_driver_is_named(pair: list[PciFunction], way: str) -> None:
    """pci-stub stands for a driver that keeps its hands off; any other makes the group unfit."""
    first, second = pair
    with bound_to_uio(second):
        if pci_sysfs.function(second.bdf).driver != "uio_pci_generic":
            absent("uio_pci_generic is not there", expected=False)
        with pytest.raises(Busy, match=f"{second.bdf} .uio_pci_generic.") as refused:
            connect(first, way)
        assert f"holdfast bind {second.bdf}" in refused.value.hint
    connect(first, way).close()


@contextmanager
def bound_to_uio(function: PciFunction) -> Iterator[None]:
    move(function.bdf, "uio_pci_generic")
    try:
        yield
    finally:
        move(function.bdf, "vfio-pci")


def move(bdf: Bdf, driver: str) -> None:
    directory = pci_sysfs.device_path(bdf)
    if (directory / "driver").exists():
        (directory / "driver/unbind").write_text(str(bdf))
    (directory / "driver_override").write_text(driver)
    Path("/sys/bus/pci/drivers_probe").write_text(str(bdf))


# -- groups ------------------------------------------------------------


def test_functions_of_one_group_share_their_address_space(
    pair: list[PciFunction], way: str, memory: int
) -> None:
    first, second = pair
    named = pci.group_targets(target(first, way))
    assert named == [target(first, way), target(second, way)]
    assert backends.siblings(target(first, way)) == [target(second, way)]
    one, two = connect(first, way), connect(second, way)
    view = Mapping(memory, PAGE)
    try:
        assert one.isolation == two.isolation
        assert one.dma_context() == two.dma_context()
        one.dma_map(IOVA, PAGE, Perm.RW, memory, 0)
        one.close()
        view.array[:COUNT] = np.frombuffer(pattern(2), np.uint8)
        device = Edu(two)
        device.fetch(IOVA)
        device.settle()
        view.array[:] = 0
        device.store(IOVA)
        device.settle()
        assert view.array[:COUNT].tobytes() == pattern(2)
        assert two.dma_unmap(IOVA, PAGE) == PAGE
    finally:
        one.close()
        two.close()
        view.close()
    connect(first, way).close()


def test_a_function_is_opened_once(lone: PciFunction, way: str, backend: VfioBackend) -> None:
    with pytest.raises(Busy, match=rf"pid {os.getpid()}\)"):
        connect(lone, way)
    assert Edu(backend).read(edu.IDENTIFICATION.offset) == edu.IDENTIFICATION_VALUE


# -- pins in place ------------------------------------------------------------


def test_pins_of_a_killed_process_hold_until_somebody_else_unmaps(
    backend: VfioBackend, memory: int
) -> None:
    context = backend.dma_context()
    assert context is not None
    before = pins()
    device = Edu(backend)
    backend.dma_map(IOVA + PAGE, PAGE, Perm.RW, memory, 0)
    view = Mapping(memory, PAGE)
    view.array[:COUNT] = np.frombuffer(pattern(3), np.uint8)
    device.fetch(IOVA + PAGE)
    device.settle()

    def pin(tell: int) -> None:
        own = mmap.mmap(-1, PAGE)
        address = np.frombuffer(own, np.uint8).ctypes.data
        dma_pin.map_own(context.kind, context.fd, context.ioas, address, PAGE, int(IOVA), True)
        os.write(tell, b"+")
        signal.pause()

    with child(pin) as pid:
        device.store(IOVA)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert device.busy()
    device.settle()
    # The dead process's page has what the device wrote: read it back through the device.
    view.array[:] = 0
    device.fetch(IOVA)
    device.settle()
    device.store(IOVA + PAGE)
    device.settle()
    assert view.array[:COUNT].tobytes() == pattern(3)
    view.close()
    assert pins() == before + 2
    assert dma_pin.unmap_own(context.kind, context.fd, context.ioas, int(IOVA), PAGE) == PAGE
    assert backend.dma_unmap(IOVA + PAGE, PAGE) == PAGE
    assert pins() == before


@pytest.mark.parametrize("huge", [False, True], ids=["small pages", "huge pages"])
def test_pinning_in_place_costs_what_the_kernel_costs(
    backend: VfioBackend,
    huge: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is not the system call itself is measured within one run: rounds differ by more.

    With huge pages the call is over in milliseconds, of which an emulated machine spends some in
    Python: that figure is shown, and only roughly bounded.
    """
    context = backend.dma_context()
    assert context is not None
    kind, fd, ioas = context.kind, context.fd, context.ioas
    size, iova = 256 << 20, int(IOVA)
    own = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not huge:
        own.madvise(mmap.MADV_NOHUGEPAGE)
    pages = np.frombuffer(own, np.uint8)
    pages[::PAGE] = 1
    address = pages.ctypes.data
    inside: list[float] = []
    bare = fcntl.ioctl

    def timed(fd: int, request: int, argument: bytearray) -> int:
        begun = time.perf_counter()
        result: int = bare(fd, request, argument)
        inside.append(time.perf_counter() - begun)
        return result

    monkeypatch.setattr(fcntl, "ioctl", timed)
    rounds = []
    for _ in range(5):
        inside.clear()
        begun = time.perf_counter()
        dma_pin.map_own(kind, fd, ioas, address, size, iova, True)
        rounds.append(((time.perf_counter() - begun) / sum(inside), sum(inside)))
        assert dma_pin.unmap_own(kind, fd, ioas, iova, size) == size
    factor, seconds = min(rounds)
    with capsys.disabled():
        what = f"{kind}, {'huge' if huge else 'small'} pages"
        sys.stdout.write(f"\npin of 256 MiB, {what}: {factor:.3f} times its {seconds:.4f} s\n")
    assert factor <= (1.5 if huge else 1.05)
    del pages
    own.close()


# -- the system wants it back ------------------------------------------------------------


def test_an_unbind_asks_for_the_function_and_waits_until_it_is_closed(
    lone: PciFunction, way: str, backend: VfioBackend
) -> None:
    fd = backend.request_fd
    assert fd is not None
    assert not events.wait(fd, 0)

    def unbind(tell: int) -> None:
        backend.close()  # the duplicates that this child inherited
        os.write(tell, b"+")
        (pci_sysfs.device_path(lone.bdf) / "driver/unbind").write_text(str(lone.bdf))
        os._exit(0)

    with child(unbind) as pid:
        try:
            assert events.wait(fd, DEADLINE)
            # The function is still ours.
            assert Edu(backend).read(edu.IDENTIFICATION.offset) == edu.IDENTIFICATION_VALUE
            assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
        finally:
            backend.close()  # whatever happened: else the child could not even be killed
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT) is not None
    assert pci_sysfs.function(lone.bdf).driver is None
    assert give_to_vfio(pci_sysfs.function(lone.bdf)).driver == "vfio-pci"
