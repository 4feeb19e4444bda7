# SPDX-License-Identifier: Apache-2.0
"""A slice of the torture campaign: every role dies, nothing is wrong, and the judge can see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdfast.steps import ROLES

pytestmark = pytest.mark.alone
KILLS = 60


def torture(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "holdfast", "torture", "--no-shrink", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A short campaign as the command runs it: its JSON, and its report's directory."""
    report = tmp_path_factory.mktemp("torture")
    arguments = [
        "emu:xdma",
        "--kills",
        str(KILLS),
        "--seed",
        "7",
        "--json",
        "--report",
        str(report),
    ]
    done = torture(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout), report


def test_nothing_is_corrupted_leaked_or_left_hanging(campaign: tuple[dict[str, Any], Path]) -> None:
    told, _ = campaign
    assert sum(row["cases"] for row in told["policies"]) == KILLS
    for row in told["policies"]:
        for name in (
            "corrupted", "leaked_bytes", "leaked_fds", "hung_leases", "unaccounted_bytes",
            "quarantined_bytes", "left_processes", "client_errors", "survivor_errors", "residue",
        ):  # fmt: skip
            assert row[name] == 0, name
        assert not row["problems"]


def test_somebody_of_every_role_was_killed(campaign: tuple[dict[str, Any], Path]) -> None:
    told, _ = campaign
    for role in ROLES:
        assert sum(row["sigkills"][role] for row in told["policies"]) > 0, role


def test_survivors_went_on_all_the_time(campaign: tuple[dict[str, Any], Path]) -> None:
    assert sum(row["survivor_rounds"] for row in campaign[0]["policies"]) > 0


def test_the_negative_control_was_found_corrupt(campaign: tuple[dict[str, Any], Path]) -> None:
    assert campaign[0]["control"]["corrupted"] > 0


def test_report_and_trace_were_written(campaign: tuple[dict[str, Any], Path]) -> None:
    _, report = campaign
    assert "<svg" in (report / "index.html").read_text(encoding="utf-8")
    assert json.loads((report / "trace.json").read_text())["traceEvents"]


def test_a_campaign_without_the_guard_fails_and_says_how_to_replay_it() -> None:
    done = torture(
        "emu:xdma?link_rate=4M", "--kills", "6", "--policy", "release", "--faults", "none",
        "--steps", "client.doorbell", "--actors", "client",
    )  # fmt: skip
    assert done.returncode == 1
    assert "foreign bytes in a victim's memory" in done.stdout
    assert "--replay 'release/arena/shared/none/1 client.doorbell" in done.stdout


def test_a_printed_line_can_be_replayed() -> None:
    line = "drain/arena/shared/none/1 client.posted#2=client client.alloc.mapped=client"
    done = torture("emu:xdma", "--replay", line, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads(done.stdout)["policies"]
    assert row["sigkills"]["client"] == 2
    assert row["steps"]["client.posted"] == {"armed": 1, "hit": 1, "killed": {"client": 1}}
