# SPDX-License-Identifier: Apache-2.0
"""Take a PCI function from its kernel driver, and give it back.

Facts. ``driver_override`` decides which driver a function matches (since Linux 3.16), ``unbind``
takes it from the one it has, ``drivers_probe`` lets the kernel look for one again; what came of it
is told by the ``driver`` link alone. An unbind from vfio-pci asks the holder to let go
(VFIO_PCI_REQ_IRQ_INDEX) and then waits for it without end, soon deaf to signals
(drivers/vfio/vfio_main.c, ``vfio_unregister_group_dev``). Meanwhile the ``driver`` link is already
gone, and other writes to the function's attributes may wait for the same lock.

Consequence. A process that writes these files itself may never come back, whatever it is sent.

Choice. The writes are a plan, made first: what ``--dry-run`` prints is what is done. They are
carried out by a child that does nothing else, and the child is waited for only so long. When time
is up it is killed, so that nothing happens behind the user's back after the write that hangs; that
one ends when the holder lets go, and the same command finishes the work. What the function had
before is remembered in a file of the runtime directory, written before the first write.

Cost. One interpreter start for each change of driver.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.errors import Busy, HoldfastError, NoPermission, NotSupported, SystemFailure
from holdfast.kernel import pci_sysfs
from holdfast.kernel.failure import failure
from holdfast.kernel.pci_holders import DEV, PROC, Holder, HolderScan
from holdfast.kernel.pci_sysfs import SYSFS, PciFunction, device_path, text
from holdfast.kernel.sysfs_writes import Write, WriteFailed, WriteHangs, carry_out
from holdfast.values import Bdf

VFIO_DRIVER: Final = "vfio-pci"
UIO_DRIVER: Final = "uio_pci_generic"
DRIVERS: Final = (VFIO_DRIVER, UIO_DRIVER)

DEADLINE: Final = 15.0
"""Seconds for all writes of one change. A holder that listens has let go long before."""

_WHAT = "What this PCI function had before 'holdfast bind'; 'holdfast unbind' restores it."

Writer = Callable[[Sequence[Write], float], None]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where sysfs, /dev, /proc and the remembered drivers are; replaceable for tests."""

    sysfs: Path = SYSFS
    dev: Path = DEV
    proc: Path = PROC
    runtime: Path | None = None
    writer: Writer = carry_out
    modprobe: str | None = None
    """The program that loads modules; None: found on the PATH."""

    def directory(self) -> Path:
        """Where previous drivers are remembered. Not made here.

        ``$HOLDFAST_RUNTIME_DIR``, else /run/holdfast: both go with the boot, like the bindings.
        """
        return self.runtime or Path(os.environ.get("HOLDFAST_RUNTIME_DIR") or "/run/holdfast")


@dataclass(frozen=True, slots=True)
class Before:
    """What a function had: its driver (None: none), and its driver_override ("": none)."""

    driver: str | None
    override: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A change of driver: what is written, and which driver the function has when it is done.

    ``module`` is loaded first. Without writes there is nothing to do, and ``why`` says so.
    """

    function: PciFunction
    """As it was when the plan was made."""
    wanted: str | None
    writes: tuple[Write, ...] = ()
    module: str | None = None
    why: str = ""

    @property
    def bdf(self) -> Bdf:
        return self.function.bdf

    @property
    def had(self) -> str | None:
        """The driver that had the function when the plan was made."""
        return self.function.driver

    def lines(self) -> list[str]:
        """The same as commands for a shell."""
        load = [f"modprobe {self.module}"] if self.module else []
        return load + [str(write) for write in self.writes]


# -- planning ------------------------------------------------------------


def plan_bind(bdf: Bdf, driver: str, machine: Machine) -> Plan:
    """What it takes to give a function to ``driver``. Reads only.

    Raises BadTarget if there is no such function, NotSupported if the driver cannot have it, Busy
    while an earlier unbind waits for whoever holds the function.
    """
    function = pci_sysfs.function(bdf, machine.sysfs)
    if function.driver == driver:
        return Plan(function, driver, why=f"{driver} has it already")
    _require_possible(function, driver)
    _require_settled(function, machine)
    here, drivers = device_path(bdf, machine.sysfs), machine.sysfs / "bus/pci/drivers"
    writes = [Write(here / "driver_override", driver)]
    if function.driver is not None:
        writes.append(Write(drivers / function.driver / "unbind", str(bdf)))
    writes.append(Write(machine.sysfs / "bus/pci/drivers_probe", str(bdf)))
    module = None if (drivers / driver).is_dir() else driver
    return Plan(function, driver, tuple(writes), module)


def _require_possible(function: PciFunction, driver: str) -> None:
    if function.is_bridge:
        raise NotSupported(
            "it is a bridge, not a function to drive", operation="bind", target=str(function.bdf)
        )
    if driver == VFIO_DRIVER and not function.translated:
        raise NotSupported(
            "no IOMMU reaches it, so vfio-pci will not have it",
            operation="bind",
            target=str(function.bdf),
            hint="see what is missing: holdfast doctor; or do without an IOMMU and what it "
            f"protects from: holdfast bind {function.bdf} --driver {UIO_DRIVER}",
        )


def plan_unbind(bdf: Bdf, machine: Machine) -> Plan:
    """What it takes to give a function back to the driver it had before :func:`bind`. Reads only.

    With nothing remembered, a function that one of :data:`DRIVERS` has goes to whichever driver
    the kernel finds for it, and any other stays as it is. Raises as :func:`plan_bind`.
    """
    function = pci_sysfs.function(bdf, machine.sysfs)
    _require_settled(function, machine)
    before = recall(bdf, machine)
    override = _override(bdf, machine)
    here, drivers = device_path(bdf, machine.sysfs), machine.sysfs / "bus/pci/drivers"
    if before is None:
        if function.driver not in DRIVERS and override not in DRIVERS:
            kept = f"{function.driver} has it" if function.driver else "it has no driver"
            return Plan(function, function.driver, why=f"{kept}; not bound by Holdfast")
    elif before == Before(function.driver, override):
        return Plan(function, function.driver, why="it is as it was")
    back = "" if before is None else before.override
    writes = [Write(here / "driver_override", back or "\n")]  # an empty line clears it
    if function.driver is not None and (before is None or function.driver != before.driver):
        writes.append(Write(drivers / function.driver / "unbind", str(bdf)))
    if before is None:
        writes.append(Write(machine.sysfs / "bus/pci/drivers_probe", str(bdf)))
        return Plan(function, None, tuple(writes))
    module = None
    if before.driver is not None and before.driver != function.driver:
        # Named, not probed for: of two drivers that match, it had this one.
        writes.append(Write(drivers / before.driver / "bind", str(bdf)))
        module = None if (drivers / before.driver).is_dir() else before.driver
    return Plan(function, before.driver, tuple(writes), module)


# -- doing ------------------------------------------------------------


def bind(plan: Plan, machine: Machine, deadline: float = DEADLINE) -> None:
    """Carry a plan of :func:`plan_bind` out. Returns when the driver has the function.

    Raises Busy if somebody holds it (the unbind goes on in the kernel), NoPermission without
    root, SystemFailure if the driver will not have it: then the one before has it again.
    """
    if not plan.writes:
        return
    _load(plan, machine)
    remember(plan.bdf, Before(plan.had, _override(plan.bdf, machine)), machine)
    try:
        _write(plan, machine, deadline)
        _verify(plan, machine)
    except Busy:
        raise  # half done, and to be finished by the same command: what was is still remembered
    except HoldfastError:
        _roll_back(plan.bdf, machine, deadline)
        raise


def unbind(plan: Plan, machine: Machine, deadline: float = DEADLINE) -> str | None:
    """Carry a plan of :func:`plan_unbind` out; returns the driver that has the function now.

    Errors as :func:`bind`; what was remembered is forgotten only when it was restored.
    """
    if plan.writes:
        restore = recall(plan.bdf, machine) is not None
        _load(plan, machine)
        _write(plan, machine, deadline)
        if restore:
            _verify(plan, machine)
    forget(plan.bdf, machine)
    return pci_sysfs.function(plan.bdf, machine.sysfs).driver


def _roll_back(bdf: Bdf, machine: Machine, deadline: float) -> None:
    """Give the function back after a failed bind; the failure is what gets reported."""
    try:
        unbind(plan_unbind(bdf, machine), machine, deadline)
    except HoldfastError:
        pass  # still remembered: ``holdfast unbind`` can try again


def _write(plan: Plan, machine: Machine, deadline: float) -> None:
    try:
        machine.writer(plan.writes, deadline)
    except WriteHangs as error:
        # Looked for as it was: its driver, and with it the VFIO device, may be gone from sysfs.
        who = _holders(plan.function, machine)
        waiting = f"after {deadline:g} s the kernel is still waiting for its holder"
        raise _held(plan.function, who, waiting) from error
    except WriteFailed as error:
        raise _refused(error, deadline) from error


def _refused(error: WriteFailed, deadline: float) -> HoldfastError:
    """The error for a write that the kernel refused, or that could be called off in time."""
    what = os.strerror(error.errno)
    if error.errno == errno.ETIMEDOUT:
        what = f"it took longer than {deadline:g} s and was called off"
    raised = failure(OSError(error.errno, what), "write", str(error.write))
    if error.errno == errno.ETIMEDOUT:
        raised.hint = "give it more time: --timeout"
    elif isinstance(raised, NoPermission):
        raised.hint = "run it as root (sudo)"
    return raised


def _require_settled(function: PciFunction, machine: Machine) -> None:
    """No unbind still waits: then the function has no driver any more, and somebody has it open."""
    if function.driver is None:
        who = [holder for holder in _holders(function, machine) if holder.certain]
        if who:
            raise _held(function, who, "an earlier unbind is still waiting for its holder")


def _holders(function: PciFunction, machine: Machine) -> list[Holder]:
    return HolderScan(sysfs=machine.sysfs, dev=machine.dev, proc=machine.proc).of(function)


def _held(function: PciFunction, who: list[Holder], waiting: str) -> Busy:
    """The error for an unbind that waits."""
    named = "; ".join(map(str, who)) or "who holds it is not to be seen"
    ask = f"end pid {', '.join(str(h.pid) for h in who)}" if who else "find the holder"
    return Busy(
        f"{waiting} to let go: {named}",
        operation="change the driver",
        target=str(function.bdf),
        hint=f"{ask}, then give the same command again. The unbind goes on in the kernel "
        "and cannot be called off; nothing else will be done to the function.",
    )


def _verify(plan: Plan, machine: Machine) -> None:
    """Believe the ``driver`` link: a probe that failed answers success to the write."""
    now = pci_sysfs.function(plan.bdf, machine.sysfs).driver
    if now != plan.wanted:
        raise SystemFailure(
            f"{plan.wanted or 'no driver'} was to have it, and {now or 'no driver'} has",
            operation="change the driver",
            target=str(plan.bdf),
            hint=f"the kernel log says why: dmesg | grep {plan.bdf}",
        )


def _load(plan: Plan, machine: Machine) -> None:
    """Load the driver's module. Raises SystemFailure naming what to install."""
    if plan.module is None:
        return
    program = machine.modprobe or shutil.which("modprobe", path=_SBIN) or "modprobe"
    try:
        done = subprocess.run(
            [program, plan.module],
            check=False,  # what counts is whether the driver is there afterwards
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60.0,
        )
        said = done.stderr.decode("utf-8", "replace").strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if not (machine.sysfs / "bus/pci/drivers" / plan.module).is_dir():
        raise SystemFailure(
            f"the driver {plan.module} is not loaded: {said or 'the module changed nothing'}",
            operation="load module",
            target=plan.module,
            hint=f"sudo modprobe {plan.module}; if there is no such module, install your "
            "distribution's full kernel package (Ubuntu: linux-modules-extra-$(uname -r))",
        )


_SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"

# -- remembering ------------------------------------------------------------


def _record(bdf: Bdf, machine: Machine) -> Path:
    return machine.directory() / f"bound-{bdf}.json"


def recall(bdf: Bdf, machine: Machine) -> Before | None:
    """What the function had before it was bound in this boot, or None if nothing is remembered.

    Raises NoPermission if this user may not look.
    """
    place = _record(bdf, machine)
    try:
        with place.open("rb") as file:
            ours = os.fstat(file.fileno()).st_uid in (0, os.getuid())
            found = json.loads(file.read(65536)) if ours else None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raised = failure(error, "recall the driver before", str(place))
        raised.hint = "run it as root (sudo)"
        raise raised from error
    if not isinstance(found, dict) or found.get("boot") != _boot(machine):
        return None  # of an earlier boot: drivers have been bound anew since
    driver, override = found.get("driver"), found.get("override")
    if isinstance(driver, str) and not re.fullmatch(r"[^/\0]+", driver.strip(".")):
        return None  # no name of a driver: it would lead out of the directory of drivers
    return Before(driver if isinstance(driver, str) else None, str(override or ""))


def remember(bdf: Bdf, before: Before, machine: Machine) -> None:
    """Write down what a function has, unless an earlier bind of this boot has done so."""
    if recall(bdf, machine) is not None:
        return
    place = _record(bdf, machine)
    content = {
        "what": _WHAT, "function": str(bdf), "boot": _boot(machine),
        "driver": before.driver, "override": before.override,
    }  # fmt: skip
    _make_own(place.parent)
    try:
        draft = place.with_suffix(f".{os.getpid()}.new")
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draft.replace(place)
    except OSError as error:
        raised = failure(error, "remember the driver", str(place))
        raised.hint = "run it as root (sudo)"
        raise raised from error


def _make_own(directory: Path) -> None:
    """What is remembered is acted on as root: nobody else may write there."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.lstat()
    except OSError as error:
        raised = failure(error, "make runtime directory", str(directory))
        raised.hint = "run it as root (sudo)"
        raise raised from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise NoPermission(
            "others can write there",
            operation="use runtime directory",
            target=str(directory),
            hint="remove it, or set HOLDFAST_RUNTIME_DIR to a directory of your own",
        )


def forget(bdf: Bdf, machine: Machine) -> None:
    """Drop what is remembered of a function, if anything is."""
    place = _record(bdf, machine)
    try:
        place.unlink(missing_ok=True)
    except NotADirectoryError:
        pass
    except OSError as error:
        raise failure(error, "forget the driver before", str(place)) from error


def _override(bdf: Bdf, machine: Machine) -> str:
    """The function's driver_override; "" if there is none ("(null)" from the kernel)."""
    found = text(device_path(bdf, machine.sysfs) / "driver_override")
    return "" if found in (None, "(null)") else str(found)


def _boot(machine: Machine) -> str:
    return text(machine.proc / "sys/kernel/random/boot_id") or ""
