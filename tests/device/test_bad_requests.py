# SPDX-License-Identifier: Apache-2.0
"""Every request that cannot be right is refused with its own error, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.device import Device
from holdfast.errors import (
    BadAccess,
    BadBuffer,
    BadTransfer,
    Busy,
    Closed,
    NotSupported,
    QuotaExceeded,
    RingFull,
    TransferFailed,
    UsageError,
)
from holdfast.regs import xdma as regs
from holdfast.regs.xdma import Direction
from holdfast.torture.stack import Stack
from holdfast.uapi import pci_regs

pytestmark = pytest.mark.usefixtures("clean")
LONG = 10.0


@pytest.fixture
def card(xdma: Stack) -> Iterator[Device]:
    with holdfast.open(xdma.target) as device:
        yield device


def works(card: Device) -> bool:
    """A round trip through the card still gives what was sent."""
    source, back = card.alloc(4096), card.alloc(4096)
    source.array[:] = np.arange(4096) % 251
    card.dma.to_card(source, 0x8000).wait(LONG)
    card.dma.from_card(back, 0x8000).wait(LONG)
    return bool(np.array_equal(source.array, back.array))


# -- registers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "width"),
    [(-4, 4), (0x10000, 4), (0xFFFF, 4), (0xFFFE, 4), (2, 4), (1, 2), (4, 8), (0, 3), (0, 0),
     (0, 16), (1 << 70, 4)],
)  # fmt: skip
@pytest.mark.parametrize("bar", [0, 1])
def test_accesses_outside_misaligned_or_of_odd_width_are_refused(
    card: Device, bar: int, offset: int, width: int
) -> None:
    if (offset, width) == (4, 8):
        offset = 0x1004
    with pytest.raises(BadAccess):
        card.bars[bar].load(offset, width)
    with pytest.raises(BadAccess):
        card.bars[bar].store(offset, 0, width)
    assert card.bars[0].load(0) == regs.USER_IDENTIFIER_VALUE


@pytest.mark.parametrize("value", [-1, 1 << 32, 1 << 64])
@pytest.mark.parametrize("offset", [0x2000, 0x10])
def test_values_that_do_not_fit_are_refused(card: Device, offset: int, value: int) -> None:
    with pytest.raises(BadAccess):
        card.bars[0].store(offset, value)


def test_registers_are_held_to_their_modes(card: Device) -> None:
    with pytest.raises(BadAccess):
        card.bars[0].write(regs.USER_IDENTIFIER, 1)
    with pytest.raises(BadAccess):
        card.bars[1].read(regs.SG_CREDIT_MODE_W1S)
    with pytest.raises((BadAccess, IndexError)):
        card.bars[1].read(regs.CHANNEL[Direction.H2C].status, 4)


def test_only_mapped_memory_can_be_viewed(card: Device) -> None:
    assert card.bars[2].view(0, 64).nbytes == 64
    for bar, offset, size in [(0, 0, 8), (0, 0xFFF, 2), (1, 0, 4), (2, -8, 8), (2, 0, 1 << 40)]:
        with pytest.raises(BadAccess):
            card.bars[bar].view(offset, size)


def test_the_capability_walk_finds_what_is_there_and_ends(card: Device) -> None:
    found = card.config.capabilities()
    assert {pci_regs.CapId.MSI, pci_regs.CapId.MSIX, pci_regs.CapId.EXPRESS} <= set(found)
    assert (card.config.vendor, card.config.device) == (regs.VENDOR, regs.DEVICE)
    with pytest.raises(BadAccess):
        card.config.load(card.config.size, 4)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(0, "u1"), (-1, "u1"), ((4, 0), "u1"), ((4, -4), "u1"), ((-4, -4), "u1"), (8, "O"), (4, "S0")],
)
def test_shapes_without_memory_are_refused(card: Device, shape: Any, dtype: str) -> None:
    with pytest.raises(BadBuffer):
        card.alloc(shape, dtype)


@pytest.mark.parametrize("align", [0, -64, 3, 8192])
def test_alignments_that_cannot_be_had_are_refused(card: Device, align: int) -> None:
    with pytest.raises(BadBuffer):
        card.alloc(64, align=align)


def test_a_single_element_may_have_no_dimensions(card: Device) -> None:
    assert card.alloc((), "u8").array.shape == ()


@pytest.mark.parametrize(
    "thing",
    [object(), 3, "text", None, [1, 2], b"", bytearray(), np.zeros((0, 3)), np.zeros((4, 4))[:, 1],
     np.zeros((4, 4)).T[1:, 1:], np.arange(8)[::2], np.arange(8)[::-1]],
)  # fmt: skip
def test_what_has_no_contiguous_memory_cannot_be_pinned(card: Device, thing: Any) -> None:
    with pytest.raises(BadBuffer):
        card.pin(thing)


# -- transfers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, 0), (0, -1), (0, 4097), (4096, None), (4096, 1), (-1, 4), (4000, 200), (0, 1 << 70)],
)
def test_transfers_outside_of_their_buffer_are_refused(
    card: Device, offset: int, nbytes: int | None
) -> None:
    buffer = card.alloc(4096)
    for move in (card.dma.to_card, card.dma.from_card):
        with pytest.raises(BadTransfer):
            move(buffer, 0, offset=offset, nbytes=nbytes)
    assert works(card)


@pytest.mark.parametrize("address", [-1, 1 << 64])
def test_card_addresses_that_are_none_are_refused(card: Device, address: int) -> None:
    with pytest.raises(BadTransfer):
        card.dma.to_card(card.alloc(64), address)


def test_a_card_address_behind_the_cards_memory_fails_and_the_next_transfer_works(
    card: Device,
) -> None:
    buffer = card.alloc(4096)
    with pytest.raises(TransferFailed):
        card.dma.to_card(buffer, 1 << 40).wait(LONG)
    assert works(card)
    with pytest.raises(TransferFailed):
        card.dma.from_card(buffer, 1 << 40).wait(LONG)
    assert works(card)


def test_a_channel_that_was_not_leased_is_refused(card: Device) -> None:
    buffer = card.alloc(64)
    for channel in (1, -1, 99):
        with pytest.raises(BadTransfer):
            card.dma.to_card(buffer, channel=channel)


def test_freed_buffers_and_pins_are_refused(card: Device) -> None:
    buffer, pin = card.alloc(64), card.pin(bytearray(64))
    buffer.free()
    pin.free()
    for memory in (buffer, pin):
        with pytest.raises(Closed):
            card.dma.to_card(memory, 0)
        with pytest.raises(Closed):
            card.dma.from_card(memory, 0)
    buffer.free()
    pin.free()
    assert works(card)


def test_a_read_only_array_is_no_destination(card: Device) -> None:
    locked = np.full(64, 7, np.uint8)
    locked.flags.writeable = False
    for thing in (locked, bytes(64), memoryview(bytearray(64)).toreadonly()):
        with card.pin(thing) as pin:
            assert not pin.writable
            with pytest.raises(BadTransfer):
                card.dma.from_card(pin, 0)
    assert (locked == 7).all()


def test_a_full_ring_is_refused_and_takes_the_next_one_later(card: Device) -> None:
    engine = card.dma
    pages = 700
    buffer = card.alloc(pages * 4096)
    pieces = np.arange(pages, dtype=np.uint64) * np.uint64(4096)
    from holdfast.drivers.xdma_ring import Batch

    batch = Batch.of(
        Direction.H2C, np.full(pages, 8, np.uint64), pieces + np.uint64(int(buffer.iova)), pieces
    )
    queue = engine.queue(Direction.H2C)
    with pytest.raises(RingFull):  # noqa: PT012 - how many fit is the card's affair
        for _ in range(1000):
            queue.post(batch, [buffer])
            queue.post(batch, [buffer])
    running = list(queue._transfers)
    for transfer in running:
        transfer.wait(LONG)
    assert works(card)


# -- opening and commands -------------------------------------------------------------------------


def test_an_unknown_access_or_too_many_channels_is_refused(xdma: Stack) -> None:
    with pytest.raises(UsageError):
        holdfast.open(xdma.target, access="mine")
    with pytest.raises(NotSupported):
        holdfast.open(xdma.target, channels=5)


def test_what_another_lease_holds_is_busy_and_free_after_it(xdma: Stack) -> None:
    with holdfast.open(xdma.target, channels=4):
        for wanted in ({"channels": 1}, {"access": "exclusive"}):
            with pytest.raises(Busy):
                holdfast.open(xdma.target, **wanted)
        with holdfast.open(xdma.target, channels=0) as memory_only:
            assert memory_only.alloc(64).nbytes == 64
    with holdfast.open(xdma.target, access="exclusive", timeout=LONG) as whole:
        assert works(whole)
        with pytest.raises(Busy):
            holdfast.open(xdma.target)


def test_a_lease_of_memory_only_has_no_registers_and_no_transfers(xdma: Stack) -> None:
    with holdfast.open(xdma.target, channels=0) as device:
        for bar in device.bars.values():
            with pytest.raises(NotSupported):
                bar.load(0)
        with pytest.raises(NotSupported):
            device.dma.to_card(device.alloc(64), 0)
        with pytest.raises(NotSupported):
            device.reset()


def test_unknown_commands_and_bad_arguments_are_refused(card: Device) -> None:
    for name in ("format_disk", "probe", "stop", "__init__", "", "x" * 200):
        with pytest.raises(holdfast.HoldfastError):
            card.command(name)
    for arguments in ({"surprise": 1}, {"channels": [1]}, {"": 1}):
        with pytest.raises(UsageError):
            card.command("channel_status", **arguments)
    assert [row["direction"] for row in card.command("channel_status")] == ["H2C", "C2H"]


def test_everything_is_refused_after_close(xdma: Stack) -> None:
    device = holdfast.open(xdma.target)
    buffer = device.alloc(64)
    device.close()
    device.close()
    attempts: list[Callable[[], object]] = [
        lambda: device.alloc(64),
        lambda: device.pin(bytearray(4)),
        lambda: device.command("channel_status"),
        device.reset,
        device.trim,
        lambda: device.bars[0].load(0),
        lambda: device.config.load(0),
        lambda: device.dma.to_card(buffer, 0),
        lambda: device.irqs[0].wait(0),
    ]
    for attempt in attempts:
        with pytest.raises(Closed):
            attempt()
    assert buffer.array.nbytes == 64


def test_pins_count_against_the_quota_and_come_back(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:xdma", "--quota", "2M")
    with holdfast.open(stack.target, timeout=10) as device:
        large = bytearray(1 << 20)
        with device.pin(large), pytest.raises(QuotaExceeded):
            device.pin(bytearray(2 << 20))
        for _ in range(4):
            with device.pin(large):
                pass


@pytest.mark.parametrize("access", ["shared", "exclusive"])
def test_bus_master_is_the_keepers(xdma: Stack, access: str) -> None:
    with holdfast.open(xdma.target, access=access, timeout=10) as device:
        before = device.config.load(pci_regs.COMMAND, 2)
        with pytest.raises((NotSupported, BadAccess)):
            device.config.store(pci_regs.COMMAND, before & ~int(pci_regs.Command.MASTER), 2)
        with pytest.raises((NotSupported, BadAccess)):
            device.config.store(pci_regs.BASE_ADDRESS_0, 0, 4)
        assert device.config.load(pci_regs.COMMAND, 2) == before
