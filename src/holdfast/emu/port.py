# SPDX-License-Identifier: Apache-2.0
"""What a host (the vfio-user server, or a test) gives to an emulated function, and back.

The function never sees a socket; the host never sees a register. Two protocols meet here:

* :class:`Host` is what the function may call: DMA and interrupts.
* :class:`Guest` is what the host calls on the function. ``holdfast.emu.Function`` fulfils it.

Threads: the host calls region and configuration hooks from its socket thread and :meth:`Guest.work`
from one engine thread. DMA is only ever done from ``work``: message DMA inside a region handler
would deadlock a client that waits for the region reply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from holdfast.contracts import Doorbell
from holdfast.values import IrqIndex, Region

Bytes = npt.NDArray[np.uint8]
U64s = npt.NDArray[np.uint64]


class DmaPort(Protocol):
    """The function's bus-master port. Only from the engine thread.

    Every method checks the whole access against the mapped windows and their permissions first.
    An access outside raises :class:`~holdfast.errors.DmaFault` and is not carried out (an access
    that crosses windows is checked in full before the first byte moves).
    """

    def read(self, iova: int, into: Bytes) -> None:
        """Copy host memory at ``iova`` into ``into`` (contiguous, uint8)."""
        ...

    def write(self, iova: int, data: Bytes) -> None:
        """Copy ``data`` (contiguous, uint8) to host memory at ``iova``."""
        ...

    def read_many(self, iovas: U64s, local: Bytes, offsets: U64s, lengths: U64s) -> int:
        """Gather: for each i copy ``lengths[i]`` bytes from ``iovas[i]`` to ``local[offsets[i]:]``.

        Vectorised. Returns how many leading entries were carried out; fewer than all means that
        the next one faults (counted once).
        """
        ...

    def write_many(self, iovas: U64s, local: Bytes, offsets: U64s, lengths: U64s) -> int:
        """Scatter: the opposite direction of :meth:`read_many`."""
        ...

    @property
    def faults(self) -> int:
        """DMA faults so far: accesses that were refused, never carried out."""
        ...


class Host(Protocol):
    """What the function may use while attached."""

    @property
    def dma(self) -> DmaPort: ...

    def signal(self, index: IrqIndex, vector: int) -> None:
        """Raise one interrupt vector (write its eventfd; dropped if none is connected)."""
        ...

    def wired(self, index: IrqIndex) -> bool:
        """True if the client has connected an eventfd to any vector of this interrupt type."""
        ...

    def rewire(self) -> None:
        """The set of doorbell eventfds has changed; the host asks :meth:`Guest.doorbells` anew."""
        ...

    def wake(self) -> None:
        """Make the engine thread call ``work`` again soon. Callable from any thread."""
        ...


@dataclass(frozen=True, slots=True)
class RegionDecl:
    """A region as the function declares it; ``fd`` backs the mappable areas (else None)."""

    region: Region
    fd: int | None = None


class Guest(Protocol):
    """What the host calls. Handlers raise ``OSError`` to answer with an error number."""

    @property
    def has_reset(self) -> bool:
        """True if the function has a function-level reset; told to clients."""
        ...

    def attach(self, host: Host) -> None:
        """A client connected and may map memory."""
        ...

    def detach(self) -> None:
        """The client is gone, and its memory. Device state stays; doorbells are new."""
        ...

    def regions(self) -> Sequence[RegionDecl]:
        """Nine regions, by VFIO index."""
        ...

    def irq_counts(self) -> Sequence[int]:
        """Five vector counts, by VFIO interrupt index."""
        ...

    def region_read(self, index: int, offset: int, count: int) -> bytes: ...

    def region_write(self, index: int, offset: int, data: bytes) -> None: ...

    def doorbells(self, index: int) -> Sequence[Doorbell]:
        """Doorbell registers of a region with the eventfds in force (the function owns them)."""
        ...

    def rung(self, fd: int, take: Callable[[], int]) -> None:
        """The eventfd ``fd`` of a doorbell was rung. Socket thread.

        ``take`` drains it and returns its count (possibly 0). Call it under the lock that the
        engine thread publishes with, so that taking a ring and acting on it are one step.
        """
        ...

    def intx_asserted(self) -> bool:
        """Level of the INTx line; asked when the client unmasks it."""
        ...

    def reset(self) -> None:
        """DEVICE_RESET. Raise OSError to refuse."""
        ...

    def work(self) -> float | None:
        """Do one bounded step of engine work (engine thread).

        Returns the seconds to wait before the next step (0: at once), or None to wait for
        :meth:`Host.wake`.
        """
        ...
