# SPDX-License-Identifier: Apache-2.0
"""Inside a guest: what functions there are, what the host can be asked for, what is meant."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from holdfast.errors import NotSupported, ProtocolError, RemoteError
from holdfast.values import Bdf

FUNCTIONS: Final = "HOLDFAST_LAB_FUNCTIONS"
DRIVER: Final = "HOLDFAST_LAB_DRIVER"
"""Environment variables with the guest's functions and the driver they were given to."""
PORT: Final = "/dev/ttyS3"
DAMAGE_BEGINS: Final = "holdfast lab: damage is expected"
DAMAGE_ENDS: Final = "holdfast lab: damage is no longer expected"
_KERNEL_LOG: Final = Path("/dev/kmsg")
_LONGEST: Final = 4096


def functions() -> dict[str, Bdf]:
    """The functions of this guest by name (``f0``, ...), as they were when it started."""
    told = os.environ.get(FUNCTIONS, "")
    pairs = (entry.partition("=") for entry in told.split(",") if entry)
    return {name: Bdf.parse(address) for name, _, address in pairs}


def ask(what: str, name: str) -> bool:
    """Ask the host for ``what`` about the function ``name``; wait for its answer.

    ``unplug``
        Ask for the function's removal, as pressing a slot's button does. True once QEMU has asked
        the guest's kernel; that takes the device away when its driver lets go. Raises RemoteError
        if QEMU refuses (a function on the root bus cannot be unplugged).
    ``unplugged``
        Whether the device is gone from the machine.
    ``plug``
        Put it back, where it was. True once QEMU has; the guest's kernel finds it a moment later.

    Safe between processes and threads: one question at a time.
    """
    if not os.path.exists(PORT):
        raise NotSupported("this is no lab guest", operation=f"ask {what}", target=name)
    fd = os.open(PORT, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with os.fdopen(fd, "r+b", buffering=0, closefd=False) as port:
            port.write(json.dumps({"ask": what, "id": name}).encode() + b"\n")
            line = port.readline(_LONGEST)
    finally:
        os.close(fd)
    try:
        told = json.loads(line)
        done, why = bool(told["done"]), str(told["why"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"the host answered {line!r}", operation=f"ask {what}") from error
    if why:
        raise RemoteError(why, operation=f"ask {what}", target=name)
    return done


@contextmanager
def damage_expected(why: str) -> Iterator[None]:
    """Mark the kernel's log: what its memory oracles say inside is what a test did on purpose.

    For negative controls. Needs root; the log must take every line (``printk.devkmsg=on``, which
    the guests of the built kernel have).
    """
    _KERNEL_LOG.write_text(f"{DAMAGE_BEGINS}: {why}\n")
    try:
        yield
    finally:
        _KERNEL_LOG.write_text(f"{DAMAGE_ENDS}\n")
