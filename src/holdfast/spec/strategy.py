# SPDX-License-Identifier: Apache-2.0
"""What a strategy is: how memory is held for DMA, and what has to happen before it is let go.

A strategy is a class with a few attributes. Write one::

    class MyDriver(Strategy):
        "Pins the page; at the last close stops the card and waits for it."

        key = "mine"
        title = "long-term pin, card stopped at the last close"
        holds = Hold.LONGTERM
        measures = (STOP, AWAIT_STOP, AWAIT_QUIET, UNMAP, UNPIN)

and ask ``holdfast spec check FILE.py:MyDriver``. ``measures`` are taken one after the other, each
when it can be, beginning ``at`` the moment that is named. What does not fit is a method to
override: :meth:`Strategy.fields` and :meth:`Strategy.rules` add variables and events.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from holdfast.spec.layout import Batch, Field, Mask
from holdfast.spec.rules import Rule
from holdfast.spec.setting import Bounds, Iommu, Profile, Setting

if TYPE_CHECKING:
    from holdfast.spec.world import World


class Hold(enum.Enum):
    """What keeps a frame, besides the page table of its process."""

    NOTHING = enum.auto()
    LOCK = enum.auto()
    """VM_LOCKED: not swapped out. Nothing more."""
    RESERVED = enum.auto()
    """PG_reserved of 2.0: neither freed with the process nor swapped out nor counted."""
    REFERENCE = enum.auto()
    """One more on the page's count."""
    REFERENCE_AND_LOCK = enum.auto()
    LONGTERM = enum.auto()
    """FOLL_LONGTERM: a reference, fork copies for the child, the page is not moved."""
    DRIVER = enum.auto()
    """The memory is the driver's; the process only maps it."""


class At(enum.Enum):
    """When the measures begin."""

    RELEASE = enum.auto()
    """The last close of the file. Measures run in the exit that closes it, which waits for them."""
    HOOK = enum.auto()
    """Before the pages go. The exit (and a munmap) waits."""
    DEATH = enum.auto()
    """When somebody else sees that the process is dead and its file closed. Nothing waits."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One step of letting go, for one owner (process ``p``)."""

    event: str
    text: str
    guard: Callable[[World, Batch, int], Mask]
    effect: Callable[[World, Batch, int], None]
    fair: bool = True
    """If it can be taken for ever, it is. What depends on a card that need not answer is not."""


class Strategy:
    """One way to hold DMA memory. Subclass it; see the module."""

    key: ClassVar[str]
    """Its name on the command line."""
    title: ClassVar[str]
    family: ClassVar[str] = ""
    """The letter that the literature of this project gives it."""
    holds: ClassVar[Hold] = Hold.NOTHING
    at: ClassVar[At] = At.RELEASE
    measures: ClassVar[Sequence[Measure]] = ()
    profiles: ClassVar[tuple[Profile, ...]] = tuple(Profile)
    iommus: ClassVar[tuple[Iommu, ...]] = tuple(Iommu)
    reuses_iovas: ClassVar[bool] = True
    ghost: ClassVar[bool] = False
    """A thread shares the address space, so that the process is not its last user."""
    ghost_has_file: ClassVar[bool] = False
    """It shares the open files too."""
    hides_window: ClassVar[bool] = False
    """A child does not inherit the window to the card (VM_DONTCOPY)."""
    stops_before_zap: ClassVar[bool] = False
    """A notifier stops the card before any page of the buffer goes, for whatever reason."""
    unpins_when_done: ClassVar[bool] = False
    """The driver lets a living process's buffer go when its transfer is done and delivered."""
    ats: ClassVar[bool] = False
    """The card has a translation cache of its own, whatever the bounds say."""
    invalidates_card: ClassVar[bool] = True
    """A strict unmap empties that cache, too."""
    descriptors: ClassVar[int] = 1
    """As many are needed to show what it does, in the bounds of the table."""
    crashes: ClassVar[int] = 1
    """The same of a keeper's deaths."""
    keeps: ClassVar[bool] = False
    """It is a keeper's: see :mod:`holdfast.spec.keeper`."""
    firmware_lies: ClassVar[bool] = False
    """The card says that it is at rest while it is not."""
    quarantine_bound: ClassVar[int] = 1
    """Frames in quarantine at which nothing new is admitted."""
    charges_process: ClassVar[bool] = False
    """Pinned memory is charged to the address space, which forgets it when it ends."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @classmethod
    def fits(cls, setting: Setting) -> bool:
        """Whether such a thing exists on this machine. Linux 2.0 knows no IOMMU."""
        known = setting.profile in cls.profiles and setting.iommu in cls.iommus
        return known and not (setting.old and setting.translated)

    @classmethod
    def fitted(cls, bounds: Bounds) -> Bounds:
        """The bounds of the table, as far as this strategy needs them."""
        return replace(bounds, descriptors=cls.descriptors, crashes=cls.crashes)

    # -- derived ------------------------------------------------------------

    @property
    def private(self) -> bool:
        """The buffer is the process's own memory, and so subject to paging."""
        return self.holds is not Hold.DRIVER

    @property
    def pins(self) -> bool:
        """Something besides the page table counts on the frame."""
        return self.holds not in (Hold.NOTHING, Hold.LOCK, Hold.RESERVED)

    @property
    def locks(self) -> bool:
        """The buffer is in a locked area (VM_LOCKED)."""
        return self.holds in (Hold.LOCK, Hold.REFERENCE_AND_LOCK)

    @property
    def fork_copies(self) -> bool:
        return self.holds is Hold.LONGTERM

    @property
    def coarse(self) -> bool:
        """What makes no difference to a keeper is not told apart."""
        return False

    @property
    def quarantines(self) -> bool:
        return any(measure.event == "quarantine" for measure in self.measures)

    @property
    def resets(self) -> bool:
        return any(measure.event == "reset" for measure in self.measures)

    # -- to override ------------------------------------------------------------

    def fields(self) -> Iterator[Field]:
        """Variables of its own."""
        if self.measures:
            yield Field("script", 4, "P")
        if self.holds is Hold.RESERVED:
            yield Field("reserved", 1, "F")
        if self.quarantines:
            yield Field("quarantined", 1, "PF")
        if self.ghost:
            yield Field("ghost", 1, "P")
        if self.charges_process:
            yield Field("charged", 1, "P")

    def rules(self, w: World) -> Iterator[Rule]:
        """What drivers, ghosts and keepers do."""
        from holdfast.spec import driver

        return driver.rules(w)

    def lets_pages_go(self, w: World, s: Batch, p: int) -> Mask:
        """Where the exit of ``p`` may go on to take its pages."""
        if self.at is not At.HOOK:
            return s.true()
        idle = ~w.registered(s, p) & s.off(w.script[p])
        return idle | s.eq(w.script[p], len(self.measures))

    def lets_zap(self, w: World, s: Batch, p: int) -> Mask:
        """Where pages of the living process ``p`` may be taken."""
        if not self.stops_before_zap:
            return s.true()
        return ~w.registered(s, p) | (w.rests(s, p) & w.delivered(s))

    def lets_exit(self, w: World, s: Batch, p: int) -> Mask:
        """Where the exit of ``p`` may end: ``release`` runs in the exit of who closes last."""
        if self.at is not At.RELEASE or not self.measures:
            return s.true()
        done = s.true()
        for owner in w.processes:
            begun = w.registered(s, owner) | s.on(w.script[owner])
            waits = begun & w.closed(s, owner) & w.dead(s, owner)
            if owner != p:
                waits &= s.on(w.kin[p, owner])
            done &= ~waits | s.eq(w.script[owner], len(self.measures))
        return done

    def on_unmapped(self, w: World, n: Batch, p: int, f: int, where: Mask) -> None:
        """A page leaves the page table of ``p``, before anybody counts it down."""

    def on_memory_gone(self, w: World, n: Batch, p: int) -> None:
        """The address space of ``p`` has ended."""
        if self.charges_process:
            n[w.charged[p]] = 0
