# SPDX-License-Identifier: Apache-2.0
"""The search is checked against SPIN: a second model of the core, in core.pml, by another checker.

Equal numbers of states and of steps say that nothing is lost or invented by rules, packing or
store; equal lengths of the shortest stories, that breadth first is what it says.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from holdfast import spec
from holdfast.spec.explore import explore
from holdfast.spec.layout import Field
from holdfast.spec.model import StrategyModel
from holdfast.spec.setting import BOUNDS, Bounds, Setting
from holdfast.spec.strategies import Counted, CountedTimed, Mlock
from holdfast.spec.strategy import Strategy

CORE = Path(spec.__file__).with_name("core.pml")
REQUIRED = "HOLDFAST_LAB_REQUIRED"
"""Environment variable: where it is set, a SPIN that cannot be had is a failure."""


class Locked(Mlock):
    """Without what only paging asks for. SPIN leaves out a variable that nobody reads, too."""

    def fields(self) -> Iterator[Field]:
        return (field for field in super().fields() if field.name != "locked")


STRATEGIES: dict[str, type[Strategy]] = {
    "MLOCK": Locked, "WAITS": Counted, "TIMEOUT": CountedTimed,
}  # fmt: skip
"""By the names that core.pml has for them."""
STATES = {"S2": "S2", "S4": "S4", "S6": "S6", "S9": "S9"}
STEPS = {"S1": "S1", "S1 with a victim": "S1_VICTIM", "S3": "S3", "S7": "S7"}
ASKED = STATES | STEPS
"""Names of invariants there, by those here: of states, and of steps."""


@dataclass(frozen=True)
class Answer:
    """What a complete search found; with SPIN, ``broken`` is what it was asked for."""

    states: int
    steps: int
    depth: int
    """Steps to the state that is farthest from the start, or to the breach at which it ended."""
    broken: dict[str, int]


def need_spin() -> None:
    """SPIN and a compiler are here; skips, or fails where that is wanted, with one line.

    No fixture: pytest folds skips of one place, and takes a test for the place of its fixtures'.
    """
    missing = [name for name in ("spin", "gcc") if shutil.which(name) is None]
    if not missing:
        header = ["gcc", "-fsyntax-only", "-include", "stdio.h", "-x", "c", "/dev/null"]
        if subprocess.run(header, capture_output=True, check=False).returncode:
            missing = ["libc6-dev"]
    if missing:
        reason = f"no {' and no '.join(missing)} on this machine; apt-get install has them"
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)


def by_spin(work: Path, bounds: Bounds, *defines: str, ask: str = "0") -> Answer:
    """Search core.pml; the first breach of what is asked ends it."""
    flags = [*defines, f"ASK={ask}", f"DESCRIPTORS={bounds.descriptors}", f"KILLS={bounds.kills}"]
    # What -o1 to -o3 leave out or merge is what is counted here.
    generate = ["spin", "-o1", "-o2", "-o3", *(f"-D{flag}" for flag in flags), "-a", str(CORE)]
    told(generate, work)
    told(["gcc", "-w", "-DBFS", "-DNOREDUCE", "-o", "pan", "pan.c"], work)
    output = told(["./pan"], work)

    def number(pattern: str) -> int:
        found = re.search(pattern, output)
        assert found, output
        return int(found[1])

    broken = {}
    if "errors: 0" not in output:
        assert "assertion violated" in output, output
        assert "errors: 1" in output, output
        # A step that fails is not counted. A state is found by a look, which is one more.
        broken[ask] = number(r"\(at depth (\d+)\)") + (ask in STEPS.values())
    return Answer(
        states=number(r"(\d+) states, stored"),
        steps=number(r"(\d+) transitions \(= stored") - 1,  # the initial state counts as one
        depth=number(r"depth reached (\d+)"),
        broken=broken,
    )


def told(command: list[str], work: Path) -> str:
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@functools.cache
def by_ourselves(name: str, bounds: Bounds) -> Answer:
    """Search the model in Python. A story goes on after a breach, as SPIN's do."""
    model = StrategyModel(STRATEGIES[name], Setting(bounds=bounds))
    model.final = frozenset()
    found = explore(model)
    assert found.complete
    broken = {breach.invariant: breach.steps for breach in found.breaches.values()}
    # The last level is empty.
    return Answer(found.states, found.steps, len(found.levels) - 2, broken)


CORE_BOUNDS = BOUNDS["core"]
SMALL = replace(CORE_BOUNDS, descriptors=1, kills=1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_states_steps_and_what_is_never_broken_are_those_that_spin_finds(
    name: str, tmp_path: Path
) -> None:
    need_spin()
    ours = by_ourselves(name, CORE_BOUNDS)
    kept = "+".join(theirs for mine, theirs in ASKED.items() if mine not in ours.broken)
    spins = by_spin(tmp_path, CORE_BOUNDS, name, ask=kept)
    assert spins == replace(ours, broken={})


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_shortest_breach_of_each_invariant_is_as_long_as_that_of_spin(
    name: str, tmp_path: Path
) -> None:
    need_spin()
    ours = by_ourselves(name, SMALL)
    assert set(ours.broken) <= set(ASKED)
    assert bool(ours.broken) == (name != "WAITS")
    for mine, steps in ours.broken.items():
        asked = ASKED[mine]
        assert by_spin(tmp_path, SMALL, name, ask=asked).broken == {asked: steps}, mine


@pytest.mark.parametrize("name", STRATEGIES)
def test_renaming_frames_and_processes_saves_states_and_changes_no_verdict(name: str) -> None:
    plain = by_ourselves(name, SMALL)
    renamed = by_ourselves(name, replace(SMALL, symmetry=True))
    assert renamed.broken == plain.broken
    assert renamed.depth == plain.depth
    # Two frames and two processes: at most four states are one.
    assert plain.states / 4 <= renamed.states < plain.states / 3


def test_a_missing_read_would_be_found(tmp_path: Path) -> None:
    """A negative control: the verdict changes, and the states are more."""
    need_spin()
    ours = by_ourselves("WAITS", SMALL)
    assert not ours.broken
    assert by_spin(tmp_path, SMALL, "WAITS", "NO_READ", ask="S1").broken
    assert by_spin(tmp_path, SMALL, "WAITS", "NO_READ").states > ours.states


def test_a_rule_that_is_too_lax_would_be_found(tmp_path: Path) -> None:
    """Another: no verdict changes, nor the number of states. That of steps does."""
    need_spin()
    everything = "+".join(ASKED.values())
    ours = by_ourselves("WAITS", SMALL)
    assert by_spin(tmp_path, SMALL, "WAITS", ask=everything) == ours
    lax = by_spin(tmp_path, SMALL, "WAITS", "DEAD_POSTS", ask=everything)
    assert (lax.states, lax.broken) == (ours.states, {})
    assert lax.steps > ours.steps
