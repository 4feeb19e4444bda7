# SPDX-License-Identifier: Apache-2.0
"""The demonstration: it passes as shipped, and fails when the guard is taken out of ``drain``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli.demo import judge
from holdfast.torture.campaign import run_policy
from holdfast.values import Policy

pytestmark = [
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
KILLS = 24
FIELDS = {
    "policy", "kills", "mid_dma_kills", "corrupted", "leaked_bytes", "leaked_fds", "hung_leases",
    "quarantined_bytes", "unaccounted_bytes", "completed_after_death", "kill_to_quiet_ms",
    "quiet_to_released_ms",
}  # fmt: skip


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the command itself writes, by policy."""
    path = tmp_path_factory.mktemp("demo") / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "holdfast", "demo", "--kills", str(KILLS), "--json", str(path)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "only the negative control corrupts" in done.stdout
    told = json.loads(path.read_text())
    return {row["policy"]: row for row in told["policies"]}


def test_every_policy_reports_every_figure(figures: dict[str, dict[str, Any]]) -> None:
    assert set(figures) == {"release", "drain", "revoke"}
    for row in figures.values():
        assert set(row) >= FIELDS
        assert row["kills"] == KILLS
        for name in ("kill_to_quiet_ms", "quiet_to_released_ms"):
            assert set(row[name]) == {"p50", "p99", "max"}
            assert 0 <= row[name]["p50"] <= row[name]["p99"] <= row[name]["max"]


@pytest.mark.parametrize("policy", ["drain", "revoke"])
def test_a_guarded_policy_corrupts_leaks_and_hangs_nothing(
    figures: dict[str, dict[str, Any]], policy: str
) -> None:
    row = figures[policy]
    for name in (
        "corrupted", "leaked_bytes", "leaked_fds", "hung_leases", "quarantined_bytes",
        "unaccounted_bytes",
    ):  # fmt: skip
        assert row[name] == 0, name
    assert row["mid_dma_kills"] >= 0.8 * KILLS


def test_drain_completes_what_dead_processes_posted(figures: dict[str, dict[str, Any]]) -> None:
    row = figures["drain"]
    assert row["completed_after_death"] >= 0.9 * row["mid_dma_kills"] > 0
    assert figures["revoke"]["completed_after_death"] == 0


def test_the_negative_control_corrupts(figures: dict[str, dict[str, Any]]) -> None:
    assert figures["release"]["corrupted"] > 0


def test_without_the_guard_drain_corrupts_and_the_demonstration_says_so() -> None:
    script = Path(__file__).with_name("unguarded.py")
    outcome = run_policy(Policy.DRAIN, KILLS, seed=1, serve=[sys.executable, str(script), "serve"])
    assert outcome.policy == "drain"
    assert outcome.corrupted > 0
    assert any("corrupted" in problem for problem in judge(outcome))
