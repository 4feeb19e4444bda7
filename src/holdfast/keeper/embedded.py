# SPDX-License-Identifier: Apache-2.0
"""The embedded default: a keeper for this user, started when it is missing, ended when idle.

Facts. Several processes may open the same target at the same moment; a keeper may be ending just
then; a stale socket file may lie around; the directory may not be ours.

Choice. Each target has one socket in a private directory of the user. Whoever finds nobody there
takes a lock, looks again, starts ``holdfast serve`` in a session of its own, and waits for one line
on a pipe: the keeper's readiness, or its error. The lock file is never removed: a lock on a
deleted file guards nothing.

A keeper that serves other users has its socket in a directory of the system instead, which only
its owner can change. Clients look there when their user has no keeper of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import select
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

from holdfast.errors import (
    HoldfastError,
    KeeperUnreachable,
    NoPermission,
    SystemFailure,
    from_fields,
    to_fields,
)
from holdfast.kernel import packets
from holdfast.kernel.failure import failure
from holdfast.values import Target

RUNTIME_VARIABLE = "HOLDFAST_RUNTIME_DIR"
SYSTEM_VARIABLE = "HOLDFAST_SYSTEM_DIR"
SYSTEM_DEFAULT = "/run/holdfast"
SOCKET_VARIABLE = "HOLDFAST_SOCKET"
"""If set: the one socket to connect to, and no keeper is ever started."""
RUN_VARIABLE = "HOLDFAST_RUN"
"""Set by ``holdfast run``: which leases it waits for."""
IDLE_VARIABLE = "HOLDFAST_IDLE"
IDLE_DEFAULT = 2.0
"""Seconds without clients after which an embedded keeper ends."""
START_TIMEOUT = 60.0
MAX_READY_LINE = 65536


def runtime_dir() -> Path:
    """The user's private directory for sockets, made if missing.

    ``$HOLDFAST_RUNTIME_DIR``, else ``$XDG_RUNTIME_DIR/holdfast``, else ``/tmp/holdfast-UID``.
    Refused (NoPermission) unless it belongs to this user alone.
    """
    chosen = os.environ.get(RUNTIME_VARIABLE)
    if chosen:
        path = Path(chosen)
    elif os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(os.environ["XDG_RUNTIME_DIR"]) / "holdfast"
    else:
        path = Path(f"/tmp/holdfast-{os.getuid()}")  # noqa: S108 - owner and mode are checked
    try:
        path.mkdir(mode=0o700, parents=bool(chosen), exist_ok=True)
        info = path.lstat()
    except OSError as error:
        raise SystemFailure(
            error.strerror or str(error), operation="make runtime directory", target=str(path),
            errno=error.errno, hint=f"set {RUNTIME_VARIABLE} to a directory of your own",
        ) from error  # fmt: skip
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise NoPermission(
            "it is not a directory of this user's alone (mode 0700)",
            operation="use runtime directory",
            target=str(path),
            hint=f"remove it, or set {RUNTIME_VARIABLE}",
        )
    return path


def system_dir() -> Path:
    """Where keepers that serve other users listen: ``$HOLDFAST_SYSTEM_DIR``, or /run/holdfast."""
    return Path(os.environ.get(SYSTEM_VARIABLE) or SYSTEM_DEFAULT)


def make_system_dir() -> Path:
    """The directory for a keeper's socket that others can reach, made if missing (mode 0755).

    Raises NoPermission or SystemFailure; a service has it made (``RuntimeDirectory=holdfast``).
    """
    path = system_dir()
    try:
        path.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise failure(error, "make system directory", str(path)) from error
    require_trusted(path)
    return path


def require_trusted(path: Path) -> None:
    """Raise NoPermission if others than its owner can put sockets into a directory."""
    info = path.stat()
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NoPermission(
            "others than its owner can write to it: whoever answers there could be anybody",
            operation="use system directory",
            target=str(path),
            hint=f"chmod 0755 {path}",
        )


def socket_name(target: Target) -> str:
    """The file name of a target's socket.

    A real function has one keeper, whatever options it was started with.
    """
    text = str(target) if target.scheme != "pci" else f"pci:{target.bdf}"
    slug = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:32]
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{slug}-{digest}.sock"


def socket_path(target: Target) -> Path:
    """Where this user's own keeper of a target listens."""
    return runtime_dir() / socket_name(target)


def sockets() -> list[Path]:
    """Sockets of every keeper that this user may know of, its own first."""
    return [
        *sorted(runtime_dir().glob("*.sock")),
        *(sorted(system_dir().glob("*.sock")) if system_dir().is_dir() else []),
    ]


def reach(target: Target) -> socket.socket:
    """Connect to a keeper of the target that is there: this user's own, else the system's.

    Raises FileNotFoundError or ConnectionRefusedError if there is none, NoPermission or
    KeeperUnreachable if it cannot be talked to. Starts nothing.
    """
    if chosen := os.environ.get(SOCKET_VARIABLE):
        return _reach(Path(chosen), target)
    try:
        return _reach(socket_path(target), target)
    except (FileNotFoundError, ConnectionRefusedError):
        path = system_dir() / socket_name(target)
        if not path.exists():
            raise
        require_trusted(path.parent)
        return _reach(path, target)


def _reach(path: Path, target: Target) -> socket.socket:
    try:
        return packets.connect(str(path), START_TIMEOUT)
    except (FileNotFoundError, ConnectionRefusedError):
        raise
    except PermissionError as error:
        raise NoPermission(
            "the keeper's socket does not let this user in",
            operation="open", target=str(target), errno=error.errno,
            hint=f"ask the keeper's owner, or see the mode of {path}",
        ) from error  # fmt: skip
    except OSError as error:
        raise KeeperUnreachable(
            error.strerror or str(error), operation="open", target=str(target),
            errno=error.errno, hint=f"look at {path}",
        ) from error  # fmt: skip


def connect(target: Target, timeout: float | None) -> socket.socket:
    """Connect to the target's keeper; start one if there is none and the target allows it."""
    deadline = time.monotonic() + max(timeout or 0, START_TIMEOUT)
    while True:
        try:
            return reach(target)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if chosen := os.environ.get(SOCKET_VARIABLE):
                raise KeeperUnreachable(
                    "no keeper listens there", operation="open", target=str(target),
                    errno=error.errno, hint=f"{SOCKET_VARIABLE} is {chosen}",
                ) from error  # fmt: skip
        if time.monotonic() > deadline:
            raise KeeperUnreachable("no keeper came up", operation="open", target=str(target))
        _start(target, socket_path(target))


def _start(target: Target, path: Path) -> None:
    """Start a keeper under the target's lock, unless someone else just did."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            packets.connect(str(path), START_TIMEOUT).close()
        except OSError:
            _spawn(target)


def _spawn(target: Target) -> None:
    """Run ``holdfast serve`` in a session of its own and wait until it is ready."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    idle = os.environ.get(IDLE_VARIABLE, str(IDLE_DEFAULT))
    # A keeper is nobody's part: not of the run in which it happened to be missed.
    environment = {key: text for key, text in os.environ.items() if key != RUN_VARIABLE}
    try:
        process = Detached(
            [
                sys.executable, "-m", "holdfast", "serve", str(target),
                "--idle", idle, "--ready-fd", str(writing),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writing,),
            start_new_session=True,
            env=environment,
        )  # fmt: skip
    finally:
        os.close(writing)
    try:
        line = read_line(reading)
    finally:
        os.close(reading)
    # The keeper is its own master from here on: nobody waits for it, so it must not become a
    # zombie of a long-lived client either.
    _forget(process)
    raise_unless_ready(line, target)


def read_line(fd: int) -> bytes:
    """What a started process reports: one line, or less if it ends or takes too long."""
    line = b""
    deadline = time.monotonic() + START_TIMEOUT
    while not line.endswith(b"\n") and len(line) < MAX_READY_LINE:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        line += chunk
    return line


def raise_unless_ready(line: bytes, target: Target) -> None:
    """Take what a started keeper said of itself: nothing to do, or its error to raise."""
    if line.strip() == b"ready":
        return
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if isinstance(fields, dict):
        raise from_fields(fields)
    raise KeeperUnreachable(
        "the keeper ended before it was ready",
        operation="start keeper",
        target=str(target),
        hint=f"run it by hand to see why: python3 -m holdfast serve {target}",
    )


class Detached(subprocess.Popen[bytes]):
    """A process that outlives this one on purpose: no warning when its handle goes."""

    def __del__(self) -> None:
        self.poll()


_started: list[Detached] = []


def _forget(process: Detached) -> None:
    """Keep the handle, and reap keepers that have ended since."""
    _started[:] = [old for old in _started if old.poll() is None]
    _started.append(process)


def report_ready(fd: int, error: HoldfastError | None) -> None:
    """In the process that was started: tell the starter that it is up, or why it is not."""
    line = "ready" if error is None else json.dumps(to_fields(error))
    os.write(fd, line.encode() + b"\n")
    os.close(fd)
