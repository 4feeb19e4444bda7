# SPDX-License-Identifier: Apache-2.0
"""What there is: frames, processes, descriptors, translations, the card, the keeper.

Facts. A frame of memory belongs to whoever counts on it, and the kernel counts those (``ref``).
Page tables, pins, files in memory and a card's descriptors may name a frame, and only some of them
are counted. Whether a write by the card harms somebody depends on what the frame is *now*, and on
whether it still is what it was when the address was handed to the card.

Choice. Generations are not numbers here: nobody ever asks for more than whether a frame was given
back since, so each descriptor and each registration has one bit for that (``fresh``, ``live``).
What software believes (``know``) and what the card does (``eng``, ``hw``, ``fab``) are different
variables. Which of the variables a model has depends on its setting and strategy: what cannot
change takes no room.

Cost. A process has one buffer of one page; sizes, offsets and directions do not matter for
lifetimes. At most one of its frames is registered with the card at a time.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from holdfast.keeper.map_state import MapState
from holdfast.keeper.state import Fact, State
from holdfast.spec.layout import Batch, Cell, Field, Layout, Mask
from holdfast.spec.setting import Iommu, Setting

if TYPE_CHECKING:
    from holdfast.spec.strategy import Strategy


class Proc(enum.IntEnum):
    """How far a process is. The numbers grow towards its end."""

    ABSENT = 0
    ALIVE = 1
    KILLED = 2  # in do_exit; nothing is taken down yet
    HOOKED = 3  # whoever wanted to hear of it first has heard (notifier, or a decoy area's close)
    ZAPPED = 4  # its pages are gone
    CLOSED = 5  # its areas are closed
    FILED = 6  # its files are put
    ZOMBIE = 7  # whatever release had to do is done; its pidfd is readable
    REAPED = 8


class Eng(enum.IntEnum):
    """What the card's engine does, whatever anybody believes."""

    RUN = 0
    STOPPING = 1
    QUIET = 2
    HUNG_SILENT = 3
    HUNG_WILD = 4
    GONE = 5


class Hw(enum.IntEnum):
    """How far the card is with a descriptor."""

    NONE = 0
    POSTED = 1
    FETCHED = 2
    INFLIGHT = 3  # the first write has left the card
    WRITTEN = 4  # the last one has, which says nothing of its arrival
    ABORTED = 5


class Sw(enum.IntEnum):
    """What software was told of a descriptor."""

    IDLE = 0
    PENDING = 1
    SIGNALLED = 2
    REAPED = 3


class Know(enum.IntEnum):
    """What software believes of the card on behalf of one owner."""

    UNKNOWN = 0
    QUIET_ACK = 1
    RESET_ACK = 2


class Dom(enum.IntEnum):
    """The domain that the card is attached to."""

    USER = 0
    BLOCK = 1
    DEFAULT = 2  # identity: every address is a frame


class Iova(enum.IntEnum):
    """What an I/O virtual address may be used for."""

    FREE = 0
    USED = 1
    RETIRED = 2


class Kept(enum.IntEnum):
    """The keeper."""

    UP = 0
    DOWN = 1
    AGAIN = 2  # a successor
    LOST = 3  # it and whatever held its descriptors


LEASE_STATES = (None, *State)
"""Number to state of a lease; 0: no lease."""
FACTS = tuple(Fact)
MAP_STATES = (None, *MapState)

ACTIVE = (Hw.POSTED, Hw.FETCHED, Hw.INFLIGHT)
"""The card has not done its last access."""


class World:
    """The variables of one model, by name, and the small changes that rules are made of."""

    def __init__(self, setting: Setting, strategy: Strategy) -> None:
        self.setting = setting
        self.strategy = strategy
        bounds = setting.bounds
        self.frames = range(bounds.frames)
        self.processes = range(bounds.processes)
        self.descriptors = range(bounds.descriptors)
        self.iovas = range(bounds.iovas if setting.translated else 0)
        sizes = {
            "P": bounds.processes, "Q": bounds.processes, "F": bounds.frames,
            "D": bounds.descriptors, "I": len(self.iovas), "T": len(FACTS),
        }  # fmt: skip
        self.layout = Layout(
            list(self._fields()), sizes, "PF" if bounds.symmetry else "", same={"Q": "P"}
        )
        group = self.layout.group
        # memory
        self.ref, self.other, self.reserved = group("ref"), group("other"), group("reserved")
        self.quarantined = group("quarantined")
        self.map, self.hold, self.address = group("map"), group("hold"), group("address")
        self.live, self.touched, self.charged = group("live"), group("touched"), group("charged")
        # processes
        self.proc, self.file, self.window = group("proc"), group("file"), group("window")
        self.kin, self.ghost, self.script = group("kin"), group("ghost"), group("script")
        self.know, self.kills, self.forks = group("know"), group("kills")[()], group("forks")[()]
        # descriptors and the card
        self.target, self.owner, self.fresh = group("target"), group("owner"), group("fresh")
        self.hw, self.sw, self.fab = group("hw"), group("sw"), group("fab")
        self.reading, self.named = group("reading"), group("named")
        self.bme, self.eng, self.lies = group("bme")[()], group("eng")[()], group("lies")[()]
        # translation
        self.dom, self.pte, self.tlb = group("dom")[()], group("pte"), group("tlb")
        self.cached, self.iova, self.iova_of = group("cached"), group("iova"), group("iova_of")
        # the keeper (see there)
        self.lease, self.fact, self.mapping = group("lease"), group("fact"), group("mapping")
        self.anchored, self.isolated = group("anchored"), group("isolated")
        self.tried, self.late, self.been = group("tried"), group("late"), group("been")
        self.keeper, self.crashes = group("keeper")[()], group("crashes")[()]

    # -- variables ------------------------------------------------------------

    def _fields(self) -> Iterator[Field]:
        setting, strategy, bounds = self.setting, self.strategy, self.setting.bounds
        yield Field("ref", 3, "F")
        yield Field("other", 1, "F")  # somebody who has nothing to do with all this has it
        yield Field("map", 1, "PF")  # page table of the process
        yield Field("hold", 1, "PF")  # held for the DMA of this process
        yield Field("address", 1, "PF")  # what is registered with the card for this process
        yield Field("live", 1, "P")  # that frame was not given back since
        yield Field("touched", 1, "P")  # the process itself let its buffer go
        yield Field("proc", 4, "P")
        yield Field("file", 1, "P")  # it has the open file (or the lease's socket)
        yield Field("window", 1, "P")  # it can ring the doorbell
        yield Field("know", 2, "P")
        yield Field("target", 1, "DF")
        yield Field("owner", 1, "DP")
        yield Field("fresh", 1, "D")
        yield Field("hw", 3, "D")
        yield Field("sw", 2, "D")
        yield Field("fab", 1, "D")  # a write of it is on its way to memory
        yield Field("bme", 1)
        yield Field("eng", 3)
        if strategy.resets:
            yield Field("lies", 1)  # a reset of this card is acknowledged and does not stop DMA
        yield Field("kills", 2)
        if bounds.reads:
            yield Field("reading", 1, "D")
        if bounds.forks:
            yield Field("forks", 1)
            yield Field("kin", 1, "PQ")  # P has inherited what Q had of the card
        yield from strategy.fields()
        if setting.translated:
            yield Field("dom", 2)
            yield Field("pte", 1, "IF")
            yield Field("tlb", 1, "IF")
            if bounds.ats or strategy.ats:
                yield Field("cached", 1, "IF")
            yield Field("iova", 2, "I")
            yield Field("iova_of", 1, "PI")
            yield Field("named", 1, "DI")

    # -- what is true ------------------------------------------------------------

    def any(self, s: Batch, cells: Iterable[Cell]) -> Mask:
        """Where at least one of these variables is not 0."""
        found = s.false()
        for cell in cells:
            found |= s.on(cell)
        return found

    def free(self, s: Batch, f: int) -> Mask:
        """Nobody counts on the frame: the next who asks for memory may get it."""
        return s.off(self.ref[f])

    def maps_any(self, s: Batch, p: int) -> Mask:
        return self.any(s, (self.map[p, f] for f in self.frames))

    def holds_any(self, s: Batch, p: int) -> Mask:
        return self.any(s, (self.hold[p, f] for f in self.frames))

    def registered(self, s: Batch, p: int) -> Mask:
        """The card can be told to use the buffer of this process."""
        return self.any(s, (self.address[p, f] for f in self.frames))

    def dead(self, s: Batch, p: int) -> Mask:
        return s.ge(self.proc[p], Proc.KILLED)

    def alive(self, s: Batch, p: int) -> Mask:
        return s.eq(self.proc[p], Proc.ALIVE)

    def hung_up(self, s: Batch, p: int) -> Mask:
        """It has closed the connection of a lease that goes on."""
        return s.on(self.lease[p]) & s.off(self.file[p])

    def closed(self, s: Batch, p: int) -> Mask:
        """Nobody has the file that this process opened any more (nor the socket of its lease)."""
        held = s.on(self.file[p])
        for q in self.processes:
            if q != p:
                held |= s.on(self.file[q]) & s.on(self.kin[q, p])
        return ~held

    def rests(self, s: Batch, p: int) -> Mask:
        """The card does no more for this owner than deliver what has left it already."""
        busy = s.eq(self.eng, Eng.GONE)
        wild = s.eq(self.eng, Eng.HUNG_WILD)
        for d in self.descriptors:
            own = s.on(self.owner[d, p])
            busy |= own & (s.among(self.hw[d], ACTIVE) | (wild & s.eq(self.hw[d], Hw.WRITTEN)))
        return ~busy

    def delivered(self, s: Batch) -> Mask:
        """No write is on its way: a read from the card could come back now."""
        return ~self.any(s, (self.fab[d] for d in self.descriptors))

    def entry(self, s: Batch, i: int, f: int) -> Mask:
        """An access to this address goes to this frame: by whichever cache knows it first."""
        in_table, in_tlb = s.on(self.pte[i, f]), s.on(self.tlb[i, f])
        found = in_tlb | (in_table & ~self.any(s, (self.tlb[i, g] for g in self.frames)))
        if self.cached:
            in_card = self.any(s, (self.cached[i, g] for g in self.frames))
            found = s.on(self.cached[i, f]) | (found & ~in_card)
        return found

    def reaches(self, s: Batch, d: int, f: int) -> Mask:
        """An access for this descriptor would go to this frame."""
        if not self.setting.translated:
            return s.on(self.target[d, f])
        found = s.false()
        for i in self.iovas:
            found |= s.on(self.named[d, i]) & self.entry(s, i, f)
        return (found & s.eq(self.dom, Dom.USER)) | s.eq(self.dom, Dom.DEFAULT)

    def may_access(self, s: Batch, d: int) -> Mask:
        """There is or may come an access for this descriptor."""
        engine = s.among(self.eng, (Eng.RUN, Eng.STOPPING, Eng.HUNG_WILD))
        remembered = s.eq(self.eng, Eng.HUNG_WILD) & s.eq(self.hw[d], Hw.WRITTEN)
        working = engine & s.on(self.bme) & (s.among(self.hw[d], ACTIVE) | remembered)
        return working | s.on(self.fab[d])

    # -- what changes ------------------------------------------------------------

    def take(self, n: Batch, f: int) -> None:
        """One more counts on the frame."""
        n[self.ref[f]] = n[self.ref[f]] + 1

    def drop(self, n: Batch, f: int, where: Mask) -> None:
        """One fewer does. At 0 the frame is anybody's."""
        count = n[self.ref[f]]
        n.fail("S6", where & (count == 0))
        where = where & (count > 0)
        n[self.ref[f]] = count - where
        self.freed(n, f, where & (count == 1))

    def freed(self, n: Batch, f: int, where: Mask) -> None:
        """The frame went back to the system: what was said of it before means another one."""
        for p in self.processes:
            n.put(self.live[p], 0, where & n.on(self.address[p, f]))
        for d in self.descriptors:
            n.put(self.fresh[d], 0, where & n.on(self.target[d, f]))

    def zap(self, n: Batch, p: int, where: Mask | None = None) -> None:
        """Take every page out of the page table of a process."""
        for f in self.frames:
            self.clear_entry(n, p, f, n.true() if where is None else where)

    def clear_entry(self, n: Batch, p: int, f: int, where: Mask) -> None:
        """Take one page out of the page table of a process."""
        mapped = where & n.on(self.map[p, f])
        n.put(self.map[p, f], 0, mapped)
        self.strategy.on_unmapped(self, n, p, f, mapped)
        # free_pte of 2.0 leaves reserved pages alone: neither freed nor counted down.
        self.drop(n, f, mapped & n.off(self.reserved[f]))

    def unhold(self, n: Batch, p: int) -> None:
        """Let the frames go that were held for a process: the step on which all depends (S3)."""
        known = n.on(self.know[p]) | (self.setting.iommu is Iommu.STRICT)
        for f in self.frames:
            held = n.on(self.hold[p, f])
            reachable = ~known
            for i in self.iovas:
                still = n.on(self.pte[i, f]) | n.on(self.tlb[i, f]) | n.on(self.cached[i, f])
                reachable = reachable | (still & n.on(self.iova_of[p, i]))
            for d in self.descriptors:
                if not self.setting.translated:
                    coming = n.on(self.fab[d]) & n.on(self.target[d, f])
                    reachable = reachable | (coming & n.on(self.owner[d, p]))
            n.fail("S3", held & reachable)
            n.put(self.hold[p, f], 0, held)
            self.drop(n, f, held)

    def forget(self, n: Batch, p: int, where: Mask) -> None:
        """The card was seen at rest for this owner: it remembers none of its descriptors."""
        for d in self.descriptors:
            n.put(self.hw[d], Hw.NONE, where & n.on(self.owner[d, p]))

    def abort(self, n: Batch, p: int | None = None) -> None:
        """The card drops what it had not finished (of one owner)."""
        for d in self.descriptors:
            stopped = n.among(self.hw[d], ACTIVE)
            if p is not None:
                stopped &= n.on(self.owner[d, p])
            n.put(self.hw[d], Hw.ABORTED, stopped)

    def master_on(self, n: Batch) -> None:
        """Let the card be a bus master. S7: nothing that an earlier owner left may go on."""
        was_off = n.off(self.bme)
        for d in self.descriptors:
            left = n.among(self.hw[d], ACTIVE)
            left |= n.eq(self.eng, Eng.HUNG_WILD) & n.eq(self.hw[d], Hw.WRITTEN)
            for p in self.processes:
                left &= ~(n.on(self.owner[d, p]) & self.alive(n, p) & self.holds_any(n, p))
            if self.setting.translated:
                retired = n.false()
                for i in self.iovas:
                    retired |= n.on(self.named[d, i]) & n.eq(self.iova[i], Iova.RETIRED)
                left &= ~retired | n.eq(self.dom, Dom.DEFAULT)
            n.fail("S7", was_off & left)
        n[self.bme] = 1

    def connect(self, n: Batch, i: int, f: int, where: Mask | None = None) -> None:
        """Have an address lead to a frame. S4': no descriptor that names it may still live."""
        here = n.true() if where is None else where
        for d in self.descriptors:
            live = n.on(self.named[d, i]) & n.off(self.target[d, f]) & self.may_access(n, d)
            n.fail("S4'", here & live)
        n.put(self.pte[i, f], 1, here)
        n.put(self.iova[i], Iova.USED, here)

    def disconnect(self, n: Batch, p: int, where: Mask, *, flushed: bool = True) -> None:
        """Take the addresses of an owner out of the page table, and out of the caches if strict.

        Not ``flushed``: the invalidation did not come to its end.
        """
        strict = self.setting.iommu is Iommu.STRICT and flushed
        for i in self.iovas:
            mine = where & n.on(self.iova_of[p, i])
            for f in self.frames:
                n.put(self.pte[i, f], 0, mine)
                if strict:
                    n.put(self.tlb[i, f], 0, mine)
                    if self.strategy.invalidates_card:
                        n.put(self.cached[i, f], 0, mine)
