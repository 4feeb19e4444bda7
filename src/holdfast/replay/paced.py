# SPDX-License-Identifier: Apache-2.0
"""The edu device on a leash: what it does is edu's own doing, when it does it is commanded.

Facts. A story says that a write leaves the card *before* bus mastering goes off and arrives *after*
the page has changed hands. On a real bus both happen by themselves: a memory write is posted, so
the card forgets it as soon as there is a flow-control credit to send it with, and some bridge has
it until it can deliver it (PCI Express Base 4.0, 2.6.1 "Flow Control Rules" and 2.4.1). Neither
moment can be chosen, and stories would have to be tried thousands of times.

Choice. Between edu's engine and memory there is a link with credits and a fabric that holds what
was sent. A transfer is two writes. Each waits at the link until it is granted a credit; whether bus
mastering is on is looked at then, as a card does. Then it is in the fabric, where nothing that is
done to the card reaches it, until its delivery is commanded; which window its address leads to is
looked up then, as an IOMMU does. Engine, registers, buffer and the way of going wild are edu's.

Cost. Commands come through a second BAR that edu does not have.
"""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from holdfast.emu.edu import Edu
from holdfast.emu.faults import FaultPlan, Span
from holdfast.emu.function import BarSpec
from holdfast.emu.port import Bytes, DmaPort, U64s
from holdfast.errors import DmaFault
from holdfast.pci import read_u16
from holdfast.regs import edu as regs
from holdfast.regs.spec import Bank, Mode, Register
from holdfast.uapi import pci_regs as pci

LEASH_BAR: Final = 2
LEASH_SIZE: Final = 4096


class Order(enum.IntEnum):
    """What can be commanded."""

    PACE = 1
    """From now on nothing leaves and nothing arrives by itself."""
    SEND = 2
    """One credit: the next write leaves the card, or the next read is carried out."""
    HANG = 3
    WILD = 4
    STOP = 5
    """The engine drops what it has not sent. edu itself cannot be told to."""


ORDER = Register("order", 0x00, Mode.WO, doc="an Order")
DELIVER = Register("deliver", 0x04, Mode.WO, doc="number of the transfer whose write shall arrive")
WAITING = Register("waiting", 0x08, Mode.RO, doc="1 while the engine waits for a credit")
SENT = Register("sent", 0x0C, Mode.RO, doc="accesses that have left the card")
DROPPED = Register("dropped", 0x10, Mode.RO, doc="of these, with bus mastering off: to nowhere")
IN_FABRIC = Register("in_fabric", 0x14, Mode.RO, doc="writes that have not arrived")
ARRIVED = Register("arrived", 0x18, Mode.RO, doc="writes that came to the end of their way")
REFUSED = Register("refused", 0x1C, Mode.RO, doc="of these, without a window: to nowhere")
LEASH = Bank(
    "leash", (ORDER, DELIVER, WAITING, SENT, DROPPED, IN_FABRIC, ARRIVED, REFUSED)
)  # fmt: skip


@dataclass(slots=True)
class _Write:
    transfer: int
    iova: int
    data: Bytes
    released: bool = False


class PacedEdu(Edu):
    """edu behind a link whose every step is commanded.

    honest
        A reset stops DMA. edu's own does not; one that does not leaves bus mastering on as well.
    """

    bars: tuple[BarSpec, ...] = (  # type: ignore[assignment]  # one more than edu has
        BarSpec(regs.BAR, regs.BAR_SIZE, banks=(regs.BANK,)),
        BarSpec(LEASH_BAR, LEASH_SIZE, banks=(LEASH,)),
    )

    def __init__(self, *, honest: bool = False) -> None:
        super().__init__(delay=0.0)
        self._honest = honest
        self._changed = threading.Condition(self.lock)
        self._paced = self._hung = self._cut = False
        self._credits = 0
        self._fabric: deque[_Write] = deque()
        self._port = _Link(self)
        self.on_write(ORDER, lambda _, value: self._ordered(Order(value)))
        self.on_write(DELIVER, lambda _, value: self._release(value))
        self.on_read(IN_FABRIC, lambda _: len(self._fabric))

    # -- commands ------------------------------------------------------------

    def _ordered(self, order: Order) -> None:
        match order:
            case Order.PACE:
                self._paced = True
            case Order.SEND if not self._hung:
                self._credits += 1
            case Order.HANG:
                self._hung = True
            case Order.WILD:
                # What is under way belongs to it, too: it was begun by a card in its right mind.
                self.faults = FaultPlan(wild=Span())
                self._wild = True
            case Order.STOP:
                self._drop_all()
        self._changed.notify_all()

    def _drop_all(self) -> None:
        """The engine forgets its transfer; what is in the fabric is not its any more."""
        self._cut = self._dma_busy()
        self._hung = self._wild = False
        self._credits = 0
        self.faults = FaultPlan()

    def _release(self, transfer: int) -> None:
        for write in self._fabric:
            if write.transfer == transfer and not write.released:
                write.released = True
                break
        self._changed.notify_all()
        self.wake()

    def _command(self, index: int, value: int) -> None:
        if not self._dma_busy():
            self._cut = False
        super()._command(index, value)

    def reset(self) -> None:
        super().reset()
        with self.lock:
            if self._honest:
                self._drop_all()
            else:
                command = read_u16(self.config.read, pci.COMMAND) | pci.Command.MASTER
                self.config.write(pci.COMMAND, command.to_bytes(2, "little"))
            self._changed.notify_all()

    def detach(self) -> None:
        super().detach()
        with self.lock:
            self._changed.notify_all()

    # -- the link (engine thread) ------------------------------------------------------------

    @property
    def dma(self) -> DmaPort:
        return self._port

    def work(self) -> float | None:
        self.deliver()
        return super().work()

    def pass_link(self, write: Callable[[], _Write] | None) -> DmaPort:
        """Wait for a credit and take it; the port behind the link, for what needs no fabric.

        Raises DmaFault if the access ends here: bus mastering is off, or it was cut short.
        """
        with self.lock:
            self.poke(WAITING, 1)
            while self._paced and not self._credits and not self._cut and self.attached:
                if any(each.released for each in self._fabric):
                    self._outside(self.deliver)
                    continue
                self._changed.wait()
            self.poke(WAITING, 0)
            host = self._host
            if host is None or self._cut:
                raise DmaFault("the transfer was cut short", operation="dma")
            self._credits = max(0, self._credits - 1)
            self._count(SENT)
            if not self.bus_master:
                self._count(DROPPED)
                raise DmaFault("bus mastering is off", operation="dma")
            if write is not None and self._paced:
                self._fabric.append(write())
        return host.dma

    def _outside(self, body: Callable[[], None]) -> None:
        """DMA is done without the lock; see the module of functions."""
        self.lock.release()
        try:
            body()
        finally:
            self.lock.acquire()

    def deliver(self) -> None:
        """Carry out what was released."""
        while True:
            with self.lock:
                write = next((each for each in self._fabric if each.released), None)
                host = self._host
            if write is None or host is None:
                return
            refused = False
            try:
                host.dma.write(write.iova, write.data)
            except DmaFault:
                refused = True
            with self.lock:
                self._fabric.remove(write)
                if refused:
                    self._count(REFUSED)
                self._count(ARRIVED)

    def _count(self, register: Register) -> None:
        self.poke(register, self.peek(register) + 1)

    @property
    def paced(self) -> bool:
        return self._paced

    @property
    def is_wild(self) -> bool:
        return self._wild


class _Link:
    """What edu's engine takes for its bus-master port. Fulfils ``port.DmaPort``."""

    def __init__(self, card: PacedEdu) -> None:
        self._card = card

    def write(self, iova: int, data: Bytes) -> None:
        whole = data.copy()
        half = len(whole) if self._card.is_wild or len(whole) < 2 else len(whole) // 2
        for start in range(0, len(whole), half):
            piece = whole[start : start + half]

            def make(at: int = iova + start, piece: Bytes = piece) -> _Write:
                return _Write(self._card.transfers, at, piece)

            port = self._card.pass_link(make)
            if not self._card.paced:
                port.write(iova + start, piece)

    def read(self, iova: int, into: Bytes) -> None:
        self._card.pass_link(None).read(iova, into)

    def read_many(self, iovas: U64s, local: Bytes, offsets: U64s, lengths: U64s) -> int:
        raise NotImplementedError("edu has no scatter-gather")

    def write_many(self, iovas: U64s, local: Bytes, offsets: U64s, lengths: U64s) -> int:
        raise NotImplementedError("edu has no scatter-gather")

    @property
    def faults(self) -> int:
        return self._card.peek(DROPPED) + self._card.peek(REFUSED)
