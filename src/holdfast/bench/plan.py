# SPDX-License-Identifier: Apache-2.0
"""What a run is made of: how much of everything, and the stack that the figures share."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import holdfast
from holdfast.bench.peer import CPeer
from holdfast.device import Device
from holdfast.drivers.xdma_engine import XdmaEngine
from holdfast.errors import NotSupported
from holdfast.torture.stack import Stack

OPEN_TIMEOUT = 20.0
WAIT = 30.0
"""Seconds for any transfer: a figure that takes longer is no figure."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. ``nbytes`` is also the memory of the emulated card."""

    nbytes: int = 64 << 20
    rounds: int = 7
    posts: int = 4000
    requests: int = 64_000
    loads: int = 2000
    mapped_loads: int = 200_000
    opens_cold: int = 5
    opens_warm: int = 100
    kills: int = 100
    leases: int = 1000
    lonely: int = 100
    """Deaths one by one, of each kind, for each number of other leases."""
    transfers: int = 1000


FULL = Sizes()
QUICK = Sizes(
    nbytes=8 << 20,
    rounds=2,
    posts=100,
    requests=1024,
    loads=100,
    mapped_loads=5000,
    opens_cold=1,
    opens_warm=10,
    kills=6,
    leases=20,
    lonely=3,
    transfers=50,
)


@dataclass(slots=True)
class Run:
    """One run of the bench: sizes, one keeper with one card, the C peer. A context manager.

    The stack is started when the first figure needs it. Figures fork, so no device may stay open
    between two of them, and nothing here starts threads.
    """

    sizes: Sizes
    _stack: Stack | None = None
    _peer: CPeer | None = None
    _exits: ExitStack = field(default_factory=ExitStack)

    @property
    def target(self) -> str:
        """The card; its link is unlimited."""
        return f"emu:xdma?memory={self.sizes.nbytes}"

    @property
    def stack(self) -> Stack:
        """The keeper that all figures share."""
        if self._stack is None:
            self._stack = self._exits.enter_context(Stack(self.target))
        return self._stack

    @property
    def peer(self) -> CPeer:
        """The C peer; its methods answer None where there is no compiler."""
        if self._peer is None:
            self._peer = self._exits.enter_context(CPeer())
        return self._peer

    def open(self) -> Device:
        """A lease of one channel of the shared card. The caller closes it."""
        return holdfast.open(self.stack.target, access="shared", timeout=OPEN_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exits.close()


def engine_of(card: Device) -> XdmaEngine:
    """The XDMA client half of an open card."""
    if not isinstance(card.dma, XdmaEngine):
        raise NotSupported("the card has no XDMA engine", operation="bench", target=str(card))
    return card.dma
