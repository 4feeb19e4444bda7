# SPDX-License-Identifier: Apache-2.0
"""One XDMA channel: its registers, and the state its engine shares with them.

What software asked for (the Run bit) and what the engine does (:class:`Phase`) are two variables,
and the busy bit tells of the second one. It is exact, because a proof that memory may be released
is built on it: busy is set while a step is under way, while a stop waits for the current
descriptor, while data that was announced has not landed, and while anything fetched or fetchable
is left to do. A channel in credit mode that has used up its credits is idle: without another write
it will touch nothing.

Run edges (PG195, "Channel Control (0x04)"): 0 to 1 clears status and count and starts at the
descriptor address; 1 to 0 drops everything behind the current descriptor, which is finished if its
data began to move. A stream descriptor that waits for data is abandoned instead: it might never
end. After a Stop descriptor the engine is idle while Run still reads 1.

The function's lock guards everything here.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holdfast.emu.port import DmaPort, U64s
from holdfast.emu.xdma_fetch import Descriptors, Fetcher
from holdfast.emu.xdma_stream import Source
from holdfast.regs import xdma as regs
from holdfast.regs.xdma import Control, Direction, Status

_RUN = int(Control.RUN)
_PERF_ON = int(regs.PerfControl.RUN | regs.PerfControl.AUTO)
CLOCK_HZ = 250e6
"""The core's clock, which the performance counters count."""


class Phase(enum.Enum):
    """What the engine does."""

    IDLE = enum.auto()
    RUNNING = enum.auto()
    STOPPING = enum.auto()  # finishes the current descriptor, takes no other


class Queue:
    """Fetched descriptors that are not done, and how far the first of them is."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        none = np.zeros(0, np.uint64)
        self.control: npt.NDArray[np.uint32] = np.zeros(0, np.uint32)
        self.lengths: U64s = none
        self.source: U64s = none
        self.destination: U64s = none
        self.done = 0
        """Bytes of the first descriptor that were moved."""

    def __len__(self) -> int:
        return len(self.control)

    def fill(self, descriptors: Descriptors) -> None:
        """Take a fresh batch; the queue is empty."""
        self.control = np.ascontiguousarray(descriptors["control"])
        self.lengths = (descriptors["length"] & regs.DESC_MAX_LENGTH).astype(np.uint64)
        self.source = np.ascontiguousarray(descriptors["source"])
        self.destination = np.ascontiguousarray(descriptors["destination"])

    def drop(self, count: int) -> None:
        """Forget the first ``count`` descriptors."""
        if count:
            self.control = self.control[count:]
            self.lengths = self.lengths[count:]
            self.source = self.source[count:]
            self.destination = self.destination[count:]
            self.done = 0


@dataclass(slots=True)
class Late:
    """A piece whose completion was signalled before it moved (fault ``early_completion``)."""

    at: float
    move: Callable[[DmaPort], None]


@dataclass(slots=True)
class Perf:
    """Cycle and beat counters (PG195, "Performance Monitor Control (0xC0)")."""

    control: int = 0
    counting: bool = False
    since: float = 0.0
    cycles: int = 0
    beats: int = 0

    def sync(self, now: float) -> None:
        if self.counting:
            self.cycles += int((now - self.since) * CLOCK_HZ)
        self.since = now

    def clear(self, now: float) -> None:
        self.cycles = self.beats = 0
        self.since = now


class Channel:
    """State of one channel; the engine moves its data, the card wires it to registers."""

    def __init__(
        self,
        direction: Direction,
        number: int,
        *,
        wake: Callable[[], None],
        level: Callable[[bool], None],
        renew: Callable[[], None],
        armed: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.direction = direction
        self.number = number
        self.source = Source()
        self.fetcher = Fetcher()
        self.queue = Queue()
        self.perf = Perf()
        self._wake = wake
        self._level = level
        self._renew = renew
        self._armed = armed
        self.clock = clock
        self.in_step = False
        """The engine thread is moving this channel's data, without the lock."""
        self.epoch = 0
        """Goes up when a reset makes the step under way void."""
        self.halted = False
        self.credit_mode = False
        self.clear_engine()
        self.clear_registers()

    # -- reset -------------------------------------------------------------------------------------

    def clear_engine(self) -> None:
        """Stop moving data for good; a step under way comes to nothing once it returns."""
        self.epoch += 1
        self.phase = Phase.IDLE
        self.queue.clear()
        self.fetcher.ended = True
        self.restart = False
        self.stream = False
        self.starved = True
        self.ready_at = 0.0
        self.credits = 0
        self.late: Late | None = None
        self.wild = False
        self.last_destination: tuple[int, int] | None = None

    def clear_registers(self) -> None:
        """What software sees, as after a reset."""
        self.control = 0
        self.status = 0
        self.count = 0
        self.irq_enable = 0
        self.first_descriptor = 0
        self.adjacent = 0
        self.writeback = 0
        self.perf = Perf(since=self.clock())
        self._update_irq()

    # -- what the engine does ----------------------------------------------------------------------

    @property
    def fetchable(self) -> bool:
        """The fetch engine may go on: the list has not ended, no halt, credits if they count."""
        return (
            not self.fetcher.ended
            and not self.halted
            and (self.credits > 0 or not self.credit_mode)
        )

    @property
    def busy(self) -> bool:
        """The truth about this channel: may it still touch memory without another write?"""
        if self.in_step or self.late is not None or self.wild or self.phase is Phase.STOPPING:
            return True
        return self.phase is Phase.RUNNING and (len(self.queue) > 0 or self.fetchable)

    @property
    def at_rest(self) -> bool:
        """Nothing is to be done for this channel. May be read without the lock."""
        return self.phase is Phase.IDLE and self.late is None and not self.wild

    def _begin(self) -> None:
        self.queue.clear()
        self.fetcher.start(self.first_descriptor, self.adjacent)
        self.stream = self.source.enabled
        self.phase = Phase.RUNNING
        self.restart = self.wild = False
        self.starved = True
        self.last_destination = None

    def go_idle(self, why: int) -> None:
        """The engine stops: nothing is fetched or moved any more."""
        self.phase = Phase.IDLE
        self.queue.clear()
        self.fetcher.ended = True
        if self.restart and self.control & _RUN:
            self._begin()
            return
        self.log(why)
        self.restart = False
        self._perf_run()

    def stopped(self) -> None:
        """The stop that software asked for is complete."""
        self.wild = self._armed("wild") and self.last_destination is not None
        self.go_idle(Status.IDLE_STOPPED)

    def log(self, bits: int) -> None:
        """Enter events into status, as far as the control register lets them be logged."""
        self.status |= int(bits) & self.control & regs.STATUS_CLEARABLE
        self._update_irq()

    def stops_on(self, error: int) -> bool:
        """Read and write errors stop the engine only if enabled (PG195, control 13:9, 18:14)."""
        return bool(self.control & error)

    # -- registers ---------------------------------------------------------------------------------

    def write_control(self, value: int) -> None:
        value &= regs.CONTROL_MASK
        rising = value & ~self.control & _RUN
        falling = ~value & self.control & _RUN
        self.control = value
        if rising:
            self._run()
        elif falling:
            self._stop()

    def _run(self) -> None:
        now = self.clock()
        if self.perf.control & regs.PerfControl.AUTO:
            self.perf.clear(now)
        self.status = 0
        self.count = 0
        self._update_irq()
        if self.phase is Phase.IDLE and not self.in_step and self.late is None:
            self._begin()
        else:
            # The last run's descriptor is still being finished: start when it is.
            self.restart = True
            self.phase = Phase.STOPPING
        self._perf_run()
        self._wake()

    def _stop(self) -> None:
        hung = self.busy and self._armed("hang")  # also before it fetched anything
        self.credits = 0
        self.restart = False
        # Whoever still holds the doorbells of this run rings in vain from here on.
        self._renew()
        if self.phase is Phase.IDLE:
            self.log(Status.IDLE_STOPPED)
            self.wild = self.wild or (self._armed("wild") and self.last_destination is not None)
        elif self.in_step or self.queue.done or hung:
            self.phase = Phase.STOPPING
        else:
            self.stopped()
        self._perf_run()
        self._wake()

    def read_status(self) -> int:
        """Status without side effects; bit 0 is :attr:`busy`, unless the plan says to lie."""
        return self.status | int(self.busy and not self._armed("lie_idle"))

    def read_status_and_clear(self) -> int:
        word = self.read_status()
        self.acknowledge(regs.STATUS_CLEARABLE)
        return word

    def acknowledge(self, bits: int) -> None:
        """Write one to clear."""
        self.status &= ~bits
        self._update_irq()

    def set_irq_enable(self, value: int) -> None:
        self.irq_enable = value & regs.STATUS_CLEARABLE
        self._update_irq()

    def _update_irq(self) -> None:
        self._level(bool(self.status & self.irq_enable))

    # -- credits, halt -----------------------------------------------------------------------------

    def add_credits(self, count: int) -> None:
        """Let the engine fetch ``count`` more descriptors. No effect unless credit mode is on."""
        if self.credit_mode and count > 0:
            self.credits = min(self.credits + count, regs.CREDITS_MAX)
            self._wake()

    def ring_credits(self, count: int) -> None:
        """Credits by doorbell: effective only while the channel runs (see :meth:`_stop`)."""
        if self.control & _RUN:
            self.add_credits(count)

    def ring_acknowledge(self, count: int) -> None:
        """The acknowledge doorbell: everything clearable, while the channel runs."""
        if count and self.control & _RUN:
            self.acknowledge(regs.STATUS_CLEARABLE)

    def set_credit_mode(self, on: bool) -> None:
        if self.credit_mode and not on:
            self.credits = 0
        self.credit_mode = on
        self._wake()

    def set_halted(self, on: bool) -> None:
        self.halted = on
        self._wake()

    # -- performance counters ----------------------------------------------------------------------

    def write_perf(self, value: int) -> None:
        now = self.clock()
        self.perf.sync(now)
        if value & regs.PerfControl.CLEAR:
            self.perf.clear(now)
        self.perf.control = value & _PERF_ON
        self._perf_run()

    def _perf_run(self) -> None:
        """Counting goes on while armed and Run is set; with AUTO, until the engine stops."""
        self.perf.sync(self.clock())
        control = self.perf.control
        on = control & _PERF_ON and self.control & _RUN
        ended = control & regs.PerfControl.AUTO and self.phase is Phase.IDLE
        self.perf.counting = bool(on) and not ended

    def perf_word(self, which: str, high: bool) -> int:
        """Low or high word of ``cycles`` or ``beats``: 42 bits."""
        self.perf.sync(self.clock())
        value = self.perf.cycles if which == "cycles" else self.perf.beats
        return value >> 32 & 0x3FF if high else value & 0xFFFFFFFF


def find(channels: Sequence[Channel], direction: Direction, number: int) -> Channel | None:
    """The channel of this direction and number, if it is implemented."""
    return next((c for c in channels if c.direction is direction and c.number == number), None)
