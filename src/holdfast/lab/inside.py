# SPDX-License-Identifier: Apache-2.0
"""``python3 -m holdfast.lab.inside FILE... [-- OPTION...]``: the guest suites, inside the guest.

Facts: importing NumPy and pytest takes six seconds under software emulation; tests of death leave
processes, unbind functions and have them pulled out; and what one file of tests leaves must not
fail the next. Choice: one process imports everything and forks for each file; after each, whatever
it left running is ended and every function is put back in its place, with its driver. Both are
said, so that nothing is hidden. Results go to /results, a report per file.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from holdfast.errors import HoldfastError, SystemFailure
from holdfast.lab import guest
from holdfast.values import Bdf

RESULTS: Final = Path("/results")
PCI: Final = Path("/sys/bus/pci")
WARM: Final = ("numpy", "holdfast", "hypothesis")
"""Imported once, for everything that is forked."""
DEADLINE: Final = 600.0
"""Seconds for a file."""
GRACE: Final = 10.0
PATIENCE: Final = 20.0
"""Seconds for a process to be gone and a function to be back."""
_POLL: Final = 0.05
_NO_TESTS: Final = 5
"""pytest's exit status where a filter left no test."""


def main(arguments: Sequence[str]) -> int:
    """Run every file; 0 if all passed, else the first other status (128+n after signal n)."""
    import pytest

    for name in WARM:
        importlib.import_module(name)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    files, options = arguments[:split], arguments[split + 1 :]
    worst = 0
    for number, file in enumerate(files):
        before = processes()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            report = f"--junitxml={RESULTS}/tests-{number}.xml"
            status = int(pytest.main(["-q", "-p", "no:cacheprovider", report, *options, file]))
            sys.stdout.flush()
            os._exit(status)
        status = wait(pid, file)
        if status not in (0, _NO_TESTS):
            worst = worst or status
            say(f"{file}: status {status}")
        end_processes(file, processes() - before)
        restore(file)
    return worst


def wait(pid: int, file: str) -> int:
    """The exit status of the process that runs a file, which is killed when it takes too long.

    SIGABRT first: pytest's fault handler then prints where each thread is.
    """
    pidfd = os.pidfd_open(pid)
    try:
        for last, number in ((DEADLINE, signal.SIGABRT), (GRACE, signal.SIGKILL)):
            if select.select([pidfd], [], [], last)[0]:
                break
            say(f"{file} still runs after {last:.0f} s; {number.name}")
            os.kill(pid, number)
    finally:
        os.close(pidfd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 128 - status if status < 0 else status


def say(text: str) -> None:
    """A line of our own among the tests' output."""
    sys.stdout.write(f"lab: {text}\n")
    sys.stdout.flush()


def processes() -> set[int]:
    """Pids of everything that runs, kernel threads included."""
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()}


def end_processes(file: str, pids: set[int]) -> None:
    """Kill what a file left, and wait until it is gone. Kernel threads have no command line."""
    for pid in sorted(pids):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            if not command:
                continue
            os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
        say(f"{file} left a process, which is ended now: {pid} {command.decode(errors='replace')}")
        deadline = time.monotonic() + PATIENCE
        while os.path.exists(f"/proc/{pid}"):
            if time.monotonic() > deadline:
                raise SystemFailure(
                    f"process {pid} does not end after SIGKILL", operation="lab", target=file
                )
            time.sleep(_POLL)


def restore(file: str) -> None:
    """Put every function back in its place, and give it to the driver that the guest chose."""
    driver = os.environ.get(guest.DRIVER, "none")
    for name, bdf in guest.functions().items():
        try:
            if not _directory(bdf).exists():
                say(f"{file} left {name} out of the machine; it is put back")
                _put_back(name, bdf)
            if driver not in {"none", _driver(bdf)}:
                say(f"{file} left {name} with driver {_driver(bdf) or 'none'}; {driver} gets it")
                _give(bdf, driver)
        except (OSError, HoldfastError) as error:
            # The next file's tests say what this means for them.
            say(f"{name} cannot be put back after {file}: {error}")


def _directory(bdf: Bdf) -> Path:
    return PCI / "devices" / str(bdf)


def _driver(bdf: Bdf) -> str:
    """Name of the driver; empty without one."""
    link = _directory(bdf) / "driver"
    return link.readlink().name if link.is_symlink() else ""


def _put_back(name: str, bdf: Bdf) -> None:
    """Plug in what was pulled out; find again what was only removed from the kernel's view."""
    if guest.ask("unplugged", name):
        guest.ask("plug", name)
    deadline = time.monotonic() + PATIENCE
    while not _directory(bdf).exists():
        if time.monotonic() > deadline:
            raise SystemFailure("the function does not come back", operation="lab", target=name)
        (PCI / "rescan").write_text("1")
        time.sleep(_POLL)


def _give(bdf: Bdf, driver: str) -> None:
    directory = _directory(bdf)
    (directory / "driver_override").write_text(driver)
    if _driver(bdf):
        (directory / "driver/unbind").write_text(str(bdf))
    (PCI / "drivers_probe").write_text(str(bdf))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
