# SPDX-License-Identifier: Apache-2.0
"""What a user's own function gets from the base class."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from holdfast.emu.faults import FaultPlan
from holdfast.emu.function import BarSpec, Function, Identity, MsixSpec
from holdfast.emu.local import LocalHost
from holdfast.emu.port import Guest
from holdfast.emu.registry import create, load
from holdfast.errors import BadTarget, DmaFault, UsageError
from holdfast.kernel import events
from holdfast.kernel.mapping import Mapping
from holdfast.regs.spec import Bank, Mode, Register
from holdfast.values import CONFIG_REGION, Area, IrqIndex

A = Register("a", 0x00)
ADDRESS = Register("address", 0x08, width=8)
SUM = Register("sum", 0x10, Mode.RO, reset=7)
ONCE = Register("once", 0x14, Mode.RC, reset=5)
EVENTS = Register("events", 0x18, Mode.W1C, reset=0xF0)
FLAGS = Register("flags", 0x1C, Mode.W1S)
SECRET = Register("secret", 0x20, Mode.WO)
BELL = Register("bell", 0x24, count=2, stride=4)
BANK = Bank("adder", (A, ADDRESS, SUM, ONCE, EVENTS, FLAGS, SECRET, BELL))


class Adder(Function):
    identity = Identity(vendor=0x1234, device=0x0001)
    bars = (BarSpec(0, 16384, banks=(BANK,), ram=(Area(4096, 8192),)),)
    msix = MsixSpec(3, 0, 0x800, 0xC00)
    msi = 1
    has_reset = True
    express = True

    def __init__(self) -> None:
        super().__init__()
        self.started = False
        self.rings = 0
        self.on_write(ADDRESS, self.fetch)
        self.bell = self.add_doorbell(BELL, 1, 1, self.ring)

    def ring(self, count: int) -> None:
        self.rings += count

    def fetch(self, index: int, value: int) -> None:
        self.poke(ADDRESS, value)
        self.started = True
        self.wake()

    def work(self) -> float | None:
        if self.started:
            self.started = False
            other = np.zeros(4, np.uint8)
            self.dma.read(self.peek(ADDRESS), other)
            self.poke(SUM, self.peek(A) + int(other.view("<u4")[0]))
            self.interrupt(1)
        return None


def test_a_small_function_does_dma_and_interrupts() -> None:
    with LocalHost(Adder()) as host:
        host.map(0x1000, 4096)
        host.bus_master(True)
        host.wire(IrqIndex.MSIX)
        host.ram[8:12] = np.array([40], "<u4").view(np.uint8)
        registers = host.registers(0)
        registers.write(A, 2)
        registers.write(ADDRESS, 0x1008)
        host.run()
        assert registers.read(SUM) == 42
        assert host.signals == [(IrqIndex.MSIX, 1)]
        assert host.woken


def test_registers_without_handlers_behave_after_their_mode() -> None:
    with LocalHost(Adder()) as host:
        registers = host.registers(0)
        registers.store(SUM.offset, 4, 99)
        assert registers.read(SUM) == 7
        assert [registers.read(ONCE), registers.read(ONCE)] == [5, 0]
        registers.write(EVENTS, 0x30)
        assert registers.read(EVENTS) == 0xC0
        registers.write(FLAGS, 0x1)
        registers.write(FLAGS, 0x4)
        assert registers.load(FLAGS.offset, 4) == 0x5
        registers.write(SECRET, 3)
        assert registers.load(SECRET.offset, 4) == 0
        assert registers.load(0x400, 4) == 0


def test_eight_bytes_over_dword_registers_are_two_accesses() -> None:
    with LocalHost(Adder()) as host:
        host.registers(0).store(EVENTS.offset, 8, 0x5_000000F0)
        assert host.registers(0).load(EVENTS.offset, 8) == 0x5_00000000


def test_dma_faults_while_bus_mastering_is_off() -> None:
    with LocalHost(Adder()) as host:
        host.map(0, 4096)
        with pytest.raises(DmaFault, match="bus mastering"):
            _ = host.function.dma
        host.bus_master(True)
        host.function.dma.read(0, np.zeros(4, np.uint8))
        host.function.detach()
        with pytest.raises(DmaFault, match="attached"):
            _ = host.function.dma


def test_no_message_leaves_a_function_without_bus_mastering() -> None:
    with LocalHost(Adder()) as host:
        host.wire(IrqIndex.MSI)
        host.function.interrupt()
        assert host.signals == []
        host.bus_master(True)
        host.function.interrupt(2)  # MSI has one message: it is shared
        assert host.signals == [(IrqIndex.MSI, 0)]


def test_intx_is_a_level() -> None:
    with LocalHost(Adder()) as host:
        function = host.function
        function.interrupt()
        function.interrupt()
        assert host.signals == [(IrqIndex.INTX, 0)]
        assert function.intx_asserted()
        assert host.config_read(6, 1)[0] & 0x08
        function.deassert()
        assert not function.intx_asserted()
        assert not host.config_read(6, 1)[0] & 0x08


def test_intx_disable_masks_the_line_and_shows_it_in_status() -> None:
    with LocalHost(Adder()) as host:
        host.config_write(4, b"\x00\x04")
        host.function.interrupt()
        assert host.signals == []
        assert host.config_read(6, 1)[0] & 0x08
        host.config_write(4, b"\x00\x00")
        assert host.signals == [(IrqIndex.INTX, 0)]


def test_memory_areas_are_the_same_bytes_by_message_and_by_mapping() -> None:
    with LocalHost(Adder()) as host:
        decl = host.function.regions()[0]
        assert decl.fd is not None
        mapping = Mapping(decl.fd, 8192, offset=4096)
        host.function.region_write(0, 4090, bytes(range(1, 17)))
        assert mapping.array[:10].tolist() == list(range(7, 17))
        mapping.store(16, 4, 0xDEADBEEF)
        assert host.function.region_read(0, 4112, 4) == bytes.fromhex("efbeadde")
        assert len(host.function.region_read(0, 0, 16384)) == 16384
        mapping.close()


def test_the_msix_table_is_plain_storage_and_starts_masked() -> None:
    with LocalHost(Adder()) as host:
        assert host.function.region_read(0, 0x800 + 12, 4) == b"\x01\0\0\0"
        host.function.region_write(0, 0x810, b"\x11" * 8)
        assert host.function.region_read(0, 0x810, 8) == b"\x11" * 8
        host.function.region_write(0, 0xC00, b"\xff" * 8)
        assert host.function.region_read(0, 0xC00, 8) == bytes(8)


@pytest.mark.parametrize(
    ("index", "offset", "count"),
    [(0, 16384, 1), (0, 16380, 8), (1, 0, 4), (CONFIG_REGION, 4096, 1), (42, 0, 1), (0, -4, 4)],
)
def test_accesses_outside_a_region_are_einval(index: int, offset: int, count: int) -> None:
    with LocalHost(Adder()) as host:
        with pytest.raises(OSError, match="region") as read:
            host.function.region_read(index, offset, count)
        with pytest.raises(OSError, match="region") as write:
            host.function.region_write(index, offset, bytes(count))
        assert read.value.errno == write.value.errno == errno.EINVAL


def test_regions_and_interrupts_are_declared_by_vfio_index() -> None:
    with LocalHost(Adder()) as host:
        regions = host.function.regions()
        assert [decl.region.index for decl in regions] == list(range(9))
        assert [decl.region.size for decl in regions] == [16384, 0, 0, 0, 0, 0, 0, 4096, 0]
        assert regions[0].region.areas == (Area(4096, 8192),)
        assert list(host.function.irq_counts()) == [1, 1, 3, 0, 0]
        guest: Guest = host.function
        assert guest.work() is None


def test_doorbells_count_and_are_renewed_on_detach() -> None:
    with LocalHost(Adder()) as host:
        function = host.function
        assert isinstance(function, Adder)
        (bell,) = function.doorbells(0)
        assert (bell.info.offset, bell.info.size, bell.info.value) == (BELL.at(1), 4, 1)
        stale = os.dup(bell.fd)
        events.ring(bell.fd, 3)
        host.deliver_doorbells()
        assert function.rings == 3
        function.detach()
        events.ring(stale)
        assert events.drain(function.doorbells(0)[0].fd) == 0
        os.close(stale)


def test_flr_through_configuration_space_resets_the_registers() -> None:
    with LocalHost(Adder()) as host:
        registers = host.registers(0)
        registers.write(A, 5)
        host.bus_master(True)
        express = host.function.config.express_offset
        host.config_write(express + 9, b"\x80")
        assert registers.read(A) == 0
        assert not host.function.bus_master


def test_a_refused_reset_changes_nothing() -> None:
    with LocalHost(Adder()) as host:
        host.function.faults = FaultPlan.parse("refuse_reset")
        host.registers(0).write(A, 5)
        with pytest.raises(OSError, match="refuses"):
            host.function.reset()
        host.config_write(host.function.config.express_offset + 9, b"\x80")
        assert host.registers(0).read(A) == 5
        with pytest.raises(UsageError, match="cannot show wild"):
            host.function.faults = FaultPlan.parse("wild")


def test_closing_gives_back_every_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        LocalHost(Adder()).close()
        create("xdma", {}).close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- registry --------------------------------------------------------------------------------------

USER_FILE = """
from holdfast.emu import BarSpec, Function, Identity
class Mine(Function):
    identity = Identity(vendor=1, device=2)
class NotOne: pass
"""


def test_functions_are_made_by_name_with_option_texts() -> None:
    function = create("xdma", {"channels": "1", "memory": "1M", "link_rate": "1.5G"})
    assert function.regions()[2].region.size == 1 << 20
    function.close()
    function = create("edu", {"dma_mask": "0xffffffff"}, FaultPlan.parse("hang"))
    assert function.faults.active() == ("hang",)
    function.close()


def test_a_user_file_is_loaded_once(tmp_path: Path) -> None:
    path = tmp_path / "my_device.py"
    path.write_text(USER_FILE)
    cls = load(f"{path}:Mine")
    assert cls is load(f"{path}:Mine")
    assert cls.identity.device == 2
    cls().close()


@pytest.mark.parametrize(
    "name", ["nothing", "no.such.module:X", "holdfast.emu.edu:Nope", "holdfast.errors:Busy", "a:"]
)
def test_what_is_no_function_is_a_bad_target(name: str) -> None:
    with pytest.raises(BadTarget):
        load(name)


def test_a_file_without_the_class_is_a_bad_target(tmp_path: Path) -> None:
    path = tmp_path / "other_device.py"
    path.write_text(USER_FILE)
    for name in (f"{path}:Nope", f"{path}:NotOne", f"{tmp_path}/absent.py:Mine"):
        with pytest.raises(BadTarget):
            load(name)


def test_unknown_or_unreadable_options_name_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="channels, link_chunk"):
        create("xdma", {"chanels": "1"})
    with pytest.raises(UsageError, match="memory"):
        create("xdma", {"memory": "lots"})
    with pytest.raises(UsageError, match="channels"):
        create("xdma", {"channels": "9"})
