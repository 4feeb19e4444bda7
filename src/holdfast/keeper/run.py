# SPDX-License-Identifier: Apache-2.0
"""``holdfast run``: a command whose exit is reported only after its leases have been released.

Facts. The kernel frees a process's memory and reports its death without asking any card. What goes
on after that is the lease: it drains, and its memory is held. A shell, ``make`` or a service
manager sees the exit and starts the next job, which finds the function busy or its memory short.

Choice. A process that waits stands between: it starts the command, passes on signals, adopts what
the command leaves behind, and reports the command's own exit once the keeper says that every lease
of it is released. So the termination is paused where others can see it, as the author of the
question of 1998 wished, without pausing anybody in the kernel.

Terminal signals. The command stays in this process's group, so that it owns the terminal as it
would without us. What the terminal sends (Ctrl-C) reaches both; it is passed on only where it did
not come from there.

Cost. Two signals with the same meaning may reach a command where a service manager signals a whole
control group. Giving up is possible and always said: see :class:`Outcome`.
"""

from __future__ import annotations

import errno
import os
import secrets
import select
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Self

from holdfast.errors import SystemFailure, UsageError
from holdfast.keeper.embedded import RUN_VARIABLE
from holdfast.keeper.run_leases import RunLeases, Told
from holdfast.kernel import process
from holdfast.values import Target

FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    signal.SIGTSTP,
    signal.SIGCONT,
)
FROM_TERMINAL = {signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH, signal.SIGTSTP}
"""What the terminal sends to the whole foreground group (termios(3), ioctl_tty(2))."""
JOB_STOPS = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
INSIST = 2.0
"""Seconds within which a second interrupt means: now."""
LOOK = 1.0
"""Seconds between two looks at the keeper while the command runs."""
LOOK_FIRST = 0.005
LOOK_LAST = 0.1
"""Seconds between two looks while leases are waited for: short at first."""
EXPLAIN = 1.0
"""Seconds after which it is said what is waited for."""
ABSENCE = 2.0
"""Seconds in which the successor of a keeper must have come up."""


@dataclass(slots=True)
class Outcome:
    """How a run ended. ``exit`` is that of the command, negative for a signal.

    ``gave_up`` says why leases were not waited for any longer, and is empty if all were released.
    Times are CLOCK_MONOTONIC nanoseconds.
    """

    exit: int = 0
    ended_ns: int = 0
    released_ns: int = 0
    gave_up: str = ""
    keepers: int = 1
    leases: list[Told] = field(default_factory=list)
    """The run's leases, as the keeper told of them last."""

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {
            "exit_code": self.exit if self.exit >= 0 else None,
            "signal": signal.Signals(-self.exit).name if self.exit < 0 else None,
            "ended_ns": self.ended_ns,
            "released_ns": self.released_ns,
            "waited_ms": round((self.released_ns - self.ended_ns) / 1e6, 3),
            "gave_up": self.gave_up,
            "keepers": self.keepers,
            "leases": [
                {key: each[key] for key in ("lease", "pid", "state", "bytes", "log")}
                for each in self.leases
            ],
        }


class _GaveUp(Exception):
    pass


class _Signals:
    """Signals as numbers to read. Main thread only; what was set before comes back at exit."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._former = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in (*FORWARDED, signal.SIGCHLD):
            self._before[number] = signal.signal(number, _noted)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former)
        os.close(self._reading)
        os.close(self._writing)

    def wait(self, timeout: float) -> list[signal.Signals]:
        """Signals that have come, after at most ``timeout`` seconds."""
        select.select([self._reading], [], [], timeout)
        try:
            return [signal.Signals(number) for number in os.read(self._reading, 4096)]
        except BlockingIOError:
            return []


def _noted(number: int, frame: FrameType | None) -> None:
    """The number is in the pipe already (signal.set_wakeup_fd)."""


class Run:
    """Runs one command. Use once, from the main thread."""

    def __init__(
        self,
        target: Target,
        command: Sequence[str],
        *,
        patience: float | None,
        say: Callable[[str], None],
    ) -> None:
        """``patience`` in seconds after the command's end, None: for ever. ``say`` tells the
        user."""
        self._command = list(command)
        self._patience = patience
        self._say = say
        self._leases = RunLeases(target, secrets.randbits(62) + 1)
        self._outcome = Outcome()
        self._pid = 0
        self._interrupted = 0.0
        self._quarantine_told = False

    def carry_out(self) -> Outcome:
        """Start the command, wait for it and for its leases.

        Raises what kept the keeper from coming up (nothing was started then), FileNotFoundError or
        PermissionError if the command cannot be run.
        """
        if not self._command:
            raise UsageError("no command", operation="run", hint="holdfast run TARGET -- CMD ...")
        process.become_subreaper()
        self._leases.begin()
        try:
            with _Signals() as signals:
                self._pid = _start(self._command, self._leases.token)
                self._while_running(signals)
                self._outcome.ended_ns = time.monotonic_ns()
                try:
                    self._while_held(signals)
                except _GaveUp as why:
                    self._outcome.gave_up = str(why)
                self._outcome.released_ns = time.monotonic_ns()
        finally:
            self._leases.hang_up()
        self._outcome.leases = [*self._leases.lost, *self._leases.leases.values()]
        self._outcome.keepers = self._leases.keepers
        return self._outcome

    # -- while the command runs ------------------------------------------------------------

    def _while_running(self, signals: _Signals) -> None:
        looked = time.monotonic()
        while self._pid:
            for number in signals.wait(max(0.0, looked + LOOK - time.monotonic())):
                if number is signal.SIGCHLD:
                    # Look at leases before the dead are reaped: their descent is known now.
                    self._leases.look()
                    self._reap()
                else:
                    self._pass_on(number)
            if time.monotonic() - looked >= LOOK:
                self._leases.look()
                looked = time.monotonic()

    def _reap(self) -> None:
        """Take note of every child that ended: the command, and orphans of its own."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid != self._pid:
                continue
            if os.WIFSTOPPED(status):
                if os.WSTOPSIG(status) in JOB_STOPS and _has_terminal():
                    os.kill(os.getpid(), signal.SIGSTOP)  # the shell that waits for us must see it
                continue
            self._outcome.exit = os.waitstatus_to_exitcode(status)
            self._pid = 0

    def _pass_on(self, number: signal.Signals) -> None:
        if number is signal.SIGINT and self._insisted():
            self._say("interrupted twice: killing the command; its leases are still waited for")
            self._send(signal.SIGKILL)
            return
        if number not in FROM_TERMINAL or not self._shares_terminal():
            self._send(number)
        if number is signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)

    def _send(self, number: signal.Signals) -> None:
        if self._pid:  # not reaped, so the number is still its own
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self._pid, number)

    def _insisted(self) -> bool:
        now = time.monotonic()
        soon, self._interrupted = now - self._interrupted < INSIST, now
        return soon

    def _shares_terminal(self) -> bool:
        """Whether the terminal's signals reach the command without us."""
        try:
            return os.getpgid(self._pid) == os.getpgrp() and _in_foreground()
        except ProcessLookupError:
            return True

    # -- after its end ------------------------------------------------------------

    def _while_held(self, signals: _Signals) -> None:
        """Wait until the keeper says that every lease is released. Raises _GaveUp."""
        began = time.monotonic()
        pause, present, explained = 0.0, began, False
        while True:
            over = self._leases.over()
            now = time.monotonic()
            present = now if over is not None else present
            if self._leases.lost:
                raise _GaveUp("the keeper ended before it said that the leases were released")
            if over:
                return
            if now - present > ABSENCE:
                # Whatever was held last: nobody is left who could say that it is all.
                raise _GaveUp(f"the keeper is gone; last heard of: {self._waiting_for()}")
            if self._patience is not None and now - began > self._patience:
                raise _GaveUp(f"not released within {self._patience:g} s: {self._waiting_for()}")
            if not explained and now - began > EXPLAIN:
                explained = True
                self._say(f"the command has ended; waiting for {self._waiting_for()}")
            self._tell_of_quarantine()
            pause = min(max(LOOK_FIRST, 1.5 * pause), LOOK_LAST)
            for number in signals.wait(pause):
                self._while_held_on(number)

    def _while_held_on(self, number: signal.Signals) -> None:
        if number is signal.SIGCHLD:
            self._reap()
        elif number is signal.SIGQUIT:
            raise _GaveUp(f"told to quit while waiting for {self._waiting_for()}")
        elif number is signal.SIGINT:
            self._say(f"still waiting for {self._waiting_for()}")
            if self._insisted():
                self._signal_holders(signal.SIGKILL)
        elif number is signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif number in (signal.SIGTERM, signal.SIGHUP):
            self._signal_holders(number)

    def _signal_holders(self, number: signal.Signals) -> None:
        """Descendants that outlive the command with a lease."""
        for pid in self._leases.holders():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def _waiting_for(self) -> str:
        told = []
        for each in self._leases.held():
            why = f", {each['log'][-1][2]}" if each["log"] else ""
            told.append(
                f"lease {each['lease']} of pid {each['pid']} ({each['state']}, "
                f"{each['bytes']} bytes{why})"
            )
        return "; ".join(told) or "no lease"

    def _tell_of_quarantine(self) -> None:
        held = [each for each in self._leases.held() if each["state"] == "quarantine"]
        if held and not self._quarantine_told:
            self._quarantine_told = True
            self._say(
                f"{sum(each['bytes'] for each in held)} bytes are in quarantine, because nothing "
                f"proves the function quiet: {self._waiting_for()}. Waiting on; see holdfast ps"
            )


def _start(command: list[str], token: int) -> int:
    """The command in a process of its own, with this process's terminal, group and descriptors."""
    environment = {**os.environ, RUN_VARIABLE: f"{token:x}"}
    try:
        return os.posix_spawnp(
            command[0], command, environment, setsigmask=[], setsigdef=[signal.SIGPIPE]
        )
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES):
            raise
        raise SystemFailure(
            error.strerror or str(error), operation="run", target=command[0], errno=error.errno
        ) from error


def _terminal() -> int | None:
    """The foreground group of the controlling terminal, None if there is none (tty(4))."""
    try:
        fd = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.tcgetpgrp(fd)
    except OSError:
        return None
    finally:
        os.close(fd)


def _has_terminal() -> bool:
    return _terminal() is not None


def _in_foreground() -> bool:
    return _terminal() == os.getpgrp()
