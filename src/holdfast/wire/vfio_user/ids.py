# SPDX-License-Identifier: Apache-2.0
"""Message ids of one sender: which commands still wait for their reply."""

from __future__ import annotations

from typing import Generic, TypeVar

from holdfast.errors import RingFull

T = TypeVar("T")


class Outstanding(Generic[T]):
    """Commands sent and not answered, by id. Ids are 16 bits wide and go round."""

    def __init__(self, first: int = 1, limit: int = 1024) -> None:
        self._next = first & 0xFFFF
        self._limit = limit
        self._waiting: dict[int, T] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def fresh(self) -> int:
        """An id that no unanswered command uses. For commands without reply, too."""
        while self._next in self._waiting:
            self._next = (self._next + 1) & 0xFFFF
        ident = self._next
        self._next = (ident + 1) & 0xFFFF
        return ident

    def add(self, what: T) -> int:
        """Take a fresh id and remember ``what`` under it."""
        if len(self._waiting) >= self._limit:
            raise RingFull(f"{self._limit} commands wait for a reply", operation="vfio-user")
        ident = self.fresh()
        self._waiting[ident] = what
        return ident

    def get(self, ident: int) -> T | None:
        return self._waiting.get(ident)

    def take(self, ident: int) -> T | None:
        """Forget an id. None if it is not waiting: a late or invented reply."""
        return self._waiting.pop(ident, None)

    def clear(self) -> list[int]:
        """Forget all; returns the ids that will never be answered."""
        idents = list(self._waiting)
        self._waiting.clear()
        return idents
