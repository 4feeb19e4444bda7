# SPDX-License-Identifier: Apache-2.0
"""The ``holdfast`` command whose keeper goes into safe mode at SIGUSR1, with the leases it has.

What a successor does that comes up in safe mode: the base class stands in for the driver.
"""

from __future__ import annotations

import signal
from typing import Any

from holdfast.cli import main
from holdfast.driver import Driver
from holdfast.keeper.asking import DriverFacts
from holdfast.keeper.function import FunctionHost

_start = FunctionHost.start.__func__  # type: ignore[attr-defined]


def start(cls: type[FunctionHost], *arguments: Any, **options: Any) -> FunctionHost:
    host: FunctionHost = _start(cls, *arguments, **options)

    def go_safe(*_: object) -> None:
        host.safe = True
        host.driver = Driver(host.access)
        host.facts = DriverFacts.of(host.driver)

    signal.signal(signal.SIGUSR1, go_safe)
    return host


FunctionHost.start = classmethod(start)  # type: ignore[assignment,method-assign]

if __name__ == "__main__":
    main()
