# SPDX-License-Identifier: Apache-2.0
"""Every fault of the fault plan under a dying client: which rungs were taken, and where it ended.

Each case runs with memory in files of its own, behind a strict translation, or in an arena, as on a
machine without an IOMMU. An innocent takes memory as soon as the dead lease has come to its end, in
an arena the very frames if they were given back, and nothing else may ever be in it. The one fault
that no software can defend against without an IOMMU is shown to corrupt there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from holdfast.errors import DeviceGone, KeeperGone
from holdfast.kernel import procfs
from holdfast.torture.outside import settle

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 15.0
SHORT = (
    "--drain-deadline", "0.1", "--stop-deadline", "0.1", "--isolate-deadline", "0.1",
    "--reset-deadline", "1", "--quarantine-period", "0.1",
)  # fmt: skip
ARENA = ("--arena", "4M")
XDMA = "emu:xdma?memory=1M"
SLOW = f"{XDMA}&link_rate=256K&link_chunk=4096"
"""A transfer takes a quarter of a second."""
EDU = "emu:edu?delay=0.2"

DRAIN, STOP, ISOLATE, RESET = "draining", "stopping", "isolating", "resetting"
BY_DRAIN = [DRAIN, "quiet", "released"]
BY_STOP = [DRAIN, STOP, "quiet", "released"]
BY_ISOLATION = [DRAIN, STOP, ISOLATE, "quiet", "released"]
BY_RESET = [DRAIN, STOP, ISOLATE, RESET, "quiet", "released"]
UNMAPPED = [DRAIN, STOP, ISOLATE, RESET, "unmapped", "released"]
QUARANTINE = [DRAIN, STOP, ISOLATE, RESET, "quarantine"]
Rungs = list[str]
"""What is expected; in an arena, if that is something else, the second one."""

CASES: dict[str, tuple[str, str, Rungs, Rungs]] = {
    # name: target, faults from the second transfer on, rungs with own files, rungs in an arena
    "silent hang": (XDMA, "hang@2-2", BY_RESET, BY_RESET),
    "wild": (SLOW, "wild", BY_RESET, BY_RESET),
    "early completion": (XDMA, "early_completion@2", BY_DRAIN, BY_DRAIN),
    "hang, refused reset": (XDMA, "hang@2,refuse_reset@1", UNMAPPED, QUARANTINE),
    "wild, reset keeps DMA": (SLOW, "wild,reset_keeps_dma@1", UNMAPPED, QUARANTINE),
    "edu, slow": (EDU, "", BY_ISOLATION, BY_ISOLATION),
    "edu, silent hang": (EDU, "hang@2", UNMAPPED, QUARANTINE),
    "edu, wild": ("emu:edu?delay=0.02", "wild@2", UNMAPPED, QUARANTINE),
}
LATE_DRIVER = {"edu, slow": ("--isolate-deadline", "1")}


@pytest.mark.parametrize("arena", [False, True], ids=["own files", "arena"])
@pytest.mark.parametrize("case", CASES)
def test_a_fault_ends_on_its_rung_and_corrupts_nobody(
    scene: Callable[..., Any], rungs_of: Callable[..., Rungs], case: str, arena: bool
) -> None:
    target, faults, strict_rungs, arena_rungs = CASES[case]
    options = (*SHORT, *LATE_DRIVER.get(case, ()), "--test-faults", faults)
    stage = scene(target, *options, *(ARENA if arena else ()))
    stage.fill_card()
    with stage.innocent() as innocent:
        pid = stage.kill_in_mid_dma(wait_for_data="wild" in faults)
        told = stage.reached(pid, "released", "quarantine")
        innocent.take()
        assert rungs_of(told) == (arena_rungs if arena else strict_rungs), told["log"]
        assert innocent.foreign() == 0
    held = told["state"] == "quarantine"
    assert (told["bytes"] > 0) is held
    assert bool(told["withheld"]) is held
    ps = stage.stack.ps()
    assert ps["unaccounted_bytes"] == 0
    assert ps["quarantined_bytes"] == told["bytes"]
    times = [at for _, at, _ in told["log"]]
    assert times == sorted(times)
    assert all(why for _, _, why in told["log"])


def test_a_stop_that_is_acknowledged_ends_a_transfer_that_takes_too_long(
    scene: Callable[..., Any], rungs_of: Callable[..., Rungs]
) -> None:
    stage = scene(SLOW, *ARENA, "--drain-deadline", "0.02")
    stage.fill_card()
    with stage.innocent() as innocent:
        told = stage.reached(stage.kill_in_mid_dma(wait_for_data=True), "released")
        innocent.take()
        assert rungs_of(told) == BY_STOP
        assert innocent.foreign() == 0


def test_an_engine_that_is_told_to_stop_in_time_and_does_not_is_asked_on_every_rung(
    scene: Callable[..., Any], rungs_of: Callable[..., Rungs]
) -> None:
    # Here the keeper waits for what the driver has to say: a second and a half.
    stage = scene(SLOW, *ARENA, *SHORT, "--stop-deadline", "3", "--test-faults", "wild")
    stage.fill_card()
    told = stage.reached(stage.kill_in_mid_dma(wait_for_data=True), "released")
    assert rungs_of(told) == BY_RESET
    why = {state: said for state, _, said in told["log"]}
    assert why[ISOLATE] == "the engine did not acknowledge"
    assert why[RESET] == "bus master is off, the engine is not at rest"


# -- an engine that lies --------------------------------------------------------------------------


@pytest.mark.parametrize("target", [SLOW, EDU], ids=["xdma", "edu"])
def test_an_engine_that_lies_reaches_nobody_behind_a_strict_translation(
    scene: Callable[..., Any], rungs_of: Callable[..., Rungs], target: str
) -> None:
    stage = scene(
        target, *SHORT, "--test-faults", "lie_idle@2" if "edu" in target else "lie_idle@1"
    )
    stage.fill_card()
    with stage.innocent() as innocent:
        told = stage.reached(stage.kill_in_mid_dma(), "released")
        innocent.take()
        assert rungs_of(told) == BY_DRAIN, "it was believed"
        assert innocent.foreign(0.4) == 0


@pytest.mark.parametrize("target", [SLOW, EDU], ids=["xdma", "edu"])
def test_an_engine_that_lies_without_an_iommu_defeats_every_software(
    scene: Callable[..., Any], rungs_of: Callable[..., Rungs], target: str
) -> None:
    """No defence: the limit that the documentation states, shown so that nobody forgets it."""
    faults = "lie_idle@2" if "edu" in target else "lie_idle@1"
    stage = scene(target, *SHORT, *ARENA, "--test-faults", faults)
    stage.fill_card()
    with stage.innocent() as innocent:
        told = stage.reached(stage.kill_in_mid_dma(), "released")
        innocent.take()
        assert rungs_of(told) == BY_DRAIN, "it was believed"
        assert innocent.foreign(0.5) > 0


# -- hot-unplug -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "arena"), [(SLOW, ARENA), ("emu:edu?delay=0.05", ())], ids=["xdma", "edu"]
)
def test_a_function_that_is_pulled_out_takes_nothing_with_it(
    scene: Callable[..., Any], target: str, arena: tuple[str, ...]
) -> None:
    stage = scene(target, *SHORT, *arena, "--test-faults", "unplug@2")
    stage.fill_card()
    told = stage.stack.ps()
    keeper, function = told["keeper"], told["function"]
    with stage.innocent() as innocent:
        innocent.take()
        files = procfs.memfds_of(keeper).keys()
        stage.kill_in_mid_dma()
        assert settle(lambda: os.path.exists(f"/proc/{function}"), goal=0, timeout=LONG) == 0
        assert innocent.foreign() == 0
        with pytest.raises((DeviceGone, KeeperGone)):
            innocent.device.alloc(1 << 20)
    assert settle(lambda: _alive(keeper), goal=0, timeout=LONG) == 0
    assert settle(
        lambda: len(files & procfs.memfds_named("holdfast-").keys()), goal=0, timeout=LONG
    ) == 0  # fmt: skip


def _alive(pid: int) -> bool:
    """Running, and no zombie that waits for its starter."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
