# SPDX-License-Identifier: Apache-2.0
"""The measures that a driver can take before it lets memory go, each as one step.

Some only look (``AWAIT_...``), some act, and one does neither: ``GIVE_UP_WAITING`` is what a
timeout is. What each proves, if anything, is for the exploration to say.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from holdfast.spec.layout import Batch, Mask
from holdfast.spec.strategy import Measure
from holdfast.spec.world import ACTIVE, Dom, Eng, Hw, Iova, Know, Sw, World


def _always(_w: World, s: Batch, _p: int) -> Mask:
    return s.true()


def _nothing(_w: World, _n: Batch, _p: int) -> None:
    return


def _signalled(w: World, s: Batch, p: int) -> Mask:
    waiting = s.false()
    for d in w.descriptors:
        waiting |= s.on(w.owner[d, p]) & s.eq(w.sw[d], Sw.PENDING)
    return ~waiting


def _rests(w: World, s: Batch, p: int) -> Mask:
    return w.rests(s, p)


def _delivered(w: World, s: Batch, _p: int) -> Mask:
    return w.delivered(s)


def _rests_and_delivered(w: World, s: Batch, p: int) -> Mask:
    return w.rests(s, p) & w.delivered(s)


def _know_quiet(w: World, n: Batch, p: int) -> None:
    n.put(w.know[p], Know.QUIET_ACK, n.eq(w.know[p], Know.UNKNOWN))
    w.forget(n, p, n.true())


def _stop(w: World, n: Batch, _p: int) -> None:
    n.put(w.eng, Eng.STOPPING, n.eq(w.eng, Eng.RUN))


def _stopped(w: World, s: Batch, _p: int) -> Mask:
    return s.among(w.eng, (Eng.STOPPING, Eng.QUIET))  # one that hangs does not answer


def _acknowledge(w: World, n: Batch, _p: int) -> None:
    n[w.eng] = Eng.QUIET
    w.abort(n)


def _master_off(w: World, n: Batch, _p: int) -> None:
    n[w.bme] = 0


def reset_works(w: World, n: Batch, where: Mask | None = None) -> None:
    """A reset ends whatever the engine was doing, and clears what it remembers."""
    here = n.true() if where is None else where
    n.put(w.eng, Eng.RUN, here)
    for d in w.descriptors:
        n.put(w.hw[d], Hw.ABORTED, here & n.among(w.hw[d], (*ACTIVE, Hw.WRITTEN)))


def _reset(w: World, n: Batch, _p: int) -> None:
    """One that lies leaves the engine as it is, and bus mastering on."""
    works = n.off(w.lies) & n.ne(w.eng, Eng.GONE)
    reset_works(w, n, works)
    n.put(w.bme, 1, ~works)


def _believed_reset(w: World, n: Batch, p: int) -> None:
    _reset(w, n, p)
    for q in w.processes:
        n[w.know[q]] = Know.RESET_ACK


def _present(w: World, s: Batch, _p: int) -> Mask:
    return s.ne(w.eng, Eng.GONE)


def _is_trusted(w: World, s: Batch, _p: int) -> Mask:
    return s.off(w.lies) & s.ne(w.eng, Eng.GONE)


def _unmap(w: World, n: Batch, p: int) -> None:
    w.disconnect(n, p, n.true())
    state = Iova.FREE if w.strategy.reuses_iovas else Iova.RETIRED
    for i in w.iovas:
        n.put(w.iova[i], state, n.on(w.iova_of[p, i]))


def _proven(w: World, s: Batch, _p: int) -> Mask:
    can_be_reset = s.off(w.lies) & s.ne(w.eng, Eng.GONE)
    return (w.rests(s, _p) | can_be_reset) & w.delivered(s)


def _prove(w: World, n: Batch, p: int) -> None:
    by_itself = w.rests(n, p)
    again = n.take(np.arange(len(n)))
    _believed_reset(w, again, p)
    _know_quiet(w, n, p)
    n.words = [
        np.where(by_itself, mine, other) for mine, other in zip(n.words, again.words, strict=True)
    ]
    n.forget_columns()


def _unpin(w: World, n: Batch, p: int) -> None:
    for d in w.descriptors:
        for f in w.frames:
            may = w.may_access(n, d) & n.on(w.owner[d, p]) & w.reaches(n, d, f)
            n.fail("S8", may & n.on(w.quarantined[p, f]))
    for f in w.frames:
        mine = n.on(w.address[p, f])
        # Who marked pages reserved frees them itself: nobody else ever will.
        marked = mine & n.on(w.reserved[f])
        n.put(w.reserved[f], 0, marked)
        w.drop(n, f, marked & ~w.any(n, (w.map[q, f] for q in w.processes)))
        n.put(w.quarantined[p, f], 0, mine)
    w.unhold(n, p)
    n[w.charged[p]] = 0
    for f in w.frames:
        n[w.address[p, f]] = 0


def _block(w: World, n: Batch, _p: int) -> None:
    n[w.dom] = Dom.BLOCK


def _to_default(w: World, n: Batch, _p: int) -> None:
    n[w.dom] = Dom.DEFAULT
    w.master_on(n)


def _quarantine(w: World, n: Batch, p: int) -> None:
    for f in w.frames:
        n.put(w.quarantined[p, f], 1, n.on(w.hold[p, f]))


GIVE_UP_WAITING: Final = Measure("timeout", "gives up waiting", _always, _nothing)
AWAIT_SIGNALS: Final = Measure("await_signals", "has seen every completion", _signalled, _nothing)
AWAIT_REST: Final = Measure("idle", "sees the card at rest", _rests, _nothing)
FLUSH: Final = Measure(
    "flush_read", "reads from the card, and the answer comes", _delivered, _nothing
)
AWAIT_QUIET: Final = Measure(
    "quiet", "sees the card at rest and reads from it", _rests_and_delivered, _know_quiet
)
STOP: Final = Measure("stop", "tells the card to stop", _always, _stop)
AWAIT_STOP: Final = Measure(
    "stop_ack", "is told by the card that it has stopped", _stopped, _acknowledge, fair=False
)
MASTER_OFF: Final = Measure("bme_off", "clears bus master", _always, _master_off)
RESET_BELIEVED: Final = Measure(
    "reset", "resets the card, and the reset is acknowledged", _present, _believed_reset, fair=False
)
RESET_TRUSTED: Final = Measure(
    "reset", "resets the card, which is known to stop DMA", _is_trusted, _believed_reset, fair=False
)
UNMAP: Final = Measure("unmap", "takes the addresses of the buffer away", _always, _unmap)
UNPIN: Final = Measure("unpin", "lets the pages go", _always, _unpin)
BLOCK: Final = Measure(
    "block_domain", "attaches the card to a domain that lets nothing pass", _always, _block
)
TO_DEFAULT: Final = Measure(
    "default_domain",
    "gives the card back to the kernel's identity domain, where it may be a bus master again",
    _always,
    _to_default,
)
PROVE: Final = Measure(
    "prove", "sees the card at rest at last, or resets it", _proven, _prove, fair=False
)
QUARANTINE: Final = Measure("quarantine", "puts the pages into quarantine", _always, _quarantine)
