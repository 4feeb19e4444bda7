# SPDX-License-Identifier: Apache-2.0
"""A device and its driver in one file: a card that counts how often each byte value occurs.

``Histogrammer`` is the emulated card, ``HistogramDriver`` answers for it in the keeper, and
``HistogramEngine`` uses it: ``holdfast.open("emu:examples/own_device.py:Histogrammer")``.
"""

from collections.abc import Sequence

import numpy as np

import holdfast
from holdfast.driver import ControlMemory, Engine, Grant
from holdfast.emu import BarSpec, Function, Identity
from holdfast.errors import DmaFault, RingFull, TransferFailed
from holdfast.regs.spec import Bank, Mode, Register
from holdfast.transfer import Queue, Transfer

SOURCE = Register("source", 0x00, width=8, doc="IOVA of the bytes to count")
RESULT = Register("result", 0x08, width=8, doc="IOVA of 256 32-bit counts")
LEFT = Register("left", 0x10, doc="bytes to go, 0 if idle; writing starts, writing 0 stops")
FINISHED = Register("finished", 0x14, Mode.RO, doc="jobs whose counts were written")


class Histogrammer(Function):
    """The card: reads host memory piece by piece, then writes 256 counts and interrupts."""

    identity = Identity(vendor=0x1234, device=0xB17E)
    bars = (BarSpec(0, 4096, banks=(Bank("histogram", (SOURCE, RESULT, LEFT, FINISHED)),)),)
    msi = 1
    driver = "HistogramDriver"
    stopping = False

    def __init__(self) -> None:
        super().__init__()
        self.on_write(LEFT, self.start)

    def start(self, _: int, nbytes: int) -> None:
        self.stopping |= nbytes == 0
        if nbytes and not self.peek(LEFT):
            self.stopping, self.counts = False, np.zeros(256, np.uint32)
            self.poke(LEFT, nbytes)
            self.wake()

    def work(self) -> float | None:
        """One bounded step on the engine's own thread: the card is idle only *between* steps."""
        if not (left := self.peek(LEFT)):
            return None
        try:
            self.poke(LEFT, 0 if self.stopping else self.step(left))
        except DmaFault:
            self.poke(LEFT, 0)  # idle, but FINISHED did not rise: that is how the driver knows
        self.interrupt()
        return 0

    def step(self, left: int) -> int:
        piece = np.empty(min(left, 65536), np.uint8)
        self.dma.read(source := self.peek(SOURCE), piece)
        self.poke(SOURCE, source + piece.size)
        self.counts += np.bincount(piece, minlength=256).astype(np.uint32)
        if left == piece.size:
            self.dma.write(self.peek(RESULT), self.counts.view(np.uint8))
            self.poke(FINISHED, self.peek(FINISHED) + 1)
        return left - piece.size


class HistogramEngine(Engine, Queue):
    """Client half, ``device.dma``: a queue of one job, done when the card's count has risen."""

    def __init__(self, device: holdfast.Device) -> None:
        Engine.__init__(self, device)
        Queue.__init__(self, device.irqs[0], device.generation)
        self.bar = device.bars[0]

    def count(self, data: holdfast.Buffer, counts: holdfast.Buffer) -> Transfer:
        """Count the bytes of ``data`` into ``counts`` (256 x uint32), one job at a time."""
        if self.in_flight:
            raise RingFull("a job is running; wait for it first", operation="count")
        self.last = self.bar.read(FINISHED) + 1
        job = self.keep(self.last, data.nbytes, [data, counts])  # held until the card is done
        for register, value in (SOURCE, data.iova), (RESULT, counts.iova), (LEFT, data.nbytes):
            self.bar.write(register, int(value))
        return job

    def completed(self) -> int:
        return self.last - 1 if self.bar.read(LEFT) else self.bar.read(FINISHED)

    def problem(self) -> TransferFailed | None:
        idle = not self.bar.read(LEFT)
        return TransferFailed("gave up") if idle and self.completed() < self.last else None

    regranted = Queue.renew  # after a reset: what was in flight is lost


class HistogramDriver(holdfast.Driver):
    """Keeper half. What it says is believed when memory is to be released: it must be exact."""

    name = "histogram"
    stop_is_final = True  # registers go through the keeper, which serves no dead client
    engine = HistogramEngine

    def grant(self, channels: Sequence[int], control: ControlMemory | None) -> Grant:
        return Grant(vectors=(0,))

    def in_flight(self, channels: Sequence[int]) -> int:
        return int(self.fn.bar(0).read(LEFT) > 0)

    def stop(self, channels: Sequence[int]) -> bool:
        self.fn.bar(0).write(LEFT, 0)
        return not all(self.in_flight(channels) for _ in range(1000))  # False is no proof


if __name__ == "__main__":
    with holdfast.open(f"emu:{__file__}:Histogrammer") as card:
        data, counts = card.alloc(8 << 20), card.alloc(256, np.uint32)
        data.array[:] = np.arange(data.nbytes) % 251
        card.dma.count(data, counts).wait(timeout=10)
        assert np.array_equal(counts.array, np.bincount(data.array, minlength=256))
        print(f"{data.nbytes} bytes counted: {counts.array[:3]} ... {counts.array[-3:]}")
