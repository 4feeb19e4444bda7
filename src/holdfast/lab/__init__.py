# SPDX-License-Identifier: Apache-2.0
"""Virtual machines with a real kernel and an emulated IOMMU, to try the real backends in.

:class:`Guest` says what machine; :func:`run` boots it, runs one command in a copy of this source
tree, and returns the command's exit status. Inside, :mod:`holdfast.lab.guest` asks the host for
what only a host can do (pull a function out). Everything comes from Debian's packages by name and
is kept in a cache (:mod:`holdfast.lab.cache`).
"""

from __future__ import annotations

from holdfast.lab.failure import GuestFailed, GuestTimeout, LabUnavailable
from holdfast.lab.machine import Guest
from holdfast.lab.runner import run

__all__ = ["Guest", "GuestFailed", "GuestTimeout", "LabUnavailable", "run"]
