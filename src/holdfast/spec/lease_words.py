# SPDX-License-Identifier: Apache-2.0
"""What can be said of one lease, in the words that its rules are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from holdfast.keeper.map_state import MapEvent, MapState
from holdfast.keeper.state import Fact, State
from holdfast.spec.layout import Batch, Mask
from holdfast.spec.rules import Rule
from holdfast.spec.tables import Tables
from holdfast.spec.world import FACTS, LEASE_STATES, MAP_STATES, Kept, Proc, World

LEASE: Final = {state: number for number, state in enumerate(LEASE_STATES)}
MAPPING: Final = {state: number for number, state in enumerate(MAP_STATES)}
NUMBER: Final = {fact: number for number, fact in enumerate(FACTS)}
DYING: Final = tuple(LEASE[state] for state in State if state not in (State.ALIVE, State.RELEASED))

UNREACHABLE: Final = frozenset({Fact.FUNCTION_GONE, Fact.STRICTLY_UNMAPPED, Fact.IOVAS_RETIRED})
"""Who observed these asks nothing of the card any more."""

Guard = Callable[[Batch], Mask]
Effect = Callable[[Batch], None]


def running(w: World, s: Batch) -> Mask:
    """There is a keeper."""
    return s.among(w.keeper, (Kept.UP, Kept.AGAIN))


class LeaseWords:
    """The lease of process ``p``, and its one mapping."""

    def __init__(self, w: World, tables: Tables, p: int) -> None:
        self.w, self.tables, self.p = w, tables, p
        self.lease, self.mapping = w.lease[p], w.mapping[p]

    def _is(self, s: Batch, *states: State) -> Mask:
        return s.among(self.lease, [LEASE[state] for state in states])

    def _maps(self, s: Batch, *states: MapState) -> Mask:
        return s.among(self.mapping, [MAPPING[state] for state in states])

    def _fact(self, s: Batch, fact: Fact) -> Mask:
        return s.on(self.w.fact[self.p, NUMBER[fact]])

    def _seen_at_rest(self, s: Batch) -> Mask:
        """The driver, asked what is in flight, says: nothing."""
        if self.w.strategy.firmware_lies:
            return s.true()
        return self.w.rests(s, self.p)

    def _observe(self, n: Batch, *facts: Fact) -> None:
        for fact in facts:
            n[self.w.fact[self.p, NUMBER[fact]]] = 1

    def _missing(self, s: Batch, fact: Fact) -> Mask:
        """The keeper waits for a fact: no way through the gate that is open to it does without."""
        instead = s.false()
        for way in self.tables.gate.ways:
            if fact not in way:
                taken = s.true()
                for needed in way & UNREACHABLE:
                    taken &= self._fact(s, needed)
                instead |= taken
        return ~self._fact(s, fact) & ~instead

    def _rule(
        self,
        event: str,
        text: str,
        guard: Guard,
        effect: Effect,
        *,
        fair: bool = True,
        actor: str = "keeper",
        label: str = "",
        about: Mapping[str, int] | None = None,
    ) -> Rule:
        """Something that the keeper does for this lease, if there is a keeper."""
        args = {"p": self.p, **(about or {})}
        if actor != "keeper":
            return Rule(event, actor, text, guard, effect, args, fair, label)

        def can(s: Batch) -> Mask:
            return guard(s) & running(self.w, s)

        return Rule(event, actor, text, can, effect, args, fair, label)

    def _move(self, event: MapEvent) -> list[tuple[MapState, MapState]]:
        return [(source, target) for source, each, target in self.tables.mappings if each is event]

    def _advance(self, n: Batch, event: MapEvent) -> None:
        was = n[self.mapping].copy()
        for source, target in self._move(event):
            n.put(self.mapping, MAPPING[target], was == MAPPING[source])

    def _may(self, s: Batch, event: MapEvent) -> Mask:
        sources = [source for source, _ in self._move(event)]
        return self._maps(s, *sources) if sources else s.false()

    def _in_table(self, s: Batch) -> Mask:
        """The page table of the IOMMU has the mapping."""
        w, found = self.w, s.false()
        for i in w.iovas:
            for f in w.frames:
                found |= s.on(w.iova_of[self.p, i]) & s.on(w.pte[i, f]) & s.on(w.hold[self.p, f])
        return found

    def _signs(self, s: Batch) -> tuple[Mask, Mask]:
        """Hang-up and pidfd."""
        return self.w.closed(s, self.p), s.ge(self.w.proc[self.p], Proc.ZOMBIE)

    def _nobody_posts(self, s: Batch) -> Mask:
        if not self.tables.gate_asks_for(Fact.CANNOT_POST):
            return s.true()
        hung_up, dead = self._signs(s)
        return hung_up & dead
