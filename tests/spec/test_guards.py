# SPDX-License-Identifier: Apache-2.0
"""Every guard is needed: without any one of them the specification finds a counterexample.

The tables are the ones that the keeper imports. A guard is deleted from them, everything is
explored as before, and a story must come out that ends in a breach of safety. (That there is none
with all of them in place is a cell of the table: ``test_verdicts.py``.)
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from holdfast.keeper import map_state, state
from holdfast.keeper.map_state import MapEvent, MapState
from holdfast.keeper.state import Fact
from holdfast.spec import tables
from holdfast.spec.explore import Explored, explore
from holdfast.spec.keeper import Holdfast
from holdfast.spec.model import StrategyModel
from holdfast.spec.setting import BOUNDS, Iommu, Profile, Setting
from holdfast.spec.tables import DRAIN, Tables
from holdfast.spec.trace import Trace, tell


def searched(tables: Tables, iommu: Iommu, *until: str) -> Explored:
    class Mutant(Holdfast):
        key = "holdfast-mutant"

    Mutant.tables = tables
    setting = Setting(Profile.NEW, iommu, BOUNDS["table"])
    return explore(StrategyModel(Mutant, setting), until=frozenset(until))


def story(found: Explored, invariant: str) -> Trace:
    return tell(found, invariant, strategy="mutant", profile="7.x", iommu="", bounds="table")


GUARDS = [
    # guard, IOMMU where its loss shows, what it breaks
    pytest.param((Fact.IDLE_CONFIRMED,), Iommu.NONE, "S1", id="idle confirmed"),
    pytest.param((Fact.STOP_ACKNOWLEDGED,), Iommu.NONE, "S1", id="stop acknowledged"),
    pytest.param((Fact.FLUSHED,), Iommu.NONE, "S1", id="flushed"),
    pytest.param((Fact.UNMAPPED_IN_FULL,), Iommu.STRICT, "S3", id="unmapped in full"),
    pytest.param((Fact.RESET_TRUSTED,), Iommu.NONE, "S1", id="reset trusted"),
    pytest.param((Fact.FUNCTION_GONE,), Iommu.NONE, "S1", id="function gone"),
    pytest.param((Fact.CANNOT_POST,), Iommu.NONE, "S1", id="both death signals"),
    pytest.param((Fact.CANNOT_POST,), Iommu.STRICT, "S4'", id="both death signals, strict"),
    pytest.param((Fact.IOVAS_RETIRED,), Iommu.STRICT, "S1", id="IOVA retired"),
    pytest.param(
        (Fact.STRICTLY_UNMAPPED, Fact.IOVAS_RETIRED), Iommu.NONE, "S1", id="strictly unmapped"
    ),
]


@pytest.mark.parametrize(("facts", "iommu", "breaks"), GUARDS)
def test_without_a_guard_there_is_a_counterexample(
    facts: tuple[Fact, ...], iommu: Iommu, breaks: str
) -> None:
    found = searched(Tables.of(DRAIN).without(*facts), iommu, breaks)
    assert breaks in found.breaches
    told = story(found, breaks)
    assert len(told.steps) == found.breaches[breaks].steps
    assert told.steps[-1].event in ("land", "step", "map", "bme_on")


def test_without_the_anchors_acknowledgement_before_the_map_there_is_a_counterexample() -> None:
    found = searched(Tables.of(DRAIN).without_anchor(), Iommu.NONE, "S1")
    told = story(found, "S1")
    events = [step.event for step in told.steps]
    assert "k_crash" in events
    assert "anchor_ack" not in events


@pytest.mark.parametrize("fact", list(Fact))
def test_every_fact_of_the_keeper_is_asked_for_somewhere(fact: Fact) -> None:
    whole = Tables.of(DRAIN)
    assert whole.asks_for(fact)
    assert not whole.without(fact).asks_for(fact)


def test_every_deletable_guard_of_a_release_edge_is_among_those_deleted_here() -> None:
    deleted = {fact for case in GUARDS for fact in case.values[0]}  # type: ignore[union-attr]
    named = {fact for row in state.TABLE for fact in row.needs}
    named |= {fact for gate in state.RELEASE_GATE.values() for way in gate.ways for fact in way}
    assert deleted == named == set(Fact)


def test_the_tables_explored_are_the_very_objects_that_the_keeper_uses() -> None:
    explored = Tables.of(DRAIN)
    assert explored.rows is state.TABLE
    assert explored.mappings is map_state.MAP_TABLE
    assert explored.gate is next(
        gate for policy, gate in state.RELEASE_GATE.items() if policy == DRAIN
    )
    assert Holdfast.tables.rows is state.TABLE


def test_the_specification_writes_down_no_row_of_its_own() -> None:
    """But for the one that leaves the anchor out, which is a mutation."""
    room = Path(tables.__file__).parent
    made = [
        f"{path.name}:{node.lineno}"
        for path in room.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("Row", "Gate", "Machine")
    ]
    assert [each.partition(":")[0] for each in made] == ["tables.py"], "Gate, in without()"
    assert (MapState.HELD, MapEvent.RESERVE, MapState.RESERVED) not in map_state.MAP_TABLE
