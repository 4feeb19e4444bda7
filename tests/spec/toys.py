# SPDX-License-Identifier: Apache-2.0
"""Models small enough to be explored twice: by the search, and by plain Python beside it.

A toy is written once, as functions on one state that is a dictionary. The search sees it as rules
on batches; :func:`search` goes through the same moves state by state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from holdfast.spec.layout import Batch, Layout, Mask
from holdfast.spec.rules import Rule

State = dict[str, int]
"""Every variable by its name, as ``str`` of its cell says it."""
Key = tuple[int, ...]
Failed = frozenset[str]

WELL: Failed = frozenset()


@dataclass(frozen=True)
class Move:
    """A rule on one state: ``then`` changes it, and says which invariants that breaks."""

    event: str
    when: Callable[[State], bool]
    then: Callable[[State], Failed | None]
    fair: bool = False
    args: Mapping[str, int] = field(default_factory=dict)
    actor: str = "somebody"


def unpacked(layout: Layout, batch: Batch) -> list[State]:
    """The states of a batch, one by one."""
    columns = {str(cell): batch[cell].tolist() for cell in layout.cells.values()}
    return [{name: column[row] for name, column in columns.items()} for row in range(len(batch))]


def packed(layout: Layout, states: Sequence[Mapping[str, int]]) -> Batch:
    """The same states as a batch; what a state does not name is 0."""
    words = [[0] * len(states) for _ in range(layout.words)]
    for cell in layout.cells.values():
        for row, state in enumerate(states):
            words[cell.word][row] |= state.get(str(cell), 0) << cell.shift
    return Batch([np.array(word, np.uint64) for word in words])


def renamings(
    layout: Layout, symmetric: str, same: Mapping[str, str] | None = None
) -> Iterator[dict[str, str]]:
    """Every renaming, as which variable becomes which; the identity is the first."""
    members = {axis: axis for axis in symmetric}
    members |= {other: axis for other, axis in (same or {}).items() if axis in symmetric}
    orders = [itertools.permutations(range(layout.sizes[axis])) for axis in symmetric]
    for chosen in itertools.product(*orders):
        order = dict(zip(symmetric, chosen, strict=True))
        renaming = {}
        for (name, index), cell in layout.cells.items():
            axes = layout.fields[name].axes
            there = tuple(
                order[members[axis]][at] if axis in members else at
                for axis, at in zip(axes, index, strict=True)
            )
            renaming[str(cell)] = str(layout.cells[name, there])
        yield renaming


def renamed(state: Mapping[str, int], renaming: Mapping[str, str]) -> State:
    return {renaming[name]: value for name, value in state.items()}


class Toy:
    """A model for :func:`holdfast.spec.explore.explore`, made of moves."""

    def __init__(
        self,
        layout: Layout,
        moves: Sequence[Move],
        start: Sequence[State],
        *,
        wrong: Mapping[str, Callable[[State], bool]] | None = None,
        final: frozenset[str] = frozenset(),
        symmetric: str = "",
        same: Mapping[str, str] | None = None,
    ) -> None:
        self.layout = layout
        self.moves = list(moves)
        self.start = list(start)
        self.wrong = dict(wrong or {})
        self.final = final
        self.rules: list[Rule] = [self._rule(move) for move in moves]
        self._renamings = list(renamings(layout, symmetric, same))

    def initial(self) -> Batch:
        return packed(self.layout, self.start)

    def judge(self, states: Batch) -> dict[str, Mask]:
        every = unpacked(self.layout, states)
        return {
            name: np.array([broken(state) for state in every], np.bool_)
            for name, broken in self.wrong.items()
        }

    def _rule(self, move: Move) -> Rule:
        def guard(batch: Batch) -> Mask:
            states = unpacked(self.layout, batch)
            return np.array([move.when(state) for state in states], np.bool_)

        def effect(batch: Batch) -> None:
            states = unpacked(self.layout, batch)
            for row, state in enumerate(states):
                for name in move.then(state) or WELL:
                    batch.fail(name, np.arange(len(states)) == row)
            batch.words = packed(self.layout, states).words
            batch.forget_columns()

        return Rule(move.event, move.actor, move.event, guard, effect, move.args, move.fair)

    # -- the same in plain Python ------------------------------------------------------------

    def steps(self, state: State) -> Iterator[tuple[int, State, Failed]]:
        """What can come of a state: by which move, what, and what that breaks."""
        for number, move in enumerate(self.moves):
            if move.when(state):
                after = dict(state)
                broken = move.then(after) or WELL
                yield number, after, broken

    def judged(self, state: State) -> Failed:
        return frozenset(name for name, broken in self.wrong.items() if broken(state))

    def orbit(self, state: State) -> Key:
        """The same for all states that are renamings of one another, and only for them."""
        names = sorted(state)
        return min(
            tuple(each[name] for name in names)
            for each in (renamed(state, renaming) for renaming in self._renamings)
        )


@dataclass
class Plain:
    """What plain Python found."""

    levels: list[set[Key]]
    edges: list[tuple[Key, Key, int]]
    """Every step that was followed; of each orbit, those of the state that was met first."""
    breaks: dict[str, int]
    """Invariant to the length of the shortest way to break it."""

    @property
    def states(self) -> int:
        return sum(map(len, self.levels))


def search(toy: Toy) -> Plain:
    """Breadth first, one state at a time."""
    level = list({toy.orbit(state): state for state in toy.start}.values())
    seen = {toy.orbit(state) for state in level}
    found = Plain([set(seen)], [], {})
    for state in level:
        for name in toy.judged(state):
            found.breaks.setdefault(name, 0)
    while level:
        depth, following = len(found.levels), []
        for state in level:
            for number, after, broken in toy.steps(state):
                for name in broken:
                    found.breaks.setdefault(name, depth)
                if broken & toy.final:
                    continue
                key = toy.orbit(after)
                found.edges.append((toy.orbit(state), key, number))
                if key in seen:
                    continue
                seen.add(key)
                following.append(after)
                for name in toy.judged(after):
                    found.breaks.setdefault(name, depth)
        level = following
        if level:
            found.levels.append({toy.orbit(state) for state in level})
    return found
