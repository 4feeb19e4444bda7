# SPDX-License-Identifier: Apache-2.0
"""Two processes on one card. One is killed in the middle of a transfer; the other goes on.

This is the question that Holdfast exists for. The card reads from the memory of a process that is
dead. What does it read? Here: what that process wrote, to the last byte, because the pages were
never the process's to free. They go back to the system when the card is proven quiet, and
``holdfast ps`` tells when that was and how it was proven.

Run it: ``python examples/two_processes.py``
"""

import json
import signal
import subprocess
import sys
from typing import Any

import numpy as np

import holdfast

# A slow link, so that there is a middle to be killed in: 16 MiB take at least half a second.
TARGET = "emu:xdma?link_rate=32M"
NBYTES = 16 << 20
MINE, THEIRS = 0, 32 << 20


def pattern() -> Any:
    return np.random.default_rng(7).integers(0, 256, NBYTES, dtype=np.uint8)


def the_other() -> None:
    """Post one long transfer, say so, and wait for it, in vain."""
    card = holdfast.open(TARGET, access="shared")
    buffer = card.alloc(NBYTES)
    buffer.array[:] = pattern()
    transfer = card.dma.to_card(buffer, THEIRS)
    print(card.lease.number, flush=True)
    transfer.wait()


def lease_of(number: int) -> dict[str, Any]:
    """What the keeper tells of a lease, as on the command line."""
    ps = [sys.executable, "-m", "holdfast", "ps", "--all", "--json"]
    for keeper in json.loads(subprocess.check_output(ps)):
        if keeper["target"] == TARGET:
            return next(lease for lease in keeper["leases"] if lease["lease"] == number)
    raise AssertionError(f"no keeper of {TARGET}")


def main() -> None:
    with holdfast.open(TARGET, access="shared") as card:
        child = subprocess.Popen([sys.executable, __file__, "other"], stdout=subprocess.PIPE)
        assert child.stdout is not None
        number = int(child.stdout.readline())
        print(f"process {child.pid} holds lease {number} and has posted {NBYTES >> 20} MiB")
        child.send_signal(signal.SIGKILL)
        child.communicate()
        print(f"process {child.pid} is dead: exit status {child.returncode}")

        # This process does not notice. It has a channel and memory of its own.
        mine = card.alloc(64 << 10)
        rounds = 0
        while (lease := lease_of(number))["state"] not in ("released", "quarantine"):
            for _ in range(10):
                mine.array[:] = rounds % 251
                card.dma.to_card(mine, MINE).wait(timeout=5)
                assert (card.bars[2].view(MINE, mine.nbytes) == rounds % 251).all()
                rounds += 1
        print(f"meanwhile this process made {rounds} transfers of its own")

        print(f"what became of lease {number}:")
        _, start, _ = lease["log"][0]
        for state, at, why in lease["log"]:
            print(f"  {(at - start) / 1e6:7.1f} ms  {state:<9} {why}")
        assert lease["state"] == "released"
        assert lease["in_flight_at_death"] > 0
        assert lease["completed_after_death"]

        arrived = card.bars[2].view(THEIRS, NBYTES)
        assert np.array_equal(arrived, pattern())
        print("every byte of the dead process's transfer is on the card")


if __name__ == "__main__":
    if sys.argv[1:] == ["other"]:
        the_other()
    else:
        main()
