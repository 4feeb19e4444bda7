# SPDX-License-Identifier: Apache-2.0
"""The server as a raw client sees it: every command, every refusal, and a hostile peer."""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.emu.function import BarSpec, Function, Identity
from holdfast.emu.server import Server
from holdfast.kernel import memfd
from holdfast.kernel.stream import Message, Stream
from holdfast.regs.spec import Bank, Mode, Register
from holdfast.uapi import vfio_user as u
from holdfast.uapi.vfio_user import Command
from holdfast.values import Area
from holdfast.wire.vfio_user import frame, messages
from holdfast.wire.vfio_user.capabilities import Capabilities, Version
from holdfast.wire.vfio_user.frame import MAX_DATA, Header

PAGE = 4096
BASE = 0x10_0000

VALUE = Register("value", 0x00)
BELL = Register("bell", 0x10)
RUNG = Register("rung", 0x14, Mode.RO)
BANK = Bank("toy", (VALUE, BELL, RUNG))
MASTER_ON = (4, 7, struct.pack("<H", 6))

EIGHT = Capabilities(max_msg_fds=8)

Job = Callable[["Toy"], None]


class Toy(Function):
    """A function whose engine does what a test tells it to."""

    identity = Identity(vendor=0x1234, device=0x0001)
    msi = 4
    has_reset = True

    def __init__(self) -> None:
        self.bars = (
            BarSpec(0, PAGE, banks=(BANK,)),
            BarSpec(2, 4 * PAGE, ram=(Area(0, PAGE), Area(2 * PAGE, PAGE))),
        )
        super().__init__()
        self.jobs: list[Job] = []
        self.resets = 0
        self.detached = 0
        self.bell = self.add_doorbell(BELL, 0, 7, self.on_bell)
        self.on_write(BELL, lambda _index, _value: self.on_bell(1))

    def on_bell(self, count: int) -> None:
        self.poke(RUNG, self.peek(RUNG) + count)

    def do(self, job: Job) -> None:
        self.jobs.append(job)
        self.wake()

    def work(self) -> float | None:
        if not self.jobs:
            return None
        self.jobs.pop(0)(self)
        return 0.0

    def reset(self) -> None:
        super().reset()
        self.resets += 1

    def detach(self) -> None:
        super().detach()
        self.detached += 1


def size_of(head: bytes) -> int:
    return Header.decode(head).size


class Raw:
    """A client that says exactly what it is told to say."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.stream = Stream(sock, size_of)
        self.ident = 100

    def send(
        self, command: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 0
    ) -> int:
        self.ident += 1
        self.stream.send(frame.message(self.ident, command, [payload], flags), fds)
        return self.ident

    def receive(self, timeout: float = 5.0) -> tuple[Header, bytes, list[int]]:
        got: Message = self.stream.receive(timeout)
        return Header.decode(got.data), got.data[16:], got.fds.take()

    def call(
        self, command: int, payload: bytes = b"", fds: tuple[int, ...] = ()
    ) -> tuple[int | None, bytes, list[int]]:
        """The reply to a command: errno or None, payload, descriptors."""
        ident = self.send(command, payload, fds)
        header, body, got = self.receive()
        assert (header.msg_id, header.command, header.is_reply) == (ident, command, True)
        return header.failure, body, got

    def ok(self, command: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        error, body, got = self.call(command, payload, fds)
        assert error is None, errno.errorcode[error]
        assert not got
        return body

    def refused(self, command: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> int:
        error, body, got = self.call(command, payload, fds)
        assert error is not None
        assert (body, got) == (b"", [])
        return error

    def hello(self, capabilities: Capabilities = EIGHT) -> Version:
        body = self.ok(Command.VERSION, Version(0, 1, capabilities).encode())
        return Version.decode(body)

    def read(self, region: int, offset: int, count: int) -> bytes:
        body = self.ok(Command.REGION_READ, u.REGION_ACCESS.pack(offset, region, count))
        assert body[:16] == u.REGION_ACCESS.pack(offset, region, count)
        return body[16:]

    def write(self, offset: int, region: int, data: bytes) -> None:
        head = u.REGION_ACCESS.pack(offset, region, len(data))
        assert self.ok(Command.REGION_WRITE, head + data) == head

    def map(self, iova: int, size: int, fd: int | None = None, offset: int = 0) -> None:
        fds = () if fd is None else (fd,)
        assert self.ok(Command.DMA_MAP, u.DMA_MAP.pack(32, 3, offset, iova, size), fds) == b""

    def answer(self, header: Header, payload: bytes) -> None:
        self.stream.send(frame.reply(header, [payload]))


class Setup:
    """A served toy and a raw client connected to it."""

    def __init__(self, capabilities: Capabilities | None = None) -> None:
        self.toy = Toy()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.server = (
            Server(self.toy)
            if capabilities is None
            else Server(self.toy, capabilities=capabilities)
        )
        self.thread = threading.Thread(target=self.server.serve_socket, args=(theirs,))
        self.thread.start()
        self.raw = Raw(ours)

    def close(self) -> None:
        self.raw.stream.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.toy.close()


@pytest.fixture
def setup(clean: None) -> Iterator[Setup]:
    setup = Setup()
    yield setup
    setup.close()


@pytest.fixture
def raw(setup: Setup) -> Raw:
    setup.raw.hello()
    return setup.raw


@pytest.fixture
def sealed(clean: None) -> Iterator[int]:
    fd = memfd.create("server", 16 * PAGE)
    yield fd
    os.close(fd)


def eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def count_of(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def irq_set(flags: int, index: int, start: int, count: int, data: bytes = b"") -> bytes:
    return u.IRQ_SET.pack(20 + len(data), flags, index, start, count) + data


# -- information ---------------------------------------------------------------------------------


def test_the_function_describes_itself(raw: Raw) -> None:
    body = raw.ok(Command.DEVICE_GET_INFO, u.DEVICE_INFO.pack(16, 0, 0, 0))
    assert u.DEVICE_INFO.unpack(body) == (16, 3, 9, 5)
    kinds = [
        u.IRQ_INFO.unpack(raw.ok(Command.DEVICE_GET_IRQ_INFO, u.IRQ_INFO.pack(16, 0, i, 0)))[1:]
        for i in range(5)
    ]
    assert kinds == [(7, 0, 1), (9, 1, 4), (9, 2, 0), (9, 3, 0), (9, 4, 0)]
    assert raw.refused(Command.DEVICE_GET_IRQ_INFO, u.IRQ_INFO.pack(16, 0, 5, 0)) == errno.EINVAL


def test_a_mappable_region_is_told_in_two_steps_with_one_descriptor(raw: Raw) -> None:
    ask = u.REGION_INFO.pack(32, 0, 2, 0, 0, 0)
    error, body, fds = raw.call(Command.DEVICE_GET_REGION_INFO, ask)
    assert (error, fds) == (None, [])
    argsz, flags, index, cap, size, _ = u.REGION_INFO.unpack(body)
    assert (argsz, flags, index, cap, size) == (80, 7, 2, 0, 4 * PAGE)
    ask = u.REGION_INFO.pack(argsz, 0, 2, 0, 0, 0)
    error, body, fds = raw.call(Command.DEVICE_GET_REGION_INFO, ask)
    info = messages.RegionInfo.decode(body)
    assert info.areas == (Area(0, PAGE), Area(2 * PAGE, PAGE))
    assert len(fds) == 1
    os.pwrite(fds[0], b"through the mapping", info.offset + 2 * PAGE)
    assert raw.read(2, 2 * PAGE, 19) == b"through the mapping"
    os.close(fds[0])


def test_regions_that_are_missing_have_no_size_and_beyond_nine_there_are_none(raw: Raw) -> None:
    body = raw.ok(Command.DEVICE_GET_REGION_INFO, u.REGION_INFO.pack(32, 0, 8, 0, 0, 0))
    assert u.REGION_INFO.unpack(body) == (32, 0, 8, 0, 0, 0)
    for index in (9, 1 << 31):
        ask = u.REGION_INFO.pack(32, 0, index, 0, 0, 0)
        assert raw.refused(Command.DEVICE_GET_REGION_INFO, ask) == errno.EINVAL


# -- access --------------------------------------------------------------------------------------


def test_registers_are_read_and_written(raw: Raw) -> None:
    raw.write(0, 0, b"\x12\x34\x56\x78")
    assert raw.read(0, 0, 4) == b"\x12\x34\x56\x78"
    assert raw.read(7, 0, 4) == bytes.fromhex("34120100")
    assert len(raw.read(7, 0, 256)) == 256
    assert raw.read(0, 0, 0) == b""


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [(0, PAGE, 1), (0, PAGE - 1, 2), (1, 0, 1), (9, 0, 1), (0, (1 << 64) - 1, 2), (7, 256, 1)],
)
def test_accesses_out_of_range_are_refused(raw: Raw, region: int, offset: int, count: int) -> None:
    head = u.REGION_ACCESS.pack(offset, region, count)
    assert raw.refused(Command.REGION_READ, head) == errno.EINVAL
    assert raw.refused(Command.REGION_WRITE, head + bytes(count)) == errno.EINVAL


def test_posted_writes_are_not_answered_and_come_before_later_commands(raw: Raw) -> None:
    head = u.REGION_ACCESS.pack(0, 0, 4)
    for value in range(50):
        raw.send(Command.REGION_WRITE, head + value.to_bytes(4, "little"), flags=u.NO_REPLY)
    raw.send(Command.REGION_WRITE, u.REGION_ACCESS.pack(0, 99, 4) + b"oops", flags=u.NO_REPLY)
    assert raw.read(0, 0, 4) == (49).to_bytes(4, "little")


def test_many_writes_in_one_message_are_done_in_order_up_to_a_bad_one(raw: Raw) -> None:
    def batch(*rows: tuple[int, int, bytes]) -> bytes:
        return messages.WriteMulti(
            tuple(messages.RegionAccess(at, index, len(data), data) for index, at, data in rows)
        ).encode()

    good = [(0, 0, value.to_bytes(4, "little")) for value in range(200)]
    assert raw.ok(Command.REGION_WRITE_MULTI, batch(*good)) == u.WRITE_MULTI.pack(200)
    assert raw.read(0, 0, 4) == (199).to_bytes(4, "little")
    part = batch((0, 0, b"\1\0\0\0"), (9, 0, b"\2"), (0, 0, b"\3\0\0\0"))
    assert raw.ok(Command.REGION_WRITE_MULTI, part) == u.WRITE_MULTI.pack(1)
    assert raw.read(0, 0, 4) == b"\1\0\0\0"
    assert raw.refused(Command.REGION_WRITE_MULTI, batch((9, 0, b"\2"))) == errno.EINVAL
    raw.send(Command.REGION_WRITE_MULTI, batch((0, 0, b"\7\0\0\0")), flags=u.NO_REPLY)
    assert raw.read(0, 0, 4) == b"\7\0\0\0"


def test_commands_that_are_pipelined_are_answered_in_order(raw: Raw, sealed: int) -> None:
    sent = []
    for page in range(30):
        sent.append(
            raw.send(Command.DMA_MAP, u.DMA_MAP.pack(32, 3, 0, page * PAGE, PAGE), (sealed,))
        )
        sent.append(raw.send(Command.DMA_UNMAP, u.DMA_UNMAP.pack(24, 0, page * PAGE, PAGE)))
    answers = [raw.receive()[0] for _ in sent]
    assert [header.msg_id for header in answers] == sent
    assert all(header.failure is None for header in answers)


@pytest.mark.parametrize("command", [0, 14, 16, 17, 18, 11, 12, 77, 0xFFFF])
def test_unknown_commands_are_refused_and_the_connection_lives(raw: Raw, command: int) -> None:
    assert raw.refused(command, bytes(64)) == errno.EINVAL
    assert raw.read(7, 0, 2) == b"\x34\x12"


# -- DMA -----------------------------------------------------------------------------------------


def run_job(toy: Toy, job: Job) -> Callable[[], None]:
    """Start a job on the engine thread; call the result to wait for it (and see its error)."""
    done = threading.Event()
    failures: list[BaseException] = []

    def guarded(inner: Toy) -> None:
        try:
            job(inner)
        except Exception as error:  # noqa: BLE001
            failures.append(error)
        done.set()

    def wait() -> None:
        assert done.wait(10)
        if failures:
            raise failures[0]

    toy.do(guarded)
    return wait


def test_dma_goes_straight_into_a_file_that_was_passed(raw: Raw, setup: Setup, sealed: int) -> None:
    raw.write(*MASTER_ON)
    raw.map(BASE, 4 * PAGE, sealed, 100)
    run_job(setup.toy, lambda toy: toy.dma.write(BASE + 5, np.arange(50, dtype=np.uint8)))()
    assert os.pread(sealed, 50, 105) == bytes(range(50))


def test_message_dma_is_split_and_interleaves_with_region_access(raw: Raw, setup: Setup) -> None:
    raw.write(*MASTER_ON)
    raw.map(BASE, 1 << 20)
    data = (np.arange(300_000) % 253).astype(np.uint8)
    wait = run_job(setup.toy, lambda toy: toy.dma.write(BASE, data))
    got = bytearray()
    while len(got) < data.size:
        header, body, _ = raw.receive()
        assert (header.command, header.is_reply) == (Command.DMA_WRITE, False)
        address, count = u.DMA_ACCESS.unpack_from(body)
        assert address == BASE + len(got)
        assert count <= MAX_DATA
        got += body[16:]
        assert raw.read(7, 0, 2) == b"\x34\x12", "registers work while DMA is unanswered"
        raw.answer(header, body[:16])
    wait()
    assert got == data.tobytes()


def test_message_dma_obeys_a_small_limit_of_the_client(setup: Setup) -> None:
    raw = setup.raw
    raw.hello(Capabilities(max_data_xfer_size=1024))
    raw.write(*MASTER_ON)
    raw.map(BASE, 1 << 20)
    local = np.zeros(2500, np.uint8)
    wait = run_job(setup.toy, lambda toy: toy.dma.read(BASE, local))
    for expected in (1024, 1024, 452):
        header, body, _ = raw.receive()
        address, count = u.DMA_ACCESS.unpack(body)
        assert count == expected
        raw.answer(header, body + bytes([address & 0xFF] * count))
    wait()
    assert local[-1] == (BASE + 2048) & 0xFF


def test_an_unmap_during_message_dma_is_answered_after_the_message(raw: Raw, setup: Setup) -> None:
    raw.write(*MASTER_ON)
    raw.map(BASE, 1 << 20)
    wait = run_job(setup.toy, lambda toy: toy.dma.write(BASE, np.zeros(3 * MAX_DATA, np.uint8)))
    header, body, _ = raw.receive()
    unmap = raw.send(Command.DMA_UNMAP, u.DMA_UNMAP.pack(24, 0, BASE, 1 << 20))
    later = raw.send(Command.REGION_READ, u.REGION_ACCESS.pack(0, 7, 2))
    refused = raw.send(9999)
    assert not select.select([raw.sock], [], [], 0.05)[0], "nothing may overtake the unmap"
    raw.answer(header, body[:16])
    with pytest.raises(Exception, match="unmapped during the access"):
        wait()
    order = [raw.receive()[0] for _ in range(3)]
    assert [reply.msg_id for reply in order] == [unmap, later, refused]
    assert [reply.failure for reply in order] == [None, None, errno.EINVAL]


def test_a_reset_ends_message_dma_without_an_answer_to_it(raw: Raw, setup: Setup) -> None:
    raw.write(*MASTER_ON)
    raw.map(BASE, 1 << 20)
    wait = run_job(setup.toy, lambda toy: toy.dma.write(BASE, np.zeros(3 * MAX_DATA, np.uint8)))
    header, body, _ = raw.receive()
    assert raw.ok(Command.DEVICE_RESET) == b""
    with pytest.raises(Exception, match="cut short"):
        wait()
    raw.answer(header, body[:16])
    assert raw.read(7, 0, 2) == b"\x34\x12", "the late answer is dropped"
    assert setup.toy.resets == 1


def test_a_client_that_leaves_during_message_dma_faults_it(clean: None) -> None:
    setup = Setup()
    setup.raw.hello()
    setup.raw.write(*MASTER_ON)
    setup.raw.map(BASE, PAGE)
    wait = run_job(setup.toy, lambda toy: toy.dma.write(BASE, np.zeros(8, np.uint8)))
    setup.raw.receive()
    setup.close()
    with pytest.raises(Exception, match="dma write"):
        wait()
    assert setup.toy.detached == 1


def test_only_exact_maps_are_unmapped_and_unmap_all_takes_every_one(raw: Raw, sealed: int) -> None:
    raw.map(BASE, 4 * PAGE, sealed)
    raw.map(BASE + 4 * PAGE, PAGE)

    def unmap(iova: int, size: int, flags: int = 0) -> bytes:
        return u.DMA_UNMAP.pack(24, flags, iova, size)

    assert raw.refused(Command.DMA_UNMAP, unmap(BASE, PAGE)) == errno.ENOENT
    assert raw.refused(Command.DMA_UNMAP, unmap(0, 0)) == errno.ENOENT
    again = u.DMA_MAP.pack(32, 3, 0, BASE + PAGE, PAGE)
    assert raw.refused(Command.DMA_MAP, again, (sealed,)) == errno.EEXIST
    assert raw.ok(Command.DMA_UNMAP, unmap(BASE, 4 * PAGE)) == unmap(BASE, 4 * PAGE)
    everything = unmap(0, 0, u.UNMAP_ALL)
    assert raw.ok(Command.DMA_UNMAP, everything) == everything
    assert raw.refused(Command.DMA_UNMAP, unmap(BASE + 4 * PAGE, PAGE)) == errno.ENOENT


# -- interrupts ----------------------------------------------------------------------------------


def test_vectors_are_connected_triggered_masked_and_disconnected(raw: Raw) -> None:
    fds = [eventfd() for _ in range(4)]
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x24, 1, 0, 4), tuple(fds))
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x21, 1, 1, 2))
    assert [count_of(fd) for fd in fds] == [0, 1, 1, 0]
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x22, 1, 0, 4, b"\1\0\0\5"))
    assert [count_of(fd) for fd in fds] == [1, 0, 0, 1]
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x0A, 1, 0, 2, b"\1\0"))
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x21, 1, 0, 2))
    assert [count_of(fd) for fd in fds] == [0, 1, 0, 0]
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x11, 1, 0, 1))
    assert count_of(fds[0]) == 1, "what was pending while masked comes now"
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x24, 1, 3, 1))
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x21, 1, 0, 4))
    assert [count_of(fd) for fd in fds] == [1, 1, 1, 0]
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x21, 1, 0, 0))
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x21, 1, 0, 4))
    assert [count_of(fd) for fd in fds] == [0, 0, 0, 0]
    for fd in fds:
        os.close(fd)


def test_intx_masks_itself_and_comes_again_only_while_asserted(raw: Raw, setup: Setup) -> None:
    fd = eventfd()
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x24, 0, 0, 1), (fd,))
    setup.toy.interrupt()
    setup.toy.deassert()
    setup.toy.interrupt()
    assert count_of(fd) == 1
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x11, 0, 0, 1))
    assert count_of(fd) == 1, "still asserted"
    setup.toy.deassert()
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x11, 0, 0, 1))
    assert count_of(fd) == 0
    setup.toy.interrupt()
    assert count_of(fd) == 1
    os.close(fd)


def test_a_full_or_blocking_eventfd_never_blocks_the_server(raw: Raw) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(fd, (1 << 64) - 2)
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x24, 1, 0, 1), (fd,))
    raw.ok(Command.DEVICE_SET_IRQS, irq_set(0x21, 1, 0, 1))
    assert raw.read(7, 0, 2) == b"\x34\x12"
    os.close(fd)


@pytest.mark.parametrize(
    ("payload", "fds"),
    [
        (irq_set(0x24, 5, 0, 1), 0),
        (irq_set(0x24, 1, 4, 1), 0),
        (irq_set(0x24, 1, 1, 4), 4),
        (irq_set(0x24, 1, 0xFFFFFFFF, 1), 1),
        (irq_set(0x24, 2, 0, 1), 1),
        (irq_set(0x24, 1, 0, 2), 1),
        (irq_set(0x21, 1, 0, 1), 1),
        (irq_set(0x0C, 0, 0, 1), 1),
        (irq_set(0x14, 0, 0, 1), 1),
        (irq_set(0x09, 3, 0, 1), 0),
        (irq_set(0x31, 1, 0, 1), 0),
    ],
)
def test_interrupt_settings_that_make_no_sense_are_refused(
    raw: Raw, payload: bytes, fds: int
) -> None:
    mine = [eventfd() for _ in range(fds)]
    assert raw.refused(Command.DEVICE_SET_IRQS, payload, tuple(mine)) == errno.EINVAL
    for fd in mine:
        os.close(fd)


def test_only_eventfds_are_taken_for_interrupts(raw: Raw) -> None:
    reading, writing = os.pipe()
    assert raw.refused(Command.DEVICE_SET_IRQS, irq_set(0x24, 1, 0, 1), (writing,)) == errno.EINVAL
    os.close(writing)
    assert os.read(reading, 1) == b"", "the server kept no copy"
    os.close(reading)


# -- doorbells -----------------------------------------------------------------------------------


def bell_of(raw: Raw) -> int:
    error, body, fds = raw.call(Command.DEVICE_GET_REGION_IO_FDS, u.IO_FDS.pack(16, 0, 0, 0))
    assert (error, fds) == (None, [])
    argsz, _, _, count = u.IO_FDS.unpack(body)
    assert (argsz, count) == (56, 1)
    error, body, fds = raw.call(Command.DEVICE_GET_REGION_IO_FDS, u.IO_FDS.pack(56, 0, 0, 0))
    assert u.IO_FD_ENTRY.unpack(body[16:]) == (0x10, 4, 0, 0, u.IOEVENTFD_DATAMATCH, 0, 7)
    assert len(fds) == 1
    return fds[0]


def test_a_doorbell_rung_before_a_read_is_seen_by_it(raw: Raw) -> None:
    bell = bell_of(raw)
    total = 0
    for count in range(1, 60):
        os.eventfd_write(bell, count)
        total += count
        assert raw.read(0, 0x14, 4) == total.to_bytes(4, "little")
    os.close(bell)


def test_a_doorbell_alone_wakes_the_server(raw: Raw, setup: Setup) -> None:
    bell = bell_of(raw)
    rung = threading.Event()
    setup.toy._bells[0].handler = lambda _count: rung.set()
    os.eventfd_write(bell, 1)
    assert rung.wait(5)
    os.close(bell)


def test_renewed_doorbells_leave_the_old_ones_dead(raw: Raw, setup: Setup) -> None:
    old = bell_of(raw)
    setup.toy.renew_doorbells([setup.toy.bell])
    os.eventfd_write(old, 5)
    assert raw.read(0, 0x14, 4) == bytes(4)
    new = bell_of(raw)
    os.eventfd_write(new, 2)
    assert raw.read(0, 0x14, 4) == b"\2\0\0\0"
    os.close(old)
    os.close(new)


def test_a_client_that_clears_nonblock_on_a_doorbell_stops_nobody(raw: Raw) -> None:
    bell = bell_of(raw)
    os.set_blocking(bell, True)
    for _ in range(20):
        os.eventfd_write(bell, 1)
        count_of_blocking(bell)
        assert len(raw.read(0, 0x14, 4)) == 4
    os.close(bell)


def count_of_blocking(fd: int) -> None:
    """Steal the count, if it is still there, from under the server."""
    if select.select([fd], [], [], 0)[0]:
        try:
            os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            pass


# -- twin socket ---------------------------------------------------------------------------------


def test_with_a_twin_dma_travels_there(clean: None) -> None:
    setup = Setup(Capabilities(max_msg_fds=16, max_data_xfer_size=MAX_DATA, twin_socket=True))
    raw = setup.raw
    hello = Version(0, 1, Capabilities(max_msg_fds=8, twin_socket=True)).encode()
    error, body, fds = raw.call(Command.VERSION, hello)
    assert error is None
    assert Version.decode(body).capabilities.twin_fd_index == 0
    twin = Raw(socket.socket(fileno=fds[0]))
    raw.write(*MASTER_ON)
    raw.map(BASE, PAGE)
    wait = run_job(setup.toy, lambda toy: toy.dma.write(BASE, np.ones(8, np.uint8)))
    header, body, _ = twin.receive()
    assert header.command == Command.DMA_WRITE
    twin.answer(header, body[:16])
    wait()
    twin.stream.close()
    setup.close()


# -- life ----------------------------------------------------------------------------------------


def test_stop_ends_the_server_in_the_middle_of_a_message(clean: None) -> None:
    setup = Setup()
    setup.raw.hello()
    setup.raw.sock.send(Header(1, Command.REGION_READ, 32).encode()[:9])
    setup.server.stop()
    setup.thread.join(5)
    assert not setup.thread.is_alive()
    setup.close()


def test_stop_ends_the_server_while_a_client_does_not_read(clean: None) -> None:
    setup = Setup()
    setup.raw.hello()
    head = u.REGION_ACCESS.pack(0, 2, 4 * PAGE)
    for _ in range(200):
        setup.raw.send(Command.REGION_READ, head)
    setup.server.stop()
    setup.thread.join(5)
    assert not setup.thread.is_alive()
    setup.close()


def test_a_failure_of_the_engine_ends_the_server_and_is_raised(clean: None) -> None:
    toy = Toy()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    raised: list[BaseException] = []

    def serve() -> None:
        try:
            Server(toy).serve_socket(theirs)
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    raw = Raw(ours)
    raw.hello()

    def fail(_: Toy) -> None:
        raise RuntimeError("a bug in the function")

    toy.do(fail)
    thread.join(5)
    assert [str(error) for error in raised] == ["a bug in the function"]
    raw.stream.close()
    toy.close()


# -- hostile -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        Header(1, Command.DEVICE_GET_INFO, 32).encode() + bytes(16),
        Header(1, Command.VERSION, 16).encode(),
        Header(1, Command.VERSION, 23).encode() + u.VERSION.pack(9, 0) + b"{}\0",
        Header(1, Command.VERSION, 22).encode() + u.VERSION.pack(0, 0) + b"{}",
    ],
)
def test_a_failed_negotiation_gets_an_error_reply_and_the_end(first: bytes, clean: None) -> None:
    setup = Setup()
    setup.raw.sock.send(first)
    header, _, _ = setup.raw.receive()
    assert header.failure == errno.EINVAL
    with pytest.raises(ConnectionError):
        setup.raw.receive()
    setup.close()


@pytest.mark.parametrize("size", [0, 15, frame.MAX_MESSAGE + 1, 0xFFFFFFFF])
def test_a_size_that_breaks_the_framing_ends_the_connection(size: int, clean: None) -> None:
    setup = Setup()
    setup.raw.hello()
    setup.raw.sock.send(u.HEADER.pack(1, Command.REGION_READ, size, 0, 0))
    with pytest.raises(ConnectionError):
        setup.raw.receive()
    setup.close()


def test_too_much_behind_a_waiting_command_ends_the_connection(clean: None) -> None:
    setup = Setup()
    raw = setup.raw
    raw.hello()
    raw.write(*MASTER_ON)
    raw.map(BASE, PAGE)
    wait = run_job(setup.toy, lambda toy: toy.dma.write(BASE, np.zeros(8, np.uint8)))
    raw.receive()
    raw.send(Command.DMA_UNMAP, u.DMA_UNMAP.pack(24, 0, BASE, PAGE))
    raw.sock.sendall(Header(1, Command.DEVICE_RESET, 16).encode() * 10_000)
    with pytest.raises(ConnectionError):
        raw.receive()
    with pytest.raises(Exception, match="dma write"):
        wait()
    setup.close()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 20),
            st.binary(max_size=80),
            st.sampled_from([0, 0, 0, 1, 0x10, 0x21, 5]),
            st.integers(0, 3),
            st.integers(-20, 20),
        ),
        max_size=15,
    ),
    st.booleans(),
)
def test_random_messages_never_crash_hang_or_leak(
    rows: list[tuple[int, bytes, int, int, int]], greet: bool
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    setup = Setup()
    pipe = [*os.pipe(), eventfd()]
    try:
        if greet:
            setup.raw.hello()
        for command, payload, flags, fds, lie in rows:
            size = max(0, 16 + len(payload) + (lie if abs(lie) > 15 else 0))
            data = u.HEADER.pack(1, command, size, flags, 0) + payload
            rights = array.array("i", pipe[:fds])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
            setup.raw.sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
    except OSError:
        pass
    finally:
        setup.close()
        for fd in pipe:
            os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
