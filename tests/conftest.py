# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests with a running stack: private runtime directories, and nothing left behind."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from holdfast.keeper import embedded
from holdfast.kernel import procfs
from holdfast.torture.outside import processes_under
from holdfast.torture.pool import compiled_once
from holdfast.torture.stack import Stack

# How long an example takes says more about the machine's other work than about what is tested.
settings.register_profile("holdfast", deadline=None)
settings.load_profile("holdfast")

SETTLE = 5.0
"""Seconds in which an ended process must really be gone."""


def processes_of(directory: str) -> list[int]:
    """Pids of processes, other than this one, whose runtime directory this is."""
    return processes_under(embedded.RUNTIME_VARIABLE, directory)


@pytest.fixture(scope="session", autouse=True)
def bytecode() -> Iterator[None]:
    """Keepers and functions are started hundreds of times: not compiled each time."""
    with compiled_once():
        yield


def children() -> set[int]:
    """Pids of this process's children, zombies included."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            found.update(map(int, Path(f"/proc/self/task/{task}/children").read_text().split()))
        except OSError:
            continue
    return found


def eventually(condition: Callable[[], bool], timeout: float = SETTLE) -> bool:
    """Look until true or time is up. For what the kernel does after an end was seen."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture
def clean() -> Iterator[None]:
    """No descriptor, thread or child process is left behind in this process by the test."""
    gc.collect()
    threads = set(threading.enumerate())
    before = procfs.open_descriptors(os.getpid())
    known = children()
    yield
    gc.collect()
    assert eventually(lambda: children() <= known), f"child processes: {children() - known}"
    assert eventually(lambda: set(threading.enumerate()) <= threads), threading.enumerate()
    after = procfs.open_descriptors(os.getpid())
    left = {fd: link for fd, link in after.items() if before.get(fd) != link}
    left = {fd: link for fd, link in left.items() if link != f"/proc/{os.getpid()}/fd"}
    assert not left, f"descriptors: {left}"


class WatchedStack(Stack):
    """A stack whose processes must all be gone once it was left."""

    def __exit__(self, *exit_: object) -> None:
        directory = self._directory
        self._clean()
        assert eventually(lambda: not processes_of(directory)), (
            f"processes left: {processes_of(directory)}"
        )


@pytest.fixture
def serve(clean: None) -> Iterator[Callable[..., Stack]]:
    """``serve(target, *options)``: a keeper of one's own, ended after the test."""
    with ExitStack() as stacks:
        yield lambda target, *options: stacks.enter_context(WatchedStack(target, options))
        gc.collect()


@pytest.fixture(scope="module")
def xdma() -> Iterator[Stack]:
    """One emulated card with default options for the tests of a module."""
    with WatchedStack("emu:xdma") as stack:
        yield stack


@pytest.fixture(scope="module")
def edu() -> Iterator[Stack]:
    """One edu device for the tests of a module; its DMA takes a moment as it should."""
    with WatchedStack("emu:edu?delay=0.01") as stack:
        yield stack


@pytest.fixture
def runtime(clean: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty runtime directory for embedded keepers; whatever was started there is ended."""
    directory = tempfile.mkdtemp(prefix="holdfast-")
    monkeypatch.setenv(embedded.RUNTIME_VARIABLE, directory)
    monkeypatch.setenv(embedded.IDLE_VARIABLE, "0.1")
    yield Path(directory)
    gc.collect()
    gone = eventually(lambda: not processes_of(directory), 10.0)
    left = processes_of(directory)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for process in embedded._started:
        process.wait(SETTLE)
    embedded._started.clear()
    shutil.rmtree(directory, ignore_errors=True)
    assert gone, f"processes left: {left}"
