# SPDX-License-Identifier: Apache-2.0
"""Boot a guest, run one command in it, pass its output on, return its exit status.

Facts: a guest can hang or panic anywhere, its serial ports are the only thing it has, and a host
process that waits for it may itself be interrupted. Choice: one loop over two pipes (output,
records), two sockets (questions, QEMU's monitor) and QEMU's pidfd, with one deadline; whatever way
the loop ends, QEMU is dead and reaped when :func:`run` returns. The console goes to a file from
QEMU itself, so that it is there however the guest ended. Cost: the guest's root file system is
copied for each run (150 MB, a tenth of a second from the page cache), since QEMU takes one file.
"""

from __future__ import annotations

import io
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from holdfast.errors import ProtocolError, UsageError
from holdfast.lab import cache, kernel, machine, qemu, rootfs
from holdfast.lab.failure import GuestFailed, GuestTimeout, LabUnavailable
from holdfast.lab.machine import Guest, PlacedFunction
from holdfast.lab.ports import Lines, Monitor, Question, Records, answer

BOOT_DEADLINE: Final = 180.0
"""Seconds until user space must be there; emulated on a busy host it takes 10 to 20."""
POWER_OFF: Final = 20.0
"""Seconds for the guest to switch itself off once everything was said."""
GUESTS: Final = "HOLDFAST_LAB_GUESTS"
"""Environment variable: how many guests of this user may run at once; two if not set."""
CONSOLES: Final = "consoles"
KEPT_CONSOLES: Final = 20

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
_PIECE: Final = 1 << 16
_GATHER: Final = 0.01
"""Seconds for which a guest's bytes, which come one by one, are left to gather."""


def _silent(_: str) -> None:
    """Progress for nobody."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a guest is started from."""

    emulator: qemu.Emulator
    kernel: Path
    base: rootfs.Base


def prepare(guest: Guest, progress: Callable[[str], None] = _silent) -> Parts:
    """Everything that can be made beforehand, from the cache if it is there.

    ``progress`` is called with one line for each thing that takes time. Raises LabUnavailable.
    """
    machine.check(guest)
    emulator = qemu.find(progress)
    base = rootfs.base(progress)
    emulator = qemu.with_kvm(emulator, base.kernel, base.root / "usr/bin/busybox", progress)
    if guest.kernel == "stock":
        image = base.kernel
    elif guest.kernel == "full":
        image = kernel.built(progress)
    else:
        image = Path(guest.kernel)
    return Parts(emulator, image, base)


def run(
    guest: Guest,
    command: Sequence[str],
    *,
    output: Callable[[bytes], None],
    results: Path | None = None,
    environment: Mapping[str, str] = _NOTHING,
    console: Path | None = None,
    progress: Callable[[str], None] = _silent,
) -> int:
    """Run ``command`` in ``guest``, in a copy of this source tree at /work.

    ``output`` gets the command's output as it comes, standard error included. What the command
    leaves in /results is put into the directory ``results``, with the kernel's log as dmesg.txt.
    ``console`` is where the guest's console is written; without it, it is kept in the cache, and
    only if the guest failed. Returns the exit status, 128+n after signal n.

    Raises GuestTimeout when the guest's time is up, GuestFailed when it ended without a status
    (panic, no such driver), LabUnavailable when no guest can be made here; UsageError for a wrong
    description. In each case QEMU is gone when this returns. Safe in several threads.
    """
    parts = prepare(guest, progress)
    placed = machine.place_functions(guest.functions)
    places = _places()
    with ExitStack() as stack:
        stack.enter_context(
            cache.one_of("guest", places, lambda: progress("waiting for another guest to end"))
        )
        place = stack.enter_context(cache.scratch("run"))
        initrd = place / "initrd"
        shutil.copyfile(parts.base.archive, initrd)
        rootfs.overlay(initrd, parts.base, guest, placed, command, environment)
        written = stack.enter_context(_console(console))
        progress(f"booting the {guest.kernel} kernel, {parts.emulator.accelerator}")
        devices = tuple(machine.device_arguments(placed, place))
        session = stack.enter_context(closing(_Session(output, placed, written)))
        records = session.run(parts, guest, initrd, devices, place / "qemu.log")
        if results is not None:
            _unpack_results(bytes(records.results), results, written)
        assert records.status is not None  # the session saw to it
        return records.status


def _places() -> int:
    """How many guests of this user may run at once."""
    told = os.environ.get(GUESTS, "2")
    if not told.isdecimal() or not int(told):
        raise UsageError(f"{GUESTS}={told!r} is no number of guests", operation="lab run")
    return int(told)


@contextmanager
def _console(asked: Path | None) -> Iterator[Path]:
    """The console's file: the caller's, or one in the cache that stays only after a failure."""
    if asked is not None:
        yield asked.absolute()
        return
    kept = cache.directory() / CONSOLES
    kept.mkdir(parents=True, exist_ok=True)
    for old in sorted(kept.iterdir(), key=lambda one: one.name)[:-KEPT_CONSOLES]:
        old.unlink(missing_ok=True)
    path = kept / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns()}.log"
    yield path
    path.unlink(missing_ok=True)


def _socket_pair() -> tuple[int, int]:
    """Descriptors of two connected sockets, owned by the caller."""
    near, far = socket.socketpair()
    return near.detach(), far.detach()


def _unpack_results(archive: bytes, place: Path, console: Path) -> None:
    """Put the results where they are wanted; nothing can get out of ``place``."""
    place.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(place, filter="data")
    except tarfile.TarError as error:
        raise GuestFailed(f"the results are no archive: {error}", console=console) from error


class _Session:
    """One guest, from QEMU's start to its end."""

    def __init__(
        self, output: Callable[[bytes], None], placed: list[PlacedFunction], console: Path
    ) -> None:
        self._output = output
        self._functions = {one.name: one for one in placed}
        self._console = console
        self._records = Records()
        self._questions = Lines()
        self._monitor = Monitor()
        self._near: dict[str, int] = {}
        self._selector = selectors.DefaultSelector()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1

    def close(self) -> None:
        """End QEMU if it still runs, and close everything."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for fd in self._near.values():
            os.close(fd)
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._selector.close()

    def run(
        self, parts: Parts, guest: Guest, initrd: Path, devices: tuple[str, ...], log: Path
    ) -> Records:
        """Until QEMU is gone. The records are complete, or an error says why they are not."""
        start = time.monotonic()
        self._start(parts, guest, initrd, devices, log)
        deadline = start + guest.timeout
        boot_deadline = min(deadline, start + BOOT_DEADLINE)
        while self._alive():
            if self._records.ended:
                deadline = min(deadline, time.monotonic() + POWER_OFF)
                self._finish(deadline)
                break
            until = deadline if self._records.started else boot_deadline
            if (left := until - time.monotonic()) <= 0:
                stage = "running" if self._records.started else "booting"
                raise GuestTimeout(
                    f"the guest was still {stage} after {time.monotonic() - start:.0f} s and was "
                    "killed",
                    console=self._console,
                )
            self._turn(left)
        self._drain()
        self._judge(log)
        return self._records

    def _start(
        self, parts: Parts, guest: Guest, initrd: Path, devices: tuple[str, ...], log: Path
    ) -> None:
        with ExitStack() as stack:
            far: dict[str, int] = {}
            for name in (*qemu.PIPES, *qemu.SOCKETS):
                near, far[name] = os.pipe() if name in qemu.PIPES else _socket_pair()
                stack.callback(os.close, far[name])
                os.set_blocking(near, False)
                self._near[name] = near
                self._selector.register(near, selectors.EVENT_READ, name)
            boot = qemu.Boot(parts.kernel, initrd, self._console, devices, far)
            try:
                with log.open("wb") as messages:
                    self._process = subprocess.Popen(
                        qemu.arguments(parts.emulator, guest, boot),
                        stdin=subprocess.DEVNULL,
                        stdout=messages,
                        stderr=messages,
                        pass_fds=tuple(far.values()),
                    )
            except OSError as error:
                raise LabUnavailable(
                    f"QEMU does not start: {error.strerror}",
                    operation="lab run",
                    target=parts.emulator.command[0],
                    errno=error.errno,
                ) from error
        self._pidfd = os.pidfd_open(self._process.pid)
        self._selector.register(self._pidfd, selectors.EVENT_READ, "")
        self._send("monitor", self._monitor.command("qmp_capabilities"))

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _turn(self, timeout: float) -> None:
        """Wait for something, and take it."""
        for key, _ in self._selector.select(timeout):
            if key.data:
                self._receive(str(key.data))
        # Taking every byte by itself would cost the processor time that the guest needs.
        time.sleep(_GATHER)

    def _receive(self, name: str) -> bool:
        """Take what has come at a port; False once it has ended (or has nothing)."""
        fd = self._near[name]
        try:
            data = os.read(fd, _PIECE)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(fd)
            os.close(self._near.pop(name))
            return False
        try:
            self._take(name, data)
        except ProtocolError as error:
            raise GuestFailed(error.what, console=self._console, hint=error.hint) from error
        return True

    def _take(self, name: str, data: bytes) -> None:
        if name == "output":
            self._output(data)
        elif name == "records":
            self._records.feed(data)
        elif name == "questions":
            for line in self._questions.feed(data):
                self._ask(Question.parse(line))
        else:
            for command, _, error in self._monitor.feed(data):
                if command in {"device_del", "device_add"}:
                    self._send("questions", answer(done=not error, why=error))

    def _ask(self, question: Question | None) -> None:
        """Carry out what the guest may ask for, of its own functions; refuse the rest."""
        if question is None or question.name not in self._functions:
            self._send("questions", answer(done=False, why="no such function in this guest"))
        elif question.what == "unplug":
            self._send("monitor", self._monitor.command("device_del", {"id": question.name}))
        elif question.what == "plug":
            again = machine.properties(self._functions[question.name])
            self._monitor.deleted.discard(question.name)
            self._send("monitor", self._monitor.command("device_add", again))
        elif question.what == "unplugged":
            self._send("questions", answer(done=question.name in self._monitor.deleted))
        else:
            why = f"the host does not do {question.what!r}"
            self._send("questions", answer(done=False, why=why))

    def _send(self, name: str, data: bytes) -> None:
        """Lines are short and answered one by one; a socket that is full means a broken guest."""
        if (fd := self._near.get(name)) is None:
            return
        try:
            sent = os.write(fd, data)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            sent = 0
        if sent != len(data) and self._alive():
            raise GuestFailed(f"the guest does not read its {name}", console=self._console)

    def _finish(self, deadline: float) -> None:
        """All was said: let the guest switch itself off, or do it for it."""
        while self._alive() and (left := deadline - time.monotonic()) > 0:
            self._turn(left)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _drain(self) -> None:
        """QEMU is gone: take what it had still written."""
        for name in tuple(self._near):
            while name in self._near and self._receive(name):
                pass

    def _judge(self, log: Path) -> None:
        records = self._records
        if records.failed:
            raise GuestFailed(records.failed, console=self._console)
        if records.complete:
            return
        if not records.started:
            said = log.read_bytes()[-1000:].decode(errors="replace").strip()
            what = "the guest ended before user space was there"
            raise GuestFailed(f"{what}: {said}" if said else what, console=self._console)
        raise GuestFailed("the guest ended without an exit status", console=self._console)


def to_stderr(text: str) -> None:
    """Progress for people who look at a terminal."""
    sys.stderr.write(f"lab: {text}\n")
    sys.stderr.flush()
