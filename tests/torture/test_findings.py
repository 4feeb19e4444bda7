# SPDX-License-Identifier: Apache-2.0
"""What a finding means, and what is told of it: figures, report, trace."""

from __future__ import annotations

import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from holdfast.torture.lane import Record
from holdfast.torture.report import write
from holdfast.torture.run import Campaign
from holdfast.torture.schedule import Unit
from holdfast.torture.tally import problems_of, tally
from holdfast.torture.unit import Found

NAMES = {
    "policy", "kills", "mid_dma_kills", "corrupted", "leaked_bytes", "leaked_fds", "hung_leases",
    "quarantined_bytes", "unaccounted_bytes", "completed_after_death", "kill_to_quiet_ms",
    "quiet_to_released_ms",
}  # fmt: skip
LINE = "drain/arena/shared/none/3 client.posted=client client.alloc=keeper client.wait=function"
MS = 1_000_000


def unit(line: str = LINE) -> Unit:
    return Unit.parse("emu:xdma", line, 1)


def record(case: int, **more: Any) -> dict[str, Any]:
    """The record of a case that went as it should, with some things other than they should be."""
    told = Record(case, 0, str(unit().alone(unit().cases[case])), pid=40 + case, lease=case + 1)
    told.started_ns, told.ended_ns = 10 * MS, 20 * MS
    told.released_ns, told.judged_ns = 40 * MS, 90 * MS
    told.fatal = unit().cases[case].fatal
    strike = unit().cases[case].strikes[0]
    told.hits = [{"step": strike.step, "at_ns": 18 * MS, "by": 7, "killed": sorted(strike.kill)}]
    told.signal = 9 if "client" in strike.kill else 0
    return asdict(told) | more


def lease(number: int) -> dict[str, Any]:
    log = [
        ("alive", 12 * MS, "opened"), ("frozen", 21 * MS, "its process died"),
        ("draining", 22 * MS, "3 in flight"), ("quiet", 30 * MS, "idle"),
        ("released", 31 * MS, "4096 bytes"),
    ]  # fmt: skip
    return {
        "lease": number, "pid": 39 + number, "state": "released", "in_flight_at_death": 3,
        "completed_after_death": True, "log": log,
    }  # fmt: skip


def found(*records: dict[str, Any], line: str = LINE, **more: Any) -> Found:
    setting = unit(line).setting
    made = Found(line, 1, str(setting.policy), setting.memory, setting.access, setting.faults)
    made.records = list(records)
    made.leases = [lease(told["lease"]) for told in records]
    made.happened = [
        {"what": "start", "at_ns": 5 * MS, "keeper": 3},
        {"what": "succession", "at_ns": 30 * MS, "keeper": 4},
    ]
    made.started_ns = 5 * MS
    for name, value in more.items():
        setattr(made, name, value)
    return made


GOOD = [record(0), record(1), record(2, exit=70, error="DeviceGone: the function went away")]


def test_a_campaign_without_findings_has_the_published_names() -> None:
    [told] = tally([unit()], [found(*GOOD)])
    assert not told.problems
    figures = told.to_json()
    assert set(figures) >= NAMES
    assert figures["kills"] == 3
    assert figures["mid_dma_kills"] == 1  # the one client that was killed
    assert figures["kill_to_quiet_ms"]["p50"] == 12
    assert figures["quiet_to_released_ms"]["max"] == 1
    assert figures["keeper_back_ms"]["p50"] == 12
    assert figures["sigkills"] == {
        "client": 1, "keeper": 1, "anchor": 0, "function": 1, "standby": 0,
    }  # fmt: skip
    assert figures["steps"]["client.posted"] == {"armed": 1, "hit": 1, "killed": {"client": 1}}
    json.dumps(figures)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (record(0, foreign=64), "64 foreign bytes"),
        (record(0, residue=8), "8 bytes of somebody else"),
        (record(0, hung=True), "never released"),
        (record(0, quarantined=True), "quarantine"),
        (record(0, hits=[]), "died of signal 9"),
        (record(0, signal=11), "died of signal 11"),
        (record(1, error="KeeperGone: hung up", exit=70), "KeeperGone"),
        (record(1, exit=70), "status 70"),
        (record(1, late=True, signal=9), "came to no end"),
    ],
)
def test_what_must_not_be_is_a_problem_with_a_line(wrong: dict[str, Any], says: str) -> None:
    [problem] = problems_of(unit(), found(wrong))
    assert says in problem.what
    assert Unit.parse("emu:xdma", problem.line).cases == (unit().cases[wrong["case"]],)


@pytest.mark.parametrize(
    "more",
    [
        {"leaked_bytes": 4096}, {"leaked_fds": 1}, {"hung_leases": 1}, {"unaccounted_bytes": 1},
        {"left_processes": 1}, {"quarantined_bytes": 1}, {"problem": "no keeper came up"},
        {"survivor": {"rounds": 3, "error": "KeeperGone"}}, {"survivor": {"wrong": 1}},
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_whole_stack_is_a_problem(more: dict[str, Any]) -> None:
    [problem] = problems_of(unit(), found(*GOOD, **more))
    assert problem.case is None
    assert Unit.parse("emu:xdma", problem.line) == Unit.parse("emu:xdma", LINE)


def test_a_function_that_breaks_promises_may_quarantine_but_not_corrupt() -> None:
    line = LINE.replace("none", "hang@3")
    bad = record(0, quarantined=True, late=True, error="DeviceReset: it was reset")
    assert not problems_of(unit(line), found(bad, line=line, quarantined_bytes=4096))
    assert problems_of(unit(line), found(record(0, foreign=1), line=line))


def test_a_step_that_is_never_reached_is_a_problem() -> None:
    line = "drain/arena/shared/none/3 " + " ".join(["client.posted=client"] * 9)
    records = [record(0, hits=[], missed=1, signal=0) | {"case": at} for at in range(9)]
    [told] = tally([unit(line)], [found(*records, line=line)])
    assert [problem.what for problem in told.problems] == [
        "step client.posted was armed 9 times, never reached"
    ]


# -- report and trace ------------------------------------------------------------


VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects what a page has, and checks that its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.outside += [f"{name}={value}" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def written(tmp_path: Path) -> Path:
    bad = record(1, error="<script>alert('&')</script>", exit=70)
    every = [found(record(0), bad, GOOD[2])]
    campaign = Campaign("emu:xdma", 1, [unit()], every, tally([unit()], every))
    campaign.shrunk = [{"unit": 1, "line": str(unit().alone(unit().cases[1])), "runs": 9}]
    write(campaign, tmp_path / "new" / "report")
    return tmp_path / "new" / "report"


def test_the_report_is_one_page_that_needs_nothing_else(written: Path) -> None:
    text = (written / "index.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open
    assert not page.outside
    assert "http" not in text
    assert "url(" not in text
    assert "script" not in page.count  # what a process said is text, whatever it said
    assert page.count["svg"] >= 3
    assert "client.alloc=keeper" in text
    assert "Failing cases (1)" in text


def test_the_trace_is_what_trace_viewers_read(written: Path) -> None:
    trace = json.loads((written / "trace.json").read_text())
    every = trace["traceEvents"]
    assert {event["ph"] for event in every} == {"M", "X", "i"}
    for event in every:
        assert {"name", "ph", "pid", "tid"} <= set(event)
        if event["ph"] != "M":
            assert event["ts"] > 0
        if event["ph"] == "X":
            assert event["dur"] > 0
        if event["ph"] == "i":
            assert event["s"] in ("t", "p", "g")
    names = {event["name"] for event in every}
    assert {"case 0", "draining", "quiet", "client at client.posted", "succession"} <= names


def test_the_figures_are_written_beside_it(written: Path) -> None:
    figures = json.loads((written / "figures.json").read_text())
    [policy] = figures["policies"]
    assert set(policy) >= NAMES
    assert figures["shrunk"][0]["runs"] == 9
