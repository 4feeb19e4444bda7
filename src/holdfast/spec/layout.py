# SPDX-License-Identifier: Apache-2.0
"""States as packed words: where each variable lies, and what a renaming does to all of them.

Facts. An exhaustive search is as fast as it can make, compare and store states. A state of this
model has some hundred small variables; as Python objects a million of them take minutes and
gigabytes. Frames are interchangeable, and so are processes: a state and the same state with two
names swapped have the same future.

Choice. A variable is a few bits of a 64-bit word; a *batch* of states is a handful of NumPy arrays,
one per word, and every rule is applied to thousands of states at once. A variable never holds the
name of a frame or process as a number: it has one bit for each of them (``target[d, f]``). So
renaming is moving bits, and the canonical form of a state is the least of its renamings.

Cost. Rules are written with array operators (``&`` and ``|`` instead of ``and`` and ``or``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

U8: TypeAlias = npt.NDArray[np.uint8]
U64: TypeAlias = npt.NDArray[np.uint64]
Mask: TypeAlias = npt.NDArray[np.bool_]

WORD: Final = 64


@dataclass(frozen=True, slots=True)
class Cell:
    """One variable: ``bits`` bits from ``shift`` on, of word ``word``."""

    name: str
    index: tuple[int, ...]
    word: int
    shift: int
    bits: int

    def __str__(self) -> str:
        return f"{self.name}{list(self.index) if self.index else ''}"


@dataclass(frozen=True, slots=True)
class Field:
    """A declared variable, or an array of them over named axes (``"PF"``: process, frame)."""

    name: str
    bits: int
    axes: str = ""


class Layout:
    """Places fields into words, and knows how renamings move them.

    ``sizes`` gives the length of each axis; ``symmetric`` the axes whose members are
    interchangeable. ``same`` names axes that are a second index over another one's members.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        sizes: Mapping[str, int],
        symmetric: str = "",
        same: Mapping[str, str] | None = None,
    ) -> None:
        self.sizes = dict(sizes)
        self._same = dict(same or {})
        self.fields = {field.name: field for field in fields}
        assert len(self.fields) == len(fields), "two fields of one name"
        self.cells: dict[tuple[str, tuple[int, ...]], Cell] = {}
        self._word = self._shift = 0
        # Fields over the same axes lie side by side, so that a renaming moves them as one piece.
        for axes in dict.fromkeys(field.axes for field in fields):
            alike = [field for field in fields if field.axes == axes]
            for index in itertools.product(*(range(sizes[axis]) for axis in axes)):
                for field in alike:
                    self._place(field, index)
        self.words = self._word + 1
        self.renamings = [self._moves(names) for names in self._renamings(symmetric)]
        """For each renaming but the identity: what is moved from where to where."""

    def _place(self, field: Field, index: tuple[int, ...]) -> None:
        if self._shift + field.bits > WORD:
            self._word, self._shift = self._word + 1, 0
        self.cells[field.name, index] = Cell(field.name, index, self._word, self._shift, field.bits)
        self._shift += field.bits

    def _renamings(self, symmetric: str) -> Iterator[dict[str, tuple[int, ...]]]:
        choices = [itertools.permutations(range(self.sizes[axis])) for axis in symmetric]
        for chosen in itertools.islice(itertools.product(*choices), 1, None):
            yield dict(zip(symmetric, chosen, strict=True))

    def _moves(self, names: Mapping[str, tuple[int, ...]]) -> list[tuple[int, int, int, int]]:
        """``(from word, to word, left shift, mask)``, few of them."""
        moves: dict[tuple[int, int, int], int] = {}
        for (name, index), cell in self.cells.items():
            axes = self.fields[name].axes
            there = tuple(
                names[member][at] if (member := self._same.get(axis, axis)) in names else at
                for axis, at in zip(axes, index, strict=True)
            )
            target = self.cells[name, there]
            key = cell.word, target.word, target.shift - cell.shift
            moves[key] = moves.get(key, 0) | ((1 << cell.bits) - 1) << cell.shift
        return [(*key, mask) for key, mask in moves.items()]

    def group(self, name: str) -> Cells:
        """All variables of one name; a group of nothing if there is none."""
        return Cells({index: cell for (each, index), cell in self.cells.items() if each == name})

    def canonical(self, words: list[U64]) -> list[U64]:
        """The least renaming of each state. ``words`` are not changed."""
        best = words
        for moves in self.renamings:
            other = _moved(words, moves, self.words)
            less = other[-1] < best[-1]
            tie = other[-1] == best[-1]
            for high, low in zip(reversed(other[:-1]), reversed(best[:-1]), strict=True):
                less |= tie & (high < low)
                tie &= high == low
            best = [np.where(less, mine, was) for mine, was in zip(other, best, strict=True)]
        return best


def _moved(words: list[U64], moves: list[tuple[int, int, int, int]], count: int) -> list[U64]:
    result: list[U64 | None] = [None] * count
    for source, target, shift, mask in moves:
        piece = words[source] & np.uint64(mask)
        if shift > 0:
            piece <<= np.uint64(shift)
        elif shift < 0:
            piece >>= np.uint64(-shift)
        was = result[target]
        result[target] = piece if was is None else was | piece
    zero = np.zeros_like(words[0])
    return [zero if each is None else each for each in result]


class Cells:
    """Variables of one name, by index: ``target[d, f]``.

    What a model does not have is always 0, and assigning to it changes nothing.
    """

    def __init__(self, cells: Mapping[tuple[int, ...], Cell]) -> None:
        self._cells = dict(cells)

    def __getitem__(self, index: int | tuple[int, ...]) -> Cell:
        return self._cells.get(index if isinstance(index, tuple) else (index,), NOTHING)

    def __bool__(self) -> bool:
        return bool(self._cells)


NOTHING: Final = Cell("nothing", (), 0, 0, 0)
"""The variable that a model does not have."""


class Batch:
    """Many states side by side: ``batch[cell]`` is an array with one entry for each of them.

    Assignment changes all of them, :meth:`put` some. Not thread-safe.
    """

    __slots__ = ("_columns", "failed", "words")

    def __init__(self, words: list[U64]) -> None:
        self.words = words
        self._columns: dict[Cell, U8] = {}
        self.failed: dict[str, Mask] = {}
        """Invariants that the step which made these states broke, and in which of them."""

    def __len__(self) -> int:
        return len(self.words[0])

    def __getitem__(self, cell: Cell) -> U8:
        column = self._columns.get(cell)
        if column is None:
            if not cell.bits:
                return np.zeros(len(self), np.uint8)
            low = self.words[cell.word] >> np.uint64(cell.shift)
            column = (low & np.uint64((1 << cell.bits) - 1)).astype(np.uint8)
            self._columns[cell] = column
        return column

    def __setitem__(self, cell: Cell, value: int | U8 | Mask) -> None:
        if not cell.bits:
            return
        ones = (1 << cell.bits) - 1
        kept = self.words[cell.word] & np.uint64(~(ones << cell.shift) & ((1 << WORD) - 1))
        if isinstance(value, int | np.integer):
            assert 0 <= value <= ones, f"{value} does not fit into {cell}"
            self.words[cell.word] = kept | np.uint64(int(value) << cell.shift)
            self._columns[cell] = np.full(len(self), value, np.uint8)
        else:
            column = value.astype(np.uint8)
            # It would spill into the variable beside it, and the search would go on.
            assert (column <= ones).all(), f"{column.max()} does not fit into {cell}"
            self.words[cell.word] = kept | column.astype(np.uint64) << np.uint64(cell.shift)
            self._columns[cell] = column

    def eq(self, cell: Cell, value: int) -> Mask:
        """Where a variable has this value."""
        found: Mask = self[cell] == value
        return found

    def ne(self, cell: Cell, value: int) -> Mask:
        """Where it has another one."""
        found: Mask = self[cell] != value
        return found

    def ge(self, cell: Cell, value: int) -> Mask:
        """Where it has at least this value."""
        found: Mask = self[cell] >= value
        return found

    def lt(self, cell: Cell, value: int) -> Mask:
        """Where it has less."""
        return ~self.ge(cell, value)

    def on(self, cell: Cell) -> Mask:
        """Where it is not 0."""
        return self.ne(cell, 0)

    def off(self, cell: Cell) -> Mask:
        """Where it is."""
        return self.eq(cell, 0)

    def among(self, cell: Cell, values: Sequence[int]) -> Mask:
        """Where it has one of these values."""
        found = self.eq(cell, values[0])
        for value in values[1:]:
            found |= self.eq(cell, value)
        return found

    def put(self, cell: Cell, value: int | U8 | Mask, where: Mask) -> None:
        """Assign in some of the states."""
        if cell.bits:
            self[cell] = np.where(where, value, self[cell]).astype(np.uint8)

    def take(self, rows: npt.NDArray[np.intp]) -> Batch:
        """A copy of some of the states."""
        return Batch([word[rows] for word in self.words])

    def fail(self, invariant: str, where: Mask) -> None:
        """Say in which states the step that is being taken breaks an invariant."""
        if where.any():
            was = self.failed.get(invariant)
            self.failed[invariant] = where if was is None else was | where

    def forget_columns(self) -> None:
        """After ``words`` were replaced."""
        self._columns.clear()

    def true(self) -> Mask:
        return np.ones(len(self), np.bool_)

    def false(self) -> Mask:
        return np.zeros(len(self), np.bool_)
