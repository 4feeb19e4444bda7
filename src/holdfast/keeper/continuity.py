# SPDX-License-Identifier: Apache-2.0
"""What a keeper has that outlives it, and what it got from the one before it."""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.dma.slab import SlabMemory
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.held import Scope
from holdfast.keeper.journal import Contents, HostRecord, Journal


@dataclass(slots=True)
class Continuity:
    """The anchor's place for one function, its journal, and the counters in it."""

    scope: Scope
    journal: Journal
    counters: HostRecord = field(default_factory=HostRecord)
    safe_mode: bool = False

    def next_lease(self) -> int:
        """A number that no lease of any of these keepers ever had."""
        number = self.counters.last_lease + 1
        self.counters = HostRecord(number, self.counters.successions)
        self.journal.host(self.counters)
        return number


@dataclass(slots=True)
class Inherited:
    """A function ready to be kept. Without ``contents`` nothing of a predecessor is left."""

    host: FunctionHost
    continuity: Continuity
    contents: Contents | None = None
    lost: list[SlabMemory] = field(default_factory=list)
    """Memory of which only that it exists is known: its journal cannot be relied on."""
    wreck: bool = False
    """That journal existed: whatever may still be mapped must go, and nothing else is known."""
