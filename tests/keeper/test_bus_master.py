# SPDX-License-Identifier: Apache-2.0
"""The keeper's hand on the command register: its own bits and no others."""

from __future__ import annotations

from typing import cast

import pytest

from holdfast.contracts import FunctionBackend
from holdfast.errors import DeviceError
from holdfast.keeper.access import set_bus_master
from holdfast.uapi.pci_regs import COMMAND, Command
from holdfast.values import CONFIG_REGION, Target

TARGET = Target("emu", "x")
OTHERS = 0xF5F8 & ~0x06
"""Every bit of the register but memory space and bus master, named or not."""


class Register:
    """Configuration space with a command register that takes ``writable`` bits."""

    def __init__(self, value: int, writable: int = 0xFFFF) -> None:
        self.value = value
        self.writable = writable

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        assert (index, offset) == (CONFIG_REGION, COMMAND)
        return self.value.to_bytes(count, "little")

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        assert (index, offset) == (CONFIG_REGION, COMMAND)
        new = int.from_bytes(data, "little")
        self.value = (new & self.writable) | (self.value & ~self.writable)

    def set(self, on: bool) -> None:
        set_bus_master(cast(FunctionBackend, self), TARGET, on=on)


def test_bus_master_off_keeps_memory_space_and_every_other_bit() -> None:
    register = Register(OTHERS | 0x06)
    register.set(on=False)
    assert register.value == OTHERS | Command.MEMORY


def test_bus_master_on_adds_memory_space_and_keeps_every_other_bit() -> None:
    register = Register(OTHERS)
    register.set(on=True)
    assert register.value == OTHERS | Command.MEMORY | Command.MASTER


@pytest.mark.parametrize("on", [True, False])
def test_a_bit_that_does_not_take_is_an_error(on: bool) -> None:
    register = Register(0 if on else 0x06, writable=0xFFFF & ~0x04)
    with pytest.raises(DeviceError, match="did not turn"):
        register.set(on=on)
