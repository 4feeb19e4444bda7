# SPDX-License-Identifier: Apache-2.0
"""The keeper's tables as the specification explores them: these very ones, or without a guard.

A *guard* is something that the keeper must have observed. Taken out, it is taken out everywhere:
of the rows that lead towards release and of the release gate. What is left is explored like the
original; that a counterexample appears shows that the guard is needed, and that the search would
notice if the code lost it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from holdfast.keeper.map_state import MAP_TABLE, MapEvent, MapState
from holdfast.keeper.state import FIRST_MEASURE, RELEASE_GATE, TABLE, Event, Fact, Gate, Row

DRAIN: Final = "drain"
REVOKE: Final = "revoke"
RELEASE: Final = "release"
POLICIES: Final = frozenset(str(policy) for policy in RELEASE_GATE)


@dataclass(frozen=True, slots=True)
class Tables:
    """What decides: rows of a lease's life, the release gate, rows of a mapping's life."""

    rows: tuple[Row, ...]
    gate: Gate
    first: Event
    """What a policy does first with a frozen lease."""
    mappings: tuple[tuple[MapState, MapEvent, MapState], ...] = MAP_TABLE

    @classmethod
    def of(cls, policy: str) -> Tables:
        """The tables that the keeper runs on, under this policy. StopIteration if there is none."""
        key = next(each for each in RELEASE_GATE if each == policy)
        return cls(TABLE, RELEASE_GATE[key], FIRST_MEASURE[key])

    def without(self, *facts: Fact) -> Tables:
        """Nobody asks whether these were observed."""
        gone = frozenset(facts)
        rows = tuple(replace(row, needs=row.needs - gone) for row in self.rows)
        ways = tuple(dict.fromkeys(way - gone for way in self.gate.ways))
        return replace(self, rows=rows, gate=Gate(ways))

    def without_anchor(self) -> Tables:
        """Memory may be written down and mapped before the anchor has acknowledged it."""
        early = (MapState.HELD, MapEvent.RESERVE, MapState.RESERVED)
        return replace(self, mappings=(*self.mappings, early))

    def asks_for(self, fact: Fact) -> bool:
        """Whether anything depends on this fact."""
        in_rows = any(fact in row.needs for row in self.rows)
        return in_rows or self.gate_asks_for(fact)

    def gate_asks_for(self, fact: Fact) -> bool:
        """Whether the release gate does."""
        return any(fact in way for way in self.gate.ways)

    def mapping(self, source: MapState, event: MapEvent) -> MapState | None:
        """Where a mapping goes on an event; None if the table has no such row."""
        found = [
            target for state, each, target in self.mappings if (state, each) == (source, event)
        ]
        return found[0] if found else None
