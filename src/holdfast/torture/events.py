# SPDX-License-Identifier: Apache-2.0
"""The keepers' event log (``serve --log``), read back: one story for each lease.

Several keepers may have written it, one after the other. Lines are whole, because each is one
write, and in order; a lease's story goes on under the next keeper where it stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_IN_FLIGHT = re.compile(r"^(\d+) in flight$")
_FORCED = frozenset({"stopping", "isolating", "resetting", "unmapped", "quarantine"})


def read(
    path: Path, told: Sequence[dict[str, Any]] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every lease with its log of ``(state, at_ns, why)``, and what happened to the keepers.

    ``told``: leases as ``ps`` tells of them, which knows better where it knows. A missing file is
    an empty one.
    """
    leases: dict[int, dict[str, Any]] = {}
    happened = []
    for line in lines(path):
        entry = json.loads(line)
        if "what" in entry:
            happened.append(entry)
            continue
        number = entry["lease"]
        lease = leases.setdefault(number, {"lease": number, "pid": entry["pid"], "log": []})
        lease["log"].append((entry["state"], entry["at_ns"], entry["why"]))
    for known in told:
        lease = leases.setdefault(
            known["lease"], {"lease": known["lease"], "pid": known["pid"], "log": known["log"]}
        )
        for name in ("in_flight_at_death", "completed_after_death"):
            lease[name] = known[name]
    for lease in leases.values():
        _complete(lease)
    return [leases[number] for number in sorted(leases)], happened


def lines(path: Path) -> list[str]:
    """The log's lines; none if there is no file."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _complete(lease: dict[str, Any]) -> None:
    """What a lease had in flight, and whether it was let finish, as far as the log tells."""
    states = [state for state, _, _ in lease["log"]]
    counts = [int(found[1]) for _, _, why in lease["log"] if (found := _IN_FLIGHT.match(why))]
    lease["state"] = states[-1] if states else ""
    lease.setdefault("in_flight_at_death", counts[0] if counts else 0)
    finished = "draining" in states and "quiet" in states and not _FORCED & set(states)
    lease.setdefault("completed_after_death", bool(lease["in_flight_at_death"]) and finished)
