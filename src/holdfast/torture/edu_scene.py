# SPDX-License-Identifier: Apache-2.0
"""What experiments with real edu functions need: where they are, a keeper at once, pins, bytes.

Starting an interpreter with NumPy takes seconds in an emulated guest. So keepers are forked here
from a process that has everything loaded already, as clients are (:mod:`holdfast.torture.actors`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import holdfast
from holdfast.device import Device
from holdfast.errors import HoldfastError, UsageError
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.keeper.main import Service, run
from holdfast.keeper.server import Settings
from holdfast.kernel import pci_sysfs
from holdfast.kernel.pci_sysfs import PciFunction
from holdfast.regs import edu as regs
from holdfast.regs.view import RegisterView
from holdfast.torture.actors import Child, spawn
from holdfast.torture.edu_actors import engine_of
from holdfast.torture.stack import STOP_TIMEOUT, Stack, kill_tree
from holdfast.values import Target

DEV = Path("/dev")
VMSTAT = Path("/proc/vmstat")
SLAB_NAME = "holdfast-"
"""In the names of the keeper's files, in memory and in hugetlbfs."""
_CARRIED = regs.BUFFER_SIZE - 64
"""Bytes: all QEMU versions take so much of edu's buffer."""
STAT_REFRESH = Path("/proc/sys/vm/stat_refresh")


# -- functions ------------------------------------------------------------


def edus(driver: str = "vfio-pci") -> list[PciFunction]:
    """The edu functions that are bound to this driver, in the order of their addresses."""
    return [
        found
        for found in pci_sysfs.functions()
        if (found.vendor, found.device) == (regs.VENDOR, regs.DEVICE) and found.driver == driver
    ]


def alone(found: PciFunction) -> bool:
    """Whether no other function but bridges is in its IOMMU group."""
    if found.iommu_group is None:
        return True
    members = pci_sysfs.group_members(found.iommu_group)
    return all(other.bdf == found.bdf or other.is_bridge for other in members)


def offered(found: PciFunction) -> tuple[str, ...]:
    """The VFIO backends that this kernel offers for a function: "type1", "iommufd"."""
    nodes = {
        "type1": (DEV / "vfio/vfio", DEV / "vfio" / str(found.iommu_group)),
        "iommufd": (DEV / "iommu", DEV / "vfio/devices" / (found.vfio_cdev or "none")),
    }
    return tuple(way for way, needed in nodes.items() if all(node.exists() for node in needed))


def command_register(found: PciFunction) -> int:
    """The PCI command register, read past whoever has the function open."""
    config = (pci_sysfs.device_path(found.bdf) / "config").read_bytes()
    return int.from_bytes(config[4:6], "little")


# -- keepers ------------------------------------------------------------


class WarmStack(Stack):
    """A keeper forked from this process. A context manager; only from a single-threaded process.

    ``settings`` as ``holdfast serve`` would make them of its options.
    """

    def __init__(self, target: str, settings: Settings | None = None) -> None:
        super().__init__(target)
        self._settings = settings or Settings()
        self._child: Child | None = None

    def _start(self) -> None:
        target = Target.parse(self.target)

        def body(_: int, writing: int) -> None:
            os.setsid()
            with contextlib.suppress(HoldfastError):  # told through the pipe
                run(Service(target, self._settings, ready_fd=writing))

        self._child = spawn(body)
        embedded.raise_unless_ready(embedded.read_line(self._child.reading), target)

    @property
    def keeper_pid(self) -> int:
        if self._child is None:
            raise HoldfastError("the stack is not running", operation="stack")
        return int(self.ps()["keeper"])

    def kill(self) -> int:
        """SIGKILL the keeper, its anchor and its standby: none is left to succeed it.

        Returns CLOCK_MONOTONIC nanoseconds of the kill. Reaps nothing.
        """
        if self._child is None:
            raise HoldfastError("the stack is not running", operation="stack")
        kill_tree(self._child.pid)
        return time.monotonic_ns()

    def lease(self, number: int) -> dict[str, Any]:
        """One lease, living or ended, as the keeper tells of it."""
        return next(dict(told) for told in self.ps()["leases"] if told["lease"] == number)

    def slab_bytes(self, size: int) -> int:
        """A descriptor of the keeper's slab of ``size`` bytes, opened anew; the caller closes it.

        Raises HoldfastError unless the keeper has exactly one of this size open.
        """
        directory = Path(f"/proc/{self.keeper_pid}/fd")
        found = {}
        for entry in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if SLAB_NAME in os.readlink(entry) and status.st_size == size:
                    found[status.st_ino] = entry
        if len(found) != 1:
            raise HoldfastError(f"{len(found)} slabs of {size} bytes", operation="look into slab")
        return os.open(next(iter(found.values())), os.O_RDONLY | os.O_CLOEXEC)

    def _clean(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            end_process(child)
        super()._clean()


def end_process(child: Child, timeout: float = STOP_TIMEOUT) -> None:
    """SIGTERM, and SIGKILL if that is not enough. Reaps it."""
    pidfd = os.pidfd_open(child.pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if not select.select([pidfd], [], [], timeout)[0]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
        child.reap()


# -- pins and bytes ------------------------------------------------------------


def outstanding_pins() -> int:
    """Page references that are pinned and not released, in the whole machine.

    ``nr_foll_pin_acquired`` less ``nr_foll_pin_released`` (mm/gup.c), after each processor's share
    was added up (/proc/sys/vm/stat_refresh, for root only).
    """
    STAT_REFRESH.write_text("1")
    rows = (line.split() for line in VMSTAT.read_text(encoding="ascii").splitlines())
    counts = {name: int(value) for name, value in rows if name.startswith("nr_foll_pin_")}
    return counts["nr_foll_pin_acquired"] - counts["nr_foll_pin_released"]


def post_to(bar: RegisterView, bus_address: int, nbytes: int) -> None:
    """Start a card-to-host transfer by hand, past driver and queue, from offset 0 of the card."""
    _post(bar, regs.BUFFER_START, bus_address, nbytes, regs.DmaCommand.TO_RAM)


def post_from(bar: RegisterView, bus_address: int, nbytes: int) -> None:
    """Start a host-to-card transfer by hand, to offset 0 of the card."""
    _post(bar, bus_address, regs.BUFFER_START, nbytes, regs.DmaCommand(0))


def _post(bar: RegisterView, source: int, destination: int, nbytes: int, way: int) -> None:
    bar.write(regs.DMA_SOURCE, source)
    bar.write(regs.DMA_DESTINATION, destination)
    bar.write(regs.DMA_COUNT, nbytes)
    bar.write(regs.DMA_COMMAND, int(regs.DmaCommand.START) | way)


def busy(bar: RegisterView) -> bool:
    """Whether a transfer is under way."""
    return bool(bar.read(regs.DMA_COMMAND) & regs.DmaCommand.START)


def there_and_back(target: str, seed: int, timeout: float) -> bool:
    """Whether random bytes go to the card and come back the same, for a client of its own.

    Needs the whole function; waits up to ``timeout`` seconds for it, and for each transfer.
    """

    def body(_: int, writing: int) -> None:
        with holdfast.open(target, access="exclusive", timeout=timeout) as card:
            engine = engine_of(card)
            source, into = (card.alloc(_CARRIED, align=4096) for _ in range(2))
            source.array[:] = np.random.default_rng(seed).integers(0, 256, _CARRIED, np.uint8)
            engine.to_card(source).wait(timeout)
            engine.from_card(into).wait(timeout)
            os.write(writing, b"=" if np.array_equal(source.array, into.array) else b"!")

    child = spawn(body)
    told = child.read(1, timeout)
    return child.reap() == 0 and told == b"="


# -- lifelines ------------------------------------------------------------


def give_lifeline(sock: socket.socket, card: Device) -> None:
    """In a client: hand a duplicate of its end of the lease over.

    While anybody has it open, the lease has not hung up, whatever becomes of the client.
    """
    if not isinstance(card.lease, LeaseClient):
        raise UsageError("no lease of a keeper", operation="give lifeline")
    socket.send_fds(sock, [b"x"], [card.lease.fileno()])


def device_among(descriptors: Sequence[int]) -> int:
    """The one that is a VFIO device's: anonymous from a group, with a name from iommufd."""
    for fd in descriptors:
        link = os.readlink(f"/proc/self/fd/{fd}")
        if "vfio-device" in link or link.startswith("/dev/vfio/devices/"):
            return fd
    raise UsageError("none is a VFIO device", operation="find device descriptor")


def take_descriptor(sock: socket.socket, timeout: float = 60.0) -> int:
    """What another process handed over, close-on-exec; the caller closes it.

    Raises TimeoutError if nothing comes within ``timeout`` seconds.
    """
    sock.settimeout(timeout)
    _, fds, _, _ = socket.recv_fds(sock, 1, 1)
    if len(fds) != 1:
        raise HoldfastError("no descriptor came", operation="take descriptor")
    os.set_inheritable(fds[0], False)
    return fds[0]
