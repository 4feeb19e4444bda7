# SPDX-License-Identifier: Apache-2.0
"""A campaign's view of its keeper: ``ps``, through the deaths of keepers.

Only used to know *when* to look (is a lease released yet?) and for the states' times. What is
found is found outside: in memory, in ``/proc``, in exit statuses.
"""

from __future__ import annotations

import time
from typing import Any

from holdfast.errors import HoldfastError, KeeperGone
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.kernel import packets
from holdfast.values import Target

POLL = 0.003
ANSWER_TIMEOUT = 20.0
"""Seconds in which a keeper must answer, killed or not."""
SETTLED = frozenset({"released", "quarantine"})


class Eyes:
    """Asks the keeper of a target, on a connection that is made anew when a keeper dies.

    Never starts a keeper. Not thread-safe; after a fork the child calls :meth:`drop`.
    """

    def __init__(self, target: str) -> None:
        self._target = Target.parse(target)
        self._client: LeaseClient | None = None

    def ps(self, after: int = 0, timeout: float = ANSWER_TIMEOUT) -> dict[str, Any]:
        """Every lease numbered above ``after``. Raises KeeperGone if nobody answers in time."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self._ask(after)
            except (HoldfastError, OSError) as error:
                self.close()
                if time.monotonic() > deadline:
                    raise KeeperGone(
                        f"no answer in {timeout:g} s: {error}",
                        operation="ps",
                        target=str(self._target),
                    ) from error
                time.sleep(POLL)

    def _ask(self, after: int) -> dict[str, Any]:
        if self._client is None:
            path = embedded.socket_path(self._target)
            client = LeaseClient(packets.connect(str(path), 5.0), self._target)
            try:
                client.greet()
            except BaseException:
                client.close()
                raise
            self._client = client
        told = self._client.ps(after)
        while told["more"]:
            page = self._client.ps(told["leases"][-1]["lease"])
            told["leases"] += page["leases"]
            told["more"] = page["more"]
        return told

    def unsettled(self) -> int:
        """Leases that are neither released nor, for good reason, kept in quarantine."""
        return sum(lease["state"] not in SETTLED for lease in self.ps()["leases"])

    def lease_of(self, pid: int, after: int) -> dict[str, Any] | None:
        """The newest lease of a process among those numbered above ``after``."""
        found = [lease for lease in self.ps(after)["leases"] if lease["pid"] == pid]
        return found[-1] if found else None

    def drop(self) -> None:
        """In a forked child: let go of the parent's connection without a word."""
        if self._client is not None:
            self._client.drop()
            self._client = None

    def close(self) -> None:
        """Hang up. Idempotent."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
