# SPDX-License-Identifier: Apache-2.0
"""The examples and the README's program run as printed, each in a fresh interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEEPER_LIVES_ON = "ignore:subprocess:ResourceWarning"
"""The embedded keeper outlives the program that started it, on purpose."""
LIMIT = 60.0
"""Seconds until a hanging example is killed; none takes more than a few."""


def run(program: Path, runtime: Path) -> str:
    """Run a program with a runtime directory of its own, so that no keeper is shared."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "HOLDFAST_RUNTIME_DIR": str(runtime),
        "HOLDFAST_IDLE": "0.2",
        "PYTHONPATH": path,
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", KEEPER_LIVES_ON, str(program)],
        cwd=program.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert not done.stderr
    return done.stdout


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A private directory, its path short enough for sockets (unix(7)); waits for its keepers."""
    with tempfile.TemporaryDirectory(prefix="hf-") as name:
        directory = Path(name)
        yield directory
        deadline = time.monotonic() + LIMIT
        while left := list(directory.glob("*.sock")):
            assert time.monotonic() < deadline, f"keepers that do not end: {left}"
            time.sleep(0.02)  # they are no children of ours: there is nothing to wait on


@pytest.mark.parametrize(
    ("name", "tells"),
    [
        ("hello_dma", "the same 4194304 bytes came back"),
        ("your_own_array", "not a byte beside them"),
        ("two_processes", "every byte of the dead process's transfer is on the card"),
        ("digitiser", "bytes missing"),
        ("own_device", "8388608 bytes counted"),
    ],
)
def test_example_tells_its_story(name: str, tells: str, runtime: Path) -> None:
    assert tells in run(ROOT / "examples" / f"{name}.py", runtime)


def test_every_example_is_run() -> None:
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert found == {"hello_dma", "your_own_array", "two_processes", "digitiser", "own_device"}


def test_the_readme_program_runs_as_printed(tmp_path: Path, runtime: Path) -> None:
    printed = (ROOT / "README.md").read_text()
    programs = re.findall(r"^```python\n(.*?)^```", printed, re.MULTILINE | re.DOTALL)
    assert len(programs) == 1
    assert len(programs[0].splitlines()) <= 20
    program = tmp_path / "readme.py"
    program.write_text(programs[0])
    assert run(program, runtime).splitlines()[-1] == "1048576 samples went to the card and back"
