# SPDX-License-Identifier: Apache-2.0
"""An emulated card built around the XDMA core (AMD PG195).

* BAR 0, the user BAR: a page of registers for the card's own logic (stream sources, user interrupt
  lines), then mappable scratch memory.
* BAR 1, the configuration BAR: the core's registers, all trapped, and the MSI-X table.
* BAR 2, the bypass BAR: the card's memory, mappable, so that a host sees what DMA moved.

A C2H channel whose source is enabled is an AXI4-Stream channel; all others are memory mapped.

Per channel, two registers can be rung through eventfds while the channel runs:
``descriptor_credits`` (each count is a credit) and ``status`` (an acknowledge of everything).
A stop makes new ones:
whoever holds the old eventfds, be it the orphan of a dead client, cannot start anything again.

Where PG195 is silent the choices are: absent channels and undefined offsets read 0; credits
saturate at 1023; a descriptor of length 0 is done at once; a misaligned descriptor address is a
fetch error; reads of the set and clear registers give 0.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import ClassVar

from holdfast.emu import options
from holdfast.emu.faults import FaultPlan
from holdfast.emu.function import BarSpec, Function, Identity, MsixSpec, Options
from holdfast.emu.link import Link
from holdfast.emu.registers import WriteHandler
from holdfast.emu.xdma_channel import Channel
from holdfast.emu.xdma_engine import Engine
from holdfast.emu.xdma_irq import IrqBlock
from holdfast.emu.xdma_user import UserLogic
from holdfast.errors import UsageError
from holdfast.regs import xdma as regs
from holdfast.regs.spec import Register
from holdfast.regs.xdma import Direction
from holdfast.values import Area, IrqIndex

Read = Callable[[Channel], int]
Write = Callable[[Channel, int], object]

RESET_SECONDS = 1.0
"""How long a reset waits for the step under way before it is refused."""
_MASTER_OFF_SECONDS = 0.25


class Xdma(Function):
    """The card.

    channels
        H2C channels, and as many C2H channels: 1 to 4 each.
    memory
        Card memory in bytes, a power of two.
    link_rate, link_chunk, link_latency
        Bytes per second that all channels share (None: as fast as memory), bytes moved at a time,
        and seconds that the first descriptor fetch takes after a pause.
    """

    identity = Identity(
        vendor=regs.VENDOR,
        device=regs.DEVICE,
        class_code=regs.CLASS_CODE,
        subsystem_vendor=regs.VENDOR,
        subsystem=0x0007,
    )
    msi = 1
    msix = MsixSpec(
        regs.MSIX_VECTORS,
        regs.CONFIG_BAR,
        regs.MSIX_TABLE_OFFSET,
        regs.MSIX_PBA_OFFSET,
        control=0xFFFFFFFF,
    )
    power = True
    express = True
    has_reset = True
    options: ClassVar[Options] = {
        "channels": options.integer,
        "memory": options.size,
        "link_rate": options.rate,
        "link_chunk": options.size,
        "link_latency": options.seconds,
    }
    supported_faults = frozenset(FaultPlan.names())

    def __init__(
        self,
        *,
        channels: int = regs.MAX_CHANNELS,
        memory: int = 64 << 20,
        link_rate: float | None = None,
        link_chunk: int = 65536,
        link_latency: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 1 <= channels <= regs.MAX_CHANNELS:
            raise UsageError(f"{channels} channels: 1 to {regs.MAX_CHANNELS}", operation="create")
        if memory < 4096 or memory & (memory - 1):
            raise UsageError(
                f"{memory} bytes of card memory: not a power of two from 4096 on",
                operation="create",
            )
        link = Link(link_rate, link_chunk, link_latency, clock)
        self.bars = _bars(memory)
        super().__init__()
        self.per_direction = channels
        self.irq = IrqBlock(self, 2 * channels)
        self._rings: dict[tuple[Direction, int], tuple[int, int]] = {}
        self.channels = [
            self._make_channel(direction, number, clock)
            for direction in Direction
            for number in range(channels)
        ]
        for channel in self.channels:
            self._add_doorbells(channel)
        self.engine = Engine(
            self, self.channels, self.memory(regs.BYPASS_BAR), link, self._drain_acknowledge
        )
        self.user = UserLogic(
            self, self.irq, [self.channel(Direction.C2H, n).source for n in range(channels)], clock
        )
        self._bind_common()
        self._bind_config()
        for direction in Direction:
            self._bind_direction(direction)

    # -- building --------------------------------------------------------------------------------

    def _make_channel(
        self, direction: Direction, number: int, clock: Callable[[], float]
    ) -> Channel:
        bit = direction * self.per_direction + number
        key = direction, number
        return Channel(
            direction,
            number,
            wake=self.wake,
            level=lambda on: self.irq.set_channel(bit, on),
            renew=lambda: self.renew_doorbells(self._rings[key]),
            # A hang keeps the next transfer from being done; the rest follows those done.
            armed=lambda name: self.faulty(name, self.transfers + (name == "hang")),
            clock=clock,
        )

    def _add_doorbells(self, channel: Channel) -> None:
        number = channel.number
        credit = regs.SG[channel.direction].descriptor_credits
        status = regs.CHANNEL[channel.direction].status
        self._rings[channel.direction, number] = (
            self.add_doorbell(credit, number, 1, channel.ring_credits),
            self.add_doorbell(status, number, regs.STATUS_CLEARABLE, channel.ring_acknowledge),
        )

    def _drain_acknowledge(self, channel: Channel) -> int:
        return self.drain_doorbell(self._rings[channel.direction, channel.number][1])

    def channel(self, direction: Direction, number: int) -> Channel:
        """A channel that is implemented."""
        return self.channels[direction * self.per_direction + number]

    # -- registers -------------------------------------------------------------------------------

    def _bind(
        self,
        direction: Direction,
        register: Register,
        read: Read | None,
        write: Write | None = None,
    ) -> None:
        """Hang a channel register on; absent channels read 0 and ignore writes."""

        def reader(index: int) -> int:
            if read is None or index >= self.per_direction:
                return 0
            return read(self.channel(direction, index))

        def writer(index: int, value: int) -> None:
            if write is not None and index < self.per_direction:
                write(self.channel(direction, index), value)

        self.on_read(register, reader)
        self.on_write(register, writer)

    def _bind_direction(self, direction: Direction) -> None:
        rows, sg = regs.CHANNEL[direction], regs.SG[direction]
        target, sg_target = regs.Target(direction), regs.Target(direction + regs.Target.H2C_SG)

        def bind(register: Register, read: Read | None, write: Write | None = None) -> None:
            self._bind(direction, register, read, write)

        def ident(which: regs.Target) -> Read:
            return lambda c: regs.identifier(
                which, c.number if which is target else 0, stream=c.source.enabled
            )

        bind(rows.identifier, ident(target))
        bind(rows.control, lambda c: c.control, Channel.write_control)
        bind(rows.control_w1s, None, lambda c, v: c.write_control(c.control | v))
        bind(rows.control_w1c, None, lambda c, v: c.write_control(c.control & ~v))
        bind(
            rows.status,
            Channel.read_status,
            lambda c, v: c.acknowledge(v & regs.STATUS_CLEARABLE),
        )
        bind(rows.status_rc, Channel.read_status_and_clear)
        bind(rows.completed_count, lambda c: c.count)
        bind(rows.alignments, lambda _: regs.ALIGNMENTS_VALUE)
        _bind_address(bind, rows.writeback_lo, rows.writeback_hi, "writeback")
        bind(rows.irq_enable, lambda c: c.irq_enable, Channel.set_irq_enable)
        bind(rows.irq_enable_w1s, None, lambda c, v: c.set_irq_enable(c.irq_enable | v))
        bind(rows.irq_enable_w1c, None, lambda c, v: c.set_irq_enable(c.irq_enable & ~v))
        bind(rows.perf_control, lambda c: c.perf.control, Channel.write_perf)
        bind(rows.perf_cycles_lo, lambda c: c.perf_word("cycles", False))
        bind(rows.perf_cycles_hi, lambda c: c.perf_word("cycles", True))
        bind(rows.perf_data_lo, lambda c: c.perf_word("beats", False))
        bind(rows.perf_data_hi, lambda c: c.perf_word("beats", True))
        bind(rows.perf_pending_lo, None)
        bind(rows.perf_pending_hi, None)
        bind(sg.identifier, ident(sg_target))
        _bind_address(bind, sg.descriptor_lo, sg.descriptor_hi, "first_descriptor")
        bind(sg.descriptor_adjacent, lambda c: c.adjacent, _set_adjacent)
        bind(
            sg.descriptor_credits,
            lambda c: c.credits,
            lambda c, v: c.add_credits(v & regs.CREDITS_MAX),
        )

    def _bind_common(self) -> None:
        """Halt and credit mode: one bit per channel, with set and clear registers."""

        def bind(
            plain: Register, w1s: Register, w1c: Register, apply: Callable[[Channel, bool], None]
        ) -> None:
            implemented = 0
            for channel in self.channels:
                implemented |= regs.sg_bit(channel.direction, channel.number)

            def store(value: int) -> None:
                self.poke(plain, value & implemented)
                for channel in self.channels:
                    apply(channel, bool(value & regs.sg_bit(channel.direction, channel.number)))

            self.on_write(plain, lambda _, value: store(value))
            self.on_write(w1s, lambda _, value: store(self.peek(plain) | value))
            self.on_write(w1c, lambda _, value: store(self.peek(plain) & ~value))
            for row in (w1s, w1c):
                self.on_read(row, lambda _: 0)

        bind(regs.SG_HALT, regs.SG_HALT_W1S, regs.SG_HALT_W1C, Channel.set_halted)
        bind(
            regs.SG_CREDIT_MODE,
            regs.SG_CREDIT_MODE_W1S,
            regs.SG_CREDIT_MODE_W1C,
            Channel.set_credit_mode,
        )

    def _bind_config(self) -> None:
        self.on_read(regs.CONFIG_MAX_PAYLOAD, lambda _: self.config.device_control >> 5 & 7)
        self.on_read(regs.CONFIG_MAX_READ_REQUEST, lambda _: self.config.device_control >> 12 & 7)
        self.on_read(regs.CONFIG_MSI_ENABLE, lambda _: self._msi_enable())
        for register, mask in ((regs.CONFIG_PCIE_CONTROL, 1), (regs.CONFIG_WRITE_FLUSH, 0x1F)):
            self.on_write(register, self._masked(register, mask))

    def _masked(self, register: Register, mask: int) -> WriteHandler:
        return lambda _, value: self.poke(register, value & mask)

    def _msi_enable(self) -> int:
        index = self.message_signalled()
        return {IrqIndex.MSI: 1, IrqIndex.MSIX: 2}.get(index, 0) if index is not None else 0

    # -- bus -------------------------------------------------------------------------------------

    def work(self) -> float | None:
        return self.engine.work()

    def bus_master_changed(self) -> None:
        if self.bus_master:
            self.wake()
        else:
            # What is on its way arrives before the write is answered, as a flushing read would
            # have it. If the peer itself holds it up, busy goes on saying so.
            self.engine.settle(_MASTER_OFF_SECONDS)

    def reset(self) -> None:
        """Stop every engine, wait for the step under way, then clear all registers.

        After this returns no DMA happens until a channel is started again, unless the fault plan
        says otherwise. ``OSError`` (ETIMEDOUT): the engines were told to stop, but a copy is held
        up by the peer; registers are unchanged.
        """
        self.check_reset_allowed()
        keep = self.faulty("reset_keeps_dma")
        with self.lock:
            flying = any(channel.busy for channel in self.channels)
            hung = flying and self.faulty("hang", self.transfers + 1)
            if not keep:
                for channel in self.channels:
                    channel.clear_engine()
                if not self.engine.settle(RESET_SECONDS):
                    raise OSError(errno.ETIMEDOUT, "a copy is still under way")
                self.transfers += hung  # what hung and was reset away is past
            super().reset()
            for channel in self.channels:
                channel.clear_registers()
            for channel in self.channels if not keep else ():
                channel.halted = channel.credit_mode = False
            self.user.reset()
            self.irq.reset()
            for numbers in self._rings.values():
                self.renew_doorbells(numbers)
            if keep and flying:
                self.config.command |= 0x4
                self.wake()


def _bars(memory: int) -> tuple[BarSpec, ...]:
    scratch = Area(regs.USER_PAGE_SIZE, regs.USER_BAR_SIZE - regs.USER_PAGE_SIZE)
    return (
        BarSpec(regs.USER_BAR, regs.USER_BAR_SIZE, banks=(regs.USER,), ram=(scratch,)),
        BarSpec(regs.CONFIG_BAR, regs.CONFIG_BAR_SIZE, banks=regs.CONFIG_BANKS),
        BarSpec(regs.BYPASS_BAR, memory, ram=(Area(0, memory),), wide=True, prefetchable=True),
    )


def _set_adjacent(channel: Channel, value: int) -> None:
    channel.adjacent = value & regs.ADJACENT_MAX


def _bind_address(
    bind: Callable[[Register, Read, Write], None],
    low: Register,
    high: Register,
    attribute: str,
) -> None:
    """A 64-bit address in two registers."""

    def set_low(channel: Channel, value: int) -> None:
        setattr(channel, attribute, getattr(channel, attribute) & ~0xFFFFFFFF | value)

    def set_high(channel: Channel, value: int) -> None:
        setattr(channel, attribute, getattr(channel, attribute) & 0xFFFFFFFF | value << 32)

    bind(low, lambda c: getattr(c, attribute) & 0xFFFFFFFF, set_low)
    bind(high, lambda c: getattr(c, attribute) >> 32, set_high)
