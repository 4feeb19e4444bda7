# SPDX-License-Identifier: Apache-2.0
"""The link between card and host: how many bytes may move now, and when the next may.

A token bucket that holds one chunk. Time is kept as the moment at which the link is free again, so
rounding and late wake-ups do not add up: an engine that was told to wait and came back late is
granted chunks back to back until it has caught up. A link that was *idle* saves nothing: its next
grant starts from now (or, if it fell idle before it had caught up, a bounded time earlier).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from holdfast.errors import UsageError

CATCH_UP = 0.1
"""Seconds of lateness that are made good at most; a longer stall (a stopped process) is lost."""


class Link:
    """One direction-less link that all channels of a function share.

    rate
        Bytes per second, or None for as fast as memory.
    chunk
        Bytes that move at once on a limited link.
    latency
        Seconds for a descriptor fetch to come back when the engine was starved.
    clock
        Monotonic seconds; tests pass their own.

    Not thread-safe: only the engine thread asks.
    """

    def __init__(
        self,
        rate: float | None = None,
        chunk: int = 65536,
        latency: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if rate is not None and not rate > 0:
            raise UsageError(f"link rate {rate} is not positive", operation="make link")
        if chunk < 1 or latency < 0:
            raise UsageError("link chunk or latency out of range", operation="make link")
        self.rate = rate
        self.chunk = chunk
        self.latency = latency
        self.clock = clock
        self._free_at = 0.0
        self._waited = False

    def grant(self, wanted: int) -> tuple[int, float]:
        """``(bytes that may move now, seconds to wait)``; one of the two is 0.

        The bytes granted are spent, so ask only for what will be moved at once.
        """
        if self.rate is None or wanted <= 0:
            return wanted, 0.0
        now = self.clock()
        if now < self._free_at:
            self._waited = True
            return 0, self._free_at - now
        start = max(self._free_at, now - CATCH_UP) if self._waited else now
        granted = min(wanted, self.chunk)
        self._free_at = start + granted / self.rate
        if self._free_at > now:
            self._waited = False  # caught up
        return granted, 0.0
