# SPDX-License-Identifier: Apache-2.0
"""The emulated XDMA card on a bench: descriptor lists and channels by hand, without a driver."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from holdfast.emu.faults import FaultPlan
from holdfast.emu.local import LocalHost, ManualClock
from holdfast.emu.port import Bytes
from holdfast.emu.xdma import Xdma
from holdfast.emu.xdma_fetch import Descriptors
from holdfast.regs import xdma as regs
from holdfast.regs.spec import Register
from holdfast.regs.xdma import Control, Direction
from holdfast.values import IrqIndex

BASE = 0x10_0000
"""The IOVA at which all of the bench's host memory is mapped."""
LIST = BASE
"""Where :func:`straight` expects its descriptors to be stored."""
DATA = BASE + 0x10_0000
"""The host buffers of :func:`straight`."""
LOG_ALL = 0x00FFFE7E
"""Every event enable of the control register, and every interrupt enable."""


def descriptors(
    sources: Sequence[int],
    destinations: Sequence[int],
    lengths: Sequence[int],
    *,
    at: int,
    last: int = regs.Desc.STOP | regs.Desc.COMPLETED,
    each: int = 0,
) -> Descriptors:
    """A straight list to be stored at IOVA ``at``, every ``next`` set; ``last`` flags the last."""
    count = len(lengths)
    table = np.zeros(count, regs.DESCRIPTOR)
    table["control"] = regs.DESC_MAGIC | each
    table["control"][-1] |= last
    table["source"], table["destination"], table["length"] = sources, destinations, lengths
    table["next"] = at + regs.DESC_SIZE * np.arange(1, count + 1)
    return table


def straight(
    count: int,
    length: int = 256,
    *,
    direction: Direction = Direction.C2H,
    last: int = regs.Desc.STOP | regs.Desc.COMPLETED,
    each: int = 0,
) -> Descriptors:
    """``count`` descriptors at LIST, between card memory from 0 and host memory from DATA on."""
    card = [i * length for i in range(count)]
    host = [DATA + i * length for i in range(count)]
    source, destination = (card, host) if direction is Direction.C2H else (host, card)
    return descriptors(source, destination, [length] * count, at=LIST, last=last, each=each)


class XdmaBench(LocalHost):
    """A card, its clock and host memory, mapped, with bus mastering on and MSI-X wired."""

    def __init__(
        self,
        *,
        channels: int = 2,
        card_memory: int = 1 << 20,
        memory: int = 4 << 20,
        faults: str = "",
        link_rate: float | None = None,
        link_chunk: int = 65536,
        link_latency: float = 0.0,
    ) -> None:
        clock = ManualClock()
        self.card = Xdma(
            channels=channels,
            memory=card_memory,
            link_rate=link_rate,
            link_chunk=link_chunk,
            link_latency=link_latency,
            clock=clock,
        )
        super().__init__(self.card, memory=memory, clock=clock)
        self.card.faults = FaultPlan.parse(faults)
        self.time = clock
        self.map(BASE, memory)
        self.bus_master(True)
        self.wire(IrqIndex.MSIX)
        self.registers_1 = self.registers(regs.CONFIG_BAR)
        self.write(regs.IRQ_CHANNEL_ENABLE, 0xFF)
        for bit in range(2 * channels):
            word = self.read(regs.IRQ_CHANNEL_VECTOR, bit // 4)
            self.write(regs.IRQ_CHANNEL_VECTOR, word | bit << 8 * (bit % 4), bit // 4)

    @property
    def card_memory(self) -> Bytes:
        return self.card.memory(regs.BYPASS_BAR)

    def read(self, register: Register, index: int = 0) -> int:
        """Read a register of the configuration BAR, also one that drivers only write."""
        return self.registers_1.load(register.at(index), register.width)

    def write(self, register: Register, value: int, index: int = 0) -> None:
        self.registers_1.write(register, value, index)

    def store(self, iova: int, data: Descriptors | Bytes) -> None:
        """Put bytes into host memory at an IOVA."""
        raw = data.view(np.uint8)
        self.ram[iova - BASE : iova - BASE + len(raw)] = raw

    def host(self, iova: int, count: int) -> Bytes:
        """Bytes of host memory at an IOVA (a view)."""
        return self.ram[iova - BASE : iova - BASE + count]

    def start(
        self,
        direction: Direction,
        channel: int,
        address: int,
        *,
        adjacent: int = 0,
        control: int = LOG_ALL,
    ) -> None:
        """Program the list and set Run, with every event logged and interrupting."""
        rows, sg = regs.CHANNEL[direction], regs.SG[direction]
        self.write(rows.irq_enable, LOG_ALL, channel)
        self.write(sg.descriptor_lo, address & 0xFFFFFFFF, channel)
        self.write(sg.descriptor_hi, address >> 32, channel)
        self.write(sg.descriptor_adjacent, adjacent, channel)
        self.write(rows.control, control | Control.RUN, channel)

    def stop(self, direction: Direction, channel: int) -> None:
        """Clear Run."""
        self.write(regs.CHANNEL[direction].control_w1c, Control.RUN, channel)

    def status(self, direction: Direction, channel: int) -> int:
        return self.read(regs.CHANNEL[direction].status, channel)

    def count(self, direction: Direction, channel: int) -> int:
        return self.read(regs.CHANNEL[direction].completed_count, channel)
