# SPDX-License-Identifier: Apache-2.0
"""What must never be, as predicates over states. What a step must not do stands with the step.

S1, S1r and S5 (:func:`holdfast.spec.card.strike`), S3 (``World.unhold``), S4'
(``World.connect``), S7 (``World.master_on``) and S8 are judged where the step is taken.
"""

from __future__ import annotations

from typing import Final

from holdfast.keeper.map_state import REACHABLE
from holdfast.spec.layout import Batch, Mask
from holdfast.spec.world import ACTIVE, MAP_STATES, Eng, Hw, Know, World

TEXTS: Final = {
    "S1": "a write lands in a frame that is free, or not the one any more that it was meant for",
    "S1r": "the same for a read: somebody else's memory is disclosed",
    "S2": "a frame went while a descriptor that can reach it was not done",
    "S3": "pages were let go while they could still be reached",
    "S4": "a free frame is the target of a descriptor or of a write on its way",
    "S4'": "an address was mapped to another frame while a descriptor that names it lived",
    "S5": "the process lives and waits for its data, which lands in a page that is not its own",
    "S6": "a frame's count is lower than those who count on it",
    "S7": "bus mastering came on while something of an earlier owner could go on",
    "S8": "a page left quarantine without proof",
    "S9": "the card was believed quiet and was not",
    "S10": "the card could reach a page of which the journal said nothing",
    "S11": "pinned memory is charged to nobody",
}
"""Every invariant in a sentence, of its breach."""
FINAL: Final = frozenset({"S1", "S1r"})
"""After these nothing is claimed any more: memory is corrupt (or disclosed)."""


JOURNALLED: Final = tuple(MAP_STATES.index(state) for state in sorted(REACHABLE))
"""States of a mapping of which the journal says that the card may reach it."""


def judge(w: World, s: Batch) -> dict[str, Mask]:
    """Where which state invariant is broken."""
    broken = {"S2": s.false(), "S4": s.false(), "S6": s.false(), "S9": s.false()}
    for d in w.descriptors:
        access = w.may_access(s, d)
        for f in w.frames:
            reached = access & w.reaches(s, d, f)
            free = s.off(w.ref[f])
            broken["S4"] |= reached & free
            mine = s.on(w.target[d, f])
            broken["S2"] |= access & mine & w.reaches(s, d, f) & (free | s.off(w.fresh[d]))
    for f in w.frames:
        count = s[w.other[f]]
        for p in w.processes:
            count = count + s[w.map[p, f]] + s[w.hold[p, f]]
        broken["S6"] |= (s[w.ref[f]] < count) & s.off(w.reserved[f])
    for p in w.processes:
        quiet = s.eq(w.know[p], Know.QUIET_ACK)
        for d in w.descriptors:
            owner = s.on(w.owner[d, p])
            at_work = (s.among(w.hw[d], ACTIVE) & s.ne(w.eng, Eng.GONE)) | s.on(w.fab[d])
            at_work |= s.eq(w.eng, Eng.HUNG_WILD) & s.eq(w.hw[d], Hw.WRITTEN)
            broken["S9"] |= quiet & owner & at_work
    if w.mapping:
        broken["S10"] = _unwritten(w, s)
    if w.charged:
        broken["S11"] = s.false()
        for p in w.processes:
            broken["S11"] |= w.holds_any(s, p) & s.off(w.charged[p])
    return broken


def _unwritten(w: World, s: Batch) -> Mask:
    """The IOMMU has a mapping of which the journal does not say that it may."""
    found = s.false()
    for p in w.processes:
        written = s.among(w.mapping[p], JOURNALLED)
        for i in w.iovas:
            for f in w.frames:
                mapped = s.on(w.pte[i, f]) & s.on(w.iova_of[p, i]) & s.on(w.hold[p, f])
                found |= mapped & ~written
    return found
