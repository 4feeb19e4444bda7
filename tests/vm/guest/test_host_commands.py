# SPDX-License-Identifier: Apache-2.0
"""The commands ``ls``, ``doctor``, ``bind``, ``unbind`` on a real sysfs, in a lab guest, as root.

``HOLDFAST_LAB_IOMMU`` ("on" or "off") says what the machine was booted with; unset, sysfs tells.
The functions are QEMU's edu: on the root bus, and, if the machine has them, two behind one bridge.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from holdfast import backends
from holdfast.cli import holdfast
from holdfast.errors import Busy, HoldfastError, NotSupported
from holdfast.kernel import pci_binding, pci_sysfs
from holdfast.kernel.pci_binding import Machine
from holdfast.kernel.pci_sysfs import PciFunction
from holdfast.kernel.sysfs_writes import Write, carry_out
from holdfast.values import Bdf, Target

pytestmark = pytest.mark.guest

EDU = (0x1234, 0x11E8)
SETTLE = 30.0
"""Seconds in which the kernel finishes what it was waiting for."""

IOMMU = os.environ.get("HOLDFAST_LAB_IOMMU") or (
    "on" if any(function.translated for function in pci_sysfs.functions()) else "off"
)
with_iommu = pytest.mark.skipif(IOMMU != "on", reason="the machine has no IOMMU")
without_iommu = pytest.mark.skipif(IOMMU != "off", reason="the machine has an IOMMU")


def edus() -> list[PciFunction]:
    return [f for f in pci_sysfs.functions() if (f.vendor, f.device) == EDU]


def driver(bdf: Bdf) -> str | None:
    return pci_sysfs.function(bdf).driver


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SETTLE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def free(bdf: Bdf) -> None:
    """No driver, and none wished for."""
    here = pci_sysfs.device_path(bdf)
    writes = [Write(here / "driver_override", "\n")]
    if driver(bdf) is not None:
        writes.append(Write(here / "driver/unbind", str(bdf)))
    carry_out(writes, SETTLE)


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PciFunction]]:
    """Every edu without a driver; afterwards each has the one that it came with."""
    monkeypatch.setenv("HOLDFAST_RUNTIME_DIR", str(tmp_path / "run"))
    found = edus()
    if not found:
        if os.environ.get("HOLDFAST_LAB_EXPECT"):
            pytest.fail("the machine has no edu")
        pytest.skip("the machine has no edu")
    for function in found:
        free(function.bdf)
    yield edus()
    for function in found:
        if driver(function.bdf) != function.driver:
            free(function.bdf)
            if function.driver is not None:
                plan = pci_binding.plan_bind(function.bdf, function.driver, Machine())
                pci_binding.bind(plan, Machine())


@pytest.fixture
def edu(functions: list[PciFunction]) -> Bdf:
    """An edu that is alone in its group."""
    return next(f.bdf for f in functions if f.bdf.bus == 0)


@pytest.fixture
def pair(functions: list[PciFunction]) -> tuple[Bdf, Bdf]:
    """Two that share a group."""
    groups: dict[int | None, list[Bdf]] = {}
    for function in functions:
        groups.setdefault(function.iommu_group, []).append(function.bdf)
    for group, members in groups.items():
        if group is not None and len(members) == 2:
            return members[0], members[1]
    pytest.skip("no two edus share a group: no bridge with two of them")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(holdfast, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(
        result.exception, SystemExit | HoldfastError
    ):
        raise result.exception
    return result


def told(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json").output)


def finding(bdf: Bdf, name: str) -> dict[str, Any]:
    (function,) = told("doctor", bdf)["functions"]
    return next(found for found in function["findings"] if found["name"] == name)


def row(bdf: Bdf) -> dict[str, Any]:
    return next(found for found in told("ls") if found["bdf"] == str(bdf))


def test_ls_tells_what_sysfs_has(functions: list[PciFunction]) -> None:
    rows = {found["bdf"]: found for found in told("ls")}
    for function in functions:
        found = rows[str(function.bdf)]
        assert (found["vendor"], found["device"]) == EDU
        assert (found["driver"], found["iommu_group"]) == (None, function.iommu_group)
        assert (function.iommu_group is not None) == (IOMMU == "on")
        assert found["target"] == f"pci:{function.bdf}"
        assert found["target"] in run("ls").output
    bridges = {found["bdf"] for found in told("ls", "--all")} - set(rows)
    assert "0000:00:00.0" in bridges


def test_edu_has_a_reset_behind_a_port_only(functions: list[PciFunction]) -> None:
    for function in functions:
        methods = row(function.bdf)["reset_methods"]
        if function.bdf.bus == 0:
            assert methods == []
            assert finding(function.bdf, "reset")["ok"] is None
    alone = [
        f for f in functions if f.bdf.bus and sum(o.bdf.bus == f.bdf.bus for o in functions) == 1
    ]
    for function in alone:
        assert row(function.bdf)["reset_methods"] == ["bus"]
        assert finding(function.bdf, "reset")["ok"] is True


def test_a_dry_run_changes_nothing(edu: Bdf) -> None:
    name = "vfio-pci" if IOMMU == "on" else "uio_pci_generic"
    override = pci_sysfs.device_path(edu) / "driver_override"
    before = override.read_text()
    assert (
        f"echo {edu} > /sys/bus/pci/drivers_probe"
        in run("bind", "--dry-run", "--driver", name, edu).output
    )
    assert (driver(edu), override.read_text()) == (None, before)


@with_iommu
def test_bind_makes_a_function_usable_and_unbind_takes_it_back(edu: Bdf) -> None:
    missing = run("doctor", edu)
    assert missing.exit_code == 1
    assert f"sudo holdfast bind {edu}" in missing.output
    assert run("bind", edu).output == f"{edu}: no driver -> vfio-pci\n"
    assert driver(edu) == "vfio-pci"
    assert run("doctor", edu).exit_code == 0
    assert run("bind", edu).output == f"{edu}: vfio-pci has it already\n"
    backends.connect(Target("pci", str(edu))).close()
    assert run("unbind", edu).output == f"{edu}: vfio-pci -> no driver\n"
    assert driver(edu) is None
    assert "not bound by Holdfast" in run("unbind", edu).output


@with_iommu
def test_the_driver_before_gets_it_back(edu: Bdf) -> None:
    assert run("bind", "--driver", "uio_pci_generic", edu).exit_code == 0
    pci_binding.forget(edu, Machine())  # as if it had come with it
    assert run("bind", edu).output == f"{edu}: uio_pci_generic -> vfio-pci\n"
    assert run("unbind", edu).output == f"{edu}: vfio-pci -> uio_pci_generic\n"
    override = pci_sysfs.device_path(edu) / "driver_override"
    assert override.read_text().strip() == "uio_pci_generic"


@with_iommu
def test_uio_under_a_translating_iommu_is_warned_of(edu: Bdf) -> None:
    result = run("bind", "--driver", "uio_pci_generic", edu)
    assert "physical addresses would fault" in result.output
    assert finding(edu, "isolation")["ok"] is False
    assert row(edu)["target"] == f"pci:{edu}?backend=uio"


@with_iommu
def test_a_sibling_keeps_the_group_from_being_used_and_is_not_touched(
    pair: tuple[Bdf, Bdf],
) -> None:
    first, second = pair
    run("bind", "--driver", "uio_pci_generic", second)
    result = run("bind", first)
    assert f"{second} (uio_pci_generic)" in result.output
    assert driver(second) == "uio_pci_generic"
    group = finding(first, "group")
    assert group["ok"] is False
    assert group["fix"] == f"sudo holdfast bind {second}"
    with pytest.raises(HoldfastError, match=str(second)):
        backends.connect(Target("pci", str(first)))
    result = run("bind", "--group", first)
    assert f"{second}: uio_pci_generic -> vfio-pci" in result.output
    assert run("doctor", first, second).exit_code == 0
    backends.connect(Target("pci", str(first))).close()


@with_iommu
def test_a_sibling_without_a_driver_is_no_obstacle(pair: tuple[Bdf, Bdf]) -> None:
    first, second = pair
    assert run("bind", first).output == f"{first}: no driver -> vfio-pci\n"
    assert finding(first, "group")["ok"] is True
    assert str(second) in finding(first, "group")["what"]


HOLDER = """
import sys
from holdfast import backends
from holdfast.values import Target
backend = backends.connect(Target.parse(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder_of(bdf: Bdf) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the function open and does not listen when it is asked for it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, f"pci:{bdf}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


@with_iommu
def test_an_unbind_of_a_held_function_names_the_holder_and_ends_when_it_does(edu: Bdf) -> None:
    run("bind", edu)
    with holder_of(edu) as process:
        assert [held["pid"] for held in row(edu)["holders"]] == [process.pid]
        held = finding(edu, "holder")
        assert held["ok"] is False
        assert f"pid {process.pid}" in held["what"]
        with pytest.raises(Busy, match=f"pid {process.pid} .*holds") as caught:
            backends.connect(Target("pci", str(edu)))
        started = time.monotonic()
        result = run("unbind", "--timeout", "1", edu)
        assert time.monotonic() - started < SETTLE
        assert isinstance(result.exception, Busy)
        assert f"pid {process.pid} " in str(result.exception)
        assert "goes on in the kernel" in result.exception.hint
        for command in ("unbind", "bind"):
            again = run(command, edu)
            assert isinstance(again.exception, Busy)
            assert "an earlier unbind is still waiting" in str(again.exception)
        del caught
    node = Path(f"/dev/vfio/{pci_sysfs.function(edu).iommu_group}")
    assert eventually(lambda: not node.exists()), "the unbind did not end with its holder"
    assert run("unbind", edu).exit_code == 0
    assert run("bind", edu).output == f"{edu}: no driver -> vfio-pci\n"
    backends.connect(Target("pci", str(edu))).close()


@with_iommu
def test_the_kernel_unmaps_what_another_process_mapped(edu: Bdf) -> None:
    run("bind", edu)
    result = run("doctor", "--try", edu)
    assert "unmap by another  works" in result.output
    assert result.exit_code == 0
    assert row(edu)["holders"] == []


@with_iommu
def test_a_user_without_rights_is_told_what_is_missing(edu: Bdf) -> None:
    run("bind", edu)
    os.seteuid(65534)
    try:
        node = finding(edu, "device node")
        memlock = finding(edu, "locked memory")
        refused = run("unbind", edu)
    finally:
        os.seteuid(0)
    assert node["ok"] is False
    assert "sudo chown" in node["fix"]
    assert memlock["ok"] is not True
    assert isinstance(refused.exception, HoldfastError)
    assert "root" in refused.exception.hint
    assert driver(edu) == "vfio-pci"


@without_iommu
def test_without_an_iommu_vfio_is_refused_and_the_way_out_named(edu: Bdf) -> None:
    result = run("bind", edu)
    assert isinstance(result.exception, NotSupported)
    assert f"holdfast bind {edu} --driver uio_pci_generic" in result.exception.hint
    assert driver(edu) is None
    machine = {found["name"]: found for found in told("doctor")["machine"]}
    assert machine["IOMMU"]["ok"] is False
    assert "intel_iommu=on" in machine["IOMMU"]["fix"]
    assert run("doctor", edu).exit_code == 1


@without_iommu
def test_without_an_iommu_uio_has_it_and_the_loss_is_said(edu: Bdf) -> None:
    result = run("bind", "--driver", "uio_pci_generic", edu)
    assert result.output == f"{edu}: no driver -> uio_pci_generic\n"
    assert driver(edu) == "uio_pci_generic"
    isolation = finding(edu, "isolation")
    assert isolation["ok"] is None
    assert "all of memory" in isolation["what"]
    pages = finding(edu, "hugepages")
    free_pages = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text()
    assert pages["ok"] is (int(free_pages) > 0)
    assert row(edu)["target"] == f"pci:{edu}?backend=uio"
    assert run("unbind", edu).output == f"{edu}: uio_pci_generic -> no driver\n"
