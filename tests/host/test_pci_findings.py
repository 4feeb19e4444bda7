# SPDX-License-Identifier: Apache-2.0
"""Every reason why a function cannot be used is found, named, and comes with what fixes it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from holdfast.backends import pci_limits
from holdfast.backends.pci_usable import Finding, examine, machine_findings, usable
from holdfast.errors import BadTarget
from holdfast.testing.pci_tree import PciTree
from holdfast.values import Bdf

EDU = "0000:00:03.0"
NO_CAPABILITIES = "Name:\tpython3\nCapEff:\t0000000000000000\n"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path)


def look(
    tree: PciTree,
    address: str = EDU,
    *,
    backend: str | None = None,
    denied: str = "nothing is denied",
    keepers: Mapping[int, str] | None = None,
) -> dict[str, Finding]:
    found = examine(
        Bdf.parse(address),
        backend=backend,
        sysfs=tree.sysfs,
        dev=tree.dev,
        proc=tree.proc,
        keepers=keepers,
        may_open=lambda path: denied not in str(path),
    )
    assert len({finding.name for finding in found}) == len(found)
    return {finding.name: finding for finding in found}


def in_the_way(found: Mapping[str, Finding]) -> list[str]:
    return [finding.name for finding in found.values() if finding.ok is False]


def test_a_function_in_order_has_nothing_in_its_way(tree: PciTree) -> None:
    tree.add(EDU, driver="vfio-pci")
    found = look(tree)
    assert all(finding.ok for finding in found.values())
    assert found["device node"].what == str(tree.dev / "vfio/7")
    assert found["reset"].what == "flr"
    assert usable(list(found.values()))


def test_no_function_is_an_error_not_a_finding(tree: PciTree) -> None:
    with pytest.raises(BadTarget):
        look(tree)


# -- IOMMU ------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "command_line", "fix"),
    [
        ("DMAR", "quiet", "add intel_iommu=on"),
        ("DMAR", "quiet intel_iommu=off", "remove intel_iommu=off"),
        ("IVRS", "quiet amd_iommu=off", "remove amd_iommu=off"),
        ("IVRS", "quiet", "add amd_iommu=on"),
        (None, "quiet", "firmware setup"),
    ],
)
def test_an_iommu_that_is_off(
    tree: PciTree, table: str | None, command_line: str, fix: str
) -> None:
    tree.add(EDU, group=None)
    tree.fill(tree.proc, {"cmdline": command_line})
    if table:
        tree.fill(tree.sysfs, {f"firmware/acpi/tables/{table}": ""})
    found = look(tree)
    assert in_the_way(found)[0] == "IOMMU"
    assert fix in found["IOMMU"].fix


def test_a_group_made_up_by_vfio_is_no_iommu(tree: PciTree) -> None:
    tree.add(EDU, driver="vfio-pci")
    tree.fill(tree.sysfs, {"kernel/iommu_groups/7/name": "vfio-noiommu"})
    assert in_the_way(look(tree))[0] == "IOMMU"


def test_an_identity_domain_is_worth_knowing_but_not_in_the_way(tree: PciTree) -> None:
    tree.add(EDU, driver="vfio-pci", group_type="identity")
    found = look(tree)
    assert not in_the_way(found)
    assert found["default domain"].ok is None
    assert "iommu=pt" in found["default domain"].fix


def test_a_firmware_mapping_keeps_the_function_from_user_space(tree: PciTree) -> None:
    tree.add(EDU, driver="vfio-pci")
    regions = tree.sysfs / "kernel/iommu_groups/7/reserved_regions"
    regions.write_text("0x0 0xfff direct-relaxable\n0xfee00000 0xfeefffff msi\n")
    assert "firmware mapping" not in look(tree)
    regions.write_text("0x7b800000 0x7fffffff direct\n")
    assert in_the_way(look(tree)) == ["firmware mapping"]


# -- driver, group, node ------------------------------------------------------------


@pytest.mark.parametrize("driver", [None, "e1000e"])
def test_another_driver_is_named_with_the_command_that_takes_it_away(
    tree: PciTree, driver: str | None
) -> None:
    tree.add(EDU, driver=driver)
    found = look(tree)
    assert in_the_way(found) == ["driver"]
    assert (driver or "no driver") in found["driver"].what
    assert found["driver"].fix == f"sudo holdfast bind {EDU}"


def test_a_vendors_vfio_driver_is_as_good(tree: PciTree) -> None:
    tree.add(EDU, driver="mlx5_vfio_pci")
    (tree.here(EDU) / "vfio-dev/vfio0").mkdir(parents=True)
    tree.fill(tree.dev, {"vfio/7": ""})
    assert not in_the_way(look(tree))


def test_siblings_that_block_the_group_are_named_and_others_are_not(tree: PciTree) -> None:
    tree.add(EDU, driver="vfio-pci")
    tree.add("0000:00:03.1", driver="e1000e")
    tree.add("0000:00:03.2", driver="vfio-pci")
    tree.add("0000:00:03.3")
    tree.add("0000:00:01.0", driver="pcieport", class_code=0x060400)
    tree.add("0000:00:01.1", driver="shpchp", class_code=0x060400)
    tree.add("0000:00:04.0", driver="nvme", group=8)
    group = look(tree)["group"]
    assert group.ok is False
    assert "0000:00:01.1 (shpchp), 0000:00:03.1 (e1000e)" in group.what
    assert group.fix == "sudo holdfast bind 0000:00:03.1"
    tree.bind("0000:00:03.1", None)
    tree.bind("0000:00:01.1", None)
    group = look(tree)["group"]
    assert group.ok
    assert "0000:00:03.1" in group.what  # shared with it, all the same
    assert "0000:00:01.0" not in group.what


def test_a_node_that_is_missing_or_not_for_this_user(tree: PciTree) -> None:
    tree.add(EDU, driver="vfio-pci")
    denied = look(tree, denied="vfio/7")["device node"]
    assert denied.ok is False
    assert f"chown {pci_limits.user_name()} {tree.dev}/vfio/7" in denied.fix
    assert f"{tree.dev}/vfio/vfio" not in denied.fix
    (tree.dev / "vfio/vfio").unlink()
    missing = look(tree)["device node"]
    assert missing.ok is False
    assert missing.what == f"missing: {tree.dev}/vfio/vfio"


def test_the_character_device_comes_first_and_the_group_will_do(tree: PciTree) -> None:
    tree.add(EDU, driver="vfio-pci")
    tree.add_cdev(EDU)
    assert look(tree)["device node"].what == str(tree.dev / "vfio/devices/vfio0")
    assert look(tree, denied="iommu")["device node"].what == str(tree.dev / "vfio/7")
    (tree.dev / "vfio/vfio").unlink()
    assert f"{tree.dev}/iommu" in look(tree, denied="iommu")["device node"].what


def test_nodes_are_tried_with_effective_ids() -> None:
    from holdfast.backends.pci_usable import may_open

    assert may_open(Path("/dev/null"))
    assert not may_open(Path("/dev/there is no such node"))


# -- limits ------------------------------------------------------------


@pytest.mark.parametrize(
    ("soft", "hard", "ok", "words"),
    [
        ("unlimited", "unlimited", True, "not limited"),
        (str(4 << 30), "unlimited", True, "4 GiB"),
        (str(8 << 20), str(8 << 20), None, "8 MiB; hard limit, too"),
        (str(8 << 20), "unlimited", None, "8 MiB; all DMA"),
        (str(64 << 10), "unlimited", False, "64 KiB"),
    ],
)
def test_locked_memory(tree: PciTree, soft: str, hard: str, ok: bool | None, words: str) -> None:
    tree.add(EDU, driver="vfio-pci")
    tree.fill(
        tree.proc,
        {"self/status": NO_CAPABILITIES, "self/limits": f"Max locked memory  {soft}  {hard} bytes"},
    )
    memlock = look(tree)["locked memory"]
    assert (memlock.ok, words in memlock.what) == (ok, True)
    assert ("limits.d" in memlock.fix) == (ok is not True)


def test_capabilities_count_only_in_the_first_user_namespace(tree: PciTree) -> None:
    limit = {"self/limits": "Max locked memory  65536  65536 bytes"}
    tree.fill(tree.proc, limit)
    assert pci_limits.memlock(tree.proc).ok
    (tree.proc / "self/uid_map").unlink()  # no user namespaces in this kernel
    assert pci_limits.memlock(tree.proc).ok
    tree.fill(tree.proc, {"self/uid_map": "0 1000 1\n"})
    assert pci_limits.memlock(tree.proc).ok is False


def test_this_very_process_can_be_examined() -> None:
    found = [pci_limits.memlock(Path("/proc")), pci_limits.lifetime(Path("/proc"))]
    found += pci_limits.for_uio(Path("/sys"), Path("/proc"))
    assert all(finding.what for finding in found)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("0::/", None),
        ("0::/user.slice/user-1000.slice/session-4.scope", "KillUserProcesses"),
        (f"0::/user.slice/user@{os.getuid()}.service/app.slice/term.scope", "enable-linger"),
        ("0::/system.slice/jupyterhub.service", "jupyterhub.service is stopped"),
        ("0::/kubepods/besteffort/pod1", "container or job"),
        ("0::/system.slice/slurmstepd.scope/job_5/step_0", "container or job"),
        ("4:memory:/x\n1:name=systemd:/user.slice/session-c1.scope\n", "KillUserProcesses"),
    ],
)
def test_a_control_group_that_would_kill_the_keeper(
    tree: PciTree, path: str, words: str | None
) -> None:
    tree.fill(tree.proc, {"self/cgroup": path})
    found = pci_limits.lifetime(tree.proc)
    assert found.ok is (True if words is None else None)
    assert words is None or words in found.what
    assert ("systemd-run" in found.fix) == (words is not None)


# -- holder, reset ------------------------------------------------------------


def test_who_holds_it_is_named(tree: PciTree) -> None:
    tree.add(EDU, driver="vfio-pci")
    tree.process(41, "bash", [f"{tree.dev}/null"])
    tree.process(42, "dpdk-testpmd", [f"{tree.dev}/vfio/7", f"{tree.dev}/vfio/vfio"])
    holder = look(tree)["holder"]
    assert holder.ok is False
    assert f"pid 42 (dpdk-testpmd) holds {tree.dev}/vfio/7" in holder.what
    assert "kill 42" in holder.fix
    assert look(tree, keepers={42: "keeper 42 of pci:0000:00:03.0"})["holder"].ok


def test_without_a_reset_only_the_driver_can_quiet_it(tree: PciTree) -> None:
    tree.add(EDU, driver="vfio-pci", reset="")
    reset = look(tree)["reset"]
    assert reset.ok is None
    assert "quarantine" in reset.what


def test_a_bus_reset_with_others_on_the_bus_is_refused(tree: PciTree) -> None:
    tree.add("0000:01:01.0", driver="vfio-pci", reset="bus")
    assert look(tree, "0000:01:01.0")["reset"].ok
    tree.add("0000:01:02.0", reset="")
    reset = look(tree, "0000:01:01.0")["reset"]
    assert reset.ok is None
    assert "0000:01:02.0" in reset.what


# -- without an IOMMU ------------------------------------------------------------


@pytest.fixture
def bare(tree: PciTree) -> PciTree:
    """A machine without an IOMMU that has all that uio needs."""
    tree.add(EDU, driver="uio_pci_generic", group=None)
    pool = "kernel/mm/hugepages/hugepages-2048kB"
    tree.fill(tree.sysfs, {f"{pool}/free_hugepages": "30", f"{pool}/nr_hugepages": "32"})
    return tree


def test_without_an_iommu_nothing_is_in_the_way_and_the_loss_is_said(bare: PciTree) -> None:
    found = look(bare)
    assert not in_the_way(found)
    assert found["isolation"].ok is None
    assert "all of memory" in found["isolation"].what
    assert "IOMMU" not in found


def test_a_translating_iommu_makes_physical_addresses_useless(tree: PciTree) -> None:
    tree.add(EDU, driver="uio_pci_generic", group=7, group_type="DMA-FQ")
    isolation = look(tree)["isolation"]
    assert isolation.ok is False
    assert "iommu_groups/7/type" in isolation.fix
    tree.fill(tree.sysfs, {"kernel/iommu_groups/7/type": "identity"})
    assert look(tree)["isolation"].ok is None


def test_the_driver_for_use_without_an_iommu(bare: PciTree) -> None:
    bare.bind(EDU, None)
    assert look(bare, backend="uio")["driver"].ok is None  # works, without interrupts
    bare.bind(EDU, "e1000e")
    driver = look(bare, backend="uio")["driver"]
    assert driver.ok is False
    assert driver.fix == f"sudo holdfast bind {EDU} --driver uio_pci_generic"


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("hugepages", {"kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "0"}, "nr_hugepages"),
        ("lockdown", {"kernel/security/lockdown": "none [integrity] confidentiality"}, "vfio-pci"),
    ],
)
def test_what_uio_needs_of_the_system(
    bare: PciTree, name: str, files: dict[str, str], words: str
) -> None:
    bare.fill(bare.sysfs, files)
    found = look(bare)
    assert in_the_way(found) == [name]
    assert words in found[name].fix


def test_lockdown_that_is_off_is_fine(bare: PciTree) -> None:
    bare.fill(bare.sysfs, {"kernel/security/lockdown": "[none] integrity confidentiality"})
    assert look(bare)["lockdown"].ok


def test_hugepages_need_a_mount(bare: PciTree) -> None:
    bare.fill(bare.proc, {"mounts": "proc /proc proc rw 0 0\n"})
    assert "mount -t hugetlbfs" in look(bare)["hugepages"].fix


@pytest.mark.parametrize(
    ("disabled", "group", "privileged", "ok"),
    [
        ("0", "-1", False, True),
        ("1", "-1", True, True),
        ("1", str(os.getegid()), False, True),
        ("1", "-1", False, False),
        ("2", str(os.getegid()), True, False),
    ],
)
def test_io_uring_may_be_forbidden(
    bare: PciTree, disabled: str, group: str, privileged: bool, ok: bool
) -> None:
    bare.fill(
        bare.proc,
        {"sys/kernel/io_uring_disabled": disabled, "sys/kernel/io_uring_group": group},
    )
    if not privileged:
        bare.fill(bare.proc, {"self/status": NO_CAPABILITIES})
    found = look(bare)
    assert found["io_uring"].ok is ok
    assert ok or "kernel.io_uring_disabled=0" in found["io_uring"].fix
    assert found["physical addresses"].ok is privileged


# -- the machine ------------------------------------------------------------


def on_machine(tree: PciTree) -> dict[str, Finding]:
    found = machine_findings(sysfs=tree.sysfs, dev=tree.dev, proc=tree.proc)
    return {finding.name: finding for finding in found}


def test_a_machine_in_order(tree: PciTree) -> None:
    tree.add(EDU)
    found = on_machine(tree)
    assert not in_the_way(found)
    assert found["iommufd"].ok is None  # an older way is there
    tree.fill(tree.dev, {"iommu": ""})
    assert on_machine(tree)["iommufd"].ok


def test_what_concerns_only_uio_is_a_note_on_the_machine(tree: PciTree) -> None:
    tree.add(EDU)
    tree.fill(tree.sysfs, {"kernel/security/lockdown": "none integrity [confidentiality]"})
    assert on_machine(tree)["lockdown"].ok is None


def test_a_machine_without_modules_iommu_or_pci(tree: PciTree, tmp_path: Path) -> None:
    tree.add(EDU, group=None)
    (tree.sysfs / "bus/pci/drivers/vfio-pci").rmdir()
    found = on_machine(tree)
    assert in_the_way(found) == ["IOMMU", "module"]
    assert found["module"].fix == "sudo modprobe vfio-pci"
    empty = on_machine(PciTree(tmp_path / "empty"))
    assert in_the_way(empty)[0] == "PCI"
