# SPDX-License-Identifier: Apache-2.0
"""A host in the same process, for testing an emulated function without a socket.

::

    clock = ManualClock()
    with LocalHost(MyFunction(clock=clock), clock=clock) as host:
        host.map(0x10000, 1 << 20)
        host.bus_master(True)
        host.registers(0).write(START, 1)
        host.run()
        assert host.signals == [(IrqIndex.MSI, 0)]

Host memory is one NumPy array; ``map`` puts a piece of it at an IOVA. Nothing runs by itself:
:meth:`LocalHost.run` does the engine's work, and moves a :class:`ManualClock` on instead of
waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from holdfast.emu.function import Function
from holdfast.emu.port import Bytes, U64s
from holdfast.errors import DmaFault, UsageError
from holdfast.kernel import events
from holdfast.pci import set_command
from holdfast.regs.view import RegisterView
from holdfast.uapi import pci_regs as pci
from holdfast.values import CONFIG_REGION, IrqIndex, Perm


class ManualClock:
    """Seconds that pass only when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class LocalPort:
    """DMA into a NumPy array; fulfils :class:`holdfast.emu.port.DmaPort`."""

    def __init__(self, ram: Bytes) -> None:
        self.ram = ram
        self.windows: list[tuple[int, int, int, Perm]] = []
        self.faults = 0
        self.reads = 0
        """Calls of :meth:`read` so far."""
        self.on_access: Callable[[int, int], None] | None = None
        """Called as ``(iova, count)`` before every access that is carried out."""

    def _find(self, iova: int, count: int, perm: Perm) -> Bytes:
        for start, size, offset, allowed in self.windows:
            if start <= iova and iova + count <= start + size and perm & allowed:
                if self.on_access is not None:
                    self.on_access(iova, count)
                at = offset + iova - start
                return self.ram[at : at + count]
        self.faults += 1
        raise DmaFault(f"{count} bytes at {iova:#x} are not mapped", operation="dma")

    def read(self, iova: int, into: Bytes) -> None:
        self.reads += 1
        into[:] = self._find(iova, len(into), Perm.READ)

    def write(self, iova: int, data: Bytes) -> None:
        self._find(iova, len(data), Perm.WRITE)[:] = data

    def read_many(self, iovas: U64s, local: Bytes, offsets: U64s, lengths: U64s) -> int:
        for done, (iova, offset, length) in enumerate(_entries(iovas, offsets, lengths)):
            try:
                local[offset : offset + length] = self._find(iova, length, Perm.READ)
            except DmaFault:
                return done
        return len(iovas)

    def write_many(self, iovas: U64s, local: Bytes, offsets: U64s, lengths: U64s) -> int:
        for done, (iova, offset, length) in enumerate(_entries(iovas, offsets, lengths)):
            try:
                self._find(iova, length, Perm.WRITE)[:] = local[offset : offset + length]
            except DmaFault:
                return done
        return len(iovas)


def _entries(iovas: U64s, offsets: U64s, lengths: U64s) -> list[tuple[int, int, int]]:
    return list(zip(iovas.tolist(), offsets.tolist(), lengths.tolist(), strict=True))


class LocalHost:
    """Fulfils :class:`holdfast.emu.port.Host`. Owns the function: :meth:`close` closes it.

    memory
        Bytes of host memory.
    clock
        The function's clock, if it is a manual one; else :meth:`run` sleeps.
    """

    def __init__(
        self, function: Function, *, memory: int = 16 << 20, clock: ManualClock | None = None
    ) -> None:
        self.function = function
        self.clock = clock
        self.ram: Bytes = np.zeros(memory, np.uint8)
        self.port = LocalPort(self.ram)
        self.signals: list[tuple[IrqIndex, int]] = []
        """Interrupts so far, in order."""
        self.rewired = 0
        self.woken = False
        self._wired: set[IrqIndex] = set()
        function.attach(self)

    # -- for the test ------------------------------------------------------------------------------

    def map(self, iova: int, size: int, offset: int = 0, perm: Perm = Perm.RW) -> None:
        """Let the function reach ``size`` bytes of ``ram`` at ``offset`` through ``iova``."""
        self.port.windows.append((iova, size, offset, perm))

    def unmap(self, iova: int) -> None:
        self.port.windows = [window for window in self.port.windows if window[0] != iova]

    def wire(self, index: IrqIndex) -> None:
        """Connect all vectors of an interrupt type, and disconnect every other type."""
        self._wired = {index}

    def bus_master(self, on: bool) -> None:
        """Set or clear bit 2 of the command register."""
        set_command(self.config_read, self.config_write, pci.Command.MASTER, on)

    def config_read(self, offset: int, count: int) -> bytes:
        return self.function.region_read(CONFIG_REGION, offset, count)

    def config_write(self, offset: int, data: bytes) -> None:
        self.function.region_write(CONFIG_REGION, offset, data)

    def registers(self, bar: int) -> RegisterView:
        """The registers of a BAR, accessed as a client would."""

        def load(offset: int, width: int) -> int:
            self.deliver_doorbells()
            return int.from_bytes(self.function.region_read(bar, offset, width), "little")

        def store(offset: int, width: int, value: int) -> None:
            self.deliver_doorbells()
            self.function.region_write(bar, offset, value.to_bytes(width, "little"))

        return RegisterView(load, store, f"BAR {bar}")

    def doorbell(self, bar: int, offset: int) -> int:
        """The eventfd now in force for the doorbell at ``offset``; the function owns it."""
        for bell in self.function.doorbells(bar):
            if bell.info.offset == offset:
                return bell.fd
        raise UsageError(f"no doorbell at {offset:#x} of BAR {bar}", operation="doorbell")

    def deliver_doorbells(self) -> None:
        """Bring what was rung to the function, as a server does before any register access."""
        for bar in range(pci.BASE_ADDRESSES):
            for bell in self.function.doorbells(bar):
                self.function.rung(bell.fd, partial(events.drain, bell.fd))

    def run(self, *, seconds: float = 10.0, steps: int = 100_000) -> None:
        """Do engine work until the function waits for a write, or ``seconds`` have passed.

        Raises :class:`~holdfast.errors.UsageError` if it is still at it after ``steps`` steps.
        """
        now = self.clock if self.clock is not None else time.monotonic
        end = now() + seconds
        for _ in range(steps):
            self.deliver_doorbells()
            wait = self.function.work()
            if wait is None or now() + wait > end:
                return
            if wait and self.clock is not None:
                self.clock.advance(wait)
            elif wait:
                time.sleep(wait)
        raise UsageError(f"not idle after {steps} steps", operation="run")

    def close(self) -> None:
        self.function.detach()
        self.function.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- for the function --------------------------------------------------------------------------

    @property
    def dma(self) -> LocalPort:
        return self.port

    def signal(self, index: IrqIndex, vector: int) -> None:
        self.signals.append((index, vector))

    def wired(self, index: IrqIndex) -> bool:
        return index in self._wired

    def rewire(self) -> None:
        self.rewired += 1

    def wake(self) -> None:
        self.woken = True
