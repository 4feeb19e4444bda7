# SPDX-License-Identifier: Apache-2.0
"""Configuration space as software sees it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.emu.config_space import BarSpec, ConfigSpace, Event, Identity, MsixSpec
from holdfast.errors import UsageError
from holdfast.uapi import pci_regs as pci

EDU = Identity(0x1234, 0x11E8, 0x00FF00, 0x10, 0x1AF4, 0x1100)


def edu_space() -> ConfigSpace:
    return ConfigSpace(EDU, (BarSpec(0, 1 << 20),), msi=1)


def full_space() -> ConfigSpace:
    return ConfigSpace(
        EDU,
        (BarSpec(0, 4096),),
        msi=4,
        msix=MsixSpec(32, 0, 0x800, 0xC00),
        power=True,
        express=True,
        flr=True,
    )


def word(space: ConfigSpace, offset: int, width: int = 4) -> int:
    return int.from_bytes(space.read(offset, width), "little")


def test_the_header_of_edu_reads_as_in_qemu() -> None:
    space = edu_space()
    assert space.size == 256
    assert word(space, 0x00) == 0x11E81234
    assert word(space, 0x08) == 0x00FF0010
    assert word(space, 0x2C) == 0x11001AF4
    assert word(space, 0x34) == 0x40
    assert word(space, 0x3C) == 0x00000100
    assert word(space, 0x40) == 0x00800005


def test_sizing_a_bar_reads_its_mask() -> None:
    space = edu_space()
    space.write(0x10, b"\xff" * 4)
    assert word(space, 0x10) == 0xFFF00000


def test_more_msi_vectors_than_there_are_clamp_when_enabled() -> None:
    space = edu_space()
    events = space.write(0x40, (0x00FF0000).to_bytes(4, "little"))
    assert word(space, 0x40) == 0x00810005
    assert Event.MSI_ENABLED in events


def test_command_bits_are_reported_when_they_change() -> None:
    space = edu_space()
    assert space.write(4, b"\x06\x00") == Event.MASTER_CHANGED
    assert space.bus_master
    assert space.write(4, b"\x06\x00") == Event(0)
    assert space.write(5, b"\x04") == Event.INTX_MASK_CHANGED
    assert space.intx_disabled


def test_flr_is_reported_and_reads_back_zero() -> None:
    space = full_space()
    control = space.express_offset + pci.EXP_DEVCTL
    before = space.read(control, 2)
    assert space.write(control, bytes((before[0], before[1] | 0x80))) == Event.FUNCTION_RESET
    assert space.read(control, 2) == before
    assert space.write(control + 1, bytes((before[1] | 0x80,))) == Event.FUNCTION_RESET
    assert space.size == 4096


def test_msix_control_has_the_table_size_and_its_enable_counts() -> None:
    space = full_space()
    flags = space.msix_offset + pci.MSIX_FLAGS
    assert word(space, flags, 2) == 31
    assert space.write(flags, (0x8000 | 31).to_bytes(2, "little")) == Event.MSI_ENABLED
    assert space.msix_enabled


@given(st.integers(0, 255), st.binary(min_size=1, max_size=8))
def test_no_write_changes_a_read_only_byte(offset: int, data: bytes) -> None:
    space = full_space()
    space.write(offset, data)
    for at in (*range(4), *range(8, 12), 0x0E, *range(0x2C, 0x30), 0x34, 0x3D, 0x40, 0x41):
        assert space.read(at, 1) == full_space().read(at, 1)


@given(st.lists(st.tuples(st.integers(0, 4088), st.binary(min_size=1, max_size=8)), max_size=20))
def test_reset_restores_the_image_of_power_on(writes: list[tuple[int, bytes]]) -> None:
    space = full_space()
    for offset, data in writes:
        space.write(offset, data)
    space.reset()
    assert space.read(0, 4096) == full_space().read(0, 4096)


def test_nonsense_declarations_are_refused() -> None:
    with pytest.raises(UsageError):
        ConfigSpace(EDU, (BarSpec(0, 3000),))
    with pytest.raises(UsageError):
        ConfigSpace(EDU, (BarSpec(0, 1 << 33),))
    with pytest.raises(UsageError):
        ConfigSpace(EDU, (), msi=3)
