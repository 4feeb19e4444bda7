# SPDX-License-Identifier: Apache-2.0
"""What was observed: as JSON from a guest, and as the table of docs/strategies.md.

Everything here is plain data: no trial is run, no file but the document is touched.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec

from holdfast.errors import ProtocolError, UsageError
from holdfast.lab.strategies.rows import ROWS, Event, Machine, Row, Verdict, rows_of

BEGIN: Final = "<!-- strategies: generated from here -->"
END: Final = "<!-- strategies: to here -->"
RESULTS: Final = "strategies.json"

_Count = Annotated[int, msgspec.Meta(ge=0, le=100_000)]


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of one strategy under one event.

    ``trials`` were run; ``counted`` of them can be judged (see trial.h). Of those: ``corrupted``,
    ``got_frame`` (corrupted, and the innocent process had the very frame), ``arrived`` (somebody
    found the card's data where it belongs; not every strategy has somebody to look), ``stuck``.
    ``error`` is the errno of a call that was refused.
    """

    row: int
    event: Event
    trials: _Count
    counted: _Count
    corrupted: _Count = 0
    got_frame: _Count = 0
    arrived: _Count = 0
    stuck: _Count = 0
    refused: _Count = 0
    error: int = 0
    absent: str = ""

    @property
    def verdict(self) -> Verdict:
        """The verdict of all trials together; one foreign word is enough to condemn."""
        if self.absent:
            return Verdict.ABSENT
        if self.corrupted:
            return Verdict.CORRUPTED
        if self.counted and self.refused == self.counted:
            return Verdict.REFUSED
        return Verdict.STUCK if self.counted and self.stuck == self.counted else Verdict.HOLDS

    def cell(self) -> str:
        """The verdict and its figures, for a table."""
        if self.verdict is Verdict.ABSENT:
            return "not in this kernel"
        figures = f"{self.corrupted}/{self.counted}"
        if self.verdict is Verdict.CORRUPTED:
            return f"**corrupted {figures}**"
        if self.verdict is Verdict.STUCK:
            return f"holds {figures}, **never released**"
        arrived = f", arrived {self.arrived}/{self.counted}" if self.arrived else ""
        if self.verdict is Verdict.REFUSED:
            return f"refused ({errno.errorcode.get(self.error, self.error)}) {figures}{arrived}"
        return f"holds {figures}{arrived}"


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything observed in one boot of one machine."""

    machine: Machine
    kernel: str
    observations: list[Observation]
    seconds: float


def decode(data: bytes) -> Boot:
    """A boot's JSON. Raises ProtocolError if it is anything else."""
    try:
        return msgspec.json.decode(data, type=Boot)
    except msgspec.MsgspecError as error:
        raise ProtocolError(
            f"not the result of a boot: {error}", operation="lab strategies"
        ) from error


def encode(boot: Boot) -> bytes:
    """A boot as JSON, readable."""
    return msgspec.json.format(msgspec.json.encode(boot), indent=1) + b"\n"


def mismatches(boots: Iterable[Boot], *, complete: bool = True) -> list[str]:
    """Every cell that is not as expected; with ``complete``, also what is missing."""
    found: list[str] = []
    for boot in boots:
        seen = {(one.row, one.event): one for one in boot.observations}
        for row in rows_of(boot.machine):
            for event in Event:
                found += _mismatch(row, event, seen.get((row.number, event)), complete)
    return found


def _mismatch(row: Row, event: Event, seen: Observation | None, complete: bool) -> list[str]:
    expected = row.expected(event)
    if expected is None:
        return []
    where = f"row {row.number} ({row.name}), {event.heading}"
    if seen is None or seen.verdict is Verdict.ABSENT:
        why = "not run" if seen is None else seen.absent
        return [f"{where}: {why}"] if complete else []
    if not seen.counted:
        return [f"{where}: no trial could be judged: the machine is too slow"]
    if seen.verdict is not expected:
        return [f"{where}: expected {expected}, seen {seen.verdict} ({seen.cell()})"]
    return []


def table(boots: Sequence[Boot]) -> str:
    """The tables in Markdown, one per machine."""
    return "\n".join(line for boot in boots for line in _machine(boot))


def _machine(boot: Boot) -> list[str]:
    seen = {(one.row, one.event): one for one in boot.observations}
    reasons: list[str] = []
    heads = ["", "strategy", "who holds the memory", *(event.heading for event in Event)]
    lines = [f"### {_headline(boot.machine)}", "", _line(heads), _line(["---"] * len(heads))]
    for row in rows_of(boot.machine):
        cells = [str(row.number), row.name, row.holder]
        for event in Event:
            one = seen.get((row.number, event))
            if one is not None:
                cells.append(one.cell())
            else:
                cells.append(_dash(row.reason(event) or "not run", reasons))
        lines.append(_line(cells))
    lines += ["", *(f"- {_mark(index)} {reason}." for index, reason in enumerate(reasons)), ""]
    bad = [one for one in boot.observations if one.verdict is Verdict.CORRUPTED]
    lines.append(
        f"Linux {boot.kernel}. Of {sum(one.counted for one in boot.observations)} trials that can "
        f"be judged, {sum(one.corrupted for one in bad)} ended with foreign bytes in an innocent "
        f"process's memory; in {sum(one.got_frame for one in bad)} of these "
        "pagemap showed that it had the very frame."
    )
    return [*lines, ""]


def _headline(machine: Machine) -> str:
    return {Machine.NONE: "Without an IOMMU", Machine.VTD: "With an IOMMU (VT-d)"}[machine]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mark(index: int) -> str:
    return f"({chr(ord('a') + index)})"


def _dash(reason: str, reasons: list[str]) -> str:
    """A cell that was not run, with the mark of its reason."""
    if reason not in reasons:
        reasons.append(reason)
    return f"- {_mark(reasons.index(reason))}"


def generated(text: str, document: str) -> tuple[str, str, str]:
    """A document before, between and after the markers. UsageError if it does not have both."""
    before, begin, rest = text.partition(BEGIN)
    between, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(
            "it does not have the two markers",
            operation="lab strategies",
            target=document,
            hint=f"put {BEGIN} and {END} where the table is to be",
        )
    return before, between, after


def update(document: Path, boots: Sequence[Boot]) -> bool:
    """Put the table between the markers of ``document``; returns whether it changed anything."""
    old = document.read_text(encoding="utf-8")
    before, _, after = generated(old, str(document))
    new = f"{before}{BEGIN}\n\n{table(boots)}\n{END}{after}"
    if new != old:
        document.write_text(new, encoding="utf-8")
    return new != old


assert len({row.number for row in ROWS}) == len(ROWS)
