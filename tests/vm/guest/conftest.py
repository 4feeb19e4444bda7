# SPDX-License-Identifier: Apache-2.0
"""What the suites inside a guest share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from holdfast.errors import HoldfastError
from holdfast.keeper import embedded
from holdfast.keeper.admission import AllowList
from holdfast.keeper.main import Service, run
from holdfast.keeper.server import Settings
from holdfast.values import Target

LET_IN = "HOLDFAST_TEST_LET_IN"
"""A user besides this one whom keepers let in."""


class ForkedKeeper:
    """A keeper forked from this process, as far as whoever started it needs a process."""

    def __init__(self, target: Target, idle: float) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.close(reading)
            try:
                user = os.environ.get(LET_IN)
                allow = AllowList(users=frozenset({int(user)} if user else ()))
                path = embedded.socket_path(target)
                run(Service(target, Settings(idle=idle, allow=allow), ready_fd=writing,
                            socket=path))  # fmt: skip
            except HoldfastError:
                pass  # it was reported
            finally:
                os._exit(0)
        os.close(writing)
        try:
            line = embedded.read_line(reading)
        finally:
            os.close(reading)
        self._ended = False
        try:
            embedded.raise_unless_ready(line, target)
        except HoldfastError:
            self.wait()
            raise

    def poll(self) -> int | None:
        """0 if it has ended, and is reaped by that."""
        if not self._ended:
            self._ended = os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
        return 0 if self._ended else None

    def wait(self, timeout: float | None = None) -> None:
        if not self._ended:
            os.waitpid(self.pid, 0)
            self._ended = True

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


@pytest.fixture
def forked_keepers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ForkedKeeper]]:
    """Keepers are forked from this warmed process: a fresh interpreter takes 10 s in a guest."""
    started: list[ForkedKeeper] = []

    def spawn(target: Target) -> None:
        idle = float(os.environ.get(embedded.IDLE_VARIABLE, embedded.IDLE_DEFAULT))
        started.append(ForkedKeeper(target, idle))

    spawner: Callable[[Target], None] = spawn
    monkeypatch.setattr(embedded, "_spawn", spawner)
    yield started
    for keeper in started:
        keeper.terminate()
        keeper.wait()
