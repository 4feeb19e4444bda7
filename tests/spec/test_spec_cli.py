# SPDX-License-Identifier: Apache-2.0
"""``holdfast spec``: exit codes, what is printed, and what is refused."""

from __future__ import annotations

import io
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner, Result

from holdfast import replay
from holdfast.cli import holdfast, spec_common
from holdfast.cli.spec_common import LARGEST, Watch, find, strategies
from holdfast.cli.spec_search import machine, search
from holdfast.errors import BadTarget, HoldfastError, SystemFailure, UsageError
from holdfast.replay import Outcome
from holdfast.spec import invariants, liveness, table
from holdfast.spec.setting import Iommu
from holdfast.spec.trace import Trace

VICTIM = "S1 with a victim"
PAGE = Path(__file__).parents[2] / "docs" / "specification.md"

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Run ``holdfast spec``; errors of the library are left in the result, others are raised."""

    def invoke(*arguments: str, **more: Any) -> Result:
        result = CliRunner().invoke(holdfast, ["spec", *arguments], **more)
        error = result.exception
        if error is not None and not isinstance(error, (SystemExit, HoldfastError)):
            raise error
        return result

    return invoke


@pytest.fixture
def story(run: Run, tmp_path: Path) -> Path:
    path = tmp_path / "story.json"
    assert run("trace", "mlock", "--json", str(path)).exit_code == 0
    return path


# -- list, check ------------------------------------------------------------


def test_list_names_every_strategy_and_where_it_exists(run: Run) -> None:
    output = run("list").output
    for key, kind in strategies().items():
        row = rf"(?m)^{re.escape(kind.family or '-')} +{key} +{re.escape(kind.title)}$"
        assert re.search(row, output)
    assert "on 2.0 (none); 7.x (none, lazy, strict)" in output
    rows = json.loads(run("list", "--json").output)
    assert [row["key"] for row in rows] == list(strategies())


def test_what_breaks_is_told_with_the_gravest_story(run: Run) -> None:
    result = run("check", "reference-timed")
    assert result.exit_code == 1
    assert f"BREAKS {VICTIM} in 15 steps" in result.output
    assert "15. fabric   a write of descriptor 0 arrives in memory" in result.output
    assert "P1, who has nothing to do with it" in result.output


def test_what_holds_says_so(run: Run) -> None:
    result = run("check", "quarantine")
    assert result.exit_code == 0
    assert "HOLDS: every invariant" in result.output
    assert "MAY HANG" not in result.output
    assert re.search(r"(?m)^[\d ]+ states in \d+ levels, [\d ]+ steps taken, ", result.output)


def test_what_may_wait_for_ever_is_told_with_the_way_there(run: Run) -> None:
    result = run("check", "longterm")
    assert result.exit_code == 1
    assert f"MAY HANG, L1: {liveness.TEXTS['L1']}" in result.output
    assert "HOLDS: every invariant" in result.output
    assert "L1, waiting for ever after 8 steps" in result.output
    assert run("check", "longterm", "--invariant", "L2").exit_code == 1
    assert run("check", "longterm", "--invariant", "L3").exit_code == 0
    assert run("check", "longterm", "--invariant", "S1").exit_code == 0
    trace = Trace.loads(run("trace", "quiesce", "--invariant", "L2").output)
    assert trace.breaks == "L2"


def test_check_and_table_say_the_same_of_what_may_hang() -> None:
    for key, iommu in (("ghost-files", Iommu.NONE), ("quiesce", Iommu.STRICT), ("notifier", None)):
        kind = strategies()[key]
        setting = machine(kind, "7.x", iommu, "table")
        found = search(kind, setting, "table", Watch()).hangs
        assert found == tuple(table.waits(kind, setting)[1])


def test_one_invariant_can_be_asked_for(run: Run) -> None:
    holds = run("check", "mlock", "--invariant", "S3")
    assert (holds.exit_code, "HOLDS: S3" in holds.output) == (0, True)
    breaks = run("check", "mlock", "--invariant", "S5")
    assert breaks.exit_code == 1
    assert "BREAKS S5" in breaks.output
    assert "BREAKS S1" not in breaks.output
    assert "S5 is broken" in breaks.output


def test_check_as_json_has_figures_and_the_story(run: Run) -> None:
    result = run("check", "mlock", "--json")
    told = json.loads(result.output)
    assert result.exit_code == 1
    assert told["breaks"][VICTIM] == len(told["trace"]["steps"])
    assert told["complete"] is True
    assert (told["strategy"], told["profile"], told["iommu"]) == ("mlock", "7.x", "none")
    assert Trace.from_json(told["trace"]).breaks == VICTIM


def test_a_limit_is_named(run: Run) -> None:
    result = run("check", "longterm", "--limit", "100")
    assert result.exit_code == 0
    assert "INCOMPLETE: the limit of states was met" in result.output
    assert "HOLDS" not in result.output


def test_the_machine_is_chosen_so_that_the_strategy_exists_on_it(run: Run) -> None:
    assert "on Linux 2.0, IOMMU none" in run("check", "reserved", "--limit", "1").output
    assert "on Linux 7.x, IOMMU strict" in run("check", "unmap-ats", "--limit", "1").output
    result = run("check", "reserved", "--profile", "7.x")
    assert isinstance(result.exception, UsageError)
    assert "exists on 2.0 (none)" in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [("check", "nothing"), ("trace", "nothing"), ("table", "nothing"),
     ("check", "mlock", "--invariant", "S99"), ("check", "/nowhere.py:Mine")],
)  # fmt: skip
def test_names_that_are_not_known_are_refused_with_those_that_are(
    run: Run, arguments: tuple[str, ...]
) -> None:
    error = run(*arguments).exception
    assert isinstance(error, UsageError)
    assert ("S11" if "--invariant" in arguments else "reference-timed") in error.hint


def test_an_interrupt_ends_with_what_was_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    shown = Watch.__call__

    def interrupting(self: Watch, states: int, level: int) -> bool:
        if level == 12:
            signal.raise_signal(signal.SIGINT)
        return shown(self, states, level)

    monkeypatch.setattr(Watch, "__call__", interrupting)
    result = run("check", "mlock")
    assert result.exit_code == 130
    assert f"BREAKS {VICTIM} in 8 steps" in result.output
    assert "INCOMPLETE: interrupted" in result.output
    assert run("trace", "quarantine").exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_goes_to_a_terminal_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not run("check", "quarantine").stderr
    monkeypatch.setattr(Watch, "_is_live", staticmethod(lambda: True))
    monkeypatch.setattr(spec_common, "EVERY", 0.0)
    result = run("check", "quarantine")
    assert re.search(r"quarantine on 7.x, IOMMU none: level \d+, [\d ]+ states, ", result.stderr)
    assert "level" not in result.stdout.split("states in")[0]


# -- the user's own ------------------------------------------------------------


def documented() -> tuple[str, str]:
    """The program of the documentation, and the line that makes it right."""
    program, line = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return program, line


def test_the_documented_example_is_wrong_and_the_documented_line_makes_it_right(
    run: Run, tmp_path: Path
) -> None:
    program, line = documented()
    assert len([each for each in program.splitlines() if each.strip()]) <= 30
    wrong, right = tmp_path / "my_driver.py", tmp_path / "my_other_driver.py"
    wrong.write_text(program)
    right.write_text(re.sub(r"^    return .*\n", line, program, flags=re.MULTILINE))
    result = run("check", f"{wrong}:MyDriver")
    assert result.exit_code == 1
    shown = re.search(r"\$ holdfast spec check my_driver.*\n((?s:.*?))```", PAGE.read_text())
    assert shown is not None
    for said in shown[1].splitlines():
        assert said.removesuffix("...").rstrip() in result.output
    output = run("check", f"{right}:MyDriver").output
    assert "HOLDS: every invariant" in output
    assert re.findall(r"MAY HANG, (L\d)", output) == ["L1", "L2", "L4"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("class Mine: pass", "not a subclass"),
        ("from holdfast.spec.strategy import Strategy\nclass Mine(Strategy): pass", "has no key"),
        ("", "has no Mine"),
    ],
)
def test_a_class_that_is_no_strategy_is_refused(
    run: Run, tmp_path: Path, text: str, what: str
) -> None:
    path = tmp_path / f"mine_{len(text)}.py"
    path.write_text(text)
    error = run("check", f"{path}:Mine").exception
    assert isinstance(error, BadTarget)
    assert what in str(error)


def test_the_documented_story_is_the_one_that_is_told(run: Run) -> None:
    output = run("check", "reference-timed").output
    shown = re.search(r"## Reading a story\n+```\n((?s:.*?))```", PAGE.read_text())
    assert shown is not None
    for said in shown[1].splitlines():
        assert said == "..." or f"{said}\n" in output


def test_the_documented_invariants_are_those_that_are_judged() -> None:
    rows = re.findall(r"^\| (S\S+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert dict(rows) == invariants.TEXTS
    rows = re.findall(r"^\| (L\S+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert dict(rows) == liveness.TEXTS


# -- trace ------------------------------------------------------------


def test_a_trace_goes_to_standard_output_by_default(run: Run) -> None:
    result = run("trace", "mlock")
    trace = Trace.loads(result.output)
    assert result.exit_code == 0
    assert (trace.strategy, trace.breaks, len(trace.steps)) == ("mlock", VICTIM, 8)
    assert trace.to_json() == json.loads(result.output)


def test_a_trace_is_drawn(run: Run, tmp_path: Path) -> None:
    picture, figures = tmp_path / "a.svg", tmp_path / "a.json"
    result = run("trace", "mlock", "--svg", str(picture))
    assert (result.exit_code, result.output) == (0, "")
    assert ET.fromstring(picture.read_text()).tag.endswith("svg")
    both = run("trace", "mlock", "--svg", str(picture), "--json", str(figures))
    assert (both.exit_code, both.output) == (0, "")
    assert Trace.loads(figures.read_text()).breaks == VICTIM


def test_no_story_is_exit_status_1_and_nothing_on_standard_output(run: Run) -> None:
    result = run("trace", "quarantine")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "does not break any invariant" in result.stderr


def test_a_file_that_cannot_be_written_is_named(run: Run, tmp_path: Path) -> None:
    error = run("trace", "mlock", "--svg", str(tmp_path / "no" / "a.svg")).exception
    assert isinstance(error, SystemFailure)
    assert "a.svg" in str(error)


# -- replay ------------------------------------------------------------


def test_a_story_that_reality_bears_out_is_exit_status_0(run: Run, story: Path) -> None:
    result = run("replay", str(story), "paced:edu")
    assert result.exit_code == 0
    assert re.search(
        r"process 1: [\d ]+ bytes of its memory were written by the card", result.output
    )
    assert "AGREES" in result.output


@pytest.mark.parametrize(
    ("outcome", "word", "status"),
    [
        (Outcome("mlock", VICTIM, "x", corrupted={"process 1": 512}), "AGREES", 0),
        (Outcome("mlock", VICTIM, "x"), "DISAGREES", 1),
        (Outcome("mlock", "S2", "x"), "NOT SEEN", 1),
    ],
)
def test_the_exit_status_says_whether_reality_agrees(
    run: Run, story: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, word: str, status: int
) -> None:
    asked: list[tuple[str, str]] = []

    def played(trace: Trace, target: str) -> Outcome:
        asked.append((trace.breaks, target))
        return outcome

    monkeypatch.setattr(replay, "run", played)
    result = run("replay", "-", "paced:edu", input=story.read_bytes())
    assert (result.exit_code, asked) == (status, [(VICTIM, "paced:edu")])
    assert result.output.splitlines()[-1].startswith(word)
    told = run("replay", str(story), "paced:edu", "--json")
    assert (told.exit_code, json.loads(told.output)["agrees"]) == (status, outcome.agrees)


ENDLESS_NUMBER = (
    b'{"format": "holdfast-trace-1", "strategy": 1, "profile": 1, "iommu": 1, "bounds": 1, '
    b'"breaks": 1, "start": {"a": 1e999}, "steps": []}'
)


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"format": "holdfast-trace-1"}',
     ENDLESS_NUMBER],
)  # fmt: skip
def test_what_is_no_trace_is_refused(run: Run, data: bytes) -> None:
    error = run("replay", "-", "paced:edu", input=data).exception
    assert isinstance(error, UsageError)
    assert "holdfast spec trace" in error.hint


def test_a_file_that_is_too_large_is_not_read(run: Run, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(LARGEST + 2)
    assert "more than 8 MiB" in str(run("replay", str(large), "paced:edu").exception)
    assert "no/such" in str(run("replay", "no/such", "paced:edu").exception)


def test_no_more_than_the_bound_is_read_of_an_endless_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size: int = -1) -> bytes:
            assert size > 0
            self.taken += size
            return bytes(size)

    endless = Endless()
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": endless}))
    with pytest.raises(UsageError):
        spec_common.read_trace("-")
    assert endless.taken == LARGEST + 1


@pytest.mark.parametrize("text", ["class Mine(\n", "import nothing_of_this_name\n", "1 / 0\n"])
def test_a_file_that_cannot_be_loaded_is_wrong_usage(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(BadTarget, match="cannot be loaded"):
        find(f"{file}:Mine")
