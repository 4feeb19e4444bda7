# SPDX-License-Identifier: Apache-2.0
"""Buffers: DMA memory as NumPy arrays that cannot be pulled away from under anybody.

Facts. A user frees a buffer, or forgets it, while a slice of its array sits in a data frame, a
memoryview in a queue, or the card still writes into it. Garbage may be collected in any thread, in
the middle of any other statement, also while that thread is in this module.

Consequence. Bytes may go to the next buffer only when the last view *and* the last transfer are
gone, and what notices that must not wait for a lock.

Choice. Each buffer's memory is one :class:`~holdfast.kernel.mapping.Span`, which the ``base`` chain
of every view ends in. The buffer refers to it until ``free()``, a transfer in flight through what
``hold()`` returned: there is nothing to count. When nobody does, the span's finalizer puts the
offset on a queue, and takes it back into the pool if the pool is not busy at that moment; else the
next ``alloc`` does.

Cost. Reference cycles delay the return until the collector runs. Every ``alloc`` zero-fills what
was used before, so that a buffer looks the same on first and on second use; this is for the user's
sake, because slabs never change leases and what lies in them was the lease's own.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from holdfast import steps
from holdfast.dma.pool import Pool
from holdfast.dma.sg import SgList
from holdfast.errors import BadBuffer, Closed, ProtocolError
from holdfast.kernel.mapping import PAGE, Mapping, Span
from holdfast.values import Iova

_CACHE_LINE: Final = 64


class SlabView:
    """A slab as its client sees it: mapped in one piece, and cut into buffers. Thread-safe.

    ``number`` names it to the keeper; ``size`` in bytes; ``sg`` is where the function sees it.
    """

    def __init__(self, number: int, mapping: Mapping, sg: SgList) -> None:
        """Take over ``mapping``; ``sg`` covers it from its first to its last byte.

        Raises ProtocolError if the sizes differ: then the mapping stays the caller's.
        """
        if sg.nbytes != mapping.size:
            raise ProtocolError(
                f"{mapping.size} bytes are mapped and {sg.nbytes} have addresses",
                operation="map slab",
                target=f"slab {number}",
            )
        self.number = number
        self.size = mapping.size
        self.sg = sg
        self._mapping = mapping
        self._lock = threading.Lock()
        self._pool = Pool(mapping.size, align=_CACHE_LINE)
        self._returned: deque[int] = deque()
        self._used_to = 0
        """No byte from this offset on was ever handed out: it still reads as zero."""

    @property
    def unused(self) -> bool:
        """True if no buffer, view or transfer uses any of it."""
        with self._lock:
            self._settle()
            return not self._pool.in_use

    @property
    def free_bytes(self) -> int:
        """Bytes in no buffer; not necessarily in one piece."""
        with self._lock:
            self._settle()
            return self._pool.size - self._pool.in_use

    def alloc(
        self, shape: int | tuple[int, ...], dtype: npt.DTypeLike, *, align: int = _CACHE_LINE
    ) -> Buffer | None:
        """A zero-filled buffer, or None if no free piece is large enough.

        ``align`` in bytes, a power of two up to 4096. Raises BadBuffer for a shape that holds
        nothing, or Python objects; Closed after :meth:`close`.
        """
        kind = np.dtype(dtype)
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = math.prod(dims) * kind.itemsize
        if nbytes < 1 or any(dim < 0 for dim in dims) or kind.hasobject:
            raise BadBuffer(f"shape {dims} of {kind}", operation="alloc", target=str(self))
        if not 0 < align <= PAGE or align & (align - 1):
            raise BadBuffer(
                f"alignment {align} is no power of two up to {PAGE}",
                operation="alloc",
                target=str(self),
            )
        whole = self._mapping.array
        with self._lock:
            self._settle()
            offset = self._pool.take(nbytes, align)
            if offset is None:
                return None
            used_to = self._used_to
            self._used_to = max(used_to, offset + nbytes)
        span = Span(self._mapping.address + offset, nbytes, keep=whole)
        weakref.finalize(span, self._come_back, offset).atexit = False
        data = np.asarray(span)
        data[: max(used_to - offset, 0)] = 0
        steps.reach("client.alloc.cut")
        return Buffer(self, offset, np.ndarray(dims, kind, buffer=data))

    def _come_back(self, offset: int) -> None:
        """Nobody can touch the buffer at ``offset`` any more. From a finalizer: never waits."""
        self._returned.append(offset)
        steps.reach("client.freed")
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Give what came back to the pool. Under the lock."""
        while self._returned:
            self._pool.give_back(self._returned.popleft())

    def detach(self) -> None:
        """The lease is about to end: what buffers and views show becomes this process's own.

        The keeper gives the memory itself to others, or back to the system, once the function is
        quiet; a view must neither see that nor write into it.
        """
        if not self.unused:
            self._mapping.detach()

    def close(self) -> None:
        """Let the mapping go; buffers and views keep it until they are gone. Idempotent.

        Takes no lock, so it may be called in a forked child.
        """
        self._mapping.close()

    def __str__(self) -> str:
        return f"slab {self.number}"


class Buffer:
    """DMA memory as an array; a context manager. Made by ``Device.alloc``.

    ``nbytes`` in bytes. After ``free()``, and after the ``with`` block, it is no good for new
    transfers, and every property but ``nbytes`` raises Closed. Its bytes return to the lease only
    when the last view of the array is gone *and* no transfer uses them; so do those of a buffer
    that was dropped. Thread-safe.
    """

    __slots__ = (
        "__weakref__",
        "_array",
        "_offset",
        "_sg",
        "_slab",
        "nbytes",
    )

    def __init__(self, slab: SlabView, offset: int, array: npt.NDArray[Any]) -> None:
        self._slab = slab
        self._offset = offset
        self.nbytes: int = array.nbytes
        self._array: npt.NDArray[Any] | None = array
        self._sg: SgList | None = None

    @property
    def array(self) -> npt.NDArray[Any]:
        """The memory itself, in the shape and dtype asked for. Views of it keep it."""
        array = self._array
        if array is None:
            raise self._closed_error()
        return array

    @property
    def iova(self) -> Iova:
        """Where the function sees the first byte; only :attr:`sg` tells about the rest."""
        return Iova(int(self.sg.iovas[0]))

    @property
    def sg(self) -> SgList:
        """Where the function sees the memory, in order."""
        self.require_open()
        if self._sg is None:
            self._sg = self._slab.sg.slice(self._offset, self.nbytes)
        return self._sg

    @property
    def place(self) -> tuple[int, int]:
        """Number of the slab it lies in, and its offset there in bytes."""
        self.require_open()
        return self._slab.number, self._offset

    @property
    def closed(self) -> bool:
        return self._array is None

    def require_open(self) -> None:
        """Raise Closed if the buffer was freed."""
        if self._array is None:
            raise self._closed_error()

    def hold(self) -> object:
        """A transfer begins to use the memory: it must keep what this returns until it is done."""
        array = self._array
        if array is None:
            raise self._closed_error()
        return array

    def release(self) -> None:
        """A transfer is done with the memory; letting go of what it kept was all there is to do."""

    def free(self) -> None:
        """No new transfers; the bytes return once no view and no transfer uses them. Idempotent."""
        steps.reach("client.free")
        self._array = None

    def _closed_error(self) -> Closed:
        return Closed("the buffer was freed", operation="use buffer", target=str(self._slab))

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """The memory for NumPy functions, without a copy unless one is asked for or needed."""
        array = self.array
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"{array.dtype} cannot be seen as {np.dtype(dtype)} uncopied")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __len__(self) -> int:
        """Length of the first dimension."""
        return len(self.array)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.free()

    def __repr__(self) -> str:
        array = self._array
        if array is None:
            return f"<holdfast.Buffer of {self.nbytes} bytes, freed>"
        return f"<holdfast.Buffer {array.shape} {array.dtype} at {int(self.iova):#x}>"
