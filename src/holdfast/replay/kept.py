# SPDX-License-Identifier: Apache-2.0
"""A story of Holdfast's own composition, played against the keeper that there is.

Facts. The keeper cannot be commanded, and should not be: what it does is what is to be found out.
Everything around it can: processes open, post, hang up and are killed, and the card does each of
its steps when it is told to.

Choice. So the story is played by halves. Its outside is carried out. Where it has a step of the
keeper, the replay waits until the keeper's own log shows that state; deadlines are set so that the
keeper has the patience that the story says it has. A story that breaks something was found with a
guard missing from the tables. The real keeper has that guard, so at one point it does not do what
the story says (it *withholds* the step), and what the outside does from then on must harm nobody.

Cost. Moments inside the keeper are passed by: where a story kills a process in the middle of an
allocation, the allocation is done first.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from holdfast.errors import HoldfastError, KeeperGone
from holdfast.keeper.state import TABLE, Event, State
from holdfast.replay.client import ClientLife
from holdfast.replay.failure import Disagreement
from holdfast.replay.leashed import TARGET, Leash
from holdfast.replay.memory import Memory
from holdfast.replay.outcome import Outcome, Played, worst
from holdfast.replay.person import Person, start
from holdfast.replay.plan import refuse, value
from holdfast.spec.trace import Step, Trace
from holdfast.spec.world import LEASE_STATES
from holdfast.torture import edu_actors
from holdfast.torture.actors import FOREIGN
from holdfast.torture.eyes import ANSWER_TIMEOUT, Eyes
from holdfast.torture.stack import Stack

NAME: Final = "keeper:edu"
ARENA: Final = 1 << 20
WAIT: Final = 1.0
"""Seconds in which the keeper must do what the story says, or withholds it."""
SHORT: Final = 0.2
LONG: Final = 30.0
"""Deadlines of the keeper: for what the story says is not awaited, and for what is."""
POLL: Final = 0.002
WILD_BYTE: Final = 0xA5
MOMENTS: Final = frozenset({
    "hook", "zap", "close", "files", "zombie", "reap_process", "fetch", "signal", "reap",
    "anchor_ack", "reserve", "map", "confirm", "observe", "look_again", "false_reset", "unmapping",
    "unmap", "unmap_none", "no_mapping", "reinstate", "bme_on",
})  # fmt: skip
"""Events that pass by themselves, inside the kernel and the keeper."""
UNREACHABLE: Final = frozenset({"unmap_part", "inv_timeout"})
"""Failures of an IOMMU, which an emulated one does not have."""
POLICIES: Final = {"holdfast-release": "release", "holdfast-revoke": "revoke"}
LIES: Final = frozenset({"holdfast-lied"})
"""Stories whose card says that it is idle when it is not."""


def play(trace: Trace) -> Outcome:
    """Play a story of the composition, in a process without threads. See the module."""
    for step in trace.steps:
        if step.event not in MOMENTS and not hasattr(_Kept, f"on_{step.event}"):
            raise refuse(step.event, "play it on paced:edu, or another story on a real keeper")
    outcome = Outcome.of(trace, NAME)
    directory = tempfile.mkdtemp(prefix="holdfast-replay-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        kept = _Kept(trace, outcome, stack, str(Path(directory, "leash")))
        for number, step in enumerate(trace.steps, 1):
            begun = time.monotonic_ns()
            try:
                kept.act(number - 1, step)
            except HoldfastError as error:
                error.target = f"step {number} ({step.event})"
                raise
            outcome.timeline.append(Played(step.event, step.text, begun, time.monotonic_ns()))
        kept.end()
    return outcome


def options(trace: Trace) -> list[str]:
    """How the keeper of a story is started."""
    rows = {TABLE[step.args["row"]] for step in trace.steps if step.event == "step"}

    def patience(source: State) -> str:
        hurried = any(row.source is source and row.event is Event.DEADLINE for row in rows)
        return str(SHORT if hurried else LONG)

    chosen = [
        "--policy", POLICIES.get(trace.strategy, "drain"),
        "--drain-deadline", patience(State.DRAINING),
        "--isolate-deadline", patience(State.ISOLATING),
        "--quarantine-period", "0.05", "--quarantine-longest", "0.1",
    ]  # fmt: skip
    return chosen if trace.iommu != "none" else [*chosen, "--arena", str(ARENA)]


class _Kept:
    """A keeper, its card on a leash, and the processes around them."""

    def __init__(self, trace: Trace, outcome: Outcome, stack: ExitStack, leash: str) -> None:
        self.trace = trace
        self.outcome = outcome
        self.target = f"{TARGET}?leash={leash}"
        self.processes: dict[int, Person] = {}
        self.parents: dict[int, int] = {}
        self.leases: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        """How far in the log of a process's lease the story is."""
        self.withheld: set[int] = set()
        """Processes for whose lease the keeper does not do what the story says."""
        self.wrote: set[int] = set()
        self.gave_up: set[Person] = set()
        """Who maps memory of a lease that it let go of, or that never was its own: not innocent."""
        self.places: dict[int, int] = {}
        self.gone = False
        """The card was pulled out: its keeper ends, and whoever had a lease is told."""
        self._everybody: list[Person] = []
        self._waiting: list[Person] = []
        memory = Memory(1)
        stack.callback(memory.close)
        self.ram = memory.fd
        self.leash = Leash(leash)
        stack.callback(self.leash.close)
        self.stack = stack.enter_context(Stack(self.target, options(trace)))
        # A keeper that was told to have patience would have it at its end, too.
        stack.callback(self.stack.kill_all)
        edu_actors.fill_card(self.target)
        stack.callback(self._end_everybody)
        self._fork_everybody()
        self.eyes = Eyes(self.target)
        stack.callback(self.eyes.close)
        self._until(lambda: not self.eyes.unsettled(), "the one that filled the card is gone")
        self._command("pace")
        if trace.strategy in LIES:
            self._command("lie")

    def _fork_everybody(self) -> None:
        life = functools.partial(ClientLife, target=self.target)
        for number in range(sum(s.event in ("arrive", "other_takes") for s in self.trace.steps)):
            others = [each.sock for each in self._waiting]
            person = start(f"process {number}", number, self.ram, others, life)
            self._waiting.append(person)
            self._everybody.append(person)

    def _end_everybody(self) -> None:
        for person in self._everybody:
            person.kill()
        for person in self._everybody:
            with suppress(ChildProcessError):
                os.waitpid(person.pid, 0)
            person.close()

    def act(self, at: int, step: Step) -> None:
        """Do one event, or wait for it."""
        self.at = at
        if step.event not in MOMENTS:
            getattr(self, f"on_{step.event}")(step)

    def end(self) -> None:
        """See where each lease ends, and once more what everybody finds."""
        told = self.trace.steps[-1].after
        for p, lease in self.leases.items():
            state = LEASE_STATES[value(told, "lease", p)]
            if state is not None and p not in self.withheld:
                self._await_state(p, state)
            self.outcome.leases[f"process {p}"] = [name for name, *_ in self._log(lease)]
        self._look()

    # -- processes ------------------------------------------------------------

    def on_arrive(self, step: Step) -> None:
        p = step.args["p"]
        self.processes[p] = self._enter(f"process {p}")

    def on_other_takes(self, step: Step) -> None:
        person = self._enter("another process")
        self._opened(person.ask("open", posts=False), step)

    def _enter(self, name: str) -> Person:
        person = self._waiting.pop(0)
        person.name = name
        return person

    def on_alloc(self, step: Step) -> None:
        p = step.args["p"]
        posts = any(
            each.event == "post" and each.args["p"] == p for each in self.trace.steps[self.at :]
        )
        opened = self._opened(self.processes[p].ask("open", posts=posts), step)
        if opened is not None:
            self.leases[p], self.seen[p] = opened["lease"], 0
            self.gave_up.discard(self.processes[p])
            self.places[p] = opened["iova"]

    def _opened(self, answer: dict[str, Any], step: Step) -> dict[str, Any] | None:
        if "refused" in answer:
            self._note(step, answer["refused"])
            return None
        self.outcome.recycled |= answer["iova"] in self.places.values()
        return answer

    def on_post(self, step: Step) -> None:
        p, q = step.args["p"], step.args["q"]
        if p not in self.leases:
            self._note(step, "it got no lease")
            return
        answer = self.processes[q].ask("post")
        if "refused" in answer:
            self._note(step, answer["refused"])
        else:
            self.wrote.add(p)

    def on_fork(self, step: Step) -> None:
        p, q = step.args["p"], step.args["q"]
        self.processes[q] = child = self.processes[p].fork(
            f"process {q}", self.processes[p].number, self.ram
        )
        self.parents[q] = p
        self._everybody.append(child)
        self.gave_up.add(child)

    def on_kill(self, step: Step) -> None:
        person = self.processes[step.args["p"]]
        person.kill()
        person.await_death()
        person.reap(self.processes.get(self.parents.get(step.args["p"], -1)))

    def on_hang_up(self, step: Step) -> None:
        if step.args["p"] in self.leases:
            self.processes[step.args["p"]].ask("hang_up")
            self.gave_up.add(self.processes[step.args["p"]])

    def on_exec(self, step: Step) -> None:
        self.processes[step.args["p"]].execute()

    # -- the card ------------------------------------------------------------

    def on_first_write(self, step: Step) -> None:
        if not self._command("send"):
            self._note(step, "the card has nothing to send")

    on_last_write = on_first_write
    on_wild_write = on_first_write

    def on_land(self, step: Step) -> None:
        # If it is not on its way any more, a read by the keeper has pushed it ahead.
        self._command("land")
        self._look()

    def on_hang(self, step: Step) -> None:
        self._command("hang")

    def on_wild(self, step: Step) -> None:
        self._command("wild")

    def on_pull_out(self, step: Step) -> None:
        self._command("unplug")
        self.gone = True

    def _command(self, order: str) -> bool:
        return self.leash.order(order)

    # -- the keeper ------------------------------------------------------------

    def on_step(self, step: Step) -> None:
        p = step.args["p"]
        if p not in self.leases or p in self.withheld:
            return
        target = TABLE[step.args["row"]].target
        if not self._await_state(p, target):
            self.withheld.add(p)
            log = self._log(self.leases[p])
            self._note(step, f"the lease is {log[-1][0] if log else 'not told of'}, not {target}")

    def on_k_crash(self, step: Step) -> None:
        pid = self.stack.keeper_pid
        os.kill(pid, signal.SIGKILL)
        self.crashed = pid

    def on_k_restart(self, step: Step) -> None:
        if self.gone:
            return
        self._until(lambda: self.eyes.ps()["keeper"] != self.crashed, "a successor answers")
        self.seen = dict.fromkeys(self.seen, 0)

    def _await_state(self, p: int, state: State) -> bool:
        deadline = time.monotonic() + WAIT
        while True:
            log = self._log(self.leases[p])
            for at in range(self.seen[p], len(log)):
                if log[at][0] == state:
                    self.seen[p] = at + 1
                    return True
            if log and log[-1][0] == state and state is State.ALIVE:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)

    def _log(self, lease: int) -> Sequence[Any]:
        try:
            told = self.eyes.ps(lease - 1, WAIT if self.gone else ANSWER_TIMEOUT)["leases"]
        except KeeperGone:
            if not self.gone:
                raise
            return []
        found = [each["log"] for each in told if each["lease"] == lease]
        return found[0] if found else []

    # -- verdict ------------------------------------------------------------

    def _look(self) -> None:
        rightful = {p: [FOREIGN, WILD_BYTE] if p in self.wrote else [] for p in self.processes}
        for person in self._everybody:
            if not person.alive or person in self._waiting or person.executed:
                continue
            if person in self.gave_up:
                continue
            own = [p for p, each in self.processes.items() if each is person]
            mine = rightful[own[0]] if own else []
            # Memory of a card that is gone is replaced by zeros under whoever still looks at it.
            mine += [0] if self.gone else []
            worst(self.outcome.corrupted, person.name, person.ask("foreign", rightful=mine))

    def _note(self, step: Step, why: str) -> None:
        self.outcome.withheld.append(f"{step.event}: {why}")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LONG
        while not condition():
            if time.monotonic() > deadline:
                raise Disagreement(f"it does not come to pass that {what}", operation="replay")
            time.sleep(POLL)
