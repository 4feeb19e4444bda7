# SPDX-License-Identifier: Apache-2.0
"""Whether the keepers of a campaign did what the specification says that keepers do.

Every lease's log is read by :mod:`holdfast.spec.behaviour`. A line that it does not explain means
that code and specification have drifted apart, even where nothing was corrupted this time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from holdfast.spec.behaviour import Behaviours, check, parse


@functools.cache
def _behaviours(policy: str, strict: bool) -> Behaviours:
    return Behaviours(policy, strict=strict)


def drifts(lines: Sequence[str]) -> list[str]:
    """What the specification does not explain of a log; empty if it explains all."""
    try:
        log = parse(lines)
    except ValueError as error:
        return [f"the keepers' log cannot be read: {error}"]
    return [f"not a behaviour of the specification: {drift}" for drift in check(log, _behaviours)]
