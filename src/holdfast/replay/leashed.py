# SPDX-License-Identifier: Apache-2.0
"""The same edu on a leash where somebody else owns the function: a keeper.

Orders come over a socket of their own, past the keeper, which sees an edu device that takes its
time. Reads of configuration space behave as on a real bus: their answer pushes ahead of it whatever
the card had sent (PCI Express Base 4.0, 2.4.1). Reads of its registers do not, as if a bridge got
that wrong: so whoever takes an idle engine for the arrival of its data is found out.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar, Final

from holdfast.emu.faults import FaultPlan, Span
from holdfast.emu.function import Options
from holdfast.errors import UsageError
from holdfast.replay.paced import ARRIVED, SENT, WAITING, Order, PacedEdu
from holdfast.values import CONFIG_REGION

PATIENCE: Final = 1.0
"""Seconds for an order to be carried out, before the answer is that it cannot be."""
PACKET: Final = 4096
TARGET: Final = "emu:holdfast.replay.leashed:LeashedEdu"


class LeashedEdu(PacedEdu):
    """edu, commanded over a socket.

    leash
        Path of the socket (SOCK_SEQPACKET) on which who commands it listens.
    """

    options: ClassVar[Options] = {"leash": str}
    has_reset = True

    def __init__(self, *, leash: str = "") -> None:
        if not leash:
            raise UsageError("nobody has its leash", operation="create", target=TARGET)
        super().__init__(honest=False)
        self._orders = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.connect(leash)
        threading.Thread(target=self._obey, name="holdfast-leash", daemon=True).start()

    def _obey(self) -> None:
        while data := self._orders.recv(PACKET):
            told = json.loads(data)
            done = self._carry_out(told["order"])
            self._orders.send(json.dumps({"done": done}).encode())

    def _carry_out(self, order: str) -> bool:
        with self.lock:
            match order:
                case "pace":
                    self._ordered(Order.PACE)
                case "hang":
                    self._ordered(Order.HANG)
                case "wild":
                    self._ordered(Order.WILD)
                case "lie":
                    self.faults = FaultPlan(lie_idle=Span())
                case "send":
                    return self._send()
                case "land":
                    return self._land()
                case "unplug":
                    self.unplug()
        return True

    def _send(self) -> bool:
        if not self._await(lambda: bool(self.peek(WAITING))):
            return False
        sent = self.peek(SENT)
        self._ordered(Order.SEND)
        return self._await(lambda: self.peek(SENT) > sent)

    def _land(self) -> bool:
        if not self._fabric:
            return False
        arrived = self.peek(ARRIVED)
        self._release(self._fabric[0].transfer)
        return self._await(lambda: self.peek(ARRIVED) > arrived)

    def _await(self, condition: Callable[[], bool]) -> bool:
        """Wait until it is so, without the lock meanwhile; whether it is. Lock held."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                return False
            self._changed.wait(0.001)
        return True

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        if index == CONFIG_REGION:
            with self.lock:
                for write in list(self._fabric):
                    self._release(write.transfer)
                self._await(lambda: not self._fabric)
        return super().region_read(index, offset, count)


class Leash:
    """The other end. Owns the sockets. Make it before the function is started."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(1)
        self._listener.settimeout(PATIENCE)
        self._orders: socket.socket | None = None

    def order(self, order: str) -> bool:
        """Have it carried out; False if that cannot be: nothing to send, nothing on its way."""
        if self._orders is None:
            self._orders, _ = self._listener.accept()
            self._orders.settimeout(5 * PATIENCE)
        try:
            self._orders.send(json.dumps({"order": order}).encode())
            data = self._orders.recv(PACKET)
        except OSError:
            return False
        told: Any = json.loads(data or '{"done": false}')
        return bool(told["done"])

    def close(self) -> None:
        self._listener.close()
        if self._orders is not None:
            self._orders.close()
