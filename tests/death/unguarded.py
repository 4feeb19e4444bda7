# SPDX-License-Identifier: Apache-2.0
"""The ``holdfast`` command with the guard taken out of ``drain``, and nothing else changed.

A dead lease's memory is then given back without proof of quiet, as the negative control does. The
demonstration must notice.
"""

from __future__ import annotations

from typing import cast

from holdfast.cli import main
from holdfast.keeper import state
from holdfast.values import Policy

cast(dict[Policy, state.Event], state.FIRST_MEASURE)[Policy.DRAIN] = state.Event.RELEASE
cast(dict[Policy, state.Gate], state.RELEASE_GATE)[Policy.DRAIN] = state.Gate((frozenset(),))

if __name__ == "__main__":
    main()
