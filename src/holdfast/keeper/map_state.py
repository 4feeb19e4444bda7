# SPDX-License-Identifier: Apache-2.0
"""The life of one mapping as a table: anchored → reserved → mapped → unmapping → closed. Pure.

Facts. A process can end between any two instructions, kernels and vfio-user servers cannot list
their mappings, and memory whose last descriptor goes is freed, mapped or not.

Consequence. Before the function can reach memory, another process must hold that memory, and the
record of the mapping must exist; before the record of an unmap says that it is done, the record
that it was begun must exist.

Choice. The rows below, and nothing else. A mapping that was only *reserved* may or may not exist,
so an unmap that finds nothing is right; one that is *mapped* must be found in full; one whose
*unmapping* was begun by a keeper that died may be gone.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class MapState(enum.IntEnum):
    """Where a mapping is. The numbers are the journal's."""

    HELD = 0  # memory or an address that only the keeper knows of
    ANCHORED = 1
    RESERVED = 2
    MAPPED = 3
    UNMAPPING = 4
    RETIRED = 5  # gone, but its IOVAs must not be handed out again yet
    CLOSED = 6


class MapEvent(enum.StrEnum):
    """What happens to a mapping."""

    ACKNOWLEDGED = "the anchor holds what keeps the pages"
    RESERVE = "written down"
    CONFIRM = "the map call returned"
    UNMAP = "about to be unmapped"
    FAILED = "the unmap took less than was mapped"
    DONE = "the unmap took exactly what was mapped"
    DONE_UNPROVEN = "unmapped, but the function was not proven quiet"
    REINSTATE = "the function was proven quiet since"


MAP_TABLE: tuple[tuple[MapState, MapEvent, MapState], ...] = (
    (MapState.HELD, MapEvent.ACKNOWLEDGED, MapState.ANCHORED),
    (MapState.ANCHORED, MapEvent.RESERVE, MapState.RESERVED),
    (MapState.RESERVED, MapEvent.CONFIRM, MapState.MAPPED),
    (MapState.RESERVED, MapEvent.UNMAP, MapState.UNMAPPING),
    (MapState.MAPPED, MapEvent.UNMAP, MapState.UNMAPPING),
    (MapState.UNMAPPING, MapEvent.UNMAP, MapState.UNMAPPING),  # by a successor
    (MapState.UNMAPPING, MapEvent.FAILED, MapState.MAPPED),
    (MapState.UNMAPPING, MapEvent.DONE, MapState.CLOSED),
    (MapState.UNMAPPING, MapEvent.DONE_UNPROVEN, MapState.RETIRED),
    (MapState.RETIRED, MapEvent.REINSTATE, MapState.CLOSED),
)
"""Every edge a mapping can take: ``(source, event, target)``."""

_INDEX = {(source, event): target for source, event, target in MAP_TABLE}

REACHABLE = frozenset({MapState.RESERVED, MapState.MAPPED, MapState.UNMAPPING})
"""States in which the function may reach the memory."""


class IllegalMapping(Exception):
    """The event has no row in this state."""


@dataclass(frozen=True, slots=True)
class Unmapped:
    """What an unmap took away, against what had to be there."""

    state: MapState
    """Before the unmap."""
    size: int
    taken: int

    @property
    def in_full(self) -> bool:
        """Whether nothing of the mapping is left."""
        return self.taken == self.size or (self.taken == 0 and self.state is not MapState.MAPPED)


def advance(state: MapState, event: MapEvent) -> MapState:
    """The state after an event; IllegalMapping if the table has no such row."""
    target = _INDEX.get((state, event))
    if target is None:
        raise IllegalMapping(f"no row for {event!r} in state {state.name}")
    return target
