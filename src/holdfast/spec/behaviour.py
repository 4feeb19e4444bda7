# SPDX-License-Identifier: Apache-2.0
"""Is what a keeper's log tells a behaviour of the specification?

Facts. A log (``serve --log``) tells each step of a lease and what had been observed by then. What
the card, the kernel and other processes did meanwhile is not in it. A keeper may be killed between
a step and its line.

Choice. All states that the specification allows after what was read so far are kept, as a set. To
read a line is to let anything unseen happen, to take the step that the line names wherever it can
be taken, and to keep the states in which just these facts are known. If none is left, the code did
something that the specification does not know: one of them is wrong.

Cost. One lease at a time, and of the others only what a card may do by itself. Sets of states are
numbered, and what a line makes of one is remembered, because most leases have the same story.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.keeper.state import Event, Fact, State
from holdfast.spec.explore import explore
from holdfast.spec.keeper import Holdfast
from holdfast.spec.layout import Mask
from holdfast.spec.lease_words import LEASE, NUMBER
from holdfast.spec.model import StrategyModel
from holdfast.spec.setting import MANY, Bounds, Iommu, Profile, Setting
from holdfast.spec.tables import POLICIES, Tables

BOUNDS = Bounds(
    frames=1, processes=1, descriptors=1, iovas=1, kills=1, forks=0, crashes=MANY, symmetry=False
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a lease's log."""

    state: str
    event: str
    facts: frozenset[str]
    """Names of :class:`~holdfast.keeper.state.Fact`."""
    keeper: int
    why: str = ""
    at_ns: int = 0


@dataclass(slots=True)
class Log:
    """A log, by lease, and under what it was written."""

    leases: dict[int, list[Line]] = field(default_factory=dict)
    policies: dict[int, str] = field(default_factory=dict)
    strict: bool | None = None
    """Whether the keepers had a strict translation; None: the log does not say."""


@dataclass(frozen=True, slots=True)
class Drift:
    """A line that no behaviour of the specification explains."""

    lease: int
    number: int
    """Of the line, among the lease's own."""
    line: Line
    why: str

    def __str__(self) -> str:
        said = f"{self.line.state} on {self.line.event!r}" if self.line.event else self.line.state
        return f"lease {self.lease}, its step {self.number} ({said}): {self.why}"


def parse(lines: Iterable[str]) -> Log:
    """Read a log's lines. Raises ValueError for what is not one."""
    log = Log()
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            _add(log, json.loads(text))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {number}: {type(error).__name__}: {error}") from error
    return log


def _add(log: Log, told: Any) -> None:
    if not isinstance(told, dict):
        raise TypeError(f"{type(told).__name__} instead of an object")
    if "what" in told:
        strict = told.get("strict", log.strict)
        if strict is not None and not isinstance(strict, bool):
            raise TypeError(f"strict is {strict!r}")
        log.strict = strict
        return
    lease, keeper = told["lease"], told["keeper"]
    if not (isinstance(lease, int) and isinstance(keeper, int) and isinstance(told["facts"], list)):
        raise TypeError("lease and keeper are numbers, facts is a list")
    policy = str(told["policy"])
    if policy not in POLICIES:
        raise ValueError(f"no policy is called {policy!r}")
    line = Line(
        str(State(told["state"])),
        str(Event(told["event"])) if told["event"] else "",
        frozenset(Fact[name].name for name in told["facts"]),
        keeper,
        str(told["why"]),
        int(told["at_ns"]),
    )
    log.leases.setdefault(lease, []).append(line)
    log.policies.setdefault(lease, policy)


class Behaviours:
    """Everything that the specification lets one lease's log say, under one policy.

    Made once (a second or two), used for any number of leases. Not thread-safe.
    """

    def __init__(self, policy: str, *, strict: bool, tables: Tables | None = None) -> None:
        """Explore. ``tables``: others than the keeper's own."""

        class Logged(Holdfast):
            key = "holdfast-logged"

        Logged.tables = tables or Tables.of(policy)
        setting = Setting(Profile.NEW, Iommu.STRICT if strict else Iommu.NONE, BOUNDS)
        model = StrategyModel(Logged, setting)
        model.final = frozenset()  # the log of a keeper that corrupts goes on, too
        found = explore(model, keep_edges=True)
        assert found.edges is not None
        self._count = found.states
        states, w = found.batch(), model.world
        self._lease = states[w.lease[0]]
        self._facts = sum(
            (states[w.fact[0, NUMBER[fact]]].astype(np.int32) << NUMBER[fact] for fact in Fact),
            start=np.zeros(self._count, np.int32),
        )
        labels = np.array([rule.label for rule in model.rules])[found.edges[2]]
        events = np.array([rule.event for rule in model.rules])[found.edges[2]]
        ends = events == "k_crash"
        changes = ends | (events == "k_restart")
        sources, targets, _ = found.edges
        self._unseen = self._some(sources, targets, (labels == "") & ~changes)
        self._any_step = self._some(sources, targets, ~changes)
        self._crash = self._some(sources, targets, ends)
        self._succeed = self._some(sources, targets, (labels == "") | changes)
        self._by_label = {
            str(label): self._some(sources, targets, labels == label)
            for label in np.unique(labels)
            if label
        }
        start = np.zeros(self._count, np.bool_)
        start[: found.levels[1] if len(found.levels) > 1 else 1] = True
        self._sets: list[Mask] = []
        self._numbers: dict[bytes, int] = {}
        self._known: dict[tuple[object, ...], int | str] = {}
        self._start = self._number(self._closure(start, self._unseen))

    def _number(self, states: Mask) -> int:
        """Sets that are equal have one number."""
        packed = np.packbits(states).tobytes()
        if packed not in self._numbers:
            self._numbers[packed] = len(self._sets)
            self._sets.append(states)
        return self._numbers[packed]

    @staticmethod
    def _some(
        sources: npt.NDArray[np.int32], targets: npt.NDArray[np.int32], which: Mask
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        return sources[which], targets[which]

    def _step(self, here: Mask, edges: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]) -> Mask:
        there = np.zeros(self._count, np.bool_)
        there[edges[1][here[edges[0]]]] = True
        return there

    def _closure(
        self, here: Mask, edges: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
    ) -> Mask:
        reached = here.copy()
        while True:
            more = self._step(reached, edges) & ~reached
            if not more.any():
                return reached
            reached |= more

    def check(self, lease: int, lines: Sequence[Line]) -> Drift | None:
        """The first line that the specification does not explain; None: it explains all."""
        here, last = self._start, ("", "")
        keeper = lines[0].keeper if lines else 0
        for number, line in enumerate(lines, 1):
            if line.keeper != keeper:
                keeper, last = line.keeper, ("", "")
                after = self._after(here, None)
                assert isinstance(after, int)
                here = after
            this = (line.state, line.event)
            if line.state == State.ALIVE or this == last:
                continue  # it explains itself, and takes no step
            last = this
            after = self._after(here, line)
            if isinstance(after, str):
                return Drift(lease, number, line, after)
            here = after
        return None

    def _after(self, here: int, line: Line | None) -> int | str:
        """The set after a line (None: after a succession), or why there is none."""
        key = (here, line and (line.state, line.event, line.facts))
        if key not in self._known:
            states = self._sets[here]
            found = self._succession(states) if line is None else self._read(states, line)
            self._known[key] = found if isinstance(found, str) else self._number(found)
        return self._known[key]

    def _succession(self, here: Mask) -> Mask:
        """The keeper was killed, perhaps between a step and its line; somebody succeeded it."""
        before = self._closure(here, self._any_step)
        return self._closure(self._step(before, self._crash), self._succeed)

    def _read(self, here: Mask, line: Line) -> Mask | str:
        """States after a line; or why there are none."""
        facts = sum(1 << NUMBER[Fact[name]] for name in line.facts)
        # Of a lease that is released nothing is remembered: there the facts are those before.
        released = line.state == State.RELEASED
        if released:
            here = here & (self._facts == facts)
            if not here.any():
                return f"released with {_names(line.facts)}, which cannot be all that was observed"
        label = f"{line.state}/{line.event}"
        there = self._step(here, self._by_label.get(label, self._nowhere))
        if not there.any():
            possible = [name for name, edges in self._by_label.items()
                        if self._step(here, edges).any()]  # fmt: skip
            return f"nothing leads there; possible: {', '.join(possible) or 'nothing'}"
        there = self._closure(there, self._unseen)
        if not released:
            there &= (self._facts == facts) & (self._lease == LEASE[State(line.state)])
            if not there.any():
                return f"with {_names(line.facts)} observed, which cannot be all"
            there = self._closure(there, self._unseen)
        return there

    @property
    def _nowhere(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        nothing = np.empty(0, np.int32)
        return nothing, nothing


def _names(facts: Iterable[str]) -> str:
    return ", ".join(sorted(facts)) or "nothing"


def check(log: Log, behaviours: Callable[[str, bool], Behaviours] | None = None) -> list[Drift]:
    """Every lease's first line that the specification does not explain.

    ``behaviours`` makes them for a policy, and for a strict translation or none; who checks many
    logs gives one that remembers.
    """
    make = behaviours or functools.cache(lambda policy, strict: Behaviours(policy, strict=strict))
    found = []
    for lease, lines in log.leases.items():
        drift = make(log.policies[lease], bool(log.strict)).check(lease, lines)
        if drift is not None:
            found.append(drift)
    return found
