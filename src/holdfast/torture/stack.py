# SPDX-License-Identifier: Apache-2.0
"""A keeper and its emulated function of one's own, in a runtime directory of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from holdfast.errors import HoldfastError
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.keeper.opening import connect
from holdfast.kernel import pidfd, procfs
from holdfast.torture.eyes import Eyes
from holdfast.values import Target

SERVE = (sys.executable, "-m", "holdfast", "serve")
STOP_TIMEOUT = 20.0
ORPHAN_TIMEOUT = 1.0
"""Seconds in which a keeper whose standby was killed must answer, if there is one."""
ABANDONED_AFTER = 60
"""Seconds without a client after which a stack's keeper ends by itself."""


class Stack:
    """Starts ``holdfast serve`` and points this process (and its forks) at it. A context manager.

    Not thread-safe: it sets an environment variable of this process while it lives.
    """

    log: Path
    """What its keepers tell of every step, while the stack lives."""

    def __init__(
        self,
        target: str,
        options: Sequence[str] = (),
        serve: Sequence[str] = SERVE,
        *,
        logged: bool = True,
    ) -> None:
        self.target = target
        self._logged = logged
        # Should this process be killed itself, what it started must not stay for ever.
        self._command = [*serve, target, "--idle", str(ABANDONED_AFTER), *options]
        self._directory = ""
        self._before: str | None = None
        self._standby: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._directory = tempfile.mkdtemp(prefix="holdfast-")
        self.log = Path(self._directory) / "events.log"
        if self._logged:
            self._command += ["--log", str(self.log)]
        self._before = os.environ.get(embedded.RUNTIME_VARIABLE)
        os.environ[embedded.RUNTIME_VARIABLE] = self._directory
        try:
            self._start()
        except BaseException:
            self._clean()
            raise
        return self

    def _start(self) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        with os.fdopen(reading, "rb") as ready:
            try:
                self._standby = subprocess.Popen(
                    [*self._command, "--ready-fd", str(writing)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(writing,),
                    start_new_session=True,
                )
            finally:
                os.close(writing)
            embedded.raise_unless_ready(ready.readline(), Target.parse(self.target))

    @property
    def keeper_pid(self) -> int:
        """The keeper that there is now."""
        if self._standby is None:
            raise HoldfastError("the stack is not running", operation="stack")
        return int(self.ps()["keeper"])

    def pids(self) -> list[int]:
        """The keeper, its anchor, and the function it started."""
        told = self.ps()
        return [told[name] for name in ("keeper", "anchor", "function") if told[name]]

    def ask(self) -> LeaseClient:
        """A connection without a lease, to ask ``ps`` on. The caller closes it."""
        return connect(Target.parse(self.target))

    def ps(self) -> dict[str, Any]:
        """All leases, living and ended, in one answer."""
        client = self.ask()
        try:
            return client.ps_all()
        finally:
            client.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean()

    def kill_all(self) -> None:
        """SIGKILL everything at once: keeper, anchor, standby and function."""
        if self._standby is not None:
            kill_tree(self._standby.pid)
            self._standby.wait()

    def _clean(self) -> None:
        if self._standby is not None:
            if self._standby.poll() is None:
                self._standby.send_signal(signal.SIGTERM)
                try:
                    self._standby.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    self.kill_all()
            else:
                self._end_keeper()
            self._standby = None
        if self._before is None:
            os.environ.pop(embedded.RUNTIME_VARIABLE, None)
        else:
            os.environ[embedded.RUNTIME_VARIABLE] = self._before
        shutil.rmtree(self._directory, ignore_errors=True)

    def _end_keeper(self) -> None:
        """The standby that was started here is gone; whoever keeps the function may not be."""
        eyes = Eyes(self.target)  # which, unlike a client, never starts another one
        try:
            told = eyes.ps(timeout=ORPHAN_TIMEOUT)
        except HoldfastError:
            return  # it went with them
        finally:
            eyes.close()
        fds = [os.pidfd_open(told[name]) for name in ("keeper", "anchor")]
        pidfd.kill(fds[0], signal.SIGTERM)
        for fd in fds:
            if not pidfd.await_death(fd, STOP_TIMEOUT):
                pidfd.kill(fd)
            os.close(fd)


def kill_tree(pid: int) -> None:
    """SIGKILL a standby and everything below it at once: keeper, anchor and function.

    Reaps nothing.
    """
    every = [pid, *procfs.descendants(pid)]
    for number in (signal.SIGSTOP, signal.SIGKILL):  # so that none starts another one meanwhile
        for each in every:
            with suppress(ProcessLookupError):
                os.kill(each, number)
