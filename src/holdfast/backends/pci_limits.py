# SPDX-License-Identifier: Apache-2.0
"""What a user's limits and a machine's settings allow: a part of ``pci_usable``.

Everything is read from /proc and sysfs of the process that asks. A keeper that it starts inherits
the same limits and the same control group.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.kernel.pci_sysfs import text

CAP_IPC_LOCK: Final = 14
CAP_SYS_ADMIN: Final = 21
"""linux/capability.h"""

_ALL_IDS: Final = "0 0 4294967295"
"""uid_map of the first user namespace (user_namespaces(7))."""

SMALLEST: Final = 256 << 10
"""Bytes of the smallest piece of DMA memory that a keeper pins: without these nothing works."""
QUOTA: Final = 1 << 30
"""Bytes that one lease may have unless the keeper was told otherwise."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    ``ok`` is True where nothing is in the way, False where it prevents use, None for what does not
    but is better known. ``what`` was found; ``fix`` is the command or setting that mends it, empty
    if nothing is to mend or nothing can be.
    """

    name: str
    ok: bool | None
    what: str
    fix: str = ""


def user_name() -> str:
    """Name of the effective user, or the number of one without a name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def capable(capability: int, proc: Path) -> bool:
    """Whether this process has a capability where drivers look for it: in the first user namespace.

    Inside another one (a rootless container) all capabilities may be shown and none counts.
    """
    # A kernel without user namespaces has no such file.
    first = (text(proc / "self/uid_map") or _ALL_IDS).split() == _ALL_IDS.split()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", text(proc / "self/status") or "", re.MULTILINE)
    return first and found is not None and bool(int(found[1], 16) >> capability & 1)


def memlock(proc: Path) -> Finding:
    """RLIMIT_MEMLOCK: pinned memory is charged against it, unless the process has CAP_IPC_LOCK.

    Source: drivers/vfio/vfio_iommu_type1.c (vfio_lock_acct), drivers/iommu/iommufd/pages.c
    (update_unpinned, do_update_pinned).
    """
    name = "locked memory"
    if capable(CAP_IPC_LOCK, proc):
        return Finding(name, True, "not limited (CAP_IPC_LOCK)")
    found = re.search(
        r"^Max locked memory\s+(\S+)\s+(\S+)", text(proc / "self/limits") or "", re.MULTILINE
    )
    if found is None:
        return Finding(name, None, "the limit cannot be read")
    if found[1] == "unlimited":
        return Finding(name, True, "not limited")
    limit = int(found[1])
    if limit >= QUOTA:
        return Finding(name, True, f"up to {_size(limit)}")
    user = user_name()
    within = "" if found[2] == "unlimited" or int(found[2]) > limit else "; hard limit, too"
    return Finding(
        name,
        False if limit < SMALLEST else None,
        f"limited to {_size(limit)}{within}; all DMA memory at one time must fit (one lease may "
        f"have {_size(QUOTA)} by default)",
        f"echo '{user} - memlock unlimited' | sudo tee /etc/security/limits.d/holdfast.conf, and "
        "log in again; for a systemd service: LimitMEMLOCK=infinity",
    )


def _size(count: int) -> str:
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.4g} {unit}"
    return f"{count} bytes"


# -- without an IOMMU ------------------------------------------------------------


def for_uio(sysfs: Path, proc: Path) -> Iterator[Finding]:
    """What use without an IOMMU needs beside the function itself."""
    yield _physical_addresses(proc)
    yield _lockdown(sysfs)
    yield _io_uring(proc)
    yield _hugepages(sysfs, proc)


def _physical_addresses(proc: Path) -> Finding:
    """pagemap shows frame numbers only to CAP_SYS_ADMIN (fs/proc/task_mmu.c, pagemap_open)."""
    if capable(CAP_SYS_ADMIN, proc):
        return Finding("physical addresses", True, "can be read")
    return Finding(
        "physical addresses",
        False,
        "the kernel shows them to CAP_SYS_ADMIN only",
        "run the keeper as root: sudo holdfast serve 'pci:...?backend=uio'",
    )


def _lockdown(sysfs: Path) -> Finding:
    """Lockdown refuses BARs and configuration space through sysfs (LOCKDOWN_PCI_ACCESS,
    drivers/pci/pci-sysfs.c); VFIO is not concerned."""
    state = text(sysfs / "kernel/security/lockdown") or ""
    found = re.search(r"\[(\w+)\]", state)
    if found is None or found[1] == "none":
        return Finding("lockdown", True, "off")
    return Finding(
        "lockdown",
        False,
        f"the kernel is locked down ({found[1]}): BARs cannot be reached through sysfs",
        "use an IOMMU and vfio-pci, or switch Secure Boot off",
    )


def _io_uring(proc: Path) -> Finding:
    """Documentation/admin-guide/sysctl/kernel.rst: io_uring_disabled, io_uring_group."""
    setting = text(proc / "sys/kernel/io_uring_disabled")
    fix = "sudo sysctl kernel.io_uring_disabled=0"
    if setting in (None, "0"):
        return Finding("io_uring", True, "not restricted")
    if setting == "1":
        group = text(proc / "sys/kernel/io_uring_group") or "-1"
        groups = {str(number) for number in (os.getegid(), *os.getgroups())}
        if capable(CAP_SYS_ADMIN, proc) or group in groups:
            return Finding("io_uring", True, "restricted, but not for this user")
        return Finding("io_uring", False, "forbidden to this user, and it holds the pages", fix)
    return Finding("io_uring", False, "forbidden to everybody, and it holds the pages", fix)


def _hugepages(sysfs: Path, proc: Path) -> Finding:
    """Pages of 2 MiB in the pool, and a hugetlbfs mount to name files in."""
    pool = sysfs / "kernel/mm/hugepages/hugepages-2048kB"
    free, total = (text(pool / name) or "0" for name in ("free_hugepages", "nr_hugepages"))
    lines = (text(proc / "mounts") or "").splitlines()
    mounted = any(line.split()[2:3] == ["hugetlbfs"] for line in lines)
    if free == "0":
        return Finding(
            "hugepages",
            False,
            f"no page of 2 MiB is free ({total} in all)",
            "echo 64 | sudo tee /proc/sys/vm/nr_hugepages (128 MiB)",
        )
    if not mounted:
        return Finding(
            "hugepages",
            False,
            f"{free} of 2 MiB are free, but no hugetlbfs is mounted",
            "sudo mkdir -p /dev/hugepages && sudo mount -t hugetlbfs none /dev/hugepages",
        )
    return Finding("hugepages", True, f"{free} of 2 MiB are free")


# -- how long a keeper lives ------------------------------------------------------------

_JOBS: Final = ("docker", "kubepods", "libpod", "containerd", "lxc", "slurm", "job")


def lifetime(proc: Path) -> Finding:
    """Whether a keeper started from here ends with the session, service or job around it.

    A control group is killed whole, with what left its session and process group long ago
    (systemd.kill(5), KillMode=control-group; loginctl's KillUserProcesses).
    """
    name = "keeper's life"
    path = _control_group(proc)
    last = path.rpartition("/")[2]
    if any(word in path.lower() for word in _JOBS):
        ends = "the container or job is stopped"
    elif f"user@{os.getuid()}.service" in path.split("/"):
        ends = "this user's last session ends (unless loginctl enable-linger)"
    elif last.startswith("session-") and last.endswith(".scope"):
        ends = "this session is ended with KillUserProcesses=yes"
    elif last.endswith((".service", ".scope")):
        ends = f"{last} is stopped"
    else:
        return Finding(name, True, "no session or service takes a keeper started here with it")
    return Finding(
        name,
        None,
        f"a keeper started here is killed when {ends}, and the memory of dying clients with it",
        "sudo systemd-run --unit=holdfast -p LimitMEMLOCK=infinity holdfast serve TARGET",
    )


def _control_group(proc: Path) -> str:
    """Path of this process's control group: version 2, else systemd's own hierarchy."""
    for line in (text(proc / "self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" or controllers == "name=systemd":
            return path
    return ""
