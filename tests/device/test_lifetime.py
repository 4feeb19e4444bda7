# SPDX-License-Identifier: Apache-2.0
"""How a device, its memory and its transfers end: with, exception, signal, exit, fork, drop."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.device import SMALLEST_SLAB, Device
from holdfast.errors import BadTarget, Closed, HoldfastError, NoPermission, UsageError, WaitTimeout
from holdfast.keeper import embedded
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack
from holdfast.values import Target

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 15.0
SIZE = 64 << 10
SLOW = "emu:xdma?memory=1M&link_rate=1M&link_chunk=4096"
"""A transfer of SIZE takes a sixteenth of a second."""


@pytest.fixture(scope="module")
def slow() -> Iterator[Stack]:
    with Stack(SLOW) as stack:
        yield stack


@pytest.fixture
def card(slow: Stack) -> Iterator[Device]:
    with holdfast.open(slow.target, timeout=LONG) as device:
        yield device


def unreleased(stack: Stack) -> int:
    return sum(lease["state"] != "released" for lease in stack.ps()["leases"])


# -- waiting --------------------------------------------------------------------------------------


def test_a_timeout_does_not_cancel_the_transfer(card: Device) -> None:
    buffer = card.alloc(SIZE)
    transfer = card.dma.from_card(buffer)
    with pytest.raises(WaitTimeout):
        transfer.wait(0.001)
    assert not transfer.done
    assert transfer.wait(LONG).nbytes == SIZE


def test_several_threads_and_an_event_loop_wait_side_by_side(slow: Stack) -> None:
    async def gather(device: Device) -> int:
        moves = [device.dma.to_card(device.alloc(4096), 4096 * place) for place in range(8)]
        return sum(each.nbytes for each in await asyncio.gather(*map(_await, moves)))

    with holdfast.open(slow.target, channels=2, timeout=LONG) as device:
        with ThreadPoolExecutor(5) as pool:
            waits = [
                pool.submit(device.dma.from_card(device.alloc(8192), channel=place % 2).wait, LONG)
                for place in range(4)
            ]
            looped = pool.submit(asyncio.run, gather(device))
            assert looped.result(LONG) == 8 * 4096
            assert all(each.result(LONG).done for each in waits)


async def _await(transfer: holdfast.Transfer) -> holdfast.Transfer:
    return await transfer


# -- memory ---------------------------------------------------------------------------------------


def test_what_was_dropped_is_still_written_to_and_only_then_returned(card: Device) -> None:
    card.bars[2].view(0, SIZE)[:] = 0x3C
    buffer = card.alloc(SIZE)
    seen = buffer.array.reshape(-1)[:]
    transfer = card.dma.from_card(buffer)
    alive = weakref.ref(buffer)
    del buffer
    gc.collect()
    assert alive() is not None, "the transfer does not hold its buffer"
    transfer.wait(LONG)
    assert (seen == 0x3C).all()
    del transfer
    gc.collect()
    assert alive() is None


def test_views_outlive_free_and_the_device(slow: Stack) -> None:
    with holdfast.open(slow.target, timeout=LONG) as device:
        buffer = device.alloc((16, 16), "u4")
        buffer.array[:] = 7
        view = buffer.array[3:5, 1:]
        buffer.free()
        with pytest.raises(Closed):
            _ = buffer.array
        other = device.alloc((16, 16), "u4")
        other.array[:] = 9
        assert (view == 7).all(), "memory with a view was handed out again"
    assert (view == 7).all()


@pytest.mark.parametrize("first", [0, 1, 63, 4095, 4097])
@pytest.mark.parametrize("size", [1, 7, 4096, 12_345])
def test_any_writable_memory_can_be_pinned_at_any_place(
    card: Device, first: int, size: int
) -> None:
    pattern = (np.arange(size) * 7 + first) % 251
    back = np.zeros(first + size + 64, np.uint8)
    source = bytearray(first) + bytearray(pattern.astype(np.uint8).tobytes())
    with card.pin(memoryview(source)[first:]) as pin, card.pin(back[first : first + size]) as into:
        assert (pin.how, pin.nbytes) == ("relayed", size)
        card.dma.to_card(pin, 0x100).wait(LONG)
        card.dma.from_card(into, 0x100).wait(LONG)
    assert (back[first : first + size] == pattern).all()
    assert not back[:first].any()
    assert not back[first + size :].any()


def test_read_only_memory_is_a_source(card: Device) -> None:
    locked = np.arange(100, dtype=np.uint8)
    locked.flags.writeable = False
    back = bytearray(100)
    for thing in (locked, locked.tobytes()):
        with card.pin(thing) as pin, card.pin(back) as into:
            card.dma.to_card(pin).wait(LONG)
            card.dma.from_card(into).wait(LONG)
        assert back == locked.tobytes()


def test_a_pin_that_was_dropped_goes_away_by_itself(slow: Stack, card: Device) -> None:
    for _ in range(20):
        card.pin(bytearray(100))
    gc.collect()
    card.alloc(8 << 20)  # any request takes the dropped pins away
    mine = [lease for lease in slow.ps()["leases"] if lease["lease"] == card.lease.number]
    assert mine[0]["pins"] == 0


def test_a_pinned_object_lives_until_its_transfer_is_done(card: Device) -> None:
    memory = np.zeros(SIZE, np.uint8)
    alive = weakref.ref(memory)
    pin = card.pin(memory)
    transfer = card.dma.from_card(pin)
    pin.free()
    del memory, pin
    gc.collect()
    assert alive() is not None
    transfer.wait(LONG)
    del transfer
    gc.collect()
    assert alive() is None


# -- the end of the device ------------------------------------------------------------------------


def test_leaving_with_by_an_exception_gives_everything_back(slow: Stack) -> None:
    class Mine(Exception):
        pass

    device = holdfast.open(slow.target, timeout=LONG)
    with pytest.raises(Mine), device:  # noqa: PT012 - the block is what is tested
        device.dma.to_card(device.alloc(SIZE))
        raise Mine
    assert device.closed
    assert settle(lambda: unreleased(slow), goal=0, timeout=LONG) == 0


SCRIPT = """
import sys, holdfast
card = holdfast.open({target!r})
buffer = card.alloc(65536)
transfer = card.dma.to_card(buffer)
print("posted", flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise SystemExit(4)", 4),
        ("1 / 0", 1),
        ("del card, buffer", 0),
    ],
)
def test_an_interpreter_that_exits_without_close_gives_everything_back(
    slow: Stack, then: str, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT.format(target=slow.target, then=then)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "posted\n"), done.stderr
    assert settle(lambda: unreleased(slow), goal=0, timeout=LONG) == 0


def test_ctrl_c_in_a_transfer_raises_and_the_device_can_still_be_used(slow: Stack) -> None:
    then = (
        "for _ in range(50): last = card.dma.to_card(buffer)\n"
        "try:\n"
        "    print('waiting', flush=True)\n"
        "    last.wait()\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', last.done, flush=True)\n"
        "card.reset()\n"
        "card.dma.to_card(buffer).wait(10)\n"
        "print('works', flush=True)\n"
        "card.close()\n"
    )
    script = SCRIPT.format(target=slow.target, then=then)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"posted\n"
        assert child.stdout.readline() == b"waiting\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.read() == b"interrupted False\nworks\n"
    assert child.returncode == 0
    assert settle(lambda: unreleased(slow), goal=0, timeout=LONG) == 0


def test_a_forked_child_can_neither_use_nor_hold_the_device(slow: Stack) -> None:
    device = holdfast.open(slow.target, timeout=LONG)
    buffer = device.alloc(SIZE)
    transfer = device.dma.to_card(buffer)

    def body(reading: int, writing: int) -> None:
        attempts: list[Callable[[], object]] = [
            lambda: device.alloc(64),
            lambda: device.dma.to_card(buffer),
            lambda: device.bars[0].load(0),
            lambda: device.command("channel_status"),
            lambda: device.irqs[0].wait(0),
            lambda: transfer.wait(0),
            lambda: transfer.done,
        ]
        told = []
        for attempt in attempts:
            try:
                told.append(f"gave {attempt()}")
            except Exception as error:  # noqa: BLE001 - which one is the question
                told.append(type(error).__name__)
        device.close()
        os.write(writing, ",".join(told).encode() + b";")
        os.read(reading, 1)

    child = actors.spawn(body)
    told = b""
    while not told.endswith(b";"):
        told += child.read(1) or b"ended;"
    assert set(told[:-1].decode().split(",")) == {"Closed"}
    transfer.wait(LONG)
    device.close()
    # The child is still there, and holds nothing.
    assert settle(lambda: unreleased(slow), goal=0, timeout=LONG) == 0
    child.tell(b"x")
    assert child.reap() == 0


# -- finding the keeper ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    ["", "emu", "emu:", "xdma", "usb:1", "vfio-user:relative", "pci:nonsense", "pci:0000:00:00.9"],
)
def test_targets_outside_of_the_grammar_are_refused(runtime: Path, target: str) -> None:
    with pytest.raises(BadTarget):
        holdfast.open(target)
    assert not list(runtime.iterdir())


def test_emulated_functions_that_do_not_exist_are_named_in_the_error(runtime: Path) -> None:
    with pytest.raises(HoldfastError, match="unicorn"):
        holdfast.open("emu:unicorn")
    with pytest.raises(HoldfastError, match="speed"):
        holdfast.open("emu:xdma?speed=9")


def test_a_vfio_user_socket_that_is_not_there_is_an_error(runtime: Path) -> None:
    with pytest.raises(HoldfastError):
        holdfast.open(f"vfio-user:{runtime}/nobody.sock")


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_runtime_directory_that_others_may_enter_is_refused(runtime: Path, mode: int) -> None:
    runtime.chmod(mode)
    with pytest.raises(NoPermission):
        holdfast.open("emu:xdma")
    runtime.chmod(0o700)


def test_a_runtime_directory_that_is_a_link_or_a_file_is_refused(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (runtime / "real").mkdir(mode=0o700)
    (runtime / "link").symlink_to(runtime / "real")
    (runtime / "file").touch(mode=0o600)
    for name in ("link", "file"):
        monkeypatch.setenv(embedded.RUNTIME_VARIABLE, str(runtime / name))
        with pytest.raises(HoldfastError):
            holdfast.open("emu:xdma")
    monkeypatch.setenv(embedded.RUNTIME_VARIABLE, str(runtime))


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user")
def test_another_users_runtime_directory_is_refused(runtime: Path) -> None:
    os.chown(runtime, 65534, 65534)
    with pytest.raises(NoPermission):
        holdfast.open("emu:xdma")
    os.chown(runtime, 0, 0)


def test_a_stale_socket_is_replaced(runtime: Path) -> None:
    import socket

    target = "emu:xdma?memory=1M"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(embedded.socket_path(Target.parse(target))))
    with holdfast.open(target) as device:
        assert device.alloc(64).nbytes == 64


def test_something_else_in_the_sockets_place_is_left_alone(runtime: Path) -> None:
    path = embedded.socket_path(Target.parse("emu:xdma"))
    path.write_text("mine")
    with pytest.raises(HoldfastError):
        holdfast.open("emu:xdma")
    assert path.read_text() == "mine"


def test_a_runtime_directory_with_too_long_a_name_is_refused(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(embedded.RUNTIME_VARIABLE, str(runtime / ("x" * 100)))
    with pytest.raises(UsageError):
        holdfast.open("emu:xdma")
    monkeypatch.setenv(embedded.RUNTIME_VARIABLE, str(runtime))


def test_a_view_that_outlives_its_lease_sees_and_touches_nobody_elses_frames(
    serve: Callable[..., Stack],
) -> None:
    stack = serve("emu:xdma", "--arena", "2M")
    with holdfast.open(stack.target, timeout=LONG) as first:
        view = first.alloc(SMALLEST_SLAB).array[:]
        view[:] = 7
    with holdfast.open(stack.target, timeout=LONG, channels=0) as second:
        frames = second.alloc(SMALLEST_SLAB * 3)  # more than is left without the first one's
        frames.array[:] = 9
        assert (view == 7).all()
        view[:] = 5
        assert (frames.array == 9).all()
