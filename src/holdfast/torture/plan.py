# SPDX-License-Identifier: Apache-2.0
"""From a seed to units: every choice of a campaign, made before anything runs.

Facts. A step that is rare in a random schedule is a step that is not tested, and a stack costs a
second to start, a fresh interpreter a third of one, a fork milliseconds.

Choice. Steps are dealt like cards: all that the target can reach, shuffled, and again when they are
used up, so that each gets its share, with a new choice each time of who dies there. What ends its
stack (the function's own death; keeper and anchor together) is put at the end of one. Units are of
one size, so that they can be spread over workers, and alternate between the policies, between an
arena and files, and, every few, to exclusive access or a function that breaks promises.

Cost. Two campaigns of different length have different schedules, even from the same seed.
"""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.emu.faults import FaultPlan
from holdfast.errors import UsageError
from holdfast.steps import ROLES, STEPS
from holdfast.torture.schedule import MOMENT, NO_FAULTS, Case, Setting, Strike, Unit
from holdfast.values import Policy, Target

UNIT: Final = 250
"""Cases of a unit: a second of starting for half a minute of killing."""
SMALLEST: Final = 15
SETTINGS: Final = 8
"""A short campaign has smaller units, so that it sees as many settings as a long one."""
FRESH: Final = 0.015
"""Share of the clients that are new interpreters; at least a hundredth is promised."""
MOMENTS: Final = 0.1
"""Share of the clients that die at a random moment instead of a named step."""
LATEST_US: Final = 60_000
"""Latest of these moments, in microseconds after the client's start."""
LANES: Final = {"shared": 3, "exclusive": 1, "mediated": 4}
"""Clients at a time. An XDMA core has four channels; one is the survivor's."""
MIXED: Final = ("hang@40", "early_completion", "refuse_reset@40", "wild", "reset_keeps_dma")
"""Fault plans that a mixed campaign takes in turn."""
FAULTY_CASES: Final = 20
"""Cases of a unit with faults: deadlines run there, and take their time."""

_IN_PLACE = frozenset({"client.pin.reserved", "client.pin.placed"})
_OF_SUCCESSION = frozenset({"keeper.adopting", "keeper.adopted"})
_OF_DEATH = frozenset(name for name in STEPS if name.startswith("keeper.death."))
_OF_RELAYS = frozenset(name for name in STEPS if name.startswith("keeper.relay_"))
_OF_MEDIATION = frozenset(name for name in STEPS if name.startswith("keeper.mediation."))
"""No unit of a plan is mediated yet: a client's life there is another one."""
_OF_MAPS = frozenset(name for name in STEPS if name.startswith("keeper.alloc."))
"""An arena is mapped once, as a whole: no slab of it is."""
_OF_ANCHOR = frozenset(name for name in STEPS if name.startswith("keeper.anchor."))
_MOST = {
    "client.alloc": 2, "client.alloc.granted": 2, "client.alloc.mapped": 2, "client.alloc.cut": 2,
    "client.post": 6, "client.posted": 6, "client.doorbell": 6, "client.wait": 3,
    "client.complete": 5, "keeper.answered": 6, "keeper.alloc.reserved": 2,
    "keeper.alloc.mapped": 2, "keeper.alloc.confirmed": 2, "keeper.unmapping": 2,
    "keeper.unmapped": 2, "keeper.anchor.sent": 3, "keeper.anchor.acknowledged": 3,
    "function.fetch": 3, "function.fetched": 3, "function.move": 16, "function.moved": 16,
    "function.written": 3, "function.complete": 12,
}  # fmt: skip
"""How often an XDMA client's life passes a step for sure, where that is more than once."""

_WHO: Final[dict[str, tuple[tuple[frozenset[str], int], ...]]] = {
    role: tuple((frozenset(who.split("+")), weight) for who, weight in rows)
    for role, rows in {
        "client": (
            ("client", 66), ("keeper", 10), ("anchor", 6), ("client+keeper", 8),
            ("client+anchor", 6), ("standby", 1), ("client+standby", 1), ("keeper+standby", 1),
            ("anchor+standby", 1),
        ),
        "keeper": (
            ("keeper", 45), ("client", 20), ("client+keeper", 15), ("anchor", 10),
            ("client+anchor", 8), ("standby", 1), ("keeper+standby", 1),
        ),
        "function": (
            ("client", 74), ("keeper", 8), ("client+keeper", 8), ("anchor", 4),
            ("client+anchor", 6),
        ),
    }.items()
}  # fmt: skip
"""Who dies at a step of a role, and how often compared with the others."""
_FATAL: Final = tuple(
    frozenset(who.split("+"))
    for who in ("function", "client+function", "keeper+function", "keeper+anchor")
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a campaign is asked to do."""

    target: str
    driver: str
    kills: int
    seed: int
    policies: tuple[Policy, ...] = (Policy.DRAIN, Policy.REVOKE)
    steps: str = "*"
    faults: str = "mixed"
    actors: frozenset[str] = frozenset(ROLES)
    pairs: bool = True
    unit: int = UNIT
    lanes: int | None = None


def can_die(target: Target) -> frozenset[str]:
    """The roles that can be killed on a target: a card and a server of somebody else's cannot."""
    if target.scheme == "emu":
        return frozenset(ROLES)
    if target.scheme == "pci":
        return frozenset({"client", "keeper"})
    return frozenset(ROLES) - {"function"}


def steps_of(wanted: Wanted) -> list[str]:
    """The steps that this campaign reaches, in the catalogue's order; :data:`MOMENT` at last.

    Raises UsageError if none are left.
    """
    target = Target.parse(wanted.target)
    left = []
    for name in STEPS:
        role = name.partition(".")[0]
        if target.scheme != "pci" and name in _IN_PLACE:
            continue  # relayed pins are the keeper's own doing
        if name in _OF_MEDIATION:
            continue
        if target.scheme == "pci" and name in _OF_RELAYS:
            continue  # a card reaches pinned memory by itself
        if role == "function" and target.scheme != "emu":
            continue  # that process does not look at the board
        if name in _OF_SUCCESSION and "keeper" not in wanted.actors:
            continue
        if name in _OF_ANCHOR and target.scheme == "pci" and "anchor" not in wanted.actors:
            continue
        if not _who(role, wanted):
            continue
        left.append(name)
    if "client" in wanted.actors:
        left.append(MOMENT)
    chosen = [name for name in left if fnmatch.fnmatchcase(name, wanted.steps)]
    if not chosen:
        raise UsageError(
            f"no step is called {wanted.steps!r} that {wanted.target} reaches",
            operation="plan torture",
            target=wanted.target,
            hint=f"these are: {', '.join(left)}",
        )
    return chosen


def _who(role: str, wanted: Wanted) -> list[tuple[frozenset[str], int]]:
    return [
        (who, weight)
        for who, weight in _WHO[role]
        if who <= wanted.actors and (wanted.pairs or len(who) == 1)
    ]


def plan(wanted: Wanted) -> list[Unit]:
    """Every unit of a campaign. The same for the same ``wanted``, on any machine."""
    chance = random.Random(f"torture {wanted.seed}")  # noqa: S311 - reproducible, not secret
    units: list[Unit] = []
    left = wanted.kills
    chosen = steps_of(wanted)
    deck = _Deck(chosen, chance)
    size = min(wanted.unit, max(SMALLEST, wanted.kills // SETTINGS))
    for number, setting in enumerate(_settings(wanted, chosen), 1):
        count = min(left, FAULTY_CASES, size) if setting.faulty else min(left, size)
        unfit = _OF_MAPS if setting.memory == "arena" else frozenset()
        cases = [_case(deck.deal(unfit), wanted, setting, chance) for _ in range(count)]
        fatal = _fatal(wanted, setting, chance)
        if fatal is not None and count > 1:
            cases[-1] = fatal
        units.append(Unit(wanted.target, setting, tuple(cases), number))
        left -= count
        if not left:
            break
    return units


def control(wanted: Wanted, kills: int) -> Unit:
    """The negative control: clients that die in mid-DMA, memory given back without proof."""
    strikes = [Strike("client.doorbell", frozenset({"client"}), 3) for _ in range(kills)]
    access = "shared" if wanted.driver == "xdma" else "exclusive"
    # One at a time: else the next client has the frames before the victim, and looks for less.
    setting = Setting(Policy.RELEASE, "arena", access, NO_FAULTS, 1)
    if wanted.driver != "xdma":
        strikes = [Strike("client.doorbell", frozenset({"client"}))] * kills
    return Unit(wanted.target, setting, tuple(Case((strike,)) for strike in strikes))


def _settings(wanted: Wanted, chosen: Sequence[str]) -> Iterator[Setting]:
    """Stacks, one after the other, without end."""
    emulated = Target.parse(wanted.target).scheme == "emu"
    arenas = emulated and not _OF_MAPS.issuperset(chosen)
    shareable = wanted.driver == "xdma"
    mixed = iter(_round(MIXED))
    number = 0
    while True:
        policy = wanted.policies[number % len(wanted.policies)]
        arena = arenas and number // len(wanted.policies) % 2 == 0
        access = "shared" if shareable and number % 7 != 5 else "exclusive"
        faults = NO_FAULTS
        if wanted.faults not in ("mixed", NO_FAULTS):
            faults = str(FaultPlan.parse(wanted.faults))
        elif wanted.faults == "mixed" and emulated and shareable and number % 5 == 3:
            faults, access = next(mixed), "shared"
        lanes = min(wanted.lanes or LANES[access], LANES[access])
        yield Setting(policy, "arena" if arena else "files", access, faults, lanes)
        number += 1


def _round(items: Sequence[str]) -> Iterator[str]:
    while True:
        yield from items


class _Deck:
    """Cards, shuffled anew whenever all were dealt."""

    def __init__(self, cards: Iterable[str], chance: random.Random) -> None:
        self._cards = list(cards)
        self._chance = chance
        self._left: list[str] = []

    def deal(self, unfit: frozenset[str] = frozenset()) -> str:
        """The next card that fits; the others stay for later. Raises UsageError if none does."""
        for _ in range(2):
            for at in reversed(range(len(self._left))):
                if self._left[at] not in unfit:
                    return self._left.pop(at)
            kept, fresh = self._left, list(self._cards)
            self._chance.shuffle(fresh)
            self._left = [*fresh, *kept[: len(self._cards)]]
        raise UsageError(
            f"none of {', '.join(self._cards)} is reached there", operation="plan torture"
        )


def _case(step: str, wanted: Wanted, setting: Setting, chance: random.Random) -> Case:
    fresh = chance.random() < FRESH
    if "client" in wanted.actors and wanted.steps == "*" and chance.random() < MOMENTS:
        step = MOMENT
    if step == MOMENT:
        at = chance.randint(1, LATEST_US)
        return Case((Strike(MOMENT, frozenset({"client"}), at),), fresh)
    rows = _who(step.partition(".")[0], wanted)
    if setting.faulty and "client" in wanted.actors:
        # Where transfers may never end, whoever is not killed would wait for ever.
        rows = [row for row in rows if "client" in row[0]] or [(frozenset({"client"}), 1)]
        if step.startswith("client.") and list(STEPS).index(step) > _LAST_SURE:
            step = "client.doorbell"
    [who] = chance.choices([who for who, _ in rows], [weight for _, weight in rows])
    most = _MOST.get(step, 1) if wanted.driver == "xdma" else 1
    strike = Strike(step, who, chance.randint(1, most))
    if step in _OF_DEATH:
        # The client's death comes first; who dies at this step of it is somebody else.
        posts = chance.randint(1, _MOST["client.doorbell"] if wanted.driver == "xdma" else 1)
        first = Strike("client.doorbell", frozenset({"client"}), posts)
        others = who - {"client"} or frozenset({"keeper"}) & wanted.actors
        return Case((first, Strike(step, others)) if others else (first,), fresh)
    if step in _OF_SUCCESSION:
        first = Strike("client.doorbell", frozenset({"keeper"}))
        return Case((first, strike), fresh)
    return Case((strike,), fresh)


_LAST_SURE = list(STEPS).index("client.wait")


def _fatal(wanted: Wanted, setting: Setting, chance: random.Random) -> Case | None:
    """A case that ends its stack, if anybody may be killed who ends one."""
    possible = [who for who in _FATAL if who <= wanted.actors and (wanted.pairs or len(who) == 1)]
    if not possible or setting.faulty or wanted.steps != "*":
        return None
    who = chance.choice(possible)
    step = chance.choice(["client.doorbell", "client.posted", "client.alloc.mapped"])
    if "function" in who and wanted.driver == "xdma" and chance.random() < 0.7:
        step = chance.choice([name for name in STEPS if name.startswith("function.")])
    return Case((Strike(step, who),))
