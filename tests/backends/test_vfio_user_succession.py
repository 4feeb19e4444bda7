# SPDX-License-Identifier: Apache-2.0
"""Keepers of a vfio-user function that are killed, and go on where the one before was.

The function is a process of its own, the client is this process, and keepers are forked and killed
with SIGKILL. They serve the client's memory through its /proc/self/mem, as for a relayed pin.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from holdfast import steps
from holdfast.backends.vfio_user import VfioUserBackend
from holdfast.emu.function import BarSpec, Function, Identity
from holdfast.emu.server import Server
from holdfast.errors import HoldfastError
from holdfast.keeper.process_memory import ProcessMemory
from holdfast.kernel import pidfd
from holdfast.regs.spec import Bank, Register
from holdfast.values import CONFIG_REGION, Handover, Iova, Perm
from holdfast.wire.vfio_user.capabilities import CLIENT, SERVER, Capabilities

Bytes = npt.NDArray[np.uint8]

BASE = Iova(0x10_0000)
SIZE = 300_000
"""Bytes of one job each way: three messages."""
GO = Register("go", 0x00)
DONE = Register("done", 0x04)
ERRORS = Register("errors", 0x08)
BANK = Bank("relay", (GO, DONE, ERRORS))
DEADLINE = 20.0


def pattern(job: int) -> Bytes:
    return ((np.arange(SIZE) + 7 * job) % 251).astype(np.uint8)


class Copier(Function):
    """Writes ``pattern(job)`` to the client's memory and reads it back: a job for each ``go``."""

    identity = Identity(vendor=0x1234, device=0x0003)

    def __init__(self) -> None:
        self.bars = (BarSpec(0, 4096, banks=(BANK,)),)
        super().__init__()
        self.on_write(GO, self._go)

    def _go(self, _index: int, job: int) -> None:
        self.poke(GO, job)
        self.wake()

    def work(self) -> float | None:
        job = self.peek(GO)
        if job == self.peek(DONE):
            return None
        back = np.zeros(SIZE, np.uint8)
        try:
            self.dma.write(BASE, pattern(job))
            self.dma.read(BASE, back)
            wrong = not np.array_equal(back, pattern(job))
        except HoldfastError:
            wrong = True
        with self.lock:
            self.poke(ERRORS, self.peek(ERRORS) + wrong)
            self.poke(DONE, job)
        return 0


def forked(work: Callable[[], None]) -> int:
    """Run ``work`` in a child that ends with it; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it was must not unwind into the test runner
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def register(backend: VfioUserBackend, which: Register) -> int:
    return int.from_bytes(backend.region_read(0, which.at(0), 4), "little")


def go(backend: VfioUserBackend, job: int) -> None:
    backend.region_write(0, GO.at(0), job.to_bytes(4, "little"))


def finish(backend: VfioUserBackend) -> int:
    """Wait for the job that is running, if one is; returns its number."""
    while (done := register(backend, DONE)) != register(backend, GO):
        pass
    assert register(backend, ERRORS) == 0
    return done


class Relay:
    """The function's process, the client's memory, and what an anchor would hold."""

    def __init__(self, *, twin: bool = False) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        server = Capabilities(max_msg_fds=16, max_data_xfer_size=1 << 17, twin_socket=twin)
        client = Capabilities(max_msg_fds=8, max_data_xfer_size=1 << 17, twin_socket=twin)

        def serve() -> None:
            ours.close()
            Server(Copier(), capabilities=server if twin else SERVER).serve_socket(theirs)

        self.function = forked(serve)
        theirs.close()
        self.own = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
        self.array: Bytes = np.zeros(SIZE + 8192, np.uint8)
        backend = VfioUserBackend(ours, capabilities=client if twin else CLIENT)
        backend.region_write(CONFIG_REGION, 4, b"\x06\x00")
        backend.dma_map_memory(*self.window)
        self.kept = self._duplicate(backend.hand_over())
        backend.close()

    @property
    def window(self) -> tuple[Iova, int, Perm, ProcessMemory]:
        return BASE, SIZE, Perm.RW, ProcessMemory(self.own, self.array.ctypes.data + 17)

    @property
    def memory(self) -> Bytes:
        return self.array[17 : 17 + SIZE]

    def is_in_memory(self, job: int) -> bool:
        """Whether the client's memory has this job's pattern; also in a forked keeper."""
        seen = self.window[3].read(0, SIZE)
        return seen == pattern(job).tobytes()

    @staticmethod
    def _duplicate(handover: Handover) -> Handover:
        notes: dict[str, Any] = json.loads(json.dumps(dict(handover.notes)))
        return Handover({name: os.dup(fd) for name, fd in handover.fds.items()}, notes)

    def resume(self) -> VfioUserBackend:
        return VfioUserBackend.resume(self._duplicate(self.kept), memories=[self.window])

    def keeper(self, work: Callable[[VfioUserBackend], None]) -> int:
        """Fork a keeper that goes on with the connection and does ``work``; returns its pid."""
        return forked(lambda: work(self.resume()))

    def killed_at(self, step: str, count: int, work: Callable[[VfioUserBackend], None]) -> None:
        """Have a keeper do ``work`` that is killed when it comes to ``step`` for this time."""
        left = [count]

        def hook(name: str) -> None:
            if name == step:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        def armed(backend: VfioUserBackend) -> None:
            steps.arm(hook)
            work(backend)

        status = reap(self.keeper(armed))
        assert os.WIFSIGNALED(status), f"it was not killed at {step} {count}: {status:#x}"

    def close(self) -> None:
        for fd in self.kept.fds.values():
            os.close(fd)
        os.close(self.own)
        assert reap(self.function) == 0


def reap(pid: int) -> int:
    """Wait for a child; one that does not end within DEADLINE is killed and is a failure."""
    fd = pidfd.open_process(pid)
    in_time = pidfd.await_death(fd, DEADLINE)
    if not in_time:
        pidfd.kill(fd)
    os.close(fd)
    status = os.waitpid(pid, 0)[1]
    assert in_time, f"{pid} did not end"
    return status


@pytest.fixture(params=[False, True], ids=["one socket", "twin socket"])
def relay(request: pytest.FixtureRequest, clean: None) -> Iterator[Relay]:
    relay = Relay(twin=request.param)
    yield relay
    relay.close()


STEPS = [
    "keeper.relay_found",
    "keeper.relay_done",
    "keeper.relay_carried",
    "keeper.relay_answered",
    "keeper.relay_noted",
    "keeper.relay_taken",
]


@pytest.mark.parametrize("step", STEPS)
def test_a_transfer_goes_on_whichever_step_of_a_message_the_keeper_is_killed_at(
    relay: Relay, step: str
) -> None:
    """Messages 1 to 3 of a job write, 4 to 6 read."""
    for count in range(1, 7):
        job = 2 * count

        def work(backend: VfioUserBackend, job: int = job) -> None:
            go(backend, job)
            finish(backend)

        relay.killed_at(step, count, work)
        backend = relay.resume()
        assert finish(backend) == job
        assert relay.is_in_memory(job)
        go(backend, job + 1)
        assert finish(backend) == job + 1
        assert relay.is_in_memory(job + 1)
        backend.close()


@pytest.mark.parametrize("step", ["keeper.relay_answered", "keeper.relay_noted"])
def test_a_write_that_was_answered_is_not_written_again(relay: Relay, step: str) -> None:
    """The function went on from it, and the client may have used its memory for something else."""
    marked = (7, 1 << 17)

    def work(backend: VfioUserBackend) -> None:
        go(backend, 5)
        finish(backend)

    relay.killed_at(step, 1, work)
    relay.memory[:] = 0xEE
    backend = relay.resume()
    while register(backend, DONE) != 5:
        pass
    assert set(relay.memory[marked[0] : marked[1]].tolist()) == {0xEE}
    assert np.array_equal(relay.memory[marked[1] :], pattern(5)[marked[1] :])
    backend.close()


def test_a_request_whose_reply_was_never_read_does_not_disturb_the_next_ones(
    relay: Relay,
) -> None:
    def work(backend: VfioUserBackend) -> None:
        while True:
            backend.region_read_multi([(CONFIG_REGION, at, 4) for at in range(0, 256, 4)])

    for count in (1, 3, 40, 99):
        relay.killed_at("keeper.request_sent", count, work)
    backend = relay.resume()
    words = backend.region_read_multi([(CONFIG_REGION, at, 4) for at in range(0, 256, 4)])
    assert b"".join(words) == backend.region_read(CONFIG_REGION, 0, 256)
    backend.close()


def kill_at_random(relay: Relay, kills: int, seed: int) -> None:
    """Kill keepers at random instants of a busy life, and check everything each time."""
    chance = random.Random(seed)

    def work(backend: VfioUserBackend) -> None:
        job = finish(backend)
        assert not job or relay.is_in_memory(job)
        threading.Thread(target=poke, args=(backend,), daemon=True).start()
        while True:
            job += 1
            go(backend, job)
            assert finish(backend) == job
            assert relay.is_in_memory(job)

    def poke(backend: VfioUserBackend) -> None:
        while True:
            words = backend.region_read_multi([(CONFIG_REGION, 0, 2)] * 50)
            if set(words) != {b"\x34\x12"}:
                os._exit(9)

    for _ in range(kills):
        child = relay.keeper(work)
        fd = pidfd.open_process(child)
        ended = pidfd.await_death(fd, chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.close(fd)
        status = reap(child)
        assert not ended, f"a keeper gave up: {status:#x}"
    backend = relay.resume()
    job = finish(backend)
    assert job > kills // 20
    assert relay.is_in_memory(job)
    backend.close()


def test_the_stream_stays_in_step_through_many_kills(relay: Relay) -> None:
    kill_at_random(relay, 80, seed=1)
