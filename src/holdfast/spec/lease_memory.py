# SPDX-License-Identifier: Apache-2.0
"""A lease's memory: taken, held by the anchor, journalled, mapped; and unmapped again.

Every change of a mapping's state goes by a row of :mod:`holdfast.keeper.map_state`, or it cannot be
made.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.keeper.map_state import MapEvent, MapState
from holdfast.keeper.state import Fact, State
from holdfast.spec.layout import Batch, Mask
from holdfast.spec.lease_words import LEASE, MAPPING, NUMBER, Effect, LeaseWords
from holdfast.spec.rules import Rule
from holdfast.spec.setting import Iommu
from holdfast.spec.world import Iova


class LeaseMemory(LeaseWords):
    """What the keeper does for the memory of one lease."""

    def memory_rules(self) -> Iterator[Rule]:
        """All of it, in the order of a mapping's life."""
        w = self.w
        for f in w.frames:
            yield self._alloc(f)
        yield self._acknowledge()
        for i in w.iovas or (None,):
            yield self._reserve(i)
        if w.setting.translated:
            yield self._map()
        yield self._confirm()
        yield from self._unmapping()
        if w.setting.translated:
            yield self._reinstate()

    # -- memory: anchor, journal, map, confirm ------------------------------------

    def _alloc(self, f: int) -> Rule:
        w, p = self.w, self.p

        def alloc(n: Batch) -> None:
            n[self.lease] = LEASE[State.ALIVE]
            n[self.mapping] = MAPPING[MapState.HELD]
            n[w.file[p]] = 1
            n[w.hold[p, f]] = 1
            n[w.charged[p]] = 1
            n[w.live[p]] = 1
            w.take(n, f)
            for g in w.frames:
                n[w.address[p, g]] = int(g == f)

        def can(s: Batch) -> Mask:
            new = s.off(self.lease) | (self._is(s, State.ALIVE) & s.off(self.mapping))
            opened = s.off(self.lease) | s.on(w.file[p])
            return new & opened & w.alive(s, p) & w.free(s, f) & self._admitted(s)

        return self._rule(
            "alloc", f"process {p} has a lease, and the keeper takes frame {f} for it", can, alloc,
            fair=False, about={"f": f},
        )  # fmt: skip

    def _admitted(self, s: Batch) -> Mask:
        w, count = self.w, s[self.lease] * 0
        for p in w.processes:
            count = count + s.eq(w.lease[p], LEASE[State.QUARANTINE])
            if p != self.p:  # a child uses what it inherited
                count = count + s.on(w.kin[self.p, p]) * w.strategy.quarantine_bound
        admitted: Mask = count < w.strategy.quarantine_bound
        return admitted

    def _acknowledge(self) -> Rule:
        w, p = self.w, self.p

        def acknowledge(n: Batch) -> None:
            n[w.anchored[p]] = 1
            self._advance(n, MapEvent.ACKNOWLEDGED)

        return self._rule(
            "anchor_ack", f"the anchor has a duplicate of the memory of process {p}",
            lambda s: self._may(s, MapEvent.ACKNOWLEDGED) & s.off(w.anchored[p]), acknowledge,
        )  # fmt: skip

    def _reserve(self, i: int | None) -> Rule:
        w, p = self.w, self.p

        def reserve(n: Batch) -> None:
            self._advance(n, MapEvent.RESERVE)
            if i is not None:
                n[w.iova[i]] = Iova.USED
                for j in w.iovas:
                    n[w.iova_of[p, j]] = int(j == i)

        def can(s: Batch) -> Mask:
            ready = self._may(s, MapEvent.RESERVE) & self._is(s, State.ALIVE)
            if i is not None:
                ready &= s.eq(w.iova[i], Iova.FREE)
                for j in range(i):
                    ready &= s.ne(w.iova[j], Iova.FREE)
            return ready

        at = "" if i is None else f" at IOVA {i}"
        return self._rule(
            "reserve", f"the mapping for process {p}{at} is written into the journal", can, reserve,
            about={} if i is None else {"i": i},
        )  # fmt: skip

    def _map(self) -> Rule:
        w, p = self.w, self.p

        def connect(n: Batch) -> None:
            for i in w.iovas:
                for f in w.frames:
                    where = n.on(w.iova_of[p, i]) & n.on(w.hold[p, f])
                    w.connect(n, i, f, where)

        return self._rule(
            "map", f"the IOMMU maps the memory of process {p}",
            lambda s: self._maps(s, MapState.RESERVED) & self._is(s, State.ALIVE)
            & ~self._in_table(s),
            connect,
        )  # fmt: skip

    def _confirm(self) -> Rule:
        w, p = self.w, self.p

        def confirm(n: Batch) -> None:
            self._advance(n, MapEvent.CONFIRM)
            n[w.window[p]] = 1
            for f in w.frames:
                held = n.on(w.hold[p, f])
                n.put(w.map[p, f], 1, held)
                n[w.ref[f]] = n[w.ref[f]] + held

        def can(s: Batch) -> Mask:
            ready = self._may(s, MapEvent.CONFIRM) & self._is(s, State.ALIVE) & w.alive(s, p)
            return ready & self._in_table(s) if w.setting.translated else ready

        return self._rule(
            "confirm", f"the mapping is confirmed; process {p} maps its memory and its doorbell",
            can, confirm,
        )  # fmt: skip

    # -- unmapping ------------------------------------------------------------

    def _unmapping(self) -> Iterator[Rule]:
        w, p = self.w, self.p
        strict = w.setting.iommu is Iommu.STRICT
        proven = (State.QUIET, State.UNMAPPED)
        unproven = (State.RESETTING, State.QUARANTINE)

        def settled(s: Batch) -> Mask:
            ready = self._is(s, *proven) & ~self._missing(s, Fact.FLUSHED)
            return ready & ~self._missing(s, Fact.CANNOT_POST) & s.off(w.late[p])

        def begin(s: Batch) -> Mask:
            ready = settled(s)
            if strict:
                ready |= self._is(s, *unproven)
            ready &= s.off(w.tried[p])
            return ready & self._may(s, MapEvent.UNMAP) & ~self._maps(s, MapState.UNMAPPING)

        yield self._rule(
            "unmapping", f"it is written down that the mapping for process {p} is being undone",
            begin, lambda n: self._advance(n, MapEvent.UNMAP),
        )  # fmt: skip

        def done(*, full: bool, slow: bool = False) -> Effect:
            def effect(n: Batch) -> None:
                n[w.tried[p]] = 1
                quiet = self._is(n, *proven)
                if full or slow:
                    w.disconnect(n, p, n.true(), flushed=full)
                if not full:
                    self._advance(n, MapEvent.FAILED)
                    return
                self._closed(n, quiet)

            return effect

        def under_way(s: Batch) -> Mask:
            at_all = settled(s) | self._is(s, *unproven) if strict else settled(s)
            return at_all & self._maps(s, MapState.UNMAPPING)

        text = f"the unmap for process {p}"
        yield self._rule(
            "unmap", f"{text} takes all of it",
            lambda s: under_way(s) & self._whole(s), done(full=True),
        )  # fmt: skip
        if w.setting.translated:
            yield self._rule(
                "unmap_part", f"{text} returns having taken less",
                lambda s: under_way(s) & self._in_table(s), done(full=False), fair=False,
            )  # fmt: skip
            yield self._rule(
                "inv_timeout", f"{text}: the invalidation times out",
                lambda s: under_way(s) & self._in_table(s), done(full=False, slow=True), fair=False,
            )  # fmt: skip
            yield self._rule(
                "unmap_none", f"{text} finds nothing left to take",
                lambda s: under_way(s) & ~self._whole(s) & ~self._in_table(s), done(full=False),
            )  # fmt: skip

        def nothing(n: Batch) -> None:
            n[w.tried[p]] = 1
            self._observe(n, Fact.UNMAPPED_IN_FULL)

        def none_left(s: Batch) -> Mask:
            gone = s.off(self.mapping) | self._maps(
                s, MapState.HELD, MapState.ANCHORED, MapState.CLOSED, MapState.RETIRED
            )
            return settled(s) & gone & s.off(w.tried[p])

        yield self._rule("no_mapping", f"there is nothing to unmap for process {p}", none_left,
                         nothing)  # fmt: skip

    def _whole(self, s: Batch) -> Mask:
        """An unmap takes what was there: what was only reserved may not be."""
        if not self.w.setting.translated:
            return s.true()
        stale = s.false()
        for i in self.w.iovas:
            for f in self.w.frames:
                stale |= s.on(self.w.iova_of[self.p, i]) & s.on(self.w.tlb[i, f])
        return self._in_table(s) | ~stale

    def _closed(self, n: Batch, quiet: Mask) -> None:
        """The mapping is gone; its address is free again if the card was proven quiet."""
        w, p = self.w, self.p
        if not self.tables.asks_for(Fact.IOVAS_RETIRED):
            quiet = n.true()
        was = n[self.mapping].copy()
        for event, where in ((MapEvent.DONE, quiet), (MapEvent.DONE_UNPROVEN, ~quiet)):
            for source, target in self._move(event):
                n.put(self.mapping, MAPPING[target], where & (was == MAPPING[source]))
        for i in w.iovas:
            mine = n.on(w.iova_of[p, i])
            n.put(w.iova[i], Iova.FREE if w.strategy.reuses_iovas else Iova.RETIRED, mine & quiet)
            n.put(w.iova[i], Iova.RETIRED, mine & ~quiet)
        unproven = ~self._is(n, State.QUIET, State.UNMAPPED)
        n[w.fact[p, NUMBER[Fact.UNMAPPED_IN_FULL]]] = 1
        for fact in (Fact.STRICTLY_UNMAPPED, Fact.IOVAS_RETIRED):
            cell = w.fact[p, NUMBER[fact]]
            n[cell] = n.on(cell) | unproven

    def _reinstate(self) -> Rule:
        w, p = self.w, self.p

        def reinstate(n: Batch) -> None:
            self._advance(n, MapEvent.REINSTATE)
            for i in w.iovas:
                n.put(w.iova[i], Iova.FREE, n.on(w.iova_of[p, i]))
            w.forget(n, p, w.rests(n, p))

        return self._rule(
            "reinstate",
            f"the card is seen at rest since: the address of process {p} is free again",
            lambda s: self._is(s, State.RELEASED) & self._may(s, MapEvent.REINSTATE)
            & self._seen_at_rest(s) & w.delivered(s) & self._nobody_posts(s)
            & w.strategy.reuses_iovas,
            reinstate,
        )  # fmt: skip
