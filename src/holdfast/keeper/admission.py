# SPDX-License-Identifier: Apache-2.0
"""Who may come in, and what each may see.

Facts. A keeper that serves others has a socket that anybody can connect to. The kernel says who
connected: user, group and supplementary groups at the time of connect(2) (``SO_PEERCRED``,
``SO_PEERGROUPS``; socket(7), unix(7)). None of it can be forged, and none of it changes when the
socket is passed on.

Choice. The keeper's own user and root may always come in, others if their user or one of their
groups is on the list. Only the former are *operators*, who see and may do everything. A user sees
all of the own leases. Of others' leases it sees what explains why something is not to be had: that
they exist, how much they hold and in which state they are; no process, no log, no address.

Cost. Groups count as they are in the process, as everywhere in Unix: who was put into a group must
log in again.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from holdfast.errors import Busy, NoPermission, QuotaExceeded, UsageError
from holdfast.keeper.lease import Lease
from holdfast.kernel.pidfd import Peer
from holdfast.values import Access, LeaseId

if TYPE_CHECKING:
    from holdfast.keeper.settings import Settings

PUBLIC = frozenset(
    {"lease", "uid", "state", "policy", "access", "channels", "bytes", "hung_up", "process_dead"}
)
"""What anybody who may come in may know of anybody's lease."""


@dataclass(frozen=True, slots=True)
class AllowList:
    """User and group ids that may come in besides the keeper's own user and root."""

    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()

    @classmethod
    def of(cls, users: Iterable[str], groups: Iterable[str]) -> Self:
        """From names or numbers; UsageError for a name that this system does not know."""
        return cls(
            frozenset(_number(name, "user", lambda text: pwd.getpwnam(text).pw_uid)
                      for name in users),
            frozenset(_number(name, "group", lambda text: grp.getgrnam(text).gr_gid)
                      for name in groups),
        )  # fmt: skip

    def __bool__(self) -> bool:
        return bool(self.users or self.groups)

    def permits(self, peer: Peer) -> bool:
        """Whether this process may come in."""
        return (
            is_operator(peer)
            or peer.uid in self.users
            or not self.groups.isdisjoint((peer.gid, *peer.groups))
        )

    def require(self, peer: Peer, target: str) -> None:
        """Raise NoPermission if this process may not come in."""
        if not self.permits(peer):
            raise NoPermission(
                f"user {peer.uid} (groups {sorted({peer.gid, *peer.groups})}) is not on the"
                " keeper's list",
                operation="greet",
                target=target,
                hint=f"ask the keeper's owner (user {os.geteuid()}) for --allow-user or"
                " --allow-group; after being put into a group, log in again",
            )


def _number(name: str, kind: str, look_up: Any) -> int:
    try:
        return int(name) if name.isascii() and name.isdecimal() else int(look_up(name))
    except KeyError:
        raise UsageError(
            f"no {kind} {name!r} on this system", operation="serve", hint="give a name or a number"
        ) from None


def is_operator(peer: Peer) -> bool:
    """Whether this is the keeper's own user, or root."""
    return peer.uid in (0, os.geteuid())


def require_operator(peer: Peer, operation: str, target: str) -> None:
    """Raise NoPermission for requests that are only for whoever runs the keeper."""
    if not is_operator(peer):
        raise NoPermission(
            f"user {peer.uid} does not run this keeper",
            operation=operation,
            target=target,
            hint=f"ask user {os.geteuid()}, or root",
        )


def require_few(peer: Peer, held: int, limit: int, target: str) -> None:
    """Raise QuotaExceeded if a user has as many leases as one may have."""
    if held >= limit:
        raise QuotaExceeded(
            f"user {peer.uid} has {held} leases, the quota is {limit} leases",
            operation="open",
            target=target,
            hint="close one, wait for the dying ones (holdfast ps), or serve with --user-leases",
        )


def require_admissible(
    lease: Lease, others: Mapping[LeaseId, Lease], settings: Settings, target: str
) -> None:
    """Raise QuotaExceeded or Busy if a new lease may not stand beside those that there are."""
    if settings.user_leases is not None:
        held = sum(other.peer.uid == lease.peer.uid for other in others.values())
        require_few(lease.peer, held, settings.user_leases, target)
    require_one_user(lease, others.values())


def require_one_user(lease: Lease, others: Iterable[Lease]) -> None:
    """Raise Busy if users who distrust each other would share the function's reach.

    Who posts directly decides which addresses the function uses, and everybody's memory is mapped
    for it: nothing but the driver's good manners separates the leases of one function. So as long
    as somebody posts directly, all leases are one user's. Mediated requests are checked.
    """
    for other in others:
        if other.peer.uid == lease.peer.uid or not (_is_direct(lease) or _is_direct(other)):
            continue
        raise Busy(
            f"user {other.peer.uid} has a lease, and one of the two would post directly",
            operation="open",
            target=f"access {lease.access}",
            hint="open it with access='mediated', or wait until the other user is done",
        )


def _is_direct(lease: Lease) -> bool:
    return lease.claimed and lease.access in (Access.EXCLUSIVE, Access.SHARED)


def visible(told: Mapping[str, Any], viewer: Peer | None, token: int = 0) -> dict[str, Any]:
    """A lease's description as ``viewer`` may see it; None is the keeper itself.

    ``token`` is that of the run which the viewer watches: who knows it started the lease's process.
    """
    if viewer is None or is_operator(viewer) or told["uid"] == viewer.uid:
        return dict(told)
    if token and told.get("run") == token:
        return dict(told)
    return {key: value if key in PUBLIC else _blank(value) for key, value in told.items()}


def _blank(value: object) -> object:
    """Nothing of the same type, so that whoever prints it need not know who looks."""
    return type(value)() if isinstance(value, int | str | list | dict) else None
