# SPDX-License-Identifier: Apache-2.0
"""The liveness properties L1 to L6, as causes and consequences over the states of a model."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.keeper.state import Fact, State
from holdfast.spec.layout import Batch, Mask
from holdfast.spec.lease_words import DYING, LEASE, NUMBER
from holdfast.spec.liveness import LeadsTo
from holdfast.spec.world import Eng, Kept, Know, Proc, World


def promises(w: World, s: Batch) -> Iterator[LeadsTo]:
    """All that mean something in this model, for each process."""
    for p in w.processes:
        dead = s.ge(w.proc[p], Proc.KILLED)
        kept = _keeps(w, s, p)
        away = _in_quarantine(w, s, p)
        yield LeadsTo("L1", dead & kept, ~kept | away)
        last = Proc.ZOMBIE if w.strategy.coarse else Proc.REAPED
        yield LeadsTo("L2", dead, s.ge(w.proc[p], last))
        hung = s.among(w.eng, (Eng.HUNG_SILENT, Eng.HUNG_WILD))
        was_reset = s.eq(w.know[p], Know.RESET_ACK) | _fact(w, s, p, Fact.RESET_TRUSTED)
        yield LeadsTo("L4", hung & dead & kept, was_reset | away | ~kept)
        if w.strategy.quarantines:
            proven = away & was_reset & dead
            failed_anew = away & ~was_reset
            yield LeadsTo("L6", proven, ~kept | failed_anew)
        if w.setting.translated and w.lease[p].bits:
            stale = s.false()
            for i in w.iovas:
                mine = s.on(w.iova_of[p, i])
                cached = w.any(s, (w.tlb[i, f] for f in w.frames))
                stale |= mine & cached & ~w.any(s, (w.pte[i, f] for f in w.frames))
            dying = s.among(w.lease[p], DYING)
            yield LeadsTo("L5", stale & dying & dead & kept, away | was_reset | ~stale)
    if w.keeper.bits:
        down = s.eq(w.keeper, Kept.DOWN)
        yield LeadsTo("L3", down, ~down)


def _keeps(w: World, s: Batch, p: int) -> Mask:
    """Something besides the process's own page table keeps its pages."""
    kept = w.holds_any(s, p) | s.on(w.ghost[p])
    for f in w.frames:
        kept |= s.on(w.reserved[f]) & s.on(w.address[p, f])
    return kept


def _in_quarantine(w: World, s: Batch, p: int) -> Mask:
    marked = w.any(s, (w.quarantined[p, f] for f in w.frames))
    return marked | (s.eq(w.lease[p], LEASE[State.QUARANTINE]) & s.on(w.lease[p]))


def _fact(w: World, s: Batch, p: int, fact: Fact) -> Mask:
    return s.on(w.fact[p, NUMBER[fact]])
