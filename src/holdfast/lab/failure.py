# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a guest, other than the command in it."""

from __future__ import annotations

from pathlib import Path

from holdfast.errors import SystemFailure


class LabUnavailable(SystemFailure):
    """This machine cannot make or run guests: a program or package is missing. The hint has it."""


class GuestFailed(SystemFailure):
    """The guest ended, or misbehaved, without telling the command's exit status.

    ``console`` is the file with the guest's console; it is kept for the caller to look at.
    """

    def __init__(self, what: str, *, console: Path, hint: str = "") -> None:
        super().__init__(
            what,
            operation="lab run",
            target=str(console),
            hint=hint or f"read the guest's console: {console}",
        )
        self.console = console


class GuestTimeout(GuestFailed):
    """The time was up; the guest was killed."""
