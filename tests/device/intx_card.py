# SPDX-License-Identifier: Apache-2.0
"""A card with nothing but one level-triggered interrupt line, and its driver."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.driver import ControlMemory, Driver, Grant
from holdfast.emu import BarSpec, Function, Identity
from holdfast.regs.spec import Bank, Register

RAISE = Register("raise", 0x00)
ACKNOWLEDGE = Register("acknowledge", 0x04)


class LineCard(Function):
    identity = Identity(vendor=0x1234, device=0x0F01)
    bars = (BarSpec(0, 4096, banks=(Bank("line", (RAISE, ACKNOWLEDGE)),)),)
    driver = "LineDriver"

    def __init__(self) -> None:
        super().__init__()
        self.on_write(RAISE, lambda _, __: self.interrupt())
        self.on_write(ACKNOWLEDGE, lambda _, __: self.deassert())


class LineDriver(Driver):
    name = "line"
    stop_is_final = True

    def grant(self, channels: Sequence[int], control: ControlMemory | None) -> Grant:
        return Grant(vectors=(0,))

    def in_flight(self, channels: Sequence[int]) -> int:
        return 0
