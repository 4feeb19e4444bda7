# SPDX-License-Identifier: Apache-2.0
"""Who holds how much: counters for quotas and for ``holdfast ps``.

The ledger is what the keeper believes. Leaks are never measured from it (``kernel/procfs.py``).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from holdfast.errors import QuotaExceeded, UsageError
from holdfast.values import LeaseId


class Holding(enum.StrEnum):
    """Why memory is held."""

    LIVE = "live"
    DRAINING = "draining"
    QUARANTINED = "quarantined"


@dataclass(slots=True)
class _Account:
    nbytes: int = 0
    buffers: int = 0
    holding: Holding = Holding.LIVE


class Ledger:
    """Bytes and pieces of memory per lease, each lease against the same quota.

    ``quota`` in bytes, ``buffers`` in charges (slabs, control memory). Not thread-safe.
    """

    def __init__(self, quota: int, buffers: int) -> None:
        self.quota = quota
        self.buffers = buffers
        self._accounts: dict[LeaseId, _Account] = {}

    def charge(self, lease: LeaseId, nbytes: int) -> None:
        """Put one piece of ``nbytes`` on a lease's account; QuotaExceeded with nothing changed."""
        account = self._accounts.get(lease, _Account())
        if account.nbytes + nbytes > self.quota:
            raise QuotaExceeded(
                f"{nbytes} bytes more than the {account.nbytes} held would pass the quota of"
                f" {self.quota}",
                operation="alloc",
                target=f"lease {lease}",
            )
        if account.buffers >= self.buffers:
            raise QuotaExceeded(
                f"the lease holds {account.buffers} pieces of memory, its quota",
                operation="alloc",
                target=f"lease {lease}",
            )
        self.adopt(lease, nbytes)

    def adopt(self, lease: LeaseId, nbytes: int) -> None:
        """Put one piece that exists already on an account, whatever the quota says."""
        account = self._accounts.setdefault(lease, _Account())
        account.nbytes += nbytes
        account.buffers += 1

    def discharge(self, lease: LeaseId, nbytes: int) -> None:
        """Take one piece off a lease's account. UsageError if it holds less."""
        account = self._accounts.get(lease)
        if account is None or account.nbytes < nbytes:
            raise UsageError(
                f"{nbytes} bytes are more than it holds",
                operation="discharge",
                target=f"lease {lease}",
            )
        account.nbytes -= nbytes
        account.buffers -= 1
        if not account.buffers:
            del self._accounts[lease]

    def move(self, lease: LeaseId, holding: Holding) -> None:
        """Say why a lease's memory is held from now on. Nothing happens if it holds none."""
        account = self._accounts.get(lease)
        if account is not None:
            account.holding = holding

    def held_by(self, lease: LeaseId) -> int:
        """Bytes on a lease's account."""
        account = self._accounts.get(lease)
        return account.nbytes if account is not None else 0

    def total(self, holding: Holding) -> int:
        """Bytes of all leases whose memory is held for this reason."""
        return sum(a.nbytes for a in self._accounts.values() if a.holding is holding)
