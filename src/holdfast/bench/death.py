# SPDX-License-Identifier: Apache-2.0
"""How quickly the keeper sees a death, gets the card quiet, and gives the memory back.

Clients with transfers running are SIGKILLed one after the other. This process waits for each
client's pidfd in a bare epoll: nobody can learn of a death sooner by that way. The keeper's own
times come from its log; both clocks are CLOCK_MONOTONIC.
"""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass, field
from typing import Any

from holdfast.bench.plan import Run
from holdfast.bench.result import Goal, Result, percentile, times
from holdfast.errors import HoldfastError
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack

NBYTES = 256 << 10
"""Bytes of each of the two transfers that a client keeps running."""
ARENA = 64 << 20
CARD = 1 << 20
RELEASED_WITHIN = 20.0
MS = 1e-6
"""Milliseconds in a nanosecond."""


@dataclass(slots=True)
class Deaths:
    """Nanoseconds of each death; the keeper's relative to the kill or to the bare epoll."""

    bare: list[int] = field(default_factory=list)
    detected: list[int] = field(default_factory=list)
    later: list[int] = field(default_factory=list)
    quiet: list[int] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)
    punched: list[int] = field(default_factory=list)

    def add(self, killed: int, seen: int, lease: dict[str, Any]) -> None:
        """Account for one lease, as the keeper's ``ps`` tells of it."""
        entered: dict[str, int] = {}
        for state, at, _ in lease["log"]:
            entered.setdefault(state, at)
        missing = {"frozen", "quiet", "released"} - entered.keys()
        if missing:
            raise HoldfastError(
                f"lease {lease['lease']} never was {', '.join(sorted(missing))}", operation="bench"
            )
        self.bare.append(seen - killed)
        self.detected.append(entered["frozen"] - killed)
        self.later.append(entered["frozen"] - seen)
        self.quiet.append(entered["quiet"] - killed)
        self.returned.append(entered["released"] - entered["quiet"] - lease["punch_ns"])
        self.punched.append(lease["punch_ns"])


def _die(stack: Stack) -> tuple[int, int, int]:
    """Kill one client: its pid, and when it was killed and seen dead (ns)."""
    client = actors.spawn(actors.client(stack.target, NBYTES))
    try:
        actors.client_started(client)
        pidfd = os.pidfd_open(client.pid)
        try:
            with select.epoll() as epoll:
                epoll.register(pidfd, select.EPOLLIN)
                killed = client.kill()
                epoll.poll()
                seen = time.monotonic_ns()
        finally:
            os.close(pidfd)
    except BaseException:
        client.kill()
        raise
    finally:
        client.reap()
    return client.pid, killed, seen


def kill_clients(stack: Stack, kills: int) -> Deaths:
    """Kill ``kills`` clients, each once the memory of the one before is back."""
    actors.fill_card(stack.target, CARD)
    deaths = Deaths()
    for _ in range(kills):
        pid, killed, seen = _die(stack)
        found: list[dict[str, Any]] = []

        def unreleased(pid: int = pid, found: list[dict[str, Any]] = found) -> int:
            found[:] = [
                lease for lease in stack.ps()["leases"] if lease["pid"] == pid and lease["channels"]
            ]
            return sum(lease["state"] != "released" for lease in found)

        settle(unreleased, goal=0, timeout=RELEASED_WITHIN)
        if not found:
            raise HoldfastError(f"the keeper forgot client {pid}", operation="bench")
        deaths.add(killed, seen, found[-1])
    return deaths


def kills(run: Run) -> list[Result]:
    """Deaths with files of the lease's own, then with an arena whose frames are recycled."""
    own = kill_clients(run.stack, run.sizes.kills)
    with Stack(f"emu:xdma?memory={CARD}", ["--arena", str(ARENA)]) as stack:
        arena = kill_clients(stack, run.sizes.kills)
    return [
        detected(own),
        quieted(own),
        returned("quiet_to_released", own),
        returned("quiet_to_released_arena", arena),
    ]


def detected(deaths: Deaths) -> Result:
    """How much later than a bare epoll the keeper knew."""
    return Result(
        "kill_to_detected",
        percentile(deaths.later, 0.99) * MS,
        "ms",
        percentile(deaths.bare, 0.5) / percentile(deaths.detected, 0.5),
        "a bare epoll on the client's pidfd (medians); the value is the p99 of the delay behind it",
        (Goal(1.0, "value", at_most=True),),
        detail={
            "behind_bare_ms": times(deaths.later, MS),
            "kill_to_detected_ms": times(deaths.detected, MS),
            "bare_ms": times(deaths.bare, MS),
        },
    )


def quieted(deaths: Deaths) -> Result:
    """From the kill to the proof of quiet; what was running is let finish."""
    return Result(
        "kill_to_quiet",
        percentile(deaths.quiet, 0.99) * MS,
        "ms",
        percentile(deaths.bare, 0.5) / percentile(deaths.quiet, 0.5),
        "a bare epoll on the client's pidfd (medians); the value is a p99",
        detail={"ms": times(deaths.quiet, MS), "bare_ms": times(deaths.bare, MS)},
    )


def returned(name: str, deaths: Deaths) -> Result:
    """From quiet to the memory's return, without what the kernel took to free the pages."""
    whole = [own + punch for own, punch in zip(deaths.returned, deaths.punched, strict=True)]
    return Result(
        name,
        percentile(deaths.returned, 0.99) * MS,
        "ms",
        percentile(deaths.punched, 0.5) / percentile(whole, 0.5),
        "the hole punch itself, which the value (a p99) leaves out",
        (Goal(2.0, "value", at_most=True),),
        detail={
            "ms": times(deaths.returned, MS),
            "punch_ms": times(deaths.punched, MS),
        },
    )
