# SPDX-License-Identifier: Apache-2.0
"""A card that comes without a driver: two message interrupts and one register."""

from __future__ import annotations

from holdfast.emu import BarSpec, Function, Identity
from holdfast.regs.spec import Bank, Register

RAISE = Register("raise", 0x00)


class BareCard(Function):
    identity = Identity(vendor=0x1234, device=0x0F02)
    bars = (BarSpec(0, 4096, banks=(Bank("bare", (RAISE,)),)),)
    msi = 2

    def __init__(self) -> None:
        super().__init__()
        self.on_write(RAISE, lambda _, value: self.interrupt(value))
