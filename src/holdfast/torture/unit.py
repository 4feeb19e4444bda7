# SPDX-License-Identifier: Apache-2.0
"""One unit of a campaign: a stack, its cases in lanes, and everything looked at from outside.

Facts. Campaigns fork, and a process that forks must have one thread and no device of its own.
Executors run their work in threads and in processes of all kinds.

Choice. A unit is run by an interpreter of its own, which reads the unit as JSON and writes what it
found as lines of JSON (:func:`main`). Whoever runs it, in whatever thread or on whatever machine,
needs nothing but to start it (:func:`run`). Lanes are forked from it, and clients from lanes.

What is looked at here, rather than in a case: the survivor's rounds, memory files and descriptors
of keeper, anchor and function before and after, leases that never end, bytes that nobody accounts
for, and after the end of the stack, files and processes that are left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from holdfast import steps
from holdfast.errors import HoldfastError
from holdfast.keeper import embedded
from holdfast.kernel import procfs
from holdfast.steps import Board
from holdfast.torture import events, scripts
from holdfast.torture.actors import Child, spawn
from holdfast.torture.eyes import Eyes
from holdfast.torture.lane import Lane, Record
from holdfast.torture.outside import Processes, processes_under, settle
from holdfast.torture.schedule import Case, Unit
from holdfast.torture.stack import SERVE, Stack

ARENA = 16 << 20
SETTLE = 5.0
END = 20.0
"""Seconds in which every process of a stack that was ended must be gone."""
HUNG_AFTER = 30.0
START_TIMEOUT = 60.0
ROLES = ("keeper", "anchor", "function", "standby")
FAULTY_DEADLINES = (
    "--drain-deadline", "0.3", "--stop-deadline", "0.2", "--isolate-deadline", "0.2",
    "--reset-deadline", "1",
)  # fmt: skip
"""Where the function breaks promises every case runs into deadlines."""


@dataclass(slots=True)
class Found:
    """What a unit came to. Picklable and JSON-able by :func:`dataclasses.asdict`."""

    line: str
    number: int
    policy: str
    memory: str
    access: str
    faults: str
    records: list[dict[str, Any]] = field(default_factory=list)
    leases: list[dict[str, Any]] = field(default_factory=list)
    """What the keepers' log tells of each lease: number, pid, and ``log`` of states and times."""
    happened: list[dict[str, Any]] = field(default_factory=list)
    """Starts, successions and ends of keepers, from the same log."""
    log: list[str] = field(default_factory=list)
    """That log's lines."""
    survivor: dict[str, Any] = field(default_factory=dict)
    leaked_bytes: int = 0
    leaked_fds: int = 0
    leaked: list[str] = field(default_factory=list)
    """Every descriptor of every process, if there are more than at first."""
    hung_leases: int = 0
    quarantined_bytes: int = 0
    unaccounted_bytes: int = 0
    left_processes: int = 0
    problem: str = ""
    """Why the unit came to no end; empty if it did."""
    started_ns: int = 0
    seconds: float = 0.0


class ArmedStack(Stack):
    """A stack whose processes all look at one board."""

    board: Board

    def _start(self) -> None:
        path = Path(self._directory) / "steps.board"
        self.board = Board(path, create=True)
        os.environ[steps.VARIABLE] = str(path)
        super()._start()

    def _clean(self) -> None:
        super()._clean()
        os.environ.pop(steps.VARIABLE, None)
        if hasattr(self, "board"):
            self.board.close()

    @property
    def directory(self) -> str:
        """The runtime directory: the mark of every process that belongs to this stack."""
        return self._directory


def options_of(unit: Unit) -> list[str]:
    """How ``holdfast serve`` is started for a unit."""
    setting = unit.setting
    # Keepers are killed here by the hundred: that is no reason to distrust the driver.
    options = ["--policy", str(setting.policy), "--safe-after", str(1 << 20)]
    if setting.memory == "arena":
        options += ["--arena", str(ARENA)]
    if setting.faulty:
        options += ["--test-faults", setting.faults, *FAULTY_DEADLINES]
    return options


class _Run:
    """One unit, step by step."""

    def __init__(self, unit: Unit, driver: str, progress: Callable[[], None]) -> None:
        self._unit = unit
        self._driver = driver
        self._progress = progress
        self._found = Found(
            str(unit),
            unit.number,
            str(unit.setting.policy),
            unit.setting.memory,
            unit.setting.access,
            unit.setting.faults,
        )

    def run(self, serve: Sequence[str] = SERVE) -> Found:
        found = self._found
        found.started_ns = time.monotonic_ns()
        directory, files = "", frozenset[int]()
        others = frozenset(procfs.memfds_named("holdfast-"))
        try:
            with ArmedStack(self._unit.target, options_of(self._unit), serve) as stack:
                directory = stack.directory
                # What was there before belongs to others: the card of a server of its own.
                files = self._on(stack) - others
        except (HoldfastError, OSError, RuntimeError) as error:
            found.problem = found.problem or f"{type(error).__name__}: {error}"
        found.left_processes = settle(lambda: len(_processes_of(directory)), goal=0, timeout=END)
        left = settle(lambda: _left_bytes(files), goal=0, timeout=SETTLE)
        found.leaked_bytes = max(found.leaked_bytes, left)
        for pid in _processes_of(directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        found.seconds = round((time.monotonic_ns() - found.started_ns) / 1e9, 3)
        return found

    def _on(self, stack: ArmedStack) -> frozenset[int]:
        """Everything that happens while the stack is up; its memory files by inode."""
        steps.join(str(stack.board.path))
        steps.board = stack.board
        self._fill()
        eyes = Eyes(self._unit.target)
        settle(eyes.unsettled, goal=0, timeout=HUNG_AFTER)
        pids = self._introduce(stack.board, eyes)
        baseline = Processes.look(pids)
        links = _links(eyes.ps())
        survivor = self._start_survivor(eyes)
        cases = list(enumerate(self._unit.cases))
        first_fatal = next((at for at, case in cases if case.fatal), len(cases))
        self._lanes(stack.board, cases[:first_fatal])
        self._stop_survivor(survivor)
        after = self._account(eyes, baseline, links)
        told = eyes.ps()["leases"]
        eyes.close()
        if first_fatal < len(cases):
            # Behind it there is no stack any more: what follows in the line cannot be run.
            self._lanes(stack.board, [cases[first_fatal]])
        self._found.leases, self._found.happened = events.read(stack.log, told)
        self._found.log = events.lines(stack.log)
        return frozenset(baseline.memfds) | frozenset(after.memfds)

    def _fill(self) -> None:
        # In a child: whoever forks must not have opened a device.
        def body(_: int, writing: int) -> None:
            try:
                scripts.fill_card(self._unit.target, self._driver)
            except HoldfastError as error:
                scripts.say(writing, error=str(error))

        child = spawn(body)
        told = scripts.hear(child.reading, START_TIMEOUT)
        if child.reap() != 0 or told is not None:
            raise HoldfastError(
                f"the card could not be filled: {(told or {}).get('error', 'it ended')}",
                operation="torture",
                target=self._unit.target,
            )

    def _introduce(self, board: Board, eyes: Eyes) -> list[int]:
        """Write down who is who; the pids of all."""
        told = eyes.ps()
        pids = []
        for role in ROLES:
            pid = int(told.get(role) or 0)
            board.set_role(role, pid or None)
            if pid:
                pids.append(pid)
        return pids

    # -- the survivor ------------------------------------------------------------

    def _start_survivor(self, eyes: Eyes) -> Child | None:
        setting = self._unit.setting
        if self._driver != "xdma" or setting.access != "shared" or setting.faulty:
            return None

        def body(reading: int, writing: int) -> None:
            eyes.drop()
            scripts.survivor(self._unit.target, tolerant=False)(reading, writing)

        child = spawn(body)
        told = scripts.hear(child.reading, START_TIMEOUT)
        if not (told or {}).get("ready"):
            self._found.survivor = told or {"error": "it ended"}
            child.kill()
            child.reap()
            return None
        return child

    def _stop_survivor(self, child: Child | None) -> None:
        if child is None:
            return
        child.tell(b"x")
        try:
            self._found.survivor = scripts.hear(child.reading, START_TIMEOUT) or {
                "error": "it ended without a word"
            }
        except TimeoutError:
            self._found.survivor = {"error": "it hangs"}
            child.kill()
        child.reap()

    # -- lanes ------------------------------------------------------------

    def _lanes(self, board: Board, cases: list[tuple[int, Case]]) -> None:
        """Run cases side by side, each lane a process; takes their records as they come."""
        count = min(self._unit.setting.lanes, len(cases))
        if not count:
            return
        reading, writing = os.pipe2(os.O_CLOEXEC)
        lanes = []
        for lane in range(count):
            share = cases[lane::count]
            lanes.append(spawn(self._lane(lane, share, board, writing)))
        os.close(writing)
        seen = 0
        with os.fdopen(reading, "rb") as reports:
            for line in reports:
                self._found.records.append(json.loads(line))
                seen += 1
                self._progress()
        statuses = [lane.reap() for lane in lanes]
        if any(statuses) or seen != len(cases):
            self._found.problem = f"{seen} of {len(cases)} cases reported, lanes {statuses}"

    def _lane(
        self, number: int, share: list[tuple[int, Case]], board: Board, report: int
    ) -> scripts.Body:
        def tell(record: Record) -> None:
            os.write(report, json.dumps(asdict(record)).encode() + b"\n")

        def body(_: int, __: int) -> None:
            try:
                Lane(self._unit, self._driver, number, board, tell).run(share)
            except BaseException:
                traceback.print_exc()  # on stderr, which becomes the unit's problem
                raise

        return body

    # -- the account ------------------------------------------------------------

    def _account(self, eyes: Eyes, baseline: Processes, links: Counter[str]) -> Processes:
        """What is held when every client is gone, compared with before the first one came."""
        found = self._found
        found.hung_leases = settle(eyes.unsettled, goal=0, timeout=HUNG_AFTER)
        told = eyes.ps()
        found.quarantined_bytes = int(told["quarantined_bytes"])
        found.unaccounted_bytes = abs(int(told["unaccounted_bytes"]))
        pids = [int(told[role]) for role in ROLES if told.get(role)]
        more = settle(
            lambda: Processes.look(pids).descriptors - baseline.descriptors, goal=0, timeout=SETTLE
        )
        found.leaked_fds = max(0, more)
        if more > 0:
            now = _links(told)
            found.leaked = [f"{link} {now[link] - links[link]:+d}" for link in sorted(now | links)
                            if now[link] != links[link]]  # fmt: skip
        after = Processes.look(pids)
        held = after.memfd_bytes - baseline.memfd_bytes - found.quarantined_bytes
        found.leaked_bytes = max(0, held)
        return after


def _links(told: dict[str, Any]) -> Counter[str]:
    """What kinds of descriptors each process has, and how many."""
    return Counter(
        f"{role} {re.sub(r'[0-9]+', '', link)}"
        for role in ROLES
        if told.get(role)
        for link in procfs.open_descriptors(int(told[role])).values()
    )


def _left_bytes(files: frozenset[int]) -> int:
    if not files:
        return 0
    named = procfs.memfds_named("holdfast-")
    return sum(size for inode, size in named.items() if inode in files)


def _processes_of(directory: str) -> list[int]:
    return processes_under(embedded.RUNTIME_VARIABLE, directory) if directory else []


# -- an interpreter for each unit ------------------------------------------------------------


def run(
    unit: Unit,
    driver: str,
    progress: Callable[[int], None] = lambda _: None,
    serve: Sequence[str] = SERVE,
) -> Found:
    """Run a unit in an interpreter of its own; ``progress`` is told how many cases have ended.

    From any thread. Never raises for what a unit does: that is its ``problem``.
    """
    job = json.dumps(
        {
            "target": unit.target, "line": str(unit), "number": unit.number, "driver": driver,
            "serve": list(serve),
        }
    )  # fmt: skip
    with tempfile.TemporaryFile() as errors:
        found = _run_elsewhere(job, progress, errors)
        errors.seek(0)
        said = errors.read()[-2000:].decode(errors="replace").strip()
    if found is None:
        setting = unit.setting
        found = Found(str(unit), unit.number, str(setting.policy), setting.memory, setting.access,
                      setting.faults, problem="the unit ended early")  # fmt: skip
    if found.problem and said:
        found.problem += f"; {said}"
    return found


def _run_elsewhere(job: str, progress: Callable[[int], None], errors: IO[bytes]) -> Found | None:
    found: Found | None = None
    runner = subprocess.Popen(
        [sys.executable, "-m", "holdfast.torture.unit"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
    )
    assert runner.stdin is not None
    assert runner.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            runner.stdin.write(job.encode())
            runner.stdin.close()
        done = 0
        for line in runner.stdout:
            told = json.loads(line)
            if "found" in told:
                found = Found(**told["found"])
            else:
                done += 1
                progress(done)
    finally:
        runner.stdout.close()
        runner.wait()
    return found


def main() -> None:
    """Read one unit from standard input, run it, write what comes of it to standard output."""
    job = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # whatever else writes there must not come between

    def write(**told: Any) -> None:
        with os.fdopen(os.dup(out), "wb") as stream:
            stream.write(json.dumps(told).encode() + b"\n")

    unit = Unit.parse(job["target"], job["line"], job["number"])
    found = _Run(unit, job["driver"], lambda: write(done=True)).run(job["serve"])
    write(found=asdict(found))


if __name__ == "__main__":
    main()
