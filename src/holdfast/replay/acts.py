# SPDX-License-Identifier: Apache-2.0
"""What each event of a story means, done.

Some events are moments between things that can be done: that a process's notifiers are called, that
its files are closed. Physically the kernel passes them on its own once a process was killed, so a
kill is the signal, and what was taken from the process counts as given back at ``zap``, for which
the replay waits until the kernel has really taken it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from holdfast.replay.failure import Disagreement
from holdfast.replay.outcome import Outcome
from holdfast.replay.person import pattern
from holdfast.replay.plan import State, indices, refuse, value
from holdfast.replay.stage import Stage
from holdfast.replay.memory import foreign
from holdfast.replay.card import payload
from holdfast.spec.trace import Step
from holdfast.spec.world import ACTIVE, Eng, Hw, Proc

Act: TypeAlias = Callable[[Stage, Step, State, Outcome], None]


def _arrive(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    p = step.args["p"]
    stage.processes[p] = person = stage.enter(f"process {p}")
    if "f" in step.args:
        stage.begin(p, step.args["f"], person)


def _other_takes(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    f = step.args["f"]
    person = stage.enter(f"another process, in frame {f}")
    stage.memory.give(f, pattern(person.number))
    person.ask("map", page=f, fill=True)
    stage.others[f] = person


# -- the end of a process ------------------------------------------------------------


def _kill(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    stage.processes[step.args["p"]].kill()


def _zap(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    p = step.args["p"]
    stage.processes[p].await_death()
    if p not in stage.ghosts:
        for f in stage.mapped(p):
            stage.forget(p, f)


def _oom_reap(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    p = step.args["p"]
    stage.processes[p].await_death()
    for f in stage.mapped(p):
        stage.clear(p, f)


def _reap_process(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    p = step.args["p"]
    parent = stage.processes.get(stage.parents.get(p, -1))
    stage.processes[p].reap(parent if parent is not None and parent.alive else None)


def _ghost_ends(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    p = step.args["p"]
    ghost = stage.ghosts.pop(p)
    ghost.kill()
    ghost.await_death()
    for f in stage.mapped(p):
        stage.forget(p, f)


# -- pages ------------------------------------------------------------


def _unmaps(order: str) -> Act:
    def act(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
        for f in stage.mapped(step.args["p"]):
            stage.clear(step.args["p"], f, order)

    return act


def _exec(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    p = step.args["p"]
    stage.processes[p].execute()
    if p not in stage.ghosts:
        for f in stage.mapped(p):
            stage.forget(p, f)


def _swap(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    stage.clear(step.args["p"], step.args["f"])


def _move(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    p, f, g = step.args["p"], step.args["f"], step.args["g"]
    stage.memory.move(f, g)
    first, *rest = stage.sharing(p)
    first.ask("copy", source=f, target=g)
    for person in rest:  # the same page table
        person.ask("unmap", page=f)
        person.ask("map", page=g, fill=False)
    stage.forget(p, f)
    stage.claims.add((p, g))


def _fork(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    p, q = step.args["p"], step.args["q"]
    stage.processes[q] = child = stage.fork(stage.processes[p], f"process {q}")
    stage.parents[q] = p
    for f in stage.mapped(p):
        if value(before, "hold", p, f) and not value(step.after, "map", q, f):
            child.ask("unmap", page=f)  # its copy of a pinned page lies elsewhere (mm/memory.c)
            continue
        stage.claims.add((q, f))
        if not stage.memory.frames[f].reserved:
            stage.memory.take(f)


# -- a driver and its card ------------------------------------------------------------


def _prepare(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    p = step.args["p"]
    stage.card.master(on=True)
    for each, f in indices(step.after, "map"):  # memory of the driver's own
        if each == p and (p, f) not in stage.claims:
            stage.begin(p, f, stage.processes[p])
    if value(step.after, "ghost", p) and p not in stage.ghosts:
        stage.ghosts[p] = stage.fork(stage.processes[p], f"the ghost of process {p}")


def _post(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    p, q, d = step.args["p"], step.args["q"], step.args["d"]
    stage.processes[q].ask("ring")
    reading = bool(value(step.after, "reading", d))
    stage.card.post(d, stage.post(p, d, step.after), reading=reading)


def _fetch(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    stage.card.fetch(step.args["d"])


def _send(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    stage.card.send(step.args["d"])


def _wild_write(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    d = step.args["d"]
    if value(before, "reading", d):
        raise refuse(step.event, "edu goes wild where it writes: replay a story in which it does")
    stage.card.send_wild(d)


def _land(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    d = step.args["d"]
    waits = not value(before, "touched", stage.posted[d].owner) and not stage.wild
    had = stage.received(d) if waits else None
    stage.card.land(d)
    stage.look(outcome)
    got = stage.received(d) if waits else None
    if had is not None and got is not None and got == had:
        who = f"process {stage.posted[d].owner}"
        outcome.lost[who] = outcome.lost.get(who, 0) + 1


def _dma_read(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    d = step.args["d"]
    stage.card.read(d)
    rightful = set(stage.posted[d].memory.rightful) | {0, payload(d)}
    seen = foreign(stage.card.peek(d), rightful)
    if seen:
        outcome.disclosed[f"descriptor {d}"] = seen


def _hang(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    stage.card.hang()


def _wild(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    stage.card.wild()
    stage.go_wild()


def _pull_out(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    stage.card.pull_out()


# -- what a driver looks at and does before it lets go ---------------------------------------


def _looks(*, at_engine: bool, at_fabric: bool) -> Act:
    """What the story says that a driver sees must be seen."""

    def act(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
        busy_for = {
            p for d, p in indices(before, "owner") if value(before, "hw", d) in ACTIVE
        }  # fmt: skip
        if at_engine and busy_for <= {step.args["p"]} and not stage.card.idle():
            raise Disagreement("the card is busy", operation=step.event)
        if at_fabric and not stage.card.flushed():
            raise Disagreement("a read does not come back yet", operation=step.event)

    return act


def _stop_ack(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    stage.card.stop()


def _bme_off(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    stage.card.master(on=False)


def _default_domain(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    stage.card.master(on=True)


def _reset(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    stage.card.reset()
    if stage.plan.honest and value(step.after, "bme"):
        stage.card.master(on=True)
    if not stage.card.gone and stage.card.is_master() != bool(value(step.after, "bme")):
        raise Disagreement("bus mastering is not what the story says", operation="reset")


def _prove(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    if not stage.card.idle():
        _reset(stage, step, before, outcome)
    if not stage.card.idle() or not stage.card.flushed():
        raise Disagreement("nothing proves the card quiet", operation="prove")


def _nothing(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    """A moment between things that can be done, or a decision (see ``Stage.obey``)."""


ACTS: Final[Mapping[str, Act]] = {
    "arrive": _arrive,
    "other_takes": _other_takes,
    "kill": _kill,
    "zap": _zap,
    "oom_reap": _oom_reap,
    "reap_process": _reap_process,
    "ghost_ends": _ghost_ends,
    "munmap": _unmaps("unmap"),
    "dontneed": _unmaps("discard"),
    "exec": _exec,
    "swap": _swap,
    "migrate": _move,
    "cow_fault": _move,
    "fork": _fork,
    "prepare": _prepare,
    "post": _post,
    "fetch": _fetch,
    "first_write": _send,
    "last_write": _send,
    "wild_write": _wild_write,
    "land": _land,
    "dma_read": _dma_read,
    "hang": _hang,
    "wild": _wild,
    "pull_out": _pull_out,
    "idle": _looks(at_engine=True, at_fabric=False),
    "flush_read": _looks(at_engine=False, at_fabric=True),
    "quiet": _looks(at_engine=True, at_fabric=True),
    "stop_ack": _stop_ack,
    "bme_off": _bme_off,
    "reset": _reset,
    "prove": _prove,
    "default_domain": _default_domain,
    **dict.fromkeys(
        (
            "hook", "close", "files", "zombie", "signal", "reap", "timeout", "await_signals",
            "stop", "unmap", "unpin", "quarantine", "iotlb_inv",
        ),
        _nothing,
    ),
}  # fmt: skip
"""Every event that can be played."""


def act(stage: Stage, step: Step, before: State, outcome: Outcome) -> None:
    """Do one event."""
    try:
        one = ACTS[step.event]
    except KeyError:
        raise refuse(step.event, f"these can: {', '.join(sorted(ACTS))}") from None
    one(stage, step, before, outcome)
