# SPDX-License-Identifier: Apache-2.0
"""A thousand leases on one keeper: what a death costs among them, all at once, and in memory.

Deaths are timed by the keeper's own log (``ps``), against CLOCK_MONOTONIC here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from holdfast.bench.crowd import BUFFERS, Crowd, require_room
from holdfast.bench.death import MS, NBYTES, RELEASED_WITHIN, ended, entered
from holdfast.bench.plan import Run
from holdfast.bench.result import Goal, Result, percentile, rounded, times
from holdfast.errors import HoldfastError
from holdfast.kernel import procfs
from holdfast.torture import actors
from holdfast.torture.stack import Stack

CARD = 1 << 20
MIB = 1 << 20
KEEPER_BYTES = 60 * MIB
BYTES_EACH = 2 << 10
"""What the keeper may take by itself, and for each lease and each buffer."""


def scale(run: Run) -> list[Result]:
    """Deaths among 1, 10, ... others, all of them at once, and the keeper's memory."""
    require_room(run.sizes.leases)
    with Stack(f"emu:xdma?memory={CARD}") as stack, Crowd(stack.target) as crowd:
        actors.fill_card(stack.target, CARD)
        _warm(stack)
        keeper = stack.ps()["keeper"]
        before = procfs.resident(keeper)
        alone: dict[int, Alone] = {}
        seconds = 0.0
        others = 1
        while True:
            seconds += crowd.join(others - len(crowd.leases))
            alone[others] = _deaths(stack, run.sizes.lonely)
            if others >= run.sizes.leases:
                break
            others = min(10 * others, run.sizes.leases)
        memory = _memory(before, procfs.resident(keeper), others, seconds)
        return [*_alone(alone), _together(stack, crowd), memory]


def _warm(stack: Stack) -> None:
    """What the first lease of a keeper costs is not what the next one costs."""
    with Crowd(stack.target) as one:
        one.join(1)


# -- one death ------------------------------------------------------------


class Alone:
    """Nanoseconds of deaths one by one, by what the client was doing."""

    def __init__(self) -> None:
        self.holding: list[int] = []
        self.running: list[int] = []
        self.punched: list[int] = []
        self.waited = 0.0
        """How long the keeper was ready to run and did not, for each death (ns)."""


def _deaths(stack: Stack, count: int) -> Alone:
    """Kill ``count`` clients that only hold memory, and as many with transfers running."""
    found = Alone()
    asker = stack.ask()
    keeper = asker.ps()["keeper"]
    waited = procfs.waited_for_processor(keeper)
    try:
        for _ in range(count):
            with Crowd(stack.target) as victim:
                victim.join(1)
                (lease,) = victim.leases.values()
                victim.kill()
            returned, punched = _returned(ended(asker, lease))
            found.holding.append(returned)
            found.punched.append(punched)
        for _ in range(count):
            client = actors.spawn(actors.client(stack.target, NBYTES))
            try:
                _, lease = actors.client_started(client)
            finally:
                client.kill()
                client.reap()
            found.running.append(_returned(ended(asker, lease))[0])
        found.waited = (procfs.waited_for_processor(keeper) - waited) / (2 * count)
    finally:
        asker.close()
    return found


def _returned(lease: dict[str, Any]) -> tuple[int, int]:
    """Nanoseconds from quiet to released without the punch, and of the punch."""
    punched = int(lease["punch_ns"])
    return entered(lease, "released") - entered(lease, "quiet") - punched, punched


def _alone(deaths: dict[int, Alone]) -> list[Result]:
    """One death among all others; what it costs must not depend on how many they are."""
    fewest, most = min(deaths), max(deaths)
    results = []
    kinds: dict[str, Callable[[Alone], list[int]]] = {
        "release_among_leases": lambda alone: alone.holding,
        "release_among_leases_running": lambda alone: alone.running,
    }
    for name, kind in kinds.items():
        few, many = kind(deaths[fewest]), kind(deaths[most])
        results.append(
            Result(
                name,
                percentile(many, 0.99) * MS,
                "ms",
                percentile(few, 0.5) / percentile(many, 0.5),
                f"the same with {fewest} other lease instead of {most} (medians)",
                (Goal(5.0, "value", at_most=True),),
                detail={
                    "ms": times(many, MS),
                    "ms_by_other_leases": {
                        str(others): times(kind(alone), MS) for others, alone in deaths.items()
                    },
                    "punch_ms": times(deaths[most].punched, MS),
                    "keeper_waited_ms_per_death": rounded(deaths[most].waited * MS),
                },
            )
        )
    return results


# -- all at once ------------------------------------------------------------


def _together(stack: Stack, crowd: Crowd) -> Result:
    """Kill everybody with one system call."""
    numbers = set(crowd.leases.values())
    killed = crowd.kill()
    reaped = time.monotonic_ns()
    deadline = time.monotonic() + RELEASED_WITHIN
    while True:
        time.sleep(0.1)
        told = [lease for lease in stack.ps()["leases"] if lease["lease"] in numbers]
        left = len(numbers) - sum(lease["state"] == "released" for lease in told)
        if not left:
            break
        if time.monotonic() > deadline:
            raise HoldfastError(f"{left} leases are not released", operation="bench")
    quiet = [entered(lease, "quiet") for lease in told]
    released = [entered(lease, "released") for lease in told]
    returned = [end - begin for begin, end in zip(quiet, released, strict=True)]
    return Result(
        "release_all_leases",
        max(returned) * 1e-9,
        "s",
        (reaped - killed) / (max(released) - killed),
        f"the end of {len(numbers)} processes: all reaped (from the kill to the last of them)",
        (Goal(1.0, "value", at_most=True),),
        detail={
            "ms": times(returned, MS),
            "leases": len(numbers),
            "kill_to_reaped_ms": rounded((reaped - killed) * MS),
            "kill_to_frozen_ms": times([entered(one, "frozen") - killed for one in told], MS),
            "kill_to_quiet_ms": times([at - killed for at in quiet], MS),
            "kill_to_released_ms": times([at - killed for at in released], MS),
            "last_quiet_to_last_released_ms": rounded((max(released) - max(quiet)) * MS),
            "punch_ms": rounded(sum(lease["punch_ns"] for lease in told) * MS),
        },
    )


# -- memory ------------------------------------------------------------


def _memory(before: dict[str, int], after: dict[str, int], leases: int, seconds: float) -> Result:
    """Resident memory of the keeper's process with everything alive.

    All that is resident counts, also what other processes share with it: the proportional share
    would look better the more of them there are.
    """
    bound = KEEPER_BYTES + BYTES_EACH * (leases + leases * BUFFERS)
    return Result(
        "keeper_memory",
        after["Rss"] / MIB,
        "MiB",
        KEEPER_BYTES / after["Rss"],
        "60 MiB, without the 2 KiB that each lease and each buffer may take",
        (Goal(bound / MIB, "value", at_most=True),),
        detail={
            "leases": leases,
            "buffers": leases * BUFFERS,
            "resident_mib": rounded(after["Rss"] / MIB),
            "proportional_mib": rounded(after["Pss"] / MIB),
            "resident_without_leases_mib": rounded(before["Rss"] / MIB),
            "bytes_per_lease": rounded((after["Rss"] - before["Rss"]) / leases),
            "bound_without_buffers_mib": rounded((KEEPER_BYTES + BYTES_EACH * leases) / MIB),
            "start_seconds": rounded(seconds),
        },
    )
