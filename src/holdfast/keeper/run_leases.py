# SPDX-License-Identifier: Apache-2.0
"""Which leases belong to one ``holdfast run``, and what has become of them.

Facts. A command starts processes that start others, that change their session, their user or their
environment, and that die before anybody looked at them. A lease may even come into being after the
death of its process, because what it had sent was still in the keeper's queue.

Choice. Two signs, either of which is enough: the run's token, which processes inherit in their
environment and clients send with their first message; and descent from the run's process, which is
the reaper of all of them. Who is to be believed gone is asked for on a *new* connection: the keeper
takes connections and first messages in their order, so everything that a dead process had sent is
known to the keeper by the time it answers.

Cost. A process that both cleared its environment and was born and died between two looks is not
noticed, unless its lease is seen by its descent while it lives.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import HoldfastError, KeeperUnreachable
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.keeper.opening import connect
from holdfast.kernel import process
from holdfast.values import Target

Told = dict[str, Any]


@dataclass(slots=True)
class RunLeases:
    """Leases of the processes of one run. One thread only. Holds a connection, so that a keeper
    that ends when idle does not."""

    target: Target
    token: str
    leases: dict[int, Told] = field(default_factory=dict)
    """What was last heard of each of the run's leases."""
    lost: list[Told] = field(default_factory=list)
    """Leases whose keeper ended before it said that they were released."""
    keeper: int = 0
    """The keeper's pid, 0 while there is none."""
    keepers: int = 0
    """How many keepers have been talked to."""
    _client: LeaseClient | None = None
    _settled: int = 0
    """Leases up to this number are released, or somebody else's."""
    _first: int = 0

    def begin(self) -> None:
        """Connect, starting a keeper if there is none. Raises what keeps it from coming up."""
        self._take(connect(self.target))
        self._settled = self._first

    def _take(self, client: LeaseClient) -> None:
        self._client = client
        told = client.ps((1 << 63) - 1)
        if int(told["keeper"]) != self.keeper:
            self.keeper = int(told["keeper"])
            self.keepers += 1
        if int(told["you"]) < self._first:
            # Not a successor: it counts from the start, and knows nothing of what was before.
            self.lost += self.held()
            self.leases.clear()
            self._settled = 0
        self._first = int(told["you"])

    def _connection(self) -> LeaseClient:
        """The present connection, or one to a keeper that is there; none is started."""
        if self._client is None:
            try:
                client = LeaseClient(embedded.reach(self.target), self.target)
            except (FileNotFoundError, ConnectionRefusedError) as error:
                raise KeeperUnreachable("no keeper is there", operation="run",
                                        target=str(self.target)) from error  # fmt: skip
            try:
                client.greet()
                self._take(client)
            except BaseException:
                client.close()
                raise
        assert self._client is not None
        return self._client

    def look(self) -> bool:
        """Ask the keeper what has become of the run's leases; False if it cannot be reached now."""
        try:
            client = self._connection()
            self._note(client.ps_all(self._settled)["leases"])
        except HoldfastError:
            self.hang_up()
            self.keeper = 0
            return False
        return True

    def over(self) -> bool | None:
        """Whether every lease is released and none can come any more; None: no keeper is there.

        To be asked once the run's processes that could open one are dead.
        """
        # A new connection comes behind everything that was sent before; the old one is closed
        # after it, so that no keeper believes to be alone.
        old, self._client = self._client, None
        try:
            if not self.look():
                return None
            opening = self._connection().ps((1 << 63) - 1, self.token)["opening"]
        except HoldfastError:
            return None
        finally:
            _close(old)
        return not opening and not self.held()

    def _note(self, told: list[Told]) -> None:
        present = {int(each["lease"]): each for each in told}
        for number, each in present.items():
            if number in self.leases or self._is_ours(each):
                self.leases[number] = each
        for number, each in self.leases.items():
            if number > self._settled and number not in present:
                # So long ago that the keeper has forgotten it: it forgets no living lease.
                each["state"] = "released"
        waiting = [number for number, each in present.items() if each["state"] != "released"]
        self._settled = max(self._settled, min(waiting, default=max(present, default=0) + 1) - 1)

    def _is_ours(self, told: Told) -> bool:
        if told["run"] == self.token:
            return True
        # Also of the dead, as long as they are not reaped. Should the number of a stranger be one
        # of ours by now, then its lease is waited for as well.
        pid = int(told["pid"])
        return pid > 1 and process.descends_from(pid, os.getpid())

    def held(self) -> list[Told]:
        """The run's leases that are not released yet, as last heard."""
        return [each for each in self.leases.values() if each["state"] != "released"]

    def holders(self) -> list[int]:
        """Descendants of this process that hold a lease and live."""
        return [
            int(each["pid"])
            for each in self.held()
            if not each["process_dead"] and process.descends_from(int(each["pid"]), os.getpid())
        ]

    def hang_up(self) -> None:
        """Close the connection. Idempotent."""
        client, self._client = self._client, None
        _close(client)


def _close(client: LeaseClient | None) -> None:
    if client is not None:
        with suppress(HoldfastError):
            client.close()
