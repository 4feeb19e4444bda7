# SPDX-License-Identifier: Apache-2.0
"""The error of this room."""

from __future__ import annotations

from holdfast.errors import DeviceError


class Disagreement(DeviceError):
    """Reality did something else than the story says, or the replay itself is wrong.

    Never a verdict on a strategy: the run counts for nothing.
    """

    default_hint = "one of both is wrong: compare the story's step with what is said here"
