# SPDX-License-Identifier: Apache-2.0
"""A PCI function through sysfs: configuration space, BARs, reset, and one user at a time.

Facts. ``config`` reads and writes configuration space; without CAP_SYS_ADMIN reads end after 64
bytes, and writes report no errors (drivers/pci/pci-sysfs.c). ``resourceN`` maps a memory BAR. When
the function is removed, an open ``config`` answers ENODEV, but the mapping stays and reads whatever
decodes the address by then (seen on 6.12 and 7.3). Nothing in sysfs is exclusive.

Choice. Every access to a BAR looks at the vendor id first, with a real configuration cycle: that
also finds a function that was pulled out. One user is enforced with flock(2) on ``resourceN`` of
the first memory BAR (mode 0600, so that not everybody can lock it; ``config`` where there is no
such BAR). The kernel drops the lock with the process, and /proc/locks names the holder.

Cost. About a microsecond for each access to a BAR. The lock only binds who asks for it.

I/O port BARs, and BARs that share a page with another function's, are not offered (size 0).
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from holdfast.backends.region_access import checked
from holdfast.errors import (
    Busy,
    Closed,
    DeviceError,
    DeviceGone,
    HoldfastError,
    NoPermission,
    NotSupported,
)
from holdfast.kernel.failure import failure
from holdfast.kernel.handover import Incoming
from holdfast.kernel.mapping import PAGE, Mapping
from holdfast.kernel.pci_sysfs import PciFunction, device_path
from holdfast.uapi import pci_regs
from holdfast.uapi.pci_regs import Command
from holdfast.values import CONFIG_REGION, Region

_IORESOURCE_MEM: Final = 0x200
"""linux/ioport.h"""

_GONE: Final = (errno.ENODEV, errno.ENXIO, errno.EIO, errno.ENOENT)
_DEAD: Final = b"\xff\xff"
"""The vendor id that no function has: nobody answered."""
_ALL_ONES: Final = {width: b"\xff" * width for width in (1, 2, 4, 8)}
_PIECE: Final = 4
"""Bytes at a time in accesses that are no single one. Not every function takes 8."""

_LOCKDOWN: Final = (
    "run as root; a kernel in lockdown (Secure Boot) forbids it to root too:"
    " see /sys/kernel/security/lockdown"
)


class SysfsFunction:
    """One function, for this process alone. Thread-safe; accesses go one at a time.

    Owns its descriptors, mappings and the lock. After DeviceGone was raised once, every call
    raises it.
    """

    def __init__(
        self, function: PciFunction, target: str, sysfs: Path, found: Incoming | None = None
    ) -> None:
        """Raises Busy naming the holder, NoPermission, or DeviceGone.

        ``found`` has a predecessor's descriptors, and with them the lock: see :meth:`descriptors`.
        """
        self.target = target
        self.on_gone: Callable[[], None] | None = None
        self.lock = threading.RLock()
        self._path = device_path(function.bdf, sysfs)
        self._bars: dict[int, Mapping] = {}
        self._fds: list[int] = []
        self._state: type[HoldfastError] | None = None
        try:
            self._config = self._open("config") if found is None else self._taken(found, "config")
            memory = [
                (index, resource.size)
                for index, resource in enumerate(function.resources[: pci_regs.BASE_ADDRESSES])
                if resource.flags & _IORESOURCE_MEM and resource.size and not resource.start % PAGE
            ]
            self._lock = self._config
            if memory:
                name = f"resource{memory[0][0]}"
                self._lock = self._open(name) if found is None else self._taken(found, "lock")
            self._take(self._lock)
            self.regions = self._list_regions(dict(memory))
            for index, size in memory:
                self._map(index, size)
        except BaseException:
            self.close()
            raise

    def descriptors(self) -> dict[str, int]:
        """What a successor needs to be the one user; all of it stays owned here."""
        found = {"config": self._config}
        return found if self._lock == self._config else found | {"lock": self._lock}

    # -- regions ---------------------------------------------------------------------------------

    def read(self, index: int, offset: int, count: int) -> bytes:
        """Bytes of a region; 1, 2, 4 or 8 aligned ones of a BAR as a single load."""
        checked(self.regions, index, offset, count, write=False, target=self.target)
        with self.lock:
            self._require("region_read")
            if index == CONFIG_REGION:
                return self._config_read(offset, count)
            self._require_answer("region_read")
            found = b"".join(
                self._bars[index].load(at, width).to_bytes(width, "little")
                for at, width in pieces(offset, count)
            )
            if found == _ALL_ONES.get(count):
                self._require_answer("region_read")
            return found

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write to a region; a BAR is read from afterwards only if the caller does."""
        checked(self.regions, index, offset, len(data), write=True, target=self.target)
        with self.lock:
            self._require("region_write")
            if index == CONFIG_REGION:
                self._config_write(offset, data)
                return
            self._require_answer("region_write")
            for at, width in pieces(offset, len(data)):
                start = at - offset
                value = int.from_bytes(data[start : start + width], "little")
                self._bars[index].store(at, width, value)

    def set_command(self, bits: int, *, on: bool) -> None:
        """Set or clear bits of the command register, and read back that it took.

        Byte by byte, so that the kernel's interrupt handler, which sets INTX_DISABLE in the upper
        byte, is not undone by a change in the lower one.
        """
        with self.lock:
            self._require("set command")
            for at, part in ((0, bits & 0xFF), (1, bits >> 8)):
                if part:
                    self._set_command_byte(pci_regs.COMMAND + at, part, on)

    def unmask_intx(self) -> None:
        """Clear INTX_DISABLE. Not read back: if the line is up, the kernel has set it again."""
        with self.lock:
            self._require("unmask INTx")
            offset = pci_regs.COMMAND + 1
            now = self._config_read(offset, 1)[0]
            self._pwrite(offset, bytes([now & ~(Command.INTX_DISABLE >> 8)]))

    def _set_command_byte(self, offset: int, bits: int, on: bool) -> None:
        old = self._config_read(offset, 1)[0]
        new = old | bits if on else old & ~bits
        if new != old:
            self._pwrite(offset, bytes([new]))
        seen = self._config_read(offset, 1)[0]
        if seen & bits != new & bits:
            raise DeviceError(
                f"command register byte {offset:#x} reads {seen:#04x} after {new:#04x} was written",
                operation="set command",
                target=f"{self.target} config",
            )

    # -- the function ----------------------------------------------------------------------------

    def attribute(self, name: str, value: str) -> None:
        """Write an attribute of the function, such as ``enable`` or ``reset``."""
        with self.lock:
            self._require(name)
            try:
                fd = os.open(self._path / name, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(fd, value.encode("ascii"))
                finally:
                    os.close(fd)
            except OSError as error:
                raise self._failed(error, name) from error

    def gone(self, operation: str) -> DeviceGone:
        """The error for a function that went away; the first time, ``on_gone`` is called."""
        with self.lock:
            first, self._state = self._state is None, self._state or DeviceGone
        if first and self.on_gone is not None:
            self.on_gone()
        return DeviceGone(
            "the function does not answer any more",
            operation=operation,
            target=self.target,
            hint="plug it in again, rescan the bus (echo 1 > /sys/bus/pci/rescan) and open it anew",
        )

    @property
    def ended(self) -> bool:
        """Whether it is gone or closed: no access can succeed any more."""
        return self._state is not None

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        with self.lock:
            self._state = Closed
            for mapping in self._bars.values():
                mapping.close()
            self._bars.clear()
            while self._fds:
                os.close(self._fds.pop())

    # -- details ---------------------------------------------------------------------------------

    def _open(self, name: str) -> int:
        try:
            fd = os.open(self._path / name, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise self._failed(error, f"open {name}") from error
        self._fds.append(fd)
        return fd

    def _taken(self, found: Incoming, name: str) -> int:
        self._fds.append(found.take(name))
        return self._fds[-1]

    def _take(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(
                f"another process uses it: {lock_holder(fd)}",
                operation="open",
                target=self.target,
                errno=error.errno,
                hint="one keeper serves all clients of a function: see holdfast ps",
            ) from error
        except OSError as error:
            raise self._failed(error, "lock") from error

    def _list_regions(self, memory: dict[int, int]) -> tuple[Region, ...]:
        size = os.fstat(self._config).st_size
        if size not in (pci_regs.CONFIG_SPACE_SIZE, pci_regs.CONFIG_SPACE_EXP_SIZE):
            raise DeviceError(
                f"configuration space of {size} bytes", operation="open", target=self.target
            )
        if len(os.pread(self._config, 4, pci_regs.STD_HEADER_SIZE)) != 4:
            raise NoPermission(
                f"only the first {pci_regs.STD_HEADER_SIZE} bytes of configuration space can be"
                " read: CAP_SYS_ADMIN is missing",
                operation="open",
                target=self.target,
                hint="run the keeper as root",
            )
        sizes = [memory.get(index, 0) for index in range(CONFIG_REGION)] + [size]
        return tuple(
            Region(index, size, readable=size > 0, writable=size > 0)
            for index, size in enumerate(sizes)
        )

    def _map(self, index: int, size: int) -> None:
        fd = self._open(f"resource{index}")
        try:
            self._bars[index] = Mapping(fd, size, dont_fork=True)
            os.close(self._fds.pop())
        except NoPermission as error:
            error.hint = _LOCKDOWN
            raise
        except HoldfastError as error:
            if error.errno == errno.EINVAL:  # iomem_is_exclusive: a driver has claimed it
                error.hint = "the BAR is claimed by a kernel driver (CONFIG_IO_STRICT_DEVMEM)"
            raise

    def _require(self, operation: str) -> None:
        if self._state is Closed:
            raise Closed("the backend was closed", operation=operation, target=self.target)
        if self._state is not None:
            raise self.gone(operation)

    def _require_answer(self, operation: str) -> None:
        """Raise DeviceGone unless the function answers a configuration cycle."""
        try:
            if os.pread(self._config, 2, pci_regs.VENDOR_ID) != _DEAD:
                return
        except OSError as error:
            raise self._failed(error, operation) from error
        raise self.gone(operation)

    def _config_read(self, offset: int, count: int) -> bytes:
        try:
            found = os.pread(self._config, count, offset)
        except OSError as error:
            raise self._failed(error, "read config") from error
        if len(found) != count:
            raise DeviceError(
                f"{len(found)} of {count} bytes at {offset:#x}",
                operation="read config",
                target=self.target,
            )
        if found == _ALL_ONES.get(count):
            self._require_answer("read config")
        return found

    def _config_write(self, offset: int, data: bytes) -> None:
        """Write what the caller says, except INTX_DISABLE: who masks INTx is for set_irqs.

        The kernel's interrupt handler sets the bit at any moment. A caller that reads the register
        and writes it back would undo that, or leave the interrupt masked for ever.
        """
        place = pci_regs.COMMAND + 1 - offset
        if 0 <= place < len(data):
            disable = Command.INTX_DISABLE >> 8
            now = self._config_read(pci_regs.COMMAND + 1, 1)[0]
            mixed = bytearray(data)
            mixed[place] = (mixed[place] & ~disable) | (now & disable)
            data = bytes(mixed)
        self._pwrite(offset, data)

    def _pwrite(self, offset: int, data: bytes) -> None:
        try:
            written = os.pwrite(self._config, data, offset)
        except OSError as error:
            raise self._failed(error, "write config") from error
        if written != len(data):
            raise DeviceError(
                f"{written} of {len(data)} bytes at {offset:#x} were taken",
                operation="write config",
                target=self.target,
            )

    def _failed(self, error: OSError, operation: str) -> HoldfastError:
        if error.errno in _GONE:
            return self.gone(operation)
        if error.errno == errno.ENOTTY:  # drivers/pci/pci.c, pci_reset_function
            return NotSupported(
                "the kernel has no way to do that", operation=operation, target=self.target
            )
        found = failure(error, operation, self.target)
        if isinstance(found, NoPermission):
            found.hint = _LOCKDOWN
        return found


def pieces(offset: int, count: int) -> list[tuple[int, int]]:
    """``(offset, width)`` of the single accesses that make up ``count`` bytes.

    One, if it is 1, 2, 4 or 8 bytes at a multiple of that; else naturally aligned ones of up to 4.
    """
    if count in _ALL_ONES and not offset % count:
        return [(offset, count)]
    found = []
    end = offset + count
    while offset < end:
        width = _PIECE
        while offset % width or offset + width > end:
            width //= 2
        found.append((offset, width))
        offset += width
    return found


def lock_holder(fd: int, locks: Path = Path("/proc/locks")) -> str:
    """Who has the file locked, from /proc/locks (proc_locks(5)); for an error message."""
    status = os.fstat(fd)
    name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        for line in locks.read_text(encoding="ascii").splitlines():
            fields = line.split()
            if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == name:
                command = Path(f"/proc/{int(fields[4])}/comm").read_text(encoding="utf-8")
                return f"pid {fields[4]} ({command.strip()})"
    except (OSError, ValueError):
        pass  # it ended meanwhile, or lives in another pid namespace
    return "a process that /proc does not show"
