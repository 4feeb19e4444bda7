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
from types import TracebackType
from typing import Any, Self

from holdfast.errors import HoldfastError
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.keeper.opening import connect
from holdfast.values import Target

SERVE = (sys.executable, "-m", "holdfast", "serve")
STOP_TIMEOUT = 20.0
ABANDONED_AFTER = 60
"""Seconds without a client after which a stack's keeper ends by itself."""


class Stack:
    """Starts ``holdfast serve`` and points this process (and its forks) at it. A context manager.

    Not thread-safe: it sets an environment variable of this process while it lives.
    """

    def __init__(
        self, target: str, options: Sequence[str] = (), serve: Sequence[str] = SERVE
    ) -> None:
        self.target = target
        # Should this process be killed itself, what it started must not stay for ever.
        self._command = [*serve, target, "--idle", str(ABANDONED_AFTER), *options]
        self._directory = ""
        self._before: str | None = None
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._directory = tempfile.mkdtemp(prefix="holdfast-")
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
                self._keeper = subprocess.Popen(
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
        if self._keeper is None:
            raise HoldfastError("the stack is not running", operation="stack")
        return self._keeper.pid

    def pids(self) -> list[int]:
        """The keeper and the function it started."""
        function = self.ps()["function"]
        return [self.keeper_pid, *([function] if function else [])]

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

    def _clean(self) -> None:
        if self._keeper is not None:
            self._keeper.send_signal(signal.SIGTERM)
            try:
                self._keeper.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                # Its function notices the closed socket and ends, too.
                self._keeper.kill()
                self._keeper.wait()
            self._keeper = None
        if self._before is None:
            os.environ.pop(embedded.RUNTIME_VARIABLE, None)
        else:
            os.environ[embedded.RUNTIME_VARIABLE] = self._before
        shutil.rmtree(self._directory, ignore_errors=True)
