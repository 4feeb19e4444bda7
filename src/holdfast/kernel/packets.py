# SPDX-License-Identifier: Apache-2.0
"""Packets with descriptors over ``AF_UNIX`` ``SOCK_SEQPACKET`` sockets (unix(7)).

A packet arrives whole or not at all, and its descriptors arrive with it, so a peer that dies
between two bytes leaves nothing out of step. ``OSError`` of the socket calls (BlockingIOError,
BrokenPipeError, ConnectionResetError) passes through unchanged.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from holdfast.errors import Busy, ProtocolError, SystemFailure, UsageError
from holdfast.kernel import disposal
from holdfast.kernel.failure import failure

SCM_MAX_FD: Final = 253
"""Most descriptors in one message (include/net/scm.h)."""

_LONGEST_PATH: Final = 107
"""``sun_path`` has 108 bytes with its terminator (unix(7))."""

_RETRY: Final = 0.005
_LOCK_PATIENCE: Final = 5.0
"""Seconds between two tries, and how long a starting server waits for another one."""


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send one packet. The caller keeps its descriptors; nothing was sent if this raises."""
    if not data:
        raise UsageError("an empty packet would read as a hang-up", operation="send packet")
    if len(fds) > SCM_MAX_FD:
        raise UsageError(
            f"{len(fds)} descriptors, a packet carries {SCM_MAX_FD}", operation="send packet"
        )
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
    if sent != len(data):
        raise SystemFailure(f"{sent} of {len(data)} bytes were taken", operation="send packet")


def receive(sock: socket.socket, max_bytes: int, max_fds: int) -> tuple[bytes, list[int]]:
    """The next packet and its descriptors (close-on-exec), which the caller owns.

    Empty bytes mean that the peer hung up. A packet longer than ``max_bytes`` or with more than
    ``max_fds`` descriptors is a ProtocolError; every descriptor that came with it is closed.
    """
    # Room for all there can be: what does not fit is closed by the kernel, in this thread, however
    # long that takes (see ``disposal``).
    room = socket.CMSG_LEN(SCM_MAX_FD * 4)
    data, ancillary, flags, _ = sock.recvmsg(max_bytes, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    problem = ""
    if flags & socket.MSG_TRUNC:
        problem = f"the packet has more than {max_bytes} bytes"
    elif flags & socket.MSG_CTRUNC or len(fds) > max_fds:
        problem = f"the packet has more than {max_fds} descriptors"
    elif fds and not data:
        problem = "the packet has descriptors and no data"
    if problem:
        disposal.discard(fds)
        raise ProtocolError(problem, operation="receive packet")
    return data, fds.tolist()


def listen(
    path: str | os.PathLike[str],
    backlog: int,
    kind: socket.SocketKind = socket.SOCK_SEQPACKET,
    mode: int = 0o600,
) -> socket.socket:
    """A listening socket at ``path``, by default for this user only. The caller owns it.

    Who may write to the socket's file may connect (unix(7)).

    A socket file that a dead server left is replaced: only after a connect there was refused, and
    under a lock on the directory, so that two servers that start at once cannot remove each
    other's. Raises Busy if a server answers at ``path`` or something else than a socket is there.
    """
    name = _checked(path, "listen")
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        # The mode of the socket is that of the file bind(2) makes (net/unix/af_unix.c,
        # unix_bind_bsd): no moment in which others could connect, and no umask changed.
        os.fchmod(sock.fileno(), mode)
        with _locked(Path(name).parent):
            _remove_stale(name, kind)
            sock.bind(name)
            if mode & ~0o700:
                os.chmod(name, mode)  # bind(2) took away what the umask says
            sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise failure(error, "listen", name) from error
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: str | os.PathLike[str], timeout: float) -> socket.socket:
    """A blocking socket connected to the server at ``path``. The caller owns it.

    Waits up to ``timeout`` seconds for a server whose backlog is full, then raises TimeoutError.
    FileNotFoundError and ConnectionRefusedError pass through: no server is there.
    """
    name = _checked(path, "connect")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    deadline = time.monotonic() + timeout
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(name)
                break
            except BlockingIOError as error:
                # A Unix socket is never "in progress": the backlog is full, and there is nothing
                # to poll for. A blocking connect could not be resumed after a signal.
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        errno.ETIMEDOUT, f"no server took the connection in {timeout:g} s", name
                    ) from error
                time.sleep(_RETRY)
        sock.setblocking(True)
    except BaseException:
        sock.close()
        raise
    return sock


def _checked(path: str | os.PathLike[str], operation: str) -> str:
    name = os.fspath(path)
    length = len(os.fsencode(name))
    if not 0 < length <= _LONGEST_PATH:
        raise UsageError(
            f"the socket path has {length} bytes, at most {_LONGEST_PATH} fit",
            operation=operation,
            target=name,
            hint="use a shorter directory (XDG_RUNTIME_DIR)",
        )
    return name


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold an flock(2) on a directory: no lock file that could be left behind."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise Busy(
                        "another process holds the directory's lock",
                        operation="listen",
                        target=str(directory),
                    ) from error
                time.sleep(_RETRY)
        yield
    finally:
        os.close(fd)


def _remove_stale(name: str, kind: socket.SocketKind) -> None:
    """Remove a socket that nobody listens on; Busy for anything else that is in the way."""
    try:
        mode = os.lstat(name).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Busy("something else than a socket is there", operation="listen", target=name)
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            os.unlink(name)
            return
        except OSError as error:
            # A full backlog, or a server of another socket type: somebody is there.
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
    raise Busy("a server already answers there", operation="listen", target=name)
