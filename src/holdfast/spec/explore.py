# SPDX-License-Identifier: Apache-2.0
"""Every order of events, breadth first: so that the first way to break something is the shortest.

A level is the states that are first reached in so many steps. Of each level all rules are tried on
all states at once, in pieces that fit the processor's caches. Nothing depends on time or chance:
the same model gives the same numbers, levels and stories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from holdfast.spec.layout import U64, Batch, Layout, Mask
from holdfast.spec.rules import Rule
from holdfast.spec.store import Ids, Store

PIECE: Final = 1 << 15
"""States of one level that are looked at together."""


class Model(Protocol):
    """What can be explored."""

    @property
    def layout(self) -> Layout: ...
    @property
    def rules(self) -> Sequence[Rule]: ...
    @property
    def final(self) -> frozenset[str]:
        """Invariants of steps: where one breaks them, the story is not followed further."""
        ...

    def initial(self) -> Batch: ...
    def judge(self, states: Batch) -> dict[str, Mask]:
        """Invariants of states, and in which of these each is broken."""
        ...


@dataclass(frozen=True, slots=True)
class Breach:
    """The first state that breaks an invariant: by a step of ``parent``, ``steps`` from the start.

    ``parent`` is -1 if an initial state does.
    """

    invariant: str
    steps: int
    parent: int
    rule: int
    words: tuple[int, ...]


@dataclass(slots=True)
class Explored:
    """Everything that can be reached (or could be, up to a limit)."""

    model: Model
    store: Store
    parents: Ids
    causes: Ids
    """The rule by which each state was first reached."""
    levels: list[int]
    """Number of the first state of each level."""
    breaches: dict[str, Breach] = field(default_factory=dict)
    complete: bool = True
    """False if the limit of states was met, or somebody asked to stop."""
    edges: tuple[Ids, Ids, Ids] | None = None
    """Source, target and rule of every step, if asked for."""
    steps: int = 0
    """Steps taken, those that led to states seen before among them."""

    @property
    def states(self) -> int:
        return len(self.store)

    def batch(self, first: int = 0, last: int | None = None) -> Batch:
        return Batch(self.store.words(first, last))


class _Growing:
    """An array that is appended to."""

    def __init__(self) -> None:
        self._data = np.empty(1 << 12, np.int32)
        self._used = 0

    def extend(self, values: Ids) -> None:
        end = self._used + len(values)
        if end > len(self._data):
            self._data = np.concatenate([self._data, np.empty(end, np.int32)])
        self._data[self._used : end] = values
        self._used = end

    def array(self) -> Ids:
        return self._data[: self._used]


def explore(
    model: Model,
    *,
    limit: int | None = None,
    keep_edges: bool = False,
    until: frozenset[str] = frozenset(),
    progress: Callable[[int, int], bool] = lambda _states, _level: True,
) -> Explored:
    """Reach everything, or ``limit`` states, or a breach of one of ``until``.

    ``progress`` is told the states and the level so far, several times a second on large models,
    and ends the search by answering False.
    """
    layout = model.layout
    store = Store(layout.words)
    parents, causes = _Growing(), _Growing()
    edges = (_Growing(), _Growing(), _Growing())
    result = Explored(model, store, parents.array(), np.empty(0, np.int32), [0])

    first = Batch(layout.canonical(model.initial().words))
    _, new = store.add(first.words)
    parents.extend(np.full(len(new), -1, np.int32))
    causes.extend(np.full(len(new), -1, np.int32))
    _note_breaches(result, model.judge(first), -1, None, None, first)

    begin, level = 0, 0
    going = True
    while begin < len(store) and going:
        end, level = len(store), level + 1
        for start in range(begin, end, PIECE):
            begin = min(start + PIECE, end)
            _expand(model, result, start, begin, level, (parents, causes, edges), keep_edges)
            going = progress(len(store), level) and (limit is None or len(store) < limit)
            if not going:
                break
        if until & set(result.breaches):
            going = False
        result.levels.append(end)
    result.complete = begin >= len(store)
    result.parents = parents.array()
    result.causes = causes.array()
    if keep_edges:
        sources, targets, rules = (each.array() for each in edges)
        result.edges = sources, targets, rules.astype(np.int32)
    return result


def _expand(
    model: Model,
    result: Explored,
    start: int,
    stop: int,
    level: int,
    kept: tuple[_Growing, _Growing, tuple[_Growing, _Growing, _Growing]],
    keep_edges: bool,
) -> None:
    """Take every step from the states ``start`` to ``stop``."""
    layout, store = model.layout, result.store
    pieces: list[list[U64]] = []
    sources: list[npt.NDArray[np.intp]] = []
    rules: list[int] = []
    for number, rows, successors in steps_from(model, Batch(store.words(start, stop))):
        ends = _note_step(result, model, successors, number, rows + start, level)
        if ends is not None:
            keep = np.flatnonzero(~ends)
            successors, rows = successors.take(keep), rows[keep]
        if len(rows):
            pieces.append(successors.words)
            sources.append(rows)
            rules.append(number)
    if not pieces:
        return
    words = [np.concatenate([piece[at] for piece in pieces]) for at in range(layout.words)]
    words = layout.canonical(words)
    source = (np.concatenate(sources) + start).astype(np.int32)
    rule = np.repeat(np.asarray(rules, np.int32), [len(rows) for rows in sources])
    result.steps += len(source)
    numbers, new = store.add(words)
    parents, causes, edges = kept
    parents.extend(source[new])
    causes.extend(rule[new])
    if keep_edges:
        for growing, values in zip(edges, (source, numbers, rule), strict=True):
            growing.extend(values)
    if len(new):
        fresh = Batch([word[new] for word in words])
        broken = model.judge(fresh)
        _note_breaches(result, broken, level, source[new], rule[new], fresh)


def steps_from(model: Model, states: Batch) -> Iterator[tuple[int, npt.NDArray[np.intp], Batch]]:
    """For each rule that can be taken: its number, in which rows, and what comes of it."""
    for number, rule in enumerate(model.rules):
        rows = np.flatnonzero(rule.guard(states))
        if len(rows):
            successors = states.take(rows)
            rule.effect(successors)
            yield number, rows, successors


def _note_step(
    result: Explored,
    model: Model,
    successors: Batch,
    rule: int,
    parents: npt.NDArray[np.intp],
    level: int,
) -> Mask | None:
    """Record what a step broke; in which of its outcomes the story ends, or None: in none."""
    ends: Mask | None = None
    for name, where in successors.failed.items():
        if name not in result.breaches:
            row = int(np.argmax(where))
            words = tuple(int(word[row]) for word in successors.words)
            result.breaches[name] = Breach(name, level, int(parents[row]), rule, words)
        if name in model.final:
            ends = where if ends is None else ends | where
    return ends


def _note_breaches(
    result: Explored,
    broken: dict[str, Mask],
    level: int,
    parents: Ids | None,
    rules: Ids | None,
    states: Batch,
) -> None:
    for name, where in broken.items():
        if name in result.breaches or not where.any():
            continue
        row = int(np.argmax(where))
        words = tuple(int(word[row]) for word in states.words)
        parent = -1 if parents is None else int(parents[row])
        rule = -1 if rules is None else int(rules[row])
        result.breaches[name] = Breach(name, max(level, 0), parent, rule, words)
