# SPDX-License-Identifier: Apache-2.0
"""How a keeper behaves."""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.dma.ledger import Quota
from holdfast.keeper.admission import AllowList
from holdfast.keeper.deadlines import Deadlines
from holdfast.values import Policy


@dataclass(frozen=True, slots=True)
class Settings:
    """How a keeper behaves. Bytes and seconds."""

    policy: Policy = Policy.DRAIN
    quota: int = 1 << 30
    buffers: int = 65536
    requests: int = 1024
    """Most mediated requests that one lease may have in flight."""
    per_user: Quota = field(default_factory=Quota)
    """Bytes and pieces of memory of one user, over all leases."""
    user_leases: int | None = None
    """Most leases of one user, dying ones included; None: no limit."""
    allow: AllowList = field(default_factory=AllowList)
    """Who may come in besides the keeper's own user and root."""
    quarantine_bound: int = 1 << 30
    idle: float | None = None
    """End after this long without a client; None: stay."""
    deadlines: Deadlines = field(default_factory=Deadlines)
    card_windows: int = 1
    """Into how many parts the card's memory is cut, one for each mediated lease; 1: not at all."""
