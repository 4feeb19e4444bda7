# SPDX-License-Identifier: Apache-2.0
"""Every bench, quick, on a stack of its own; and a bench whose data was spoiled on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from holdfast.bench import runner
from holdfast.bench.plan import QUICK, Run
from holdfast.bench.result import Result
from holdfast.bench.rounds import run_rounds
from holdfast.bench.traffic import Bulk, Scattered, bulk_result
from holdfast.cli.bench import command
from holdfast.regs.xdma import BYPASS_BAR, Direction

pytestmark = pytest.mark.alone

MOVING = {"dma_h2c", "dma_c2h", "sg_h2c", "sg_c2h", "post_256", "post_32"}


def test_a_quick_run_of_everything_gives_well_formed_figures(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    told = CliRunner().invoke(
        command, ["--quick", "--json", str(path)], env={"COLUMNS": "200"}, catch_exceptions=False
    )
    assert told.exit_code == 0, told.output
    figures: dict[str, Any] = json.loads(path.read_text())
    assert figures["quick"] is True
    assert figures["verified"] is True
    results = {row["name"]: row for row in figures["results"]}
    assert set(results) == set(runner.FIGURES)
    for name, row in results.items():
        assert set(row) == {
            "name", "value", "unit", "ratio", "peer", "goal", "met", "verified", "detail",
        }  # fmt: skip
        assert isinstance(row["value"], float)
        assert row["ratio"] is None or row["ratio"] > 0
        assert (row["goal"] is None) == (row["met"] is None)
        assert row["verified"] is True or name not in MOVING
        assert name in told.output
    assert results["dma_h2c"]["detail"]["bytes"] == QUICK.nbytes


class SpoiledBulk(Bulk):
    """A bulk transfer after which one byte of the destination is not what was sent."""

    def contenders(self) -> Mapping[str, Callable[[], None]]:
        moves = dict(super().contenders())

        def spoiled() -> None:
            moves["deep"]()
            self._ends[1][self.nbytes // 2] ^= 1

        return {**moves, "deep": spoiled}


@pytest.mark.parametrize("direction", list(Direction))
def test_a_spoiled_byte_makes_the_command_fail(
    direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"dma_{direction.name.lower()}"

    def spoiled(run: Run) -> list[Result]:
        with run.open() as card:
            return [bulk_result(name, run_rounds(SpoiledBulk(card, direction, 1 << 20), 1))]

    monkeypatch.setitem(runner.BENCHES, name, spoiled)
    told = CliRunner().invoke(
        command, ["--quick", "--only", name], env={"COLUMNS": "200"}, catch_exceptions=False
    )
    assert told.exit_code == 1
    assert "WRONG DATA" in told.output
    assert f"FAILED: wrong data in {name}" in told.output


def test_a_byte_that_lands_between_the_pieces_is_found() -> None:
    with Run(QUICK) as run, run.open() as card:
        work = Scattered(card, Direction.C2H, 1 << 20, run.peer)
        work.refresh()
        work.clear()
        work.contenders()["sg"]()
        assert work.verify("sg")
        gap = int(np.flatnonzero(work._image == 0)[0])
        work._host[gap] ^= 1
        assert not work.verify("sg")


def test_a_transfer_that_never_ran_is_found() -> None:
    with Run(QUICK) as run, run.open() as card:
        work = Scattered(card, Direction.H2C, 1 << 20, run.peer)
        work.refresh()
        work.clear()
        assert not work.verify("sg")
        assert not card.bars[BYPASS_BAR].view(0, 1 << 20).any()
