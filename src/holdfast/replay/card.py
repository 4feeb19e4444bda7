# SPDX-License-Identifier: Apache-2.0
"""The replay's end of the emulated function: what its driver, its IOMMU and its bus would do.

The function is edu on a leash (:mod:`holdfast.replay.paced`), a process of its own that speaks
vfio-user. Each of its steps is commanded. :mod:`holdfast.replay.clocked` has the plain one.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from holdfast.backends.vfio_user import VfioUserBackend
from holdfast.emu.function import Function
from holdfast.emu.server import Server, tune_process
from holdfast.errors import NotSupported
from holdfast.kernel.mapping import PAGE
from holdfast.pci import set_command
from holdfast.regs import edu as regs
from holdfast.regs.spec import Register
from holdfast.regs.view import RegisterView
from holdfast.replay import paced
from holdfast.replay.failure import Disagreement
from holdfast.replay.paced import Order, PacedEdu
from holdfast.torture.actors import Child, spawn
from holdfast.uapi import pci_regs as pci
from holdfast.values import CONFIG_REGION, Iova, Perm

NOBODY: Final = Child(-1, -1, -1)
PATIENCE: Final = 5.0
"""Seconds for a step of the card that was commanded. On an idle machine it takes microseconds."""
SLOT: Final = 1024
"""Bytes of one transfer; the device's buffer has a few of them, each full of its own byte."""
SLOTS: Final = regs.BUFFER_SIZE // SLOT


def payload(d: int) -> int:
    """The byte that the card writes for descriptor ``d``. No process's own pattern."""
    return 0xC0 + d % SLOTS


class PacedCard:
    """edu on a leash. Not thread-safe; :meth:`open` once, then :meth:`close`."""

    target = "paced:edu"

    def __init__(self, *, honest: bool) -> None:
        """``honest``: its reset stops DMA. Forks the function's process."""
        self._honest = honest
        self._started: dict[int, int] = {}
        """Descriptor to the number of its transfer."""
        self._transfers = 0
        self._wild = False
        self.gone = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket = ours
        self._backend: VfioUserBackend | None = None
        with theirs:
            self._child = self._fork(theirs)

    def _function(self) -> Function:
        return PacedEdu(honest=self._honest)

    def _fork(self, theirs: socket.socket) -> Child:
        def body(_: int, __: int) -> None:
            self.socket.close()
            # Addresses that lead nowhere are what some stories are about.
            logging.getLogger("holdfast.emu").setLevel(logging.ERROR)
            tune_process()
            function = self._function()
            Server(function).serve_socket(theirs)
            function.close()

        return spawn(body)

    def open(self, ram: int, scratch: int) -> None:
        """Connect, and have the card read what it will write.

        ``scratch``: offset of a page of the file ``ram`` that nobody else uses.
        """
        self._ram = ram
        self._scratch = scratch
        self._backend = VfioUserBackend(self.socket, target=self.target)
        self.registers = self._view(regs.BAR)
        self._before_filling()
        self.master(on=True)
        os.pwrite(ram, b"".join(bytes([payload(d)]) * SLOT for d in range(SLOTS)), scratch)
        self.map(Iova(0), scratch)
        self._command(0, regs.BUFFER_START, regs.BUFFER_SIZE, 0)
        self._wait_idle(PATIENCE)
        self.unmap(Iova(0))
        self.master(on=False)
        self._after_filling()

    def _before_filling(self) -> None:
        self._leash = self._view(paced.LEASH_BAR)

    def _after_filling(self) -> None:
        self._order(Order.PACE)

    # -- the bus ------------------------------------------------------------

    @property
    def backend(self) -> VfioUserBackend:
        if self._backend is None:
            raise Disagreement("the card is used before it was opened", operation="replay")
        return self._backend

    def _view(self, bar: int) -> RegisterView:
        def load(offset: int, width: int) -> int:
            return int.from_bytes(self.backend.region_read(bar, offset, width), "little")

        def store(offset: int, width: int, value: int) -> None:
            self.backend.region_write(bar, offset, value.to_bytes(width, "little"))

        return RegisterView(load, store, f"BAR {bar}")

    def map(self, iova: Iova, offset: int, size: int = PAGE) -> None:
        """Let the card reach a piece of the file at ``offset``."""
        self.backend.dma_map(iova, size, Perm.RW, self._ram, offset)

    def unmap(self, iova: Iova, size: int = PAGE) -> None:
        """Take it away; checked that all of it went."""
        if self.gone:
            return
        taken = self.backend.dma_unmap(iova, size)
        if taken != size:
            raise Disagreement(f"{taken} of {size} bytes were unmapped", operation="unmap")

    # -- configuration space ------------------------------------------------------------

    def master(self, *, on: bool) -> None:
        """Bus mastering on or off, checked."""
        if self.gone:
            return
        set_command(self._config_read, self._config_write, pci.Command.MASTER, on)
        if self.is_master() != on:
            raise Disagreement("bus master did not change", operation="replay")

    def is_master(self) -> bool:
        word = int.from_bytes(self._config_read(pci.COMMAND, 2), "little")
        return bool(word & pci.Command.MASTER)

    def _config_read(self, offset: int, count: int) -> bytes:
        return self.backend.region_read(CONFIG_REGION, offset, count)

    def _config_write(self, offset: int, data: bytes) -> None:
        self.backend.region_write(CONFIG_REGION, offset, data)

    def reset(self) -> None:
        """DEVICE_RESET, acknowledged."""
        self.backend.reset()
        if self._honest:
            self._wait_idle(PATIENCE)

    # -- transfers ------------------------------------------------------------

    def post(self, d: int, address: int, *, reading: bool) -> None:
        """Program edu's registers and start. ``reading``: the card reads memory.

        One that is gone takes it and does nothing.
        """
        if self.gone:
            return
        if self.registers.read(regs.DMA_COMMAND) & regs.DmaCommand.START:
            raise NotSupported(
                f"post: descriptor {d} while edu's one engine is at work",
                operation="replay",
                hint="replay a story of one descriptor",
            )
        self._begin(d)
        buffer = regs.BUFFER_START + d % SLOTS * SLOT
        if reading:
            self._command(address, buffer, SLOT, 0)
        else:
            self._command(buffer, address, SLOT, regs.DmaCommand.TO_RAM)

    def _begin(self, d: int) -> None:
        self._started[d] = self._transfers + 1

    def _command(self, source: int, destination: int, count: int, way: int) -> None:
        self._transfers += 1
        self.registers.write(regs.DMA_SOURCE, source)
        self.registers.write(regs.DMA_DESTINATION, destination)
        self.registers.write(regs.DMA_COUNT, count)
        self.registers.write(regs.DMA_COMMAND, int(regs.DmaCommand.START) | way)

    def send(self, d: int) -> None:
        """The next write leaves the card. Returns when it has."""
        self._until(paced.WAITING, 1, "has an access to send")
        sent = self._leash.read(paced.SENT)
        self._order(Order.SEND)
        self._until(paced.SENT, sent + 1, "has sent")

    def send_wild(self, d: int) -> None:
        """The wild card writes once more."""
        self.send(d)

    def read(self, d: int) -> None:
        """The card reads memory. Returns when it has."""
        self.send(d)
        self._wait_idle(PATIENCE)

    def land(self, d: int) -> None:
        """A write of this descriptor that is on its way arrives. Returns when it has."""
        if not self._leash.read(paced.IN_FABRIC):
            raise Disagreement(f"nothing of descriptor {d} is on its way", operation="land")
        arrived = self._leash.read(paced.ARRIVED)
        self._leash.write(paced.DELIVER, self._started[d])
        self._until(paced.ARRIVED, arrived + 1, "has delivered")

    def peek(self, d: int) -> bytes:
        """What the card holds for a descriptor, from its own buffer, by way of the scratch page."""
        iova = Iova(1 << 20)
        self.map(iova, self._scratch)
        self.master(on=True)
        try:
            self._begin(-1)
            self._command(
                regs.BUFFER_START + d % SLOTS * SLOT, int(iova), SLOT, regs.DmaCommand.TO_RAM
            )
            for _ in range(2):
                self.send(-1)
                self.land(-1)
            self._wait_idle(PATIENCE)
        finally:
            self.unmap(iova)
        return os.pread(self._ram, SLOT, self._scratch)

    # -- what a driver sees and does ------------------------------------------------------------

    def idle(self) -> bool:
        """The busy bit is off. A card that is gone reads as all ones, and does nothing."""
        if self.gone:
            return True
        return not self.registers.read(regs.DMA_COMMAND) & regs.DmaCommand.START

    def flushed(self) -> bool:
        """A read from the card would come back: nothing is on its way before it."""
        return self.gone or not self._leash.read(paced.IN_FABRIC)

    def refused(self) -> int:
        """Writes that led nowhere."""
        if self.gone:
            return 0
        return self._leash.read(paced.DROPPED) + self._leash.read(paced.REFUSED)

    def stop(self) -> None:
        """Told to stop; it drops what it has not sent."""
        self._order(Order.STOP)
        self._wait_idle(PATIENCE)

    # -- failures ------------------------------------------------------------

    def hang(self) -> None:
        self._order(Order.HANG)

    def wild(self) -> None:
        self._wild = True
        self._order(Order.WILD)

    def pull_out(self) -> None:
        """Its process is no more."""
        if not self.flushed():
            raise NotSupported(
                "pull_out: a write is on its way, which the function's process has with it",
                operation="replay",
                hint="replay a story in which it arrives before",
            )
        self.gone = True
        self._child.kill()
        self.backend.close()

    # -- details ------------------------------------------------------------

    def _order(self, order: Order) -> None:
        if not self.gone:
            self._leash.write(paced.ORDER, order)

    def _until(self, register: Register, value: int, what: str) -> None:
        until(lambda: self._leash.read(register) == value, PATIENCE, what)

    def _wait_idle(self, timeout: float) -> None:
        until(self.idle, timeout, "is at rest")

    def close(self) -> None:
        """End the function's process. Idempotent."""
        with ExitStack() as stack:
            child, self._child = self._child, NOBODY
            if child is not NOBODY:
                stack.callback(child.reap)
                stack.callback(child.kill)
            stack.callback(self.socket.close)
            if self._backend is not None:
                self._backend.close()


def until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Look until it is so. Disagreement if it is not in time: then the story tells of a card that
    this one is not."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise Disagreement(f"after {timeout:g} s nobody {what}", operation="replay")
        time.sleep(0.0002)
