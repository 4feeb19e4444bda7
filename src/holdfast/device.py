# SPDX-License-Identifier: Apache-2.0
"""What users hold: an open function.

``holdfast.open`` returns a :class:`Device`. It owns one lease: BAR mappings, interrupts, memory.
Leaving the ``with`` block, ``close()``, an exception and interpreter exit all give it back; if the
process is killed, the keeper does. Thread-safe, except that ``close`` must not race with use.

After ``fork`` the child cannot use the device: every operation raises
:class:`~holdfast.errors.Closed`, and its copies of the descriptors are closed, so that it can
neither post nor keep the lease alive.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from holdfast import steps
from holdfast.bar import Bar, Bell, Config
from holdfast.dma.buffer import Buffer, SlabView
from holdfast.dma.pin import Pin, flat_bytes
from holdfast.driver import ControlMemory, Driver, Engine
from holdfast.errors import BadBuffer, Closed, HoldfastError
from holdfast.interrupt import Interrupt
from holdfast.values import Access, Iova, Target

SMALLEST_SLAB = 256 << 10
LARGEST_SHARED_SLAB = 8 << 20
"""Buffers share slabs of up to this many bytes; larger buffers get a slab of their own."""


class LeasePort(Protocol):
    """The client's end of a lease: requests to the keeper. See ``keeper/client.py``."""

    number: int
    access: Access
    channels: tuple[int, ...]
    granted: int
    """The generation in which the channels were started last."""

    @property
    def grant(self) -> Mapping[str, Any]:
        """What the driver's keeper half told its client half."""
        ...

    def take_slab(self, nbytes: int) -> SlabView: ...

    def give_slab(self, slab: SlabView) -> None: ...

    def pin(self, data: npt.NDArray[np.uint8], *, writable: bool) -> tuple[int, int, str]:
        """Number, IOVA, and how: see ``Pin.how``."""
        ...

    def unpin(self, pin: int, *, later: object | None) -> None:
        """Take a pin away: now, or with the next request, keeping ``later`` alive until then."""
        ...

    def command(self, name: str, args: dict[str, Any]) -> Any: ...

    def reset(self) -> None: ...

    def regrant(self) -> list[tuple[int, Bell]]: ...

    def generation(self) -> int:
        """How often the function was reset under this lease; takes waiting notices first."""
        ...

    def close(self) -> None: ...


class Watcher(Protocol):
    """What looks whether the device must be let go of. See ``keeper/watch.py``."""

    def close(self) -> None: ...

    def orphan(self) -> None: ...


class Device:
    """An open PCI function.

    ``bars[i]`` BAR i (present ones only) · ``config`` configuration space · ``irqs[i]`` the i-th
    interrupt vector of this lease · ``dma`` the driver's client half · ``lease`` its lease.
    """

    def __init__(
        self,
        target: Target,
        lease: LeasePort,
        *,
        driver: type[Driver],
        bars: dict[int, Bar],
        config: Config,
        irqs: dict[int, Interrupt],
        bells: list[tuple[int, Bell]],
        control: ControlMemory | None,
        engine: Callable[[Device], Engine] | None = None,
    ) -> None:
        self.target = target
        self.lease = lease
        self.bars = bars
        self.config = config
        self.irqs = irqs
        self.control = control
        self.driver = driver.name
        self._bells = bells
        self._slabs: list[SlabView] = []
        self._lock = threading.RLock()
        self._closed = False
        self._why: HoldfastError | None = None
        self.watch: Watcher | None = None
        self.dma: Any = (engine or driver.engine or Engine)(self)

    # -- memory ------------------------------------------------------------

    def alloc(
        self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.uint8, *, align: int = 64
    ) -> Buffer:
        """DMA memory as a zero-filled array, kept by the keeper until the function is quiet.

        ``shape`` in elements of ``dtype``; ``align`` in bytes (a power of two, at most 4096). The
        buffer is the caller's; ``free()`` or dropping it gives the bytes back to the lease once no
        view and no transfer uses them. Raises QuotaExceeded, OutOfMemory or IovaExhausted with
        nothing changed.
        """
        self._check("alloc")
        kind = np.dtype(dtype)
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = math.prod(dims) * kind.itemsize
        if nbytes <= 0 or any(dim < 0 for dim in dims) or kind.hasobject:
            raise BadBuffer(
                f"shape {dims} of {kind} is no memory that a function can write",
                operation="alloc",
                target=str(self.target),
            )
        with self._lock:
            for slab in self._slabs:
                if (buffer := slab.alloc(dims, kind, align=align)) is not None:
                    return buffer
            steps.reach("client.alloc")
            slab = self.lease.take_slab(max(nbytes, self._next_slab()))
            steps.reach("client.alloc.mapped")
            self._slabs.append(slab)
            buffer = slab.alloc(dims, kind, align=align)
            if buffer is None:
                raise BadBuffer(
                    f"alignment {align} cannot be had", operation="alloc", target=str(self.target)
                )
            return buffer

    def _next_slab(self) -> int:
        held = sum(slab.size for slab in self._slabs)
        return min(max(SMALLEST_SLAB, held), LARGEST_SHARED_SLAB)

    def trim(self) -> int:
        """Give slabs without buffers back to the keeper; returns the bytes given back.

        Raises Busy if transfers of this lease are in flight.
        """
        self._check("trim")
        given: int = 0
        with self._lock:
            for slab in [slab for slab in self._slabs if slab.unused]:
                steps.reach("client.trim")
                self.lease.give_slab(slab)
                self._slabs.remove(slab)
                given += slab.size
        return given

    def pin(self, obj: Any) -> Pin:
        """Make the caller's own memory reachable: anything with a buffer, at any alignment.

        Read-only memory can be a source only. The pin keeps ``obj`` alive. ``Pin.how`` says what
        keeps the memory safe.
        """
        self._check("pin")
        data, writable = flat_bytes(obj, target=str(self.target))
        if self.lease.access is Access.MEDIATED:
            return Pin(obj, data, Iova(0), writable, "bounced", lambda _: None)
        steps.reach("client.pin")
        number, iova, how = self.lease.pin(data, writable=writable)
        steps.reach("client.pinned")

        def undo(later: object | None) -> None:
            self.lease.unpin(number, later=later)

        return Pin(obj, data, Iova(iova), writable, how, undo)

    # -- the function ------------------------------------------------------------

    def command(self, name: str, **kw: Any) -> Any:
        """Call a command of the driver's keeper half."""
        self._check("command")
        return self.lease.command(name, kw)

    def reset(self) -> None:
        """Function-level reset. Transfers in flight end with DeviceReset; other leases are told."""
        self._check("reset")
        self.lease.reset()
        self.regrant()

    def regrant(self, *, only_if: Callable[[], bool] = lambda: True) -> None:
        """Start this lease's channels anew: fresh rings and doorbells. In-flight work is lost.

        ``only_if`` is asked once no other thread does the same: it may have been done by then.
        """
        with self._lock:
            if not only_if():
                return
            fresh = self.lease.regrant()
            old, self._bells = self._bells, fresh
            try:
                self.dma.regranted()
            finally:
                # Only now, when no queue has them any more: a number that is closed under a thread
                # about to ring it may be somebody else's descriptor by then.
                for _, bell in old:
                    bell.close()

    def bell(self, bar: int, offset: int) -> Bell | None:
        """The doorbell of this lease at a register, or None if the register must be stored to."""
        for index, bell in self._bells:
            if (index, bell.offset) == (bar, offset):
                return bell
        return None

    def generation(self) -> int:
        """How often this lease's channels were lost to a reset."""
        return self.lease.generation()

    def granted(self) -> int:
        """The generation in which they were started last."""
        return self.lease.granted

    # -- the end ------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Give the lease back. Idempotent.

        What is in flight is treated by the keeper's policy; its memory stays until it is quiet.
        Arrays that still exist keep their contents as private memory of this process, which no
        function can reach.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        steps.reach("client.closing")
        if self.watch is not None:
            self.watch.close()
        try:
            self.dma.close()
            for slab in self._slabs:
                slab.detach()
        finally:
            self._let_go()
            steps.reach("client.unmapped")
            self.lease.close()

    def evict(self, why: HoldfastError) -> None:
        """The system wants the function back, or the keeper is gone: let go of it now.

        Like :meth:`close`, but what is used later raises ``why``. Called from any thread.
        """
        self._why = self._why or why
        self.close()

    def _let_go(self, *, forked: bool = False) -> None:
        """Unmap windows and close descriptors: after this nothing here can post."""
        for _, bell in self._bells:
            bell.close()
        self._bells.clear()
        for bar in [*self.bars.values(), self.config]:
            bar.close(forked=forked, why=self._why)
        for irq in self.irqs.values():
            irq.close()
        for slab in self._slabs:
            slab.close()
        self._slabs.clear()
        self.control = None

    def orphan(self) -> None:
        """In a forked child: close every descriptor, leave the keeper alone."""
        self._closed = True
        self._lock = threading.RLock()
        if self.watch is not None:
            self.watch.orphan()
        self._let_go(forked=True)

    def _check(self, operation: str) -> None:
        if self._closed:
            raise self._why or Closed(
                "the device is closed", operation=operation, target=str(self.target)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"lease {self.lease.number}"
        return f"<holdfast.Device {self.target} ({self.driver}, {state})>"


__all__ = ["Device", "LeasePort"]
