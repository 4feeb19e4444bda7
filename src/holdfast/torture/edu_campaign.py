# SPDX-License-Identifier: Apache-2.0
"""The kill campaign on an edu device: the same judge as in ``campaign``, on a card we did not make.

Facts. QEMU's edu (docs/specs/edu.rst) has one DMA engine. It moves its data 100 ms after the
command, all at once, and nothing stops it: not a reset, only bus mastering being off at that very
moment. So each kill leaves a write in the machine that is still to come.

Choice. One client after the other has the whole function, starts a transfer to host memory and is
SIGKILLed at a random moment of the 100 ms. The moment its memory is given back, a victim takes
memory in its place (see ``edu_actors``). The next client is already at work by then, with bus
mastering on again, when the victim looks for foreign bytes. The seed fixes the moments.

Cost. One engine and 100 ms per kill: everything else (forking, opening, the victims' patience)
happens beside the transfers of others.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.keeper.client import LeaseClient
from holdfast.keeper.opening import connect
from holdfast.torture import edu_actors, events
from holdfast.torture.actors import Child, spawn
from holdfast.torture.campaign import HUNG_AFTER, SETTLE, Outcome
from holdfast.torture.drift import drifts
from holdfast.torture.edu_actors import WINDOW, Started, Verdict
from holdfast.torture.outside import Machine, Processes, settle
from holdfast.torture.stack import SERVE, Stack
from holdfast.values import Policy, Target

LAB_VARIABLE = "HOLDFAST_LAB_GUEST"
"""Set in the lab's virtual machines, where a card may write wherever it likes."""
ARENA = 16 << 20
"""Bytes of the arena behind an emulated device: its frames are recycled, as without an IOMMU."""
MOMENTS = {Policy.DRAIN: 0.8, Policy.REVOKE: 0.8, Policy.RELEASE: 0.0}
"""The share of the window in which the kills lie. Those of the negative control come early: for its
harm to be seen, somebody else must have the memory before the write comes."""
HITS = 0.25
"""The share of the kills that must hit a running transfer for a campaign to show anything. The
window is short, and where a processor is emulated the one who kills may come late."""
POLL = 0.001
PATIENCE = 1.5 * WINDOW
"""Seconds from a kill until nothing of the dead client can come any more, and then some."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill, as it was seen from outside."""

    pid: int
    killed_ns: int
    dead: Started
    victim: Verdict

    @property
    def recycled(self) -> bool:
        """The victim had the dead client's memory: the frame, or the place on the bus."""
        tenant = range(self.victim.iova, self.victim.iova + edu_actors.TENANT)
        return self.victim.recycled or self.dead.iova in tenant


@dataclass(slots=True)
class _Pending:
    """A victim that has its memory and is to be asked once the window has passed."""

    victim: Child
    client: int
    killed_ns: int
    dead: Started

    @property
    def due_ns(self) -> int:
        return self.killed_ns + int(PATIENCE * 1e9)


def policies(target: str) -> tuple[Policy, ...]:
    """The policies that show something on this target.

    The negative control needs a function that can reach memory nobody mapped for it: an emulated
    one with an arena, or a machine without an IOMMU, which must be one that may be damaged, a
    guest of the lab. Where every unmap is strict, memory that was given back cannot be reached,
    guard or no guard.
    """
    parsed = Target.parse(target)
    everywhere = parsed.options.get("backend") == "uio" and LAB_VARIABLE in os.environ
    if parsed.scheme == "emu" or everywhere:
        return Policy.RELEASE, Policy.DRAIN, Policy.REVOKE
    return Policy.DRAIN, Policy.REVOKE


def run_policy(
    policy: Policy,
    target: str,
    kills: int,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
    serve: Sequence[str] = SERVE,
) -> Outcome:
    """Run ``kills`` kills under one policy. Forks: call it from a single-threaded process.

    Raises UsageError if the target's driver is not edu, and what ``holdfast serve`` raises.
    """
    started = time.monotonic()
    before = Machine.look()
    outcome = Outcome(str(policy))
    options = ["--policy", str(policy)]
    if Target.parse(target).scheme == "emu":
        options += ["--arena", str(ARENA)]
    with Stack(target, options, serve) as stack:
        edu_actors.fill_card(target)
        settle(lambda: _unreleased(stack), goal=0, timeout=HUNG_AFTER)
        pids = stack.pids()
        baseline = Processes.look(pids)
        found = _Run(target, kills, seed, MOMENTS[policy] * WINDOW, progress).all()
        outcome.hung_leases = settle(lambda: _unreleased(stack), goal=0, timeout=HUNG_AFTER)
        _from_keeper(outcome, stack.ps(), found)
        # A connection that was just closing may be gone by the second look.
        more = settle(
            lambda: Processes.look(pids).descriptors - baseline.descriptors, goal=0, timeout=SETTLE
        )
        outcome.leaked_fds = max(0, more)
        after = Processes.look(pids)
        held = after.memfd_bytes - baseline.memfd_bytes
        outcome.drifted = drifts(events.lines(stack.log))
    files = frozenset(after.memfds) | frozenset(baseline.memfds)
    left = settle(lambda: Machine.look().leaked_since(before, files), goal=0, timeout=SETTLE)
    outcome.leaked_bytes = max(held, left, 0)
    _from_victims(outcome, found)
    outcome.seconds = time.monotonic() - started
    return outcome


def _unreleased(stack: Stack) -> int:
    return sum(lease["state"] != "released" for lease in stack.ps()["leases"])


class _Run:
    """The kills of one campaign, one after the other, with everything around them overlapped."""

    def __init__(
        self,
        target: str,
        kills: int,
        seed: int,
        latest: float,
        progress: Callable[[int], None],
    ) -> None:
        self._target = target
        self._kills = kills
        self._latest = latest
        """Seconds after its post within which a client is killed."""
        self._chance = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self._progress = progress
        self._keeper: LeaseClient | None = None
        self._living: dict[int, Child] = {}
        self._free: list[Child] = []
        """Victims that have nothing to do."""
        self._pending: deque[_Pending] = deque()
        self._found: list[Kill] = []

    def all(self) -> list[Kill]:
        """Every kill with its verdict, in order."""
        self._keeper = connect(Target.parse(self._target))
        try:
            client = self._spawn(edu_actors.client(self._target))
            client.tell(b"g")
            for number in range(self._kills):
                client = self._one(client, last=number == self._kills - 1)
            while self._pending:
                self._ask(self._pending.popleft())
        finally:
            self._keeper.close()
            for child in list(self._living.values()):
                child.kill()
                self._reap(child)
        return self._found

    def _one(self, client: Child, *, last: bool) -> Child:
        """Kill a client in its transfer; returns the next one, which is at work already."""
        victim = self._free.pop() if self._free else self._spawn(edu_actors.victim(self._target))
        edu_actors.prepare(victim)
        started = edu_actors.client_started(client)
        # The random moment: this is the experiment, not a synchronisation.
        _sleep_until(started.posted_ns + int(self._chance.uniform(0, self._latest) * 1e9))
        killed_ns = client.kill()
        self._reap(client)
        following = client if last else self._spawn(edu_actors.client(self._target))
        self._wait_released(started.lease)
        edu_actors.go(victim, started)
        if not last:
            following.tell(b"g")
        edu_actors.settled(victim)
        self._pending.append(_Pending(victim, client.pid, killed_ns, started))
        while self._pending and self._pending[0].due_ns <= time.monotonic_ns():
            self._ask(self._pending.popleft())
        return following

    def _ask(self, pending: _Pending) -> None:
        _sleep_until(pending.due_ns)  # the card's time: nothing signals a write that must not come
        verdict = edu_actors.judge(pending.victim)
        self._free.append(pending.victim)
        self._found.append(Kill(pending.client, pending.killed_ns, pending.dead, verdict))
        self._progress(len(self._found))

    def _wait_released(self, lease: int) -> None:
        """Wait until the keeper has given the memory of a lease back."""
        assert self._keeper is not None
        deadline = time.monotonic() + HUNG_AFTER
        while time.monotonic() < deadline:
            told = self._keeper.ps(lease - 1)["leases"]
            if not told or told[0]["lease"] != lease or told[0]["state"] == "released":
                return
            time.sleep(POLL)
        raise RuntimeError(f"lease {lease} was not released in {HUNG_AFTER:g} s")

    def _spawn(self, body: edu_actors.Body) -> Child:
        child = spawn(body)
        self._living[child.pid] = child
        return child

    def _reap(self, child: Child) -> None:
        del self._living[child.pid]
        child.reap()


def _sleep_until(at_ns: int) -> None:
    time.sleep(max(0, at_ns - time.monotonic_ns()) / 1e9)


# -- figures ------------------------------------------------------------


def _from_victims(outcome: Outcome, found: list[Kill]) -> None:
    outcome.kills = len(found)
    outcome.corrupted = sum(kill.victim.foreign > 0 for kill in found)
    outcome.corrupted_bytes = sum(kill.victim.foreign for kill in found)
    outcome.victims_on_recycled_frames = sum(kill.recycled for kill in found)


def _from_keeper(outcome: Outcome, told: dict[str, Any], found: list[Kill]) -> None:
    """Times and counts of the killed leases, from the keeper's log (CLOCK_MONOTONIC)."""
    kills = {kill.dead.lease: kill for kill in found}
    outcome.quarantined_bytes = told["quarantined_bytes"]
    outcome.unaccounted_bytes = abs(told["unaccounted_bytes"])
    for lease in told["leases"]:
        kill = kills.get(lease["lease"])
        if kill is None:
            continue
        # By the clock, too: where a process takes longer to die than the card to write, the keeper
        # finds the card idle.
        mid_dma = lease["in_flight_at_death"] > 0 or kill.dead.under_way(kill.killed_ns)
        entered = {state: at for state, at, _ in lease["log"]}
        drained = "draining" in entered and not entered.keys() & {"stopping", "isolating"}
        outcome.mid_dma_kills += mid_dma
        outcome.completed_after_death += mid_dma and drained
        quiet, released = entered.get("quiet"), entered.get("released")
        if quiet is not None:
            outcome.kill_to_quiet_ms.append((quiet - kill.killed_ns) / 1e6)
            if released is not None:
                outcome.quiet_to_released_ms.append((released - quiet) / 1e6)
