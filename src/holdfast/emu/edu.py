# SPDX-License-Identifier: Apache-2.0
"""QEMU's educational device, emulated (QEMU ``docs/specs/edu.rst``; behaviour of QEMU 11.1).

Facts that a driver must live with, kept as they are:

* DMA moves everything at once, 100 ms after the command; until then nothing is touched. It cannot
  be cancelled, and a reset does not stop it: the device has no reset of its own, only the PCI core
  part happens (command register, BARs, MSI, INTx). State, interrupt status and a running DMA stay.
* The result of a memory access is ignored. With bus mastering off, or where nothing is mapped,
  reads give zeros, writes vanish, and the command completes as if all were well.
* A transfer that leaves the buffer is not done, yet completes and interrupts (since 11.1; earlier
  versions abort QEMU or touch memory outside the buffer, which nobody should copy).
* The address mask is applied to the start address only.

The factorial of anything above 33 is 0 modulo 2^32, so the result costs nothing here; how long the
device *says* that it computes is modelled as one nanosecond per multiplication.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from holdfast.emu import options
from holdfast.emu.function import BarSpec, Function, Identity, Options
from holdfast.emu.registers import WriteHandler
from holdfast.errors import DmaFault
from holdfast.regs import edu as regs
from holdfast.regs.spec import Register

_ONES = {1: 0, 2: 0, 4: 0xFFFFFFFF, 8: 0xFFFFFFFFFFFFFFFF}
"""What unclaimed reads give: all ones for 4 and 8 bytes; narrower ones are refused and read 0."""
_SECONDS_PER_FACTOR = 1e-9
WILD_BYTE = 0xA5
"""What it writes when it has gone wild."""
WILD_PERIOD = 0.001


class Edu(Function):
    """The edu device: liveness, factorial, interrupts, and DMA to and from a 4 KiB buffer.

    dma_mask
        Address bits of the DMA engine; others are cut off silently.
    delay
        Seconds from a DMA command to the transfer.
    """

    identity = Identity(
        vendor=regs.VENDOR,
        device=regs.DEVICE,
        class_code=regs.CLASS_CODE,
        revision=regs.REVISION,
        subsystem_vendor=regs.SUBSYSTEM_VENDOR,
        subsystem=regs.SUBSYSTEM,
    )
    bars = (BarSpec(regs.BAR, regs.BAR_SIZE, banks=(regs.BANK,)),)
    msi = 1
    dma_bits = 28
    options: ClassVar[Options] = {"dma_mask": options.integer, "delay": options.seconds}
    # That a reset does not stop DMA is no fault of it but its nature.
    supported_faults = frozenset({"hang", "wild", "lie_idle", "refuse_reset", "unplug"})

    def __init__(
        self,
        *,
        dma_mask: int = regs.DMA_MASK,
        delay: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._mask = dma_mask
        self._delay = delay
        self._clock = clock
        self._buffer = np.zeros(regs.BUFFER_SIZE, np.uint8)
        self._dma_at: float | None = None
        self._factorial_at: float | None = None
        self._wild = False
        """It has done its transfer and goes on writing to the destination."""
        self.on_read(regs.LIVENESS, lambda _: ~self.peek(regs.LIVENESS))
        self.on_write(regs.FACTORIAL, self._factorial)
        self.on_write(regs.STATUS, self._status)
        self.on_write(regs.IRQ_RAISE, lambda _, value: self._raise(value))
        self.on_write(regs.IRQ_ACKNOWLEDGE, self._acknowledge)
        for register in (regs.DMA_SOURCE, regs.DMA_DESTINATION, regs.DMA_COUNT):
            self.on_write(register, self._dma_setting(register))
        self.on_write(regs.DMA_COMMAND, self._command)
        self.on_read(regs.DMA_COMMAND, lambda _: self._told_command())

    # -- access policy: 4 bytes below 0x80, 4 or 8 from there on ---------------------------

    def read_access(self, bar: int, offset: int, size: int) -> int:
        if size == 4 and offset in (regs.IRQ_RAISE.offset, regs.IRQ_ACKNOWLEDGE.offset):
            return _ONES[4]
        wide = size == 4 and offset >= regs.DMA_SOURCE.offset
        file = self.registers(bar)
        hit = file.find(offset, 8 if wide else size)
        if hit is None:
            return _ONES[size]
        return file.load(*hit) & ((1 << 8 * size) - 1)

    def write_access(self, bar: int, offset: int, size: int, value: int) -> None:
        # A 4-byte write to a DMA register replaces all 8 bytes.
        wide = size == 4 and offset >= regs.DMA_SOURCE.offset
        file = self.registers(bar)
        hit = file.find(offset, 8 if wide else size)
        if hit is not None:
            file.store(*hit, value)

    # -- registers --------------------------------------------------------------------------------

    def _factorial(self, _index: int, value: int) -> None:
        status = self.peek(regs.STATUS)
        if status & regs.Status.COMPUTING:
            return
        self.poke(regs.FACTORIAL, value)
        self.poke(regs.STATUS, status | regs.Status.COMPUTING)
        self._factorial_at = self._clock() + value * _SECONDS_PER_FACTOR
        self.wake()

    def _status(self, _index: int, value: int) -> None:
        kept = self.peek(regs.STATUS) & regs.Status.COMPUTING
        self.poke(regs.STATUS, kept | (value & regs.Status.IRQ_FACTORIAL))

    def _raise(self, value: int) -> None:
        raised = self.peek(regs.IRQ_STATUS) | value
        self.poke(regs.IRQ_STATUS, raised)
        if raised:
            self.interrupt()

    def _acknowledge(self, _index: int, value: int) -> None:
        left = self.peek(regs.IRQ_STATUS) & ~value
        self.poke(regs.IRQ_STATUS, left)
        if not left:
            self.deassert()

    def _dma_busy(self) -> bool:
        return bool(self.peek(regs.DMA_COMMAND) & regs.DmaCommand.START)

    def _told_command(self) -> int:
        """The command register as it is read: the busy bit is the truth, unless the plan lies."""
        command = self.peek(regs.DMA_COMMAND)
        return command & ~int(regs.DmaCommand.START) if self.faulty("lie_idle") else command

    def _dma_setting(self, register: Register) -> WriteHandler:
        def write(_index: int, value: int) -> None:
            if not self._dma_busy():
                self.poke(register, value)

        return write

    def _command(self, _index: int, value: int) -> None:
        if self._dma_busy() or not value & regs.DmaCommand.START:
            return
        self.poke(regs.DMA_COMMAND, value)
        self.transfers += 1
        if not self.faulty("hang"):
            self._dma_at = self._clock() + self._delay
            self.wake()

    # -- engine -----------------------------------------------------------------------------------

    def work(self) -> float | None:
        """Carry out what is due; the time to the next deadline, if there is one."""
        now = self._clock()
        with self.lock:
            dma_due = self._dma_at is not None and self._dma_at <= now
            if self._factorial_at is not None and self._factorial_at <= now:
                self._finish_factorial()
        if dma_due:
            self._transfer()
        with self.lock:
            if dma_due and self._wild:
                self._dma_at = now + WILD_PERIOD
            elif dma_due:
                self._finish_dma()
            due = [at for at in (self._dma_at, self._factorial_at) if at is not None]
        return max(0.0, min(due) - self._clock()) if due else None

    def _finish_factorial(self) -> None:
        self._factorial_at = None
        n = self.peek(regs.FACTORIAL)
        # 2^32 divides 34! and everything after it.
        self.poke(regs.FACTORIAL, math.factorial(n) if n < 34 else 0)
        status = self.peek(regs.STATUS) & ~int(regs.Status.COMPUTING)
        self.poke(regs.STATUS, status)
        if status & regs.Status.IRQ_FACTORIAL:
            self._raise(regs.Cause.FACTORIAL)

    def _transfer(self) -> None:
        """Move the bytes. No lock: the DMA registers cannot be changed while busy is set."""
        to_ram = bool(self.peek(regs.DMA_COMMAND) & regs.DmaCommand.TO_RAM)
        source, destination = self.peek(regs.DMA_SOURCE), self.peek(regs.DMA_DESTINATION)
        count = self.peek(regs.DMA_COUNT)
        start = (source if to_ram else destination) - regs.BUFFER_START
        if start < 0 or start + count > regs.BUFFER_SIZE or count == 0:
            return
        piece = self._buffer[start : start + count]
        if self.faulty("unplug"):
            piece = piece[: max(1, count // 2)]
        elif to_ram and self._wild:
            piece = np.full(count, WILD_BYTE, np.uint8)
        self._wild = to_ram and self.faulty("wild")
        try:
            if to_ram:
                self.dma.write(destination & self._mask, piece)
            else:
                self.dma.read(source & self._mask, piece)
        except DmaFault:
            if not to_ram:
                piece[:] = 0
        if self.faulty("unplug"):
            self.unplug()

    def _finish_dma(self) -> None:
        self._dma_at = None
        command = self.peek(regs.DMA_COMMAND) & ~int(regs.DmaCommand.START)
        self.poke(regs.DMA_COMMAND, command)
        if command & regs.DmaCommand.IRQ:
            self._raise(regs.Cause.DMA)

    def reset(self) -> None:
        """PCI core only: the device's own state, and DMA under way, are not touched."""
        self.check_reset_allowed()
        with self.lock:
            self.reset_core()
