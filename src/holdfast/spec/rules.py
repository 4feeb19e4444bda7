# SPDX-License-Identifier: Apache-2.0
"""What can happen: a rule is who does what, when it can happen, and what changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from holdfast.spec.layout import Batch, Mask


@dataclass(frozen=True, slots=True)
class Rule:
    """One event of the model, for one choice of its process, frame and descriptor.

    Both functions work on a batch: ``guard`` says in which of its states the event can happen;
    ``effect`` changes states in all of which it does, and reports what it breaks with
    :meth:`~holdfast.spec.layout.Batch.fail`.
    """

    event: str
    """Its name in traces: ``kill``, ``dma_write``."""
    actor: str
    """Who does it: ``P0``, ``device``, ``kernel``, ``keeper``."""
    text: str
    """One sentence of the story."""
    guard: Callable[[Batch], Mask]
    effect: Callable[[Batch], None]
    args: Mapping[str, int] = field(default_factory=dict)
    """Which process (p), frame (f), descriptor (d) and IOVA (i) it is about."""
    fair: bool = False
    """If it can happen for ever, it does (weak fairness)."""
    label: str = ""
    """What an observer of the real keeper's log sees of it; empty: nothing."""

    def __str__(self) -> str:
        return f"{self.actor}: {self.text}"
