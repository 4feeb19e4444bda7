# SPDX-License-Identifier: Apache-2.0
"""Going on with a VFIO function: what a successor knows, and which calls it must not make.

The kernel is replaced by one that records; in a guest the same is done with a real function.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from holdfast import backends
from holdfast.backends import vfio_iommufd, vfio_type1
from holdfast.backends.vfio_device import VfioBackend
from holdfast.contracts import FunctionBackend, Handover
from holdfast.errors import Busy, HoldfastError, NotSupported, ProtocolError, SystemFailure
from holdfast.kernel import events, iommufd, vfio_device
from holdfast.kernel import vfio_type1 as kernel_type1
from holdfast.kernel.vfio_device import DeviceInfo, RegionInfo
from holdfast.uapi import vfio as u
from holdfast.values import CONFIG_REGION, Iova, IrqIndex, Target

TARGET = Target.parse("pci:0000:03:00.0")
SIBLING = Target.parse("pci:0000:03:00.1")
GROUP = 1 << 40
"""No group of this machine."""
FLAGS = u.REGION_INFO_FLAG_READ | u.REGION_INFO_FLAG_WRITE
CONFIG_AT = 0x1000


@dataclass
class Kernel:
    """Regions are files; what is asked of interrupts and maps is recorded and checked."""

    fd: int
    calls: list[tuple[object, ...]] = field(default_factory=list)
    wired: set[IrqIndex] = field(default_factory=set)
    flags: int = u.IRQ_INFO_EVENTFD | u.IRQ_INFO_NORESIZE

    def region(self, fd: int, index: int, target: str) -> RegionInfo:
        size, offset = {0: (0x1000, 0), CONFIG_REGION: (256, CONFIG_AT)}.get(index, (0, 0))
        return RegionInfo(FLAGS, size, offset, None, False)

    def irq(self, fd: int, index: int, target: str) -> tuple[int, int]:
        counts = {IrqIndex.INTX: 1, IrqIndex.MSI: 4, IrqIndex.REQ: 1}
        return self.flags, counts.get(IrqIndex(index), 0)

    def wire(self, fd: int, index: int, start: int, eventfds: Sequence[int], target: str) -> None:
        self.calls.append(("wire", IrqIndex(index).name, start, len(eventfds)))
        assert all(eventfd == -1 or os.fstat(eventfd) for eventfd in eventfds)
        self.wired.add(IrqIndex(index))

    def disable(self, fd: int, index: int, target: str) -> None:
        self.calls.append(("disable", IrqIndex(index).name))
        if index not in self.wired:
            raise SystemFailure("not wired", errno=errno.EINVAL)
        self.wired.remove(IrqIndex(index))

    def forbidden(self, *what: object) -> None:
        raise AssertionError(f"a call that changes something: {what}")


@pytest.fixture
def kernel(clean: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    fd = os.memfd_create("device")
    os.ftruncate(fd, CONFIG_AT + 256)
    os.pwrite(fd, bytes.fromhex("3412e811"), CONFIG_AT)
    found = Kernel(fd)
    monkeypatch.setattr(vfio_device, "device_info", lambda *_: DeviceInfo(True, 9, 5))
    monkeypatch.setattr(vfio_device, "region_info", found.region)
    monkeypatch.setattr(vfio_device, "irq_info", found.irq)
    monkeypatch.setattr(vfio_device, "set_eventfds", found.wire)
    monkeypatch.setattr(vfio_device, "disable_irqs", found.disable)
    for module, name in (
        (vfio_device, "reset"),
        (kernel_type1, "open_node"),
        (kernel_type1, "join"),
        (kernel_type1, "device_of"),
        (iommufd, "bind"),
        (iommufd, "attach"),
        (iommufd, "new_ioas"),
    ):
        monkeypatch.setattr(module, name, found.forbidden)
    info = kernel_type1.Type1Info(4096, ((0, 0xFFFF),), 7)
    monkeypatch.setattr(kernel_type1, "info", lambda *_: info)
    monkeypatch.setattr(iommufd, "has_map_file", lambda *_: True)
    monkeypatch.setattr(iommufd, "iova_ranges", lambda *_: ((0, 0xFFFF),))
    yield found
    os.close(fd)


def first_of(kernel: Kernel, kind: str, target: Target = TARGET) -> Handover:
    """What the first keeper of a function would have handed over, made by hand."""
    names = {"type1": ["group", "container"], "iommufd": ["iommufd"]}[kind]
    fds = {name: os.memfd_create(name) for name in names}
    notes = {"backend": kind, "group": GROUP} | ({"ioas": 5} if kind == "iommufd" else {})
    space = (
        vfio_type1.Type1Space.resume(GROUP, fds["group"], fds["container"], str(target))
        if kind == "type1"
        else vfio_iommufd.IommufdSpace.resume(GROUP, fds["iommufd"], 5, str(target))
    )
    backend = VfioBackend(os.dup(kernel.fd), space, str(target), space.end)
    kept = duplicated(backend.hand_over())
    assert kept.notes == notes
    backend.close()
    kernel.calls.clear()
    return kept


def duplicated(handover: Handover) -> Handover:
    notes = json.loads(json.dumps(dict(handover.notes)))
    return Handover({name: os.dup(fd) for name, fd in handover.fds.items()}, notes)


def let_go(handover: Handover) -> None:
    for fd in handover.fds.values():
        os.close(fd)


def same_file(one: int, other: int) -> bool:
    return os.path.sameopenfile(one, other)


@pytest.fixture(params=["type1", "iommufd"])
def kept(request: pytest.FixtureRequest, kernel: Kernel) -> Iterator[Handover]:
    kept = first_of(kernel, request.param)
    yield kept
    let_go(kept)


@pytest.fixture
def resumed(kept: Handover) -> Iterator[FunctionBackend]:
    backend = backends.resume(TARGET, duplicated(kept))
    yield backend
    backend.close()


def test_a_successor_changes_nothing_and_knows_everything(
    resumed: FunctionBackend, kept: Handover, kernel: Kernel
) -> None:
    assert kernel.calls == []
    assert resumed.isolation == f"group {GROUP}"
    assert resumed.iova_ranges == ((0, 0xFFFF),)
    assert resumed.region_read(CONFIG_REGION, 0, 2) == b"\x34\x12"
    assert resumed.promises.reset
    context = resumed.dma_context()
    assert context is not None
    assert same_file(context.fd, kept.fds["container" if "group" in kept.fds else "iommufd"])
    assert context.ioas == kept.notes.get("ioas", 0)
    assert resumed.request_fd is not None
    assert same_file(resumed.request_fd, kept.fds["request"])


def test_what_a_successor_hands_over_is_what_it_was_given(
    resumed: FunctionBackend, kept: Handover
) -> None:
    again = resumed.hand_over()
    assert again is not None
    assert again.notes == kept.notes
    assert again.fds.keys() == kept.fds.keys()
    assert all(same_file(again.fds[name], kept.fds[name]) for name in kept.fds)


def test_a_successor_unmaps_what_was_mapped_before(
    resumed: FunctionBackend, kept: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = resumed.dma_context()
    assert context is not None
    calls: list[tuple[object, ...]] = []

    def unmap(*what: object) -> int:
        calls.append(what)
        return 4096

    monkeypatch.setattr(kernel_type1, "unmap", unmap)
    monkeypatch.setattr(iommufd, "unmap", unmap)
    assert resumed.dma_unmap(Iova(0x1000), 4096) == 4096
    ((fd, *_),) = calls
    assert fd == context.fd


def test_two_functions_of_a_group_share_what_was_handed_over_twice(kernel: Kernel) -> None:
    kept = first_of(kernel, "type1")
    one = backends.resume(TARGET, duplicated(kept))
    before = len(os.listdir("/proc/self/fd"))
    other = backends.resume(SIBLING, duplicated(kept))
    assert len(os.listdir("/proc/self/fd")) == before + 3  # device, interrupts, request
    with pytest.raises(Busy):
        backends.resume(TARGET, duplicated(kept))
    one.close()
    context = other.dma_context()
    assert context is not None
    assert same_file(context.fd, kept.fds["container"])
    other.close()
    let_go(kept)


@pytest.mark.parametrize("missing", ["device", "irqs", "container", "group", "iommufd"])
def test_a_handover_with_something_missing_is_refused_and_closed(
    kept: Handover, missing: str, kernel: Kernel
) -> None:
    if missing not in kept.fds:
        return
    part = duplicated(kept)
    os.close(dict(part.fds)[missing])
    fds = {name: fd for name, fd in part.fds.items() if name != missing}
    with pytest.raises(ProtocolError):
        backends.resume(TARGET, Handover(fds, part.notes))
    for notes in ({}, {"backend": "else"}, {"backend": kept.notes["backend"]}):
        with pytest.raises(ProtocolError):
            backends.resume(TARGET, Handover(duplicated(kept).fds, notes))
    backends.resume(TARGET, duplicated(kept)).close()


def test_a_function_that_is_gone_leaves_nothing_open(
    kept: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> DeviceInfo:
        raise SystemFailure("no such device", errno=errno.ENODEV)

    monkeypatch.setattr(vfio_device, "device_info", gone)
    with pytest.raises(SystemFailure):
        backends.resume(TARGET, duplicated(kept))


# -- interrupts ------------------------------------------------------------


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    found = [events.make() for _ in range(4)]
    yield found
    for fd in found:
        os.close(fd)


def handed_on(kept: Handover, eventfds: list[int], index: IrqIndex) -> FunctionBackend:
    """A successor of one that wired interrupts and was killed."""
    before = backends.resume(TARGET, duplicated(kept))
    before.set_irqs(index, 0, eventfds)
    before.close()  # of duplicates: the kernel sees nothing of it
    return backends.resume(TARGET, duplicated(kept))


def test_interrupts_that_were_wired_can_be_replaced_and_disabled(
    kept: Handover, kernel: Kernel, eventfds: list[int]
) -> None:
    backend = handed_on(kept, eventfds, IrqIndex.MSI)
    assert kernel.calls == [("wire", "MSI", 0, 4)]
    with pytest.raises(Busy):
        backend.set_irqs(IrqIndex.INTX, 0, eventfds[:1])
    backend.set_irqs(IrqIndex.MSI, 0, eventfds)
    backend.set_irqs(IrqIndex.MSI, 1, eventfds[:1])
    backend.set_irqs(IrqIndex.MSI, 0, [])
    assert kernel.calls[1:] == [("wire", "MSI", 0, 4), ("wire", "MSI", 1, 1), ("disable", "MSI")]
    backend.set_irqs(IrqIndex.INTX, 0, eventfds[:1])
    backend.close()


def test_what_was_disabled_is_not_wired_for_the_successor_either(
    kept: Handover, kernel: Kernel, eventfds: list[int]
) -> None:
    before = handed_on(kept, eventfds, IrqIndex.MSI)
    before.set_irqs(IrqIndex.MSI, 0, [])
    before.close()
    backend = backends.resume(TARGET, duplicated(kept))
    kernel.calls.clear()
    backend.set_irqs(IrqIndex.MSI, 0, [])
    assert kernel.calls == []
    with pytest.raises(NotSupported):
        backend.unmask_intx()
    backend.close()


def test_a_type_that_was_only_about_to_be_wired_can_be_disabled(
    kept: Handover, kernel: Kernel, eventfds: list[int]
) -> None:
    backend = handed_on(kept, eventfds, IrqIndex.MSI)
    kernel.wired.discard(IrqIndex.MSI)  # as if the kernel had never been asked
    backend.set_irqs(IrqIndex.MSI, 0, [])
    backend.set_irqs(IrqIndex.INTX, 0, eventfds[:1])
    backend.close()


def test_a_fixed_type_grows_in_a_successor_only_with_all_its_vectors(
    kept: Handover, kernel: Kernel, eventfds: list[int]
) -> None:
    backend = handed_on(kept, eventfds[:2], IrqIndex.MSI)
    kernel.calls.clear()
    with pytest.raises(NotSupported, match="predecessor"):
        backend.set_irqs(IrqIndex.MSI, 1, eventfds[:2])
    assert kernel.calls == []
    backend.set_irqs(IrqIndex.MSI, 0, eventfds)
    assert kernel.calls == [("disable", "MSI"), ("wire", "MSI", 0, 4)]
    backend.close()


def test_a_type_that_can_grow_does_so_in_a_successor(
    kept: Handover, kernel: Kernel, eventfds: list[int]
) -> None:
    kernel.flags = u.IRQ_INFO_EVENTFD
    backend = handed_on(kept, eventfds[:2], IrqIndex.MSI)
    backend.set_irqs(IrqIndex.MSI, 1, eventfds[:3])
    assert kernel.calls == [("wire", "MSI", 0, 2), ("wire", "MSI", 1, 3)]
    backend.close()


def test_a_handover_for_an_unknown_scheme_is_closed(clean: None) -> None:
    fd = os.memfd_create("anything")
    with pytest.raises(HoldfastError):
        backends.resume(Target("qemu", "edu"), Handover({"device": fd}))
