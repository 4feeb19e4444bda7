# SPDX-License-Identifier: Apache-2.0
"""The kill campaign behind ``holdfast demo``: one policy at a time, judged by content.

Facts. A card that writes into memory whose owner died does harm only if somebody else has that
memory by then, and the harm is silent: nothing fails, bytes are wrong.

Choice. A few lanes run side by side, each on a channel of its own. In a lane a client keeps
transfers running and is SIGKILLed at a random moment; the moment the keeper gives its memory back,
a victim takes as much from the same arena, which recycles the very frames, fills it with its own
pattern, waits longer than the card can still take, and looks for foreign bytes. All policies run
this same code on the same arena; the keeper's release guard is the only difference. The seed fixes
every random choice of the campaign; what the scheduler makes of it is the machine's own.

Cost. The victims' patience is real time: a few transfer times per kill.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.keeper.client import LeaseClient
from holdfast.keeper.opening import connect
from holdfast.torture import actors, events
from holdfast.torture.drift import drifts
from holdfast.torture.outside import Machine, Processes, settle
from holdfast.torture.stack import SERVE, Stack
from holdfast.values import Policy, Target

LANES = 4
NBYTES = 256 << 10
"""Bytes of one transfer."""
RATE = 24 << 20
"""Bytes per second of the emulated link, shared by the lanes."""
ARENA = 16 << 20
CARD = 1 << 20
TRANSFER_SECONDS = LANES * NBYTES / RATE
"""How long one transfer takes with every lane busy."""
PATIENCE = (actors.DEPTH + 1) * TRANSFER_SECONDS
"""How long a victim waits: what a client has in flight, and one transfer for good measure."""
HUNG_AFTER = 30.0
SETTLE = 5.0

TARGET = f"emu:xdma?memory={CARD}&link_rate={RATE}&link_chunk=16384"

_RECORD = struct.Struct("<QQQQQ")


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill as its lane saw it, from outside."""

    pid: int
    killed_ns: int
    client_iova: int
    victim_iova: int
    foreign: int


@dataclass(slots=True)
class Outcome:
    """What a campaign under one policy came to; :meth:`to_json` has the published names."""

    policy: str
    kills: int = 0
    mid_dma_kills: int = 0
    corrupted: int = 0
    corrupted_bytes: int = 0
    victims_on_recycled_frames: int = 0
    leaked_bytes: int = 0
    leaked_fds: int = 0
    hung_leases: int = 0
    quarantined_bytes: int = 0
    unaccounted_bytes: int = 0
    completed_after_death: int = 0
    drifted: list[str] = field(default_factory=list)
    """What the specification does not explain of the keepers' log."""
    kill_to_quiet_ms: list[float] = field(default_factory=list)
    quiet_to_released_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in self.__slots__}
        told["drifted"] = len(self.drifted)
        told["kill_to_quiet_ms"] = spread(self.kill_to_quiet_ms)
        told["quiet_to_released_ms"] = spread(self.quiet_to_released_ms)
        told["seconds"] = round(self.seconds, 2)
        return told

    @property
    def clean(self) -> bool:
        """Nothing corrupted, leaked or hung, and nothing that the specification does not know."""
        return not (
            self.corrupted
            or self.drifted
            or self.leaked_bytes
            or self.leaked_fds
            or self.hung_leases
            or self.quarantined_bytes
            or self.unaccounted_bytes
        )


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p99 and maximum, by nearest rank; None if there is nothing to rank."""
    if not values:
        return {"p50": None, "p99": None, "max": None}
    ranked = sorted(values)
    last = len(ranked) - 1
    return {
        "p50": round(ranked[round(last * 0.50)], 3),
        "p99": round(ranked[round(last * 0.99)], 3),
        "max": round(ranked[last], 3),
    }


def run_policy(
    policy: Policy,
    kills: int,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
    serve: Sequence[str] = SERVE,
) -> Outcome:
    """Run ``kills`` kills under one policy. Forks: call it from a single-threaded process."""
    started = time.monotonic()
    before = Machine.look()
    outcome = Outcome(str(policy))
    options = ["--policy", str(policy), "--arena", str(ARENA)]
    # A log costs a keeper time, and under revoke, where lives are short, fewer of the kills would
    # hit a running transfer. Torture reads the logs of that policy.
    with Stack(TARGET, options, serve, logged=policy is not Policy.REVOKE) as stack:
        actors.fill_card(TARGET, CARD)
        settle(lambda: _unreleased(stack), goal=0, timeout=HUNG_AFTER)
        pids = stack.pids()
        baseline = Processes.look(pids)
        found = _run_lanes(kills, seed, progress)
        outcome.hung_leases = settle(lambda: _unreleased(stack), goal=0, timeout=HUNG_AFTER)
        told = stack.ps()
        more = settle(
            lambda: Processes.look(pids).descriptors - baseline.descriptors, goal=0, timeout=SETTLE
        )
        outcome.leaked_fds = max(0, more)  # a connection that was just closing may be gone by now
        after = Processes.look(pids)
        held = after.memfd_bytes - baseline.memfd_bytes
        outcome.drifted = drifts(events.lines(stack.log))
        _from_keeper(outcome, told, found)
    files = frozenset(after.memfds) | frozenset(baseline.memfds)
    left = settle(lambda: Machine.look().leaked_since(before, files), goal=0, timeout=SETTLE)
    outcome.leaked_bytes = max(held, left)
    _from_lanes(outcome, found)
    outcome.seconds = time.monotonic() - started
    return outcome


def _unreleased(stack: Stack) -> int:
    return sum(lease["state"] != "released" for lease in stack.ps()["leases"])


# -- lanes ------------------------------------------------------------


def _run_lanes(kills: int, seed: int, progress: Callable[[int], None]) -> list[Kill]:
    """All lanes, each a process; returns every kill in the order it was reported."""
    shares = [kills // LANES + (lane < kills % LANES) for lane in range(LANES)]
    reading, writing = os.pipe2(os.O_CLOEXEC)
    lanes = [
        actors.spawn(_lane(f"{seed}/{lane}", share, writing))
        for lane, share in enumerate(shares)
        if share
    ]
    os.close(writing)
    found: list[Kill] = []
    with os.fdopen(reading, "rb") as reports:
        while record := reports.read(_RECORD.size):
            found.append(Kill(*_RECORD.unpack(record)))
            progress(len(found))
    failed = [lane.pid for lane in lanes if lane.reap() != 0]
    if failed or len(found) != kills:
        raise HoldfastError(
            f"{len(failed)} lanes failed, {len(found)} of {kills} kills reported",
            operation="kill campaign",
            target=TARGET,
            hint="run it with fewer kills and look at holdfast ps",
        )
    return found


def _lane(seed: str, share: int, report: int) -> Callable[[int, int], None]:
    def body(_: int, __: int) -> None:
        chance = random.Random(seed)  # noqa: S311 - reproducible, not secret
        keeper = connect(Target.parse(TARGET))
        for _ in range(share):
            kill = _one_kill(keeper, chance.uniform(0.0, 2 * TRANSFER_SECONDS))
            os.write(
                report,
                _RECORD.pack(
                    kill.pid, kill.killed_ns, kill.client_iova, kill.victim_iova, kill.foreign
                ),
            )

    return body


def _one_kill(keeper: LeaseClient, delay: float) -> Kill:
    """Fork a client and a victim, kill the one, ask the other."""
    victim = actors.spawn(actors.victim(TARGET, NBYTES))
    client = actors.spawn(actors.client(TARGET, NBYTES))
    try:
        if victim.read(1) != b"r":
            raise RuntimeError("the victim got no lease")
        client_iova, lease = actors.client_started(client)
        time.sleep(delay)  # the random moment: this is the experiment, not a synchronisation
        killed_ns = client.kill()
        pid = client.pid
        client.reap()
        settle(lambda: _held(keeper, lease), goal=0, timeout=HUNG_AFTER)
        victim.tell(b"g")
        if victim.read(1) != b"f":
            raise RuntimeError("the victim got no memory")
        time.sleep(PATIENCE)  # the card's time: nothing signals a write that must not come
        victim_iova, foreign = actors.judge(victim)
    finally:
        victim.kill()
        victim.reap()
    return Kill(pid, killed_ns, client_iova, victim_iova, foreign)


def _held(keeper: LeaseClient, lease: int) -> int:
    """Whether the keeper still holds the memory of a lease."""
    told = keeper.ps(lease - 1)["leases"]
    return int(bool(told) and told[0]["lease"] == lease and told[0]["state"] != "released")


# -- figures ------------------------------------------------------------


def _from_lanes(outcome: Outcome, found: list[Kill]) -> None:
    outcome.kills = len(found)
    outcome.corrupted = sum(kill.foreign > 0 for kill in found)
    outcome.corrupted_bytes = sum(kill.foreign for kill in found)
    dead = {kill.client_iova for kill in found}
    outcome.victims_on_recycled_frames = sum(
        any(abs(kill.victim_iova - iova) < NBYTES for iova in dead) for kill in found
    )


def _from_keeper(outcome: Outcome, told: dict[str, Any], found: list[Kill]) -> None:
    """Times and counts of the killed leases, from the keeper's log (CLOCK_MONOTONIC)."""
    killed = {kill.pid: kill.killed_ns for kill in found}
    outcome.quarantined_bytes = told["quarantined_bytes"]
    outcome.unaccounted_bytes = abs(told["unaccounted_bytes"])
    for lease in told["leases"]:
        if lease["pid"] not in killed or not lease["channels"]:
            continue
        outcome.mid_dma_kills += lease["in_flight_at_death"] > 0
        outcome.completed_after_death += lease["completed_after_death"]
        entered = {state: at for state, at, _ in lease["log"]}
        quiet, released = entered.get("quiet"), entered.get("released")
        if quiet is not None:
            outcome.kill_to_quiet_ms.append((quiet - killed[lease["pid"]]) / 1e6)
            if released is not None:
                outcome.quiet_to_released_ms.append((released - quiet) / 1e6)
