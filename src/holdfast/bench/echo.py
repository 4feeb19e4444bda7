# SPDX-License-Identifier: Apache-2.0
"""Bare peers made of system calls only: a process that echoes packets, with and without a name."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PACKET = 512
"""More than the longest packet that is echoed."""


def _child(body: Callable[[], None]) -> int:
    """Fork a process that runs ``body``; returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(0)
    return pid


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _serve(sock: socket.socket) -> None:
    while packet := sock.recv(PACKET):
        sock.send(packet)


@contextmanager
def echo() -> Iterator[socket.socket]:
    """A ``SOCK_SEQPACKET`` socket with an echoing process at its other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def body() -> None:
        ours.close()
        _serve(theirs)

    with ours:
        with theirs:
            pid = _child(body)
        try:
            yield ours
        finally:
            _end(pid)


@contextmanager
def echo_server(directory: str) -> Iterator[str]:
    """The path of a socket on which a process takes one connection after the other and echoes."""
    path = str(Path(directory, "echo.sock"))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def body() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                _serve(connection)

    with listener:
        listener.bind(path)
        listener.listen(8)
        pid = _child(body)
    try:
        yield path
    finally:
        _end(pid)
        Path(path).unlink()
