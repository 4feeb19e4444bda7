# SPDX-License-Identifier: Apache-2.0
"""The memory that a story is played in, and its page allocator.

One memfd is all of RAM; frame *f* of the story is a page of it. The replay has the part of the
kernel that gives pages out: a count for each frame, kept from what was done to real mappings and
never from what the story says, so that the two can be compared after every step.

Whether bytes belong where they are is decided here, too: a frame that is given out begins a new
*generation*, and rightful in it are the bytes of who got it and of transfers that were posted for
this very generation. Any other byte is foreign.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
from typing import Final

from holdfast.kernel import memfd
from holdfast.kernel.mapping import PAGE
from holdfast.replay.failure import Disagreement
from holdfast.replay.person import Person, mapped_pages

SCRATCH: Final = 1
"""Pages behind the frames, for the replay itself."""


@dataclass(slots=True)
class Frame:
    """One page of the file."""

    count: int = 0
    generation: int = 0
    reserved: bool = False
    """PG_reserved of 2.0: who unmaps it or forks does not count."""
    rightful: set[int] = field(default_factory=set)


class Memory:
    """RAM. Owns the file and the driver's mappings. Not thread-safe."""

    def __init__(self, frames: int) -> None:
        self.fd = memfd.create("holdfast-replay", (frames + SCRATCH) * PAGE)
        self.frames = [Frame() for _ in range(frames)]
        self.keeper: Person | None = None
        """If the driver is a process of its own: which."""
        self.holds: dict[tuple[int, int], mmap.mmap | None] = {}
        """Pages that the driver holds for a process: mapped here or by the keeper (None)."""

    @property
    def scratch(self) -> int:
        """Offset of a page that is no frame."""
        return len(self.frames) * PAGE

    def read(self, f: int) -> bytes:
        return os.pread(self.fd, PAGE, f * PAGE)

    # -- the allocator ------------------------------------------------------------

    def give(self, f: int, pattern: int) -> None:
        """Give a free frame to who fills it with ``pattern``. Disagreement if it is not free."""
        frame = self.frames[f]
        if frame.count:
            raise Disagreement(f"frame {f} is not free: {frame.count} count on it", operation="get")
        frame.count = 1
        frame.generation += 1
        frame.rightful = {pattern}

    def take(self, f: int) -> None:
        """One more counts on it."""
        self.frames[f].count += 1

    def drop(self, f: int) -> None:
        """One fewer. At 0 it can be given to anybody.

        It is wiped then, as by a kernel with ``init_on_free=1``: so that it shows if it is written
        to, whatever was in it before.
        """
        frame = self.frames[f]
        if not frame.count:
            raise Disagreement(f"nobody counts on frame {f}, and one fewer does", operation="drop")
        frame.count -= 1
        if not frame.count:
            os.pwrite(self.fd, bytes(PAGE), f * PAGE)

    def move(self, f: int, g: int) -> None:
        """The contents of a frame will be in another, free one."""
        self.give(g, 0)
        self.frames[g].rightful = set(self.frames[f].rightful)

    # -- the driver's pages ------------------------------------------------------------

    def hold(self, p: int, f: int) -> None:
        """The driver takes a page for a process: it is mapped by the keeper, or here."""
        if self.keeper is not None:
            self.keeper.ask("map", page=f, fill=False)
            self.holds[p, f] = None
        else:
            self.holds[p, f] = mmap.mmap(self.fd, PAGE, offset=f * PAGE)
        self.take(f)

    def unhold(self, p: int, f: int) -> None:
        """It lets it go."""
        page = self.holds.pop((p, f))
        if page is not None:
            page.close()
        elif self.keeper is not None and self.keeper.alive:
            self.keeper.ask("unmap", page=f)
        self.drop(f)

    def lose_keeper(self) -> None:
        """The keeper is killed, and with it goes what it held."""
        if self.keeper is None:
            raise Disagreement("there is no keeper", operation="k_crash")
        self.keeper.kill()
        self.keeper.await_death()
        for p, f in list(self.holds):
            self.unhold(p, f)

    def mapped_here(self) -> dict[int, int]:
        """How often each page is mapped in this process, as the kernel says."""
        return mapped_pages(os.getpid(), os.fstat(self.fd).st_ino)

    # -- judgement ------------------------------------------------------------

    def foreign_in(self, f: int) -> int:
        """Foreign bytes in a frame that somebody has who cannot be asked any more."""
        return foreign(self.read(f), self.frames[f].rightful)

    def foreign_in_hold(self, p: int, f: int) -> int:
        """Foreign bytes in a page that the driver holds, as it sees them."""
        page, rightful = self.holds[p, f], self.frames[f].rightful
        if page is not None:
            return foreign(page[:], rightful)
        assert self.keeper is not None
        return int(self.keeper.ask("look", page=f, rightful=sorted(rightful)))

    def changed_while_free(self, f: int) -> int:
        """Bytes of a free frame that somebody wrote to since it was given back."""
        return 0 if self.frames[f].count else foreign(self.read(f), {0})

    def close(self) -> None:
        for page in self.holds.values():
            if page is not None:
                page.close()
        self.holds.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def foreign(data: bytes, rightful: set[int]) -> int:
    """How many bytes are none of these."""
    return len(data) - sum(data.count(bytes([byte])) for byte in rightful)
