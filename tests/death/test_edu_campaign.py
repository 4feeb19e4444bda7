# SPDX-License-Identifier: Apache-2.0
"""The kill campaign of edu devices, on the emulated one: it passes, and it can fail.

On real kernels tests/vm/guest/test_death_campaign.py runs the same.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from holdfast.cli.demo import command, judge
from holdfast.errors import UsageError
from holdfast.torture import edu_actors, edu_campaign
from holdfast.torture.actors import FOREIGN
from holdfast.torture.campaign import Outcome
from holdfast.torture.edu_actors import WINDOW, Bystander, Started
from holdfast.torture.edu_campaign import policies, run_policy
from holdfast.torture.stack import Stack
from holdfast.values import Policy

FORKS = [
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
TARGET = "emu:edu"
KILLS = 6
LAB = edu_campaign.LAB_VARIABLE


class TestOnTheEmulatedDevice:
    pytestmark = FORKS

    def test_the_demonstration_passes_and_writes_the_figures_of_the_other_one(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "figures.json"
        arguments = ["--target", TARGET, "--kills", str(KILLS), "--json", str(path)]
        told = CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert told.exit_code == 0, told.output
        assert "only the negative control corrupts" in told.output
        rows = {row["policy"]: row for row in json.loads(path.read_text())["policies"]}
        assert set(rows) == {"release", "drain", "revoke"}
        for row in rows.values():
            assert set(row) == set(Outcome("").to_json())
            assert row["kills"] == KILLS
            assert row["victims_on_recycled_frames"] > 0
        for policy in ("drain", "revoke"):
            assert rows[policy]["corrupted"] == 0
        assert rows["drain"]["completed_after_death"] == rows["drain"]["mid_dma_kills"] > 0
        assert rows["revoke"]["completed_after_death"] == 0
        assert rows["release"]["corrupted"] > 0

    def test_without_the_guard_drain_corrupts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(edu_campaign.MOMENTS, Policy.DRAIN, 0.1)
        script = Path(__file__).with_name("unguarded.py")
        serve = [sys.executable, str(script), "serve"]
        outcome = run_policy(Policy.DRAIN, TARGET, KILLS, seed=1, serve=serve)
        assert outcome.corrupted > 0
        assert any("corrupted" in problem for problem in judge(outcome, edu_campaign.HITS))

    def test_another_device_is_refused(self) -> None:
        with pytest.raises(UsageError, match="'xdma', not 'edu'"):
            run_policy(Policy.DRAIN, "emu:xdma", 1, seed=1)

    def test_the_card_gives_what_it_was_filled_with(self) -> None:
        import holdfast

        with Stack(TARGET):
            edu_actors.fill_card(TARGET)
            with holdfast.open(TARGET, timeout=10.0) as card:
                into = card.alloc(edu_actors.NBYTES)
                edu_actors.engine_of(card).from_card(into).wait(10.0)
                assert np.all(into.array == FOREIGN)


def test_the_negative_control_is_run_only_where_it_shows_something_and_harms_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guarded = (Policy.DRAIN, Policy.REVOKE)
    monkeypatch.delenv(LAB, raising=False)
    assert policies("emu:edu") == (Policy.RELEASE, *guarded)
    assert policies("pci:0000:00:03.0") == guarded
    assert policies("pci:0000:00:03.0?backend=iommufd") == guarded
    assert policies("pci:0000:00:03.0?backend=uio") == guarded
    monkeypatch.setenv(LAB, "1")
    assert policies("pci:0000:00:03.0?backend=uio") == (Policy.RELEASE, *guarded)
    assert policies("pci:0000:00:03.0?backend=type1") == guarded


@pytest.mark.parametrize("backend", ["type1", "uio"])
def test_the_demonstration_says_why_the_control_is_left_out(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LAB, raising=False)
    target = f"pci:0000:00:03.0?backend={backend}"
    arguments = ["--target", target, "--policy", "release"]
    told = CliRunner().invoke(command, arguments)
    assert isinstance(told.exception, UsageError)
    assert "'release' is left out" in told.output
    assert ("strict IOMMU" in told.output) == (backend == "type1")


def test_a_kill_counts_as_a_hit_only_while_the_write_is_certainly_to_come() -> None:
    window = int(WINDOW * 1e9)
    started = Started(iova=0, lease=1, frame=0, before_ns=1000, posted_ns=2000)
    assert not started.under_way(1999)
    assert started.under_way(2000)
    assert started.under_way(1000 + window - 1)
    assert not started.under_way(1000 + window)


def test_a_bystander_holds_its_byte_everywhere_and_leaves_nothing_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    allowed = os.sched_getaffinity(0)
    with Bystander(7) as bystander:
        pieces = (*bystander.arrays, *bystander.drained())
        processors = min(len(allowed), edu_actors.MOST_PROCESSORS)
        assert len(pieces) == 2 * processors
        assert all(np.all(piece == 7) for piece in pieces)
        assert sum(piece.nbytes for piece in pieces) >= processors * edu_actors.ANONYMOUS
    assert os.sched_getaffinity(0) == allowed
    assert set(os.listdir("/proc/self/fd")) == before
