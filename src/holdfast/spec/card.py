# SPDX-License-Identifier: Apache-2.0
"""What the card and the fabric do by themselves.

Nothing obliges a card to finish, so none of its steps is fair; only what is on its way arrives
(``land``). A card may signal before its last write has left it (seen on real ones: habanalabs,
commit a70dc4440c8c), stop without a word, or go on writing to what it remembers.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.spec.layout import Batch, Mask
from holdfast.spec.rules import Rule
from holdfast.spec.setting import MANY
from holdfast.spec.world import ACTIVE, Dom, Eng, Hw, Sw, World


def rules(w: World) -> Iterator[Rule]:
    """All of them."""
    for d in w.descriptors:
        yield from _transfer(w, d)
        yield from _landing(w, d)
    if w.setting.bounds.hangs:
        yield from _failures(w)


def _runs(w: World, s: Batch) -> Mask:
    return s.eq(w.eng, Eng.RUN) & s.on(w.bme)


def _transfer(w: World, d: int) -> Iterator[Rule]:
    def fetch(n: Batch) -> None:
        n[w.hw[d]] = Hw.FETCHED
        for i in w.iovas:  # the address is looked up now, and may be remembered
            named = n.on(w.named[d, i])
            for caches in (w.tlb, w.cached):
                if caches:
                    empty = named & ~w.any(n, (caches[i, f] for f in w.frames))
                    for f in w.frames:
                        n.put(caches[i, f], 1, empty & n.on(w.pte[i, f]))

    yield Rule(
        "fetch", "device", f"the card fetches descriptor {d}",
        lambda s: s.eq(w.hw[d], Hw.POSTED) & _runs(w, s), fetch, {"d": d},
    )  # fmt: skip

    def write(step: Hw) -> Rule:
        last = step is Hw.WRITTEN

        def effect(n: Batch) -> None:
            n[w.hw[d]] = step
            n[w.fab[d]] = 1

        return Rule(
            "last_write" if last else "first_write", "device",
            f"the card sends the {'last' if last else 'first'} write of descriptor {d}",
            lambda s: s.eq(w.hw[d], step - 1) & _runs(w, s) & s.off(w.fab[d]) & s.off(w.reading[d]),
            effect, {"d": d},
        )  # fmt: skip

    yield write(Hw.INFLIGHT)
    yield write(Hw.WRITTEN)
    if w.reading:

        def read(n: Batch) -> None:
            n[w.hw[d]] = Hw.WRITTEN
            strike(w, n, d, "S1r")

        yield Rule(
            "dma_read", "device", f"the card reads what descriptor {d} names",
            lambda s: s.eq(w.hw[d], Hw.FETCHED) & _runs(w, s) & s.on(w.reading[d]), read, {"d": d},
        )  # fmt: skip

    if w.strategy.coarse:
        return  # nobody goes by signals

    def signal(n: Batch) -> None:
        n[w.sw[d]] = Sw.SIGNALLED

    yield Rule(
        "signal", "device", f"the card signals that descriptor {d} is complete",
        lambda s: s.eq(w.sw[d], Sw.PENDING) & s.among(w.hw[d], (Hw.INFLIGHT, Hw.WRITTEN))
        & s.eq(w.eng, Eng.RUN),
        signal, {"d": d},
    )  # fmt: skip


def _landing(w: World, d: int) -> Iterator[Rule]:
    def land(n: Batch) -> None:
        n[w.fab[d]] = 0
        strike(w, n, d, "S1")

    yield Rule(
        "land", "fabric", f"a write of descriptor {d} arrives in memory",
        lambda s: s.on(w.fab[d]), land, {"d": d}, fair=True,
    )  # fmt: skip


def strike(w: World, n: Batch, d: int, invariant: str) -> None:
    """An access reaches memory: whose is the frame now?

    Under an identity domain every frame is taken for reachable: the address means nothing any more.
    """
    for f in w.frames:
        hit = w.reaches(n, d, f)
        wrong = hit & (n.off(w.ref[f]) | n.off(w.target[d, f]) | n.off(w.fresh[d]))
        n.fail(invariant, wrong)
        innocent = n.on(w.other[f])
        for p in w.processes:
            waits = w.alive(n, p) & n.on(w.owner[d, p]) & n.off(w.touched[p])
            if invariant == "S1":
                n.fail("S5", hit & n.on(w.target[d, f]) & waits & n.off(w.map[p, f]))
            theirs = n.on(w.map[p, f]) | n.on(w.hold[p, f])
            innocent = innocent | (theirs & n.off(w.owner[d, p]))
        n.fail(f"{invariant} with a victim", wrong & innocent)
        for i in w.iovas:
            read = hit & n.on(w.named[d, i]) & n.on(w.pte[i, f]) & n.eq(w.dom, Dom.USER)
            n.put(w.tlb[i, f], 1, read & ~w.any(n, (w.tlb[i, g] for g in w.frames)))


def _failures(w: World) -> Iterator[Rule]:
    def busy(s: Batch) -> Mask:
        at_work = s.false()
        for d in w.descriptors:
            at_work |= s.among(w.hw[d], ACTIVE)
        return at_work & s.among(w.eng, (Eng.RUN, Eng.STOPPING))

    def become(state: Eng) -> Rule:
        def effect(n: Batch) -> None:
            n[w.eng] = state

        wild = state is Eng.HUNG_WILD
        return Rule(
            "wild" if wild else "hang", "device",
            "the card goes wild: it will go on writing to what it remembers" if wild
            else "the card hangs silently",
            busy, effect,
        )  # fmt: skip

    yield become(Eng.HUNG_SILENT)
    yield become(Eng.HUNG_WILD)

    def pulled(n: Batch) -> None:
        n[w.eng] = Eng.GONE
        n[w.bme] = 0
        w.abort(n)

    # In mid-transfer; at any other time it matters only to who reads logs.
    any_time = w.setting.bounds.crashes >= MANY
    yield Rule(
        "pull_out", "device", "the card is pulled out",
        (lambda s: s.ne(w.eng, Eng.GONE)) if any_time else busy, pulled,
    )  # fmt: skip

    for d in w.descriptors:

        def write(n: Batch, d: int = d) -> None:
            n[w.fab[d]] = 1

        def can(s: Batch, d: int = d) -> Mask:
            known = s.among(w.hw[d], (Hw.FETCHED, Hw.INFLIGHT, Hw.WRITTEN)) & s.off(w.fab[d])
            return known & s.eq(w.eng, Eng.HUNG_WILD) & s.on(w.bme)

        yield Rule(
            "wild_write", "device", f"the wild card writes where descriptor {d} led", can, write,
            {"d": d},
        )  # fmt: skip
