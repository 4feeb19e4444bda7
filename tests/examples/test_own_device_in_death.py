# SPDX-License-Identifier: Apache-2.0
"""The one-file device's keeper half: a client dies while the card reads its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack

FILE = Path(__file__).parents[2] / "examples" / "own_device.py"
TARGET = f"emu:{FILE}:Histogrammer"
CLIENT = """
import sys
import numpy as np
import holdfast
card = holdfast.open(sys.argv[1])
data, counts = card.alloc(128 << 20), card.alloc(256, np.uint32)
job = card.dma.count(data, counts)
print(card.lease.number, flush=True)
job.wait()
"""


def killed_in_mid_job(policy: str) -> dict[str, Any]:
    """What the keeper tells of the lease of a client that was killed after its job was posted."""
    with Stack(TARGET, ["--policy", policy]) as stack:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, TARGET], stdout=subprocess.PIPE, text=True
        )
        try:
            assert client.stdout is not None
            number = int(client.stdout.readline())
        finally:
            client.kill()
            client.communicate()

        def lease() -> dict[str, Any]:
            found: dict[str, Any]
            (found,) = [each for each in stack.ps()["leases"] if each["lease"] == number]
            return found

        assert settle(lambda: lease()["state"] != "released", goal=0, timeout=20) == 0
        return lease()


def test_under_drain_the_card_finishes_the_dead_clients_job() -> None:
    lease = killed_in_mid_job("drain")
    assert lease["in_flight_at_death"] == 1
    assert lease["completed_after_death"]
    assert [state for state, _, _ in lease["log"]][1:5] == [
        "frozen",
        "draining",
        "quiet",
        "released",
    ]


def test_under_revoke_the_card_is_stopped_between_two_pieces() -> None:
    lease = killed_in_mid_job("revoke")
    assert lease["in_flight_at_death"] == 1
    assert not lease["completed_after_death"]
    states = [state for state, _, _ in lease["log"]]
    assert states[1:] == ["frozen", "stopping", "quiet", "released"]
