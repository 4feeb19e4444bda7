# SPDX-License-Identifier: Apache-2.0
"""How long each measure of the death protocol may take, and when quarantine looks again."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from holdfast.errors import UsageError

LONGEST = 86_400.0
"""Seconds. What takes longer than a day is a mistake in a unit."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Bounds in seconds. Passing one only ever leads to a stronger measure, never to release.

    drain
        what was posted may finish
    stop
        one call of the driver: to say what is in flight, or to stop the engine
    isolate
        bus mastering off, and the engine comes to rest
    reset
        function-level reset; also setting the function up again after it
    unmap
        every mapping of one lease undone
    quarantine, quarantine_longest
        between two looks at a quarantined lease: at first, and at most; each look doubles it

    Raises UsageError for anything that is not a time, and for a first period above the longest.
    """

    drain: float = 10.0
    stop: float = 2.0
    isolate: float = 1.0
    reset: float = 5.0
    unmap: float = 10.0
    quarantine: float = 1.0
    quarantine_longest: float = 60.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not (math.isfinite(value) and 0 < value <= LONGEST):
                raise UsageError(
                    f"{value} s is no time that {each.name.replace('_', ' ')} can take",
                    operation="set deadlines",
                    hint=f"give seconds above 0, up to {LONGEST:g}",
                )
        if self.quarantine > self.quarantine_longest:
            raise UsageError(
                f"quarantine is looked at every {self.quarantine:g} s at first and every "
                f"{self.quarantine_longest:g} s at most",
                operation="set deadlines",
                hint="the first period must not be above the longest",
            )

    def ladder(self) -> float:
        """Seconds in which every measure of the engine and the function has been tried once."""
        return self.drain + self.stop + self.isolate + self.reset
