# SPDX-License-Identifier: Apache-2.0
"""Where a story is played: memory, processes and the card, and the eyes that watch them.

Nothing here is believed because the story says so. What a process maps is asked of the kernel
(/proc/PID/maps), counts follow from what was done to mappings, bytes are counted by who has them.
After each step the story's own figures are compared with these.

What *software* decides the story dictates: which pages a driver holds, which addresses lead where,
when the card is reset. Physical consequences it does not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Final

from holdfast.kernel.mapping import PAGE
from holdfast.replay.card import PacedCard, payload
from holdfast.replay.clocked import ClockedCard
from holdfast.replay.failure import Disagreement
from holdfast.replay.memory import Memory
from holdfast.replay.outcome import Outcome, worst
from holdfast.replay.person import Person, pattern, start
from holdfast.replay.plan import Plan, State, indices, physical, value
from holdfast.spec.world import Dom, Proc
from holdfast.values import Iova

WILD_BYTE: Final = 0xA5


@dataclass(frozen=True, slots=True)
class Registered:
    """What a process had registered with the card: a frame as it was then."""

    frame: int
    generation: int
    rightful: frozenset[int]


@dataclass(frozen=True, slots=True)
class Posted:
    """A descriptor: for whom, what it is about, and in what it names it."""

    owner: int
    memory: Registered
    iova: int | None


class Stage:
    """Everything that is real. Forks in its constructor: call it from a single-threaded process."""

    def __init__(self, made: Plan, card: type[PacedCard], events: Sequence[str]) -> None:
        self.plan = made
        self.memory = Memory(made.frames)
        self.processes: dict[int, Person] = {}
        self.parents: dict[int, int] = {}
        self.ghosts: dict[int, Person] = {}
        self.others: dict[int, Person] = {}
        self.claims: set[tuple[int, int]] = set()
        """Process and frame: what its page table has, or had when it was killed."""
        self.registered: dict[int, Registered] = {}
        self.posted: dict[int, Posted] = {}
        self.windows: dict[int, int] = {}
        """IOVA of the story to the frame that it leads to now."""
        self.identity = False
        self.wild = False
        self._waiting: list[Person] = []
        self._everybody: list[Person] = []
        try:
            self.card = (
                ClockedCard(honest=made.honest, events=events)
                if card is ClockedCard
                else card(honest=made.honest)
            )
            for number in range(made.arrivals):
                others = [self.card.socket, *(each.sock for each in self._waiting)]
                person = start(f"process {number}", number, self.memory.fd, others)
                self._waiting.append(person)
                self._everybody.append(person)
            if "k_crash" in events:
                others = [self.card.socket, *(each.sock for each in self._waiting)]
                keeper = start("the keeper", made.arrivals, self.memory.fd, others)
                self._everybody.append(keeper)
                self.memory.keeper = keeper
            self.card.open(self.memory.fd, self.memory.scratch)
            self.card.master(on=made.master)
            if not made.translated:
                self._identity(on=True)
        except BaseException:
            self.close()
            raise

    # -- people ------------------------------------------------------------

    def enter(self, name: str) -> Person:
        """The next process of those that wait."""
        person = self._waiting.pop(0)
        person.name = name
        return person

    def fork(self, parent: Person, name: str) -> Person:
        """A child of one that is there."""
        child = parent.fork(name, parent.number, self.memory.fd)
        self._everybody.append(child)
        return child

    def sharing(self, p: int) -> list[Person]:
        """Who has the address space of a process: itself, if it lives, and its ghost.

        The ghost alone, once the process has executed another program.
        """
        found = [self.ghosts[p]] if p in self.ghosts else []
        person = self.processes.get(p)
        if person is None or not person.alive or (found and person.executed):
            return found
        return [person, *found]

    # -- page tables ------------------------------------------------------------

    def begin(self, p: int, f: int, person: Person) -> None:
        """A process gets a free frame, and fills it."""
        self.memory.give(f, pattern(person.number))
        person.ask("map", page=f, fill=True)
        self.claims.add((p, f))

    def clear(self, p: int, f: int, order: str = "unmap") -> None:
        """A page leaves the page table of a process that lives, and is counted down."""
        for person in self.sharing(p):
            person.ask(order, page=f)
        self.forget(p, f)

    def forget(self, p: int, f: int) -> None:
        """A page has left the page table of a process, and is counted down."""
        self.claims.discard((p, f))
        if not self.memory.frames[f].reserved:
            self.memory.drop(f)

    def mapped(self, p: int) -> list[int]:
        """Frames in the page table of a process."""
        return sorted(f for (each, f) in self.claims if each == p)

    # -- what software decides ------------------------------------------------------------

    def obey(self, after: State) -> None:
        """Do what drivers and keepers decided in this step: pins, marks and translations."""
        held, wanted = set(self.memory.holds), {(p, f) for p, f in indices(after, "hold")}
        for p, f in sorted(wanted - held):
            self.memory.hold(p, f)
        self._translate(after)
        for p, f in sorted(held - wanted):
            self.memory.unhold(p, f)
        for f, frame in enumerate(self.memory.frames):
            marked = bool(value(after, "reserved", f))
            if frame.reserved and not marked and not any(each == f for _, each in self.claims):
                self.memory.drop(f)  # nobody else will
            frame.reserved = marked
        for p in list(self.registered):
            if not value(after, "address", p, self.registered[p].frame):
                del self.registered[p]
        for p, f in indices(after, "address"):
            if p not in self.registered:
                frame = self.memory.frames[f]
                self.registered[p] = Registered(f, frame.generation, frozenset(frame.rightful))

    def pull_out(self) -> None:
        """The card is gone, and what it could reach."""
        self.card.pull_out()
        self.windows.clear()
        self.identity = False

    def _translate(self, after: State) -> None:
        if not self.plan.translated or self.card.gone:
            return
        user = value(after, "dom") == Dom.USER
        wanted = leads_to(after) if user else {}
        for i in [i for i in self.windows if wanted.get(i) != self.windows[i]]:
            self.card.unmap(Iova(self.plan.addresses[i]))
            del self.windows[i]
        self._identity(on=value(after, "dom") == Dom.DEFAULT)
        for i in sorted(set(wanted) - set(self.windows)):
            self.card.map(Iova(self.plan.addresses[i]), wanted[i] * PAGE)
            self.windows[i] = wanted[i]

    def _identity(self, *, on: bool) -> None:
        if on != self.identity:
            size = self.plan.frames * PAGE
            if on:
                self.card.map(Iova(physical(0)), 0, size)
            else:
                self.card.unmap(Iova(physical(0)), size)
            self.identity = on

    def post(self, p: int, d: int, after: State) -> int:
        """Note what a descriptor is about; the address that the card is told."""
        memory = self.registered[p]
        named = [i for each, i in indices(after, "named") if each == d]
        iova = named[0] if named else None
        self.posted[d] = Posted(p, memory, iova)
        frame = self.memory.frames[memory.frame]
        fresh = frame.generation == memory.generation and bool(frame.count)
        if fresh != bool(value(after, "fresh", d)):
            raise Disagreement(f"descriptor {d}: fresh is {fresh} here", operation="post")
        if fresh:
            frame.rightful.add(payload(d))
        return physical(memory.frame) if iova is None else self.plan.addresses[iova]

    def go_wild(self) -> None:
        """From now on the card writes another byte, to where the last descriptors led."""
        self.wild = True
        for posted in self.posted.values():
            frame = self.memory.frames[posted.memory.frame]
            if frame.generation == posted.memory.generation:
                frame.rightful.add(WILD_BYTE)

    # -- what is so ------------------------------------------------------------

    def compare(self, after: State) -> None:
        """The story's figures against what is there. Disagreement if they differ."""
        for f, frame in enumerate(self.memory.frames):
            same(f"the count of frame {f}", frame.count, value(after, "ref", f))
        same("page tables", self.claims, set(indices(after, "map")))
        for p, person in self.processes.items():
            lives = person.alive
            same(f"whether process {p} lives", lives, value(after, "proc", p) == Proc.ALIVE)
            if lives:
                self._maps(person, self.mapped(p) if person in self.sharing(p) else [])
        for p, ghost in self.ghosts.items():
            self._maps(ghost, self.mapped(p))
        for f, person in self.others.items():
            self._maps(person, [f])
        held = [f for _, f in self.memory.holds]
        keeper = self.memory.keeper
        if keeper is not None and keeper.alive:
            self._maps(keeper, held)
        # What the card can reach the client of vfio-user has mapped, too: for cards that ask.
        here = [] if keeper is not None else held
        here += list(self.windows.values())
        here += list(range(self.plan.frames)) if self.identity else []
        same("pages that are mapped here", self.memory.mapped_here(), dict(Counter(here)))

    def _maps(self, person: Person, frames: list[int]) -> None:
        same(f"pages that {person.name} maps", person.pages(), dict.fromkeys(frames, 1))

    def look(self, outcome: Outcome) -> None:
        """Ask everybody how many bytes of their memory are not theirs."""
        for f, frame in enumerate(self.memory.frames):
            worst(outcome.stray, f"frame {f}", self.memory.changed_while_free(f))
            for p in [each for each, claimed in self.claims if claimed == f]:
                if not self.sharing(p):  # it was killed, and the story's kernel has not got to it
                    dying = f"process {p}, dying"
                    worst(outcome.corrupted, dying, self.memory.foreign_in(f))
                for person in self.sharing(p):
                    worst(outcome.corrupted, person.name, _foreign(person, f, frame.rightful))
            if f in self.others:
                other = self.others[f]
                worst(outcome.corrupted, other.name, _foreign(other, f, frame.rightful))
        for p, f in self.memory.holds:
            who = f"the page that is held for process {p}"
            worst(outcome.corrupted, who, self.memory.foreign_in_hold(p, f))

    def readable(self, d: int) -> set[int]:
        """Bytes that the card may see for a descriptor: those of the memory that was registered."""
        memory = self.posted[d].memory
        frame = self.memory.frames[memory.frame]
        same_still = frame.generation == memory.generation and frame.count
        return set(frame.rightful if same_still else memory.rightful)

    def received(self, d: int) -> int | None:
        """How much of a descriptor's data its owner sees; None if nobody is there to see it."""
        person = self.processes.get(self.posted[d].owner)
        if person is None or not person.alive:
            return None
        return int(person.ask("count", byte=payload(d)))

    # -- the end ------------------------------------------------------------

    def close(self) -> None:
        """End every process and give everything back. Idempotent."""
        with ExitStack() as stack:
            stack.callback(self.memory.close)
            if hasattr(self, "card"):
                stack.callback(self.card.close)
            for person in self._everybody:
                stack.callback(person.close)
                person.kill()
            while self._everybody:
                with suppress(ChildProcessError):
                    os.waitpid(self._everybody[-1].pid, 0)
                self._everybody.pop()


def leads_to(state: State) -> dict[int, int]:
    """Address to frame, by whichever cache knows it first."""
    found: dict[int, int] = {}
    for table in ("pte", "tlb", "cached"):
        known = dict(indices_of_pairs(state, table))
        found |= known
    return found


def indices_of_pairs(state: State, name: str) -> list[tuple[int, int]]:
    """Pairs of an array of the story that are not 0."""
    return [(first, second) for first, second in indices(state, name)]


def same(what: str, here: object, told: object) -> None:
    """Disagreement unless both are equal."""
    if here != told:
        raise Disagreement(f"{what}: {here} here, {told} in the story", operation="compare")


def _foreign(person: Person, f: int, rightful: set[int]) -> int:
    return int(person.ask("look", page=f, rightful=sorted(rightful)))
