# SPDX-License-Identifier: Apache-2.0
"""What must happen in the end: leads-to properties under weak fairness.

Facts. "Dead and pinned leads to free or quarantined" fails if there is a way to be dead and pinned
for ever. For ever means to stay in one state, or to go round in a cycle. Not every such way counts:
a kernel that could reap a process and never does is no kernel. So rules are *fair* or not: what a
fair one could do all the time, it does some time. A card is not fair: it may never answer.

Choice. Of the states that can be reached from a cause without its consequence, look at the
strongly connected parts. One of them is a way to wait for ever if each fair rule is, somewhere in
it, not possible, or is taken in it. Almost all states lie on no cycle and are peeled off with
array operations; the rest goes through Tarjan's algorithm.

Cost. Rules are told apart by whom they are about, so states may not be renamed: symmetry is off
here, and bounds are smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from holdfast.spec.explore import Explored
from holdfast.spec.layout import Mask
from holdfast.spec.store import Ids

TEXTS: Final = {
    "L1": "memory pinned for a dead process is never free or in quarantine",
    "L2": "a killed process is never gone",
    "L3": "a keeper that died is never succeeded",
    "L4": "a card that hangs is never reset, nor its pages put into quarantine",
    "L5": "after a timeout of the IOTLB there is neither a reset nor quarantine",
    "L6": "pages in quarantine are not free after a reset",
}
"""Every property in a sentence, of its breach."""


@dataclass(frozen=True, slots=True)
class LeadsTo:
    """Whenever ``cause`` holds, ``consequence`` holds then or later."""

    name: str
    cause: Mask
    consequence: Mask


def hangs(found: Explored, promise: LeadsTo) -> int | None:
    """A state in which, or round which, one can wait for ever; None: the promise is kept.

    Of all that there are, the one that is reached first.
    """
    assert found.edges is not None, "explore with keep_edges=True"
    waiting = _reached_without(found, promise)
    stuck = np.concatenate([_rounds(found, waiting), _stalls(found, waiting)])
    return int(stuck.min()) if len(stuck) else None


def _reached_without(found: Explored, promise: LeadsTo) -> Mask:
    """States after a cause, on a way on which there was no consequence."""
    assert found.edges is not None
    sources, targets, _ = found.edges
    waiting = promise.cause & ~promise.consequence
    while True:
        more = np.zeros_like(waiting)
        more[targets[waiting[sources]]] = True
        more &= ~promise.consequence & ~waiting
        if not more.any():
            return waiting
        waiting |= more


def _stalls(found: Explored, waiting: Mask) -> npt.NDArray[np.intp]:
    """States in which no fair rule leads anywhere else."""
    assert found.edges is not None
    sources, targets, rules = found.edges
    moves = np.zeros(found.states, np.bool_)
    moves[sources[_fair(found)[rules] & (sources != targets)]] = True
    return np.flatnonzero(waiting & ~moves)


def _rounds(found: Explored, waiting: Mask) -> npt.NDArray[np.intp]:
    """States of the parts round which one may go for ever.

    That is so if there is no fair rule that is possible throughout the part and not used in it.
    """
    assert found.edges is not None
    sources, targets, rules = found.edges
    part = _parts(found.states, waiting, sources, targets)
    count = int(part.max(initial=-1)) + 1
    if not count:
        return np.empty(0, np.intp)
    total = len(found.model.rules)
    here = (part[sources] >= 0) & _fair(found)[rules]
    of_part, rule = part[sources[here]].astype(np.int64), rules[here].astype(np.int64)
    key = of_part * total + rule
    used = np.zeros(count * total, np.bool_)
    used[key[of_part == part[targets[here]]]] = True
    # A rule can lead from one state to several: count the states.
    _, first = np.unique(np.stack([key, sources[here].astype(np.int64)]), axis=1, return_index=True)
    possible = np.bincount(key[first], minlength=count * total).reshape(count, total)
    sizes = np.bincount(part[part >= 0], minlength=count)
    forced = (possible == sizes[:, None]) & ~used.reshape(count, total)
    endless = ~forced.any(axis=1)
    return np.flatnonzero((part >= 0) & endless[part])


def _fair(found: Explored) -> Mask:
    return np.array([rule.fair for rule in found.model.rules], np.bool_)


def _parts(count: int, waiting: Mask, sources: Ids, targets: Ids) -> Ids:
    """For each state the number of its strongly connected part of several states, or -1."""
    left = waiting.copy()
    inside = waiting[sources] & waiting[targets] & (sources != targets)
    sources, targets = sources[inside], targets[inside]
    while True:
        into = np.zeros(count, np.bool_)
        out = np.zeros(count, np.bool_)
        into[targets], out[sources] = True, True
        kept = left & into & out
        if (kept == left).all():
            break
        left = kept
        inside = left[sources] & left[targets]
        sources, targets = sources[inside], targets[inside]
    part = np.full(count, -1, np.int32)
    if len(sources):
        names, flat = np.unique(np.concatenate([sources, targets]), return_inverse=True)
        flat = flat.astype(np.intp)
        part[names] = _Tarjan(len(names), flat[: len(sources)], flat[len(sources) :]).parts()
    return part


class _Tarjan:
    """R. Tarjan, Depth-first search and linear graph algorithms (1972), without recursion."""

    def __init__(
        self, count: int, tails: npt.NDArray[np.intp], heads: npt.NDArray[np.intp]
    ) -> None:
        order = np.argsort(tails, kind="stable")
        self._heads: list[int] = heads[order].tolist()
        self._begin: list[int] = np.searchsorted(tails[order], np.arange(count + 1)).tolist()
        self._index = [-1] * count
        self._low = [0] * count
        self._part = [-1] * count
        self._closed = [False] * count
        self._stack: list[int] = []
        self._counter = self._parts = 0

    def parts(self) -> Ids:
        for root in range(len(self._index)):
            if self._index[root] < 0:
                self._from(root)
        return np.array(self._part, np.int32)

    def _from(self, root: int) -> None:
        work = [(root, self._begin[root])]
        self._open(root)
        while work:
            node, at = work.pop()
            while at < self._begin[node + 1]:
                head = self._heads[at]
                at += 1
                if self._index[head] < 0:
                    work.append((node, at))
                    self._open(head)
                    node, at = head, self._begin[head]
                elif not self._closed[head]:
                    self._low[node] = min(self._low[node], self._index[head])
            if self._low[node] == self._index[node]:
                self._close(node)
            if work:
                above = work[-1][0]
                self._low[above] = min(self._low[above], self._low[node])

    def _open(self, node: int) -> None:
        self._index[node] = self._low[node] = self._counter
        self._counter += 1
        self._stack.append(node)

    def _close(self, node: int) -> None:
        members = []
        while True:
            member = self._stack.pop()
            self._closed[member] = True
            members.append(member)
            if member == node:
                break
        if len(members) > 1:
            for member in members:
                self._part[member] = self._parts
            self._parts += 1
