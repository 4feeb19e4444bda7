# SPDX-License-Identifier: Apache-2.0
"""A card whose engine is started through plain memory of a BAR: ``emu:mailbox_card.py:Mailbox``.

Whoever has that BAR mapped can start it, and nobody can take the window back. It polls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import holdfast
from holdfast.driver import ControlMemory, Grant
from holdfast.emu import BarSpec, Function, Identity
from holdfast.errors import DmaFault
from holdfast.values import Area

GO, ADDRESS, LENGTH, BYTE = 0, 8, 16, 24
"""Offsets of 8-byte words: 1 starts and 0 is idle; where to; how many bytes; and of which value."""
POLL = 0.001


class Mailbox(Function):
    """Fills memory with a byte when it finds an order."""

    identity = Identity(vendor=0x1234, device=0xB0B0)
    bars = (BarSpec(0, 4096, ram=(Area(0, 4096),)),)
    driver = "MailboxDriver"

    def work(self) -> float | None:
        words = self.memory(0)[:32].view("<u8")
        if words[GO // 8] == 1:
            try:
                count = int(words[LENGTH // 8])
                self.dma.write(int(words[ADDRESS // 8]), np.full(count, words[BYTE // 8], np.uint8))
            except DmaFault:
                pass  # posted
            words[GO // 8] = 0
        return POLL


class MailboxDriver(holdfast.Driver):
    """Keeper half."""

    name = "mailbox"
    stop_is_final = True  # as long as nobody has the BAR mapped: the keeper sees to that

    def grant(self, channels: Sequence[int], control: ControlMemory | None) -> Grant:
        return Grant()

    def in_flight(self, channels: Sequence[int]) -> int:
        return self.fn.bar(0).load(GO, 8)

    def stop(self, channels: Sequence[int]) -> bool:
        return self.in_flight(channels) == 0
