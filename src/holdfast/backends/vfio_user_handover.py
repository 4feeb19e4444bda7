# SPDX-License-Identifier: Apache-2.0
"""What a successor of a vfio-user client gets, and how it starts with it.

The connection goes on: the server notices nothing. Replies to the predecessor's requests may still
come; the successor's ids start behind the predecessor's last one, so they are dropped. The server's
own commands are still in the socket, as far as they were not answered (``vfio_user_trail``).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Final

from holdfast.backends.vfio_user_link import ClientLink
from holdfast.backends.vfio_user_memory import Served, ServedMemory, of_file
from holdfast.backends.vfio_user_trail import Trail
from holdfast.contracts import FileWindow, Handover, MemoryWindow
from holdfast.errors import ProtocolError, UsageError
from holdfast.wire.vfio_user.capabilities import Capabilities
from holdfast.wire.vfio_user.client import ClientSession

KIND: Final = "vfio-user"
"""What ``notes["backend"]`` of such a handover says."""


def describe(link: ClientLink, peer: Capabilities) -> Handover:
    """What a successor needs; the descriptors stay the link's."""
    return Handover(link.descriptors(), {"backend": KIND, "peer": asdict(peer)})


def take_up(
    handover: Handover,
    memory: ServedMemory,
    memories: Iterable[MemoryWindow],
    files: Iterable[FileWindow],
    target: str,
) -> tuple[ClientSession, ClientLink]:
    """The predecessor's connection, with its windows served from the first moment on.

    Takes ownership of ``handover.fds``, also on error. Descriptors of ``files`` stay the caller's.
    Raises ProtocolError if the handover is not one of a vfio-user connection.
    """
    fds = dict(handover.fds)
    trail: Trail | None = None
    sock: socket.socket | None = None
    link: ClientLink | None = None
    try:
        peer = _peer(handover.notes, target)
        if not {"socket", "trail"} <= fds.keys():
            raise _no_handover(f"descriptors {sorted(fds)}", target)
        windows = [Served(*window) for window in memories]
        for iova, size, perm, fd, offset in files:
            windows.append(Served(iova, size, perm, of_file(fd, offset, size, perm)))
        _serve(memory, windows, target)
        trail = Trail(fds.pop("trail"))
        session = ClientSession(first_id=trail.last_id + 1)
        session.peer = peer
        sock = _socket(fds, "socket", target)
        link = ClientLink(sock, session, memory, target, trail)
        if "twin" in fds:
            link.add_twin(fds.pop("twin"))
    except BaseException:
        if link is not None:
            link.close()
        else:
            if sock is not None:
                sock.close()
            if trail is not None:
                trail.close()
        raise
    finally:
        for fd in fds.values():
            os.close(fd)
    return session, link


def _serve(memory: ServedMemory, windows: Iterable[Served], target: str) -> None:
    for window in windows:
        try:
            memory.add(window)
        except OSError as error:
            raise UsageError(
                f"window at {window.iova:#x}: {error.strerror}", operation="resume", target=target
            ) from error


def _peer(notes: Mapping[str, Any], target: str) -> Capabilities:
    try:
        return Capabilities(**notes["peer"])
    except (KeyError, TypeError) as error:
        raise _no_handover(f"notes {dict(notes)}", target) from error


def _socket(fds: dict[str, int], name: str, target: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=fds[name])
    except OSError as error:
        raise _no_handover(f"{name} is no socket", target) from error
    del fds[name]
    return sock


def _no_handover(what: str, target: str) -> ProtocolError:
    return ProtocolError(f"no vfio-user connection: {what}", operation="resume", target=target)
