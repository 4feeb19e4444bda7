# SPDX-License-Identifier: Apache-2.0
"""What counts as a guest suite that passed, and which kernel options were got."""

from __future__ import annotations

from dataclasses import replace

import pytest

from holdfast.lab import kernel, suites
from holdfast.lab.suites import SCENARIOS, Case, Report

STOCK = next(one for one in SCENARIOS if one.name == "stock-iommu")
FULL = next(one for one in SCENARIOS if one.name == "full-iommu")
PASSED = Case("t::a", "passed", "", 0.1)
JUNIT = b"""<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" tests="4">
<testcase classname="guest.t" name="a" time="1.5"/>
<testcase classname="guest.t" name="b" time="0.1">
  <failure message="assert 1 == 2&#10;more">x</failure>
</testcase>
<testcase classname="guest.t" name="c" time="0">
  <skipped type="pytest.skip" message="needs iommufd">x</skipped>
</testcase>
<testcase classname="guest.t" name="d" time="0"><error message="fixture">x</error></testcase>
</testsuite></testsuites>
"""


def report(*cases: Case, status: int = 0) -> Report:
    return Report(STOCK, status, cases, "")


def test_a_report_is_read_test_by_test() -> None:
    assert list(suites.cases(JUNIT)) == [
        Case("guest.t::a", "passed", "", 1.5),
        Case("guest.t::b", "failed", "assert 1 == 2", 0.1),
        Case("guest.t::c", "skipped", "needs iommufd", 0.0),
        Case("guest.t::d", "error", "fixture", 0.0),
    ]


def test_what_passed_is_no_problem() -> None:
    assert not report(PASSED).problems()


def test_failures_errors_and_silence_are_problems() -> None:
    assert report(PASSED, Case("t::b", "failed", "why", 0), status=1).problems() == [
        "t::b: failed: why"
    ]
    assert report(PASSED, Case("t::b", "error", "why", 0), status=1).problems()
    assert report().problems() == ["no test passed: none ran"]
    assert report(PASSED, status=3).problems() == ["pytest ended with status 3"]
    assert report(PASSED, status=139).problems()


def test_a_skip_needs_the_lack_of_something_that_is_lacking() -> None:
    lacking = Case("t::b", "skipped", "no /dev/iommu", 0)
    other_backend = Case("t::b", "skipped", "this backend maps files only", 0)
    there = Case("t::b", "skipped", "no type1", 0)
    no_reason = Case("t::b", "skipped", "later", 0)
    assert not report(PASSED, lacking, other_backend).problems()
    assert replace(report(PASSED, lacking), scenario=FULL).problems()
    assert report(PASSED, there).problems()
    assert report(PASSED, no_reason).problems()
    assert report(lacking).problems()


def test_a_filter_may_leave_nothing_to_run() -> None:
    assert not replace(report(), filtered=True).problems()
    assert replace(report(PASSED, status=1), filtered=True).problems()


@pytest.mark.parametrize(
    "line",
    [
        "[    1.0] WARNING: CPU: 0 PID: 1 at drivers/iommu/iommu-debug-pagealloc.c:91",
        "[    1.0] BUG: Bad page state in process python3  pfn:1234",
        "[    1.0] Oops: general protection fault",
        "[    1.0] pagealloc: memory corruption",
        "[    1.0] pagealloc: single bit error",
        "[    1.0] iommu: Detected page leak!",
        "[    1.0] iommu: page still mapped",
    ],
)
def test_trouble_in_a_kernel_log_is_found(line: str) -> None:
    assert suites.log_trouble(f"[    0.5] all is well\n{line}\n") == [line]
    trouble = replace(report(PASSED), scenario=FULL, trouble=(line,))
    assert trouble.problems() == [f"kernel log: {line}"]


@pytest.mark.parametrize(
    "line",
    [
        "[    0.0] Command line: console=ttyS0 iommu.debug_pagealloc=1 page_poison=1",
        "[    0.0] Kernel command line: page_poison=1",
        "[    0.1] iommu: Default domain type: Translated",
        "[    0.1] iommu: Debugging page allocations, expect overhead or disable",
        "[    0.1] Debug ports are mapped",
    ],
)
def test_what_every_log_has_is_no_trouble(line: str) -> None:
    assert not suites.log_trouble(line)


def test_damage_on_purpose_is_no_trouble_and_ends() -> None:
    log = (
        "[1] holdfast lab: damage is expected: the control\n"
        "[2] pagealloc: memory corruption\n"
        "[3] holdfast lab: damage is no longer expected\n"
        "[4] BUG: after it\n"
    )
    assert suites.log_trouble(log) == ["[4] BUG: after it"]


def test_a_scenario_has_every_file_but_those_for_other_machines() -> None:
    with_iommu, without = (suites.files_of(one) for one in SCENARIOS[:2])
    assert "tests/vm/guest/test_vfio_backends.py" in with_iommu
    assert "tests/vm/guest/test_vfio_backends.py" not in without
    assert "tests/vm/guest/test_uio_backend.py" in without


def test_the_guests_are_told_what_they_have() -> None:
    told = {one.name: one.environment["HOLDFAST_LAB_EXPECT"] for one in SCENARIOS}
    assert told == {
        "stock-iommu": "type1",
        "stock-no-iommu": "uio",
        "full-iommu": "type1,iommufd",
        "full-no-iommu": "uio",
    }


def test_options_of_a_configuration_are_read() -> None:
    text = "# why\nCONFIG_A=y\nCONFIG_B=n\n# CONFIG_C is not set\nCONFIG_D=8\n"
    assert kernel.wanted_options(text) == {
        "CONFIG_A": "y",
        "CONFIG_B": "n",
        "CONFIG_C": "n",
        "CONFIG_D": "8",
    }


def test_options_that_were_dropped_are_named() -> None:
    wanted = {"CONFIG_A": "y", "CONFIG_B": "n", "CONFIG_C": "y", "CONFIG_D": "8"}
    config = "CONFIG_A=y\n# CONFIG_C is not set\nCONFIG_D=9\nCONFIG_E=y\n"
    assert kernel.not_as_wanted(wanted, config) == ["CONFIG_C=y", "CONFIG_D=8"]
    assert kernel.not_as_wanted({"CONFIG_B": "n"}, "CONFIG_B=y\n") == ["CONFIG_B=n"]


def test_the_configuration_has_what_the_second_kernel_is_for() -> None:
    options = kernel.wanted_options(kernel.CONFIG.read_text(encoding="utf-8"))
    for name in (
        "IOMMUFD",
        "VFIO_NOIOMMU",
        "VFIO_DEVICE_CDEV",
        "IOMMU_DEBUG_PAGEALLOC",
        "PAGE_POISONING",
        "PAGE_OWNER",
    ):
        assert options[f"CONFIG_{name}"] == "y"


def test_what_a_build_needs_is_named_by_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    missing = kernel.missing_packages()
    assert {"gcc", "make", "flex", "bison", "bc", "xz-utils", "libc6-dev"} <= set(missing)
