# SPDX-License-Identifier: Apache-2.0
"""``holdfast spec table``: what is in it, and when it is not as it should be."""

from __future__ import annotations

import json
import os
import signal

import pytest
from click.testing import CliRunner, Result

from holdfast.cli import holdfast
from holdfast.cli.spec_common import Watch
from holdfast.spec import liveness, table
from holdfast.spec.setting import Iommu, Profile


def run(*arguments: str) -> Result:
    return CliRunner().invoke(holdfast, ["spec", *arguments], catch_exceptions=False)


def test_the_table_has_a_row_for_each_strategy_and_a_column_for_each_machine() -> None:
    result = run("table", "mlock", "ghost", "notifier")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert max(map(len, result.output.splitlines())) <= 100
    assert lines[2] == "2.0 none 7.x none 7.x lazy 7.x strict"
    assert "A mlock S1 in 7 S1 in 7 S1 in 7 S1 in 7" in lines
    assert "C ghost S1 in 7 S1 in 7 - -" in lines
    assert "F notifier - holds holds holds" in lines
    assert f"L2 {liveness.TEXTS['L2']}" in lines
    assert not any(line.startswith("L3 ") for line in lines)


def test_the_table_as_json_is_whole() -> None:
    result = run("table", "mlock", "--iommu", "none", "--json")
    told = json.loads(result.output)
    assert (result.exit_code, told["complete"], told["unexpected"]) == (0, True, [])
    assert [(row["profile"], row["breaks"]["S1"]) for row in told["verdicts"]] == [
        ("2.0", 7), ("7.x", 7),
    ]  # fmt: skip


def test_a_verdict_that_is_not_the_known_one_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = dict(table.EXPECTED)
    known["mlock", Profile.NEW, Iommu.NONE] = "holds"
    monkeypatch.setattr(table, "EXPECTED", known)
    arguments = ("table", "mlock", "--iommu", "none")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "NOT AS EXPECTED: mlock on Linux 7.x, IOMMU none: breaks S1 in 7, not holds" in (
        result.output
    )
    assert len(json.loads(run(*arguments, "--json").output)["unexpected"]) == 1
    assert run(*arguments, "--profile", "2.0").exit_code == 0


def test_other_bounds_have_no_expected_verdicts() -> None:
    result = run("table", "mlock", "--profile", "2.0", "--bounds", "core")
    assert result.exit_code == 0


def test_an_interrupted_table_shows_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    say = Watch.say

    def interrupting(watch: Watch, text: str) -> None:
        say(watch, text)
        if text.startswith("2 of 4"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Watch, "say", interrupting)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    result = run("table", "mlock")
    assert result.exit_code == 130
    assert "INCOMPLETE: interrupted; 2 of 4 are missing" in result.stderr
    assert "S1 in 7" in result.stdout


@pytest.mark.parametrize("processors", [1, 2])
def test_the_table_does_not_depend_on_how_many_processors_there_are(
    monkeypatch: pytest.MonkeyPatch, processors: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    result = run("table", "mlock", "dma-buf", "--profile", "7.x", "--json")
    assert result.exit_code == 0
    told = [each["text"] for each in json.loads(result.stdout)["verdicts"]]
    assert told == [
        table.EXPECTED[key, Profile.NEW, iommu] for key in ("mlock", "dma-buf") for iommu in Iommu
    ]
