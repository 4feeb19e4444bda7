# SPDX-License-Identifier: Apache-2.0
"""An event that costs next to nothing until somebody waits for it."""

from __future__ import annotations

import asyncio


class SparseEvent:
    """``asyncio.Event`` for thousands of objects of which few are ever waited for. Loop only.

    The real one has a deque for its waiters from the start, three quarters of a kilobyte.
    """

    __slots__ = ("_event", "_set")

    def __init__(self) -> None:
        self._set = False
        self._event: asyncio.Event | None = None

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        """Wake whoever waits, and let later waits pass until :meth:`clear`."""
        self._set = True
        if self._event is not None:
            self._event.set()

    def clear(self) -> None:
        """Let waits wait again."""
        self._set = False
        if self._event is not None:
            self._event.clear()

    async def wait(self) -> None:
        """Return once it is set."""
        if self._set:
            return
        if self._event is None:
            self._event = asyncio.Event()
        await self._event.wait()
