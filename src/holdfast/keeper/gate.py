# SPDX-License-Identifier: Apache-2.0
"""Who is listened to at all: decided when a connection is accepted, before anything was read.

Facts. Anybody who can reach the socket can connect, as often as there are descriptors, and say
nothing. A process without free descriptors can neither accept nor punch memory of the dead. A
connection that is not accepted stays in the queue, and a loop that tries again at once spins.

Choice. Every connection is accepted as long as a reserve of descriptors is left for the work on
leases that exist; beyond, and beyond a number of connections per user, it is told why and hung up
on at once. Who has not said Hello within :data:`GREETING` seconds is hung up on, too.

Cost. Under an attack from the keeper's own user newcomers of this user are refused. Leases that
exist go on.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from contextlib import suppress

from holdfast.errors import HoldfastError, QuotaExceeded, to_fields
from holdfast.kernel import disposal, limits, packets, pidfd
from holdfast.wire import lease as wire

GREETING = 10.0
"""Seconds in which a client must have said Hello."""
MOST_SILENT = 256
"""Connections of one user that have not said Hello yet."""
SPARE = 32
"""Connections of a user beyond its quota of leases: to ask ``ps``, to be refused with a reason."""
KEPT = 128
"""Descriptors that newcomers do not take."""


class Gate:
    """Counts connections per user. Loop only."""

    def __init__(self, user_leases: int | None) -> None:
        self._most = None if user_leases is None else user_leases + SPARE
        self._silent: Counter[int] = Counter()
        self._all: Counter[int] = Counter()

    def enter(self, sock: socket.socket) -> int | None:
        """Let a new connection in: its user, for :meth:`leave`. None: it was hung up on."""
        try:
            uid = pidfd.peer_user(sock)
            self._require_room(uid)
        except HoldfastError as error:
            with suppress(OSError):
                packets.send(sock, wire.encode(wire.Failed(error=to_fields(error))))
            disposal.hang_up(sock)
            return None
        self._silent[uid] += 1
        self._all[uid] += 1
        return uid

    def greeted(self, uid: int) -> None:
        """A connection said Hello, or will not any more."""
        self._take(self._silent, uid)

    def leave(self, uid: int) -> None:
        """A connection that was let in has ended."""
        self._take(self._all, uid)

    def _require_room(self, uid: int) -> None:
        limits.require_descriptors(KEPT, operation="connect")
        if self._silent[uid] >= MOST_SILENT:
            raise QuotaExceeded(
                f"user {uid} has {MOST_SILENT} connections that say nothing",
                operation="connect",
                hint="close them",
            )
        if self._most is not None and uid not in (0, os.geteuid()) and self._all[uid] >= self._most:
            raise QuotaExceeded(
                f"user {uid} has {self._all[uid]} connections, the quota is {self._most}"
                " connections",
                operation="connect",
                hint="close some, or serve with --user-leases",
            )

    @staticmethod
    def _take(counter: Counter[int], uid: int) -> None:
        counter[uid] -= 1
        if not counter[uid]:
            del counter[uid]
