# SPDX-License-Identifier: Apache-2.0
"""The interrupt block of the XDMA core (PG195, "IRQ Block Registers (0x2)").

A source is a level: a channel's unacknowledged, unmasked status, or a user line. A request is a
source that is enabled. A message goes out whenever a request bit rises, be it because the source
rose or because it was enabled while the source was up. INTx is the union of all requests.
"""

from __future__ import annotations

from holdfast.emu.function import Function
from holdfast.regs import xdma as regs
from holdfast.regs.spec import Register

_USER_MASK = (1 << regs.USER_IRQS) - 1


class IrqBlock:
    """Sources, enables and vectors. The function's lock guards it."""

    def __init__(self, function: Function, channels: int) -> None:
        self._function = function
        self._channel_mask = (1 << channels) - 1
        self.channel_source = 0
        self.user_source = 0
        self._channel_request = 0
        self._user_request = 0
        self._bind_enable(
            (regs.IRQ_USER_ENABLE, regs.IRQ_USER_ENABLE_W1S, regs.IRQ_USER_ENABLE_W1C), _USER_MASK
        )
        self._bind_enable(
            (regs.IRQ_CHANNEL_ENABLE, regs.IRQ_CHANNEL_ENABLE_W1S, regs.IRQ_CHANNEL_ENABLE_W1C),
            self._channel_mask,
        )
        function.on_read(regs.IRQ_USER_REQUEST, lambda _: self._user_request)
        function.on_read(regs.IRQ_CHANNEL_REQUEST, lambda _: self._channel_request)
        function.on_read(regs.IRQ_USER_PENDING, lambda _: self.user_source)
        function.on_read(regs.IRQ_CHANNEL_PENDING, lambda _: self.channel_source)
        for register in (regs.IRQ_USER_VECTOR, regs.IRQ_CHANNEL_VECTOR):
            self._bind_vector(register)

    def set_channel(self, bit: int, level: bool) -> None:
        """Level of one channel's source; ``bit`` counts H2C channels first, then C2H."""
        source = self.channel_source & ~(1 << bit) | int(level) << bit
        if source != self.channel_source:
            self.channel_source = source
            self.update()

    def set_user(self, lines: int) -> None:
        """Levels of the 16 user lines."""
        self.user_source = lines & _USER_MASK
        self.update()

    def reset(self) -> None:
        """Sources down; the enables were reset with the registers."""
        self.channel_source = self.user_source = 0
        self.update()

    def update(self) -> None:
        """Recompute the requests and send what rose."""
        function = self._function
        channel = self.channel_source & function.peek(regs.IRQ_CHANNEL_ENABLE)
        user = self.user_source & function.peek(regs.IRQ_USER_ENABLE)
        rising_channel = channel & ~self._channel_request
        rising_user = user & ~self._user_request
        self._channel_request, self._user_request = channel, user
        self._send(rising_channel, regs.IRQ_CHANNEL_VECTOR)
        self._send(rising_user, regs.IRQ_USER_VECTOR)
        if not channel | user:
            function.deassert()

    def _send(self, rising: int, vectors: Register) -> None:
        bit = 0
        while rising >> bit:
            if rising >> bit & 1:
                word = self._function.peek(vectors, bit // 4)
                self._function.interrupt(word >> 8 * (bit % 4) & 0x1F)
            bit += 1

    def _bind_enable(self, rows: tuple[Register, Register, Register], mask: int) -> None:
        function = self._function
        plain, w1s, w1c = rows

        def store(value: int) -> None:
            function.poke(plain, value & mask)
            self.update()

        function.on_write(plain, lambda _, value: store(value))
        function.on_write(w1s, lambda _, value: store(function.peek(plain) | value))
        function.on_write(w1c, lambda _, value: store(function.peek(plain) & ~value))
        for row in (w1s, w1c):
            function.on_read(row, lambda _: 0)

    def _bind_vector(self, register: Register) -> None:
        self._function.on_write(
            register,
            lambda index, value: self._function.poke(register, value & regs.IRQ_VECTOR_MASK, index),
        )
