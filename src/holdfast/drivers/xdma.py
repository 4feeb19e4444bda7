# SPDX-License-Identifier: Apache-2.0
"""AMD/Xilinx XDMA: scatter-gather channels with descriptor rings, and streams.

Facts (AMD PG195, PG344; registers in :mod:`holdfast.regs.xdma`). Each channel fetches 32-byte
descriptors from host memory and moves data between host and card. In *credit mode* it fetches as
many as it was given credits for, so one cyclic ring can be kept running and fed: write descriptors,
then add credits. In *poll mode* it writes the number of finished descriptors to host memory.

Consequence. After the keeper started a channel once, a client needs three things to use it without
asking anybody: the ring, the credits doorbell, and the written-back count.

Choice. The keeper half owns the registers. For every lease it lays out rings in memory of that
lease, starts the channel in credit mode with no credits, and hands ring, doorbells and interrupt
vector to the client. Its proof of quiet is: no credits left, and the busy bit clear; its stop is
Run cleared and busy gone, which also ends the doorbells. The client half only writes descriptors.

Cost. The ring holds 1024 descriptors, of which 1023 can be outstanding (credits have ten bits).
Whether every core generation counts credits on memory-mapped channels is not documented; boards
that do not are refused at probe.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from holdfast.driver import ControlMemory, Driver, FunctionAccess, Grant, command
from holdfast.drivers.xdma_engine import XdmaEngine
from holdfast.drivers.xdma_poster import make_lane
from holdfast.drivers.xdma_ring import BLOCK, CONTROL_BYTES, Layout, prepare_ring
from holdfast.errors import DeviceError, NotSupported
from holdfast.poster import Bells, Poster
from holdfast.regs import xdma as regs
from holdfast.regs.xdma import CHANNEL, SG, Control, Direction, Status
from holdfast.values import IrqIndex

STOP_DEADLINE = 1.5
"""Seconds for a running descriptor to finish after Run was cleared."""
STOP_POLL = 0.0005

START = (
    Control.RUN
    | Control.IE_DESCRIPTOR_COMPLETED
    | Control.IE_MAGIC_STOPPED
    | Control.IE_INVALID_LENGTH
    | Control.IE_ALIGN_MISMATCH
    | Control.IE_READ_ERROR
    | Control.IE_WRITE_ERROR
    | Control.IE_DESC_ERROR
    | Control.POLL_WRITEBACK
)
INTERRUPTING = Status.DESCRIPTOR_COMPLETED | regs.STATUS_ERRORS


class XdmaDriver(Driver):
    """Keeper half. Channel n of a lease is the pair H2C n and C2H n."""

    name = "xdma"
    ids = tuple((regs.VENDOR, device) for device in (0x9038, 0x903F, 0x7024, 0x9034, 0x8038))
    irq_index = IrqIndex.MSIX
    # Clearing Run takes the credits away and renews the doorbells: a stale one rings nothing.
    stop_is_final = True
    reset_stops_dma = True
    control_bytes = CONTROL_BYTES
    engine = XdmaEngine
    mediates = True

    def __init__(self, fn: FunctionAccess) -> None:
        super().__init__(fn)
        self.bar_index = self._find_config_bar()
        self.engine_bars = (self.bar_index,)
        self.bar = fn.bar(self.bar_index)
        self.user = fn.bar(regs.USER_BAR) if self._has_sources() else None
        self.pairs = 0
        self.h2c_count = 0
        self.directions = (Direction.H2C, Direction.C2H)

    def _find_config_bar(self) -> int:
        """The BAR whose IRQ and config blocks identify themselves (PG195, "Identifier")."""
        for index in range(6):
            if self.fn.bar_size(index) < regs.CONFIG_BAR_SIZE:
                continue
            bar = self.fn.bar(index)
            found = (bar.read(regs.IRQ_IDENTIFIER) >> 16, bar.read(regs.CONFIG_IDENTIFIER) >> 16)
            if found == (0x1FC2, 0x1FC3):
                return index
        raise DeviceError(
            "no BAR identifies itself as the XDMA configuration block", operation="probe xdma"
        )

    def _has_sources(self) -> bool:
        """Whether the user BAR is the emulated card's page of stream sources."""
        return (
            self.bar_index > regs.USER_BAR
            and self.fn.bar_size(regs.USER_BAR) >= regs.USER_PAGE_SIZE
            and self.fn.bar(regs.USER_BAR).read(regs.USER_IDENTIFIER) == regs.USER_IDENTIFIER_VALUE
        )

    def resume(self) -> None:
        """Count the channels. What else is known of them is in their registers."""
        counts = [self._count(direction) for direction in self.directions]
        self.pairs, self.h2c_count = min(counts), counts[0]
        if not self.pairs:
            raise DeviceError(f"channels found (H2C, C2H): {counts}", operation="probe xdma")

    def probe(self) -> None:
        self.resume()
        if not self.stop(range(self.pairs)):
            raise DeviceError("a channel does not stop", operation="probe xdma")
        # One vector per channel, in the order of the request bits: H2C first, C2H above the last
        # implemented H2C channel (PG195, "IRQ Block Channel Vector Number").
        for word in range(2):
            packed = sum(((4 * word + byte) & 0x1F) << (8 * byte) for byte in range(4))
            self.bar.write(regs.IRQ_CHANNEL_VECTOR, packed, word)
        self.bar.write(regs.IRQ_CHANNEL_ENABLE_W1S, 0xFFFF_FFFF)

    def _count(self, direction: Direction) -> int:
        rows = CHANNEL[direction]
        for channel in range(regs.MAX_CHANNELS):
            word = self.bar.read(rows.identifier, channel)
            if word >> 16 != 0x1FC0 | direction or (word >> 8) & 0xF != channel:
                return channel
        return regs.MAX_CHANNELS

    def channels(self) -> int:
        return self.pairs

    def vector(self, direction: Direction, channel: int) -> int:
        """Interrupt vector of one channel."""
        return channel + (self.h2c_count if direction is Direction.C2H else 0)

    def grant(self, channels: Sequence[int], control: ControlMemory | None) -> Grant:
        """Lay out the rings in the lease's memory and start the channels without credits."""
        if control is None:
            raise DeviceError("no control memory", operation="grant xdma")
        vectors: list[int] = []
        bells: list[tuple[int, int]] = []
        for place, channel in enumerate(channels):
            for direction in self.directions:
                layout = Layout(place, direction)
                prepare_ring(control, layout)
                control.flush()
                self._start(direction, channel, layout, control)
                vectors.append(self.vector(direction, channel))
                bells.append((self.bar_index, SG[direction].descriptor_credits.at(channel)))
                bells.append((self.bar_index, CHANNEL[direction].status.at(channel)))
        info = {"bar": self.bar_index, "vectors": list(vectors)}
        return Grant(tuple(vectors), tuple(bells), info)

    def _start(
        self, direction: Direction, channel: int, layout: Layout, control: ControlMemory
    ) -> None:
        rows, sg = CHANNEL[direction], SG[direction]
        ring, count = control.iova(layout.ring), control.iova(layout.count)
        if self.user is not None and direction is Direction.C2H:
            # A former lease may have left its stream source on; the channel is stopped by now.
            self.user.write(regs.SOURCE_CONTROL, 0, channel)
        self.bar.write_many(
            (
                (rows.control_w1c, int(Control.NON_INCREMENTING | Control.RUN), channel),
                (rows.status, regs.STATUS_CLEARABLE, channel),
                (rows.writeback_lo, count & 0xFFFF_FFFF, channel),
                (rows.writeback_hi, count >> 32, channel),
                (sg.descriptor_lo, ring & 0xFFFF_FFFF, channel),
                (sg.descriptor_hi, ring >> 32, channel),
                (sg.descriptor_adjacent, BLOCK - 1, channel),
                (regs.SG_CREDIT_MODE_W1S, regs.sg_bit(direction, channel), 0),
                (rows.irq_enable, int(INTERRUPTING), channel),
                (rows.control, int(START), channel),
            )
        )

    def poster(
        self, channels: Sequence[int], control: ControlMemory | None, bells: Bells
    ) -> Poster:
        """Post on the first of the channels. The emulated card says how much memory it has."""
        if control is None:
            raise DeviceError("no control memory", operation="open mediated")
        if self.user is None:
            raise NotSupported(
                "the card does not say how much memory it has",
                operation="open mediated",
                hint="subclass XdmaDriver and override poster()",
            )
        size = self.user.read(regs.USER_MEMORY_LO) | self.user.read(regs.USER_MEMORY_HI) << 32
        return self.poster_for(channels[0], control, bells, size)

    def poster_for(
        self, channel: int, control: ControlMemory, bells: Bells, card_bytes: int
    ) -> Poster:
        """The poster of a card whose memory is known to have ``card_bytes`` bytes from 0 on."""
        to_card, from_card = (
            make_lane(
                control,
                direction,
                channel,
                self.vector(direction, channel),
                (self.bar_index, self.bar),
                bells,
            )
            for direction in self.directions
        )
        return Poster(to_card, from_card, card_bytes)

    # -- the proof of quiet ------------------------------------------------------------

    def in_flight(self, channels: Sequence[int]) -> int:
        """Descriptors given and not finished. Credits are read before busy: a fetch moves
        descriptors from the one to the other, never back."""
        return sum(given + busy for _, _, given, busy in self._look(channels))

    def _look(self, channels: Sequence[int]) -> list[tuple[Direction, int, int, int]]:
        """Direction, channel, credits and busy bit of each engine."""
        engines = [(direction, channel) for channel in channels for direction in self.directions]
        words = self.bar.read_many(
            [
                row
                for direction, channel in engines
                for row in (
                    (SG[direction].descriptor_credits, channel),
                    (CHANNEL[direction].status, channel),
                )
            ]
        )
        return [
            (direction, channel, given, status & Status.BUSY)
            for (direction, channel), given, status in zip(
                engines, words[0::2], words[1::2], strict=True
            )
        ]

    def drain(self, channels: Sequence[int]) -> None:
        """A stream never ends by itself, and what an error left in the ring is never fetched: these
        channels are stopped, the others may finish."""
        for channel in channels:
            word = self.bar.read(CHANNEL[Direction.C2H].identifier, channel)
            if regs.IDENTIFIER_STREAM.get(word):
                self.bar.write(CHANNEL[Direction.C2H].control_w1c, int(Control.RUN), channel)
        for direction, channel, given, busy in self._look(channels):
            if given and not busy:
                self.bar.write(CHANNEL[direction].control_w1c, int(Control.RUN), channel)

    def failed(self, channels: Sequence[int]) -> bool:
        return any(word & regs.STATUS_ERRORS for word in self._statuses(channels))

    def stop(self, channels: Sequence[int]) -> bool:
        """Clear Run; acknowledged once busy is gone (PG195, "Channel Control", bit 0)."""
        self.bar.write_many(
            (CHANNEL[direction].control_w1c, int(Control.RUN), channel)
            for channel in channels
            for direction in self.directions
        )
        deadline = time.monotonic() + STOP_DEADLINE
        while any(word & Status.BUSY for word in self._statuses(channels)):
            if time.monotonic() > deadline:
                return False
            time.sleep(STOP_POLL)
        return True

    def _statuses(self, channels: Sequence[int]) -> list[int]:
        return self.bar.read_many(
            (CHANNEL[direction].status, channel)
            for channel in channels
            for direction in self.directions
        )

    # -- commands ------------------------------------------------------------

    @command
    def channel_status(self, channels: Sequence[int]) -> list[dict[str, Any]]:
        """Status, control and counts of the caller's channels, for error reports."""
        return [
            {
                "channel": channel,
                "direction": direction.name,
                "status": self.bar.read(CHANNEL[direction].status, channel),
                "control": self.bar.read(CHANNEL[direction].control, channel),
                "completed": self.bar.read(CHANNEL[direction].completed_count, channel),
                "credits": self.bar.read(SG[direction].descriptor_credits, channel),
            }
            for channel in channels
            for direction in self.directions
        ]
