# SPDX-License-Identifier: Apache-2.0
"""The table of strategies: complete in its data, honest in its verdicts, the one in the docs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from holdfast.cli import lab_strategies
from holdfast.errors import ProtocolError, UsageError
from holdfast.lab.strategies import report
from holdfast.lab.strategies.report import Boot, Observation, decode, encode, mismatches, table
from holdfast.lab.strategies.rows import ROWS, Event, Machine, Row, Verdict, rows_of

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "strategies.md"
PROGRAMS = ROOT / "src" / "holdfast" / "lab" / "strategies"


def as_expected(row: Row, event: Event, **changes: int | str) -> Observation:
    """An observation that fits the expectation of a cell, but for ``changes``."""
    verdict = row.expected(event)
    counts: dict[str, int | str] = {
        "trials": 3,
        "counted": 3,
        "corrupted": 3 if verdict is Verdict.CORRUPTED else 0,
        "stuck": 3 if verdict is Verdict.STUCK else 0,
        "refused": 3 if verdict is Verdict.REFUSED else 0,
        "error": 11 if verdict is Verdict.REFUSED else 0,
    }
    data = {"row": row.number, "event": str(event), **counts, **changes}
    return msgspec.convert(data, Observation)


def boot(machine: Machine) -> Boot:
    """A boot in which everything was as expected."""
    seen = [
        as_expected(row, event)
        for row in rows_of(machine)
        for event in Event
        if row.expected(event)
    ]
    return Boot(machine=machine, kernel="6.12", observations=seen, seconds=1.0)


def with_one(machine: Machine, row: Row, event: Event, **changes: int | str) -> Boot:
    """A boot in which one cell is different."""
    seen = [
        as_expected(row, event, **changes) if (one.row, one.event) == (row.number, event) else one
        for one in boot(machine).observations
    ]
    return Boot(machine=machine, kernel="6.12", observations=seen, seconds=1.0)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_every_row_says_something_of_every_event_and_has_its_program(row: Row) -> None:
    assert list(row.cells) == list(Event)
    for event in Event:
        assert (row.expected(event) is None) == bool(row.reason(event))
    assert any(row.expected(event) for event in Event)
    assert row.program == "demo" or (PROGRAMS / f"{row.program}.c").is_file()


def test_every_program_belongs_to_a_row() -> None:
    assert {path.stem for path in PROGRAMS.glob("*.c")} == {row.program for row in ROWS} - {"demo"}


def test_the_document_has_every_row_as_expected_and_nothing_invented() -> None:
    _, between, _ = report.generated(DOCUMENT.read_text(encoding="utf-8"), "docs/strategies.md")
    lines = [line for line in between.splitlines() if line.startswith("| ")]
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines}
    for row in ROWS:
        found = cells[str(row.number)]
        assert found[1] == row.name
        for event, text in zip(Event, found[3:], strict=True):
            expected = row.expected(event)
            words = {Verdict.STUCK: "never released", None: "- ("}
            assert words.get(expected, str(expected)) in text
    assert len([name for name in cells if name.isdigit()]) == len(ROWS)


def test_what_is_as_expected_has_no_mismatch_and_survives_json() -> None:
    boots = [boot(machine) for machine in Machine]
    assert not mismatches(boots)
    assert [decode(encode(one)) for one in boots] == boots


def test_a_holding_row_that_corrupts_once_is_a_mismatch() -> None:
    row = next(one for one in ROWS if one.expected(Event.KILL) is Verdict.HOLDS)
    wrong = mismatches([with_one(row.machine, row, Event.KILL, corrupted=1)])
    assert len(wrong) == 1
    assert f"row {row.number}" in wrong[0]


def test_a_corrupting_row_that_was_not_seen_to_corrupt_is_a_mismatch() -> None:
    assert len(mismatches([with_one(Machine.NONE, ROWS[0], Event.KILL, corrupted=0)])) == 1


def test_trials_that_cannot_be_judged_are_no_proof_of_holding() -> None:
    row = next(one for one in ROWS if one.expected(Event.KILL) is Verdict.HOLDS)
    wrong = mismatches([with_one(row.machine, row, Event.KILL, counted=0)])
    assert "too slow" in wrong[0]


def test_what_was_not_run_is_missed_only_where_everything_is_asked_for() -> None:
    empty = Boot(machine=Machine.NONE, kernel="6.12", observations=[], seconds=0.0)
    cells = sum(row.expected(event) is not None for row in rows_of(Machine.NONE) for event in Event)
    assert len(mismatches([empty])) == cells
    assert not mismatches([empty], complete=False)


def test_a_missing_kernel_feature_is_named_and_not_taken_for_a_verdict() -> None:
    row = next(one for one in ROWS if one.variant == "udmabuf")
    lacking = with_one(Machine.NONE, row, Event.KILL, absent="no udmabuf")
    assert mismatches([lacking], complete=False) == []
    assert "no udmabuf" in mismatches([lacking])[0]
    assert "not in this kernel" in table([lacking])


def test_the_table_is_put_between_the_markers_and_nowhere_else(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"before\n{report.BEGIN}\nyesterday\n{report.END}\nafter\n")
    boots = [boot(machine) for machine in Machine]
    assert report.update(document, boots)
    assert not report.update(document, boots)
    text = document.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "yesterday" not in text
    assert all(f"| {row.number} | {row.name} |" in text for row in ROWS)


def test_a_document_without_markers_is_refused_before_anything_is_booted(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("nothing here\n")
    result = CliRunner().invoke(lab_strategies.command, ["--update", str(document)])
    assert isinstance(result.exception, UsageError)
    assert document.read_text() == "nothing here\n"


@pytest.mark.parametrize("data", [b"", b"{}", b'{"machine": "VT-d", "kernel": 5}', b"\xff"])
def test_what_is_no_result_of_a_boot_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)
