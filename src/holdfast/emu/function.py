# SPDX-License-Identifier: Apache-2.0
"""What an emulated function is: subclass :class:`Function`, declare registers, hang handlers on.

A complete function that adds two numbers and can fetch one of them from host memory::

    A = Register("a", 0x00)
    ADDRESS = Register("address", 0x08, width=8)
    SUM = Register("sum", 0x10, Mode.RO)


    class Adder(Function):
        identity = Identity(vendor=0x1234, device=0x0001)
        bars = (BarSpec(0, 4096, banks=(Bank("adder", (A, ADDRESS, SUM)),)),)
        msi = 1

        def __init__(self) -> None:
            super().__init__()
            self.start = False
            self.on_write(ADDRESS, self.fetch)

        def fetch(self, index: int, value: int) -> None:
            self.poke(ADDRESS, value)
            self.start = True
            self.wake()

        def work(self) -> float | None:
            if self.start:
                self.start = False
                other = np.zeros(4, np.uint8)
                self.dma.read(self.peek(ADDRESS), other)
                self.poke(SUM, self.peek(A) + int(other.view("<u4")[0]))
                self.interrupt()
            return None

Threads: register handlers run on the host's socket thread, :meth:`Function.work` on its engine
thread. ``self.lock`` is held around every handler; take it in ``work`` around state that handlers
share, and never hold it during DMA: the peer may have to be asked over the very socket whose thread
waits for the lock.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from holdfast.contracts import Doorbell
from holdfast.emu.bar import Bar, pieces
from holdfast.emu.config_space import BarSpec, ConfigSpace, Event, Identity, MsixSpec
from holdfast.emu.faults import FaultPlan, Span, armed
from holdfast.emu.port import Bytes, DmaPort, Host, RegionDecl
from holdfast.emu.registers import ReadHandler, RegisterFile, WriteHandler
from holdfast.errors import DmaFault, UsageError
from holdfast.kernel import events
from holdfast.regs.spec import Register
from holdfast.values import CONFIG_REGION, DoorbellInfo, IrqIndex, Region

__all__ = ["BarSpec", "Function", "Identity", "MsixSpec"]

Options = Mapping[str, Callable[[str], object]]
"""Option names of a target, and how to read each one's text."""

REGIONS = 9


@dataclass(slots=True)
class _Bell:
    bar: int
    info: DoorbellInfo
    handler: Callable[[int], None]
    fd: int


class Function:
    """Base of all emulated functions; fulfils :class:`holdfast.emu.port.Guest`.

    Declare as class attributes what the function is. ``close()`` gives back its memory files and
    eventfds; the object is of no use afterwards.
    """

    identity: ClassVar[Identity]
    bars: tuple[BarSpec, ...] = ()
    msi: ClassVar[int] = 0
    """MSI vectors: 0, or a power of two up to 32."""
    msix: ClassVar[MsixSpec | None] = None
    intx: ClassVar[bool] = True
    power: ClassVar[bool] = False
    """A power management capability."""
    express: ClassVar[bool] = False
    """A PCI Express capability, and with it 4096 bytes of configuration space."""
    has_reset: ClassVar[bool] = False
    """Function-level reset: the capability bit, and the flag in the device information."""
    driver: ClassVar[str | None] = None
    """Name of the driver class in the same module, for one-file devices."""
    dma_bits: ClassVar[int] = 64
    options: ClassVar[Options] = {}
    """Keyword arguments of the constructor that a target may set, and how to read their text."""
    supported_faults: ClassVar[frozenset[str]] = frozenset({"refuse_reset"})

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.transfers = 0
        """Transfers done so far; fault plans count them."""
        self._faults = FaultPlan()
        self._refusals = 0
        """Resets refused so far: they count like transfers for the fault of that name."""
        self._host: Host | None = None
        self._intx_level = False
        self._bells: list[_Bell] = []
        self.config = ConfigSpace(
            self.identity,
            self.bars,
            msi=self.msi,
            msix=self.msix,
            pin=int(self.intx),
            power=self.power,
            express=self.express,
            flr=self.has_reset,
        )
        self._bars = {spec.index: Bar(spec, self.msix) for spec in self.bars}
        self._bar_of = {
            register: bar for bar in self._bars.values() for register in bar.registers.registers
        }

    # -- for subclasses: registers ---------------------------------------------------------------

    def on_read(self, register: Register, handler: ReadHandler) -> None:
        """Answer reads of a register with ``handler(index)``."""
        self._bar_of[register].registers.on_read(register, handler)

    def on_write(self, register: Register, handler: WriteHandler) -> None:
        """Hand writes of a register to ``handler(index, value)``; nothing is stored by itself."""
        self._bar_of[register].registers.on_write(register, handler)

    def peek(self, register: Register, index: int = 0) -> int:
        """The stored value of a register, past handlers and access modes."""
        return self._bar_of[register].registers.peek(register, index)

    def poke(self, register: Register, value: int, index: int = 0) -> None:
        """Set the stored value of a register, past handlers and access modes."""
        self._bar_of[register].registers.poke(register, index, value)

    def memory(self, bar: int) -> Bytes:
        """The memory of a BAR with ``ram`` areas, whole BAR, as the client maps it."""
        return self._bars[bar].memory

    def registers(self, bar: int) -> RegisterFile:
        """Values and handlers of a BAR's registers, for an access policy of one's own."""
        return self._bars[bar].registers

    def read_access(self, bar: int, offset: int, size: int) -> int:
        """One trapped read of 1, 2, 4 or 8 bytes. Override for another access policy.

        Here: the register of exactly this offset and width; 8 bytes over dword registers are two
        reads, low half first; anything else reads 0.
        """
        file = self.registers(bar)
        hit = file.find(offset, size)
        if hit is not None:
            return file.load(*hit)
        if size == 8:
            low = self.read_access(bar, offset, 4)
            return low | self.read_access(bar, offset + 4, 4) << 32
        return 0

    def write_access(self, bar: int, offset: int, size: int, value: int) -> None:
        """One trapped write; the counterpart of :meth:`read_access`. Unclaimed: ignored."""
        file = self.registers(bar)
        hit = file.find(offset, size)
        if hit is not None:
            file.store(*hit, value)
        elif size == 8:
            self.write_access(bar, offset, 4, value & 0xFFFFFFFF)
            self.write_access(bar, offset + 4, 4, value >> 32)

    # -- for subclasses: bus -----------------------------------------------------------------------

    @property
    def bus_master(self) -> bool:
        """Command register bit 2. Without it the function does no DMA and sends no messages."""
        return self.config.bus_master

    @property
    def attached(self) -> bool:
        """True while a client is connected."""
        return self._host is not None

    @property
    def dma(self) -> DmaPort:
        """The bus-master port; only from :meth:`work`.

        Raises :class:`DmaFault` while bus mastering is off or nobody is connected: then an access
        ends nowhere, as it would on the bus.
        """
        host = self._host
        if host is None or not self.bus_master:
            why = "no client is attached" if host is None else "bus mastering is off"
            raise DmaFault(why, operation="dma", target=type(self).__name__)
        return host.dma

    def wake(self) -> None:
        """Have :meth:`work` called soon. From any thread."""
        host = self._host
        if host is not None:
            host.wake()

    def message_signalled(self) -> IrqIndex | None:
        """The message interrupt type in force, MSI-X before MSI, or None: INTx."""
        host = self._host
        wired = host.wired if host is not None else lambda _index: False
        if self.msix is not None and (self.config.msix_enabled or wired(IrqIndex.MSIX)):
            return IrqIndex.MSIX
        if self.msi and (self.config.msi_enabled or wired(IrqIndex.MSI)):
            return IrqIndex.MSI
        return None

    def interrupt(self, vector: int = 0) -> None:
        """Send one message, or assert INTx (a level: it stays until :meth:`deassert`).

        A vector beyond those there are is sent as vector 0 (a function with fewer messages than
        sources shares one). Lost while bus mastering is off, if messages are in force.
        """
        with self.lock:
            index = self.message_signalled()
            if index is None:
                self._set_intx(True)
                return
            self._set_intx(False)  # a function uses one mechanism at a time (PCIe Base, 6.1.4)
            if self._host is not None and self.bus_master:
                count = self.irq_counts()[index]
                self._host.signal(index, vector if vector < count else 0)

    def deassert(self) -> None:
        """Lower INTx. Nothing to do for messages."""
        with self.lock:
            self._set_intx(False)

    def _set_intx(self, level: bool) -> None:
        rising = level and not self._intx_level
        self._intx_level = level and self.intx
        self.config.show_interrupt(self._intx_level)
        if rising and self.intx_asserted() and self._host is not None:
            self._host.signal(IrqIndex.INTX, 0)

    # -- for subclasses: doorbells and events ------------------------------------------------------

    def add_doorbell(
        self, register: Register, index: int, value: int | None, handler: Callable[[int], None]
    ) -> int:
        """Offer an eventfd for writes of ``value`` to a register; returns a number to renew it by.

        ``handler(count)`` stands for ``count`` such writes; it runs on the socket thread with the
        lock held.
        """
        info = DoorbellInfo(register.at(index), register.width, value)
        bar = self._bar_of[register].spec.index
        self._bells.append(_Bell(bar, info, handler, events.make()))
        return len(self._bells) - 1

    def drain_doorbell(self, number: int) -> int:
        """Take what was rung so far without waiting for the host to bring it."""
        with self.lock:
            return events.drain(self._bells[number].fd)

    def renew_doorbells(self, numbers: Sequence[int]) -> None:
        """Replace eventfds by fresh ones: whoever still holds the old ones rings in vain."""
        with self.lock:
            for number in numbers:
                bell = self._bells[number]
                old, bell.fd = bell.fd, events.make()
                os.close(old)
        if numbers and self._host is not None:
            self._host.rewire()

    def bus_master_changed(self) -> None:
        """Hook: bit 2 of the command register was flipped. Lock held."""

    def work(self) -> float | None:
        """Hook: one bounded step of engine work; see :class:`holdfast.emu.port.Guest`."""
        return None

    def reset(self) -> None:
        """Function reset: configuration space and stored register values. Extend with ``super()``.

        Memory areas keep their contents. Raises ``OSError`` if the fault plan refuses it; then
        nothing was changed.
        """
        self.check_reset_allowed()
        with self.lock:
            self.reset_core()
            for bar in self._bars.values():
                bar.reset()

    def check_reset_allowed(self) -> None:
        """Raise ``OSError`` if the fault plan has the function refuse resets now."""
        if self.faulty("refuse_reset", self.transfers + self._refusals):
            self._refusals += 1
            raise OSError(errno.EIO, "the function refuses to reset")

    def reset_core(self) -> None:
        """The PCI part of a reset: configuration space, and INTx down. Lock held."""
        self._set_intx(False)
        self.config.reset()

    # -- faults -----------------------------------------------------------------------------------

    @property
    def faults(self) -> FaultPlan:
        """The promises this function breaks."""
        return self._faults

    @faults.setter
    def faults(self, plan: FaultPlan) -> None:
        missing = set(plan.active()) - self.supported_faults
        if missing:
            raise UsageError(
                f"{type(self).__name__} cannot show {', '.join(sorted(missing))}",
                operation="set faults",
                hint=f"it can show {', '.join(sorted(self.supported_faults)) or 'none'}",
            )
        self._faults = plan

    def faulty(self, name: str, transfer: int | None = None) -> bool:
        """True if fault ``name`` holds for this transfer number (default: those done so far)."""
        span: Span | None = getattr(self._faults, name)
        return armed(span, self.transfers if transfer is None else transfer)

    def unplug(self) -> None:
        """Be gone, as a card that is pulled out: this process ends here, mid-sentence."""
        os.kill(os.getpid(), signal.SIGKILL)

    # -- Guest: what the host calls ----------------------------------------------------------------

    def attach(self, host: Host) -> None:
        self._host = host
        host.wake()

    def detach(self) -> None:
        self._host = None
        self.renew_doorbells(range(len(self._bells)))

    def close(self) -> None:
        """Give back memory files and eventfds."""
        self._host = None
        for bell in self._bells:
            os.close(bell.fd)
        self._bells.clear()
        for bar in self._bars.values():
            bar.close()

    def regions(self) -> Sequence[RegionDecl]:
        decls = [RegionDecl(Region(index, 0, False, False)) for index in range(REGIONS)]
        for index, bar in self._bars.items():
            decls[index] = RegionDecl(Region(index, bar.spec.size, areas=bar.spec.ram), bar.fd)
        decls[CONFIG_REGION] = RegionDecl(Region(CONFIG_REGION, self.config.size))
        return decls

    def irq_counts(self) -> Sequence[int]:
        return int(self.intx), self.msi, self.msix.vectors if self.msix else 0, 0, 0

    def intx_asserted(self) -> bool:
        return self._intx_level and not self.config.intx_disabled

    def doorbells(self, index: int) -> Sequence[Doorbell]:
        with self.lock:
            return [Doorbell(bell.info, bell.fd) for bell in self._bells if bell.bar == index]

    def rung(self, fd: int, take: Callable[[], int]) -> None:
        with self.lock:
            for bell in self._bells:
                if bell.fd == fd:
                    # Taken under the lock: an acknowledge that was taken before and is carried out
                    # later would wipe out a completion that the engine published in between.
                    if count := take():
                        bell.handler(count)
                    return

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        self._check_range(index, offset, count)
        with self.lock:
            if index == CONFIG_REGION:
                return self.config.read(offset, count)
            bar = self._bars[index]
            found = []
            for at, size, is_ram in pieces(bar.spec, offset, count):
                if is_ram:
                    found.append(bar.memory[at : at + size].tobytes())
                elif (stored := bar.stored(at, size)) is not None:
                    data, start, _ = stored
                    found.append(bytes(data[start : start + size]))
                else:
                    value = self.read_access(index, at, size)
                    found.append(value.to_bytes(size, "little"))
            return b"".join(found)

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        self._check_range(index, offset, len(data))
        with self.lock:
            if index == CONFIG_REGION:
                self._config_write(offset, data)
                return
            bar = self._bars[index]
            for at, size, is_ram in pieces(bar.spec, offset, len(data)):
                piece = data[at - offset : at - offset + size]
                if is_ram:
                    bar.memory[at : at + size] = np.frombuffer(piece, np.uint8)
                elif (stored := bar.stored(at, size)) is not None:
                    target, start, writable = stored
                    if writable:
                        target[start : start + size] = piece
                else:
                    self.write_access(index, at, size, int.from_bytes(piece, "little"))

    def _config_write(self, offset: int, data: bytes) -> None:
        happened = self.config.write(offset, data)
        if happened & Event.MSI_ENABLED:
            self._set_intx(False)
        if happened & Event.INTX_MASK_CHANGED and self.intx_asserted() and self._host is not None:
            self._host.signal(IrqIndex.INTX, 0)
        if happened & Event.MASTER_CHANGED:
            self.bus_master_changed()
        if happened & Event.FUNCTION_RESET:
            try:
                self.reset()
            except OSError:
                # A configuration write has no error answer; the refusal shows in what is unchanged.
                return

    def _check_range(self, index: int, offset: int, count: int) -> None:
        if index == CONFIG_REGION:
            size = self.config.size
        else:
            size = self._bars[index].spec.size if index in self._bars else 0
        if offset < 0 or count < 1 or offset + count > size:
            raise OSError(errno.EINVAL, f"{count} bytes at {offset:#x} of region {index}")
