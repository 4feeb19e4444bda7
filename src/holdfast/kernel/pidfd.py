# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end, as a pidfd: an identity that is never given to another process.

Facts. A pid is reused as soon as its process is reaped. ``SO_PEERCRED`` tells the pid that
connected, as a number. ``SO_PEERPIDFD`` (Linux 6.5, unix(7)) tells it as a pidfd, made from the
very ``struct pid`` that the socket remembers, so no reuse can deceive it.

Choice. Use ``SO_PEERPIDFD`` where there is one. On older kernels the client sends its own pidfd,
and it must name the pid that the credentials name. Cost of the fallback: a client that hands its
connected socket to another process and dies can be replaced by whoever gets its pid next and offers
a pidfd of it. The lease then lives until *that* process is dead and the socket hung up: longer,
never shorter.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.errors import NoPermission, ProtocolError
from holdfast.kernel import disposal, libc
from holdfast.kernel.failure import failure

SO_PEERPIDFD: Final = 77
"""asm-generic/socket.h"""

SO_PEERGROUPS: Final = 59
"""asm-generic/socket.h"""
_MOST_GROUPS: Final = 65536
"""NGROUPS_MAX (linux/limits.h)"""

_UCRED: Final = struct.Struct("=iII")
"""``struct ucred``: pid, uid, gid (unix(7))."""
assert _UCRED.size == 12


@dataclass(frozen=True, slots=True)
class Peer:
    """A process at the other end of a socket. The holder owns ``pidfd``.

    ``uid`` and ``gid`` are the effective ones at the time of connect(2), ``groups`` the
    supplementary ones.
    """

    pidfd: int
    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def open_self() -> int:
    """A pidfd of this process, close-on-exec. The caller owns it."""
    try:
        return os.pidfd_open(os.getpid())
    except OSError as error:
        raise failure(error, "pidfd_open") from error


def open_process(pid: int) -> int:
    """A pidfd of a process that cannot be reaped meanwhile, close-on-exec. The caller owns it.

    That is a child of this process which nobody waits for, or one that is known to run until its
    parent is told. SystemFailure (ESRCH) if it was reaped.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise failure(error, "pidfd_open", f"process {pid}") from error


def peer_pidfd(sock: socket.socket) -> int | None:
    """A pidfd of the process that connected ``sock``; None if the kernel cannot tell.

    The caller owns it. ``OSError`` ESRCH or EINVAL means that the peer is dead and reaped.
    """
    try:
        fd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return None
        raise
    os.set_inheritable(fd, False)
    return fd


def peer_user(sock: socket.socket) -> int:
    """Effective user id of the process that connected ``sock``, at that time (``SO_PEERCRED``)."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    except OSError as error:
        raise failure(error, "identify peer") from error
    _, uid, _ = _UCRED.unpack(raw)
    return int(uid)


def peer_groups(sock: socket.socket) -> tuple[int, ...]:
    """Supplementary groups of the process that connected ``sock`` (``SO_PEERGROUPS``)."""
    # Not by Python's getsockopt, which stops at 1024 bytes: a user can be in 65536 groups.
    raw = libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, 4 * _MOST_GROUPS)
    return struct.unpack(f"={len(raw) // 4}I", raw)


def pid_of(pidfd: int) -> int:
    """The pid behind a pidfd, -1 once it was reaped (proc_pid_fdinfo(5)).

    Raises ProtocolError if the descriptor is no pidfd.
    """
    try:
        lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise failure(error, "read pidfd", f"descriptor {pidfd}") from error
    for line in lines:
        name, _, value = line.partition(":")
        if name == "Pid":
            return int(value)
    raise ProtocolError("not a pidfd", operation="read pidfd", target=f"descriptor {pidfd}")


def is_dead(pidfd: int) -> bool:
    """True once the process has ended with all its threads (it may be a zombie). Never blocks.

    Anybody's process, not only a child. A pidfd becomes readable when the last thread has passed
    ``exit_notify``, which comes behind ``exit_mm`` and ``exit_files`` (kernel/exit.c ``do_exit``,
    fs/pidfs.c ``pidfd_poll``): by then it has no memory and no descriptors, so it can neither write
    to what it had mapped nor keep anybody's file open.
    """
    return await_death(pidfd, 0)


def await_death(pidfd: int, timeout: float | None = None) -> bool:
    """Wait until the process has ended, at most ``timeout`` seconds; whether it has."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(None if timeout is None else int(timeout * 1000 + 0.999)))


def kill(pidfd: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal to this very process; False if it was reaped already."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    except OSError as error:
        raise failure(error, "kill", f"descriptor {pidfd}") from error
    return True


def identify(sock: socket.socket, offered: int | None) -> Peer:
    """Who connected ``sock``, an ``AF_UNIX`` socket. The caller owns the pidfd in the answer.

    ``offered`` is the pidfd that the client sent of itself, or None; it is consumed in every case.
    Raises ProtocolError (no identity offered where one is needed, no pidfd, peer already gone) or
    NoPermission (the offered pidfd names someone else), with everything closed.
    """
    with ExitStack() as stack:
        if offered is not None:
            stack.callback(disposal.discard, [offered])
        try:
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            pid, uid, gid = _UCRED.unpack(raw)
            groups = peer_groups(sock)
            own = peer_pidfd(sock)
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENODATA):
                raise _gone() from error
            raise failure(error, "identify peer") from error
        if own is not None:
            stack.callback(os.close, own)
            if pid_of(own) != pid:
                raise _gone()
            chosen = own
        else:
            chosen = _confirm(offered, pid)
        return Peer(_keep(chosen), pid, uid, gid, groups)


def _confirm(offered: int | None, pid: int) -> int:
    if offered is None:
        raise ProtocolError(
            "the client sent no pidfd, and this kernel has no SO_PEERPIDFD",
            operation="identify peer",
            hint="send a pidfd of the client itself with its first message",
        )
    named = pid_of(offered)
    if named == -1:
        raise _gone()
    if named != pid:
        raise NoPermission(
            f"the pidfd names process {named}, the credentials {pid}", operation="identify peer"
        )
    return offered


def _keep(fd: int) -> int:
    """A duplicate for the caller, so that every original is closed on every path."""
    try:
        return os.dup(fd)
    except OSError as error:
        raise failure(error, "identify peer") from error


def _gone() -> ProtocolError:
    return ProtocolError("the peer is already gone", operation="identify peer")
