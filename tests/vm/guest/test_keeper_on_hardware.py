# SPDX-License-Identifier: Apache-2.0
"""The keeper of real functions: one per IOMMU group, one user at a time, and off when it must.

Runs inside a lab guest with an edu on the root bus, one behind a root port, and two behind one
bridge, all bound to vfio-pci.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.device import Device
from holdfast.errors import Busy, DeviceGone, HoldfastError
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.keeper.opening import connect
from holdfast.kernel import packets, pci_sysfs
from holdfast.kernel.pci_sysfs import PciFunction
from holdfast.regs import edu
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.torture.stack import kill_tree
from holdfast.values import Access, Target
from holdfast.wire import lease as wire

pytestmark = pytest.mark.guest

EXPECTED = bool(os.environ.get("HOLDFAST_LAB_EXPECT"))
PATIENCE = 60.0
"""Seconds. An emulated guest on a busy host is slow; nothing here is about speed."""
OTHER_USER = 1234


def edus() -> list[PciFunction]:
    return [
        found
        for found in pci_sysfs.functions()
        if (found.vendor, found.device) == (edu.VENDOR, edu.DEVICE) and found.driver == "vfio-pci"
    ]


def wanted(found: list[PciFunction], count: int, what: str) -> list[PciFunction]:
    if len(found) < count:
        if EXPECTED:
            pytest.fail(f"the guest has no {what}")
        pytest.skip(f"the guest has no {what}")
    return found[:count]


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch, forked_keepers: list[Any]) -> Iterator[None]:
    """Keepers of this test's own, all ended after it."""
    directory = tempfile.mkdtemp(prefix="holdfast-")
    monkeypatch.setenv(embedded.RUNTIME_VARIABLE, directory)
    monkeypatch.setenv(embedded.IDLE_VARIABLE, "0.5")
    yield
    while _opened:
        _opened.pop().close()
    for keeper in forked_keepers:
        keeper.terminate()
        keeper.wait()
    shutil.rmtree(directory)


@pytest.fixture
def lone() -> PciFunction:
    """An edu that is alone in its group, on the root bus."""
    groups = [found.iommu_group for found in edus()]
    alone = [f for f in edus() if groups.count(f.iommu_group) == 1 and f.bdf.bus == 0]
    return wanted(alone, 1, "edu on the root bus")[0]


def target_of(found: PciFunction) -> str:
    return f"pci:{found.bdf}?backend=type1"


_opened: list[Device] = []


def open_it(target: str) -> Device:
    """Open, waiting for those who are just letting go; closed after the test at the latest."""
    _opened.append(holdfast.open(target, timeout=PATIENCE))
    return _opened[-1]


def there_and_back(device: Device, seed: int) -> bool:
    """Move random bytes to the card and back, and compare."""
    source, into = device.alloc(2048), device.alloc(2048)
    source.array[:] = np.random.default_rng(seed).integers(0, 256, 2048, np.uint8)
    device.dma.to_card(source).wait(PATIENCE)
    device.dma.from_card(into).wait(PATIENCE)
    return bool((source.array == into.array).all())


def told_of(target: str) -> dict[str, Any]:
    client = connect(Target.parse(target))
    try:
        return client.ps()
    finally:
        client.close()


def keeper_of(target: str) -> int:
    return int(told_of(target)["keeper"])


# -- one keeper for a group ------------------------------------------------------------


def test_functions_of_one_group_share_a_keeper_and_its_addresses() -> None:
    groups = [found.iommu_group for found in edus()]
    both = wanted([f for f in edus() if groups.count(f.iommu_group) > 1], 2, "two edu in a group")
    first, second = map(target_of, both)
    with open_it(first) as one, open_it(second) as two:
        assert keeper_of(first) == keeper_of(second)
        assert there_and_back(one, 1)
        assert there_and_back(two, 2)
        ours = {int(device.alloc(4096, align=4096).iova) for device in (one, two)}
        assert len(ours) == 2
        data = np.zeros(8192, np.uint8)
        with one.pin(data) as pin, two.pin(data) as again:
            assert (pin.how, again.how) == ("in place", "in place")
            assert pin.iova != again.iova


def test_a_keeper_is_not_asked_for_another_backend(lone: PciFunction) -> None:
    with open_it(target_of(lone)):
        with pytest.raises(Busy, match="kept as"):
            holdfast.open(f"pci:{lone.bdf}?backend=iommufd")


# -- one user at a time ------------------------------------------------------------


def as_other_user(target: str) -> bytes:
    """Ask for the lease from a process of another user; what the keeper said."""
    path = embedded.socket_path(Target.parse(target))

    def body(_: int, writing: int) -> None:
        # The keeper sees who connects; its directory is in the way of others otherwise.
        os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)
        client = LeaseClient(packets.connect(str(path), PATIENCE), Target.parse(target))
        try:
            client.greet()
            client.request(wire.Open(access=Access.EXCLUSIVE))
            told = b"opened"
        except HoldfastError as error:
            told = f"{type(error).__name__}: {error}".encode()
        client.close()
        os.write(writing, told.ljust(512)[:512])

    path.chmod(0o777)
    path.parent.chmod(0o711)
    child = actors.spawn(body)
    try:
        return child.read(512, PATIENCE).strip()
    finally:
        path.parent.chmod(0o700)
        assert child.reap() == 0


def test_another_user_gets_the_function_only_when_nobody_else_can_reach_it(
    lone: PciFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(embedded.IDLE_VARIABLE, "30")
    target = target_of(lone)
    monkeypatch.setenv("HOLDFAST_TEST_LET_IN", str(OTHER_USER))
    device = open_it(target)
    stale = device_descriptor(keeper_of(target))
    try:
        refused = as_other_user(target)
        assert refused.startswith(b"Busy"), refused  # it is in use
        device.close()
        # Closed, but a descriptor of the device is still about: the kernel does not open it again.
        refused = as_other_user(target)
        assert refused.startswith(b"Busy"), refused
        assert f"pid {os.getpid()}".encode() in refused, refused
    finally:
        os.close(stale)
    assert as_other_user(target) == b"opened"
    with open_it(target) as mine:  # and back again
        assert there_and_back(mine, 3)


def device_descriptor(keeper: int) -> int:
    """A device descriptor such as a client gets for mapping, taken from the keeper by force."""
    pidfd = os.pidfd_open(keeper)
    try:
        for name in os.listdir(f"/proc/{keeper}/fd"):
            link = os.readlink(f"/proc/{keeper}/fd/{name}")
            if "vfio-device" in link:
                return take_descriptor(pidfd, int(name))
    finally:
        os.close(pidfd)
    raise AssertionError("the keeper has no device open")


def take_descriptor(pidfd: int, number: int) -> int:
    """pidfd_getfd(2)."""
    import ctypes

    taken = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, number, 0)
    assert taken >= 0, os.strerror(ctypes.get_errno())
    return int(taken)


# -- when the system wants it back ------------------------------------------------------------


def unbind(found: PciFunction) -> subprocess.Popen[bytes]:
    """Begin to take a function from vfio-pci; the kernel waits for whoever holds it."""
    script = f"open('/sys/bus/pci/drivers/vfio-pci/unbind', 'w').write('{found.bdf}')"
    return subprocess.Popen([sys.executable, "-S", "-c", script])


def bind_again(found: PciFunction) -> None:
    Path("/sys/bus/pci/drivers_probe").write_text(str(found.bdf))
    assert pci_sysfs.function(found.bdf).driver == "vfio-pci"


def test_an_unbind_is_let_through_while_a_client_sleeps(lone: PciFunction) -> None:
    target = target_of(lone)
    device = open_it(target)
    view = device.bars[0].view()
    buffer = device.alloc(2048)
    running = device.dma.from_card(buffer)
    unbinding = unbind(lone)
    assert unbinding.wait(PATIENCE) == 0  # nothing here did anything for it
    assert pci_sysfs.function(lone.bdf).driver is None
    with pytest.raises(DeviceGone):
        device.bars[0].load(0)
    with pytest.raises(DeviceGone):
        device.alloc(16)
    with pytest.raises(HoldfastError):
        running.wait(PATIENCE)
    assert view[0] == 0  # a view that is left reads nothing of the function
    bind_again(lone)
    with open_it(target) as again:
        assert there_and_back(again, 4)


def test_an_unbind_waits_for_a_client_that_does_nothing_and_goes_on_after_its_death(
    lone: PciFunction,
) -> None:
    target = target_of(lone)

    def body(_: int, writing: int) -> None:
        device = open_it(target)
        device.dma.from_card(device.alloc(2048))
        os.write(writing, b"r")
        signal.pause()

    client = actors.spawn(body)
    assert client.read(1, PATIENCE) == b"r"
    os.kill(client.pid, signal.SIGSTOP)
    unbinding = unbind(lone)
    keeper_gone = settle(lambda: int(listening(target)), goal=0, timeout=PATIENCE)
    assert keeper_gone == 0
    assert unbinding.poll() is None, "its BAR is mapped: the kernel has to wait"
    client.kill()
    client.reap()
    assert unbinding.wait(PATIENCE) == 0
    bind_again(lone)
    with open_it(target) as again:
        assert there_and_back(again, 5)


def listening(target: str) -> bool:
    return embedded.socket_path(Target.parse(target)).exists()


def test_a_removed_function_comes_back_with_a_rescan(lone: PciFunction) -> None:
    target = target_of(lone)
    device = open_it(target)
    (pci_sysfs.device_path(lone.bdf) / "remove").write_text("1")
    assert not pci_sysfs.device_path(lone.bdf).exists()
    with pytest.raises(DeviceGone):
        device.command("anything")
    Path("/sys/bus/pci/rescan").write_text("1")
    override = pci_sysfs.device_path(lone.bdf) / "driver_override"
    override.write_text("vfio-pci")
    bind_again(lone)
    with open_it(target) as again:
        assert there_and_back(again, 6)


# -- what a dead keeper leaves ------------------------------------------------------------


def test_a_client_goes_on_while_its_keeper_is_killed_in_the_middle_of_a_transfer(
    lone: PciFunction,
) -> None:
    target = target_of(lone)
    with open_it(target) as device:
        before = told_of(target)
        source, into = device.alloc(2048), device.alloc(2048)
        source.array[:] = np.arange(2048) % 251
        transfer = device.dma.to_card(source)
        os.kill(before["keeper"], signal.SIGKILL)
        transfer.wait(PATIENCE)
        device.dma.from_card(into).wait(PATIENCE)
        assert np.array_equal(into.array, source.array)
        after = told_of(target)
        assert after["keeper"] != before["keeper"]
        assert after["successions"] == 1
        assert after["unaccounted_bytes"] == 0


def test_a_client_of_a_keeper_that_dies_lets_go_so_that_the_next_one_can_come(
    lone: PciFunction,
) -> None:
    target = target_of(lone)
    device = open_it(target)
    kill_tree(told_of(target)["standby"])  # keeper and anchor with it: there is no successor
    gone: Callable[[], int] = lambda: int(not device.closed)  # noqa: E731
    assert settle(gone, goal=0, timeout=PATIENCE) == 0
    with pytest.raises(HoldfastError):
        device.alloc(16)
    began = time.monotonic()
    with open_it(target) as again:
        assert there_and_back(again, 7)
    assert time.monotonic() - began < PATIENCE
