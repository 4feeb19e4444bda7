# SPDX-License-Identifier: Apache-2.0
"""Where the keeper's DMA memory comes from: files of its own, or frames of one arena.

Memory crosses from one lease to the next only through the kernel: it is punched before it is
recycled, so whatever the next lease finds there is zero. :class:`OwnFiles` gives every slab a file
that belongs to one lease for ever. :class:`Arena` is one file that stands for all of RAM on a
machine without an IOMMU: the function has it mapped whole, and frames go from lease to lease.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self

from holdfast.dma.arena import FramePool
from holdfast.errors import BadBuffer, Closed, UsageError
from holdfast.kernel import memfd
from holdfast.kernel.failure import failure
from holdfast.kernel.handover import Incoming
from holdfast.values import Handover

FRAME: Final = 4096


@dataclass(slots=True, eq=False)
class SlabMemory:
    """Memory of one slab: ``(offset, size)`` extents of file ``fd``, in order, in bytes.

    The source owns ``fd``. ``addresses`` says where the function sees the extents, if they are at
    fixed bus addresses and need no map. ``punched`` says that nobody's data is left in it.
    """

    fd: int
    extents: list[tuple[int, int]]
    addresses: list[int] | None = None
    punched: bool = False

    @property
    def size(self) -> int:
        return sum(size for _, size in self.extents)


class SlabSource(Protocol):
    """Gives memory out and takes it back. Thread-safe.

    Nothing is taken back that the function could still reach: that is the caller's to prove.
    """

    @property
    def granule(self) -> int:
        """Sizes of slabs are multiples of this many bytes."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes given out and not yet recycled."""
        ...

    def leftovers(self) -> list[SlabMemory]:
        """Memory that a keeper which is dead had given out, and the function may still reach.

        It counts as given out here. Empty where memory ends with its keeper.
        """
        ...

    def take(self, size: int) -> SlabMemory:
        """At least ``size`` zeroed bytes. Raises OutOfMemory with nothing taken."""
        ...

    def punch(self, memory: SlabMemory) -> None:
        """Give the pages back to the kernel; the slab stays taken. Slow: 0.2 s per GiB."""
        ...

    def recycle(self, memory: SlabMemory) -> None:
        """Make it available again, punched first unless it is already. UsageError the second
        time."""
        ...

    def describe(self, memory: SlabMemory) -> Handover:
        """What :meth:`adopt` needs in a successor. The descriptors stay the source's.

        UsageError for memory that is not given out.
        """
        ...

    def adopt(self, handover: Handover) -> SlabMemory:
        """Memory that a predecessor had given out: given out here, from now on.

        Before the first :meth:`take` and :meth:`leftovers`. Takes ownership of ``handover.fds``,
        also on error. What a predecessor gave out and nobody adopts is free here, or among the
        leftovers. ProtocolError if it was not described by a source like this one, BadBuffer or
        UsageError if it cannot be what it says.
        """
        ...

    def close(self) -> None:
        """Close every file. What clients have mapped stays theirs until they unmap. Idempotent."""
        ...


class _Books:
    """What is given out, and whether the source is still open. Only under ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.closed = False
        self.held_bytes = 0
        self._given: dict[int, SlabMemory] = {}

    def require_open(self) -> None:
        if self.closed:
            raise Closed("the source of memory is closed", operation="take slab")

    def give(self, memory: SlabMemory) -> SlabMemory:
        self._given[id(memory)] = memory
        self.held_bytes += memory.size
        return memory

    def require(self, memory: SlabMemory, operation: str) -> None:
        if self._given.get(id(memory)) is not memory:
            raise UsageError("memory that is not given out", operation=operation)

    def drop(self, memory: SlabMemory) -> None:
        self.require(memory, "recycle slab")
        del self._given[id(memory)]
        self.held_bytes -= memory.size

    def punch(self, memory: SlabMemory) -> None:
        """Punch without the lock, on a duplicate: a close in the meantime must not leave us with
        a number that another file has by then."""
        with self.lock:
            self.require(memory, "punch slab")
            try:
                fd = os.dup(memory.fd)
            except OSError as error:
                raise failure(error, "punch slab") from error
        try:
            for offset, size in memory.extents:
                memfd.punch(fd, offset, size)
        finally:
            os.close(fd)
        memory.punched = True

    def shut(self) -> list[SlabMemory]:
        """Close the books; the files of what was given out are the caller's to close."""
        self.closed = True
        self.held_bytes = 0
        left = list(self._given.values())
        self._given.clear()
        return left


def flat(extents: Sequence[tuple[int, int]]) -> list[int]:
    """Extents as a note: offset and size by turns."""
    return [number for extent in extents for number in extent]


def extents_of(found: Incoming) -> list[tuple[int, int]]:
    """The note that :func:`flat` made."""
    numbers = found.numbers("extents")
    if not numbers or len(numbers) % 2:
        raise found.wrong(f"{len(numbers)} numbers are no extents")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


class OwnFiles:
    """A sealed memfd for every slab, never used for another one."""

    granule = FRAME

    def __init__(self) -> None:
        self._books = _Books()

    @property
    def held_bytes(self) -> int:
        with self._books.lock:
            return self._books.held_bytes

    def leftovers(self) -> list[SlabMemory]:
        return []  # a memfd ends with the last process that has it

    def take(self, size: int) -> SlabMemory:
        with self._books.lock:
            self._books.require_open()
            fd = memfd.create("holdfast-slab", size)
            return self._books.give(SlabMemory(fd, [(0, size)]))

    def describe(self, memory: SlabMemory) -> Handover:
        with self._books.lock:
            self._books.require(memory, "describe slab")
            return Handover({"slab": memory.fd}, {"memory": "file", "size": memory.size})

    def adopt(self, handover: Handover) -> SlabMemory:
        with Incoming(handover) as found, self._books.lock:
            self._books.require_open()
            found.require("memory", "file")
            size = found.number("size")
            memfd.require_sealed(found.fd("slab"), size)
            return self._books.give(SlabMemory(found.take("slab"), [(0, size)]))

    def punch(self, memory: SlabMemory) -> None:
        self._books.punch(memory)

    def recycle(self, memory: SlabMemory) -> None:
        # Closing is not enough: a descriptor or mapping elsewhere could keep the pages.
        if not memory.punched:
            self.punch(memory)
        with self._books.lock:
            self._books.drop(memory)
            os.close(memory.fd)

    def close(self) -> None:
        with self._books.lock:
            for memory in self._books.shut():
                os.close(memory.fd)


class Arena:
    """One sealed memfd of ``size`` bytes, cut into frames that are recycled last in, first out.

    ``fd`` is mapped whole for the function; a frame at offset x is at the arena's IOVA plus x.
    """

    granule = FRAME

    def __init__(self, size: int, fd: int | None = None) -> None:
        """A new arena, or a predecessor's: takes ownership of ``fd``, also on error.

        All of it is free until it is taken or adopted. BadBuffer for a size that is no whole frames
        or not the file's.
        """
        try:
            if size < FRAME or size % FRAME:
                raise BadBuffer(
                    f"{size} bytes are no whole frames of {FRAME}", operation="make arena"
                )
            if fd is not None:
                memfd.require_sealed(fd, size)
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise
        self.size = size
        self._frames = FramePool(size // FRAME, FRAME)
        self._books = _Books()
        self.fd = memfd.create("holdfast-arena", size) if fd is None else fd

    @classmethod
    def resume(cls, fd: int, size: int) -> Self:
        """Go on with a predecessor's arena. Takes ownership of ``fd``, also on error.

        The function has it mapped still. Frames that are not adopted are free: a predecessor had
        punched them, or had not told anybody of them.
        """
        return cls(size, fd)

    @property
    def held_bytes(self) -> int:
        with self._books.lock:
            return self._books.held_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that can still be given out."""
        with self._books.lock:
            return self._frames.free_bytes

    def leftovers(self) -> list[SlabMemory]:
        return []  # nor does an arena outlive its keeper

    def take(self, size: int) -> SlabMemory:
        with self._books.lock:
            self._books.require_open()
            return self._books.give(SlabMemory(self.fd, self._frames.take(size)))

    def describe(self, memory: SlabMemory) -> Handover:
        with self._books.lock:
            self._books.require(memory, "describe slab")
            return Handover({}, {"memory": "arena", "extents": flat(memory.extents)})

    def adopt(self, handover: Handover) -> SlabMemory:
        with Incoming(handover) as found, self._books.lock:
            self._books.require_open()
            found.require("memory", "arena")
            extents = extents_of(found)
            self._frames.claim(extents)
            return self._books.give(SlabMemory(self.fd, extents))

    def punch(self, memory: SlabMemory) -> None:
        self._books.punch(memory)

    def recycle(self, memory: SlabMemory) -> None:
        if not memory.punched:
            self.punch(memory)
        with self._books.lock:
            self._books.drop(memory)
            self._frames.give_back(memory.extents)

    def close(self) -> None:
        with self._books.lock:
            if not self._books.closed:
                self._books.shut()
                os.close(self.fd)
