# SPDX-License-Identifier: Apache-2.0
"""What a driver gives to a keeper that posts requests on behalf of clients (mediated access).

A :class:`Poster` is the keeper-side counterpart of an engine's client half: it writes descriptors
and rings doorbells, for ranges that the keeper has checked. It is made anew whenever its channels
are granted anew. Everything is vectorised; nothing waits for the function.

Threads: all methods are called from one thread, which is not the one of the driver's keeper half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

U64s = npt.NDArray[np.uint64]

Bells: TypeAlias = Callable[[int, int], Callable[[int], None] | None]
"""``bells(bar, offset)``: what rings the doorbell register there, or None where there is none.

It stays good until the channels are stopped.
"""


class Lane(Protocol):
    """One direction of one hardware queue, which finishes what is posted in order."""

    @property
    def vector(self) -> int | None:
        """The interrupt vector that says that something finished; None: it must be polled."""
        ...

    def room(self) -> int:
        """How many descriptors can be posted now."""
        ...

    def post(self, host: U64s, card: U64s, lengths: U64s) -> None:
        """Post copies between bus addresses and card addresses: at most :meth:`room`, each within
        the poster's ``max_bytes``. The end of at least the last one is reported."""
        ...

    def completed(self) -> int:
        """How many descriptors have finished since the channel was started. Never falls."""
        ...

    def error(self) -> bool:
        """Whether the engine stopped with an error, at the descriptor behind those finished."""
        ...

    def acknowledge(self) -> None:
        """The interrupt was taken; let the function raise the next one."""
        ...


@dataclass(frozen=True, slots=True)
class Poster:
    """A started engine, ready for checked requests.

    to_card, from_card
        the two queues; may be the same object if the function has one for both
    card_bytes
        card addresses from 0 up to this many bytes exist
    align
        a power of two that offsets, lengths and card addresses must be multiples of
    """

    to_card: Lane
    from_card: Lane
    card_bytes: int
    align: int = 1

    @property
    def lanes(self) -> Sequence[Lane]:
        """To the card first."""
        return self.to_card, self.from_card
