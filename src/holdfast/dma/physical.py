# SPDX-License-Identifier: Apache-2.0
"""DMA memory at fixed physical addresses, for functions that no IOMMU stands in front of.

Facts. Without translation the function puts physical addresses on the bus, and nothing but the
function itself can be told to stop. A frame must not go back to the system while the function could
still write to it: not when a client dies, not when a client that holds the file punches or
truncates it, and not when the keeper itself is killed.

Consequence. Frames must be held twice: against clients by something that no holder of the file can
undo, and against the keeper's own death by something that is not the keeper's.

Choice. Every slab is a named file of huge pages. Against clients, the keeper pins it with a
registered buffer of an io_uring (``kernel.io_uring``). Against the keeper's death there is the
name: the file stays, and with it the frames, until the next keeper finds it (:meth:`leftovers`) and
has proven that the function is quiet. The name carries boot, function and a number. The keeper maps
the file to pin it and to ask for addresses, and never touches the mapping: a client could have
truncated the file under it, which would be a SIGBUS. A second process has the ring as well
(``kernel.ring_holder``): a successor that adopts a slab gets its pins, and needs no mapping.

Cost. Whole pages of 2 MiB, taken from a pool that an administrator has to fill. If a client punches
its file *and* keeper and holder are killed before the function is quiet, nothing holds the frame
any more: then only the end of bus mastering does (``backends.uio``).
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from holdfast.dma.physical_slab import (
    LARGEST,
    NAME,
    Held,
    coalesced,
    describe,
    described,
    pieces,
)
from holdfast.dma.slab import SlabMemory
from holdfast.errors import BadBuffer, Closed, HoldfastError, OutOfMemory, UsageError
from holdfast.kernel import hugetlb, memfd, pagemap
from holdfast.kernel.failure import failure
from holdfast.kernel.handover import Incoming
from holdfast.kernel.io_uring import LARGEST_PIN, PinTable
from holdfast.kernel.ring_holder import RingHolder
from holdfast.uapi.io_uring import MAX_REG_BUFFERS
from holdfast.values import Bdf, Handover


class PhysicalFiles:
    """``dma.slab.SlabSource`` of pinned memory whose bus addresses are known. Thread-safe.

    ``SlabMemory.addresses`` has the physical address of each extent. Made only by whoever has the
    exclusive use of the function: two of them would take each other's files for leftovers.

    ``dma_bits`` may be lowered at any time: how many address bits the function's DMA has.
    """

    def __init__(
        self,
        directory: Path,
        bdf: Bdf,
        *,
        dma_bits: int = 64,
        boot: str | None = None,
        holder: RingHolder | None = None,
    ) -> None:
        """Slabs are files in ``directory`` (on hugetlbfs). ``boot`` is for tests.

        Raises NoPermission or NotSupported if no pins can be taken here. ``holder``: as in
        :meth:`resume`.
        """
        self.directory = directory
        self.dma_bits = dma_bits
        self.granule = hugetlb.page_size(directory)
        self._bdf = bdf
        self._boot = boot or hugetlb.boot_id()
        self._lock = threading.Lock()
        self._held: dict[int, Held] = {}
        self._closed = False
        # A name that a predecessor left must not be taken again.
        numbers = [number for _, boot_id, number in self._files() if boot_id == self._boot]
        self._next = max(numbers, default=0) + 1
        self._adopting = threading.Lock()
        self._left: list[Held] | None = None
        slots = MAX_REG_BUFFERS
        ring = holder.ring() if holder is not None else None
        self._stale = ring is not None
        """Whether the ring may have pins that nobody will claim."""
        self._pins = PinTable(slots) if ring is None else PinTable.resume(ring, slots)
        try:
            if holder is not None and ring is None:
                holder.let_go()
                holder = None
            self._holder = holder or RingHolder.start(self._pins.fd)
        except BaseException:
            self._pins.close()
            raise

    @classmethod
    def resume(cls, found: Incoming, bdf: Bdf, *, dma_bits: int = 64) -> Self:
        """The source of a predecessor that was killed; its descriptors are taken from ``found``.

        Adopt what it had given out before anything else. If nobody holds its pins any more, they
        are taken anew.
        """
        directory = Path(found.text("directory"))
        holder = RingHolder.resume(found)
        try:
            return cls(directory, bdf, dma_bits=dma_bits, holder=holder)
        except BaseException:
            holder.let_go()
            raise

    def hand_over(self) -> Handover:
        """What :meth:`resume` needs. The descriptors stay the source's."""
        holder = self._holder
        fds = {"holder": holder.holder, "lifeline": holder.lifeline}
        return Handover(fds, {"directory": str(self.directory), "ring": holder.number})

    @property
    def held_bytes(self) -> int:
        """Bytes given out and not yet recycled, leftovers included."""
        with self._lock:
            return sum(held.memory.size for held in self._held.values())

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are pinned now."""
        return self._pins.pinned_bytes

    def take(self, size: int) -> SlabMemory:
        """At least ``size`` zeroed bytes in whole pages, pinned. Slow: 2 MiB are zeroed per page.

        Raises OutOfMemory, with the command that helps if the pool of huge pages is too small;
        also if the function could not reach what it got. Nothing is taken then.
        """
        if not 0 < size <= LARGEST:
            raise BadBuffer(f"{size} bytes", operation="take slab", target=str(self._bdf))
        rounded = -(-size // self.granule) * self.granule
        with self._lock:
            self._require_open()
            path = self._path(self._next)
            self._next += 1
        held = Held(
            SlabMemory(hugetlb.create(self.directory, path.name, rounded), []), path, rounded
        )
        try:
            self._hold(held)
            self._require_reach(held.memory)
            self._enter(held)
        except BaseException:
            self._let_go(held)
            os.close(held.memory.fd)
            path.unlink(missing_ok=True)
            raise
        return held.memory

    def leftovers(self) -> list[SlabMemory]:
        """What an earlier keeper of this function left in this boot, and is not recycled yet.

        It is looked for, and held again, at the first call. The function may still be writing
        there: recycle each once it is proven quiet. Files that a client has cut or punched
        meanwhile are held as they are, with what is left of them as their size and without
        addresses (None). Files of another boot are removed.
        """
        with self._adopting:
            if self._left is None:
                self._left = self._look_for_leftovers()
            with self._lock:
                self._left = [held for held in self._left if id(held.memory) in self._held]
            if self._stale and not self._left:
                # What is pinned and not held is of slabs that were about to be given back, or that
                # nobody had heard of yet.
                self._pins.sweep()
                self._stale = False
            return [held.memory for held in self._left]

    def describe(self, memory: SlabMemory) -> Handover:
        return describe(self._require(memory, "describe slab"))

    def adopt(self, handover: Handover) -> SlabMemory:
        """Memory of a predecessor: held by its pins, or pinned anew if they are gone.

        BadBuffer if it is not where it was any more, because a holder of the file punched it while
        nobody had it pinned: then the function may be writing to somebody else's memory.
        """
        with Incoming(handover, str(self._bdf)) as found:
            held, number = described(found, self.directory, self._boot, self._bdf)
            with self._lock:
                self._require_open()
                # The name may be gone already, and must not be taken again all the same.
                self._next = max(self._next, number + 1)
                if self._left is not None:
                    raise UsageError("the leftovers were looked for", operation="adopt memory")
                if self._stale:
                    self._pins.claim(pieces(held))
            if not self._stale:
                self._hold_again(held)
            self._enter(held)
            found.take("slab")
            return held.memory

    def _hold_again(self, held: Held) -> None:
        """Pin memory whose pins were lost, and see that it is where it was."""
        memory, pinned = held.memory, bool(held.slots)
        was = (memory.extents, memory.addresses)
        held.slots = []
        if not pinned:
            return
        try:
            status = os.fstat(memory.fd)
            if status.st_blocks * 512 == status.st_size == held.file_size:
                self._hold(held)
                if (memory.extents, memory.addresses) == was:
                    return
            raise BadBuffer(
                "pages were taken out of it while nobody had it pinned",
                operation="adopt memory",
                target=str(held.path),
                hint="the function may be writing elsewhere: turn its bus mastering off",
            )
        except OSError as error:
            raise failure(error, "adopt memory", str(held.path)) from error
        except HoldfastError:
            self._let_go(held)
            raise

    def punch(self, memory: SlabMemory) -> None:
        """Unpin, and give the pages back to the kernel; the slab stays taken. Slow."""
        held = self._require(memory, "punch slab")
        with held.lock:
            if memory.fd < 0:
                raise Closed("the source of memory is closed", operation="punch slab")
            self._let_go(held)
            memfd.punch(memory.fd, 0, held.file_size)
            memory.punched = True

    def recycle(self, memory: SlabMemory) -> None:
        """Punch, unless it is already, and remove the file. UsageError the second time."""
        if not memory.punched:
            self.punch(memory)
        held = self._require(memory, "recycle slab")
        with self._lock:
            if self._held.pop(id(memory), None) is None:
                raise UsageError("memory that is not given out", operation="recycle slab")
        with held.lock:
            os.close(memory.fd)
            memory.fd = -1
        try:
            held.path.unlink(missing_ok=True)
        except OSError as error:
            raise failure(error, "remove slab", str(held.path)) from error
        if self._stale and self._left:
            self.leftovers()  # it may have been the last one

    def close(self) -> None:
        """Drop pins, mappings and descriptors. What is still given out keeps its file. Idempotent.

        The frames of such a file stay allocated until the next keeper recycles them.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            left = list(self._held.values())
            self._held.clear()
        for held in left:
            with held.lock:
                if held.address is not None:
                    hugetlb.unmap(held.address, held.file_size)
                    held.address = None
                os.close(held.memory.fd)
                held.memory.fd = -1
        self._pins.close()
        self._holder.end()

    # -- details ---------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self.directory / f"holdfast-{self._boot}-{self._bdf}-{number}"

    def _files(self) -> Iterator[tuple[Path, str, int]]:
        """Every file of this function: path, boot, number."""
        try:
            names = os.listdir(self.directory)
        except OSError as error:
            raise failure(error, "list slabs", str(self.directory)) from error
        for name in names:
            match = NAME.fullmatch(name)
            if match and match[2] == str(self._bdf):
                yield self.directory / name, match[1], int(match[3])

    def _look_for_leftovers(self) -> list[Held]:
        """Files that are there and not given out by this object, held from now on."""
        with self._lock:
            self._require_open()
            ours = {held.path for held in self._held.values()}
        found = []
        for path, boot, _ in sorted(self._files()):
            if boot != self._boot:
                path.unlink(missing_ok=True)
            elif path not in ours and (held := self._adopt(path)) is not None:
                found.append(held)
        return found

    def _adopt(self, path: Path) -> Held | None:
        """Hold a file that was there before; None, and the file removed, if it has no pages."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise failure(error, "open leftover", str(path)) from error
        held = Held(SlabMemory(fd, []), path, 0)
        try:
            status = os.fstat(fd)
            present = status.st_blocks * 512
            held.file_size = status.st_size
            if not stat.S_ISREG(status.st_mode) or not present:
                path.unlink()
                os.close(fd)
                return None
            if present == status.st_size <= LARGEST:
                self._hold(held)
            else:
                # Mapping it would fill the holes with fresh pages. The frames that were in them are
                # lost; the name keeps the others, as it did while nobody was there.
                held.memory.extents.append((0, present))
            self._enter(held)
        except BaseException:
            self._let_go(held)
            os.close(fd)
            raise
        return held

    def _hold(self, held: Held) -> None:
        """Map, pin, and find out where the pages are."""
        memory, size = held.memory, held.file_size
        held.address = hugetlb.map_whole(memory.fd, size)
        for at in range(0, size, LARGEST_PIN):
            held.slots.append(self._pins.pin(held.address + at, min(LARGEST_PIN, size - at)))
        # Only now: before it was pinned, a page could still be moved.
        frames = pagemap.physical(held.address, size, self.granule)
        memory.extents, memory.addresses = coalesced(frames, self.granule)

    def _let_go(self, held: Held) -> None:
        """Undo :meth:`_hold`, as far as it got. May be repeated after an error."""
        try:
            while held.slots:
                self._pins.unpin(held.slots[-1])
                held.slots.pop()
        except Closed:
            held.slots.clear()  # the source was closed meanwhile, and every pin went with it
        if held.address is not None:
            hugetlb.unmap(held.address, held.file_size)
            held.address = None

    def _require_reach(self, memory: SlabMemory) -> None:
        """Refuse memory that the function would wrap around to somebody else's."""
        assert memory.addresses is not None
        ends = [
            start + size for start, (_, size) in zip(memory.addresses, memory.extents, strict=True)
        ]
        if max(ends) > 1 << self.dma_bits:
            raise OutOfMemory(
                f"memory at {max(ends) - 1:#x} is out of the function's reach"
                f" (dma_bits={self.dma_bits})",
                operation="take slab",
                target=str(self._bdf),
                hint=f"if it reaches further, say so: pci:{self._bdf}?backend=uio&dma_bits=N"
                " (QEMU's edu reaches as far as its dma_mask: -device edu,dma_mask=0xffffffffff)",
            )

    def _enter(self, held: Held) -> None:
        with self._lock:
            self._require_open()
            self._held[id(held.memory)] = held

    def _require(self, memory: SlabMemory, operation: str) -> Held:
        with self._lock:
            held = self._held.get(id(memory))
        if held is None or held.memory is not memory:
            raise UsageError("memory that is not given out", operation=operation)
        return held

    def _require_open(self) -> None:
        if self._closed:
            raise Closed(
                "the source of memory is closed", operation="take slab", target=str(self._bdf)
            )
