# SPDX-License-Identifier: Apache-2.0
"""``holdfast run``: an exit is reported after the release of every lease, and as it was."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack

pytestmark = pytest.mark.usefixtures("clean")
LONG = 30.0
RATE = 1 << 20
SIZE = 256 << 10
SLOW = f"emu:xdma?memory=4M&channels=2&link_rate={RATE}&link_chunk=4096"
"""A transfer of SIZE takes a quarter of a second."""
SHORT = ("--drain-deadline", "0.3", "--stop-deadline", "0.3", "--isolate-deadline", "0.2",
         "--reset-deadline", "0.5")  # fmt: skip

POST = f"""
import os, sys, time, holdfast
card = holdfast.open(sys.argv[1], access="shared", timeout=20)
buffer = card.alloc({SIZE})
running = card.dma.from_card(buffer, 0)
print(card.lease.number, flush=True)
"""
DIE_MID_DMA = POST + "os.kill(os.getpid(), 9)"
WAIT_FOR_EVER = POST + "time.sleep(600)"


class Started:
    """``holdfast run`` in a session of its own."""

    def __init__(self, target: str, command: Sequence[str], *options: str, report: Path) -> None:
        self.report = report
        self.process = subprocess.Popen(
            [sys.executable, "-m", "holdfast", "run", "--json", str(report), *options, target,
             "--", *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def line(self) -> str:
        """What the command says first."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def end(self) -> tuple[int, dict[str, Any], str]:
        """Exit (negative: a signal), report, and what was said; with the time it was seen."""
        _, said = self.process.communicate(timeout=LONG)
        self.seen_ns = time.monotonic_ns()
        text = self.report.read_text() if self.report.exists() else "{}"
        return self.process.returncode, json.loads(text), said.decode()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def start(target: str, command: Sequence[str], *options: str) -> Started:
        made = Started(target, command, *options, report=tmp_path / f"report-{len(started)}")
        started.append(made)
        return made

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.process.communicate()


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", script, *arguments]


def released_ns(stack: Stack, number: int) -> int:
    """When the keeper says that a lease was released."""
    told = next(lease for lease in stack.ps()["leases"] if lease["lease"] == number)
    assert told["state"] == "released", told
    return int(told["log"][-1][1])


def test_a_command_killed_in_mid_dma_is_reported_after_its_release(
    serve: Callable[..., Stack], run: Callable[..., Started]
) -> None:
    stack = serve(SLOW)
    started = run(SLOW, python(DIE_MID_DMA, SLOW))
    number = int(started.line())
    code, report, _ = started.end()
    assert code == -signal.SIGKILL, "died by the command's own signal"
    assert report["signal"] == "SIGKILL"
    assert [lease["lease"] for lease in report["leases"]] == [number]
    told = next(lease for lease in stack.ps()["leases"] if lease["lease"] == number)
    assert told["in_flight_at_death"]
    assert told["completed_after_death"]
    assert report["ended_ns"] < released_ns(stack, number) < report["released_ns"]
    assert report["released_ns"] < started.seen_ns
    assert report["waited_ms"] > 50, "the transfer cannot have been over before"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -USR1 $$"], -signal.SIGUSR1),
        (["holdfast-has-no-such-command"], 127),
        (["/etc/passwd"], 126),
    ],
    ids=["success", "failure", "signal", "not found", "not executable"],
)
def test_the_exit_is_the_commands_own(
    xdma: Stack, run: Callable[..., Started], command: list[str], code: int
) -> None:
    assert run(xdma.target, command).end()[0] == code


def test_what_cannot_be_kept_runs_nothing(runtime: Path, run: Callable[..., Started]) -> None:
    code, report, said = run("emu:nothing-like-this", ["touch", str(runtime / "ran")]).end()
    assert (code, report) == (125, {})
    assert "nothing-like-this" in said
    assert not (runtime / "ran").exists()


def test_a_missing_keeper_is_started_and_the_token_is_not_its_own(
    runtime: Path, run: Callable[..., Started]
) -> None:
    code, report, _ = run("emu:edu", python(
        "import holdfast\nwith holdfast.open('emu:edu') as card: card.alloc(64)"
    )).end()  # fmt: skip
    assert code == 0
    assert [lease["state"] for lease in report["leases"]] == ["released"]


TRAPS = """
import os, signal, sys, time, holdfast
def note(number, frame):
    print(signal.Signals(number).name, flush=True)
    if number == signal.SIGTERM:
        sys.exit(9)
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
               signal.SIGWINCH, signal.SIGTERM):
    signal.signal(number, note)
print("ready", flush=True)
while True:
    time.sleep(60)
"""


def test_signals_are_passed_on(xdma: Stack, run: Callable[..., Started]) -> None:
    started = run(xdma.target, python(TRAPS))
    assert started.line() == "ready"
    for name in ("SIGHUP", "SIGUSR1", "SIGINT", "SIGUSR2", "SIGWINCH", "SIGQUIT", "SIGTERM"):
        started.process.send_signal(signal.Signals[name])
        assert started.line() == name
    assert started.end()[0] == 9


def test_a_second_interrupt_kills_the_command_but_waits_for_its_lease(
    serve: Callable[..., Stack], run: Callable[..., Started]
) -> None:
    stack = serve(SLOW)
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + WAIT_FOR_EVER
    started = run(SLOW, python(deaf, SLOW))
    number = int(started.line())
    started.process.send_signal(signal.SIGINT)
    time.sleep(0.1)  # two of the same signal at once would be one
    started.process.send_signal(signal.SIGINT)
    code, report, said = started.end()
    assert code == -signal.SIGKILL
    assert "killing the command" in said
    assert released_ns(stack, number) < report["released_ns"]


ORPHAN = """
import os, subprocess, sys
keep = {} if sys.argv[2] == "token" else dict(env={k: v for k, v in os.environ.items()
                                                    if k != "HOLDFAST_RUN"})
child = subprocess.Popen([sys.executable, "-c", sys.argv[3], sys.argv[1]], stdout=subprocess.PIPE,
                         start_new_session=True, **keep)
print(child.stdout.readline().decode().strip(), flush=True)
os._exit(3)
"""
A_WHILE = POST + "time.sleep(0.5); os._exit(0)"


@pytest.mark.parametrize("how", ["token", "descent"])
def test_orphans_in_sessions_of_their_own_are_waited_for(
    serve: Callable[..., Stack], run: Callable[..., Started], how: str
) -> None:
    stack = serve(SLOW)
    started = run(SLOW, python(ORPHAN, SLOW, how, A_WHILE))
    number = int(started.line())
    code, report, _ = started.end()
    assert code == 3, "the command's exit, not the orphan's"
    assert number in [lease["lease"] for lease in report["leases"]]
    assert report["ended_ns"] < released_ns(stack, number) < report["released_ns"]


def test_others_leases_are_not_waited_for(
    serve: Callable[..., Stack], run: Callable[..., Started]
) -> None:
    stack = serve(SLOW)
    stranger = subprocess.Popen(python(WAIT_FOR_EVER, SLOW), stdout=subprocess.PIPE)
    try:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        code, report, _ = run(SLOW, ["true"]).end()
        assert (code, report["leases"]) == (0, [])
    finally:
        stranger.kill()
        stranger.communicate()
    assert settle(
        lambda: sum(lease["state"] != "released" for lease in stack.ps()["leases"]),
        goal=0, timeout=LONG,
    ) == 0  # fmt: skip


def test_quarantine_is_told_and_never_taken_for_a_release(
    serve: Callable[..., Stack], run: Callable[..., Started]
) -> None:
    target = "emu:xdma?memory=1M"
    stack = serve(target, *SHORT, "--arena", "16M", "--test-faults", "hang@2,refuse_reset@1")
    with holdfast.open(target) as card:
        card.dma.to_card(card.alloc(64)).wait(LONG)
    started = run(target, python(DIE_MID_DMA, target), "--patience", "2")
    number = int(started.line())
    code, report, said = started.end()
    assert code == 124, report
    assert report["gave_up"]
    assert report["signal"] == "SIGKILL"
    assert "quarantine" in said
    assert said.count("are in quarantine") == 1
    assert "gave up" in said
    told = next(lease for lease in stack.ps()["leases"] if lease["lease"] == number)
    assert told["state"] == "quarantine"
    assert told["bytes"] >= SIZE


def test_the_keepers_end_before_the_release_is_told(
    serve: Callable[..., Stack], run: Callable[..., Started]
) -> None:
    target = "emu:xdma?memory=1M"
    stack = serve(target, "--drain-deadline", "600", "--test-faults", "hang")
    started = run(target, python(DIE_MID_DMA, target))
    assert started.line()
    assert settle(
        lambda: sum(not lease["process_dead"] for lease in stack.ps()["leases"]),
        goal=0, timeout=LONG,
    ) == 0  # fmt: skip
    stack.kill_all()
    code, report, said = started.end()
    assert code == 124
    assert "keeper is gone" in said
    assert all(lease["state"] != "released" for lease in report["leases"])


def test_the_terminal_is_the_commands(xdma: Stack) -> None:
    """Ctrl-C in a terminal reaches the command once, and its input arrives."""
    script = (
        "import signal, sys, time\n"
        "seen = []\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
        "print('typed', sys.stdin.readline().strip(), sys.stdin.isatty(), flush=True)\n"
        "time.sleep(0.3); time.sleep(0.3)\n"
        "print('interrupts', len(seen), flush=True)\n"
        "sys.exit(5)\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "holdfast", "run", xdma.target, "--",
                                  *python(script)])  # fmt: skip
    said = b""

    def until(text: bytes) -> None:
        nonlocal said
        while text not in said:
            assert select.select([terminal], [], [], LONG)[0], said
            said += os.read(terminal, 4096)

    try:
        os.write(terminal, b"hello\n")
        until(b"typed hello True")
        os.write(terminal, b"\x03")
        until(b"interrupts 1")
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (5, -signal.SIGHUP)
