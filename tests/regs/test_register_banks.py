# SPDX-License-Identifier: Apache-2.0
"""The register tables say what the datasheets say."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.regs import edu, xdma
from holdfast.regs.spec import Bank, Field, Register
from holdfast.regs.xdma import Direction, Target


@pytest.mark.parametrize(
    ("register", "index", "offset"),
    [
        (xdma.CHANNEL[Direction.H2C].control, 0, 0x0004),
        (xdma.CHANNEL[Direction.H2C].irq_enable_w1c, 3, 0x0398),
        (xdma.CHANNEL[Direction.C2H].status_rc, 2, 0x1244),
        (xdma.CHANNEL[Direction.C2H].completed_count, 0, 0x1048),
        (xdma.SG[Direction.H2C].descriptor_lo, 1, 0x4180),
        (xdma.SG[Direction.C2H].descriptor_credits, 3, 0x538C),
        (xdma.SG_CREDIT_MODE_W1S, 0, 0x6024),
        (xdma.IRQ_CHANNEL_VECTOR, 1, 0x20A4),
        (xdma.IRQ_USER_VECTOR, 3, 0x208C),
        (xdma.CONFIG_WRITE_FLUSH, 0, 0x3060),
        (edu.IRQ_ACKNOWLEDGE, 0, 0x64),
        (edu.DMA_COMMAND, 0, 0x98),
    ],
)
def test_registers_lie_where_the_datasheet_puts_them(
    register: Register, index: int, offset: int
) -> None:
    assert register.at(index) == offset


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (xdma.identifier(Target.H2C), 0x1FC00006),
        (xdma.identifier(Target.H2C, 1, stream=True), 0x1FC08106),
        (xdma.identifier(Target.C2H, stream=True), 0x1FC18006),
        (xdma.identifier(Target.IRQ), 0x1FC20006),
        (xdma.identifier(Target.CONFIG), 0x1FC30006),
        (xdma.identifier(Target.C2H_SG, stream=True), 0x1FC58006),
        (xdma.identifier(Target.SG_COMMON), 0x1FC60006),
    ],
)
def test_xdma_identifiers_follow_the_pattern_of_the_guide(word: int, expected: int) -> None:
    assert word == expected


def test_the_configuration_bar_leaves_room_for_the_msix_table() -> None:
    last = max(
        register.at(index) for bank in xdma.CONFIG_BANKS for register, index in bank.instances()
    )
    assert last < xdma.MSIX_TABLE_OFFSET
    assert xdma.MSIX_TABLE_OFFSET + 16 * xdma.MSIX_VECTORS <= xdma.MSIX_PBA_OFFSET


def test_banks_of_the_configuration_bar_do_not_overlap_each_other() -> None:
    Bank("all", tuple(row for bank in xdma.CONFIG_BANKS for row in bank.registers))


def test_overlapping_registers_are_refused() -> None:
    with pytest.raises(ValueError, match="overlaps"):
        Bank("bad", (Register("a", 0, width=8), Register("b", 4)))


def test_the_descriptor_has_the_hardware_layout() -> None:
    row = np.zeros(1, xdma.DESCRIPTOR)
    for value, name in enumerate(("control", "length", "source", "destination", "next"), 1):
        row[name] = value
    assert row.view("<u4").tolist() == [1, 2, 3, 0, 4, 0, 5, 0]
    assert xdma.DESC_ADJACENT.put(0x3F) == 0x3F00


def test_fields_read_back_what_they_put() -> None:
    field = Field("x", 13, 8)
    assert field.get(field.put(0x2A) | 0xFFFF00FF) == 0x2A
