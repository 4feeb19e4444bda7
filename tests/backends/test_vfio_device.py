# SPDX-License-Identifier: Apache-2.0
"""A VFIO function without a kernel behind it: a memfd is the device, calls on it are recorded.

What a real kernel does is tested in a guest; here is what can hardly be made to happen there: a
function that is pulled out, short transfers, odd capabilities, vectors that run out.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from holdfast.backends.vfio_device import Descriptor, VfioBackend
from holdfast.backends.vfio_irqs import Irqs
from holdfast.backends.vfio_regions import areas, msix_table
from holdfast.backends.vfio_units import Unit, Units
from holdfast.contracts import DmaContext
from holdfast.errors import (
    BadAccess,
    Busy,
    Closed,
    DeviceError,
    DeviceGone,
    DeviceReset,
    NotSupported,
    ResourceError,
    SystemFailure,
)
from holdfast.kernel import events, ioctl, vfio_device
from holdfast.kernel.vfio_device import DeviceInfo, RegionInfo
from holdfast.uapi import vfio as u
from holdfast.values import CONFIG_REGION, Area, Bdf, Handover, Iova, IrqIndex, Perm

BAR = 0x2000
CONFIG_AT = 0x10000
ALL = u.REGION_INFO_FLAG_READ | u.REGION_INFO_FLAG_WRITE | u.REGION_INFO_FLAG_MMAP


@dataclass
class Space:
    """An address space that only remembers."""

    isolation: str = "group 7"
    iova_ranges: tuple[tuple[int, int], ...] = ()
    maps: dict[int, int] = field(default_factory=dict)
    users: int = 1

    def map_file(self, iova: int, size: int, perm: Perm, fd: int, offset: int, target: str) -> None:
        self.maps[iova] = size

    def unmap(self, iova: int, size: int, target: str) -> int:
        return self.maps.pop(iova, 0)

    def unmap_all(self, target: str) -> None:
        self.maps.clear()

    def context(self) -> DmaContext:
        return DmaContext("type1", 99)

    def hand_over(self) -> Handover:
        return Handover()

    def release(self) -> None:
        self.users -= 1


@dataclass
class Device:
    """What the kernel would know: regions as files, and the interrupts that were wired."""

    fd: int
    calls: list[tuple[object, ...]] = field(default_factory=list)
    vectors: int = 4
    flags: int = u.IRQ_INFO_EVENTFD | u.IRQ_INFO_NORESIZE
    to_give: int = 1 << 16
    resetting: threading.Event = field(default_factory=threading.Event)
    finish: threading.Event = field(default_factory=threading.Event)

    def region(self, fd: int, index: int, target: str) -> RegionInfo:
        sizes = {0: (BAR, 0, ALL), CONFIG_REGION: (256, CONFIG_AT, ALL & ~u.REGION_INFO_FLAG_MMAP)}
        size, offset, flags = sizes.get(index, (0, 0, 0))
        return RegionInfo(flags, size, offset, None, False)

    def irq(self, fd: int, index: int, target: str) -> tuple[int, int]:
        counts = {IrqIndex.INTX: 1, IrqIndex.MSI: self.vectors, IrqIndex.REQ: 1}
        return self.flags, counts.get(IrqIndex(index), 0)

    def wire(self, fd: int, index: int, start: int, eventfds: Sequence[int], target: str) -> None:
        if start + len(eventfds) > self.to_give:
            raise ResourceError("too few vectors", errno=errno.ENOSPC)
        inodes = [os.fstat(eventfd) if eventfd >= 0 else None for eventfd in eventfds]
        self.calls.append(("wire", IrqIndex(index), start, [i is not None for i in inodes]))

    def disable(self, fd: int, index: int, target: str) -> None:
        self.calls.append(("disable", IrqIndex(index)))

    def reset(self, fd: int, target: str) -> None:
        self.resetting.set()
        assert self.finish.wait(10)


@pytest.fixture
def device(clean: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    fd = os.memfd_create("device")
    os.ftruncate(fd, CONFIG_AT + 256)
    os.pwrite(fd, bytes.fromhex("3412e811"), CONFIG_AT)
    found = Device(fd)
    monkeypatch.setattr(vfio_device, "device_info", lambda *_: DeviceInfo(True, 9, 5))
    monkeypatch.setattr(vfio_device, "region_info", found.region)
    monkeypatch.setattr(vfio_device, "irq_info", found.irq)
    monkeypatch.setattr(vfio_device, "set_eventfds", found.wire)
    monkeypatch.setattr(vfio_device, "disable_irqs", found.disable)
    monkeypatch.setattr(vfio_device, "reset", found.reset)
    yield found
    os.close(fd)


@pytest.fixture
def space() -> Space:
    return Space()


@pytest.fixture
def backend(device: Device, space: Space) -> Iterator[VfioBackend]:
    found = VfioBackend(os.dup(device.fd), space, "pci:0000:03:00.0", space.release)
    yield found
    found.close()


def pull_out(device: Device) -> None:
    os.pwrite(device.fd, b"\xff" * 256, CONFIG_AT)
    os.pwrite(device.fd, b"\xff" * BAR, 0)


# -- gone, short, failed ------------------------------------------------------------


def test_a_function_that_was_pulled_out_is_gone_and_says_so_once(
    backend: VfioBackend, device: Device
) -> None:
    called: list[int] = []
    backend.on_gone = lambda: called.append(1)
    assert backend.region_read(0, 0, 4) == bytes(4)
    pull_out(device)
    for _ in range(2):
        with pytest.raises(DeviceGone):
            backend.region_read(0, 0, 4)
    with pytest.raises(DeviceGone):
        backend.region_write(0, 0, b"abcd")
    with pytest.raises(DeviceGone):
        backend.reset()
    with pytest.raises(DeviceGone):
        backend.set_irqs(IrqIndex.MSI, 0, [])
    assert called == [1]


def test_what_a_gone_function_had_mapped_can_still_be_unmapped(
    backend: VfioBackend, device: Device
) -> None:
    backend.dma_map(Iova(0x10000), 4096, Perm.RW, device.fd, 0)
    pull_out(device)
    with pytest.raises(DeviceGone):
        backend.region_read(CONFIG_REGION, 0, 2)
    assert backend.dma_unmap(Iova(0x10000), 4096) == 4096


def test_all_ones_in_a_register_are_no_sign_while_the_vendor_is_there(
    backend: VfioBackend, device: Device
) -> None:
    os.pwrite(device.fd, b"\xff" * 64, 0)
    for count in (1, 2, 4, 8, 16):
        assert backend.region_read(0, 0, count) == b"\xff" * count


def test_all_ones_during_a_reset_are_no_sign_of_being_gone(
    backend: VfioBackend, device: Device
) -> None:
    thread = threading.Thread(target=backend.reset)
    thread.start()
    assert device.resetting.wait(10)
    pull_out(device)
    with pytest.raises(DeviceReset):
        backend.region_read(CONFIG_REGION, 0, 2)
    os.pwrite(device.fd, bytes.fromhex("3412e811"), CONFIG_AT)
    device.finish.set()
    thread.join()
    assert backend.region_read(CONFIG_REGION, 0, 2) == b"\x34\x12"


def test_a_transfer_that_is_cut_short_is_an_error(backend: VfioBackend, device: Device) -> None:
    os.ftruncate(device.fd, CONFIG_AT + 16)
    with pytest.raises(DeviceError, match="16 of 64"):
        backend.region_read(CONFIG_REGION, 0, 64)


def test_bad_accesses_never_reach_the_descriptor(backend: VfioBackend) -> None:
    for read in ((1, 0, 4), (0, BAR - 2, 4), (0, -4, 4), (0, 0, 0), (9, 0, 1), (-1, 0, 1)):
        with pytest.raises(BadAccess):
            backend.region_read(*read)
    with pytest.raises(BadAccess):
        backend.region_read_multi([(0, 0, 4), (0, BAR, 4)])
    with pytest.raises(BadAccess):
        backend.region_write_multi([(0, 0, b"abcd"), (0, 8, b"123456789")])
    assert backend.region_read(0, 0, 4) == bytes(4), "a write before a bad one was carried out"


def test_close_leaves_the_address_space_once(backend: VfioBackend, space: Space) -> None:
    backend.close()
    backend.close()
    assert space.users == 0
    assert backend.request_fd is None
    with pytest.raises(Closed):
        backend.dma_context()
    with pytest.raises(Closed):
        backend.region_read(0, 0, 4)


def test_a_failed_opening_gives_the_address_space_back(
    device: Device, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vfio_device, "irq_info", lambda *_: (u.IRQ_INFO_EVENTFD, 1))
    monkeypatch.setattr(vfio_device, "set_eventfds", fail)
    with pytest.raises(SystemFailure):
        VfioBackend(os.dup(device.fd), space, "pci:0000:03:00.0", space.release)
    assert space.users == 0


def fail(*_: object) -> None:
    raise SystemFailure("no", errno=errno.EIO)


def test_a_descriptor_is_closed_by_its_last_user(clean: None) -> None:
    read_end, write_end = os.pipe()
    descriptor = Descriptor(write_end, "pipe")
    with descriptor as fd, descriptor:
        descriptor.close()
        assert os.write(fd, b"x") == 1
        with pytest.raises(Closed), descriptor:
            pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(write_end)
    descriptor.close()
    os.close(read_end)


# -- interrupts ------------------------------------------------------------


@pytest.fixture
def irqs(device: Device) -> Iterator[Irqs]:
    descriptor = Descriptor(os.dup(device.fd), "pci")
    found = Irqs(descriptor, "pci")
    device.calls.clear()
    yield found
    found.close()
    descriptor.close()


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    fds = [events.make() for _ in range(4)]
    yield fds
    for fd in fds:
        os.close(fd)


def test_a_type_that_cannot_grow_is_wired_anew_with_what_it_had(
    irqs: Irqs, device: Device, eventfds: list[int]
) -> None:
    irqs.wire(IrqIndex.MSI, 1, eventfds[:1])
    irqs.wire(IrqIndex.MSI, 0, eventfds[1:2])
    irqs.wire(IrqIndex.MSI, 3, eventfds[2:3])
    assert device.calls == [
        ("wire", IrqIndex.MSI, 1, [True]),
        ("wire", IrqIndex.MSI, 0, [True]),
        ("disable", IrqIndex.MSI),
        ("wire", IrqIndex.MSI, 0, [True, True, False, True]),
    ]
    # An interrupt may have been lost in between: who waits is told to look.
    assert [events.drain(fd) for fd in eventfds] == [1, 1, 0, 0]


def test_a_type_that_can_grow_is_left_alone(
    device: Device, clean: None, eventfds: list[int]
) -> None:
    device.flags = u.IRQ_INFO_EVENTFD
    descriptor = Descriptor(os.dup(device.fd), "pci")
    irqs = Irqs(descriptor, "pci")
    device.calls.clear()
    before = len(os.listdir("/proc/self/fd"))
    irqs.wire(IrqIndex.MSI, 0, eventfds[:1])
    irqs.wire(IrqIndex.MSI, 1, eventfds[1:])
    assert [call[0] for call in device.calls] == ["wire", "wire"]
    assert len(os.listdir("/proc/self/fd")) == before, "duplicates nobody needs"
    irqs.close()
    descriptor.close()


def test_when_there_are_too_few_vectors_nothing_is_left_wired(
    irqs: Irqs, device: Device, eventfds: list[int]
) -> None:
    device.to_give = 2
    irqs.wire(IrqIndex.MSI, 0, eventfds[:2])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ResourceError):
        irqs.wire(IrqIndex.MSI, 2, eventfds[2:])
    assert len(os.listdir("/proc/self/fd")) == before - 2
    device.calls.clear()
    irqs.wire(IrqIndex.MSI, 0, [])
    assert not device.calls, "there is nothing to disable"
    irqs.wire(IrqIndex.MSI, 0, eventfds[:2])


def test_types_that_exclude_each_other_are_not_mixed(irqs: Irqs, eventfds: list[int]) -> None:
    irqs.wire(IrqIndex.INTX, 0, eventfds[:1])
    with pytest.raises(Busy, match="INTX is wired"):
        irqs.wire(IrqIndex.MSI, 0, eventfds)
    irqs.wire(IrqIndex.INTX, 0, [])
    irqs.wire(IrqIndex.MSI, 0, eventfds)


def test_the_device_request_goes_back_to_the_backend(
    irqs: Irqs, device: Device, eventfds: list[int]
) -> None:
    irqs.wire(IrqIndex.REQ, 0, eventfds[:1])
    irqs.wire(IrqIndex.REQ, 0, [])
    assert device.calls == [
        ("wire", IrqIndex.REQ, 0, [True]),
        ("disable", IrqIndex.REQ),
        ("wire", IrqIndex.REQ, 0, [True]),
    ]


def test_vectors_outside_the_type_and_unmasks_of_nothing_are_refused(
    irqs: Irqs, device: Device, eventfds: list[int]
) -> None:
    for start in (-1, 1, 4):
        with pytest.raises(BadAccess):
            irqs.wire(IrqIndex.MSI, start, eventfds)
    with pytest.raises(NotSupported):
        irqs.unmask_intx()
    assert not device.calls


def test_fewer_vectors_than_asked_for_is_an_error_though_the_call_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ioctl, "call", lambda *_, **__: 3)
    with pytest.raises(ResourceError, match="3 interrupt vectors"):
        vfio_device.set_eventfds(5, IrqIndex.MSIX, 0, [1, 2, 3, 4], "pci")


# -- what can be mapped ------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "table", "wanted"),
    [
        (RegionInfo(0, 0x4000, 0, None, False), None, []),
        (RegionInfo(ALL, 0x4000, 0, None, False), None, [(0, 0x4000)]),
        (RegionInfo(ALL, 0x800, 0, None, False), None, []),
        (RegionInfo(ALL, 0x4000, 0, ((0x1000, 0x2000),), False), None, [(0x1000, 0x2000)]),
        (RegionInfo(ALL, 0x4000, 0, ((0x800, 0x9000),), False), None, [(0x1000, 0x3000)]),
        (RegionInfo(ALL, 0x4000, 0, (), False), None, []),
        (
            RegionInfo(ALL, 0x4000, 0, None, False),
            Area(0x1800, 0x40),
            [(0, 0x1000), (0x2000, 0x2000)],
        ),
        (RegionInfo(ALL, 0x1000, 0, None, False), Area(0, 0x40), []),
        (RegionInfo(ALL, 0x4000, 0, None, True), Area(0x1800, 0x40), [(0, 0x4000)]),
        (RegionInfo(ALL, 0x4000, 0, None, False), Area(0x9000, 0x40), [(0, 0x4000)]),
    ],
)
def test_areas_are_whole_pages_without_the_vector_table(
    info: RegionInfo, table: Area | None, wanted: list[tuple[int, int]]
) -> None:
    assert [(area.offset, area.size) for area in areas(info, table)] == wanted


def test_the_vector_table_is_found_in_configuration_space() -> None:
    space = bytearray(256)
    space[6] = 0x10  # a capability list
    space[0x34] = 0x50
    space[0x50:0x58] = bytes.fromhex("1100070002200000")  # 8 vectors at 0x2000 of BAR 2
    found = msix_table(lambda offset, count: bytes(space[offset : offset + count]))
    assert found == (2, Area(0x2000, 8 * 16))
    space[6] = 0
    assert msix_table(lambda offset, count: bytes(space[offset : offset + count])) is None


def test_a_chain_of_capabilities_that_runs_in_a_circle_ends() -> None:
    answer = bytearray(64)
    u.INFO_CAP_HEADER.pack_into(answer, 32, 1, 1, 48)
    u.INFO_CAP_HEADER.pack_into(answer, 48, 2, 1, 32)
    assert [kind for kind, _ in vfio_device.capabilities(answer, 32)] == [1, 2]
    assert not list(vfio_device.capabilities(answer, 60))
    assert not list(vfio_device.capabilities(answer, 0))


def test_a_list_that_claims_more_than_there_is_is_cut() -> None:
    body = u.IOVA_RANGE.pack(1, 2) + b"rest"
    assert list(vfio_device.pairs(body, 1 << 31, u.IOVA_RANGE)) == [(1, 2)]
    with pytest.raises(SystemFailure):
        vfio_device.bounded(1 << 31, "pci")


# -- sharing ------------------------------------------------------------


class Counted(Unit):
    def __init__(self) -> None:
        self.ends: list[int] = []

    def end(self) -> None:
        self.ends.append(1)


FIRST, SECOND = Bdf(0, 3, 0, 0), Bdf(0, 3, 0, 1)


def test_a_unit_is_made_once_and_ended_by_its_last_function() -> None:
    units: Units[Counted] = Units()
    one = units.take(7, FIRST, Counted)
    assert units.take(7, SECOND, Counted) is one
    other = units.take(8, FIRST, Counted)
    assert other is not one
    units.drop(7, FIRST, one)
    assert not one.ends
    units.drop(7, SECOND, one)
    assert one.ends == [1]
    assert not other.ends
    assert units.take(7, FIRST, Counted) is not one


def test_a_function_is_opened_once_in_a_process() -> None:
    units: Units[Counted] = Units()
    one = units.take(7, FIRST, Counted)
    with pytest.raises(Busy, match=f"pid {os.getpid()}"):
        units.take(7, FIRST, Counted)
    units.drop(7, FIRST, one)
    assert one.ends == [1]


def test_a_unit_that_cannot_be_made_leaves_no_trace() -> None:
    units: Units[Counted] = Units()

    def refuse() -> Counted:
        raise Busy("held")

    with pytest.raises(Busy, match="held"):
        units.take(7, FIRST, refuse)
    assert isinstance(units.take(7, FIRST, Counted), Counted)


def test_in_a_forked_child_a_unit_ends_without_its_parents_books() -> None:
    units: Units[Counted] = Units()
    one = units.take(7, FIRST, Counted)
    pid = os.fork()
    if not pid:
        units.drop(7, FIRST, one)
        os._exit(len(one.ends))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    units.drop(7, FIRST, one)
    assert one.ends == [1]
