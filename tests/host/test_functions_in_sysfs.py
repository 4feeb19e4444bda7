# SPDX-License-Identifier: Apache-2.0
"""PCI functions as sysfs shows them, on fabricated trees; their names from pci.ids."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.errors import BadTarget
from holdfast.kernel import pci_sysfs
from holdfast.kernel.pci_names import PciNames
from holdfast.kernel.pci_sysfs import NOIOMMU_TYPE, Resource
from holdfast.testing.pci_tree import PciTree
from holdfast.values import Bdf

EDU = "0000:00:03.0"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path)


def test_a_function_is_read_whole(tree: PciTree) -> None:
    tree.add(EDU, driver="vfio-pci", group=7, reset="flr bus")
    tree.add_cdev(EDU)
    found = pci_sysfs.function(Bdf.parse(EDU), tree.sysfs)
    assert (found.vendor, found.device, found.class_code) == (0x1234, 0x11E8, 0x00FF00)
    assert (found.subsystem_vendor, found.subsystem_device, found.revision) == (
        0x1AF4,
        0x1100,
        0x10,
    )
    assert (found.driver, found.iommu_group, found.iommu_type) == ("vfio-pci", 7, "DMA")
    assert found.reset_methods == ("flr", "bus")
    assert found.vfio_cdev == "vfio0"
    assert found.resources[0] == Resource(0xFE700000, 0xFE7FFFFF, 0x40200)
    assert [resource.size for resource in found.resources[:2]] == [1 << 20, 0]
    assert found.translated
    assert not found.is_bridge


def test_what_is_missing_reads_as_nothing(tree: PciTree) -> None:
    tree.add(EDU, group=None, reset="")
    found = pci_sysfs.function(Bdf.parse(EDU), tree.sysfs)
    assert (found.driver, found.iommu_group, found.iommu_type) == (None, None, None)
    assert found.reset_methods == ()
    assert found.vfio_cdev is None
    assert not found.translated


def test_a_vfio_name_without_a_device_number_is_no_character_device(tree: PciTree) -> None:
    tree.add(EDU, driver="vfio-pci")
    assert pci_sysfs.function(Bdf.parse(EDU), tree.sysfs).vfio_cdev is None


def test_a_group_that_vfio_made_up_is_no_iommu(tree: PciTree) -> None:
    tree.add(EDU, group=0, group_type="unknown")
    tree.fill(tree.sysfs, {"kernel/iommu_groups/0/name": "vfio-noiommu\n"})
    found = pci_sysfs.function(Bdf.parse(EDU), tree.sysfs)
    assert found.iommu_type == NOIOMMU_TYPE
    assert not found.translated


def test_no_function_and_no_bus_are_told_apart(tree: PciTree, tmp_path: Path) -> None:
    with pytest.raises(BadTarget, match="no such PCI function") as caught:
        pci_sysfs.function(Bdf.parse(EDU), tree.sysfs)
    assert "holdfast ls" in caught.value.hint
    assert pci_sysfs.functions(tmp_path / "nowhere") == []


def test_functions_come_in_order_and_without_those_that_vanish(tree: PciTree) -> None:
    for address in ("0000:01:00.0", "0000:00:1f.2", EDU):
        tree.add(address)
    (tree.here("0000:00:1f.2") / "vendor").unlink()
    (tree.sysfs / "bus/pci/devices/0000:00:04.0").symlink_to("../../../devices/gone")
    (tree.sysfs / "bus/pci/devices/10000:e0:06.0").symlink_to("../../../devices/vmd")
    assert [str(f.bdf) for f in pci_sysfs.functions(tree.sysfs)] == [EDU, "0000:01:00.0"]


def test_a_group_lists_its_members_and_bridges_are_known(tree: PciTree) -> None:
    tree.add("0000:00:01.0", class_code=0x060400, driver="pcieport", group=3)
    tree.add("0000:01:01.0", group=3)
    tree.add("0000:02:00.0", class_code=0x068000, group=4)  # a non-transparent bridge
    members = pci_sysfs.group_members(3, tree.sysfs)
    assert [(str(f.bdf), f.is_bridge) for f in members] == [
        ("0000:00:01.0", True),
        ("0000:01:01.0", False),
    ]
    assert not pci_sysfs.function(Bdf.parse("0000:02:00.0"), tree.sysfs).is_bridge
    assert pci_sysfs.group_members(99, tree.sysfs) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    name=st.sampled_from(["vendor", "class", "resource", "reset_method", "revision", "driver"]),
    content=st.binary(max_size=200),
)
def test_no_attribute_can_break_the_reader(tmp_path: Path, name: str, content: bytes) -> None:
    place = tmp_path / content.hex()[:40] / name
    tree = PciTree(place)
    if not (place / "sys/bus/pci/devices" / EDU).exists():
        tree.add(EDU)
    (tree.here(EDU) / name).write_bytes(content)
    assert len(pci_sysfs.functions(tree.sysfs)) in (0, 1)


# -- names ------------------------------------------------------------

IDS = b"""#
# List of PCI ID's
#
0e11  Compaq
\ta0f7  PCI Hotplug Controller
\t\t8086 a2f8  Something Else
\ta0f8  ZFMicro

1234  Technical Corp.
# a comment in between
\t1111  QEMU Virtual Video
\t11e8  QEMU educational device
\t\t1af4 1100  Sub
ffff  Illegal Vendor ID

C 00  Unclassified device
\tff  Something odd
C 01  Mass storage controller
\t08  Non-Volatile memory controller
\t\t02  NVM Express
"""


@pytest.fixture(params=["pci.ids", "pci.ids.gz"])
def names(request: pytest.FixtureRequest, tmp_path: Path) -> PciNames:
    path = tmp_path / request.param
    path.write_bytes(gzip.compress(IDS) if path.suffix == ".gz" else IDS)
    return PciNames([tmp_path / "missing", path])


def test_ids_become_names(names: PciNames) -> None:
    assert names.vendor(0x0E11) == "Compaq"
    assert names.device(0x0E11, 0xA0F8) == "ZFMicro"
    assert names.device(0x1234, 0x11E8) == "QEMU educational device"
    assert names.vendor(0xFFFF) == "Illegal Vendor ID"
    assert names.of_class(0x010802) == "Non-Volatile memory controller"
    assert names.of_class(0x00FF00) == "Something odd"


def test_unknown_ids_stay_numbers(names: PciNames) -> None:
    assert names.vendor(0x8086) == "8086"
    assert names.device(0x8086, 0x1234) == "1234"
    assert names.device(0x0E11, 0x11E8) == "11e8"  # another vendor's device
    assert names.device(0x0E11, 0x8086) == "8086"  # a subsystem, not a device
    assert names.of_class(0x017F00) == "Mass storage controller"
    assert names.of_class(0x120000) == "120000"


def test_without_a_file_there_are_numbers(tmp_path: Path) -> None:
    broken = tmp_path / "pci.ids.gz"
    broken.write_bytes(b"\x1f\x8b not gzip")
    names = PciNames([tmp_path / "missing", broken])
    assert (names.vendor(0x1234), names.of_class(0x00FF00)) == ("1234", "00ff00")


def test_a_name_cannot_drive_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "pci.ids"
    path.write_bytes(b"1234  \x1b[31mRed\n")
    assert PciNames([path]).vendor(0x1234) == "?[31mRed"


@given(st.binary(max_size=300), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFF))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_no_file_can_break_the_names(
    tmp_path: Path, data: bytes, number: int, class_code: int
) -> None:
    path = tmp_path / "any.ids"
    path.write_bytes(data)
    names = PciNames([path])
    assert names.vendor(number)
    assert names.device(number, number)
    assert names.of_class(class_code)
