# SPDX-License-Identifier: Apache-2.0
"""Who holds how much: what quotas of leases and of users are judged by.

A lease is one connection, and a user can have many: a quota of leases alone would bind nobody. So
every piece of memory is on two accounts, its lease's and its user's, and must fit on both.

The ledger is what the keeper believes. Leaks are never measured from it (``kernel/procfs.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.errors import QuotaExceeded, UsageError
from holdfast.values import LeaseId


@dataclass(frozen=True, slots=True)
class Quota:
    """What one holder may have. ``nbytes`` in bytes, ``buffers`` in pieces; None: no limit."""

    nbytes: int | None = None
    buffers: int | None = None


@dataclass(slots=True)
class _Account:
    nbytes: int = 0
    buffers: int = 0


class Ledger:
    """Bytes and pieces of memory (slabs, control memory, pins) per lease and per user.

    ``quota`` in bytes and ``buffers`` in pieces hold for each lease, ``per_user`` for each user
    over all leases, those that are still dying included. Not thread-safe.
    """

    def __init__(self, quota: int, buffers: int, per_user: Quota | None = None) -> None:
        self.per_lease = Quota(quota, buffers)
        self.per_user = per_user or Quota()
        self._leases: dict[LeaseId, _Account] = {}
        self._users: dict[int, _Account] = {}
        self._user_of: dict[LeaseId, int] = {}

    def charge(self, lease: LeaseId, nbytes: int, user: int = 0) -> None:
        """Put one piece of ``nbytes`` on both accounts; QuotaExceeded with nothing changed."""
        _require_fit(
            self._leases.get(lease), self.per_lease, nbytes, f"lease {lease}", "--quota, --buffers"
        )
        _require_fit(
            self._users.get(user),
            self.per_user,
            nbytes,
            f"user {user}",
            "--user-quota, --user-buffers",
        )
        self.adopt(lease, nbytes, user)

    def adopt(self, lease: LeaseId, nbytes: int, user: int = 0) -> None:
        """Put one piece that exists already on both accounts, whatever the quotas say."""
        holder = self._user_of.setdefault(lease, user)
        for account in (
            self._leases.setdefault(lease, _Account()),
            self._users.setdefault(holder, _Account()),
        ):
            account.nbytes += nbytes
            account.buffers += 1

    def discharge(self, lease: LeaseId, nbytes: int) -> None:
        """Take one piece off a lease's account and its user's. UsageError if it holds less."""
        account = self._leases.get(lease)
        if account is None or account.nbytes < nbytes:
            raise UsageError(
                f"{nbytes} bytes are more than it holds",
                operation="discharge",
                target=f"lease {lease}",
            )
        user = self._user_of[lease]
        for each in (account, self._users[user]):
            each.nbytes -= nbytes
            each.buffers -= 1
        if not account.buffers:
            del self._leases[lease], self._user_of[lease]
        if not self._users[user].buffers:
            del self._users[user]

    def held_by(self, lease: LeaseId) -> int:
        """Bytes on a lease's account."""
        account = self._leases.get(lease)
        return account.nbytes if account is not None else 0

    def held_by_user(self, user: int) -> int:
        """Bytes on a user's account."""
        account = self._users.get(user)
        return account.nbytes if account is not None else 0


def _require_fit(
    account: _Account | None, quota: Quota, nbytes: int, name: str, options: str
) -> None:
    """Raise QuotaExceeded unless one more piece fits on an account."""
    held = account or _Account()
    hint = f"free buffers, or serve with a larger quota ({options})"
    if quota.nbytes is not None and held.nbytes + nbytes > quota.nbytes:
        raise QuotaExceeded(
            f"{nbytes} bytes more than the {held.nbytes} held would pass the quota of"
            f" {quota.nbytes}",
            operation="alloc",
            target=name,
            hint=hint,
        )
    if quota.buffers is not None and held.buffers >= quota.buffers:
        raise QuotaExceeded(
            f"{held.buffers} pieces of memory are held, the quota is {quota.buffers} pieces",
            operation="alloc",
            target=name,
            hint=hint,
        )
