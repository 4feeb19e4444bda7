# SPDX-License-Identifier: Apache-2.0
"""What each event of a story means, done.

Some events are moments between things that can be done: that a process's notifiers are called, that
its files are closed. Physically the kernel passes them on its own once a process was killed, so a
kill is the signal, and what was taken from the process counts as given back at ``zap``, for which
the replay waits until the kernel has really taken it.
"""

from __future__ import annotations

from typing import Final

from holdfast.replay.card import payload
from holdfast.replay.failure import Disagreement
from holdfast.replay.memory import foreign
from holdfast.replay.outcome import Outcome
from holdfast.replay.person import pattern
from holdfast.replay.plan import State, indices, refuse, value
from holdfast.replay.stage import Stage
from holdfast.spec.trace import Step
from holdfast.spec.world import ACTIVE, Eng, Hw

MOMENTS: Final = frozenset({
    "hook", "close", "fetch", "files", "zombie", "signal", "reap", "timeout", "await_signals",
    "stop", "unmap", "unpin", "quarantine", "iotlb_inv", "block_domain",
})  # fmt: skip
"""Events with nothing to do: moments between others, and decisions (see ``Stage.obey``)."""


class Acts:
    """One method for each event: ``on_kill`` does a ``kill``."""

    def __init__(self, stage: Stage, outcome: Outcome) -> None:
        self.stage = stage
        self.outcome = outcome
        self.before: State = {}

    @classmethod
    def require(cls, event: str) -> None:
        """NotSupported if such an event cannot be played."""
        if event not in MOMENTS and not hasattr(cls, f"on_{event}"):
            known = sorted({*MOMENTS, *(n[3:] for n in vars(cls) if n.startswith("on_"))})
            raise refuse(event, f"these can: {', '.join(known)}")

    def act(self, step: Step, before: State) -> None:
        """Do one event. ``before``: the story's variables as they are."""
        self.before = before
        if step.event not in MOMENTS:
            getattr(self, f"on_{step.event}")(step)

    def on_arrive(self, step: Step) -> None:
        p = step.args["p"]
        self.stage.processes[p] = person = self.stage.enter(f"process {p}")
        if "f" in step.args:
            self.stage.begin(p, step.args["f"], person)

    def on_other_takes(self, step: Step) -> None:
        f = step.args["f"]
        person = self.stage.enter(f"another process, in frame {f}")
        self.stage.memory.give(f, pattern(person.number))
        person.ask("map", page=f, fill=True)
        self.stage.others[f] = person

    # -- the end of a process ------------------------------------------------------------

    def on_kill(self, step: Step) -> None:
        self.stage.processes[step.args["p"]].kill()

    def on_zap(self, step: Step) -> None:
        p = step.args["p"]
        self.stage.processes[p].await_death()
        if p not in self.stage.ghosts:
            for f in self.stage.mapped(p):
                self.stage.forget(p, f)

    def on_oom_reap(self, step: Step) -> None:
        p = step.args["p"]
        self.stage.processes[p].await_death()
        for f in self.stage.mapped(p):
            self.stage.clear(p, f)

    def on_reap_process(self, step: Step) -> None:
        p = step.args["p"]
        self.stage.processes[p].reap(self.stage.processes.get(self.stage.parents.get(p, -1)))

    def on_ghost_ends(self, step: Step) -> None:
        p = step.args["p"]
        ghost = self.stage.ghosts.pop(p)
        ghost.kill()
        ghost.await_death()
        for f in self.stage.mapped(p):
            self.stage.forget(p, f)

    # -- pages ------------------------------------------------------------

    def on_munmap(self, step: Step) -> None:
        self._unmap(step.args["p"], "unmap")

    def on_dontneed(self, step: Step) -> None:
        self._unmap(step.args["p"], "discard")

    def _unmap(self, p: int, order: str) -> None:
        for f in self.stage.mapped(p):
            self.stage.clear(p, f, order)

    def on_exec(self, step: Step) -> None:
        p = step.args["p"]
        self.stage.processes[p].execute()
        if p not in self.stage.ghosts:
            for f in self.stage.mapped(p):
                self.stage.forget(p, f)

    def on_swap(self, step: Step) -> None:
        self.stage.clear(step.args["p"], step.args["f"])

    def on_migrate(self, step: Step) -> None:
        p, f, g = step.args["p"], step.args["f"], step.args["g"]
        self.stage.memory.move(f, g)
        first, *rest = self.stage.sharing(p)
        first.ask("copy", source=f, target=g)
        for person in rest:  # the same page table
            person.ask("unmap", page=f)
            person.ask("map", page=g, fill=False)
        self.stage.forget(p, f)
        self.stage.claims.add((p, g))

    on_cow_fault = on_migrate

    def on_fork(self, step: Step) -> None:
        p, q = step.args["p"], step.args["q"]
        self.stage.processes[q] = child = self.stage.fork(self.stage.processes[p], f"process {q}")
        self.stage.parents[q] = p
        for f in self.stage.mapped(p):
            if value(self.before, "hold", p, f) and not value(step.after, "map", q, f):
                child.ask("unmap", page=f)  # its copy of a pinned page lies elsewhere (mm/memory.c)
                continue
            self.stage.claims.add((q, f))
            if not self.stage.memory.frames[f].reserved:
                self.stage.memory.take(f)

    # -- a driver and its card ------------------------------------------------------------

    def on_prepare(self, step: Step) -> None:
        p = step.args["p"]
        self.stage.card.master(on=True)
        for each, f in indices(step.after, "map"):  # memory of the driver's own
            if each == p and (p, f) not in self.stage.claims:
                self.stage.begin(p, f, self.stage.processes[p])
        if value(step.after, "ghost", p) and p not in self.stage.ghosts:
            self.stage.ghosts[p] = self.stage.fork(
                self.stage.processes[p], f"the ghost of process {p}"
            )

    def on_post(self, step: Step) -> None:
        p, q, d = step.args["p"], step.args["q"], step.args["d"]
        self.stage.processes[q].ask("ring")
        reading = bool(value(step.after, "reading", d))
        self.stage.card.post(d, self.stage.post(p, d, step.after), reading=reading)

    def on_first_write(self, step: Step) -> None:
        self.stage.card.send(step.args["d"])

    on_last_write = on_first_write

    def on_wild_write(self, step: Step) -> None:
        d = step.args["d"]
        if value(self.before, "reading", d):
            raise refuse(
                step.event, "edu goes wild where it writes: replay a story in which it does"
            )
        self.stage.card.send_wild(d)

    def on_land(self, step: Step) -> None:
        d = step.args["d"]
        waits = (
            not value(self.before, "touched", self.stage.posted[d].owner) and not self.stage.wild
        )
        had = self.stage.received(d) if waits else None
        self.stage.card.land(d)
        self.stage.look(self.outcome)
        got = self.stage.received(d) if waits else None
        if had is not None and got is not None and got == had:
            who = f"process {self.stage.posted[d].owner}"
            self.outcome.lost[who] = self.outcome.lost.get(who, 0) + 1

    def on_dma_read(self, step: Step) -> None:
        d = step.args["d"]
        self.stage.card.read(d)
        seen = foreign(self.stage.card.peek(d), self.stage.readable(d) | {0, payload(d)})
        if seen:
            self.outcome.disclosed[f"descriptor {d}"] = seen

    def on_hang(self, step: Step) -> None:
        self.stage.card.hang()

    def on_wild(self, step: Step) -> None:
        self.stage.card.wild()
        self.stage.go_wild()

    def on_pull_out(self, step: Step) -> None:
        self.stage.pull_out()

    # -- what a driver looks at and does before it lets go ----------------------------------------

    def on_idle(self, step: Step) -> None:
        self._engine_rests(step.args["p"])

    def on_flush_read(self, step: Step) -> None:
        if not self.stage.card.flushed():
            raise Disagreement("a read does not come back yet", operation=step.event)

    def on_quiet(self, step: Step) -> None:
        self._engine_rests(step.args["p"])
        self.on_flush_read(step)

    def _engine_rests(self, p: int) -> None:
        """What the story says that a driver sees must be seen. Others may be busy with the card."""
        if not self._busy_for_others(p) and not self.stage.card.idle():
            raise Disagreement("the card is busy", operation="look at the engine")

    def _busy_for_others(self, p: int) -> bool:
        wild = value(self.before, "eng") == Eng.HUNG_WILD
        work = (*ACTIVE, Hw.WRITTEN) if wild else ACTIVE
        owners = indices(self.before, "owner")
        return any(q != p and value(self.before, "hw", d) in work for d, q in owners)

    def on_stop_ack(self, step: Step) -> None:
        self.stage.card.stop()

    def on_bme_off(self, step: Step) -> None:
        self.stage.card.master(on=False)

    def on_default_domain(self, step: Step) -> None:
        self.stage.card.master(on=True)

    def on_reset(self, step: Step) -> None:
        self.stage.card.reset()
        if self.stage.plan.honest and value(step.after, "bme"):
            self.stage.card.master(on=True)
        if not self.stage.card.gone and self.stage.card.is_master() != bool(
            value(step.after, "bme")
        ):
            raise Disagreement("bus mastering is not what the story says", operation="reset")

    def on_prove(self, step: Step) -> None:
        p = step.args["p"]
        if not self._busy_for_others(p) and not self.stage.card.idle():
            self.on_reset(step)
        self._engine_rests(p)
        self.on_flush_read(step)

    def on_k_crash(self, step: Step) -> None:
        self.stage.memory.lose_keeper()
        self.stage.card.master(on=bool(value(step.after, "bme")))
