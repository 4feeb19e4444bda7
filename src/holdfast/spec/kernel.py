# SPDX-License-Identifier: Apache-2.0
"""What the kernel does to processes and their pages.

The end of a process is the order of ``do_exit``: memory before files, in 2.0 (``kernel/exit.c``:
``__exit_mm``, then ``__exit_files``) as today (``exit_mm``, ``exit_files``, ``exit_task_work`` with
the final ``release``, ``exit_notify``). What differs is who hears of it before the pages go: a
notifier today; in 2.0 only an area below the buffer, whose ``close`` runs first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from holdfast.spec.layout import Batch, Mask
from holdfast.spec.rules import Rule
from holdfast.spec.setting import Iommu
from holdfast.spec.world import Proc, World


def rules(w: World) -> Iterator[Rule]:
    """All of them."""
    for p in w.processes:
        yield from _beginning(w, p)
        yield from _ending(w, p)
        if w.setting.bounds.paging and w.strategy.private:
            yield from _paging(w, p)
        if w.setting.bounds.forks:
            yield from _forks(w, p)
    for f in w.frames:
        yield _another(w, f)
    if w.setting.iommu is Iommu.LAZY:
        yield _late_flush(w)


def _late_flush(w: World) -> Rule:
    """The queue of deferred invalidations is worked off (drivers/iommu/dma-iommu.c)."""

    def stale(s: Batch, i: int) -> Mask:
        return w.any(s, (w.tlb[i, f] for f in w.frames)) & ~w.any(
            s, (w.pte[i, f] for f in w.frames)
        )

    def flush(n: Batch) -> None:
        for i in w.iovas:
            gone = stale(n, i)
            for f in w.frames:
                n.put(w.tlb[i, f], 0, gone)

    def can(s: Batch) -> Mask:
        found = s.false()
        for i in w.iovas:
            found |= stale(s, i)
        return found

    return Rule(
        "iotlb_inv", "kernel", "the deferred invalidation of the IOTLB is done", can, flush,
        fair=True,
    )  # fmt: skip


def _beginning(w: World, p: int) -> Iterator[Rule]:
    if not w.strategy.private:

        def start(n: Batch) -> None:
            n[w.proc[p]] = Proc.ALIVE

        yield Rule(
            "arrive", f"P{p}", f"process {p} starts", lambda s: s.eq(w.proc[p], Proc.ABSENT), start,
            {"p": p},
        )  # fmt: skip
        return
    for f in w.frames:

        def begin(n: Batch, f: int = f) -> None:
            n[w.proc[p]] = Proc.ALIVE
            n[w.map[p, f]] = 1
            w.take(n, f)

        def can(s: Batch, f: int = f) -> Mask:
            return s.eq(w.proc[p], Proc.ABSENT) & w.free(s, f)

        yield Rule(
            "arrive", f"P{p}", f"process {p} starts and gets frame {f} for its buffer", can, begin,
            {"p": p, "f": f},
        )  # fmt: skip


def _another(w: World, f: int) -> Rule:
    def take(n: Batch) -> None:
        n[w.other[f]] = 1
        w.take(n, f)

    def can(s: Batch) -> Mask:
        free = w.free(s, f)
        if w.strategy.coarse:  # who takes it before the card was told of it takes no part
            free &= w.any(s, (w.address[p, f] for p in w.processes))
        return free

    return Rule(
        "other_takes", "another", f"an innocent process is given frame {f}", can, take, {"f": f}
    )


def _ending(w: World, p: int) -> Iterator[Rule]:
    def kill(n: Batch) -> None:
        n[w.proc[p]] = Proc.KILLED
        n[w.kills] = n[w.kills] + ~w.hung_up(n, p)

    yield Rule(
        "kill", f"P{p}", f"process {p} is killed",
        lambda s: w.alive(s, p) & (s.lt(w.kills, w.setting.bounds.kills) | w.hung_up(s, p)), kill,
        {"p": p},
    )  # fmt: skip

    def hook(n: Batch) -> None:
        n[w.proc[p]] = Proc.HOOKED

    coarse = w.strategy.coarse
    first = "the areas below its buffer are closed" if w.setting.old else "its notifiers are called"
    if not coarse:
        yield _exit(w, p, "hook", Proc.KILLED, hook, first, w.strategy.lets_pages_go)

    def zap(n: Batch) -> None:
        n[w.proc[p]] = Proc.ZAPPED
        w.zap(n, p, n.off(w.ghost[p]))  # the last user of an address space frees its pages
        w.strategy.on_memory_gone(w, n, p)
        if coarse:
            close(n)

    begin = Proc.KILLED if coarse else Proc.HOOKED
    yield _exit(w, p, "zap", begin, zap, "the kernel takes its pages")

    def close(n: Batch) -> None:
        n[w.proc[p]] = Proc.CLOSED
        n[w.window[p]] = 0

    if not coarse:
        yield _exit(w, p, "close", Proc.ZAPPED, close, "its window to the card is closed")

    def files(n: Batch) -> None:
        n[w.proc[p]] = Proc.FILED
        n[w.file[p]] = 0

    yield _exit(w, p, "files", Proc.CLOSED, files, "its files are closed")

    def done(n: Batch) -> None:
        n[w.proc[p]] = Proc.ZOMBIE

    yield _exit(w, p, "zombie", Proc.FILED, done, "its exit is announced", w.strategy.lets_exit)

    def reap(n: Batch) -> None:
        n[w.proc[p]] = Proc.REAPED

    if coarse:
        return  # what is left of it is nobody's concern
    yield _exit(w, p, "reap_process", Proc.ZOMBIE, reap, "its parent has waited for it")


def _exit(
    w: World,
    p: int,
    event: str,
    source: Proc,
    effect: Callable[[Batch], None],
    text: str,
    also: Callable[[World, Batch, int], Mask] | None = None,
) -> Rule:
    """One step of the end of a process."""

    def can(s: Batch) -> Mask:
        ready = s.eq(w.proc[p], source)
        return ready if also is None else ready & also(w, s, p)

    return Rule(event, "kernel", f"process {p}: {text}", can, effect, {"p": p}, fair=True)


def _paging(w: World, p: int) -> Iterator[Rule]:
    def lets_go(n: Batch) -> None:
        w.zap(n, p)
        n[w.touched[p]] = 1

    def can(s: Batch) -> Mask:
        # After an exec a ghost has the address space for itself.
        own = s.off(w.ghost[p]) | s.on(w.window[p])
        return w.alive(s, p) & w.maps_any(s, p) & own & w.strategy.lets_zap(w, s, p)

    yield Rule("munmap", f"P{p}", f"process {p} unmaps its buffer", can, lets_go, {"p": p})

    def execute(n: Batch) -> None:
        w.zap(n, p, n.off(w.ghost[p]))
        n[w.window[p]] = 0
        n[w.touched[p]] = 1

    yield Rule("exec", f"P{p}", f"process {p} executes another program", can, execute, {"p": p})
    if w.setting.old:
        for f in w.frames:
            yield _swap(w, p, f)
        return
    yield Rule(
        "dontneed", f"P{p}", f"process {p} discards its buffer (MADV_DONTNEED)", can, lets_go,
        {"p": p},
    )  # fmt: skip

    def reap(n: Batch) -> None:
        w.zap(n, p)

    yield Rule(
        "oom_reap", "kernel", f"the OOM reaper takes the pages of process {p}",
        lambda s: s.eq(w.proc[p], Proc.KILLED) & w.maps_any(s, p) & w.strategy.lets_zap(w, s, p),
        reap, {"p": p},
    )  # fmt: skip
    for f in w.frames:
        for g in w.frames:
            if f != g:
                yield _migrate(w, p, f, g)


def _swap(w: World, p: int, f: int) -> Rule:
    def swap(n: Batch) -> None:
        w.clear_entry(n, p, f, n.true())

    def can(s: Batch) -> Mask:
        # try_to_swap_out (mm/vmscan.c) leaves reserved pages, and locked areas; since 2.0.34 it
        # ignores the count. (Up to 2.0.33 a raised count kept a dirty page in memory, too.)
        ready = w.alive(s, p) & s.on(w.map[p, f]) & s.off(w.reserved[f])
        return ready & s.off(w.address[p, f]) if w.strategy.locks else ready

    return Rule(
        "swap", "kernel", f"frame {f} of process {p} is swapped out", can, swap, {"p": p, "f": f}
    )


def _migrate(w: World, p: int, f: int, g: int) -> Rule:
    def move(n: Batch) -> None:
        w.clear_entry(n, p, f, n.true())
        n[w.map[p, g]] = 1
        w.take(n, g)

    # mm/migrate.c: only if every reference to the frame is a mapping that can be replaced. A lock
    # (mlock) does not prevent it.
    return Rule(
        "migrate", "kernel", f"the kernel moves the buffer of process {p} from frame {f} to {g}",
        lambda s: w.alive(s, p) & s.on(w.map[p, f]) & s.eq(w.ref[f], 1) & w.free(s, g)
        & w.strategy.lets_zap(w, s, p),
        move, {"p": p, "f": f, "g": g},
    )  # fmt: skip


def _forks(w: World, p: int) -> Iterator[Rule]:
    for q in w.processes:
        if q == p:
            continue

        def fork(n: Batch, q: int = q) -> None:
            n[w.forks] = 1
            n[w.proc[q]] = Proc.ALIVE
            n[w.kin[q, p]] = n[w.file[p]]
            n[w.file[q]] = n[w.file[p]]
            if not w.strategy.hides_window:
                # Whoever inherits the window inherits the file with it. A process that gives the
                # one away and has closed the other is not modelled: see "what is assumed".
                n[w.window[q]] = n.on(w.window[p]) & n.on(w.file[p])
            for f in w.frames:
                shared = n.on(w.map[p, f])
                if w.strategy.fork_copies:  # the child gets a copy of a pinned page (mm/memory.c)
                    shared &= n.off(w.hold[p, f])
                n.put(w.map[q, f], 1, shared)
                # copy_one_pte of 2.0 copies the entry of a reserved page and does not count it
                counted = shared & n.off(w.reserved[f])
                n[w.ref[f]] = n[w.ref[f]] + counted

        def can(s: Batch, q: int = q) -> Mask:
            return w.alive(s, p) & s.eq(w.proc[q], Proc.ABSENT) & s.off(w.forks)

        yield Rule("fork", f"P{p}", f"process {p} forks process {q}", can, fork, {"p": p, "q": q})
    if not w.strategy.private:
        return  # shared memory is not copied on write
    for f in w.frames:
        for g in w.frames:
            if f != g:
                yield _copy_on_write(w, p, f, g)


def _copy_on_write(w: World, p: int, f: int, g: int) -> Rule:
    def copy(n: Batch) -> None:
        w.clear_entry(n, p, f, n.true())
        n[w.map[p, g]] = 1
        w.take(n, g)

    def can(s: Batch) -> Mask:
        shared = s.false()
        for q in w.processes:
            if q != p:
                shared |= s.on(w.map[q, f])
        return (
            w.alive(s, p) & s.on(w.map[p, f]) & shared & w.free(s, g) & w.strategy.lets_zap(w, s, p)
        )

    return Rule(
        "cow_fault", f"P{p}",
        f"process {p} writes beside its data: its page is copied from frame {f} to {g}",
        can, copy, {"p": p, "f": f, "g": g},
    )  # fmt: skip
