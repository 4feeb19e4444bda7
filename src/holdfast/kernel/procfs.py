# SPDX-License-Identifier: Apache-2.0
"""What /proc tells about memory, descriptors and processes: measured from outside.

These are the yardstick for leaks, so they ask the kernel and never a ledger of ours. A process that
no longer exists holds nothing: empty answers, not errors. Thread-safe.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from holdfast.errors import BadBuffer, SystemFailure
from holdfast.kernel import libc
from holdfast.kernel.failure import failure

_GONE = (FileNotFoundError, ProcessLookupError)


def meminfo() -> dict[str, int]:
    """/proc/meminfo by name, in bytes; counts of pages (``HugePages_*``) as they are."""
    found = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        value, _, unit = rest.strip().partition(" ")
        found[name] = int(value) * (1024 if unit == "kB" else 1)
    return found


def open_descriptors(pid: int) -> dict[int, str]:
    """Descriptor number to what it points at, for a process of this user.

    Raises NoPermission for another user's process.
    """
    return dict(_descriptors(pid))


def _descriptors(pid: int) -> Iterator[tuple[int, str]]:
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except _GONE:
        return
    except OSError as error:
        raise failure(error, "list descriptors", f"process {pid}") from error
    for name in names:
        try:
            yield int(name), os.readlink(f"{directory}/{name}")
        except _GONE:
            continue  # closed since it was listed
        except OSError as error:
            raise failure(error, "list descriptors", f"process {pid}") from error


def memfd_blocks(pid: int) -> int:
    """Bytes allocated in all memfds that a process has open; each file counts once."""
    return sum(memfds_of(pid).values())


def memfds_of(pid: int, prefix: str = "") -> dict[int, int]:
    """Inode to allocated bytes of the memfds that a process has open, by name prefix."""
    files = {}
    for number, link in _descriptors(pid):
        if link.startswith(f"/memfd:{prefix}"):
            try:
                status = os.stat(f"/proc/{pid}/fd/{number}")
            except _GONE:
                continue
            except OSError as error:
                raise failure(error, "stat descriptor", f"process {pid}") from error
            files[status.st_ino] = status.st_blocks * 512
    return files


def socket_inode(sock: socket.socket) -> int:
    """The inode number by which /proc/PID/fd names this end of a socket."""
    return os.fstat(sock.fileno()).st_ino


def socket_holders(inode: int) -> list[int]:
    """Pids of processes that have this end of a socket open, as far as this user may look."""
    wanted = f"socket:[{inode}]"
    holders = []
    for pid in _pids():
        try:
            if any(link == wanted for _, link in _descriptors(pid)):
                holders.append(pid)
        except SystemFailure:
            continue  # another user's process
    return holders


def open_own_memory() -> int:
    """This process's memory as a file: offset is address. Close-on-exec; the caller owns it.

    The descriptor stays tied to the present address space. Once that is gone (exit, or exec),
    reads and writes return 0 (fs/proc/base.c, ``mem_rw``).
    """
    try:
        return os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise failure(error, "open", "/proc/self/mem") from error


def copy_to_own(address: int, data: bytes | bytearray | memoryview) -> None:
    """Write into this process's own memory without a SIGBUS where pages cannot be had.

    For mappings of files that others can truncate: the kernel does the access, and answers with an
    error what would be a signal (fs/proc/base.c ``mem_rw``). Raises BadBuffer; some bytes may have
    been written then.
    """
    fd = open_own_memory()
    try:
        written = os.pwrite(fd, data, address)
        if written == len(data):
            return
        problem = f"{written} of {len(data)} bytes could be written"
    except OSError as error:
        problem = error.strerror or str(error)
    finally:
        os.close(fd)
    raise BadBuffer(
        problem,
        operation="write shared memory",
        target=f"{len(data)} bytes at {address:#x}",
        hint="whoever shares the file has taken its pages away",
    )


def is_memory_of(fd: int, pid: int) -> bool:
    """Whether a received descriptor really is /proc/PID/mem of that very process.

    The very file that ``/proc/PID/mem`` is here, by device and inode: the open file keeps its
    directory entry, so this is the same process and the same pid namespace; a procfs mounted
    elsewhere, a look-alike or a reused pid is not. Asks nobody but the kernel: the descriptor may
    lie on a file system whose daemon never answers.
    """
    try:
        there = os.stat(f"/proc/{pid}/mem")
        return libc.identity(fd) == (there.st_dev, there.st_ino)
    except OSError:
        return False


def command_of(pid: int) -> str:
    """The name of a process (comm, proc_pid_comm(5)): at most 15 characters; "" if it is gone.

    Processes choose it themselves: for showing only, so what cannot be printed is replaced.
    """
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "".join(c if c.isprintable() else "?" for c in name.removesuffix("\n"))


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: with the pid an identity across reuse.

    Raises SystemFailure (ESRCH or ENOENT) if there is no such process. Source: proc_pid_stat(5),
    field 22; counted behind the last parenthesis, because the name before it may hold anything.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise failure(error, "read start time", f"process {pid}") from error
    return int(text.rpartition(")")[2].split()[19])


def descendants(pid: int) -> list[int]:
    """Every process below ``pid``, parents before their children. A snapshot: proc(5), stat."""
    below: dict[int, list[int]] = {}
    for other in _pids():
        try:
            text = Path(f"/proc/{other}/stat").read_text()
        except OSError:
            continue  # it has ended meanwhile
        below.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(other)
    found = [pid]
    for parent in found:
        found += below.get(parent, [])
    return found[1:]


def resident(pid: int) -> dict[str, int]:
    """What a process has in memory, in bytes, by the names of proc_pid_smaps(5) (``Rss``, ``Pss``).

    Raises SystemFailure for a process that is gone, and NoPermission for another user's.
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError as error:
        raise failure(error, "read memory", f"process {pid}") from error
    rows = re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)
    return {name: int(value) * 1024 for name, value in rows}


def context_switches(pid: int) -> dict[int, int]:
    """How often each thread of a process was put on or off a processor, by its own doing or not.

    By thread id (proc_pid_status(5)). What does not rise did not run: nothing woke the thread.
    Raises SystemFailure for a process that is gone.
    """
    found = {}
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            try:
                text = Path(f"/proc/{pid}/task/{task}/status").read_text("utf-8", "replace")
            except _GONE:
                continue  # the thread has ended since
            counts = re.findall(r"^\w+_ctxt_switches:\s+(\d+)$", text, re.MULTILINE)
            found[int(task)] = sum(map(int, counts))
    except OSError as error:
        raise failure(error, "read context switches", f"process {pid}") from error
    return found


def waited_for_processor(pid: int) -> int:
    """Nanoseconds that threads of a process were ready to run and did not, because others did.

    The second field of schedstat (Documentation/scheduler/sched-stats.rst); 0 on a kernel without
    it (CONFIG_SCHED_INFO). Raises SystemFailure for a process that is gone.
    """
    total = 0
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            path = Path(f"/proc/{pid}/task/{task}/schedstat")
            total += int(path.read_text(encoding="ascii").split()[1]) if path.exists() else 0
    except OSError as error:
        raise failure(error, "read scheduling", f"process {pid}") from error
    return total


def mapped_shared() -> int:
    """Shared memory mapped by the processes that this user may look at, in bytes.

    The sum of ``RssShmem`` (proc_pid_status(5)): what several processes map counts several times.
    """
    total = 0
    for pid in _pids():
        try:
            text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found = re.search(r"^RssShmem:\s+(\d+) kB$", text, re.MULTILINE)
        total += int(found[1]) * 1024 if found else 0
    return total


def in_tmpfs() -> int:
    """Bytes used in mounted tmpfs file systems: shared memory that files hold."""
    total, seen = 0, set()
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split(" ")
        if kind != "tmpfs":
            continue
        try:
            status, device = os.statvfs(place), os.stat(place).st_dev
        except OSError:
            continue
        if device not in seen:
            seen.add(device)
            total += (status.f_blocks - status.f_bfree) * status.f_frsize
    return total


def memfds_named(prefix: str) -> dict[int, int]:
    """Inode to size of every memfd whose name starts with ``prefix``, in bytes.

    Found through descriptors (allocated bytes) and mappings (mapped bytes) of all processes that
    this user may look at.
    """
    found: dict[int, int] = {}
    for pid in _pids():
        for inode, size in _mapped_memfds(pid, f"/memfd:{prefix}"):
            found[inode] = max(size, found.get(inode, 0))
        try:
            found |= memfds_of(pid, prefix)
        except SystemFailure:
            continue  # another user's process
    return found


def _mapped_memfds(pid: int, name: str) -> Iterator[tuple[int, int]]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(name):
            start, _, end = fields[0].partition("-")
            yield int(fields[4]), int(end, 16) - int(start, 16)


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
