# SPDX-License-Identifier: Apache-2.0
"""A function without an IOMMU, and its pinned memory, in the hands of a successor.

The function is a fabricated directory, the memory a tmpfs; processes, kills, locks and pins are
real. A guest does the same with QEMU's edu.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.backends.uio import UioBackend
from holdfast.dma.physical import PhysicalFiles
from holdfast.dma.slab import SlabMemory
from holdfast.errors import (
    BadBuffer,
    BadTarget,
    Busy,
    DeviceGone,
    NoPermission,
    NotSupported,
    ProtocolError,
    UsageError,
)
from holdfast.kernel import memfd, pagemap, pidfd
from holdfast.kernel.handover import Incoming
from holdfast.kernel.io_uring import PinTable
from holdfast.kernel.mapping import Mapping
from holdfast.testing.pci_tree import PciTree
from holdfast.uapi import pci_regs
from holdfast.uapi.pci_regs import Command
from holdfast.values import CONFIG_REGION, Handover, Target

PAGE = 4096
ADDRESS = "0000:00:03.0"
TARGET = Target.parse(f"pci:{ADDRESS}?backend=uio")
REGISTER = 0x40


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where memory goes. Skips where pins cannot be taken."""
    try:
        PinTable(1).close()
        page = Mapping(fd := memfd.create("probe", PAGE), PAGE)
        os.close(fd)
        page.array[:] = 1
        pagemap.physical(page.address, PAGE)
    except (NoPermission, NotSupported) as error:
        pytest.skip(error.what)
    with tempfile.TemporaryDirectory(prefix="holdfast-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    tree = PciTree(tmp_path)
    tree.add(ADDRESS, group=None)
    here = tree.here(ADDRESS)
    config = bytearray(256)
    config[:4] = bytes.fromhex("3412e811")
    (here / "config").write_bytes(config)
    (here / "resource0").write_bytes(bytes(1 << 20))
    (here / "enable").write_text("1")
    return tree


Predecessor = Callable[[Callable[[UioBackend], list[SlabMemory]]], list[Handover]]


@pytest.fixture
def killed(tree: PciTree, directory: Path, clean: None) -> Iterator[Predecessor]:
    """``killed(work)``: what a keeper that did ``work`` and was killed then had handed over.

    First the function, then each slab that ``work`` returned.
    """
    given: list[int] = []

    def run(work: Callable[[UioBackend], list[SlabMemory]]) -> list[Handover]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if not pid:
            try:
                backend = UioBackend(TARGET, sysfs=tree.sysfs, directory=directory)
                slabs = work(backend)
                source = backend.memory()
                for one in [backend.hand_over(), *map(source.describe, slabs)]:
                    text = json.dumps([list(one.fds), dict(one.notes)]).encode()
                    socket.send_fds(theirs, [text], list(one.fds.values()))
                theirs.shutdown(socket.SHUT_WR)
                signal.pause()
            except BaseException:  # noqa: BLE001 - nothing may unwind into the test runner
                traceback.print_exc(file=sys.__stderr__)
            finally:
                os._exit(1)
        theirs.close()
        found = []
        while True:
            text, fds, _, _ = socket.recv_fds(ours, 1 << 16, 16)
            if not text:
                break
            given.extend(fds)
            names, notes = json.loads(text)
            found.append(Handover(dict(zip(names, fds, strict=True)), notes))
        ours.close()
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        return found

    yield run
    holders = [os.dup(fd) for fd in given if "pidfd" in os.readlink(f"/proc/self/fd/{fd}")]
    for fd in given:
        os.close(fd)
    for fd in holders:
        assert pidfd.await_death(fd, 10), "whoever held the pins ends with the last who wants them"
        os.close(fd)


def duplicated(handover: Handover) -> Handover:
    return Handover({name: os.dup(fd) for name, fd in handover.fds.items()}, handover.notes)


def resume(tree: PciTree, handover: Handover) -> UioBackend:
    with Incoming(duplicated(handover)) as found:
        return UioBackend.resume(TARGET, found, sysfs=tree.sysfs)


def fill(memory: SlabMemory, value: int) -> None:
    with mmap.mmap(memory.fd, memory.size) as view:
        view[:] = bytes([value]) * memory.size


def busy(backend: UioBackend) -> list[SlabMemory]:
    """What a keeper does: bus master on, a register set, two slabs given out, one kept back."""
    backend.region_write(CONFIG_REGION, pci_regs.COMMAND, bytes([Command.MASTER | Command.MEMORY]))
    backend.region_write(0, REGISTER, b"\x11\x22\x33\x44")
    slabs = [backend.memory().take(4 * PAGE) for _ in range(3)]
    for number, slab in enumerate(slabs, 1):
        fill(slab, number)
    return slabs[:2]


def command(tree: PciTree) -> int:
    raw = (tree.here(ADDRESS) / "config").read_bytes()
    return int.from_bytes(raw[4:6], "little")


def test_a_successor_finds_the_function_as_it_was_and_leaves_it_so(
    killed: Predecessor, tree: PciTree
) -> None:
    first, *_ = killed(busy)
    before = (tree.here(ADDRESS) / "config").read_bytes()
    with pytest.raises(Busy):
        UioBackend(TARGET, sysfs=tree.sysfs)
    backend = resume(tree, first)
    assert (tree.here(ADDRESS) / "config").read_bytes() == before
    assert command(tree) & Command.MASTER
    assert backend.region_read(0, REGISTER, 4) == b"\x11\x22\x33\x44"
    again = backend.hand_over()
    assert again.notes == first.notes
    assert again.fds.keys() == first.fds.keys() == {"config", "lock", "holder", "lifeline"}
    assert all(os.path.sameopenfile(again.fds[name], first.fds[name]) for name in again.fds)
    backend.close()
    assert not command(tree) & Command.MASTER
    backend.close()


def test_a_resume_that_fails_does_not_disturb_the_function(
    killed: Predecessor, tree: PciTree
) -> None:
    first, *_ = killed(busy)
    for missing in ("config", "lock", "holder", "lifeline"):
        part = Handover({n: fd for n, fd in first.fds.items() if n != missing}, first.notes)
        with pytest.raises(ProtocolError):
            resume(tree, part)
    for note in ("enabled", "directory", "ring"):
        with pytest.raises(ProtocolError):
            resume(tree, Handover(first.fds, {n: v for n, v in first.notes.items() if n != note}))
    assert command(tree) & Command.MASTER
    backend = resume(tree, first)
    (tree.here(ADDRESS) / "resource").write_text("")
    backend.close()


def test_a_function_that_was_taken_out_meanwhile_is_not_resumed(
    killed: Predecessor, tree: PciTree
) -> None:
    first, *_ = killed(busy)
    (tree.sysfs / "bus/pci/devices" / ADDRESS).unlink()
    with pytest.raises((BadTarget, DeviceGone)):
        resume(tree, first)


def test_given_memory_is_adopted_with_its_pins_and_the_rest_is_left_over(
    killed: Predecessor, tree: PciTree, directory: Path
) -> None:
    first, one, other = killed(busy)
    backend = resume(tree, first)
    source = backend.memory()
    slabs = [source.adopt(duplicated(one)), source.adopt(duplicated(other))]
    assert [slab.addresses for slab in slabs] == [one.notes["addresses"], other.notes["addresses"]]
    assert source.held_bytes == source.pinned_bytes == 8 * PAGE
    (left,) = source.leftovers()
    with mmap.mmap(left.fd, 4 * PAGE) as view:
        assert set(view[:]) == {3}
    assert source.describe(slabs[0]).notes == one.notes
    fresh = source.take(PAGE)
    for memory in (*slabs, fresh, left):
        source.recycle(memory)
    assert source.pinned_bytes == 0
    assert not os.listdir(directory)
    backend.close()


def frames(notes: dict[str, list[int]]) -> set[int]:
    return {
        address + step
        for address, size in zip(notes["addresses"], notes["extents"][1::2], strict=True)
        for step in range(0, size, PAGE)
    }


def addresses(fd: int, size: int) -> set[int]:
    """Where the pages of a file are now, filled if they are missing."""
    mapping = Mapping(fd, size)
    mapping.array[:] = 9
    found = set(pagemap.physical(mapping.address, size).tolist())
    mapping.close()
    return found


def test_a_client_that_punches_its_memory_frees_no_frame_before_the_successor_does(
    killed: Predecessor, tree: PciTree
) -> None:
    """The pins are the ring's, and the ring was never closed."""
    first, one, _ = killed(busy)
    held = frames(dict(one.notes))
    client = one.fds["slab"]
    memfd.punch(client, 0, 4 * PAGE)
    backend = resume(tree, first)
    source = backend.memory()
    memory = source.adopt(duplicated(one))
    assert source.leftovers(), "the others are looked for, and pinned beside"
    fd = memfd.create("others", 4096 * PAGE)
    assert not held & (addresses(client, 4 * PAGE) | addresses(fd, 4096 * PAGE))
    os.close(fd)
    source.recycle(memory)
    backend.close()


def lose_the_holder(handover: Handover) -> None:
    """Kill the process that has the ring, and wait until it has let go of it."""
    assert pidfd.kill(handover.fds["holder"])
    assert pidfd.await_death(handover.fds["holder"], 10)


def test_memory_whose_pins_were_lost_is_pinned_again_where_it_was(
    killed: Predecessor, tree: PciTree, directory: Path
) -> None:
    first, one, other = killed(busy)
    lose_the_holder(first)
    backend = resume(tree, first)
    source = backend.memory()
    slabs = [source.adopt(duplicated(one)), source.adopt(duplicated(other))]
    assert [slab.addresses for slab in slabs] == [one.notes["addresses"], other.notes["addresses"]]
    assert source.pinned_bytes == 8 * PAGE
    assert backend.hand_over().fds["holder"] != first.fds["holder"]
    for memory in (*slabs, *source.leftovers()):
        source.recycle(memory)
    assert not os.listdir(directory)
    backend.close()


def test_memory_that_was_punched_while_nobody_pinned_it_is_an_error(
    killed: Predecessor, tree: PciTree
) -> None:
    first, one, other = killed(busy)
    lose_the_holder(first)
    memfd.punch(one.fds["slab"], 0, PAGE)
    while addresses(other.fds["slab"], 4 * PAGE) == frames(dict(other.notes)):
        memfd.punch(other.fds["slab"], 0, 4 * PAGE)  # whole again, but not where it was
    backend = resume(tree, first)
    for slab in (one, other):
        with pytest.raises(BadBuffer, match="nobody had it pinned"):
            backend.memory().adopt(duplicated(slab))
    assert backend.memory().held_bytes == backend.memory().pinned_bytes == 0
    backend.close()


def test_memory_is_adopted_only_as_it_was_described(killed: Predecessor, tree: PciTree) -> None:
    first, one, other = killed(busy)
    backend = resume(tree, first)
    source = backend.memory()
    changes: tuple[dict[str, object], ...] = (
        {"memory": "file"},
        {"name": "holdfast"},
        {"name": str(one.notes["name"]).replace(ADDRESS, "0000:00:04.0")},
        {"slots": [1, 2]},
        {"extents": []},
    )
    for change in changes:
        with pytest.raises(ProtocolError):
            source.adopt(Handover(duplicated(one).fds, {**one.notes, **change}))
    with pytest.raises(UsageError):
        source.adopt(Handover(duplicated(one).fds, {**one.notes, "slots": [1 << 20]}))
    assert source.held_bytes == source.pinned_bytes == 0
    source.recycle(source.adopt(duplicated(one)))
    source.leftovers()
    with pytest.raises(UsageError, match="leftovers"):
        source.adopt(duplicated(other))
    backend.close()


def test_a_slot_that_two_slabs_name_is_emptied_with_the_last_one(directory: Path) -> None:
    """Notes about a slab that was being given back may name a slot that is another one's by now."""
    fd = memfd.create("memory", PAGE)
    page = Mapping(fd, PAGE)
    first = PinTable(4)
    slot = first.pin(page.address, PAGE)
    second = PinTable.resume(os.dup(first.fd), 4)
    second.claim([(slot, PAGE)])
    second.claim([(slot, PAGE)])
    second.unpin(slot)
    assert second.pinned_bytes == PAGE
    second.sweep()
    frame = pagemap.physical(page.address, PAGE)[0]
    memfd.punch(fd, 0, PAGE)
    page.array[:] = 1
    assert pagemap.physical(page.address, PAGE)[0] != frame
    second.unpin(slot)
    with pytest.raises(UsageError):
        second.unpin(slot)
    second.close()
    first.close()
    page.close()
    os.close(fd)


def test_numbers_of_slots_come_back_late() -> None:
    fd = memfd.create("memory", PAGE)
    page = Mapping(fd, PAGE)
    try:
        pins = PinTable(8)
    except (NoPermission, NotSupported) as error:
        pytest.skip(error.what)
    seen = []
    for _ in range(8):
        seen.append(pins.pin(page.address, PAGE))
        pins.unpin(seen[-1])
    assert sorted(seen) == list(range(8))
    pins.close()
    page.close()
    os.close(fd)


def test_the_lock_ends_with_its_last_duplicate(killed: Predecessor, tree: PciTree) -> None:
    first, *_ = killed(busy)
    path = tree.here(ADDRESS) / "resource0"
    with path.open("r+b") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        resume(tree, first).close()
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_source_of_a_first_keeper_is_no_successors(directory: Path) -> None:
    source = PhysicalFiles(directory, TARGET.bdf)
    fd = memfd.create("slab", PAGE)
    with pytest.raises(ProtocolError):
        source.adopt(Handover({"slab": fd}, {"memory": "file", "size": PAGE}))
    source.close()
