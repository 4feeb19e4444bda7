# SPDX-License-Identifier: Apache-2.0
"""Holdfast's own way: what a keeper does, by the tables that the keeper runs on.

Facts. :mod:`holdfast.keeper.state` says which events may take a dead lease where, and what must
have been observed before; :mod:`holdfast.keeper.map_state` says the same of mappings. The code
that takes the measures can only report events and add facts.

Choice. Here too. An *observation* adds a fact where it is true of the card and of the processes,
which the keeper cannot see but through it. A *row* can be taken whenever the table lets it: that
the keeper's code would not, is not relied upon. So if a guard is deleted from the tables, the
model does without it, as the code might.

Cost. A keeper that dies forgets everything but its journal (states of mappings) and what its anchor
holds; both are modelled as never lost. The death of both is :class:`KeeperAlone`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from holdfast.keeper.map_state import MapState
from holdfast.keeper.state import Fact, State
from holdfast.spec import driver
from holdfast.spec.layout import Batch, Field, Mask
from holdfast.spec.lease_death import LeaseDeath
from holdfast.spec.lease_memory import LeaseMemory
from holdfast.spec.lease_words import DYING, LEASE, MAPPING, NUMBER, running
from holdfast.spec.measures import AWAIT_QUIET, UNMAP, UNPIN
from holdfast.spec.rules import Rule
from holdfast.spec.setting import MANY, Iommu, Profile
from holdfast.spec.strategy import At, Hold, Strategy
from holdfast.spec.tables import DRAIN, RELEASE, REVOKE, Tables
from holdfast.spec.world import Eng, Kept, World


class _Lease(LeaseMemory, LeaseDeath):
    """Everything that happens to one lease."""


class Holdfast(Strategy):
    """A keeper holds card and memory; what is not proven quiet is kept."""

    key = "holdfast"
    family = "J+H+M+N"
    title = "Holdfast: keeper, ladder, retirement, quarantine"
    holds = Hold.DRIVER
    at = At.DEATH
    profiles = (Profile.NEW,)
    # VFIO and iommufd flush before they unpin, whatever iommu.strict says (vfio_iommu_type1.c,
    # iommufd/io_pagetable.c).
    iommus = (Iommu.NONE, Iommu.STRICT)
    tables: ClassVar[Tables] = Tables.of(DRAIN)
    keeps = True
    quarantines: ClassVar[bool] = True

    @property
    def coarse(self) -> bool:
        return not self.setting.bounds.detail

    @property
    def resets(self) -> bool:
        """Whether resets of this card stop DMA is told apart. A keeper that trusts none but those
        that are known to does the same with a card that lies as with one that refuses."""
        return not self.coarse

    def fields(self) -> Iterator[Field]:
        yield Field("lease", 4, "P")
        yield Field("mapping", 3, "P")
        yield Field("anchored", 1, "P")
        yield Field("isolated", 1, "P")
        yield Field("tried", 1, "P")  # every mapping of the lease was tried to be undone
        yield Field("late", 1, "P")  # it was seen at rest before it was known that nobody posts
        yield Field("fact", 1, "PT")
        yield Field("charged", 1, "P")  # the keeper's ledger
        if not self.coarse:
            yield Field("been", 1, "P")  # it was in quarantine
        yield Field("keeper", 2)
        yield Field("crashes", 1)

    def rules(self, w: World) -> Iterator[Rule]:
        for p in w.processes:
            lease = _Lease(w, self.tables, p)
            yield from lease.memory_rules()
            yield from lease.death_rules()
            yield from driver.posts(w, p)
        for d in () if self.coarse else w.descriptors:
            yield driver.reap(w, d)
        yield _master_on(w)
        if w.setting.bounds.crashes:
            yield _crash(w)
            # The search of the table leaves this out, for time: it adds half of the states again.
            for p in () if self.coarse and w.setting.bounds.crashes < MANY else w.processes:
                yield _crash(w, p)
            yield _restart(w)


def _master_on(w: World) -> Rule:
    def can(s: Batch) -> Mask:
        held = w.any(s, (w.isolated[p] for p in w.processes))
        return s.off(w.bme) & ~held & s.ne(w.eng, Eng.GONE) & running(w, s)

    return Rule(
        "bme_on", "keeper", "no dead lease keeps the card isolated: bus mastering comes on", can,
        w.master_on, fair=True,
    )  # fmt: skip


def _crash(w: World, unclosed: int | None = None) -> Rule:
    """What a keeper knew is gone; what it wrote down and what its anchor holds is not.

    ``unclosed``: the lease of this process was released, and the journal does not say so yet.
    """
    bounded = w.setting.bounds.crashes < MANY
    released = LEASE[State.RELEASED]

    def crash(n: Batch) -> None:
        n[w.keeper] = Kept.DOWN
        n[w.crashes] = int(bounded)
        for p in w.processes:
            _forget(w, n, p)
        if unclosed is not None:
            n[w.lease[unclosed]] = LEASE[State.ALIVE]

    def can(s: Batch) -> Mask:
        ready = s.eq(w.keeper, Kept.UP) & s.off(w.crashes) if bounded else running(w, s)
        return ready if unclosed is None else ready & s.eq(w.lease[unclosed], released)

    when = "" if unclosed is None else f" before it wrote down the end of the lease of {unclosed}"
    return Rule("k_crash", "keeper", f"the keeper is killed{when}", can, crash)


def _forget(w: World, n: Batch, p: int) -> None:
    """The lease of ``p`` as a successor finds it: dying ones die from the beginning."""
    dying = n.among(w.lease[p], DYING)
    n.put(w.isolated[p], 1, dying & n.off(w.bme))
    n.put(w.lease[p], LEASE[State.ALIVE], dying)
    for fact in Fact:
        n[w.fact[p, NUMBER[fact]]] = 0
    n[w.late[p]] = 0
    n[w.tried[p]] = 0
    lost = n.on(w.lease[p]) & n.off(w.anchored[p])
    unwritten = n.among(w.mapping[p], [MAPPING[MapState.HELD], MAPPING[MapState.ANCHORED]])
    for f in w.frames:
        # An IOMMU mapping is itself a pin of the pages, and belongs to what the anchor has.
        pinned = n.false()
        for i in w.iovas:
            pinned |= n.on(w.iova_of[p, i]) & n.on(w.pte[i, f])
        gone = (lost | unwritten) & ~pinned & n.on(w.hold[p, f])
        n.put(w.hold[p, f], 0, gone)
        n.put(w.charged[p], 0, gone)
        w.drop(n, f, gone)
    n.put(w.mapping[p], 0, unwritten)
    n.put(w.anchored[p], 0, unwritten)


def _restart(w: World) -> Rule:
    def restart(n: Batch) -> None:
        n[w.keeper] = Kept.AGAIN

    return Rule(
        "k_restart", "anchor", "a successor takes over: journal and descriptors are there",
        lambda s: s.eq(w.keeper, Kept.DOWN), restart, fair=True,
    )  # fmt: skip


# -- the same with something missing ------------------------------------------------------------


class HoldfastRevoke(Holdfast):
    """The policy that stops the card at once."""

    key = "holdfast-revoke"
    title = "Holdfast, policy revoke"
    crashes = 0
    tables = Tables.of(REVOKE)


class HoldfastRelease(Holdfast):
    """The negative control of the demonstration: the release gate is empty."""

    key = "holdfast-release"
    title = "Holdfast's negative control: no release gate"
    crashes = 0
    tables = Tables.of(RELEASE)


class HoldfastReuse(Holdfast):
    """Under a strict IOMMU a late write lands in whatever is mapped at its address next."""

    key = "holdfast-reuse"
    title = "Holdfast without the retirement of addresses"
    crashes = 0
    tables = Tables.of(DRAIN).without(Fact.IOVAS_RETIRED)


class HoldfastBelieves(Holdfast):
    """An acknowledged reset is taken for quiet, of any card."""

    key = "holdfast-believes"
    title = "Holdfast, any reset believed"
    crashes = 0
    tables = Tables.of(DRAIN).without(Fact.RESET_TRUSTED)


class HoldfastHangUp(Holdfast):
    """Hang-up alone counts as death, while the process or a child of it can still post."""

    key = "holdfast-hang-up"
    title = "Holdfast, released on one sign of death"
    crashes = 0
    tables = Tables.of(DRAIN).without(Fact.CANNOT_POST)


class HoldfastLied(Holdfast):
    """A card whose firmware says that it is idle when it is not; addresses never used again."""

    key = "holdfast-lied"
    title = "Holdfast with a card that lies about rest"
    crashes = 0
    firmware_lies = True
    reuses_iovas = False


class KeeperAlone(Strategy):
    """A daemon that holds descriptors and memory, and nothing holds them when it dies."""

    key = "keeper-alone"
    family = "J"
    title = "a keeper, and nobody behind it"
    keeps = True
    holds = Hold.DRIVER
    at = At.DEATH
    measures = (AWAIT_QUIET, UNMAP, UNPIN)
    profiles = (Profile.NEW,)
    iommus = (Iommu.NONE, Iommu.STRICT)

    def fields(self) -> Iterator[Field]:
        yield from super().fields()
        yield Field("keeper", 2)

    def rules(self, w: World) -> Iterator[Rule]:
        for rule in super().rules(w):
            # Without it nobody opens the card, and nobody waits for it.
            yield _while_kept(w, rule) if rule.event == "prepare" or rule.fair else rule
        yield self._lost(w)

    def _lost(self, w: World) -> Rule:
        def lose(n: Batch) -> None:
            n[w.keeper] = Kept.LOST
            if w.setting.translated:
                # Last close of VFIO: bus master off, unmap, unpin (vfio_pci_core.c, type1.c).
                n[w.bme] = 0
                for p in w.processes:
                    w.disconnect(n, p, n.true())
            for p in w.processes:
                w.unhold(n, p)

        return Rule(
            "k_crash", "keeper", "the keeper is killed, and its descriptors are closed",
            lambda s: s.eq(w.keeper, Kept.UP), lose,
        )  # fmt: skip


def _while_kept(w: World, rule: Rule) -> Rule:
    def can(s: Batch) -> Mask:
        return rule.guard(s) & s.eq(w.keeper, Kept.UP)

    return replace(rule, guard=can)


VARIANTS = (
    KeeperAlone, Holdfast, HoldfastRevoke, HoldfastReuse, HoldfastBelieves, HoldfastHangUp,
    HoldfastLied, HoldfastRelease,
)  # fmt: skip
"""In the order of the table."""
