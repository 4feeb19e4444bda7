# SPDX-License-Identifier: Apache-2.0
"""What a torture campaign does, as values: cases, the stacks they run on, and lines that name them.

A *strike* is a named step and who dies when it is reached. A *case* is one client's life with the
strikes armed for it. A *unit* is one stack (standby, keeper, anchor, function) with its setting and
the cases that run on it, in lanes. All of it is fixed before anything runs. A unit is written as
one line of words, and read back from it::

    drain/arena/shared/none/3 client.posted#2=client keeper.alloc.mapped=client+keeper!fresh

The first word is the setting (policy, memory, access, faults, lanes), each other word a case:
strikes joined by ``&``, each ``step[#count]=role+role``, and ``!fresh`` for a client that is a new
interpreter. The step ``moment`` is no place in the code: its count is microseconds after the start
of the client. A case alone is such a line with one case and one lane.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from holdfast.errors import UsageError
from holdfast.steps import ROLES, STEPS
from holdfast.values import Policy

MOMENT: Final = "moment"
"""The step that is a time: its count is in microseconds after the client's start."""
MEMORIES: Final = ("arena", "files")
"""One file whose frames are recycled, as without an IOMMU; or a file and a map for each slab."""
ACCESSES: Final = ("shared", "exclusive", "mediated")
NO_FAULTS: Final = "none"
MOST_LANES: Final = 8
MOST_STRIKES: Final = 2
"""Of a case: each lane has that many slots of the board."""


def _wrong(text: str, why: str) -> UsageError:
    return UsageError(
        why,
        operation="read schedule",
        target=text,
        hint="give the line as it was printed, in quotes",
    )


@dataclass(frozen=True, slots=True)
class Strike:
    """At the ``count``-th time that ``step`` is reached, these roles are killed."""

    step: str
    kill: frozenset[str]
    count: int = 1

    def __post_init__(self) -> None:
        if self.step not in STEPS and self.step != MOMENT:
            raise _wrong(self.step, "no such step")
        if not self.kill or not self.kill <= frozenset(ROLES):
            raise _wrong("+".join(self.kill), f"not some of {', '.join(ROLES)}")
        if self.count < 1:
            raise _wrong(str(self.count), "a count is at least 1")

    def __str__(self) -> str:
        count = f"#{self.count}" if self.count > 1 or self.step == MOMENT else ""
        return f"{self.step}{count}={'+'.join(role for role in ROLES if role in self.kill)}"

    @classmethod
    def parse(cls, text: str) -> Self:
        where, equals, who = text.partition("=")
        step, hash_, count = where.partition("#")
        if not equals or (hash_ and not (count.isascii() and count.isdigit())):
            raise _wrong(text, "not step#count=role+role")
        return cls(step, frozenset(who.split("+")), int(count) if hash_ else 1)


@dataclass(frozen=True, slots=True)
class Case:
    """One client's life, and who is killed in it."""

    strikes: tuple[Strike, ...]
    fresh: bool = False
    """The client is a new interpreter, not a fork of a warm one."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.strikes) <= MOST_STRIKES:
            raise _wrong(str(len(self.strikes)), f"a case has 1 to {MOST_STRIKES} strikes")

    @property
    def kill(self) -> frozenset[str]:
        """Everybody who is to die."""
        return frozenset().union(*(strike.kill for strike in self.strikes))

    @property
    def fatal(self) -> bool:
        """Whether nobody is left who could go on with the function: the stack ends with this case.

        The emulated function *is* the card; keeper and anchor are the only ones that hold its
        descriptors.
        """
        return "function" in self.kill or any(
            {"keeper", "anchor"} <= strike.kill for strike in self.strikes
        )

    @property
    def before_dma(self) -> bool:
        """Whether the client dies before it can have posted anything."""
        return any("client" in strike.kill and strike.step in _EARLY for strike in self.strikes)

    def __str__(self) -> str:
        return "&".join(map(str, self.strikes)) + ("!fresh" if self.fresh else "")

    @classmethod
    def parse(cls, text: str) -> Self:
        strikes, bang, how = text.partition("!")
        if bang and how != "fresh":
            raise _wrong(text, "only !fresh may follow the strikes")
        return cls(tuple(Strike.parse(piece) for piece in strikes.split("&")), bool(bang))


_EARLY: Final = frozenset(
    name
    for name in STEPS
    if name.startswith("client.")
    and name.split(".")[1]
    in {"connecting", "connected", "greeted", "opened", "mapped", "alloc", "pin", "pinned"}
)


@dataclass(frozen=True, slots=True)
class Setting:
    """How a stack is started, and how many clients are at work on it at once."""

    policy: Policy = Policy.DRAIN
    memory: str = "arena"
    access: str = "shared"
    faults: str = NO_FAULTS
    lanes: int = 1

    def __post_init__(self) -> None:
        if self.memory not in MEMORIES:
            raise _wrong(self.memory, f"not one of {', '.join(MEMORIES)}")
        if self.access not in ACCESSES:
            raise _wrong(self.access, f"not one of {', '.join(ACCESSES)}")
        if not 1 <= self.lanes <= MOST_LANES:
            raise _wrong(str(self.lanes), f"1 to {MOST_LANES} lanes")
        if not self.faults or any(sign in self.faults for sign in "/ \t\n"):
            raise _wrong(self.faults, "not a fault plan")

    @property
    def faulty(self) -> bool:
        """Whether the function breaks its promises."""
        return self.faults != NO_FAULTS

    def __str__(self) -> str:
        return f"{self.policy}/{self.memory}/{self.access}/{self.faults}/{self.lanes}"

    @classmethod
    def parse(cls, text: str) -> Self:
        parts = text.split("/")
        if len(parts) != 5 or not (parts[4].isascii() and parts[4].isdigit()):
            raise _wrong(text, "not policy/memory/access/faults/lanes")
        policy, memory, access, faults, lanes = parts
        if policy not in [str(known) for known in Policy]:
            raise _wrong(text, f"{policy!r} is no policy")
        return cls(Policy(policy), memory, access, faults, int(lanes))


@dataclass(frozen=True, slots=True)
class Unit:
    """One stack and the cases that run on it. Case ``i`` runs in lane ``i % lanes``.

    Picklable, and as a line the same in any process.
    """

    target: str
    setting: Setting
    cases: tuple[Case, ...]
    number: int = 0

    def __str__(self) -> str:
        return " ".join([str(self.setting), *map(str, self.cases)])

    @classmethod
    def parse(cls, target: str, line: str, number: int = 0) -> Self:
        """Read a line. Raises UsageError."""
        words = line.split()
        if len(words) < 2:
            raise _wrong(line, "a setting and at least one case")
        cases = tuple(Case.parse(word) for word in words[1:])
        return cls(target, Setting.parse(words[0]), cases, number)

    def of(self, cases: Iterable[Case]) -> Unit:
        """The same stack with other cases."""
        return Unit(self.target, self.setting, tuple(cases), self.number)

    def alone(self, case: Case) -> Unit:
        """One case by itself."""
        setting = Setting(
            self.setting.policy, self.setting.memory, self.setting.access, self.setting.faults, 1
        )
        return Unit(self.target, setting, (case,), self.number)
