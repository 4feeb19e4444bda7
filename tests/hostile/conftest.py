# SPDX-License-Identifier: Apache-2.0
"""An innocent client beside the hostile ones: what it does must go on, and go well."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import signal
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.device import Device
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack

LONG = 20.0


class Innocent:
    """A living lease with a channel, memory with a pattern, and verified transfers."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.card: Device = holdfast.open(stack.target, access="shared", channels=1, timeout=LONG)
        self.kept = self.card.alloc(1 << 20)
        self.kept.array[:] = 0x5A
        self.source = self.card.alloc(8192)
        self.back = self.card.alloc(8192)
        self.rounds = 0

    def goes_on(self) -> None:
        """Registers, a command and a transfer there and back work, and nobody wrote its memory."""
        self.rounds += 1
        self.source.array[:] = np.arange(8192) * self.rounds % 251
        self.back.array[:] = 0
        self.card.dma.to_card(self.source).wait(LONG)
        self.card.dma.from_card(self.back).wait(LONG)
        assert np.array_equal(self.source.array, self.back.array)
        assert self.card.command("channel_status")
        assert (self.kept.array == 0x5A).all(), "somebody wrote into its memory"

    def is_alone(self) -> None:
        """Everybody else's lease is released, and every byte is accounted for."""
        mine = self.card.lease.number

        def others() -> int:
            return sum(
                lease["state"] != "released" and lease["lease"] != mine
                for lease in self.stack.ps()["leases"]
            )

        assert settle(others, goal=0, timeout=LONG) == 0, self.stack.ps()["leases"]
        told = self.stack.ps()
        assert told["unaccounted_bytes"] == 0
        assert told["quarantined_bytes"] == 0


class StubbornFiles:
    """A FUSE file system whose files answer nothing that matters (linux/fuse.h, 7.31).

    A file can be opened and mapped; who reads it, or closes it, waits until :attr:`server` is dead,
    and be it in its own exit. Needs root; mounted in a namespace of the calling process, which
    should be a forked one.
    """

    NEWNS, PRIVATE = 0x20000, (1 << 14) | (1 << 18)
    SIZE = 1 << 20
    FORGET, READ, FLUSH, INTERRUPT, BATCH_FORGET = 2, 15, 25, 36, 42

    def __init__(self, directory: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0".encode()
        for call, *arguments in (
            (libc.unshare, self.NEWNS),
            (libc.mount, b"none", b"/", None, self.PRIVATE, None),
            (libc.mount, b"none", directory.encode(), b"fuse", 0, options),
        ):
            if call(*arguments):
                raise OSError(ctypes.get_errno(), "mount")
        self.server = os.fork()
        if self.server == 0:
            signal.alarm(60)  # should nobody come to kill it
            self._serve()
        os.close(self._device)
        self.path = f"{directory}/file"

    def open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def mapped(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Its bytes. Not to be touched here."""
        return np.frombuffer(mmap.mmap(self.open(), self.SIZE), np.uint8)

    def _serve(self) -> None:
        while True:
            request = os.read(self._device, 1 << 17)
            _, opcode, unique, node = struct.unpack_from("=IIQQ", request)
            if opcode not in (
                self.FORGET,
                self.READ,
                self.FLUSH,
                self.INTERRUPT,
                self.BATCH_FORGET,
            ):
                body, error = self._answer(opcode, node)
                os.write(self._device, struct.pack("=IiQ", 16 + len(body), error, unique) + body)

    def _answer(self, opcode: int, node: int) -> tuple[bytes, int]:
        attributes = struct.pack(
            "=6Q10I", node, self.SIZE, 0, 0, 0, 0, 0, 0, 0,
            0o40755 if node == 1 and opcode != 1 else 0o100666, 1, 0, 0, 0, 4096, 0,
        )  # fmt: skip
        answers = {
            1: struct.pack("=4QII", 2, 0, 3600, 3600, 0, 0) + attributes,  # LOOKUP
            3: struct.pack("=QII", 3600, 0, 0) + attributes,  # GETATTR
            14: struct.pack("=QII", 1, 0, 0),  # OPEN
            18: b"",  # RELEASE
            26: struct.pack("=4IHHIIHHI28x", 7, 31, 0, 0, 12, 9, 4096, 1, 1, 0, 0),  # INIT
        }
        found = answers.get(opcode)
        return (b"", -errno.ENOSYS) if found is None else (found, 0)


@pytest.fixture
def stubborn_files() -> Callable[[str], StubbornFiles]:
    """Makes one in a forked child; skips where that is not allowed."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("needs root and /dev/fuse to mount a file system")
    return StubbornFiles


@pytest.fixture(scope="module")
def shared_stack() -> Iterator[Stack]:
    """One keeper for all that is done to it by a module: it must stand it all."""
    with Stack("emu:xdma?memory=4M&channels=4") as stack:
        first = stack.keeper_pid
        yield stack
        assert stack.keeper_pid == first


@pytest.fixture
def innocent(clean: None, shared_stack: Stack) -> Iterator[Innocent]:
    """At the end it must still be well, and alone."""
    made = Innocent(shared_stack)
    yield made
    made.goes_on()
    made.is_alone()
    made.card.close()
    del made
    gc.collect()
