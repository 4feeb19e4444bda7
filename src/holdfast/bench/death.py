# SPDX-License-Identifier: Apache-2.0
"""How quickly the keeper sees a death, gets the card quiet, and gives the memory back.

Clients with transfers running are SIGKILLed one after the other. This process waits for each
client's pidfd in a bare epoll: nobody can learn of a death sooner by that way. The keeper's own
times come from its log; both clocks are CLOCK_MONOTONIC. It is not asked while a death is timed:
the answer would be in the way.
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
from holdfast.keeper.client import LeaseClient
from holdfast.torture import actors
from holdfast.torture.stack import Stack

NBYTES = 256 << 10
"""Bytes of each of the two transfers that a client keeps running."""
ARENA = 64 << 20
CARD = 1 << 20
RELEASED_WITHIN = 20.0
UNDISTURBED = 0.02
"""Seconds after a death in which the keeper is not asked: most memory is back by then."""
POLL = 0.005
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
        frozen, quiet, released = (entered(lease, to) for to in ("frozen", "quiet", "released"))
        self.bare.append(seen - killed)
        self.detected.append(frozen - killed)
        self.later.append(frozen - seen)
        self.quiet.append(quiet - killed)
        self.returned.append(released - quiet - lease["punch_ns"])
        self.punched.append(lease["punch_ns"])


def entered(lease: dict[str, Any], state: str) -> int:
    """When a lease came into a state first (ns)."""
    for known, at, _ in lease["log"]:
        if known == state:
            return int(at)
    raise HoldfastError(f"lease {lease['lease']} never was {state}", operation="bench")


def ended(asker: LeaseClient, number: int) -> dict[str, Any]:
    """What the keeper tells of a lease whose client was killed, once it is released."""
    time.sleep(UNDISTURBED)
    deadline = time.monotonic() + RELEASED_WITHIN
    while True:
        told = asker.ps(number - 1)["leases"]
        lease: dict[str, Any] | None = next((one for one in told if one["lease"] == number), None)
        if lease is not None and lease["state"] == "released":
            return lease
        if time.monotonic() > deadline:
            state = "forgotten" if lease is None else lease["state"]
            raise HoldfastError(f"lease {number} is {state}, not released", operation="bench")
        time.sleep(POLL)


def _die(stack: Stack) -> tuple[int, int, int]:
    """Kill one client: its lease, and when it was killed and seen dead (ns)."""
    client = actors.spawn(actors.client(stack.target, NBYTES))
    try:
        _, lease = actors.client_started(client)
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
    return lease, killed, seen


def kill_clients(stack: Stack, kills: int) -> Deaths:
    """Kill ``kills`` clients, each once the memory of the one before is back."""
    actors.fill_card(stack.target, CARD)
    deaths = Deaths()
    asker = stack.ask()
    try:
        for _ in range(kills):
            lease, killed, seen = _die(stack)
            deaths.add(killed, seen, ended(asker, lease))
    finally:
        asker.close()
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
