# SPDX-License-Identifier: Apache-2.0
"""Named steps of client, keeper and function, at which a campaign can kill.

Unarmed, a step costs one look at a global.
"""

from __future__ import annotations

from collections.abc import Callable

_hook: Callable[[str], None] | None = None


def reach(step: str) -> None:
    """Say that this process has come to a named step."""
    if _hook is not None:
        _hook(step)


def arm(hook: Callable[[str], None] | None) -> None:
    """Have ``hook`` called at every step from now on; None: nobody."""
    global _hook  # noqa: PLW0603 - one switch for the whole process
    _hook = hook
