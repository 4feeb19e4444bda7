# SPDX-License-Identifier: Apache-2.0
"""Fault plans: which promises an emulated function breaks, and for which transfers.

A plan is written ``name[@N[-M]],...``. ``N`` and ``M`` count the function's transfers (descriptors,
or commands of a simple engine) from 1; the fault holds from the N-th transfer on, up to and with
the M-th. Without ``@N`` it holds from the start, without ``-M`` for ever.

A function that hangs transfers nothing more, so its faults would never end. Therefore a transfer
that hung and was reset away counts, and for ``refuse_reset`` each reset that was refused counts
like a transfer: ``refuse_reset@1-3`` refuses at most three resets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

from holdfast.errors import UsageError


class Span(NamedTuple):
    """The transfers that have a fault: numbers of the first and the last one (None: no last)."""

    first: int = 0
    last: int | None = None

    def holds(self, transfers: int) -> bool:
        """True for transfer number ``transfers``."""
        return self.first <= transfers and (self.last is None or transfers <= self.last)

    def __str__(self) -> str:
        if self.last is not None:
            return f"@{self.first}-{self.last}"
        return f"@{self.first}" if self.first else ""


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Each fault is None (absent) or the transfers that have it.

    hang
        The engine stops moving data and says nothing. It stays busy, and only a reset helps.
    wild
        Told to stop, or done where it cannot be told, the engine goes on writing to the last
        destination.
    early_completion
        Completion is signalled before the last write has landed.
    refuse_reset
        A function reset is answered with an error and changes nothing.
    reset_keeps_dma
        A reset is acknowledged and clears the registers, but DMA goes on and bus mastering comes
        back on.
    lie_idle
        The engine says that it is idle while it is not.
    unplug
        The function is pulled out under the transfer: its process is no more.
    """

    hang: Span | None = None
    wild: Span | None = None
    early_completion: Span | None = None
    refuse_reset: Span | None = None
    reset_keeps_dma: Span | None = None
    lie_idle: Span | None = None
    unplug: Span | None = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The faults there are."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"wild,refuse_reset@3-5"``. The empty string is a plan without faults."""
        found: dict[str, Span] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, at, span = part.partition("@")
            name = name.strip().replace("-", "_")
            if name not in cls.names():
                raise UsageError(
                    f"unknown fault {name!r}",
                    operation="parse faults",
                    target=text,
                    hint=f"choose from {', '.join(cls.names())}, each with an optional @N or @N-M",
                )
            found[name] = _span(span, text) if at else Span()
        return cls(**found)

    def active(self) -> tuple[str, ...]:
        """Names of the faults in this plan."""
        return tuple(name for name in self.names() if getattr(self, name) is not None)

    def __str__(self) -> str:
        return ",".join(f"{name}{getattr(self, name)}" for name in self.active())


def _span(text: str, plan: str) -> Span:
    """``N`` or ``N-M``."""
    found = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", text, re.ASCII)
    if found is None:
        raise UsageError(
            f"{text!r} is not a transfer number", operation="parse faults", target=plan
        )
    first, last = int(found[1]), int(found[2]) if found[2] else None
    if last is not None and last < first:
        raise UsageError(f"{text!r} ends before it begins", operation="parse faults", target=plan)
    return Span(first, last)


def armed(span: Span | None, transfers: int) -> bool:
    """True if a fault holds for transfer number ``transfers``."""
    return span is not None and span.holds(transfers)
