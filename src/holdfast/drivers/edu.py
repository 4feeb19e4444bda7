# SPDX-License-Identifier: Apache-2.0
"""QEMU's educational device: the smallest complete driver. Start reading here.

The device (QEMU ``docs/specs/edu.rst``) has one DMA engine that moves up to 4 KiB between host
memory and a buffer of its own, takes 100 ms for it, and cannot be stopped once started. That makes
it a good teacher: the only proof of quiet is its own busy bit.

The file has the two halves of every driver:

* :class:`EduDriver` runs in the keeper and answers for the engine: *is anything in flight?*
* :class:`EduEngine` runs in the client: it programs transfers and waits for the interrupt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdfast.driver import ControlMemory, Driver, Engine, FunctionAccess, Grant
from holdfast.errors import BadTransfer, DeviceError, RingFull, WaitTimeout
from holdfast.regs import edu as regs
from holdfast.transfer import Queue, Transfer
from holdfast.values import IrqIndex

if TYPE_CHECKING:
    from holdfast.device import Device
    from holdfast.dma.buffer import Buffer
    from holdfast.dma.pin import Pin

FACTORIAL_POLL = 0.001


class EduEngine(Engine):
    """Client half. One transfer at a time; registers go through the keeper."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.bar = device.bars[regs.BAR]
        self.queue = EduQueue(device)

    def to_card(self, source: Buffer | Pin, address: int = 0, **options: Any) -> Transfer:
        """Copy a buffer (at most 4096 bytes) to offset ``address`` of the device's buffer."""
        return self.queue.post(source, address, to_card=True)

    def from_card(self, into: Buffer | Pin, address: int = 0, **options: Any) -> Transfer:
        """Copy from offset ``address`` of the device's buffer into ``into``."""
        return self.queue.post(into, address, to_card=False)

    def factorial(self, n: int, timeout: float = 10.0) -> int:
        """``n!`` modulo 2^32, computed by the device."""
        self.bar.write(regs.FACTORIAL, n)
        deadline = time.monotonic() + timeout
        while self.bar.read(regs.STATUS) & regs.Status.COMPUTING:
            if time.monotonic() > deadline:
                raise WaitTimeout(
                    f"{n}! took longer than {timeout:g} s",
                    operation="factorial",
                    target=self._target(),
                )
            time.sleep(FACTORIAL_POLL)
        return self.bar.read(regs.FACTORIAL)

    def regranted(self) -> None:
        self.queue.renew()


class EduQueue(Queue):
    """The one DMA engine as a queue of depth one."""

    def __init__(self, device: Device) -> None:
        irq = next(iter(device.irqs.values()), None)
        super().__init__(irq, device.generation, device.granted)
        self.device = device
        self.bar = device.bars[regs.BAR]
        self.posted = 0
        self.finished = 0

    def post(self, memory: Buffer | Pin, address: int, *, to_card: bool) -> Transfer:
        """Program one transfer (edu.rst, "DMA controller")."""
        nbytes = memory.nbytes
        target = str(self.device.target)
        if not address >= 0 or address + nbytes > regs.BUFFER_SIZE:
            raise BadTransfer(
                f"{nbytes} bytes at {address} do not fit the device's {regs.BUFFER_SIZE} bytes",
                operation="transfer",
                target=target,
            )
        if not to_card and not getattr(memory, "writable", True):
            raise BadTransfer(
                "read-only memory cannot be the destination", operation="transfer", target=target
            )
        pieces = memory.sg.coalesce()
        if len(pieces) != 1:
            raise BadTransfer(
                f"the memory is in {len(pieces)} pieces, and the device has no scatter-gather",
                operation="transfer",
                target=target,
                hint="use less memory at once, or a buffer that does not cross a page",
            )
        self.reap()
        if self.stale:
            self.device.regrant(only_if=lambda: self.stale)
        with self._lock:
            if self.in_flight:
                raise RingFull("the engine is busy", operation="transfer", target=target)
            host, card = int(pieces.iovas[0]), regs.BUFFER_START + address
            command = regs.DmaCommand.START | regs.DmaCommand.IRQ
            if not to_card:
                command |= regs.DmaCommand.TO_RAM
            source, destination = (host, card) if to_card else (card, host)
            self.posted += 1
            transfer = self.keep(self.posted, nbytes, [memory])
            self.bar.write(regs.DMA_SOURCE, source)
            self.bar.write(regs.DMA_DESTINATION, destination)
            self.bar.write(regs.DMA_COUNT, nbytes)
            self.bar.write(regs.DMA_COMMAND, int(command))
        return transfer

    def completed(self) -> int:
        # The busy bit is the truth: the device clears it after the last byte (edu.rst).
        if not self.bar.read(regs.DMA_COMMAND) & regs.DmaCommand.START:
            self.finished = self.posted
        return self.finished

    def acknowledge(self) -> None:
        self.bar.write(regs.IRQ_ACKNOWLEDGE, self.bar.read(regs.IRQ_STATUS))


class EduDriver(Driver):
    """Keeper half."""

    name = "edu"
    ids = ((regs.VENDOR, regs.DEVICE),)
    dma_bits = 28
    irq_index = IrqIndex.MSI
    # Where registers trap, the keeper carries no access of a frozen lease: once the engine is idle
    # nobody can start it again.
    stop_is_final = True
    engine_bars = (regs.BAR,)
    # QEMU's edu acknowledges a reset and lets its DMA timer run on.
    reset_stops_dma = False
    engine = EduEngine

    def __init__(self, fn: FunctionAccess) -> None:
        super().__init__(fn)
        self.bar = fn.bar(regs.BAR)

    def resume(self) -> None:
        self.probe()  # which reads, and nothing else

    def probe(self) -> None:
        found = self.bar.read(regs.IDENTIFICATION)
        if found & 0xFF != regs.IDENTIFICATION_VALUE & 0xFF:
            raise DeviceError(f"identification reads {found:#010x}", operation="probe edu")

    def grant(self, channels: Sequence[int], control: ControlMemory | None) -> Grant:
        self.bar.write(regs.IRQ_ACKNOWLEDGE, 0xFFFF_FFFF)
        # Without an interrupt the client polls.
        return Grant(vectors=(0,) if self.fn.vector_count(self.irq_index) else ())

    def in_flight(self, channels: Sequence[int]) -> int:
        return self.bar.read(regs.DMA_COMMAND) & regs.DmaCommand.START

    def stop(self, channels: Sequence[int]) -> bool:
        """A started transfer cannot be stopped; an idle engine is stopped already."""
        return self.in_flight(channels) == 0
