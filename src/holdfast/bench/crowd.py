# SPDX-License-Identifier: Apache-2.0
"""A thousand clients on one machine: processes that hold a lease and do nothing with it.

Facts. A client costs an interpreter, some 30 MiB and a quarter of a second. A fork of a warmed
process costs a millisecond or two, and the pages that it writes to.

Choice. Stubs are forked from this process. Each speaks the lease protocol through the client's
own code, but builds no ``Device``: it takes a lease of memory only and one slab, cuts buffers from
it as ``Device.alloc`` does, touches each, and waits. All are in one process group, so that one
system call kills them all.

Cost. What a stub inherits is shared, so the memory that it costs is not what a client of its own
program would cost. Nothing here measures clients.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import struct
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np

from holdfast.dma.buffer import Buffer
from holdfast.errors import HoldfastError, SystemFailure
from holdfast.keeper.client import expect
from holdfast.keeper.opening import connect
from holdfast.kernel.failure import failure
from holdfast.kernel.limits import allow_open_files
from holdfast.values import Access, Target
from holdfast.wire import lease as wire

BUFFERS = 100
"""Buffers of each stub."""
BUFFER_BYTES = 2560
"""Bytes of each: a hundred fill the smallest slab that ``Device.alloc`` asks for, 256 KiB."""
SLAB_BYTES = 256 << 10
DESCRIPTORS_EACH = 6
"""Descriptors that a lease may cost the keeper and who holds duplicates for it: its socket, its
pidfd and its slab, twice."""
SPARE = 256
"""Descriptors and processes that everything else needs."""
START_PATIENCE = 60.0
"""Seconds without a sign of any stub after which the start has failed."""

_SIGN = struct.Struct("<QQ240s")  # pid, lease (0: it failed), what it has to say
assert _SIGN.size <= select.PIPE_BUF  # so that signs of many arrive whole (pipe(7))


def require_room(stubs: int) -> None:
    """Raise the limit of open files as far as ``stubs`` leases need it, for this process and all
    that it starts; SystemFailure that says what is missing if the hard limit is too low."""
    need = stubs * DESCRIPTORS_EACH + SPARE
    allowed = allow_open_files(need)
    if allowed < need:
        raise SystemFailure(
            f"{stubs} leases need {need} descriptors in one process, the limit is {allowed}",
            operation="bench",
            hint=f"as root: `prlimit --pid $$ --nofile={need}:{need}` in the shell before",
        )
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() and processes != resource.RLIM_INFINITY and processes < stubs + SPARE:
        raise SystemFailure(
            f"{stubs} clients are as many processes, the limit is {processes}",
            operation="bench",
            hint=f"ulimit -u {stubs + SPARE}, or more if this user runs much else",
        )


@dataclass(slots=True)
class Crowd:
    """Stubs with a lease and ``buffers`` buffers each. A context manager.

    :meth:`join` adds some; they live when it returns. Left, those that live say goodbye and are
    reaped; stubs whose parent dies do the same. Forks: only from a single-threaded process.
    """

    target: str
    buffers: int = BUFFERS
    leases: dict[int, int] = field(default_factory=dict)
    """Pid to lease (0: not yet) of the stubs that live."""
    _holding: int = -1
    _hold: int = -1
    _group: int = 0

    def __enter__(self) -> Self:
        self._holding, self._hold = os.pipe2(os.O_CLOEXEC)
        return self

    def join(self, count: int) -> float:
        """Start ``count`` more and wait for their leases; returns the seconds that it took."""
        begun = time.perf_counter()
        signs, telling = os.pipe2(os.O_CLOEXEC)
        gc.collect()
        gc.freeze()  # the collector must not write to pages that the stubs share
        try:
            for _ in range(count):
                self.leases[self._fork(telling, signs)] = 0
            os.close(telling)
            telling = -1
            self._await(signs, count)
        finally:
            gc.unfreeze()
            for fd in (signs, telling):
                if fd >= 0:
                    os.close(fd)
        return time.perf_counter() - begun

    def _fork(self, telling: int, signs: int) -> int:
        try:
            pid = os.fork()
        except OSError as error:
            raise failure(error, "fork", "stub client") from error
        if pid:
            os.setpgid(pid, self._group)  # here, so that the group exists before the next fork
            self._group = self._group or pid
            return pid
        code = 70
        try:
            os.close(self._hold)
            os.close(signs)
            _stub(self.target, self.buffers, telling, self._holding)
            code = 0
        finally:
            os._exit(code)

    def _await(self, signs: int, count: int) -> None:
        """Read one sign of each of the stubs that were started last."""
        for told in range(count):
            ready, _, _ = select.select([signs], [], [], START_PATIENCE)
            data = os.read(signs, _SIGN.size) if ready else b""
            if len(data) != _SIGN.size:
                why = "ended without a sign" if ready else f"silent for {START_PATIENCE:g} s"
                raise HoldfastError(
                    f"{count - told} of {count} stub clients: {why}",
                    operation="start clients",
                    target=self.target,
                )
            pid, lease, text = _SIGN.unpack(data)
            if not lease:
                said = text.rstrip(b"\0").decode(errors="replace")
                raise HoldfastError(said, operation="start clients", target=self.target)
            self.leases[pid] = lease

    def kill(self) -> int:
        """SIGKILL all at once and reap them; CLOCK_MONOTONIC nanoseconds of the kill."""
        at = time.monotonic_ns()
        if self.leases:
            os.killpg(self._group, signal.SIGKILL)
        self._reap()
        return at

    def _reap(self) -> None:
        for pid in self.leases:
            os.waitpid(pid, 0)
        self.leases = {}
        self._group = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._hold)  # the end of their waiting
        os.close(self._holding)
        if kind is not None:  # some may be stuck in whatever went wrong
            self.kill()
        self._reap()


def _stub(target: str, count: int, telling: int, holding: int) -> None:
    """A stub's life. Its descriptors are the parent's copies; the process ends behind it."""
    gc.disable()
    try:
        client = connect(Target.parse(target), START_PATIENCE)
        reply, _ = client.request(wire.Open(access=Access.SHARED, channels=0))
        lease = expect(reply, wire.Opened).lease
        buffers: list[Buffer] = []
        if count:
            slab = client.take_slab(max(SLAB_BYTES, -(-count * BUFFER_BYTES // 4096) * 4096))
            kind = np.dtype(np.uint8)
            for _ in range(count):
                buffer = slab.alloc((BUFFER_BYTES,), kind, align=64)
                if buffer is None:
                    raise HoldfastError(f"{count} buffers do not fit", operation="start clients")
                buffer.array[0] = 1
                buffers.append(buffer)
    except BaseException as error:
        os.write(telling, _SIGN.pack(os.getpid(), 0, str(error).encode()[:240]))
        raise
    os.write(telling, _SIGN.pack(os.getpid(), lease, b""))
    os.close(telling)
    os.read(holding, 1)  # until the parent lets go, or is gone
    client.close()
