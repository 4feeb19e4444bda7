# SPDX-License-Identifier: Apache-2.0
"""What the backend without an IOMMU refuses, and how it takes accesses apart. No hardware."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.backends.uio import CAUTION, UioBackend, require_driver, require_untranslated
from holdfast.backends.uio_function import lock_holder, pieces
from holdfast.errors import BadTarget, Busy, NotSupported
from holdfast.kernel.pci_sysfs import NOIOMMU_TYPE, PciFunction
from holdfast.values import Bdf, Target

BDF = Bdf.parse("0000:00:03.0")


def function(
    *, driver: str | None = None, group: int | None = None, kind: str | None = None
) -> PciFunction:
    return PciFunction(
        bdf=BDF,
        vendor=0x1234,
        device=0x11E8,
        subsystem_vendor=0,
        subsystem_device=0,
        class_code=0xFF0000,
        revision=0,
        driver=driver,
        iommu_group=group,
        iommu_type=kind,
        reset_methods=(),
        resources=(),
        vfio_cdev=None,
    )


@pytest.mark.parametrize("kind", ["DMA", "DMA-FQ", "blocked", "unmanaged", None])
def test_a_function_that_is_translated_is_refused_with_both_ways_out(kind: str | None) -> None:
    with pytest.raises(NotSupported) as caught:
        require_untranslated(function(group=7, kind=kind), "pci:x")
    assert "echo identity > /sys/kernel/iommu_groups/7/type" in caught.value.hint
    assert "without backend=uio" in caught.value.hint


@pytest.mark.parametrize(("group", "kind"), [(None, None), (7, "identity"), (7, NOIOMMU_TYPE)])
def test_physical_addresses_are_right_where_nothing_translates(
    group: int | None, kind: str | None
) -> None:
    require_untranslated(function(group=group, kind=kind), "pci:x")


@pytest.mark.parametrize("driver", ["vfio-pci", "nvme"])
def test_another_drivers_function_is_refused_with_the_command(driver: str) -> None:
    with pytest.raises(Busy, match=driver) as caught:
        require_driver(function(driver=driver), "pci:x")
    assert caught.value.hint == f"holdfast bind {BDF} --driver uio_pci_generic"
    require_driver(function(driver="uio_pci_generic"), "pci:x")
    require_driver(function(), "pci:x")


def test_a_function_that_is_not_there_is_a_bad_target(tmp_path: Path) -> None:
    with pytest.raises(BadTarget):
        UioBackend(Target.parse(f"pci:{BDF}?backend=uio"), sysfs=tmp_path)


def test_the_caution_says_what_is_lost() -> None:
    assert "all memory" in CAUTION
    assert "no IOMMU" in CAUTION


@given(st.integers(0, 64), st.integers(1, 64))
def test_accesses_are_taken_apart_into_aligned_ones_without_gap(offset: int, count: int) -> None:
    found = pieces(offset, count)
    at = offset
    for place, width in found:
        assert place == at
        assert width in (1, 2, 4, 8)
        assert place % width == 0
        at += width
    assert at == offset + count
    if count in (1, 2, 4, 8) and offset % count == 0:
        assert found == [(offset, count)]
    else:
        assert all(width <= 4 for _, width in found)


def test_the_holder_of_a_lock_is_named(tmp_path: Path) -> None:
    path = tmp_path / "resource0"
    path.touch()
    with path.open("rb") as mine, path.open("rb") as theirs:
        assert lock_holder(theirs.fileno()) == "a process that /proc does not show"
        fcntl.flock(mine, fcntl.LOCK_EX)
        assert lock_holder(theirs.fileno()).startswith(f"pid {os.getpid()} (")
