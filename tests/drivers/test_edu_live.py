# SPDX-License-Identifier: Apache-2.0
"""The edu driver on its emulated device: bad requests, transfers, the factorial, interrupts."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator

import numpy as np
import pytest

import holdfast
from holdfast.device import Device
from holdfast.dma.sg import SgList
from holdfast.drivers.edu import EduQueue
from holdfast.errors import (
    BadAccess,
    BadTransfer,
    Busy,
    DeviceReset,
    IovaExhausted,
    NotSupported,
    RingFull,
    WaitTimeout,
)
from holdfast.regs import edu as regs
from holdfast.torture.stack import Stack
from holdfast.uapi import pci_regs

pytestmark = pytest.mark.usefixtures("clean")
LONG = 10.0


@pytest.fixture
def teacher(edu: Stack) -> Iterator[Device]:
    with holdfast.open(edu.target) as device:
        yield device


def test_registers_trap_and_are_checked(teacher: Device) -> None:
    bar = teacher.bars[0]
    assert bar.areas == ()
    assert bar.load(0) == regs.IDENTIFICATION_VALUE
    for offset, width in [(regs.BAR_SIZE, 4), (2, 4), (0, 5), (-4, 4)]:
        with pytest.raises(BadAccess):
            bar.load(offset, width)
        with pytest.raises(BadAccess):
            bar.store(offset, 0, width)
    with pytest.raises(BadAccess):
        bar.view(0, 4)


def test_capabilities_and_identity(teacher: Device) -> None:
    assert pci_regs.CapId.MSI in teacher.config.capabilities()
    assert (teacher.config.vendor, teacher.config.device) == (regs.VENDOR, regs.DEVICE)


def test_one_transfer_at_a_time_inside_the_devices_buffer(teacher: Device) -> None:
    buffer = teacher.alloc(regs.BUFFER_SIZE)
    for address in (-1, 1, regs.BUFFER_SIZE):
        with pytest.raises(BadTransfer):
            teacher.dma.to_card(buffer, address)
    running = teacher.dma.to_card(buffer, 0)
    with pytest.raises(RingFull):
        teacher.dma.to_card(buffer, 0)
    running.wait(LONG)
    teacher.dma.to_card(buffer, 0).wait(LONG)


def test_what_goes_to_the_card_comes_back(teacher: Device) -> None:
    source, back = teacher.alloc((32, 16), "u8"), teacher.alloc((32, 16), "u8")
    source.array[:] = np.arange(512).reshape(32, 16)
    teacher.dma.to_card(source).wait(LONG)

    async def fetch() -> None:
        async with asyncio.timeout(LONG):
            await teacher.dma.from_card(back)

    asyncio.run(fetch())
    assert np.array_equal(source.array, back.array)


def test_a_read_only_pin_is_a_source_only(teacher: Device) -> None:
    data = bytes(range(100))
    with teacher.pin(data) as pin, teacher.pin(bytearray(100)) as back:
        teacher.dma.to_card(pin, 8).wait(LONG)
        with pytest.raises(BadTransfer):
            teacher.dma.from_card(pin, 8)
        teacher.dma.from_card(back, 8).wait(LONG)
        assert back.array.tobytes() == data


def test_a_timeout_leaves_the_transfer_in_flight(teacher: Device) -> None:
    transfer = teacher.dma.to_card(teacher.alloc(64))
    with pytest.raises(WaitTimeout):
        transfer.wait(0)
    assert transfer.wait(LONG).done


def test_the_factorial_is_the_devices_own(teacher: Device) -> None:
    for n in (0, 1, 12, 20, 33, 34):
        assert teacher.dma.factorial(n) == math.factorial(n) % (1 << 32)


def test_an_interrupt_can_be_raised_waited_for_and_awaited(teacher: Device) -> None:
    irq = teacher.irqs[0]
    bar = teacher.bars[0]
    with pytest.raises(WaitTimeout):
        irq.wait(0.005)
    bar.write(regs.IRQ_RAISE, 1)
    assert irq.wait(LONG) == 1
    bar.write(regs.IRQ_ACKNOWLEDGE, 1)

    async def listen() -> int:
        count = 0
        async with asyncio.timeout(LONG):
            bar.write(regs.IRQ_RAISE, 2)
            count += await irq
            bar.write(regs.IRQ_RAISE, 2)
            async for more in irq:
                count += more
                break
        return count

    assert asyncio.run(listen()) == 2
    bar.write(regs.IRQ_ACKNOWLEDGE, 0xFFFFFFFF)


def test_the_function_cannot_be_shared(edu: Stack) -> None:
    with pytest.raises(NotSupported):
        holdfast.open(edu.target, access="shared", timeout=LONG)
    with holdfast.open(edu.target, timeout=LONG), pytest.raises(Busy):
        holdfast.open(edu.target)


def test_addresses_of_28_bits_run_out(teacher: Device) -> None:
    with pytest.raises(IovaExhausted):
        teacher.pin(np.empty(1 << 28, np.uint8))
    with teacher.pin(np.zeros(1 << 20, np.uint8)) as pin:
        assert int(pin.iova) + pin.nbytes <= 1 << 28


def test_a_reset_ends_the_transfer_for_the_client_and_the_device_is_usable(
    teacher: Device,
) -> None:
    buffer = teacher.alloc(64)
    running = teacher.dma.to_card(buffer)
    with contextlib.suppress(Busy):  # the device acknowledges a reset, and its transfer goes on
        teacher.reset()
    with pytest.raises(DeviceReset):
        running.wait(LONG)
    while teacher.bars[0].read(regs.DMA_COMMAND) & regs.DmaCommand.START:
        pass
    teacher.dma.to_card(buffer).wait(LONG)


class InPieces:
    """Memory of two pages that are not neighbours for the function."""

    nbytes = 4096
    sg = SgList.of([(0x20000, 2048), (0x40000, 2048)])
    writable = True

    def hold(self) -> object:
        raise AssertionError("it was posted")

    def release(self) -> None:
        raise AssertionError("it was posted")


def test_memory_in_pieces_is_refused_instead_of_overrunning_the_first(teacher: Device) -> None:
    queue = teacher.dma.queue
    assert isinstance(queue, EduQueue)
    with pytest.raises(BadTransfer, match="pieces"):
        queue.post(InPieces(), 0, to_card=False)  # type: ignore[arg-type]
