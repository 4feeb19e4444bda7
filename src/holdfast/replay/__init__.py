# SPDX-License-Identifier: Apache-2.0
"""Stories of the specification, played with real processes, real memory and a real function.

The specification claims that an order of events corrupts memory (or that no order does). That claim
rests on a model, and a model can be wrong in what it leaves out. Here the events are carried out: a
process that is killed is killed with SIGKILL, a page that is given to somebody else is mapped and
filled by a process that never heard of the card, and the card is an emulated function in a process
of its own. Who is innocent looks for bytes that it did not write. Nothing else is a verdict.

Read :mod:`holdfast.replay.stage`, then :mod:`holdfast.replay.acts`.
"""

from __future__ import annotations

from holdfast.replay.card import PacedCard
from holdfast.replay.clocked import ClockedCard
from holdfast.replay.failure import Disagreement
from holdfast.replay.outcome import Outcome
from holdfast.replay.playing import TARGETS, run

__all__ = ["TARGETS", "ClockedCard", "Disagreement", "Outcome", "PacedCard", "run"]
