# SPDX-License-Identifier: Apache-2.0
"""The user page of the emulated card: stream sources and user interrupt lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from holdfast.emu.function import Function
from holdfast.emu.xdma_irq import IrqBlock
from holdfast.emu.xdma_stream import Source
from holdfast.regs import xdma as regs
from holdfast.regs.spec import Register
from holdfast.regs.xdma import SourceControl


class UserLogic:
    """Registers of the user page. The function's lock guards it."""

    def __init__(
        self,
        function: Function,
        irq: IrqBlock,
        sources: Sequence[Source],
        clock: Callable[[], float],
    ) -> None:
        self._function = function
        self._irq = irq
        self._sources = sources
        self._clock = clock
        self._bind_lines()
        self._bind_settings()
        self._bind_counter(regs.SOURCE_PRODUCED_LO, regs.SOURCE_PRODUCED_HI, "produced")
        self._bind_counter(regs.SOURCE_OVERRUN_LO, regs.SOURCE_OVERRUN_HI, "overrun")
        function.on_read(regs.SOURCE_LEVEL, lambda index: self._count(index, "level"))
        self.reset()

    def reset(self) -> None:
        """Sources off with their reset settings; lines down."""
        function = self._function
        memory = len(function.memory(regs.BYPASS_BAR))
        count = len(self._sources)
        function.poke(regs.USER_CHANNELS, count | count << 8)
        function.poke(regs.USER_MEMORY_LO, memory & 0xFFFFFFFF)
        function.poke(regs.USER_MEMORY_HI, memory >> 32)
        now = self._clock()
        for source in self._sources:
            source.enabled = source.sine = False
            source.rate = regs.SOURCE_RATE.reset
            source.depth = regs.SOURCE_DEPTH.reset
            source.packet = regs.SOURCE_PACKET.reset
            source.period = regs.SOURCE_PERIOD.reset
            source.restart(now)

    def _bind_lines(self) -> None:
        function = self._function

        def store(value: int) -> None:
            function.poke(regs.USER_IRQ_LINES, value & 0xFFFF)
            self._irq.set_user(value)

        lines = regs.USER_IRQ_LINES
        function.on_write(lines, lambda _, value: store(value))
        function.on_write(
            regs.USER_IRQ_LINES_W1S, lambda _, value: store(function.peek(lines) | value)
        )
        function.on_write(
            regs.USER_IRQ_LINES_W1C, lambda _, value: store(function.peek(lines) & ~value)
        )

    def _bind_settings(self) -> None:
        def control(source: Source, value: int) -> None:
            source.sine = bool(value & SourceControl.SINE)
            source.enable(bool(value & SourceControl.ENABLE), self._clock())

        def rate(source: Source, value: int) -> None:
            source.set_rate(value, self._clock())

        def plain(attribute: str) -> Callable[[Source, int], None]:
            def write(source: Source, value: int) -> None:
                source.sync(self._clock())
                setattr(source, attribute, value)

            return write

        self._bind_setting(regs.SOURCE_CONTROL, control)
        self._bind_setting(regs.SOURCE_RATE, rate)
        self._bind_setting(regs.SOURCE_DEPTH, plain("depth"))
        self._bind_setting(regs.SOURCE_PACKET, plain("packet"))
        self._bind_setting(regs.SOURCE_PERIOD, plain("period"))

    def _bind_setting(self, register: Register, apply: Callable[[Source, int], None]) -> None:
        function = self._function

        def write(index: int, value: int) -> None:
            if index < len(self._sources):
                function.poke(register, value, index)
                apply(self._sources[index], value)
                function.wake()

        function.on_read(
            register,
            lambda index: function.peek(register, index) if index < len(self._sources) else 0,
        )
        function.on_write(register, write)

    def _count(self, index: int, attribute: str) -> int:
        if index >= len(self._sources):
            return 0
        source = self._sources[index]
        source.sync(self._clock())
        value: int = getattr(source, attribute)
        return value

    def _bind_counter(self, low: Register, high: Register, attribute: str) -> None:
        function = self._function
        function.on_read(low, lambda index: self._count(index, attribute) & 0xFFFFFFFF)
        function.on_read(high, lambda index: self._count(index, attribute) >> 32)
