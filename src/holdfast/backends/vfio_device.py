# SPDX-License-Identifier: Apache-2.0
"""A function held through a VFIO device descriptor: what type1 and iommufd have in common.

Facts. The descriptor gives regions by pread, pwrite and mmap, interrupts by eventfd, and reset.
A function that was pulled out still answers: reads are all ones, writes are lost; so is what a
function answers in the middle of a reset. A descriptor closed in one thread while another is about
to use its number may by then name another file. Calls into the kernel may hang, and their threads
are abandoned.

Consequence. "All ones" is looked into, by reading the vendor id, and not while a reset is on.
No lock is held across a system call that :meth:`VfioBackend.close` would have to wait for.

Choice. Descriptors are counted (:class:`Descriptor`): the last user of a closed one closes it.
Where DMA goes is an :class:`IoSpace`, shared by the functions of one isolation unit.

Cost. A register that reads all ones costs a second read, of the vendor id.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from holdfast.backends.region_access import checked, existing, require_small
from holdfast.backends.vfio_irq_record import IrqRecord
from holdfast.backends.vfio_irqs import Irqs
from holdfast.backends.vfio_regions import discover
from holdfast.contracts import DmaContext, Doorbell, HostMemory, RegionMap
from holdfast.dma.slab import SlabSource
from holdfast.errors import (
    BadBuffer,
    Closed,
    DeviceError,
    DeviceGone,
    DeviceReset,
    NotSupported,
)
from holdfast.kernel import vfio_device as kernel
from holdfast.values import (
    CONFIG_REGION,
    Handover,
    Iova,
    IrqIndex,
    IrqInfo,
    Perm,
    Promises,
    Region,
)

PAGE: Final = 4096
_ONES: Final = {count: b"\xff" * count for count in (1, 2, 4, 8)}


class IoSpace(Protocol):
    """The I/O address space of one isolation unit. Thread-safe."""

    @property
    def isolation(self) -> str:
        """Name of the unit, such as "group 7"."""
        ...

    @property
    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """IOVAs that can be mapped, first and last inclusive; empty if the kernel does not say."""
        ...

    def map_file(self, iova: int, size: int, perm: Perm, fd: int, offset: int, target: str) -> None:
        """Pin pages of a file and map them. On error nothing is mapped."""
        ...

    def unmap(self, iova: int, size: int, target: str) -> int:
        """The bytes really unmapped."""
        ...

    def unmap_all(self, target: str) -> None: ...

    def context(self) -> DmaContext: ...

    def hand_over(self) -> Handover:
        """What a successor needs of it; the descriptors stay the space's."""
        ...


class Descriptor:
    """A descriptor that is closed when it was given up *and* nobody uses it any more.

    ``with descriptor as fd`` is a use; it raises Closed after :meth:`close`. Any thread.
    """

    def __init__(self, fd: int, target: str) -> None:
        self._fd = fd
        self._target = target
        self._users = 0
        self._closed = False
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def number(self) -> int:
        """The number, to be lent on; valid as long as nobody calls :meth:`close`."""
        if self._closed:
            raise self._refused()
        return self._fd

    def __enter__(self) -> int:
        with self._lock:
            if self._closed:
                raise self._refused()
            self._users += 1
            return self._fd

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._users -= 1
            last = self._closed and not self._users
        if last:
            os.close(self._fd)

    def close(self) -> None:
        """Never blocks on another user. Idempotent."""
        with self._lock:
            last = not self._closed and not self._users
            self._closed = True
        if last:
            os.close(self._fd)

    def _refused(self) -> Closed:
        return Closed("the function was closed", operation="use function", target=self._target)


class VfioBackend:
    """``contracts.FunctionBackend`` over a device descriptor and an I/O address space.

    Takes ownership of ``fd``, and calls ``leave`` once when it needs the space no more: also when
    this raises. Any thread. With a predecessor's ``record`` and ``request_fd``, owned here too,
    the function is as it was left: nothing is changed, everything is asked anew.
    Registers of 8 bytes may reach the function as two accesses of 4: kernels before 6.11 have no
    wider one (drivers/vfio/pci/vfio_pci_rdwr.c ``vfio_pci_core_do_io_rw``).
    """

    def __init__(
        self,
        fd: int,
        space: IoSpace,
        target: str,
        leave: Callable[[], None],
        record: IrqRecord | None = None,
        request_fd: int | None = None,
    ) -> None:
        self._target = target
        self._space = space
        self._leave = leave
        self._device = Descriptor(fd, target)
        self._closing = threading.Lock()
        self._gone = False
        self._resetting = 0
        self._on_gone: Callable[[], None] | None = None
        irqs: Irqs | None = None
        try:
            self._irqs = irqs = Irqs(self._device, target, record, request_fd)
            info = kernel.device_info(fd, target)
            self._regions = discover(fd, info.regions, target)
            self._promises = Promises(strict_unmap=True, reset=info.resets)
        except BaseException:
            self._device.close()
            if irqs is not None:
                irqs.close()
            leave()
            raise

    # -- what it is ------------------------------------------------------------------------------

    @property
    def promises(self) -> Promises:
        # Unmaps are synchronous in both: the IOTLB is flushed before pages are unpinned
        # (vfio_unmap_unpin; iopt_area_unfill_domains).
        return self._promises

    @property
    def isolation(self) -> str:
        return self._space.isolation

    @property
    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """IOVAs that can be mapped, first and last inclusive; empty if the kernel does not say."""
        return self._space.iova_ranges

    @property
    def request_fd(self) -> int | None:
        return self._irqs.request_fd

    def dma_context(self) -> DmaContext | None:
        with self._device:  # Closed if it is
            return self._space.context()

    def memory(self) -> SlabSource | None:
        return None

    @property
    def regions(self) -> Sequence[Region]:
        return self._regions

    @property
    def irqs(self) -> Sequence[IrqInfo]:
        return self._irqs.infos

    @property
    def on_gone(self) -> Callable[[], None] | None:
        return self._on_gone

    @on_gone.setter
    def on_gone(self, callback: Callable[[], None] | None) -> None:
        self._on_gone = callback

    # -- regions ---------------------------------------------------------------------------------

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        region = self._checked(index, offset, count, write=False)
        with self._device as fd:
            self._require_present("region_read")
            try:
                data = os.pread(fd, count, region.file_offset + offset)
            except OSError as error:
                raise self._failed(fd, error, "region_read", index) from error
            if data == _ONES.get(count) or (count > 8 and data.count(0xFF) == count):
                self._look(fd, "region_read")
        if len(data) != count:
            raise self._short("region_read", index, len(data), count)
        return data

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        region = self._checked(index, offset, len(data), write=True)
        with self._device as fd:
            self._require_present("region_write")
            try:
                written = os.pwrite(fd, data, region.file_offset + offset)
            except OSError as error:
                raise self._failed(fd, error, "region_write", index) from error
        if written != len(data):
            raise self._short("region_write", index, written, len(data))

    def region_read_multi(self, reads: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Small reads as ``(index, offset, count)``, in order; none if one is out of range."""
        for index, offset, count in reads:
            self._checked(index, offset, count, write=False)
            require_small(count, "region_read_multi", self._target)
        return [self.region_read(*read) for read in reads]

    def region_write_multi(self, writes: Sequence[tuple[int, int, bytes]]) -> None:
        """Small writes as ``(index, offset, data)``, in order; none if one is out of range."""
        for index, offset, data in writes:
            self._checked(index, offset, len(data), write=True)
            require_small(len(data), "region_write_multi", self._target)
        for write in writes:
            self.region_write(*write)

    def region_map(self, index: int) -> RegionMap | None:
        """The device descriptor: whoever gets it can do anything with the function."""
        region = existing(self._regions, index, "region_map", self._target)
        return RegionMap(self._device.number, region) if region.areas else None

    def doorbells(self, index: int) -> Sequence[Doorbell]:
        """None: real registers are rung by writing them."""
        existing(self._regions, index, "doorbells", self._target)
        return []

    # -- interrupts ------------------------------------------------------------------------------

    def set_irqs(self, index: IrqIndex, start: int, eventfds: Sequence[int]) -> None:
        """Wire vectors; see :meth:`Irqs.wire`. The caller keeps its eventfds."""
        self._require_present("set_irqs")
        self._irqs.wire(index, start, eventfds)

    def unmask_intx(self) -> None:
        self._require_present("unmask_intx")
        self._irqs.unmask_intx()

    # -- DMA -------------------------------------------------------------------------------------

    def dma_map(self, iova: Iova, size: int, perm: Perm, fd: int, offset: int) -> None:
        """Pin the file's pages and map them. On error nothing is mapped.

        Raises BadBuffer (no whole pages, no such part of the file), OutOfMemory (RLIMIT_MEMLOCK,
        looked at first; or no memory), ResourceError (no more maps), SystemFailure (EEXIST:
        something is mapped there).
        """
        if size < PAGE or (int(iova) | size | offset) % PAGE or min(int(iova), offset) < 0:
            raise BadBuffer(
                f"{size} bytes at {offset:#x} of the file, for {iova!r}: no whole pages",
                operation="dma_map",
                target=self._target,
            )
        with self._device:
            self._space.map_file(int(iova), size, perm, fd, offset, self._target)

    def dma_map_memory(self, iova: Iova, size: int, perm: Perm, memory: HostMemory) -> None:
        raise NotSupported(
            "hardware reaches memory by itself, not by message",
            operation="dma_map_memory",
            target=self._target,
            hint="pin in place (dma_context), or map a file",
        )

    def dma_unmap(self, iova: Iova, size: int) -> int:
        """The bytes really unmapped, 0 if nothing is mapped there. Synchronous.

        Works when the function is gone, too: the address space is the kernel's. On type1,
        SystemFailure (EINVAL) if the range cuts a mapping in two.
        """
        with self._device:
            return self._space.unmap(int(iova), size, self._target)

    def dma_unmap_all(self) -> None:
        """Take everything away that is mapped in the I/O address space, by whomever."""
        with self._device:
            self._space.unmap_all(self._target)

    # -- the whole function ----------------------------------------------------------------------

    def hand_over(self) -> Handover:
        """The device, what is known of its interrupts, and the I/O address space."""
        space = self._space.hand_over()
        fds = {"device": self._device.number, **space.fds}
        if self._irqs.record is not None:
            fds["irqs"] = self._irqs.record.fd
        if self._irqs.request_fd is not None:
            fds["request"] = self._irqs.request_fd
        return Handover(fds, space.notes)

    def reset(self) -> None:
        """VFIO_DEVICE_RESET; configuration space and interrupts are the kernel's to restore.

        Raises NotSupported if there is none, SystemFailure (EAGAIN) if another reset is on.
        """
        if not self._promises.reset:
            raise NotSupported("no reset", operation="reset", target=self._target)
        with self._device as fd:
            self._require_present("reset")
            self._resetting += 1
            try:
                kernel.reset(fd, self._target)
            finally:
                self._resetting -= 1

    def close(self) -> None:
        """Close the device, then leave the address space. Idempotent.

        The kernel turns bus master off, resets the function if it can, and ends its interrupts;
        not before the last duplicate of the descriptor and the last mapping of a BAR are gone.
        """
        with self._closing:
            if self._device.closed:
                return
            self._device.close()
        self._irqs.close()
        self._leave()

    # -- details ---------------------------------------------------------------------------------

    def _checked(self, index: int, offset: int, count: int, *, write: bool) -> Region:
        return checked(self._regions, index, offset, count, write=write, target=self._target)

    def _require_present(self, operation: str) -> None:
        if self._gone:
            raise self._is_gone(operation)

    def _look(self, fd: int, operation: str) -> None:
        """Something read as all ones, or failed: raise DeviceGone if so does the vendor id."""
        config = self._regions[CONFIG_REGION]
        try:
            if os.pread(fd, 2, config.file_offset) != b"\xff\xff":
                return
        except OSError:
            pass
        if self._resetting:
            raise DeviceReset("it is being reset", operation=operation, target=self._target)
        with self._closing:
            first, self._gone = not self._gone, True
        if first and self._on_gone is not None:
            self._on_gone()
        raise self._is_gone(operation)

    def _is_gone(self, operation: str) -> DeviceGone:
        return DeviceGone(
            "the function does not answer any more",
            operation=operation,
            target=self._target,
            hint="see the kernel log; rescan with `echo 1 > /sys/bus/pci/rescan`",
        )

    def _failed(self, fd: int, error: OSError, operation: str, index: int) -> DeviceError:
        self._look(fd, operation)
        # EIO: memory space is off, or a runtime resume failed (vfio_pci_core_read*; vfio_pci_rw).
        return DeviceError(
            f"region {index}: {error.strerror}",
            operation=operation,
            target=self._target,
            errno=error.errno,
            hint="turn memory space on in the command register" if index < CONFIG_REGION else "",
        )

    def _short(self, operation: str, index: int, done: int, count: int) -> DeviceError:
        return DeviceError(
            f"region {index}: {done} of {count} bytes", operation=operation, target=self._target
        )
