# SPDX-License-Identifier: Apache-2.0
"""A function without an IOMMU in front of it, through sysfs and uio_pci_generic.

Facts. Without translation the function puts physical addresses on the bus, so whoever can write its
registers can have any memory of the machine read and written. A mapping of ``resourceN`` has no
release hook: it outlives whatever was agreed on, in a child or in a process that was passed the
descriptor. No unmap exists, so nothing but the function itself ends its reach; and when the process
that drives it dies, the kernel stops it only if uio_pci_generic is bound, by clearing bus master.

Consequence. Registers must stay in the keeper; memory must not move or be given back by anyone but
the keeper; and what the keeper leaves behind must be found again.

Choice. ``region_map`` answers None for every region, and ``areas`` are empty: each register access
goes through the keeper. Memory comes from :meth:`UioBackend.memory` alone (``dma.physical``), at
addresses that do not change. ``dma_map`` refuses: it could only pretend. ``dma_unmap`` takes
nothing away, and says so: 0 bytes. Bus mastering is off from the moment of opening until the keeper
turns it on, as VFIO does it (drivers/vfio/pci/vfio_pci_core.c, ``vfio_pci_core_enable``), and off
again, read back, at the end. Interrupts are INTx with uio_pci_generic; none without a driver.

Cost. A message to the keeper for each register access. Every driver is trusted with all memory: a
wrong address in a descriptor is corruption, not a fault. :data:`CAUTION` says it to the user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

from holdfast.backends.region_access import existing, require_small
from holdfast.backends.uio_function import SysfsFunction
from holdfast.backends.uio_irq import IntxRelay
from holdfast.contracts import DmaContext, Doorbell, HostMemory, RegionMap
from holdfast.dma.physical import PhysicalFiles
from holdfast.errors import BadAccess, Busy, HoldfastError, NotSupported
from holdfast.kernel import hugetlb, pci_sysfs
from holdfast.kernel.handover import Incoming
from holdfast.kernel.pci_sysfs import SYSFS, PciFunction
from holdfast.uapi import pci_regs
from holdfast.uapi.pci_regs import Command
from holdfast.values import (
    CONFIG_REGION,
    Handover,
    Iova,
    IrqIndex,
    IrqInfo,
    Perm,
    Promises,
    Region,
    Target,
)

CAUTION: Final = (
    "no IOMMU: the function reaches all memory of this machine. A wrong address in a driver or a"
    " program corrupts other processes or the kernel, silently. Isolation between clients, and the"
    " unmap that stops a card which cannot be quieted, are lost; memory of a dead client is kept"
    " until the card is seen idle. If the keeper is killed with everything that holds its"
    " descriptors, only uio_pci_generic stops the card; the memory stays in named huge page files"
    " until the next keeper has found it."
)
"""What is lost, for whoever opens ``backend=uio``: print it."""

KIND: Final = "uio"
"""What ``notes["backend"]`` of a handover says."""

UIO_DRIVER: Final = "uio_pci_generic"
_UNTRANSLATED: Final = "identity"
"""A group of this type is not translated: physical addresses are right."""


def open_target(target: Target) -> UioBackend:
    """For the registry: ``pci:DDDD:BB:DD.F?backend=uio``, with ``dma_bits`` if it says so."""
    return UioBackend(target)


class UioBackend:
    """``contracts.FunctionBackend`` without translation. Thread-safe.

    Needs root. Owns everything it opens, and the source of memory.
    """

    _relay: IntxRelay | None = None
    _memory: PhysicalFiles | None = None

    def __init__(
        self,
        target: Target,
        *,
        sysfs: Path = SYSFS,
        dev: Path = Path("/dev"),
        directory: Path | None = None,
    ) -> None:
        """Take the function: locked, enabled, memory space on, bus master and INTx off.

        ``directory`` is where slabs go, by default the first hugetlbfs mount. Raises BadTarget,
        Busy (another driver or process has it), NotSupported (it is translated, or there is no
        hugetlbfs or io_uring), NoPermission. Nothing is held then.
        """
        found = pci_sysfs.function(target.bdf, sysfs)
        require_untranslated(found, str(target))
        require_driver(found, str(target))
        self._target = str(target)
        self._bdf = target.bdf
        self._resettable = bool(found.reset_methods)
        self._enabled = False
        self._function = SysfsFunction(found, str(target), sysfs)
        try:
            self._function.set_command(Command.MASTER, on=False)
            self._function.set_command(Command.INTX_DISABLE, on=True)
            self._enable(found, sysfs)
            self._function.set_command(Command.MEMORY, on=True)
            self._intx = False
            self._open_uio(found, sysfs, dev)
            self._memory = PhysicalFiles(
                directory or hugetlb.mount_point(),
                target.bdf,
                dma_bits=int(target.options.get("dma_bits", 64)),
            )
        except BaseException:
            self.close()
            raise

    @classmethod
    def resume(cls, target: Target, found: Incoming, *, sysfs: Path = SYSFS) -> Self:
        """Go on with a function of a predecessor that was killed; see ``backends.resume``.

        Nothing is written to the function. What it had given out of its memory is to be adopted
        first (:meth:`memory`); interrupts come once ``set_irqs`` was called. Raises BadTarget or
        DeviceGone if the function is not there any more, ProtocolError if the handover makes no
        sense; what the predecessor held is then as it was.
        """
        self = cls.__new__(cls)
        function = pci_sysfs.function(target.bdf, sysfs)
        self._target = str(target)
        self._bdf = target.bdf
        self._resettable = bool(function.reset_methods)
        self._enabled = bool(found.number("enabled"))
        self._function = SysfsFunction(function, str(target), sysfs, found)
        try:
            self._intx = "uio" in found and self._has_line(function, sysfs)
            if "uio" in found:
                self._hold_uio(found.take("uio"))
            bits = int(target.options.get("dma_bits", 64))
            self._memory = PhysicalFiles.resume(found, target.bdf, dma_bits=bits)
        except BaseException:
            if self._relay is not None:
                self._relay.close()
            self._function.close()
            raise
        return self

    def hand_over(self) -> Handover:
        """Configuration space, the lock, the uio device, and whoever holds the pins of memory."""
        memory = self.memory().hand_over()
        fds = self._function.descriptors() | dict(memory.fds)
        if self._relay is not None:
            fds["uio"] = self._relay.fd
        notes = {"backend": KIND, "enabled": int(self._enabled), **memory.notes}
        return Handover(fds, notes)

    @property
    def promises(self) -> Promises:
        """No unmap, and a reset if the kernel has a method for this function."""
        return Promises(strict_unmap=False, reset=self._resettable)

    @property
    def isolation(self) -> str:
        """The function alone: no address space is shared, because there is none."""
        return f"function {self._bdf}"

    @property
    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """None in particular: nothing is mapped. What is in reach is :meth:`memory`'s to know."""
        return ()

    @property
    def request_fd(self) -> int | None:
        """None: nobody asks. A driver that is taken away, or a removal, is seen by ``on_gone``."""
        return None

    def dma_context(self) -> DmaContext | None:
        return None

    def memory(self) -> PhysicalFiles:
        """The only memory the function may be given. Owned by the backend, closed with it."""
        assert self._memory is not None
        return self._memory

    @property
    def regions(self) -> Sequence[Region]:
        return self._function.regions

    @property
    def irqs(self) -> Sequence[IrqInfo]:
        return [IrqInfo(index, int(index == IrqIndex.INTX and self._intx)) for index in IrqIndex]

    @property
    def on_gone(self) -> Callable[[], None] | None:
        """Called when an access finds the function gone, or uio_pci_generic has lost it."""
        return self._function.on_gone

    @on_gone.setter
    def on_gone(self, callback: Callable[[], None] | None) -> None:
        self._function.on_gone = callback

    # -- regions ---------------------------------------------------------------------------------

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        return self._function.read(index, offset, count)

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write; in the command register INTX_DISABLE stays what it is (see ``set_irqs``)."""
        self._function.write(index, offset, data)

    def region_read_multi(self, reads: Sequence[tuple[int, int, int]]) -> list[bytes]:
        for _, _, count in reads:
            require_small(count, "region_read_multi", self._target)
        return [self._function.read(*read) for read in reads]

    def region_write_multi(self, writes: Sequence[tuple[int, int, bytes]]) -> None:
        for _, _, data in writes:
            require_small(len(data), "region_write_multi", self._target)
        for write in writes:
            self._function.write(*write)

    def region_map(self, index: int) -> RegionMap | None:
        """Always None, on purpose: a mapped BAR is the power to write any memory, for ever.

        Without an IOMMU registers are the only gate, and a mapping cannot be taken back.
        """
        existing(self.regions, index, "region_map", self._target)
        return None

    def doorbells(self, index: int) -> Sequence[Doorbell]:
        """None: real registers cannot be rung through eventfds."""
        existing(self.regions, index, "doorbells", self._target)
        return []

    # -- interrupts ------------------------------------------------------------------------------

    def set_irqs(self, index: IrqIndex, start: int, eventfds: Sequence[int]) -> None:
        """Wire INTx to (a duplicate of) one eventfd, or mask it for good if there is none."""
        count = self.irqs[index].count
        if start < 0 or start + len(eventfds) > count:
            raise BadAccess(
                f"vectors {start} to {start + len(eventfds) - 1} of {count}",
                operation="set_irqs",
                target=self._target,
                hint=f"INTx only, with {UIO_DRIVER}: holdfast bind {self._bdf} --driver"
                f" {UIO_DRIVER}",
            )
        if self._relay is None or not count:
            return  # an empty set for a type that the function does not have
        if not eventfds:
            self._function.set_command(Command.INTX_DISABLE, on=True)
            self._relay.aim(None)
        else:
            self._relay.aim(eventfds[0])
            self._function.unmask_intx()

    def unmask_intx(self) -> None:
        """The kernel's handler has masked it; see ``contracts.FunctionBackend``."""
        if self._intx:
            self._function.unmask_intx()

    # -- DMA -------------------------------------------------------------------------------------

    def dma_map(self, iova: Iova, size: int, perm: Perm, fd: int, offset: int) -> None:
        """NotSupported: nothing translates. Memory of :meth:`memory` is reachable as it is."""
        raise self._no_translation("dma_map")

    def dma_map_memory(self, iova: Iova, size: int, perm: Perm, memory: HostMemory) -> None:
        """NotSupported, as for :meth:`dma_map`."""
        raise self._no_translation("dma_map_memory")

    def dma_unmap(self, iova: Iova, size: int) -> int:
        """0: nothing is ever mapped, and nothing can be put out of the function's reach."""
        return 0

    def dma_unmap_all(self) -> None:
        """Nothing is ever mapped; what the function can reach is all of memory."""

    # -- the whole function ----------------------------------------------------------------------

    def reset(self) -> None:
        """Reset by the kernel's first method. It restores configuration space as it was before."""
        if not self._resettable:
            raise NotSupported(
                "the kernel has no reset for this function", operation="reset", target=self._target
            )
        self._function.attribute("reset", "1")

    def close(self) -> None:
        """Bus master off and read back, then let go. Idempotent.

        Raises DeviceError if the function refuses to give up bus mastering; everything is let go
        then too. Memory that is still given out stays in its files.
        """
        problem = self._quiet()
        if self._relay is not None:
            self._relay.close()
        if self._memory is not None:
            self._memory.close()
        self._function.close()
        if problem is not None:
            raise problem

    # -- details ---------------------------------------------------------------------------------

    def _enable(self, found: PciFunction, sysfs: Path) -> None:
        """Wake the function and turn decoding on (pci_enable_device), unless its driver has."""
        path = pci_sysfs.device_path(found.bdf, sysfs) / "enable"
        if found.driver is None and pci_sysfs.text(path) == "0":
            self._function.attribute("enable", "1")
            self._enabled = True

    def _open_uio(self, found: PciFunction, sysfs: Path, dev: Path) -> None:
        """Hold /dev/uioN if there is one."""
        path = pci_sysfs.device_path(found.bdf, sysfs)
        if found.driver is None:
            return
        try:
            name = next(entry.name for entry in (path / "uio").iterdir())
        except (OSError, StopIteration):
            raise NotSupported(
                f"{UIO_DRIVER} is bound but has made no device",
                operation="open",
                target=self._target,
                hint=f"holdfast bind {found.bdf} --driver {UIO_DRIVER}",
            ) from None
        self._intx = self._has_line(found, sysfs)
        self._hold_uio(dev / name)

    def _has_line(self, found: PciFunction, sysfs: Path) -> bool:
        """As the driver decides it: a function without an interrupt line has irq 0."""
        line = pci_sysfs.text(pci_sysfs.device_path(found.bdf, sysfs) / "irq")
        pin = self._function.read(CONFIG_REGION, pci_regs.INTERRUPT_PIN, 1)
        return line not in (None, "0") and pin != b"\0"

    def _hold_uio(self, place: Path | int) -> None:
        self._relay = IntxRelay(
            place, interrupts=self._intx, on_gone=lambda: self._function.gone("uio")
        )

    def _quiet(self) -> HoldfastError | None:
        """Turn bus mastering and INTx off; the error if the function is there and did not obey."""
        function = self._function
        try:
            function.set_command(Command.MASTER, on=False)
            function.set_command(Command.INTX_DISABLE, on=True)
            if self._enabled:
                self._enabled = False
                function.attribute("enable", "0")
        except HoldfastError as error:
            return None if function.ended else error
        return None

    def _no_translation(self, operation: str) -> NotSupported:
        return NotSupported(
            "without an IOMMU nothing can be mapped: the function sees physical addresses",
            operation=operation,
            target=self._target,
            hint="take memory from the backend's own source: alloc() instead of pin()",
        )


def require_untranslated(function: PciFunction, target: str) -> None:
    """Raise NotSupported if an IOMMU translates what the function puts on the bus."""
    if not function.translated or function.iommu_type == _UNTRANSLATED:
        return
    group = f"/sys/kernel/iommu_groups/{function.iommu_group}"
    raise NotSupported(
        f"an IOMMU translates for it (group {function.iommu_group}, domain type"
        f" {function.iommu_type}): physical addresses would fault",
        operation="open",
        target=target,
        hint=f"use the IOMMU: pci:{function.bdf} without backend=uio; or give it up: unbind every"
        f" driver of the group and echo identity > {group}/type, or start the kernel with"
        " intel_iommu=off (amd_iommu=off)",
    )


def require_driver(function: PciFunction, target: str) -> None:
    """Raise Busy if a kernel driver other than uio_pci_generic has the function."""
    if function.driver not in (None, UIO_DRIVER):
        raise Busy(
            f"the kernel driver {function.driver} has it",
            operation="open",
            target=target,
            hint=f"holdfast bind {function.bdf} --driver {UIO_DRIVER}",
        )
