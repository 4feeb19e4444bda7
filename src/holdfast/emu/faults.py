# SPDX-License-Identifier: Apache-2.0
"""Fault plans: which promises an emulated function breaks, and from which transfer on.

A plan is written ``name[@N],name[@N]``. ``N`` counts the function's transfers (descriptors, or
commands of a simple engine) from 1; the fault holds from the N-th transfer on. Without ``@N`` it
holds from the start.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from holdfast.errors import UsageError


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Each fault is None (absent) or the number of the first transfer that has it.

    hang
        The engine stops moving data and says nothing. It stays busy, and only a reset helps.
    wild
        Told to stop, the engine goes on writing to the last destination.
    early_completion
        Completion is signalled before the last write has landed.
    refuse_reset
        A function reset is answered with an error and changes nothing.
    reset_keeps_dma
        A reset is acknowledged and clears the registers, but DMA goes on and bus mastering comes
        back on.
    lie_idle
        The engine says that it is idle while it is not.
    """

    hang: int | None = None
    wild: int | None = None
    early_completion: int | None = None
    refuse_reset: int | None = None
    reset_keeps_dma: int | None = None
    lie_idle: int | None = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The faults there are."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"wild,refuse_reset@3"``. The empty string is a plan without faults."""
        found: dict[str, int] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, at, count = part.partition("@")
            name = name.strip().replace("-", "_")
            if name not in cls.names():
                raise UsageError(
                    f"unknown fault {name!r}",
                    operation="parse faults",
                    target=text,
                    hint=f"choose from {', '.join(cls.names())}, each with an optional @N",
                )
            if at and not (count.isascii() and count.isdigit()):
                raise UsageError(
                    f"{count!r} is not a transfer number", operation="parse faults", target=text
                )
            found[name] = int(count) if at else 0
        return cls(**found)

    def active(self) -> tuple[str, ...]:
        """Names of the faults in this plan."""
        return tuple(name for name in self.names() if getattr(self, name) is not None)

    def __str__(self) -> str:
        parts = []
        for name in self.active():
            first = getattr(self, name)
            parts.append(f"{name}@{first}" if first else name)
        return ",".join(parts)


def armed(first: int | None, transfers: int) -> bool:
    """True if a fault that starts at transfer ``first`` holds for transfer number ``transfers``."""
    return first is not None and transfers >= first
