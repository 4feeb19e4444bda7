# SPDX-License-Identifier: Apache-2.0
"""How long deaths and pins take on a real kernel: printed, not judged.

Runs inside a lab guest, where a processor is emulated and the host is busy: ratios say more than
times, and neither is worth a failure. Show the figures with ``-s``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from holdfast.bench import hardware
from holdfast.cli.bench import command
from holdfast.torture import edu_scene as scene

pytestmark = [
    pytest.mark.guest,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

EXPECTED = set(filter(None, os.environ.get("HOLDFAST_LAB_EXPECT", "").split(",")))


@pytest.fixture(params=["type1", "iommufd"])
def target(request: pytest.FixtureRequest) -> str:
    """An edu on the root bus by one backend."""
    backend = str(request.param)
    for found in scene.edus():
        if found.bdf.bus == 0 and scene.alone(found) and backend in scene.offered(found):
            return f"pci:{found.bdf}?backend={backend}"
    if backend in EXPECTED:
        pytest.fail(f"no edu for {backend}, though it is expected here")
    pytest.skip(f"no edu for {backend} here")


def test_every_figure_of_a_real_function_is_there(target: str, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--target", target, "--quick", "--json", str(path)]
    told = CliRunner().invoke(command, arguments, catch_exceptions=False)
    sys.stdout.write(f"{target}\n{told.output}\n")
    assert told.exit_code == 0, told.output
    figures: dict[str, Any] = json.loads(path.read_text())
    rows = {row["name"]: row for row in figures["results"]}
    assert set(rows) == set(hardware.FIGURES)
    for name, row in rows.items():
        sys.stdout.write(f"{name}: {json.dumps(row['detail'])}\n")
        assert row["value"] > 0
        assert row["ratio"] > 0
        assert row["unit"] == "ms"
