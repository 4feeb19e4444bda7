# SPDX-License-Identifier: Apache-2.0
"""Processes that use a card through a driver, and the driver that runs a strategy's measures."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.spec import measures
from holdfast.spec.layout import Batch, Mask
from holdfast.spec.rules import Rule
from holdfast.spec.strategy import At, Hold
from holdfast.spec.world import Eng, Hw, Iova, Know, Proc, Sw, World


def rules(w: World) -> Iterator[Rule]:
    """All of them."""
    for p in w.processes:
        for f in w.frames:
            for i in w.iovas or (None,):
                yield _prepare(w, p, f, i)
        yield from posts(w, p)
        yield from _letting_go(w, p)
        if w.strategy.ghost:
            yield _ghost_ends(w, p)
        if w.strategy.unpins_when_done:
            yield _done(w, p)
    for d in w.descriptors:
        yield reap(w, d)


def _prepare(w: World, p: int, f: int, i: int | None) -> Rule:
    strategy = w.strategy
    owned = strategy.holds is Hold.DRIVER

    def prepare(n: Batch) -> None:
        w.master_on(n)
        n[w.eng] = Eng.RUN
        n[w.file[p]] = 1
        n[w.window[p]] = 1
        n[w.address[p, f]] = 1
        n[w.live[p]] = 1
        n[w.touched[p]] = 0
        n[w.script[p]] = 0
        n[w.know[p]] = Know.UNKNOWN
        n[w.charged[p]] = 1
        n[w.ghost[p]] = 1
        n[w.reserved[f]] = 1
        if owned:
            n[w.map[p, f]] = 1
            w.take(n, f)
        if strategy.pins:
            n[w.hold[p, f]] = 1
            w.take(n, f)
        if i is not None:
            for j in w.iovas:
                n[w.iova_of[p, j]] = int(j == i)
            w.connect(n, i, f)

    def can(s: Batch) -> Mask:
        ready = w.alive(s, p) & ~w.registered(s, p) & ~_given_up(w, s)
        for parent in w.processes:
            if parent != p:
                ready &= s.off(w.kin[p, parent])  # a child uses what it inherited
        ready &= w.free(s, f) if owned else s.on(w.map[p, f])
        if strategy.pins and not owned and not w.setting.old:
            # pin_user_pages for writing breaks copy on write first: the page is the process's own
            ready &= ~w.any(s, (w.map[q, f] for q in w.processes if q != p))
        ready &= s.among(w.eng, (Eng.RUN, Eng.QUIET)) & ~_under_way(w, s)
        if i is not None:
            ready &= s.eq(w.iova[i], Iova.FREE)
            ready &= ~w.any(s, (w.tlb[i, g] for g in w.frames))  # flushed before it is used again
            for j in range(i):
                ready &= s.ne(w.iova[j], Iova.FREE)
        return ready

    at = "" if i is None else f" at IOVA {i}"
    return Rule(
        "prepare", f"P{p}",
        f"process {p} opens the card and has frame {f} registered{at} ({strategy.title})",
        can, prepare, {"p": p, "f": f} | ({} if i is None else {"i": i}),
    )  # fmt: skip


def _given_up(w: World, s: Batch) -> Mask:
    """As much is in quarantine as may be: nothing new is admitted."""
    if not w.quarantined:
        return s.false()
    count = s[w.ref[0]] * 0
    for p in w.processes:
        for f in w.frames:
            count = count + s[w.quarantined[p, f]]
    return count >= w.strategy.quarantine_bound


def _under_way(w: World, s: Batch) -> Mask:
    """Some owner's measures are begun and not done: the card is not given out meanwhile."""
    found = s.false()
    total = len(w.strategy.measures)
    if w.script:
        for p in w.processes:
            found |= (s[w.script[p]] > 0) & s.lt(w.script[p], total)
    return found


def posts(w: World, p: int) -> Iterator[Rule]:
    """Whoever can ring the doorbell for the buffer of ``p`` posts: itself, or a child of it."""
    for q in w.processes:
        for d in w.descriptors:
            for reading in (False, True) if w.reading else (False,):
                yield _post(w, p, q, d, reading=reading)


def _post(w: World, p: int, q: int, d: int, *, reading: bool) -> Rule:
    def post(n: Batch) -> None:
        n[w.hw[d]] = Hw.POSTED
        n[w.sw[d]] = Sw.PENDING
        n[w.owner[d, p]] = 1
        n[w.fresh[d]] = n[w.live[p]]
        n[w.know[p]] = Know.UNKNOWN
        n[w.reading[d]] = int(reading)
        for f in w.frames:
            n[w.target[d, f]] = n[w.address[p, f]]
        for i in w.iovas:
            n[w.named[d, i]] = n[w.iova_of[p, i]]

    def can(s: Batch) -> Mask:
        ready = w.registered(s, p) & w.alive(s, q) & s.on(w.window[q])
        ready &= s.eq(w.sw[d], Sw.IDLE) & s.eq(w.hw[d], Hw.NONE)
        if d:
            ready &= s.ne(w.sw[d - 1], Sw.IDLE)
        if q != p:
            ready &= s.on(w.kin[q, p])
        return ready

    what = "read from" if reading else "write to"
    whose = "its buffer" if p == q else f"the buffer of process {p}"
    return Rule(
        "post", f"P{q}", f"process {q} posts descriptor {d}: the card shall {what} {whose}",
        can, post, {"p": p, "q": q, "d": d},
    )  # fmt: skip


def reap(w: World, d: int) -> Rule:
    """A living owner takes note of a completion."""

    def take(n: Batch) -> None:
        n[w.sw[d]] = Sw.REAPED

    def can(s: Batch) -> Mask:
        lives = s.false()
        for p in w.processes:
            lives |= s.on(w.owner[d, p]) & w.alive(s, p)
        return lives & s.eq(w.sw[d], Sw.SIGNALLED)

    return Rule("reap", "process", f"the completion of descriptor {d} is taken note of", can, take,
                {"d": d})  # fmt: skip


def _letting_go(w: World, p: int) -> Iterator[Rule]:
    at = w.strategy.at
    who = {At.RELEASE: "driver, at release", At.HOOK: "driver, before the pages go"}
    for number, measure in enumerate(w.strategy.measures):

        def step(n: Batch, number: int = number) -> None:
            w.strategy.measures[number].effect(w, n, p)
            n[w.script[p]] = number + 1

        def can(s: Batch, number: int = number) -> Mask:
            begun = s.eq(w.script[p], number) & _begins(w, s, p)
            if not number:
                begun &= w.registered(s, p)
            return begun & w.strategy.measures[number].guard(w, s, p)

        yield Rule(
            measure.event, "driver",
            f"the {who.get(at, 'keeper')}, for process {p}: {measure.text}",
            can, step, {"p": p}, fair=measure.fair,
        )  # fmt: skip


def _begins(w: World, s: Batch, p: int) -> Mask:
    match w.strategy.at:
        case At.RELEASE:
            closed = w.closed(s, p) & s.ge(w.proc[p], Proc.FILED)
            if w.strategy.ghost_has_file:
                closed &= s.off(w.ghost[p])
            return closed
        case At.HOOK:
            return s.ge(w.proc[p], Proc.KILLED)
        case At.DEATH:
            return w.closed(s, p) & s.ge(w.proc[p], Proc.ZOMBIE)


def _ghost_ends(w: World, p: int) -> Rule:
    def end(n: Batch) -> None:
        n[w.ghost[p]] = 0
        w.zap(n, p)

    def can(s: Batch) -> Mask:
        over = s.on(w.ghost[p]) & s.ge(w.proc[p], Proc.ZAPPED)
        if w.strategy.ghost_has_file:  # it waits for release, which waits for its own descriptor
            return over & s.false()
        return over & w.rests(s, p) & w.delivered(s)

    return Rule(
        "ghost_ends", "ghost", f"the ghost of process {p} sees the card at rest and ends", can, end,
        {"p": p}, fair=True,
    )  # fmt: skip


def _done(w: World, p: int) -> Rule:
    def done(n: Batch) -> None:
        measures.AWAIT_QUIET.effect(w, n, p)
        measures.UNPIN.effect(w, n, p)

    def can(s: Batch) -> Mask:
        over = w.alive(s, p) & w.registered(s, p) & w.rests(s, p) & w.delivered(s)
        some = s.false()
        for d in w.descriptors:
            mine = s.on(w.owner[d, p])
            some |= mine & s.eq(w.sw[d], Sw.REAPED)
            over &= ~mine | s.eq(w.sw[d], Sw.REAPED)
        return over & some

    return Rule(
        "unpin", "driver", f"the driver, its work for process {p} being done, lets the pages go",
        can, done, {"p": p},
    )  # fmt: skip
