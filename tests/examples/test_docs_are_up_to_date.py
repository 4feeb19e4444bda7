# SPDX-License-Identifier: Apache-2.0
"""What the documentation takes from the code is what the code says now."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from holdfast import cli
from holdfast.keeper.state import TABLE, State
from holdfast.spec.catalogue import STRATEGIES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def draw_states() -> ModuleType:
    return script("draw_states")


def test_the_drawn_death_protocol_is_the_one_in_force(draw_states: ModuleType) -> None:
    drawn = (DOCS / "death-protocol-states.md").read_text()
    assert drawn == draw_states.render(), "run: python docs/draw_states.py"


def test_every_edge_is_drawn_once(draw_states: ModuleType) -> None:
    lines = draw_states.diagram()
    assert [line for line in lines if line and not line.startswith(" ")] == [
        state.upper() for state in draw_states.LADDER
    ]
    sideways = sum("├─" in line for line in lines)
    downwards = sum(line == "  ▼" for line in lines)
    assert sideways + downwards == len(TABLE)
    assert set(draw_states.LADDER) == set(State)


def test_the_drawn_table_of_strategies_has_the_verdicts_that_are_expected() -> None:
    draw_answer = script("draw_answer")
    page = draw_answer.PAGE.read_text()
    assert page == draw_answer.render(page), "run: python docs/draw_answer.py"
    assert len(draw_answer.table()) == 2 + len(STRATEGIES)


def test_the_documented_exit_codes_are_those_of_the_command_line() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    for fault, code in cli.EXIT_CODES.items():
        assert re.search(rf"^\| {code} \|.*`{fault}`", text, re.MULTILINE), (fault, code)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_documentation_builds_without_warnings(tmp_path: Path) -> None:
    for package in ("sphinx", "furo", "myst_parser"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra: docs)")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", f"{tmp_path}/trees"]
    done = subprocess.run(
        [*build, str(DOCS), f"{tmp_path}/html"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
