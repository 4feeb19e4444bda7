# SPDX-License-Identifier: Apache-2.0
"""``serve --log FILE``: every step of every lease, one JSON object a line.

Appended with one write each (O_APPEND), so that lines of a keeper and of its successor neither mix
nor get lost: what was written before a kill is there.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from holdfast.keeper.anchor_link import AnchorLink
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.lease import Lease, Step


class EventLog:
    """Where a keeper's events go; nowhere without a path. Loop only."""

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600) if path else -1

    def step(self, lease: Lease, step: Step) -> None:
        """A lease took a step, or was explained."""
        if self._fd >= 0:
            self._write(
                {
                    "at_ns": step.at_ns,
                    "lease": int(lease.number),
                    "pid": lease.peer.pid,
                    "state": str(step.state),
                    "event": str(lease.machine.last) if lease.machine.last else "",
                    "facts": sorted(fact.name for fact in lease.machine.facts),
                    "policy": str(lease.machine.policy),
                    "why": step.why,
                }
            )

    def say(self, what: str, link: AnchorLink, host: FunctionHost) -> None:
        """Something happened to the keeper itself."""
        if self._fd >= 0:
            function = host.child.pid if host.child is not None else None
            self._write(
                {
                    "at_ns": time.monotonic_ns(),
                    "what": what,
                    "anchor": link.pid,
                    "function": function,
                    "strict": host.backend.promises.strict_unmap and host.arena_iova is None,
                }
            )

    def _write(self, told: dict[str, Any]) -> None:
        line = json.dumps({**told, "keeper": os.getpid()}) + "\n"
        os.write(self._fd, line.encode())
