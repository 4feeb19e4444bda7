# SPDX-License-Identifier: Apache-2.0
"""Clients that turn on the memory that they were given: it hurts only themselves."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.dma.sg import SgList
from holdfast.dma.slab import SlabMemory
from holdfast.errors import BadBuffer, HoldfastError
from holdfast.keeper import control
from holdfast.keeper.process_memory import PATIENCE
from holdfast.kernel import memfd
from holdfast.kernel.mapping import Mapping
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.torture.rude import Rude
from holdfast.torture.stack import Stack
from holdfast.wire import lease as wire

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 20.0
MADV_REMOVE = 9
SEALS = {
    "write": fcntl.F_SEAL_WRITE,
    "future write": 0x10,
    "shrink": fcntl.F_SEAL_SHRINK,
    "grow": fcntl.F_SEAL_GROW,
    "seal": fcntl.F_SEAL_SEAL,
    "exec": 0x20,
}


def misuses(fd: int, size: int) -> None:
    """Everything that must be refused on a file that the keeper counts on."""
    for seal in SEALS.values():
        with contextlib.suppress(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
            pytest.fail(f"seal {seal:#x} was taken")
    for length in (0, size // 2, size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, length)
    with pytest.raises(PermissionError):
        os.posix_fallocate(fd, size, 4096)


def remove_pages(fd: int, size: int) -> None:
    """Punch by descriptor, and by madvise through a mapping."""
    memfd.punch(fd, 0, size)
    mapping = Mapping(fd, size)
    libc = ctypes.CDLL(None, use_errno=True)
    mapping.array[:] = 0xEE
    assert libc.madvise(ctypes.c_void_p(mapping.address), ctypes.c_size_t(size), MADV_REMOVE) == 0
    mapping.close()


def test_seals_and_sizes_of_what_was_given_cannot_be_changed(innocent: Any) -> None:
    with Rude(innocent.stack.target) as client:
        opened, fds = client.open_with_fds(1)
        assert opened.control is not None
        misuses(fds[opened.control.fd], opened.control.size)
        info, fd = client.take_slab(1 << 20)
        misuses(fd, info.size)
        # The keeper maps the control memory anew for this.
        assert isinstance(client.ask(wire.Regrant())[0], wire.Regranted)
        for each in [*fds, fd]:
            os.close(each)


def test_pages_punched_out_of_slabs_and_rings_are_missed_by_their_owner_only(
    innocent: Any,
) -> None:
    with Rude(innocent.stack.target) as client:
        opened, fds = client.open_with_fds(1)
        assert opened.control is not None
        info, fd = client.take_slab(1 << 20)
        for _ in range(3):
            remove_pages(fds[opened.control.fd], opened.control.size)
            remove_pages(fd, info.size)
            innocent.goes_on()
            assert isinstance(client.ask(wire.Regrant())[0], wire.Regranted)
        remove_pages(fds[opened.control.fd], opened.control.size)
        for each in [*fds, fd]:
            os.close(each)


def test_scribbled_rings_move_nothing_of_others_in_a_lease_of_ones_own(innocent: Any) -> None:
    """Descriptors of noise: the channel stops with an error, others' channels go on.

    What the mode promises ends there: a descriptor that names another lease's address would be
    carried out. So who posts directly has the function for one user, see the admission's tests.
    """
    noise = np.random.default_rng(1)
    with Rude(innocent.stack.target) as client:
        opened, fds = client.open_with_fds(1)
        assert opened.control is not None
        mapping = Mapping(fds[opened.control.fd], opened.control.size)
        for _ in range(20):
            mapping.array[:] = noise.integers(0, 256, mapping.size, dtype=np.uint8)
            for bell in opened.bells:
                os.write(fds[bell.fd], struct.pack("=Q", 1000))
            innocent.goes_on()
        mapping.close()
        for each in fds:
            os.close(each)


def test_nothing_of_a_dead_lease_is_found_by_the_next(innocent: Any) -> None:
    with Rude(innocent.stack.target) as client:
        client.open(0)
        info, fd = client.take_slab(4 << 20)
        mapping = Mapping(fd, info.size)
        mapping.array[:] = 0xC3
        mapping.close()
        os.close(fd)
    innocent.is_alone()
    for _ in range(4):
        found = innocent.card.alloc(4 << 20)
        assert not found.array.any()
        found.free()


# -- files that can be cut --------------------------------------------------------------------


def unsealed(size: int) -> SlabMemory:
    """A file as hugetlbfs has them: its holder can truncate it."""
    fd = os.memfd_create("holdfast-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return SlabMemory(fd, [(0, size)])


def _quietly(body: Callable[[], None]) -> None:
    faulthandler.disable()
    body()


def how_it_ends(body: Callable[[], None]) -> int:
    """Exit code of a forked child, negative for a signal."""
    made = actors.spawn(lambda *_: _quietly(body))
    return os.waitstatus_to_exitcode(made.reap())


def test_a_ring_whose_file_was_cut_is_an_error_and_not_the_end() -> None:
    memory = unsealed(8192)

    def careless() -> None:  # the negative control
        mapping = Mapping(memory.fd, 8192)
        os.ftruncate(memory.fd, 0)
        mapping.array[:] = 1

    assert how_it_ends(careless) == -signal.SIGBUS
    os.ftruncate(memory.fd, 8192)
    sg = SgList.of([(0x1000, 8192)])

    def careful() -> None:
        with control.writable(memory, sg) as ring:
            ring.data[:] = b"\x07" * 8192
            os.ftruncate(memory.fd, 4096)
            try:
                ring.flush()
            except BadBuffer:
                os._exit(11)

    assert how_it_ends(careful) == 11
    os.ftruncate(memory.fd, 0)
    with pytest.raises(BadBuffer), control.writable(memory, sg):
        pass
    os.close(memory.fd)


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_a_ring_arrives_in_the_file(sealed: bool) -> None:
    memory = SlabMemory(memfd.create("holdfast-test", 8192), [(0, 8192)])
    if not sealed:
        os.close(memory.fd)
        memory = unsealed(8192)
    with control.writable(memory, SgList.of([(0x1000, 8192)])) as ring:
        assert bytes(ring.data) == bytes(8192)
        ring.data[100:104] = b"ring"
        ring.flush()
    assert os.pread(memory.fd, 5, 100) == b"ring\0"
    os.close(memory.fd)


# -- memory that answers when its owner likes -------------------------------------------------


def test_memory_that_never_answers_stops_its_owners_transfer_only(
    innocent: Any, stubborn_files: Any, tmp_path: Path
) -> None:
    target = innocent.stack.target

    def body(_: int, writing: int) -> None:
        files = stubborn_files(str(tmp_path))
        os.write(writing, struct.pack("=I", files.server))
        array = files.mapped()
        card = holdfast.open(target, access="shared", channels=1, timeout=LONG)
        for _ in range(3):  # the keeper must not try again and again
            pin = card.pin(array)
            with contextlib.suppress(HoldfastError):
                card.dma.to_card(pin, 1 << 20).wait(LONG)
                continue
            os.write(writing, b"f")
            card.regrant()
        time.sleep(600)

    child = actors.spawn(body)
    (server,) = struct.unpack("=I", child.read(4))
    try:
        with innocent.card.pin(np.arange(4096, dtype=np.uint8)) as pin:
            for _ in range(10):
                innocent.goes_on()
                innocent.card.dma.to_card(pin, 0).wait(LONG)
            began = time.monotonic()
            assert child.read(3) == b"fff", "the transfers fail"
            assert time.monotonic() - began < 2 * PATIENCE + LONG / 4
            innocent.goes_on()
            innocent.card.dma.to_card(pin, 0).wait(LONG)
    finally:
        os.kill(server, signal.SIGKILL)
        child.kill()
        child.reap()


def test_a_keeper_that_may_open_few_files_keeps_some_for_what_must_not_fail() -> None:
    """Slabs up to the limit of descriptors: a clear error, and the next client and death go on."""
    limited = ("sh", "-c", 'ulimit -n 700; exec "$0" "$@"')
    from holdfast.torture.stack import SERVE

    with Stack("emu:xdma?channels=2", serve=(*limited, *SERVE)) as stack:
        with Rude(stack.target) as greedy:
            greedy.open(0)
            taken: list[int] = []
            while True:
                reply, fds = greedy.ask(wire.TakeSlab(nbytes=4096), keep=True)
                taken += fds
                if not isinstance(reply, wire.SlabTaken):
                    break
                os.close(taken.pop())
            assert isinstance(reply, wire.Failed)
            assert reply.error["kind"] == "ResourceError"
            assert "ulimit" in str(reply.error["hint"])
            with holdfast.open(stack.target, channels=0, timeout=LONG) as card:
                assert card.lease.number
        assert settle(
            lambda: sum(lease["state"] != "released" for lease in stack.ps()["leases"]),
            goal=0, timeout=LONG,
        ) == 0  # fmt: skip
        with holdfast.open(stack.target, channels=1, timeout=LONG) as card:
            card.alloc(4096)
