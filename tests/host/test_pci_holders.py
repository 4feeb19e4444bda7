# SPDX-License-Identifier: Apache-2.0
"""Who holds a function, and what the system would lose with it, on fabricated trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast.kernel import pci_sysfs
from holdfast.kernel.pci_holders import Holder, HolderScan
from holdfast.kernel.pci_in_use import in_use
from holdfast.testing.pci_tree import PciTree
from holdfast.values import Bdf

EDU = "0000:00:03.0"
OTHER = "0000:00:04.0"
ANONYMOUS = "anon_inode:[vfio-device]"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    made = PciTree(tmp_path)
    made.add(EDU, driver="vfio-pci", group=7)
    made.add(OTHER, driver="vfio-pci", group=8)
    return made


def holders(tree: PciTree, address: str = EDU) -> list[Holder]:
    scan = HolderScan(sysfs=tree.sysfs, dev=tree.dev, proc=tree.proc)
    return scan.of(pci_sysfs.function(Bdf.parse(address), tree.sysfs))


def test_a_group_a_character_device_and_a_uio_device_are_held_by_name(tree: PciTree) -> None:
    tree.add_cdev(EDU)
    tree.process(10, "a", [f"{tree.dev}/vfio/7"])
    tree.process(11, "b", [f"{tree.dev}/vfio/devices/vfio0"])
    tree.process(12, "c", [f"{tree.dev}/vfio/8", f"{tree.dev}/vfio/vfio"])
    assert [(h.pid, h.certain) for h in holders(tree)] == [(10, True), (11, True)]
    tree.bind(EDU, "uio_pci_generic")
    tree.process(13, "d", [f"{tree.dev}/uio0"])
    assert [h.pid for h in holders(tree)] == [10, 13]
    assert [h.pid for h in holders(tree, OTHER)] == [12]


def test_an_anonymous_descriptor_is_told_by_its_fdinfo(tree: PciTree) -> None:
    tree.process(10, "client", [ANONYMOUS], syspath=str(tree.here(EDU)))
    assert [(h.pid, h.certain) for h in holders(tree)] == [(10, True)]
    assert holders(tree, OTHER) == []


def test_an_older_kernel_leaves_open_which_function_it_is(tree: PciTree) -> None:
    tree.process(10, "client", [ANONYMOUS])
    tree.add("0000:00:05.0", driver="e1000e", group=9)
    assert [(h.pid, h.certain) for h in holders(tree)] == [(10, False)]
    assert [(h.pid, h.certain) for h in holders(tree, OTHER)] == [(10, False)]
    assert holders(tree, "0000:00:05.0") == []


def test_what_is_certain_wins_over_what_is_not(tree: PciTree) -> None:
    tree.process(10, "keeper", [ANONYMOUS, f"{tree.dev}/vfio/7", ANONYMOUS])
    assert [(h.how, h.certain) for h in holders(tree)] == [(f"{tree.dev}/vfio/7", True)]


def test_a_mapping_holds_as_well_as_a_descriptor(tree: PciTree) -> None:
    row = "7f0000000000-7f0000100000 rw-s fe700000 00:01 1234    "
    tree.process(10, "mapper", maps=f"{row}{tree.here(EDU)}/resource0\n")
    tree.process(11, "child", maps=f"{row}{ANONYMOUS}\n{row}[heap]\n7f00-7f01 rw-p 0 00:00 0\n")
    assert [(h.pid, h.certain) for h in holders(tree)] == [(10, True), (11, False)]
    assert "a mapping of" in str(holders(tree)[0])


def test_a_holder_is_still_found_while_an_unbind_waits_for_it(tree: PciTree) -> None:
    gone = f"{tree.dev}/vfio/devices/vfio0 (deleted)"
    tree.process(10, "told", [gone], syspath=str(tree.here(EDU)))
    tree.process(11, "untold", [gone])
    tree.bind(EDU, None)
    assert [(h.pid, h.certain) for h in holders(tree)] == [(10, True), (11, False)]


def test_a_command_cannot_drive_the_terminal(tree: PciTree) -> None:
    tree.process(10, "\x1b[31mred", [f"{tree.dev}/vfio/7"])
    assert "\x1b" not in str(holders(tree)[0])


def test_a_process_that_ends_meanwhile_holds_nothing(tree: PciTree) -> None:
    tree.fill(tree.proc, {"99/comm": "ended\n"})
    assert holders(tree) == []


def test_the_real_proc_can_be_looked_through(tree: PciTree) -> None:
    with (tree.dev / "vfio/7").open():
        scan = HolderScan(sysfs=tree.sysfs, dev=tree.dev)
        found = scan.of(pci_sysfs.function(Bdf.parse(EDU), tree.sysfs))
    assert [holder.pid for holder in found] == [os.getpid()]


# -- what the system would lose ------------------------------------------------------------


def disk(tree: PciTree, name: str, number: str, *, below: str = EDU, on: str = "") -> None:
    """A block device below a function, or one stacked on another."""
    place = (tree.sysfs / "devices/virtual/block" if on else tree.here(below) / "block") / name
    tree.fill(place, {"dev": f"{number}\n", "holders/": ""})
    (tree.sysfs / "class/block" / name).symlink_to(place)
    if on:
        (tree.sysfs / "class/block" / on / "holders" / name).symlink_to(place)


def losses(tree: PciTree) -> list[str]:
    return in_use(Bdf.parse(EDU), sysfs=tree.sysfs, proc=tree.proc)


def mountinfo(*mounts: tuple[str, str]) -> str:
    return "".join(
        f"{n} 1 {number} / {place} rw - ext4 /dev/x rw\n"
        for n, (number, place) in enumerate(mounts, 20)
    )


def test_a_function_that_nobody_uses_may_go(tree: PciTree) -> None:
    disk(tree, "nvme0n1", "259:0")
    disk(tree, "sda", "8:0", below=OTHER)
    tree.fill(tree.proc, {"self/mountinfo": mountinfo(("8:0", "/"), ("0:5", "/dev"))})
    assert losses(tree) == []


def test_a_mounted_disk_is_in_use(tree: PciTree) -> None:
    disk(tree, "nvme0n1", "259:0")
    disk(tree, "nvme0n1p2", "259:2")
    tree.fill(tree.proc, {"self/mountinfo": mountinfo(("259:2", "/"), ("259:2", "/my\\040home"))})
    assert losses(tree) == ["nvme0n1p2 is mounted on /", "nvme0n1p2 is mounted on /my home"]


def test_a_disk_under_device_mapper_is_in_use(tree: PciTree) -> None:
    disk(tree, "nvme0n1", "259:0")
    disk(tree, "dm-0", "253:0", on="nvme0n1")
    disk(tree, "dm-1", "253:1", on="dm-0")
    tree.fill(tree.proc, {"self/mountinfo": mountinfo(("253:1", "/"))})
    assert losses(tree) == ["dm-1 (through nvme0n1) is mounted on /"]


def test_swap_is_in_use(tree: PciTree) -> None:
    disk(tree, "sdz9", "8:99")
    swaps = "Filename Type Size Used Priority\n/dev/sdz9 partition 1 0 -2\n"
    tree.fill(tree.proc, {"swaps": swaps})
    assert losses(tree) == ["sdz9 is in use as swap"]


@pytest.mark.parametrize(
    ("flags", "routes", "words"),
    [
        ("0x1002", [], None),
        ("0x1003", [], "network interface eth9 is up"),
        ("0x1003", ["eth9"], "network interface eth9 is up and carries the only default route"),
        ("0x1003", ["eth9", "w"], "network interface eth9 is up and carries a default route"),
    ],
)
def test_a_network_interface_that_is_up_is_in_use(
    tree: PciTree, flags: str, routes: list[str], words: str | None
) -> None:
    place = tree.here(EDU) / "net/eth9"
    tree.fill(place, {"flags": flags})
    (tree.sysfs / "class/net/eth9").symlink_to(place)
    table = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    table += "eth9\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    table += "".join(f"{r}\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n" for r in routes)
    tree.fill(tree.proc, {"net/route": table})
    assert losses(tree) == ([] if words is None else [words])


def test_an_ipv6_default_route_counts(tree: PciTree) -> None:
    place = tree.here(EDU) / "net/eth9"
    tree.fill(place, {"flags": "0x1003"})
    (tree.sysfs / "class/net/eth9").symlink_to(place)
    zero = "0" * 32
    route = f"{zero} 00 {zero} 00 fe80 00000400 00000001 00000000 00000003 eth9\n"
    tree.fill(tree.proc, {"net/ipv6_route": route})
    assert losses(tree) == ["network interface eth9 is up and carries the only default route"]


def test_virtual_functions_go_with_the_physical_one(tree: PciTree) -> None:
    tree.fill(tree.here(EDU), {"sriov_numvfs": "0\n"})
    assert losses(tree) == []
    tree.fill(tree.here(EDU), {"sriov_numvfs": "4\n"})
    assert losses(tree) == ["4 virtual functions belong to it"]
