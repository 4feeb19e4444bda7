# SPDX-License-Identifier: Apache-2.0
"""The table: every strategy on every machine comes to the verdict that is expected of it."""

from __future__ import annotations

import pytest

from holdfast.spec import table
from holdfast.spec.catalogue import STRATEGIES
from holdfast.spec.expected import EXPECTED
from holdfast.spec.setting import Iommu, Profile, Setting
from holdfast.spec.strategy import Strategy

CELLS = table.cells()


@pytest.mark.parametrize(
    ("strategy", "setting"),
    [pytest.param(kind, setting, id=f"{kind.key}-{setting}") for kind, setting in CELLS],
)
def test_every_cell_of_the_table_is_as_expected(strategy: type[Strategy], setting: Setting) -> None:
    verdict = table.judge(strategy, setting)
    assert verdict.complete
    assert verdict.text() == EXPECTED[strategy.key, setting.profile, setting.iommu]


def test_the_table_has_a_row_for_every_strategy_and_no_other() -> None:
    assert {key for key, _, _ in EXPECTED} == set(STRATEGIES)
    cells = {(kind.key, setting.profile, setting.iommu) for kind, setting in CELLS}
    assert cells == set(EXPECTED)


def corrupts(key: str, iommu: Iommu, profile: Profile = Profile.NEW) -> bool:
    return EXPECTED[key, profile, iommu].startswith("breaks S1 ")


def test_the_counterexamples_that_theory_asks_for_are_all_there() -> None:
    """Written down from what is known of each strategy, and not from the table."""
    for profile in Profile:
        assert corrupts("mlock", Iommu.NONE, profile)
        assert corrupts("ghost", Iommu.NONE, profile), "munmap"
        assert corrupts("reference-timed", Iommu.NONE, profile)
        assert "L1 L2" in EXPECTED["ghost-files", profile, Iommu.NONE]
        assert EXPECTED["reference", profile, Iommu.NONE].startswith("breaks S5 "), "only S5"
    assert corrupts("reserved", Iommu.NONE, Profile.OLD)
    assert corrupts("longterm-timed", Iommu.NONE)
    assert "L1" in EXPECTED["longterm", Profile.NEW, Iommu.NONE]
    assert "L2" in EXPECTED["notifier", Profile.NEW, Iommu.NONE]
    assert corrupts("unmap-retire", Iommu.LAZY)
    assert corrupts("unmap-ats", Iommu.STRICT), "a stale translation in the card"
    assert corrupts("unmap-default", Iommu.STRICT)
    assert corrupts("reset-unflushed", Iommu.NONE), "through the fabric"
    assert corrupts("keeper-alone", Iommu.NONE), "descriptors lost"
    assert corrupts("holdfast-reuse", Iommu.STRICT)
    assert corrupts("holdfast-believes", Iommu.STRICT)
    assert corrupts("holdfast-hang-up", Iommu.NONE)
    assert EXPECTED["holdfast-lied", Profile.NEW, Iommu.STRICT].startswith("breaks S9 in "), (
        "firmware that lies falsifies belief, and a strict translation still saves memory"
    )


@pytest.mark.parametrize("iommu", [Iommu.NONE, Iommu.STRICT])
@pytest.mark.parametrize("key", ["holdfast", "holdfast-revoke"])
def test_the_composition_holds_in_every_respect(key: str, iommu: Iommu) -> None:
    assert EXPECTED[key, Profile.NEW, iommu] == "holds"
