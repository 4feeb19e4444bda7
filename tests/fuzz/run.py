# SPDX-License-Identifier: Apache-2.0
"""``make fuzz``: a million frames and more. Everything follows from the seed, which is printed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import holdfast
from holdfast.torture import fuzz
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack

TARGET = "emu:xdma?memory=1M&channels=4"


def watch(name: str, tallies: Iterator[fuzz.Tally], frames: int) -> fuzz.Tally:
    """Run a fuzzer to its end, and say how far it is."""
    tally, began, told = fuzz.Tally(), time.monotonic(), 0.0
    for tally in tallies:
        if time.monotonic() - told > 2:
            told = time.monotonic()
            sys.stderr.write(f"{name}: {tally.frames}/{frames}\n")
    spent = time.monotonic() - began
    sys.stdout.write(f"{name}: {tally.frames} frames in {spent:.0f} s, {tally.taken} taken, "
                     f"{tally.by_target}\n")  # fmt: skip
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFF_FFFF)
    parser.add_argument("--frames", type=int, default=1_000_000)
    chosen = parser.parse_args()
    real = chosen.frames // 50
    sys.stdout.write(f"seed {chosen.seed} (make fuzz SEED={chosen.seed} repeats it)\n")
    watch("decoders", fuzz.fuzz_decoders(chosen.seed, chosen.frames), chosen.frames)
    with Stack(TARGET) as stack:
        keeper = stack.keeper_pid
        watch("keeper", fuzz.fuzz_keeper(TARGET, chosen.seed, real), real)
        with holdfast.open(TARGET, timeout=20) as card:
            card.dma.to_card(card.alloc(4096)).wait(20)
        left = settle(
            lambda: sum(lease["state"] != "released" for lease in stack.ps()["leases"]),
            goal=0, timeout=30,
        )  # fmt: skip
        told = stack.ps()
        if left or told["unaccounted_bytes"] or told["keeper"] != keeper:
            sys.exit(f"FAILED: {left} leases left, {told['unaccounted_bytes']} bytes unaccounted, "
                     f"keeper {keeper} is now {told['keeper']}")  # fmt: skip
    sys.stdout.write("nothing found\n")


if __name__ == "__main__":
    main()
