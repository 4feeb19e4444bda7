# SPDX-License-Identifier: Apache-2.0
"""Registers of a backend as a driver sees them, and the first and last things done with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from holdfast import pci
from holdfast.contracts import FunctionBackend
from holdfast.errors import DeviceError
from holdfast.regs.view import RegisterView, check_access
from holdfast.uapi import pci_regs
from holdfast.uapi.pci_regs import Command
from holdfast.values import CONFIG_REGION, IrqIndex, Target


@dataclass(slots=True)
class BackendAccess:
    """``driver.FunctionAccess`` over a backend."""

    backend: FunctionBackend
    name: str

    def bar(self, index: int) -> RegisterView:
        return self._view(index, f"{self.name} BAR{index}")

    def config(self) -> RegisterView:
        return self._view(CONFIG_REGION, f"{self.name} config")

    def bar_size(self, index: int) -> int:
        return self.backend.regions[index].size

    def vector_count(self, preferred: IrqIndex) -> int:
        found = interrupt_type(self.backend, preferred)
        return self.backend.irqs[found].count if found is not None else 0

    def _view(self, index: int, label: str) -> RegisterView:
        size = self.backend.regions[index].size

        def load(offset: int, width: int) -> int:
            check_access(offset, width, size, target=label, operation="load")
            return int.from_bytes(self.backend.region_read(index, offset, width), "little")

        def store(offset: int, width: int, value: int) -> None:
            check_access(offset, width, size, target=label, operation="store")
            self.backend.region_write(index, offset, value.to_bytes(width, "little"))

        def loads(accesses: Sequence[tuple[int, int]]) -> list[int]:
            for offset, width in accesses:
                check_access(offset, width, size, target=label, operation="load")
            found = self.backend.region_read_multi([(index, *access) for access in accesses])
            return [int.from_bytes(data, "little") for data in found]

        def stores(accesses: Sequence[tuple[int, int, int]]) -> None:
            for offset, width, _ in accesses:
                check_access(offset, width, size, target=label, operation="store")
            self.backend.region_write_multi(
                [(index, at, value.to_bytes(width, "little")) for at, width, value in accesses]
            )

        return RegisterView(load, store, label, loads, stores)


def interrupt_type(backend: FunctionBackend, preferred: IrqIndex) -> IrqIndex | None:
    """The type of interrupts to use: what the driver prefers, else MSI, else INTx."""
    for index in (preferred, IrqIndex.MSI, IrqIndex.INTX):
        info = backend.irqs[index]
        if info.count and info.eventfd:
            return index
    return None


def set_bus_master(backend: FunctionBackend, target: Target, *, on: bool) -> None:
    """Set memory space and bus master on, or bus master off, and check that it took.

    Memory space stays on when bus master goes off: clients may have BARs mapped. The read back
    pushes posted writes out of the function (PCI Local Bus 3.0, section 3.2.5).
    """
    seen = pci.set_command(
        partial(backend.region_read, CONFIG_REGION),
        partial(backend.region_write, CONFIG_REGION),
        Command.MEMORY | Command.MASTER if on else Command.MASTER,
        on,
    )
    if bool(seen & Command.MASTER) != on:
        raise DeviceError(
            f"bus master did not turn {'on' if on else 'off'}: command reads {seen:#06x}",
            operation="set bus master",
            target=f"{target} config",
        )


def set_memory_space(backend: FunctionBackend) -> None:
    """Let the function answer at its memory BARs."""
    pci.set_command(
        partial(backend.region_read, CONFIG_REGION),
        partial(backend.region_write, CONFIG_REGION),
        Command.MEMORY,
        True,
    )


def assign_bars(access: BackendAccess) -> None:
    """Give every memory BAR an address, as firmware would.

    Servers that behave like real hardware decode a BAR only once it has an address. Any
    size-aligned, non-overlapping addresses do: nothing else shares this function's bus.
    """
    config = access.config()
    address = 0xC000_0000
    for index in range(6):
        size = access.bar_size(index)
        if not size:
            continue
        kind = config.load(pci_regs.BASE_ADDRESS_0 + 4 * index, 4)
        if kind & pci_regs.BASE_ADDRESS_SPACE_IO:
            continue
        address = (address + size - 1) & ~(size - 1)
        config.store(pci_regs.BASE_ADDRESS_0 + 4 * index, 4, address & 0xFFFF_FFFF)
        if kind & pci_regs.BASE_ADDRESS_MEM_TYPE_64:
            config.store(pci_regs.BASE_ADDRESS_0 + 4 * index + 4, 4, address >> 32)
        address += size


def take_over(access: BackendAccess, target: Target) -> None:
    """Bus master off, reset if there is one, registers reachable. Blocking."""
    backend = access.backend
    set_bus_master(backend, target, on=False)
    if backend.promises.reset:
        backend.reset()
        # Some resets bring the command register back as it was (drivers/pci/pci.c,
        # pci_dev_save_and_disable and pci_dev_restore).
        set_bus_master(backend, target, on=False)
    if backend.promises.assign_bars:
        assign_bars(access)
    set_memory_space(backend)
