# SPDX-License-Identifier: Apache-2.0
"""The kill campaign on real functions: more than a hundred deaths per backend, judged by content.

Runs inside a lab guest. On the built kernel page poisoning and ``iommu.debug_pagealloc`` watch as
well: whoever runs the suite reads the kernel's log (``holdfast.lab.suites``). Without an IOMMU the
negative control shows that the judge can see.
"""

from __future__ import annotations

import os
import sys

import pytest

from holdfast.kernel import pci_sysfs
from holdfast.lab import guest
from holdfast.torture import edu_scene as scene
from holdfast.torture.campaign import Outcome
from holdfast.torture.edu_campaign import run_policy
from holdfast.torture.outside import settle
from holdfast.values import Policy

pytestmark = [
    pytest.mark.guest,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

EXPECTED = set(filter(None, os.environ.get("HOLDFAST_LAB_EXPECT", "").split(",")))
KILLS = 52
"""Per policy; there are two."""
CONTROL_KILLS = 12
CONTROL_ROUNDS = 5
SEED = 1998


@pytest.fixture(params=["type1", "iommufd", "uio"])
def target(request: pytest.FixtureRequest) -> str:
    """An edu on the root bus by one backend."""
    backend = str(request.param)
    driver = "uio_pci_generic" if backend == "uio" else "vfio-pci"
    for found in scene.edus(driver):
        if found.bdf.bus != 0 or not scene.alone(found):
            continue
        if backend == "uio" and not pci_sysfs.function(found.bdf).translated:
            return f"pci:{found.bdf}?backend=uio&dma_bits=40"
        if backend in scene.offered(found):
            return f"pci:{found.bdf}?backend={backend}"
    if backend in EXPECTED:
        pytest.fail(f"no edu for {backend}, though it is expected here")
    pytest.skip(f"no edu for {backend} here")


def told(target: str, outcome: Outcome) -> Outcome:
    """The figures, for whoever reads the guest's output."""
    sys.stdout.write(f"{target}: {outcome.to_json()}\n")
    return outcome


@pytest.mark.parametrize("policy", [Policy.DRAIN, Policy.REVOKE])
def test_no_death_corrupts_leaks_or_hangs_anything(target: str, policy: Policy) -> None:
    pins = scene.outstanding_pins()
    outcome = told(target, run_policy(policy, target, KILLS, SEED))
    assert outcome.kills == KILLS
    assert outcome.clean, outcome
    assert outcome.mid_dma_kills > 0, "no kill hit a transfer"
    if policy is Policy.DRAIN:
        assert outcome.completed_after_death == outcome.mid_dma_kills
    else:
        assert outcome.completed_after_death == 0
    assert outcome.victims_on_recycled_frames > 0, "no victim had a dead process's memory"
    assert settle(lambda: scene.outstanding_pins() - pins, goal=0, timeout=10.0) == 0


def test_without_the_guard_and_without_an_iommu_memory_is_corrupted(target: str) -> None:
    if "backend=uio" not in target:
        pytest.skip("a machine with an IOMMU is no no-iommu machine: nothing could be seen")
    for number in range(CONTROL_ROUNDS):  # on a slow machine most writes come before the victim
        with guest.damage_expected("the negative control of the kill campaign"):
            outcome = run_policy(Policy.RELEASE, target, CONTROL_KILLS, SEED + number)
        if told(target, outcome).corrupted:
            break
    assert outcome.corrupted > 0
    assert outcome.corrupted_bytes > 0
