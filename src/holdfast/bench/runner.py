# SPDX-License-Identifier: Apache-2.0
"""Which figures there are, and a run of some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from holdfast.bench import (
    death,
    mediated,
    opening,
    posting,
    registers,
    scale,
    silence,
    traffic,
)
from holdfast.bench.plan import FULL, QUICK, Run
from holdfast.bench.result import Result

Bench = Callable[[Run], list[Result]]

BENCHES: dict[str, Bench] = {
    "dma_h2c": traffic.dma_h2c,
    "dma_c2h": traffic.dma_c2h,
    "sg_h2c": traffic.sg_h2c,
    "sg_c2h": traffic.sg_c2h,
    "post_256": posting.post_256,
    "post_32": posting.post_32,
    "mediated_small": mediated.mediated_small,
    "mediated_h2c": mediated.mediated_h2c,
    "mediated_c2h": mediated.mediated_c2h,
    "register_trapped": registers.register_trapped,
    "register_mapped": registers.register_mapped,
    "open_cold": opening.open_cold,
    "open_warm": opening.open_warm,
    "keeper_messages": silence.keeper_messages,
    "kills": death.kills,
    "scale": scale.scale,
}
SEVERAL = ("kills", "mediated_small", "scale")
"""Benches that yield several figures; each of the others yields the one of its name."""

FIGURES: dict[str, str] = {
    **{name: name for name in BENCHES if name not in SEVERAL},
    "mediated_cpu": "mediated_small",
    "mediated_rate": "mediated_small",
    "kill_to_detected": "kills",
    "kill_to_quiet": "kills",
    "quiet_to_released": "kills",
    "quiet_to_released_arena": "kills",
    "release_among_leases": "scale",
    "release_among_leases_running": "scale",
    "release_all_leases": "scale",
    "keeper_memory": "scale",
}
"""Figure to the bench that yields it."""


def run_benches(
    only: Iterable[str] = (), *, quick: bool = False, say: Callable[[str], None] = lambda _: None
) -> list[Result]:
    """Measure the named figures, or all. Forks: call it from a single-threaded process.

    ``say`` is told the name of each bench before it runs.
    """
    chosen = set(only) or set(FIGURES)
    needed = {FIGURES[figure] for figure in chosen}
    found: list[Result] = []
    with Run(QUICK if quick else FULL) as run:
        for name, bench in BENCHES.items():
            if name in needed:
                say(name)
                found += [result for result in bench(run) if result.name in chosen]
    return found
