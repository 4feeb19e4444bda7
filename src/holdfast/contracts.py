# SPDX-License-Identifier: Apache-2.0
"""The contract between the keeper and whatever carries a function: the backend.

A backend (vfio-user socket, VFIO, ...) fulfils :class:`FunctionBackend`. The conformance suite in
``holdfast.testing`` runs against every one. Thread safety: every method may be called from any
thread; calls that reach the function are serialised by the backend. Every method raises
:class:`~holdfast.errors.DeviceGone` once the function is gone, and
:class:`~holdfast.errors.RemoteError` when it answers with an error number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from holdfast.dma.slab import SlabSource
from holdfast.values import (
    DoorbellInfo,
    Handover,
    Iova,
    IrqIndex,
    IrqInfo,
    Perm,
    Promises,
    Region,
)

__all__ = [
    "DmaContext",
    "Doorbell",
    "FileWindow",
    "FunctionBackend",
    "Handover",
    "HostMemory",
    "MemoryWindow",
    "RegionMap",
]


class HostMemory(Protocol):
    """Memory that a function reaches by message because no descriptor was passed for it.

    Offsets are bytes from the start of the mapped window. Called from the backend's own thread;
    must not call back into the backend. Raise ``OSError`` to fail the access: the function then
    sees a DMA error and nothing was written.
    """

    def read(self, offset: int, count: int) -> bytes: ...

    def write(self, offset: int, data: memoryview) -> None: ...


MemoryWindow: TypeAlias = tuple[Iova, int, Perm, HostMemory]
"""A window that :meth:`FunctionBackend.dma_map_memory` made, by its arguments."""

FileWindow: TypeAlias = tuple[Iova, int, Perm, int, int]
"""A window that :meth:`FunctionBackend.dma_map` made, by its arguments: a descriptor, an offset."""


@dataclass(frozen=True, slots=True)
class Doorbell:
    """A doorbell register together with the eventfd that rings it. The holder owns ``fd``."""

    info: DoorbellInfo
    fd: int


@dataclass(frozen=True, slots=True)
class RegionMap:
    """What to map to reach a region's ``areas`` directly. The backend owns ``fd``."""

    fd: int
    region: Region


@dataclass(frozen=True, slots=True)
class DmaContext:
    """The kernel's I/O address space, for a process that pins its own memory on it.

    ``kind`` is "type1" (``fd`` is a VFIO container) or "iommufd" (``fd`` with address space
    ``ioas``). The backend owns ``fd``; whoever it is passed to can map and unmap anything there.
    """

    kind: str
    fd: int
    ioas: int = 0


class FunctionBackend(Protocol):
    """One PCI function."""

    @property
    def promises(self) -> Promises: ...

    @property
    def isolation(self) -> str:
        """The unit that can only be isolated whole, such as an IOMMU group.

        Backends of one process with the same name share one I/O address space.
        """
        ...

    @property
    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """First and last address of each range that can be mapped; empty: any address can."""
        ...

    @property
    def request_fd(self) -> int | None:
        """An eventfd that becomes readable when the system wants the function back, or None.

        The backend owns it.
        """
        ...

    def dma_context(self) -> DmaContext | None:
        """Where a client can pin its own memory in place, or None where it cannot."""
        ...

    def memory(self) -> SlabSource | None:
        """Where there is no translation: memory whose bus addresses are known. Else None."""
        ...

    @property
    def regions(self) -> Sequence[Region]:
        """All regions, by index; unimplemented ones have size 0."""
        ...

    @property
    def irqs(self) -> Sequence[IrqInfo]:
        """All interrupt types, by :class:`~holdfast.values.IrqIndex`."""
        ...

    @property
    def on_gone(self) -> Callable[[], None] | None:
        """Called once, from any thread, when the function goes away. Settable."""
        ...

    @on_gone.setter
    def on_gone(self, callback: Callable[[], None] | None) -> None: ...

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Read ``count`` bytes. One access as the function sees it, if count is 1, 2, 4 or 8."""
        ...

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write ``data``; returns after the function has taken the write."""
        ...

    def region_read_multi(self, reads: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Reads of up to 8 bytes each as ``(index, offset, count)``, in order."""
        ...

    def region_write_multi(self, writes: Sequence[tuple[int, int, bytes]]) -> None:
        """Writes of up to 8 bytes each as ``(index, offset, data)``, in order."""
        ...

    def region_map(self, index: int) -> RegionMap | None:
        """The descriptor behind the mappable areas, or None."""
        ...

    def doorbells(self, index: int) -> Sequence[Doorbell]:
        """Fresh eventfds for the doorbell registers of a region (possibly none).

        The caller owns the descriptors. A function may stop listening to doorbells handed out
        earlier (it does when the engine behind one is stopped), so ask again for each lease.
        """
        ...

    def set_irqs(self, index: IrqIndex, start: int, eventfds: Sequence[int]) -> None:
        """Wire vectors ``start``... to eventfds, replacing earlier ones. Empty: disable."""
        ...

    def unmask_intx(self) -> None:
        """Let INTx be raised again: it masks itself when it is signalled."""
        ...

    def dma_map(self, iova: Iova, size: int, perm: Perm, fd: int, offset: int) -> None:
        """Let the function reach ``size`` bytes of file ``fd`` at ``offset`` through ``iova``.

        The backend keeps no duplicate of ``fd``. On error nothing is mapped.
        """
        ...

    def dma_map_memory(self, iova: Iova, size: int, perm: Perm, memory: HostMemory) -> None:
        """Let the function reach ``memory`` by message (relayed)."""
        ...

    def dma_unmap(self, iova: Iova, size: int) -> int:
        """Take a mapping away. Returns the bytes really unmapped: the caller must compare."""
        ...

    def dma_unmap_all(self) -> None:
        """Take every mapping away, known or not. Raises if one may be left."""
        ...

    def hand_over(self) -> Handover | None:
        """What ``backends.resume`` needs in another process to go on after this one was killed.

        None if the function cannot be handed over. The descriptors stay the backend's and do not
        change while it is open, so that duplicates taken once are enough; what does change is in
        memory that they share.
        """
        ...

    def reset(self) -> None:
        """Function-level reset; returns when acknowledged. Says nothing about DMA by itself."""
        ...

    def close(self) -> None:
        """Let go of the function. Idempotent."""
        ...
