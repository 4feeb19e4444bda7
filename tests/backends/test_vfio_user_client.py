# SPDX-License-Identifier: Apache-2.0
"""The vfio-user client: with a real server, and with servers that misbehave."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.backends.vfio_user import VfioUserBackend
from holdfast.emu.function import BarSpec, Function, Identity
from holdfast.emu.server import Server
from holdfast.errors import (
    BadAccess,
    Closed,
    DeviceGone,
    HoldfastError,
    ProtocolError,
    RemoteError,
)
from holdfast.kernel import memfd
from holdfast.kernel.mapping import Mapping
from holdfast.kernel.stream import Stream
from holdfast.regs.spec import Bank, Register
from holdfast.uapi import vfio_user as u
from holdfast.uapi.vfio_user import Command
from holdfast.values import CONFIG_REGION, Area, Handover, Iova, IrqIndex, Perm
from holdfast.wire.vfio_user import frame, messages
from holdfast.wire.vfio_user.capabilities import CLIENT, SERVER, Capabilities, Version
from holdfast.wire.vfio_user.frame import MAX_DATA, Header

PAGE = 4096
BASE = Iova(0x10_0000)
BAR_SIZE = 512 * 1024
VALUE = Register("value", 0x00)
BELL = Register("bell", 0x08, count=2, stride=4)
BANK = Bank("toy", (VALUE, BELL))


class Toy(Function):
    """A function whose engine does what a test tells it to."""

    identity = Identity(vendor=0x1234, device=0x0002)
    msi = 32
    has_reset = True

    def __init__(self) -> None:
        self.bars = (
            BarSpec(0, PAGE, banks=(BANK,)),
            BarSpec(2, BAR_SIZE, ram=(Area(PAGE, BAR_SIZE - PAGE),)),
        )
        super().__init__()
        self.rings = [0, 0]
        for index in range(2):
            self.add_doorbell(BELL, index, None, partial(self._ring, index))
        self._job: Callable[[], None] | None = None
        self._error: BaseException | None = None
        self._done = threading.Event()

    def _ring(self, index: int, count: int) -> None:
        self.rings[index] += count

    def dma_read(self, iova: int, into: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        self.dma.read(iova, into)

    def run(self, job: Callable[[], None]) -> None:
        """Do ``job`` on the engine thread; raises what it raised."""
        self._done.clear()
        self._job = job
        self.wake()
        assert self._done.wait(10)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def work(self) -> float | None:
        job, self._job = self._job, None
        if job is not None:
            try:
                job()
            except HoldfastError as error:
                self._error = error
            self._done.set()
        return None


class Rig:
    """A toy function, its server and a backend, all in this process."""

    def __init__(self, client: Capabilities = CLIENT, server: Capabilities = SERVER) -> None:
        self.toy = Toy()
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.server = Server(self.toy, capabilities=server)
        self.thread = threading.Thread(target=self.server.serve_socket, args=(theirs,))
        self.thread.start()
        self.backend = VfioUserBackend(self.ours, capabilities=client)
        self.backend.region_write(CONFIG_REGION, 4, b"\x06\x00")

    def close(self) -> None:
        self.backend.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.toy.close()


@pytest.fixture
def rig(clean: None) -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


class Ram:
    """Host memory by message, that counts."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.calls = 0

    def read(self, offset: int, count: int) -> bytes:
        self.calls += 1
        return bytes(self.content[offset : offset + count])

    def write(self, offset: int, data: memoryview) -> None:
        self.calls += 1
        self.content[offset : offset + len(data)] = data


def duplicated(handover: Handover) -> Handover:
    """What an anchor would hold of it."""
    return Handover({name: os.dup(fd) for name, fd in handover.fds.items()}, handover.notes)


def ramp(count: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return (np.arange(count) % 251).astype(np.uint8)


# -- with a real server --------------------------------------------------------------------------


def test_large_accesses_are_split_and_put_together(rig: Rig) -> None:
    data = ramp(BAR_SIZE - PAGE).tobytes()
    rig.backend.region_write(2, PAGE, data)
    assert rig.backend.region_read(2, PAGE, len(data)) == data
    assert len(data) > MAX_DATA


def test_a_mapped_area_and_messages_show_the_same_bytes(rig: Rig) -> None:
    found = rig.backend.region_map(2)
    assert found is not None
    (area,) = found.region.areas
    assert area == Area(PAGE, BAR_SIZE - PAGE)
    mapping = Mapping(found.fd, area.size, offset=found.region.file_offset + area.offset)
    mapping.store(8, 8, 0x1122334455667788)
    assert rig.backend.region_read(2, PAGE + 8, 8) == struct.pack("<Q", 0x1122334455667788)
    rig.backend.region_write(2, PAGE + 16, b"\x99\0\0\0")
    assert mapping.load(16, 4) == 0x99
    mapping.close()


def test_many_small_writes_go_in_one_message(rig: Rig) -> None:
    writes = [(0, 0, value.to_bytes(4, "little")) for value in range(450)]
    rig.backend.region_write_multi(writes)
    assert rig.backend.region_read(0, 0, 4) == (449).to_bytes(4, "little")
    with pytest.raises(BadAccess):
        rig.backend.region_write_multi([(0, 0, bytes(9))])
    with pytest.raises(BadAccess):
        rig.backend.region_write_multi([(0, PAGE, b"x")])


def test_many_small_reads_are_pipelined_and_come_in_order(rig: Rig) -> None:
    data = ramp(2048).tobytes()
    rig.backend.region_write(2, PAGE, data)
    reads = [(2, PAGE + at, 8) for at in range(0, 2048, 8)]
    assert b"".join(rig.backend.region_read_multi(reads)) == data
    with pytest.raises(BadAccess):
        rig.backend.region_read_multi([(2, PAGE, 9)])


def test_without_write_multiple_they_go_one_by_one(clean: None) -> None:
    rig = Rig(server=Capabilities(max_msg_fds=1))
    rig.backend.region_write_multi([(0, 0, b"\1\0\0\0"), (0, 0, b"\2\0\0\0")])
    assert rig.backend.region_read(0, 0, 4) == b"\2\0\0\0"
    rig.close()


@pytest.mark.parametrize("most", [1, 5, 16])
def test_vectors_are_wired_in_batches_that_the_server_takes(most: int, clean: None) -> None:
    rig = Rig(server=Capabilities(max_msg_fds=most))
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(32)]
    rig.backend.set_irqs(IrqIndex.MSI, 0, fds)
    for vector in range(32):
        rig.toy.interrupt(vector)
    assert [os.eventfd_read(fd) for fd in fds] == [1] * 32
    rig.backend.set_irqs(IrqIndex.MSI, 0, [])
    rig.close()
    for fd in fds:
        os.close(fd)


def test_intx_comes_again_after_it_was_unmasked(rig: Rig) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    rig.backend.set_irqs(IrqIndex.INTX, 0, [fd])
    rig.toy.interrupt()
    assert os.eventfd_read(fd) == 1
    rig.backend.unmask_intx()
    assert os.eventfd_read(fd) == 1
    os.close(fd)


def test_doorbells_ring_without_a_message(rig: Rig) -> None:
    bells = rig.backend.doorbells(0)
    assert [(bell.info.offset, bell.info.value) for bell in bells] == [(8, None), (12, None)]
    os.eventfd_write(bells[1].fd, 3)
    os.eventfd_write(bells[0].fd, 1)
    rig.backend.region_read(0, 0, 4)
    assert rig.toy.rings == [1, 3]
    for bell in bells:
        os.close(bell.fd)
    assert rig.backend.doorbells(2) == []
    with pytest.raises(BadAccess):
        rig.backend.doorbells(9)


def test_dma_reaches_files_directly_and_memory_by_message(rig: Rig) -> None:
    fd = memfd.create("dma", 4 * PAGE)
    ram = Ram(1 << 20)
    rig.backend.dma_map(BASE, 4 * PAGE, Perm.RW, fd, 0)
    rig.backend.dma_map_memory(BASE + 4 * PAGE, 1 << 20, Perm.RW, ram)
    data = ramp(300_000)
    # One access through both windows.
    rig.toy.run(lambda: rig.toy.dma.write(BASE, data))
    assert os.pread(fd, 4 * PAGE, 0) == data[: 4 * PAGE].tobytes()
    assert bytes(ram.content[: data.size - 4 * PAGE]) == data[4 * PAGE :].tobytes()
    back = np.zeros(300_000, np.uint8)
    rig.toy.run(lambda: rig.toy.dma.read(BASE, back))
    assert np.array_equal(back, data)
    assert rig.backend.dma_unmap(BASE, 4 * PAGE) == 4 * PAGE
    assert rig.backend.dma_unmap(BASE + 4 * PAGE, 1 << 20) == 1 << 20
    with pytest.raises(HoldfastError, match="not mapped"):
        rig.toy.run(lambda: rig.toy.dma.write(BASE + 4 * PAGE, data))
    os.close(fd)


def test_memory_is_served_only_as_it_was_mapped(rig: Rig) -> None:
    ram = Ram(PAGE)
    rig.backend.dma_map_memory(BASE, PAGE, Perm.READ, ram)
    with pytest.raises(HoldfastError, match="permission"):
        rig.toy.run(lambda: rig.toy.dma.write(BASE, ramp(4)))
    assert ram.calls == 0


def test_memory_that_fails_is_a_dma_fault_and_nothing_more(rig: Rig) -> None:
    class Broken(Ram):
        def read(self, offset: int, count: int) -> bytes:
            raise OSError(errno.EIO, "the process is gone")

        def write(self, offset: int, data: memoryview) -> None:
            raise OSError(errno.EIO, "the process is gone")

    class Short(Ram):
        def read(self, offset: int, count: int) -> bytes:
            return b""

    rig.backend.dma_map_memory(BASE, PAGE, Perm.RW, Broken(PAGE))
    rig.backend.dma_map_memory(BASE + PAGE, PAGE, Perm.RW, Short(PAGE))
    for iova in (BASE, BASE + PAGE):
        with pytest.raises(HoldfastError, match="refused"):
            rig.toy.run(partial(rig.toy.dma_read, iova, np.zeros(4, np.uint8)))
    with pytest.raises(HoldfastError, match="refused"):
        rig.toy.run(lambda: rig.toy.dma.write(BASE, ramp(4)))
    assert rig.backend.region_read(CONFIG_REGION, 0, 2) == b"\x34\x12"


def test_message_dma_and_register_access_from_several_threads(rig: Rig) -> None:
    ram = Ram(1 << 20)
    rig.backend.dma_map_memory(BASE, 1 << 20, Perm.RW, ram)
    failures: list[BaseException] = []
    stop = threading.Event()

    def poke(index: int) -> None:
        try:
            while not stop.is_set():
                value = ramp(40_000 + index).tobytes()
                rig.backend.region_write(2, PAGE + index * 65536, value)
                assert rig.backend.region_read(2, PAGE + index * 65536, len(value)) == value
                assert rig.backend.region_read(CONFIG_REGION, 0, 2) == b"\x34\x12"
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=poke, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    data = ramp(1 << 20)
    for _ in range(3):
        rig.toy.run(lambda: rig.toy.dma.write(BASE, data))
        back = np.zeros(1 << 20, np.uint8)
        rig.toy.run(partial(rig.toy.dma_read, BASE, back))
        assert np.array_equal(back, data)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_dma_over_the_twin_socket(clean: None) -> None:
    both = Capabilities(max_msg_fds=8, max_data_xfer_size=MAX_DATA, twin_socket=True)
    rig = Rig(both, both)
    ram = Ram(PAGE)
    rig.backend.dma_map_memory(BASE, PAGE, Perm.RW, ram)
    rig.toy.run(lambda: rig.toy.dma.write(BASE, ramp(100)))
    assert bytes(ram.content[:100]) == ramp(100).tobytes()
    rig.close()


def test_a_refusal_carries_the_errno_of_the_function(rig: Rig) -> None:
    with pytest.raises(RemoteError) as caught:
        rig.backend.dma_unmap(BASE, PAGE)
    assert caught.value.errno == errno.ENOENT


def test_a_successor_goes_on_with_the_same_socket(rig: Rig) -> None:
    """The predecessor is killed with requests unanswered."""
    fd = memfd.create("dma", PAGE)
    ram = Ram(PAGE)
    rig.backend.dma_map(BASE, PAGE, Perm.RW, fd, 0)
    rig.backend.dma_map_memory(BASE + PAGE, PAGE, Perm.RW, Ram(PAGE))
    kept = duplicated(rig.backend.hand_over())
    rig.backend.close()
    for ident in (1, 2, 3):  # as if sent just before the end, replies never read
        payload = u.REGION_ACCESS.pack(0, 7, 4)
        whole = b"".join(frame.message(ident, Command.REGION_READ, [payload]))
        os.write(kept.fds["socket"], whole)
    rig.backend = VfioUserBackend.resume(kept, memories=[(BASE + PAGE, PAGE, Perm.RW, ram)])
    assert rig.backend.region_read(CONFIG_REGION, 0, 2) == b"\x34\x12"
    rig.toy.run(lambda: rig.toy.dma.write(BASE + PAGE - 4, ramp(8)))
    assert os.pread(fd, 4, PAGE - 4) + bytes(ram.content[:4]) == ramp(8).tobytes()
    assert rig.backend.dma_unmap(BASE, PAGE) == PAGE
    os.close(fd)


def test_the_end_of_the_server_is_told_once_and_to_everybody(clean: None) -> None:
    rig = Rig()
    told: list[int] = []
    gone = threading.Event()

    def on_gone() -> None:
        told.append(1)
        gone.set()

    rig.backend.on_gone = on_gone
    rig.server.stop()
    assert gone.wait(5)
    for _ in range(3):
        with pytest.raises(DeviceGone, match="hung up"):
            rig.backend.region_read(CONFIG_REGION, 0, 2)
    rig.close()
    assert told == [1]
    with pytest.raises(Closed):
        rig.backend.region_read(CONFIG_REGION, 0, 2)


def test_whoever_asks_late_is_still_told_that_the_function_is_gone(clean: None) -> None:
    rig = Rig()
    rig.server.stop()
    rig.thread.join()
    with pytest.raises(DeviceGone):
        rig.backend.reset()
    told = threading.Event()
    rig.backend.on_gone = told.set
    assert told.is_set()
    rig.close()


# -- with servers that misbehave -----------------------------------------------------------------

Script = Callable[[Header, bytes], "list[tuple[bytes, list[int]]]"]


def size_of(head: bytes) -> int:
    return Header.decode(head).size


def tame(header: Header, body: bytes) -> list[tuple[bytes, list[int]]]:
    """A small well-behaved server: one region, nothing else."""
    replies = {
        Command.VERSION: Version(0, 1, Capabilities(max_msg_fds=4)).encode(),
        Command.DEVICE_GET_INFO: messages.DeviceInfo(2, 8, 1).encode(),
        Command.DEVICE_GET_IRQ_INFO: messages.IrqInfo(0, 1, 1).encode(),
        Command.REGION_READ: body + bytes(8)[: int.from_bytes(body[12:16], "little")],
        Command.REGION_WRITE: body[:16],
        Command.DMA_UNMAP: body,
    }
    payload = replies.get(Command(header.command), b"")
    if header.command == Command.DEVICE_GET_REGION_INFO:
        index = int.from_bytes(body[8:12], "little")
        payload = messages.RegionInfo(index, 3, 256).encode()
    return [(b"".join(frame.reply(header, [payload])), [])]


class Scripted:
    """A server that answers as ``script`` says."""

    def __init__(self, script: Script) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stream = Stream(theirs, size_of)
        self._script = script
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(ConnectionError, Closed, ProtocolError):
            while True:
                got = self._stream.receive()
                got.fds.close()
                header = Header.decode(got.data)
                if not header.is_reply:
                    for data, fds in self._script(header, got.data[16:]):
                        self._stream.send([data], fds)

    def close(self) -> None:
        self._stream.interrupt()
        self._thread.join()
        self._stream.close()


@pytest.fixture
def scripted(clean: None) -> Iterator[Callable[[Script], socket.socket]]:
    servers: list[Scripted] = []

    def start(script: Script) -> socket.socket:
        servers.append(Scripted(script))
        return servers[-1].ours

    yield start
    for server in servers:
        server.close()


def test_the_tame_server_is_good_enough(scripted: Callable[[Script], socket.socket]) -> None:
    backend = VfioUserBackend(scripted(tame))
    assert backend.region_read(CONFIG_REGION, 0, 4) == bytes(4)
    backend.close()


def replaced(command: Command, payload: bytes) -> Script:
    """The tame server with another payload in the reply to one command."""

    def script(header: Header, body: bytes) -> list[tuple[bytes, list[int]]]:
        if header.command != command:
            return tame(header, body)
        return [(b"".join(frame.reply(header, [payload])), [])]

    return script


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.VERSION, b""),
        (Command.VERSION, u.VERSION.pack(3, 0)),
        (Command.VERSION, u.VERSION.pack(0, 0) + b"nonsense"),
        (
            Command.VERSION,
            Version(0, 1, Capabilities(twin_socket=True, twin_fd_index=0)).encode(),
        ),
        (Command.DEVICE_GET_INFO, b"short"),
        (Command.DEVICE_GET_INFO, messages.DeviceInfo(2, 1 << 31, 5).encode()),
        (Command.DEVICE_GET_REGION_INFO, b""),
        (Command.DEVICE_GET_REGION_INFO, messages.RegionInfo(77).encode()),
        (Command.DEVICE_GET_REGION_INFO, u.REGION_INFO.pack(48, 8, 0, 32, 1, 0) + bytes(4)),
        (Command.DEVICE_GET_IRQ_INFO, messages.IrqInfo(0, 1, 1 << 30).encode()),
        (Command.DEVICE_GET_IRQ_INFO, messages.IrqInfo(3, 1, 1).encode()),
    ],
)
def test_descriptions_that_make_no_sense_end_the_connection(
    scripted: Callable[[Script], socket.socket], command: Command, payload: bytes
) -> None:
    with pytest.raises(ProtocolError):
        VfioUserBackend(scripted(replaced(command, payload)))


def test_an_endless_region_info_is_given_up(
    scripted: Callable[[Script], socket.socket],
) -> None:
    def script(header: Header, body: bytes) -> list[tuple[bytes, list[int]]]:
        if header.command != Command.DEVICE_GET_REGION_INFO:
            return tame(header, body)
        argsz = int.from_bytes(body[:4], "little") + 16
        payload = u.REGION_INFO.pack(argsz, 7, 0, 0, 256, 0)
        return [(b"".join(frame.reply(header, [payload])), [])]

    with pytest.raises(ProtocolError, match="more room"):
        VfioUserBackend(scripted(script))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        u.REGION_ACCESS.pack(0, 7, 4),
        u.REGION_ACCESS.pack(0, 7, 4) + b"longer than asked",
        u.REGION_ACCESS.pack(4, 7, 4) + b"data",
        u.REGION_ACCESS.pack(0, 7, 2) + b"da",
        u.REGION_ACCESS.pack(0, 7, 0xFFFFFFFF) + b"data",
    ],
)
def test_a_read_reply_that_does_not_match_is_a_protocol_error(
    scripted: Callable[[Script], socket.socket], payload: bytes
) -> None:
    backend = VfioUserBackend(scripted(replaced(Command.REGION_READ, payload)))
    with pytest.raises(ProtocolError):
        backend.region_read(CONFIG_REGION, 0, 4)
    backend.close()


def test_a_successor_uses_no_id_that_a_late_reply_could_carry(
    scripted: Callable[[Script], socket.socket],
) -> None:
    seen: list[int] = []

    def script(header: Header, body: bytes) -> list[tuple[bytes, list[int]]]:
        seen.append(header.msg_id)
        return tame(header, body)

    backend = VfioUserBackend(scripted(script))
    for _ in range(3):
        backend.region_read(CONFIG_REGION, 0, 4)
        kept = duplicated(backend.hand_over())
        backend.close()
        backend = VfioUserBackend.resume(kept)
    backend.close()
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("names", [(), ("socket",), ("trail",), ("socket", "trail", "twin")])
@pytest.mark.parametrize(
    "notes",
    [
        {},
        {"backend": "type1", "peer": {}},
        {"backend": "vfio-user"},
        {"backend": "vfio-user", "peer": {"unheard": 1}},
        {"backend": "vfio-user", "peer": {}},
    ],
)
def test_a_handover_that_is_none_is_refused_and_closed(
    names: tuple[str, ...], notes: dict[str, object], clean: None
) -> None:
    fds = {name: memfd.create("nothing", PAGE) for name in names}
    with pytest.raises(ProtocolError):
        VfioUserBackend.resume(Handover(fds, notes))


def test_an_unmap_reply_without_payload_is_a_whole_unmap(
    scripted: Callable[[Script], socket.socket],
) -> None:
    """What libvfio-user answers for a function that does no DMA."""
    backend = VfioUserBackend(scripted(replaced(Command.DMA_UNMAP, b"")))
    backend.dma_map_memory(BASE, PAGE, Perm.RW, Ram(PAGE))
    assert backend.dma_unmap(BASE, PAGE) == PAGE
    backend.dma_map_memory(BASE, PAGE, Perm.RW, Ram(PAGE))
    backend.close()


def test_a_reply_with_descriptors_that_nobody_wants_leaks_none(
    scripted: Callable[[Script], socket.socket],
) -> None:
    pipe = os.pipe()

    def script(header: Header, body: bytes) -> list[tuple[bytes, list[int]]]:
        return [(data, list(pipe) * 5) for data, _ in tame(header, body)]

    backend = VfioUserBackend(scripted(script))
    backend.region_read(CONFIG_REGION, 0, 4)
    backend.dma_unmap(BASE, PAGE)
    for fd in pipe:
        os.close(fd)
    backend.close()


def test_an_unanswered_request_ends_the_connection_in_time(
    scripted: Callable[[Script], socket.socket],
) -> None:
    def script(header: Header, body: bytes) -> list[tuple[bytes, list[int]]]:
        return [] if header.command == Command.REGION_READ else tame(header, body)

    backend = VfioUserBackend(scripted(script), timeout=0.2)
    told = threading.Event()
    backend.on_gone = told.set
    with pytest.raises(DeviceGone, match=r"REGION_READ was not answered within 0\.2 s"):
        backend.region_read(CONFIG_REGION, 0, 4)
    assert told.is_set()
    with pytest.raises(DeviceGone):
        backend.region_write(CONFIG_REGION, 0, b"x")
    backend.close()


def test_a_server_that_sends_half_a_reply_and_stalls_is_given_up_in_time(
    scripted: Callable[[Script], socket.socket],
) -> None:
    def script(header: Header, body: bytes) -> list[tuple[bytes, list[int]]]:
        whole = tame(header, body)
        return [(whole[0][0][:19], [])] if header.command == Command.REGION_READ else whole

    backend = VfioUserBackend(scripted(script), timeout=0.2)
    with pytest.raises(DeviceGone):
        backend.region_read(CONFIG_REGION, 0, 4)
    backend.close()


def test_late_and_invented_replies_are_dropped(
    scripted: Callable[[Script], socket.socket],
) -> None:
    def script(header: Header, body: bytes) -> list[tuple[bytes, list[int]]]:
        other = Header((header.msg_id + 9) & 0xFFFF, header.command, header.size, header.flags)
        wrong = Header(header.msg_id, header.command ^ 1, header.size, header.flags)
        extra: list[tuple[bytes, list[int]]] = [
            (b"".join(frame.reply(which, [bytes(40)])), []) for which in (other, wrong)
        ]
        return [*extra, *tame(header, body)]

    backend = VfioUserBackend(scripted(script))
    assert backend.region_read(CONFIG_REGION, 0, 4) == bytes(4)
    backend.close()


def test_commands_that_are_not_for_a_client_are_refused(clean: None) -> None:
    answers: list[Header] = []
    got = threading.Event()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stream = Stream(theirs, size_of)

    def serve() -> None:
        with suppress(ConnectionError, Closed):
            while True:
                message = stream.receive()
                header = Header.decode(message.data)
                if header.is_reply:
                    answers.append(header)
                    got.set()
                    continue
                if header.command == Command.DMA_MAP:
                    read = u.DMA_ACCESS.pack(0, 1 << 40)
                    stream.send(frame.message(1, Command.DEVICE_RESET, []))
                    stream.send(frame.message(2, Command.DMA_READ, [read]))
                    stream.send(frame.message(3, Command.DMA_READ, [u.DMA_ACCESS.pack(5, 4)]))
                for data, _ in tame(header, message.data[16:]):
                    stream.send([data])

    thread = threading.Thread(target=serve)
    thread.start()
    backend = VfioUserBackend(ours)
    backend.dma_map_memory(BASE, PAGE, Perm.RW, Ram(PAGE))
    while len(answers) < 3:
        assert got.wait(5)
        got.clear()
    assert [header.failure for header in answers] == [errno.EINVAL, errno.EINVAL, errno.EFAULT]
    backend.close()
    thread.join()
    stream.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=6), st.integers(0, 12), st.booleans())
def test_random_bytes_from_a_server_never_crash_hang_or_leak(
    chunks: list[bytes], after: int, framed: bool
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    pipe = os.pipe()
    seen = 0

    def script(header: Header, body: bytes) -> list[tuple[bytes, list[int]]]:
        nonlocal seen
        seen += 1
        if seen <= after:
            return tame(header, body)
        if framed:
            return [(b"".join(frame.reply(header, [chunk])), list(pipe)) for chunk in chunks]
        return [(chunk, list(pipe)) for chunk in chunks if chunk]

    server = Scripted(script)
    try:
        backend = VfioUserBackend(server.ours, timeout=0.05)
        with suppress(HoldfastError):
            backend.region_read(CONFIG_REGION, 0, 4)
        with suppress(HoldfastError):
            backend.doorbells(0)
        backend.close()
    except HoldfastError:
        pass
    server.close()
    for fd in pipe:
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
