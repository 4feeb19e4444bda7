# SPDX-License-Identifier: Apache-2.0
"""Frames of one large file, recycled last in, first out, as hugepage pools do.

Facts. Without an IOMMU a card reaches all memory, and a frame that was freed too early is soon
somebody else's: hugetlb puts a freed page at the head of its list and hands it out next
(mm/hugetlb.c, ``enqueue_hugetlb_folio``).

Choice. This pool does the same on purpose. It makes a premature release visible at once instead of
once a month. The stack of free frames is a NumPy array, so that a gigabyte of 4 KiB frames costs
milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from holdfast.errors import OutOfMemory, UsageError

Frames = npt.NDArray[np.int64]


class FramePool:
    """``frames`` frames of ``frame_size`` bytes. Extents are ``(offset, size)`` in bytes.

    Not thread-safe.
    """

    def __init__(self, frames: int, frame_size: int) -> None:
        if frames < 1 or frame_size < 1:
            raise UsageError(f"{frames} frames of {frame_size} bytes", operation="make frame pool")
        self.frame_size = frame_size
        # The top of the stack is its end: frame 0 comes first.
        self._stack: Frames = np.arange(frames - 1, -1, -1, dtype=np.int64)
        self._free = frames
        self._taken = np.zeros(frames, np.bool_)
        self._claiming = True

    @property
    def free_bytes(self) -> int:
        """Bytes that :meth:`take` can still give out."""
        return self._free * self.frame_size

    @property
    def size(self) -> int:
        """Bytes in all frames, free or not."""
        return len(self._taken) * self.frame_size

    def claim(self, extents: Sequence[tuple[int, int]]) -> None:
        """Count extents as taken: a predecessor had given them out. First of all.

        UsageError with nothing changed after a :meth:`take` or :meth:`give_back`, or if a frame is
        taken already, named twice, or not there.
        """
        frames = self._frames(extents)
        twice = len(np.unique(frames)) != len(frames)
        if not self._claiming or twice or self._taken[frames].any():
            raise UsageError("frames that are taken", operation="claim frames")
        self._taken[frames] = True
        self._free -= len(frames)

    def _settle(self) -> None:
        """Nothing is claimed any more: what is left makes the stack."""
        if self._claiming and self._free < len(self._taken):
            free = np.flatnonzero(~self._taken)[::-1]
            self._stack[: len(free)] = free
        self._claiming = False

    def take(self, nbytes: int) -> list[tuple[int, int]]:
        """Whole frames for ``nbytes`` bytes, those freed last first, adjacent ones in one extent.

        Raises OutOfMemory with nothing taken.
        """
        if nbytes < 1:
            raise UsageError(f"{nbytes} bytes", operation="take frames")
        self._settle()
        count = -(-nbytes // self.frame_size)
        if count > self._free:
            raise OutOfMemory(
                f"{nbytes} bytes asked for, {self.free_bytes} of {self.size} are free",
                operation="take frames",
                hint="free buffers; memory of dead leases returns once the function is quiet",
            )
        frames = self._stack[self._free - count : self._free][::-1]
        self._free -= count
        self._taken[frames] = True
        return self._extents(frames)

    def give_back(self, extents: Sequence[tuple[int, int]]) -> None:
        """Free extents; the next :meth:`take` gets them back in the same order.

        Any cut of what was taken will do. UsageError with nothing freed if a frame is not taken
        (double free), named twice, or if an extent is not made of whole frames.
        """
        self._settle()
        frames = self._frames(extents)
        if not self._taken[frames].all():
            raise UsageError("frames that are not taken", operation="give frames back")
        self._taken[frames] = False
        if np.count_nonzero(self._taken) != len(self._taken) - self._free - len(frames):
            self._taken[frames] = True
            raise UsageError("a frame is named twice", operation="give frames back")
        self._stack[self._free : self._free + len(frames)] = frames[::-1]
        self._free += len(frames)

    def _extents(self, frames: Frames) -> list[tuple[int, int]]:
        breaks = np.flatnonzero(np.diff(frames) != 1) + 1
        starts = np.concatenate((np.zeros(1, np.int64), breaks))
        counts = np.diff(starts, append=len(frames))
        offsets = (frames[starts] * self.frame_size).tolist()
        sizes = (counts * self.frame_size).tolist()
        return list(zip(offsets, sizes, strict=True))

    def _frames(self, extents: Sequence[tuple[int, int]]) -> Frames:
        pairs = np.asarray(extents, np.int64).reshape(-1, 2)
        offsets, sizes = pairs[:, 0], pairs[:, 1]
        whole = (pairs % self.frame_size == 0).all()
        inside = ((offsets >= 0) & (sizes > 0) & (sizes <= self.size - offsets)).all()
        if not (whole and inside) or sizes.sum() > self.size:
            raise UsageError("extents are not whole frames of this pool", operation="give back")
        counts = sizes // self.frame_size
        first = np.repeat(offsets // self.frame_size - (np.cumsum(counts) - counts), counts)
        found: Frames = first + np.arange(len(first))
        return found
