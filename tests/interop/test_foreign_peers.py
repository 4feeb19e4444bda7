# SPDX-License-Identifier: Apache-2.0
"""Peers that were written by others, where this machine has them.

QEMU 10.1 or later is the client of our server: ``qemu-system-x86_64`` from PATH, or the command in
HOLDFAST_TEST_QEMU. libvfio-user's sample is the server of our client: ``gpio-pci-idio-16`` from
PATH, or from the directory in HOLDFAST_TEST_LIBVFIO_USER.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from holdfast.backends.vfio_user import VfioUserBackend
from holdfast.emu import registry
from holdfast.emu.faults import FaultPlan
from holdfast.emu.server import Server
from holdfast.kernel import events, memfd
from holdfast.pci import decode_bars
from holdfast.regs import edu
from holdfast.uapi import pci_regs
from holdfast.values import CONFIG_REGION, Iova, IrqIndex, Perm

PATIENCE = 20.0
PROMPT = b"(qemu) "


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def place(clean: None) -> Iterator[Path]:
    """A directory with a short name: socket paths are limited."""
    with tempfile.TemporaryDirectory(prefix="holdfast-") as name:
        yield Path(name)


# -- QEMU is the client --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qemu() -> list[str]:
    command = shlex.split(os.environ.get("HOLDFAST_TEST_QEMU", "qemu-system-x86_64"))
    if shutil.which(command[0]) is None:
        pytest.skip("there is no QEMU")
    known = subprocess.run([*command, "-device", "help"], check=True, capture_output=True)
    if b'"vfio-user-pci"' not in known.stdout:
        pytest.skip("this QEMU is no vfio-user client")
    return command


class Gdb:
    """QEMU's debug stub, in its mode for physical addresses: the way to write to memory."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(PATIENCE)
        self._sock.connect(str(path))
        self._stream = self._sock.makefile("rb")
        assert self._ask("Qqemu.PhyMemMode:1") == "OK"

    def read(self, address: int, count: int) -> bytes:
        return bytes.fromhex(self._ask(f"m{address:x},{count:x}"))

    def write(self, address: int, data: bytes) -> None:
        assert self._ask(f"M{address:x},{len(data):x}:{data.hex()}") == "OK"

    def close(self) -> None:
        self._stream.close()
        self._sock.close()

    def _ask(self, text: str) -> str:
        self._sock.sendall(f"${text}#{sum(text.encode()) % 256:02x}".encode())
        while self._stream.read(1) != b"$":
            pass
        answer = b""
        while (byte := self._stream.read(1)) != b"#":
            assert byte
            answer += byte
        self._stream.read(2)
        self._sock.sendall(b"+")
        return answer.decode()


class Machine:
    """A machine without operating system: its firmware enumerates, its monitor looks."""

    def __init__(self, qemu: list[str], place: Path, *, shared: bool) -> None:
        kind = "memory-backend-memfd,share=on" if shared else "memory-backend-ram"
        function = {"driver": "vfio-user-pci"} | {
            "socket": {"type": "unix", "path": str(place / "edu")}
        }
        self._monitor = place / "monitor"
        self._gdb = place / "gdb"
        arguments = [
            *("-machine", "q35,accel=tcg,memory-backend=m0", "-object", f"{kind},id=m0,size=64M"),
            *("-nodefaults", "-display", "none", "-device", json.dumps(function)),
            *("-monitor", f"unix:{self._monitor},server=on,wait=off"),
            *("-gdb", f"unix:{self._gdb},server=on,wait=off"),
        ]
        self._process = subprocess.Popen([*qemu, *arguments])
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(PATIENCE)
        self.bar = 0

    def __enter__(self) -> Self:
        try:
            wait_for(self._reachable)
            self._answer()
            wait_for(self._enumerated)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
        self._process.kill()
        self._process.wait(PATIENCE)
        for path in (self._monitor, self._gdb):
            path.unlink(missing_ok=True)

    def ask(self, command: str) -> str:
        self._sock.sendall(command.encode() + b"\n")
        return self._answer()

    def quit(self) -> int:
        with suppress(ConnectionError):
            self._sock.sendall(b"quit\n")
        return self._process.wait(PATIENCE)

    def word(self, address: int) -> int:
        return int(self.ask(f"xp /1wx {address:#x}").rpartition(":")[2], 16)

    @property
    def command(self) -> int:
        """The function's command register."""
        return int(self._config("i /h 0xcfc").rpartition("=")[2], 16)

    @command.setter
    def command(self, bits: int) -> None:
        self._config(f"o /h 0xcfc {bits:#x}")

    def _config(self, access: str) -> str:
        """Select the command register, do ``access`` (PCI Local Bus 3.0, 3.2.2.3.2).

        The firmware may be in the middle of an access of its own, so its selection is put back.
        """
        slot = re.findall(r"device +(\d+), function 0:\s+[^\n]*1234:11e8", self.ask("info pci"))
        self.ask("stop")
        selected = self.ask("i /w 0xcf8").rpartition("=")[2].strip()
        self.ask(f"o /w 0xcf8 {1 << 31 | int(slot[0]) << 11 | pci_regs.COMMAND:#x}")
        answer = self.ask(access)
        self.ask(f"o /w 0xcf8 {selected}")
        self.ask("cont")
        return answer

    def reset(self) -> None:
        """Reset the system and wait until its firmware has enumerated again."""
        self.command |= pci_regs.Command.MASTER
        assert self.command & pci_regs.Command.MASTER
        self.ask("system_reset")
        wait_for(lambda: not self.command & pci_regs.Command.MASTER)
        wait_for(self._enumerated)

    @contextmanager
    def stopped(self) -> Iterator[Gdb]:
        self.ask("stop")
        gdb = Gdb(self._gdb)
        try:
            yield gdb
        finally:
            gdb.close()
            self.ask("cont")

    def _reachable(self) -> bool:
        assert self._process.poll() is None, "QEMU ended"
        try:
            self._sock.connect(str(self._monitor))
        except OSError:
            return False
        return True

    def _enumerated(self) -> bool:
        _, found, rest = self.ask("info pci").partition("1234:11e8")
        bar = re.search(r"BAR0: 32 bit memory at 0x([0-9a-f]+) ", rest)
        self.bar = int(bar[1], 16) if found and bar else 0
        # Until the firmware turns decoding on, nothing answers at the address.
        return 0 < self.bar < 1 << 32 and self.word(self.bar) == edu.IDENTIFICATION_VALUE

    def _answer(self) -> str:
        answer = b""
        while not answer.endswith(PROMPT):
            piece = self._sock.recv(1 << 16)
            assert piece, answer
            answer += piece
        text = answer.removesuffix(PROMPT).decode().replace("\r", "")
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


@pytest.fixture
def served_edu(place: Path) -> Iterator[Path]:
    function = registry.create("edu", {"delay": "0.01"}, faults=FaultPlan())
    server = Server(function)
    thread = threading.Thread(target=server.serve_path, args=(place / "edu",))
    thread.start()
    try:
        wait_for((place / "edu").exists)
        yield place
    finally:
        server.stop()
        thread.join(PATIENCE)
        function.close()
    assert not thread.is_alive()


def test_qemu_enumerates_resets_leaves_and_comes_back(qemu: list[str], served_edu: Path) -> None:
    with Machine(qemu, served_edu, shared=True) as machine:
        machine.reset()
        assert machine.quit() == 0
    with Machine(qemu, served_edu, shared=True):
        pass  # it is killed at the end, and the next one finds the server as before
    with Machine(qemu, served_edu, shared=True) as machine:
        assert machine.word(machine.bar) == edu.IDENTIFICATION_VALUE


@pytest.mark.parametrize("shared", [True, False], ids=["by descriptor", "by message"])
def test_dma_reaches_the_memory_of_qemu(qemu: list[str], served_edu: Path, shared: bool) -> None:
    data = bytes(range(256)) * 8
    there, back = 0x100_0000, 0x200_0123
    with Machine(qemu, served_edu, shared=shared) as machine:
        machine.command |= pci_regs.Command.MASTER
        with machine.stopped() as gdb:
            gdb.write(there, data)
            transfer(gdb, machine.bar, there, edu.BUFFER_START, len(data), edu.DmaCommand.START)
            command = edu.DmaCommand.START | edu.DmaCommand.TO_RAM
            transfer(gdb, machine.bar, edu.BUFFER_START, back, len(data), command)
            assert gdb.read(back, len(data)) == data


def transfer(gdb: Gdb, bar: int, source: int, destination: int, size: int, command: int) -> None:
    values = (source, destination, size, command)
    rows = (edu.DMA_SOURCE, edu.DMA_DESTINATION, edu.DMA_COUNT, edu.DMA_COMMAND)
    for row, value in zip(rows, values, strict=True):
        gdb.write(bar + row.offset, value.to_bytes(8, "little"))
    start = bar + edu.DMA_COMMAND.offset
    wait_for(lambda: not gdb.read(start, 4)[0] & edu.DmaCommand.START)


# -- libvfio-user is the server ------------------------------------------------------------------


@pytest.fixture
def gpio(place: Path) -> Iterator[Path]:
    where = os.environ.get("HOLDFAST_TEST_LIBVFIO_USER")
    sample = shutil.which("gpio-pci-idio-16", path=where)
    if sample is None:
        pytest.skip("libvfio-user's samples are not here")
    path = place / "gpio"
    process = subprocess.Popen([sample, str(path)])
    try:
        wait_for(path.exists)
        yield path
    finally:
        process.kill()
        process.wait(PATIENCE)


def test_a_libvfio_user_server_is_described_driven_and_reconnected(gpio: Path) -> None:
    for _ in range(2):
        with ExitStack() as stack:
            backend = VfioUserBackend.connect(gpio)
            stack.callback(backend.close)
            assert backend.region_read(CONFIG_REGION, 0, 4) == bytes.fromhex("4f49c80d")
            sizes = [region.size for region in backend.regions[:6]]
            bars = decode_bars(partial(backend.region_read, CONFIG_REGION), sizes)
            assert [(bar.index, bar.io, bar.size) for bar in bars] == [(2, True, 256)]
            backend.reset()
            before = backend.region_read(2, 1, 1)[0]  # a pin reads 1 if its count divides by 3
            for _ in range(3):
                backend.region_write(2, 0, b"\x05")
            assert backend.region_read(2, 1, 1)[0] == before
            eventfd = events.make()
            stack.callback(events.close, eventfd)
            backend.set_irqs(IrqIndex.INTX, 0, [eventfd])
            backend.set_irqs(IrqIndex.INTX, 0, [])
            fd = memfd.create("dma", 1 << 20)
            stack.callback(os.close, fd)
            backend.dma_map(Iova(1 << 32), 1 << 20, Perm.RW, fd, 0)
            assert backend.dma_unmap(Iova(1 << 32), 1 << 20) == 1 << 20
