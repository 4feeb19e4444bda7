# SPDX-License-Identifier: Apache-2.0
"""A handover while it is taken in: every descriptor ends up with an owner, or closed.

Notes come from a predecessor by way of others. They are checked for their type here, and for their
sense by whoever asks.
"""

from __future__ import annotations

import os
from typing import Self

from holdfast.errors import ProtocolError
from holdfast.values import Handover


class Incoming:
    """Owns the descriptors of a handover that nobody has taken yet. Not thread-safe.

    A context manager: what is left at the end is closed. Whatever is missing or of a wrong type is
    a ProtocolError.
    """

    def __init__(self, handover: Handover, target: str = "") -> None:
        self._target = target
        self._notes = handover.notes
        self._fds = dict(handover.fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __contains__(self, name: str) -> bool:
        """Whether there is a descriptor of this name that was not taken."""
        return name in self._fds

    def fd(self, name: str) -> int:
        """Look at a descriptor; it stays owned here."""
        try:
            return self._fds[name]
        except KeyError:
            raise self.wrong(f"no descriptor {name!r}") from None

    def take(self, name: str) -> int:
        """A descriptor; the caller owns it from now on."""
        found = self.fd(name)
        del self._fds[name]
        return found

    def has(self, note: str) -> bool:
        """Whether a note is there, and not null."""
        return self._notes.get(note) is not None

    def number(self, note: str) -> int:
        """A note that is a number, 0 or more."""
        found = self._notes.get(note)
        if not isinstance(found, int) or found < 0:
            raise self.wrong(f"{note} is {found!r}")
        return found

    def text(self, note: str) -> str:
        """A note that is text."""
        found = self._notes.get(note)
        if not isinstance(found, str):
            raise self.wrong(f"{note} is {found!r}")
        return found

    def numbers(self, note: str) -> list[int]:
        """A note that is a list of numbers, 0 or more."""
        found = self._notes.get(note)
        if isinstance(found, list) and all(isinstance(item, int) and item >= 0 for item in found):
            return found
        raise self.wrong(f"{note} is no list of numbers")

    def require(self, note: str, value: str) -> None:
        """Check that a note says this."""
        if self._notes.get(note) != value:
            raise self.wrong(f"{note} is {self._notes.get(note)!r}, not {value!r}")

    def wrong(self, what: str) -> ProtocolError:
        """The error for a handover that makes no sense."""
        return ProtocolError(
            f"this cannot be gone on with: {what}", operation="take over", target=self._target
        )
