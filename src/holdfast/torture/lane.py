# SPDX-License-Identifier: Apache-2.0
"""One lane of a unit: case after case, each with a client that is killed and a victim that judges.

Facts. Which process dies, and where, is on the board before the client starts. What happens then is
the machine's own: the client may die, or live on under another keeper, or die with it.

Choice. The lane is a process of its own that forks its clients, so it sees their ends. For each
case it waits for the client's end, then for the moment the keeper says that the lease's memory is
given back; then its victim takes memory, waits longer than the card can still write, and looks.
A lane never decides what is right: it writes down what it saw, one record per case.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from holdfast import steps
from holdfast.errors import HoldfastError
from holdfast.steps import Board
from holdfast.torture import scripts
from holdfast.torture.actors import Child, spawn
from holdfast.torture.eyes import POLL, SETTLED, Eyes
from holdfast.torture.schedule import MOMENT, MOST_STRIKES, Case, Unit
from holdfast.torture.scripts import Body, Life
from holdfast.values import Policy

HUNG_AFTER = 30.0
"""Seconds after which a lease that is not released hangs."""
LIFE = 40.0
"""Seconds that a client's life may take where the function keeps its promises."""
FAULTY_LIFE = 2.0
"""And where it does not: then a client may wait for ever, and is killed."""
PATIENCE = 0.1
"""Seconds that a victim waits: what a client has in flight, and one transfer for good measure."""
FAULTY_PATIENCE = 0.15
CONTROL_PATIENCE = 0.3
"""Where memory is given back too early, on a slower link."""


@dataclass(slots=True)
class Record:
    """What was seen of one case. Times are CLOCK_MONOTONIC nanoseconds; 0: it did not happen."""

    case: int
    lane: int
    line: str
    pid: int = 0
    started_ns: int = 0
    ended_ns: int = 0
    released_ns: int = 0
    judged_ns: int = 0
    signal: int = 0
    """What the client died of; 0: it came to its end."""
    exit: int = 0
    error: str = ""
    """What the client, or the victim, said was wrong."""
    hits: list[dict[str, Any]] = field(default_factory=list)
    missed: int = 0
    """Strikes whose step was not reached."""
    late: bool = False
    """The client did not come to an end and was killed by the lane."""
    lease: int = 0
    hung: bool = False
    quarantined: bool = False
    foreign: int = 0
    residue: int = 0
    iova: int = 0
    fatal: bool = False
    """The stack was to end with this case."""

    @property
    def kills(self) -> int:
        """Processes that were killed."""
        return sum(len(hit["killed"]) for hit in self.hits)


def slots_of(lane: int) -> tuple[int, ...]:
    """The slots of the board that belong to a lane."""
    return tuple(range(lane * MOST_STRIKES, (lane + 1) * MOST_STRIKES))


class Lane:
    """Runs the cases of one lane. Only in a single-threaded process: it forks."""

    def __init__(
        self, unit: Unit, driver: str, number: int, board: Board, tell: Callable[[Record], None]
    ) -> None:
        self._unit = unit
        self._driver = driver
        self._number = number
        self._board = board
        self._tell = tell
        self._slots = slots_of(number)
        self._eyes = Eyes(unit.target)
        self._seen = 0
        """Every lease of a client yet to come has a higher number."""
        self._victim: Child | None = None

    def run(self, cases: Sequence[tuple[int, Case]]) -> None:
        """Every case, one after the other."""
        try:
            for number, case in cases:
                record = Record(number, self._number, str(self._unit.alone(case)))
                record.fatal = case.fatal
                try:
                    with self._turn(case):
                        self._one(case, record)
                        self._await_anchor(case)
                        for slot in self._slots:
                            self._board.clear(slot)
                except (HoldfastError, OSError, RuntimeError) as error:
                    # A finding like any other: the campaign goes on with the next case.
                    record.error = record.error or f"lane: {type(error).__name__}: {error}"
                    self._end_victim()
                self._tell(record)
        finally:
            self._end_victim()
            self._eyes.close()

    # -- one case ------------------------------------------------------------

    @contextmanager
    def _turn(self, case: Case) -> Iterator[None]:
        """Keep keepers and anchors from dying at once where that is not what the case is about.

        Cases of several lanes overlap. A keeper killed by one, an anchor by another, and nobody
        holds the function any more: what is meant to be survived would end the stack.
        """
        mode = fcntl.LOCK_EX if "anchor" in case.kill else fcntl.LOCK_SH
        if not {"keeper", "anchor"} & case.kill:
            yield
            return
        with self._board.path.open("rb") as lock:  # an open file of our own: flock(2) is per open
            fcntl.flock(lock, mode)
            try:
                yield
            finally:
                # By name: what was forked meanwhile has the open file, too.
                fcntl.flock(lock, fcntl.LOCK_UN)

    def _await_anchor(self, case: Case) -> None:
        """An anchor that was killed is back, with everything: the next alloc goes through it."""
        hits = [self._board.hit(slot) for slot in self._slots[: len(case.strikes)]]
        if case.fatal or not any("anchor" in hit.killed for hit in hits if hit):
            return
        killed = self._board.role("anchor")
        deadline = time.monotonic() + HUNG_AFTER
        while self._eyes.ps(self._seen).get("anchor") in (None, 0, killed):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no anchor came after {killed}")
            time.sleep(POLL)
        self._take()
        self._victim_gives_back()

    def _one(self, case: Case, record: Record) -> None:
        self._refresh(case)
        if case.fatal:
            self._take()  # nobody can give memory out afterwards
        client = self._start(case, record)
        try:
            self._await_end(client, case, record)
        finally:
            self._collect_hits(case, record)
        if not case.fatal:
            self._await_release(client.pid, record)
            self._collect_hits(case, record)
            self._take()
        if not case.before_dma:
            # The card's time: nothing signals a write that must not come.
            time.sleep(self._patience())
        self._judge(record, last=case.fatal)

    def _patience(self) -> float:
        if self._unit.setting.policy is Policy.RELEASE:
            return CONTROL_PATIENCE
        return FAULTY_PATIENCE if self._unit.setting.faulty else PATIENCE

    def _refresh(self, case: Case) -> None:
        """Say who is who, where those concerned do not say so themselves."""
        told = self._eyes.ps(self._seen)
        self._seen = max([self._seen, *(lease["lease"] for lease in told["leases"])])
        for role in ("anchor", "standby", "keeper", "function"):
            if role in case.kill and told.get(role):
                self._board.set_role(role, int(told[role]))

    def _start(self, case: Case, record: Record) -> Child:
        for slot, strike in zip(self._slots, case.strikes, strict=False):
            if strike.step != MOMENT:
                self._board.arm(
                    slot,
                    strike.step,
                    strike.kill,
                    count=strike.count,
                    asleep=strike.step.startswith("function."),
                )
        setting = self._unit.setting
        life = Life(
            self._unit.target,
            self._driver,
            setting.access,
            self._slots,
            2 * FAULTY_LIFE if setting.faulty else LIFE,
        )
        body = (scripts.fresh_client if case.fresh else scripts.client)(life)
        record.started_ns = time.monotonic_ns()
        client = spawn(self._without_eyes(body))
        record.pid = client.pid
        return client

    def _without_eyes(self, body: Body) -> Body:
        """In the child, the lane's own connections are let go of first."""

        def dropped(reading: int, writing: int) -> None:
            self._eyes.drop()
            if self._victim is not None:
                os.close(self._victim.writing)
                os.close(self._victim.reading)
            body(reading, writing)

        return dropped

    def _await_end(self, client: Child, case: Case, record: Record) -> None:
        life = FAULTY_LIFE if self._unit.setting.faulty else LIFE
        pidfd = os.pidfd_open(client.pid)
        try:
            for strike in case.strikes:
                if strike.step == MOMENT:
                    self._at_the_moment(pidfd, client, strike.count, record)
            ended = select.select([pidfd], [], [], life)[0]
            record.late = not ended
            if not ended:
                client.kill()
                select.select([pidfd], [], [])
            record.ended_ns = time.monotonic_ns()
            told = None if record.late else scripts.hear(client.reading, 1.0)
        finally:
            os.close(pidfd)
            client.kill()  # a no-op for one that has ended and is not reaped
            status = client.reap()
        record.error = str((told or {}).get("error", ""))
        if os.WIFSIGNALED(status):
            record.signal = os.WTERMSIG(status)
        else:
            record.exit = os.WEXITSTATUS(status)

    def _at_the_moment(self, pidfd: int, client: Child, after_us: int, record: Record) -> None:
        remaining = record.started_ns / 1e9 + after_us / 1e6 - time.monotonic()
        if not select.select([pidfd], [], [], max(0.0, remaining))[0]:
            at = client.kill()
            record.hits.append({"step": MOMENT, "at_ns": at, "by": 0, "killed": ["client"]})
        else:
            record.missed += 1

    def _collect_hits(self, case: Case, record: Record) -> None:
        record.hits = [hit for hit in record.hits if hit["step"] == MOMENT]
        record.missed = sum(strike.step == MOMENT for strike in case.strikes) - len(record.hits)
        for slot, strike in zip(self._slots, case.strikes, strict=False):
            if strike.step == MOMENT:
                continue
            hit = self._board.hit(slot)
            if hit is None or not hit.killed:
                record.missed += 1
                continue
            killed = [role for role in steps.ROLES if role in hit.killed]
            record.hits.append(
                {"step": strike.step, "at_ns": hit.at_ns, "by": hit.by, "killed": killed}
            )

    def _await_release(self, pid: int, record: Record) -> None:
        """Until the memory of this client's lease is given back, or kept for good."""
        deadline = time.monotonic() + HUNG_AFTER
        pause = POLL
        while True:
            lease = self._eyes.lease_of(pid, self._seen)
            if lease is None:
                return  # it died before it had one
            record.lease = lease["lease"]
            if lease["state"] in SETTLED:
                record.quarantined = lease["state"] == "quarantine"
                record.released_ns = time.monotonic_ns()
                return
            if time.monotonic() > deadline:
                record.hung = True
                return
            time.sleep(pause)
            pause = min(1.3 * pause, 10 * POLL)

    # -- the victim ------------------------------------------------------------

    def _take(self) -> None:
        """Have the victim take memory and fill it."""
        if self._victim is None:
            self._victim = spawn(self._without_eyes(scripts.victim(self._unit.target)))
            self._hear_victim("ready")
        self._victim.tell(b"g")
        self._hear_victim("filled")

    def _judge(self, record: Record, *, last: bool) -> None:
        assert self._victim is not None
        self._victim.tell(b"j")
        told = self._hear_victim("foreign")
        record.judged_ns = time.monotonic_ns()
        record.foreign, record.residue = int(told["foreign"]), int(told["residue"])
        record.iova = int(told["iova"])
        if last:
            # With its stack the victim's lease has ended, and pages without an owner read as zero.
            self._end_victim()
        else:
            record.foreign += int(told["zeroed"])

    def _victim_gives_back(self) -> None:
        assert self._victim is not None
        self._victim.tell(b"j")
        self._hear_victim("foreign")

    def _hear_victim(self, what: str) -> dict[str, Any]:
        assert self._victim is not None
        told = scripts.hear(self._victim.reading, LIFE)
        if told is None or what not in told:
            raise RuntimeError(f"victim: {(told or {}).get('error', 'it ended')}")
        return told

    def _end_victim(self) -> None:
        victim, self._victim = self._victim, None
        if victim is not None:
            victim.kill()
            victim.reap()


def died_as_meant(record: Record) -> bool:
    """Whether a client's death was somebody's intention."""
    meant = any("client" in hit["killed"] for hit in record.hits) or record.late
    return record.signal == signal.SIGKILL and meant
