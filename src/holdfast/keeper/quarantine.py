# SPDX-License-Identifier: Apache-2.0
"""A lease in quarantine: what is known of it, when it is looked at again, and who asks for that."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass(slots=True)
class Ask:
    """An operator's request to look again at once. ``answer`` is set when that has been done."""

    force: bool
    """A function-level measure may be tried although other leases lose transfers by it."""
    answer: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Quarantined:
    """Why and since when a lease is in quarantine. Used by the keeper's loop only."""

    why: str
    since_ns: int = field(default_factory=time.monotonic_ns)
    """CLOCK_MONOTONIC: durations are taken from here."""
    since: float = field(default_factory=time.time)
    """CLOCK_REALTIME in seconds: for people, and for nothing else."""
    looks: int = 0
    pause: float = 0.0
    """Seconds from the last look to the next."""
    last: str = ""
    """What the last look found."""
    asks: list[Ask] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    def ask(self, *, force: bool) -> Ask:
        """Have it looked at now."""
        self.asks.append(Ask(force))
        self.asked.set()
        return self.asks[-1]

    async def wait(self, pause: float) -> list[Ask]:
        """Wait for the next look; who asked for it, if anybody did."""
        self.pause = pause
        try:
            async with asyncio.timeout(pause):
                await self.asked.wait()
        except TimeoutError:
            pass  # its time has come
        self.asked.clear()
        asks, self.asks = self.asks, []
        return asks

    def describe(self, nbytes: int) -> dict[str, Any]:
        """For ``holdfast ps``."""
        return {
            "bytes": nbytes,
            "since": datetime.fromtimestamp(self.since, UTC).isoformat("T", "seconds"),
            "since_ns": self.since_ns,
            "seconds": round((time.monotonic_ns() - self.since_ns) / 1e9, 3),
            "why": self.why,
            "looks": self.looks,
            "next_look_s": round(self.pause, 3),
            "last_look": self.last,
        }
