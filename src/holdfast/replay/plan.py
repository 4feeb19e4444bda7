# SPDX-License-Identifier: Apache-2.0
"""What a story needs before it begins, read from the whole of it.

Addresses are chosen here. An I/O virtual address is any number; under an identity domain it means
the frame of that number. A story in which the card ends up in one says that *some* frame is hit,
so the address of the descriptor is chosen to be the number of a frame that harms somebody.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from holdfast.errors import NotSupported, UsageError
from holdfast.kernel.mapping import PAGE
from holdfast.spec.trace import Trace
from holdfast.spec.world import Dom

State = Mapping[str, int]

RAM: Final = 16 << 20
"""Physical address of frame 0: what the card is told where nothing translates."""
VIRTUAL: Final = 64 << 20
"""I/O virtual addresses begin here. Below edu's 28 bits."""
_CELL: Final = re.compile(r"(\w+'?)\[([\d, ]*)\]")


def indices(state: State, name: str) -> Iterator[tuple[int, ...]]:
    """Where an array of the story is not 0."""
    for cell, value in state.items():
        found = _CELL.fullmatch(cell)
        if found is not None and found[1] == name and value:
            yield tuple(int(part) for part in found[2].split(","))


def value(state: State, name: str, *index: int) -> int:
    """One variable of the story; 0 if it does not tell of it."""
    return state.get(f"{name}{list(index)}" if index else name, 0)


def physical(f: int) -> int:
    """The address of a frame."""
    return RAM + f * PAGE


@dataclass(slots=True)
class Plan:
    """Everything that has to be there from the start."""

    frames: int
    honest: bool
    """A reset of this card stops DMA."""
    translated: bool
    master: bool = False
    """Whether the card is a bus master from the start."""
    arrivals: int = 0
    """Processes that begin, innocent ones among them."""
    addresses: dict[int, int] = field(default_factory=dict)
    """IOVA of the story to a number."""


MOST: Final = 64
"""Of frames, processes, descriptors and addresses, and of rows of the keeper's table."""


def plan(trace: Trace) -> Plan:
    """Look through a story. UsageError if it has no steps or a step names no frame it could."""
    if not trace.steps:
        raise UsageError("the story has no steps", operation="replay", target=trace.strategy)
    for number, step in enumerate(trace.steps, 1):
        for name, index in step.args.items():
            if not 0 <= index < MOST:
                raise UsageError(
                    f"step {number} ({step.event}) names {name} = {index}",
                    operation="replay",
                    target=trace.strategy,
                    hint=f"no story has more than {MOST} of anything",
                )
    named = [value for step in trace.steps for key, value in step.args.items() if key in "fg"]
    iovas = {step.args["i"] for step in trace.steps if "i" in step.args}
    made = Plan(
        frames=1 + max(named, default=0),
        honest=not value(trace.start, "lies"),
        translated=trace.iommu != "none",
        master=bool(value(trace.start, "bme")),
        arrivals=sum(step.event in ("arrive", "other_takes") for step in trace.steps),
        addresses={i: VIRTUAL + i * PAGE for i in iovas},
    )
    _mislead(trace, made)
    return made


def _mislead(trace: Trace, made: Plan) -> None:
    """Where the identity domain is: have addresses mean frames that they never meant."""
    for before, step in zip(
        (trace.start, *(s.after for s in trace.steps)), trace.steps, strict=False
    ):
        if step.event not in ("land", "dma_read") or value(before, "dom") != Dom.DEFAULT:
            continue
        d = step.args["d"]
        named = [i for (each, i) in indices(before, "named") if each == d]
        hit = _victim(before, d, made.frames)
        if len(named) == 1 and hit is not None:
            made.addresses[named[0]] = physical(hit)


def _victim(state: State, d: int, frames: int) -> int | None:
    """A frame that a stray access for ``d`` would do harm in; the worst there is."""
    owners = [p for (each, p) in indices(state, "owner") if each == d]

    def harm(f: int) -> int:
        innocent = value(state, "other", f) or any(
            p not in owners for (p, each) in indices(state, "map") if each == f
        )
        mine = value(state, "target", d, f) and value(state, "fresh", d)
        return 0 if mine else 2 if innocent else 1

    worst = max(range(frames), key=harm)
    return worst if harm(worst) else None


def refuse(event: str, hint: str) -> NotSupported:
    """The error for what cannot be played."""
    return NotSupported(f"{event}: it cannot be played", operation="replay", hint=hint)
