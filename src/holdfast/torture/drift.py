# SPDX-License-Identifier: Apache-2.0
"""Whether the keepers of a campaign did what the specification says that keepers do.

Every lease's log is read by :mod:`holdfast.spec.behaviour`. A line that it does not explain means
that code and specification have drifted apart, even where nothing was corrupted this time.
"""

from __future__ import annotations

import functools

from holdfast.spec.behaviour import Behaviours, check, parse
from holdfast.torture.unit import Found


@functools.cache
def _behaviours(policy: str, strict: bool) -> Behaviours:
    return Behaviours(policy, strict=strict)


def drifts(found: Found) -> list[str]:
    """What the specification does not explain of one unit's log; empty if it explains all."""
    try:
        log = parse(found.log)
    except ValueError as error:
        return [f"the keepers' log cannot be read: {error}"]
    return [f"not a behaviour of the specification: {drift}" for drift in check(log, _behaviours)]
