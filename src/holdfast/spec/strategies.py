# SPDX-License-Identifier: Apache-2.0
"""Every strategy that is known, from doing nothing to quarantine. Holdfast's own is in ``keeper``.

The letters are those of :doc:`/answer-to-1998`. A strategy that fails is here because somebody
relied on it: the docstring says who, or where it was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from holdfast.spec.layout import Batch, Mask
from holdfast.spec.measures import (
    AWAIT_QUIET,
    AWAIT_SIGNALS,
    AWAIT_STOP,
    BLOCK,
    FLUSH,
    GIVE_UP_WAITING,
    MASTER_OFF,
    PROVE,
    QUARANTINE,
    RESET_BELIEVED,
    RESET_TRUSTED,
    STOP,
    TO_DEFAULT,
    UNMAP,
    UNPIN,
)
from holdfast.spec.setting import Iommu, Profile
from holdfast.spec.strategy import At, Hold, Measure, Strategy
from holdfast.spec.world import World

TRANSLATED: Final = (Iommu.LAZY, Iommu.STRICT)


class Mlock(Strategy):
    """What user-space drivers without VFIO do: lock the page, look its address up, hope."""

    key = "mlock"
    family = "A"
    title = "locked pages, nothing else"
    holds = Hold.LOCK
    measures = (UNMAP, UNPIN)


class Reserved(Strategy):
    """The second idea of 1998: PG_reserved, which ``free_pte`` skips."""

    key = "reserved"
    family = "B"
    title = "pages marked reserved, freed by the driver"
    holds = Hold.RESERVED
    measures = (AWAIT_QUIET, UNPIN)
    unpins_when_done = True
    profiles = (Profile.OLD,)
    descriptors = 2


class Ghost(Strategy):
    """The first idea of 1998: a thread shares the address space, so that exit frees nothing."""

    key = "ghost"
    family = "C"
    title = "a ghost shares the address space"
    ghost = True
    iommus: ClassVar[tuple[Iommu, ...]] = (Iommu.NONE,)


class GhostWithFiles(Ghost):
    """The same made the plain way: it has the open files too, and waits for release."""

    key = "ghost-files"
    title = "a ghost shares the files too, and waits for release"
    ghost_has_file = True
    measures = (AWAIT_QUIET, UNPIN)


class Decoy(Strategy):
    """What 1998 did not see: an area below the buffer, whose close runs before the buffer goes."""

    key = "decoy"
    family = "F"
    title = "a decoy area's close waits for the card"
    holds = Hold.LOCK
    at = At.HOOK
    measures = (AWAIT_QUIET, UNPIN)
    profiles = (Profile.OLD,)


class Counted(Strategy):
    """A page reference, kept by the driver until it saw the card at rest."""

    key = "reference"
    family = "D"
    title = "page reference, dropped when the card rests"
    holds = Hold.REFERENCE
    measures: ClassVar[Sequence[Measure]] = (AWAIT_QUIET, UNMAP, UNPIN)


class CountedTimed(Counted):
    """The same with a timeout, as many drivers have it."""

    key = "reference-timed"
    title = "page reference, dropped on a timeout"
    measures = (GIVE_UP_WAITING, UNMAP, UNPIN)


class CountedLocked(Counted):
    """What was right in 1998: the count raised, and the area locked against swapping."""

    key = "reference-locked"
    title = "page reference and lock, dropped when the card rests"
    holds = Hold.REFERENCE_AND_LOCK
    profiles = (Profile.OLD,)


class Longterm(Strategy):
    """``pin_user_pages(FOLL_LONGTERM)``, until the card was seen at rest."""

    key = "longterm"
    family = "E"
    title = "long-term pin, dropped when the card rests"
    holds = Hold.LONGTERM
    measures: ClassVar[Sequence[Measure]] = (AWAIT_QUIET, UNMAP, UNPIN)
    profiles: ClassVar[tuple[Profile, ...]] = (Profile.NEW,)


class LongtermTimed(Longterm):
    """The same with a timeout."""

    key = "longterm-timed"
    title = "long-term pin, dropped on a timeout"
    measures = (GIVE_UP_WAITING, UNMAP, UNPIN)


class LongtermCharged(Longterm):
    """VFIO type1's accounting: charged to the address space, which is forgotten when it ends."""

    key = "longterm-charged"
    title = "long-term pin, charged to the address space"
    charges_process = True
    iommus = (Iommu.STRICT,)


class Notifier(Strategy):
    """No pin: whatever takes pages tells the driver first, which stops the card (HMM, KVM)."""

    key = "notifier"
    family = "F"
    title = "a notifier stops the card before pages go"
    at = At.HOOK
    stops_before_zap = True
    hides_window = True
    measures = (AWAIT_QUIET, UNMAP, UNPIN)
    profiles = (Profile.NEW,)

    def on_unmapped(self, w: World, n: Batch, p: int, f: int, where: Mask) -> None:
        w.disconnect(n, p, where)
        n.put(w.address[p, f], 0, where)  # the buffer has to be registered anew


class SharedTables(Strategy):
    """Shared virtual addressing: the card faults as a processor does. It must be able to repeat."""

    key = "sva"
    family = "G"
    title = "the card uses the process's page table"
    reuses_iovas = False
    measures = (UNMAP, UNPIN)
    profiles = (Profile.NEW,)
    iommus = TRANSLATED

    def on_unmapped(self, w: World, n: Batch, p: int, f: int, where: Mask) -> None:
        w.disconnect(n, p, where)


class Unmap(Strategy):
    """The IOMMU mapping is removed before the pages go; the card is not asked."""

    key = "unmap"
    family = "H"
    title = "IOMMU unmap, then unpin; addresses are used again"
    holds = Hold.LONGTERM
    measures: ClassVar[Sequence[Measure]] = (UNMAP, UNPIN)
    profiles: ClassVar[tuple[Profile, ...]] = (Profile.NEW,)
    iommus: ClassVar[tuple[Iommu, ...]] = TRANSLATED


class UnmapRetire(Unmap):
    """The same; no address is ever used again."""

    key = "unmap-retire"
    title = "IOMMU unmap, then unpin; addresses are retired"
    reuses_iovas = False


class UnmapAts(UnmapRetire):
    """The same with a card that caches translations, and nobody who empties that cache."""

    key = "unmap-ats"
    title = "the same, the card's own translation cache forgotten"
    ats = True
    invalidates_card = False
    iommus = (Iommu.STRICT,)


class UnmapDefault(UnmapRetire):
    """The card is given back: to an identity domain, with bus mastering on."""

    key = "unmap-default"
    title = "the same, then the identity domain and bus master"
    measures = (MASTER_OFF, UNMAP, BLOCK, UNPIN, TO_DEFAULT)
    iommus = (Iommu.STRICT,)


class Quiesce(Strategy):
    """Pins owned by the open file; release stops the card and waits for its acknowledgement."""

    key = "quiesce"
    family = "I"
    title = "release stops the card, and waits"
    holds = Hold.LONGTERM
    measures: ClassVar[Sequence[Measure]] = (STOP, AWAIT_STOP, AWAIT_QUIET, UNMAP, UNPIN)
    profiles: ClassVar[tuple[Profile, ...]] = (Profile.NEW,)


class Completion(Quiesce):
    """The completions were seen, so the card is taken to be done."""

    key = "completion"
    title = "release waits for the completions"
    measures = (AWAIT_SIGNALS, UNMAP, UNPIN)


class DmaBuf(Strategy):
    """Memory of the driver's, freed by the last close: a packet socket's ring, many a dma-buf."""

    key = "dma-buf"
    family = "K"
    title = "the driver's memory, freed at release"
    holds = Hold.DRIVER
    measures = (UNMAP, UNPIN)


class Bounce(Strategy):
    """Bounce buffers: the card never sees the process's pages. The pool is the next problem."""

    key = "bounce"
    family = "L"
    title = "bounce buffers, reused when their process is dead"
    holds = Hold.DRIVER
    at = At.DEATH
    measures = (UNMAP, UNPIN)
    profiles = (Profile.NEW,)


class ResetUnflushed(Strategy):
    """Bus master off, and at once the pages: what had left the card is still on its way."""

    key = "reset-unflushed"
    family = "M"
    title = "bus master off, no read, pages go"
    holds = Hold.LONGTERM
    measures: ClassVar[Sequence[Measure]] = (MASTER_OFF, UNMAP, UNPIN)
    profiles: ClassVar[tuple[Profile, ...]] = (Profile.NEW,)


class ResetBelieved(ResetUnflushed):
    """Bus master off, read back, reset: and the acknowledgement is believed of any card."""

    key = "reset-believed"
    title = "bus master off, read, any reset believed"
    measures = (MASTER_OFF, FLUSH, RESET_BELIEVED, UNMAP, UNPIN)


class Reset(ResetUnflushed):
    """The same; only a reset that is known to stop DMA counts."""

    key = "reset"
    title = "bus master off, read, a reset that stops DMA"
    measures = (MASTER_OFF, FLUSH, RESET_TRUSTED, UNMAP, UNPIN)


class Quarantine(Strategy):
    """Kept until something proves the card quiet."""

    key = "quarantine"
    family = "N"
    title = "quarantine until proven quiet"
    holds = Hold.LONGTERM
    at = At.DEATH
    measures = (QUARANTINE, PROVE, UNMAP, UNPIN)
    profiles = (Profile.NEW,)


SIMPLE: Final = (
    Mlock, Reserved, Ghost, GhostWithFiles, Decoy, Counted, CountedTimed, CountedLocked, Longterm,
    LongtermTimed, LongtermCharged, Notifier, SharedTables, Unmap, UnmapRetire, UnmapAts,
    UnmapDefault, Quiesce, Completion, DmaBuf, Bounce, ResetUnflushed, ResetBelieved, Reset,
    Quarantine,
)  # fmt: skip
"""In the order of the table."""
