# SPDX-License-Identifier: Apache-2.0
"""Capability walks end, whatever the function answers; BARs decode and measure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import pci
from holdfast.emu.config_space import BarSpec, ConfigSpace, Identity, MsixSpec
from holdfast.errors import DeviceError
from holdfast.uapi import pci_regs as regs
from holdfast.uapi.pci_regs import CapId

IDENTITY = Identity(vendor=0x10EE, device=0x9038)


def full_space() -> ConfigSpace:
    return ConfigSpace(
        IDENTITY,
        (BarSpec(0, 1 << 16), BarSpec(2, 1 << 33, wide=True, prefetchable=True)),
        msi=1,
        msix=MsixSpec(32, 1, 0x8000, 0x8FE0),
        power=True,
        express=True,
    )


def test_the_walk_finds_every_capability_in_order() -> None:
    found = list(pci.capabilities(full_space().read))
    assert [(cap.id, cap.offset) for cap in found] == [
        (CapId.PM, 0x40),
        (CapId.MSI, 0x48),
        (CapId.EXPRESS, 0x60),
        (CapId.MSIX, 0x9C),
    ]
    assert pci.find_capability(full_space().read, CapId.MSIX) == 0x9C
    assert pci.find_capability(full_space().read, CapId.VENDOR) is None


def test_a_function_without_capabilities_has_none() -> None:
    space = ConfigSpace(IDENTITY, ())
    assert list(pci.capabilities(space.read)) == []


def test_a_circular_list_ends() -> None:
    raw = bytearray(256)
    raw[regs.STATUS] = regs.StatusBit.CAP_LIST
    raw[regs.CAPABILITY_LIST] = 0x40
    raw[0x40:0x42] = bytes((CapId.MSI, 0x50))
    raw[0x50:0x52] = bytes((CapId.PM, 0x40))
    assert [cap.id for cap in pci.capabilities(reader(raw))] == [CapId.MSI, CapId.PM]


def reader(raw: bytearray) -> pci.Read:
    return lambda offset, count: bytes(raw[offset : offset + count])


@given(st.binary(min_size=256, max_size=256))
def test_random_configuration_space_is_walked_within_bounds(raw: bytes) -> None:
    space = bytearray(raw)
    space[regs.STATUS] |= regs.StatusBit.CAP_LIST
    for cap in pci.capabilities(reader(space)):
        assert regs.STD_HEADER_SIZE <= cap.offset <= 252
    for bar in pci.decode_bars(reader(space)):
        assert 0 <= bar.index < 6


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_random_extended_capabilities_end(first: int, second: int) -> None:
    raw = bytearray(4096)
    raw[0x100:0x104] = first.to_bytes(4, "little")
    target = first >> 20 & ~3
    if 0x100 < target <= 4092:
        raw[target : target + 4] = second.to_bytes(4, "little")
    assert len(list(pci.extended_capabilities(reader(raw)))) <= 3


def test_a_function_that_is_gone_has_no_capabilities() -> None:
    assert list(pci.capabilities(lambda _offset, count: b"\xff" * count)) == []


def test_a_short_answer_is_an_error() -> None:
    with pytest.raises(DeviceError):
        pci.read_u32(lambda _offset, _count: b"\x00", 0)


def test_bars_decode_with_type_bits_and_addresses() -> None:
    space = full_space()
    space.write(regs.BASE_ADDRESS_0 + 8, (0x12_0000_0000).to_bytes(8, "little"))
    low, high = pci.decode_bars(space.read, [1 << 16, 0, 1 << 33, 0, 0, 0])
    assert (low.index, low.wide, low.prefetchable, low.address) == (0, False, False, 0)
    assert (high.index, high.wide, high.prefetchable) == (2, True, True)
    assert high.address == 0x12_0000_0000
    assert high.size == 1 << 33


def test_measuring_finds_the_sizes_and_restores_the_addresses() -> None:
    space = full_space()
    space.write(regs.BASE_ADDRESS_0, (0xFE00_0000).to_bytes(4, "little"))
    before = space.read(0, 64)
    bars = pci.measure_bars(space.read, space.write)
    assert [(bar.index, bar.size) for bar in bars] == [(0, 1 << 16), (2, 1 << 33)]
    assert space.read(0, 64) == before


def test_set_command_reports_what_the_function_really_has() -> None:
    space = full_space()
    assert pci.set_command(space.read, space.write, regs.Command.MASTER, True) & 4
    stuck = pci.set_command(space.read, lambda *_: None, regs.Command.MASTER, False)
    assert stuck == regs.Command.MASTER
