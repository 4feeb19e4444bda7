# SPDX-License-Identifier: Apache-2.0
"""Which way a ``pci:`` target goes, and what an error about it says. Fabricated trees only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast import backends
from holdfast.backends import pci, pci_usable
from holdfast.backends.pci_limits import Finding
from holdfast.errors import BadTarget, Busy, HoldfastError, NotSupported
from holdfast.kernel import pci_sysfs
from holdfast.values import Bdf, Target

CARD = "0000:03:00.0"
SISTER = "0000:03:00.1"
TARGET = Target.parse(f"pci:{CARD}")


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """A card with two functions in group 7, both bound to vfio-pci, and a bridge beside them."""
    root = tmp_path / "sys"
    for address, code, driver in (
        (CARD, "0x020000", "vfio-pci"),
        (SISTER, "0x020000", "vfio-pci"),
        ("0000:02:00.0", "0x060400", "pcieport"),
    ):
        place = root / "bus/pci/devices" / address
        place.mkdir(parents=True)
        for name, text in (("vendor", "0x1234"), ("device", "0x11e8"), ("class", code)):
            (place / name).write_text(text)
        (root / "bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
        (place / "driver").symlink_to(root / "bus/pci/drivers" / driver)
        group = root / "kernel/iommu_groups/7"
        (group / "devices").mkdir(parents=True, exist_ok=True)
        (group / "devices" / address).symlink_to(place)
        (group / "type").write_text("DMA")
        (place / "iommu_group").symlink_to(group)
    character = root / "bus/pci/devices" / CARD / "vfio-dev/vfio0"
    character.mkdir(parents=True)
    (character / "dev").write_text("241:0")
    return root


def nodes(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


CDEV = ("iommu", "vfio/devices/vfio0")
GROUP = ("vfio/vfio", "vfio/7")


@pytest.mark.parametrize(
    ("present", "wanted"),
    [
        ((*CDEV, *GROUP), "iommufd"),
        (CDEV, "iommufd"),
        (GROUP, "type1"),
        (("iommu", *GROUP), "type1"),
        (("vfio/devices/vfio0", *GROUP), "type1"),
        ((), "type1"),
    ],
)
def test_iommufd_is_chosen_where_it_is_whole(
    sysfs: Path, tmp_path: Path, present: tuple[str, ...], wanted: str
) -> None:
    card = pci_sysfs.function(Bdf.parse(CARD), sysfs)
    assert pci.choose(TARGET, card, nodes(tmp_path / "dev", *present)) == wanted


def test_what_this_user_may_open_comes_before_what_is_newer(
    sysfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = pci_sysfs.function(Bdf.parse(CARD), sysfs)
    dev = nodes(tmp_path / "dev", *CDEV, *GROUP)
    denied = {str(dev / name) for name in CDEV}

    def access(path: Path, mode: int) -> bool:
        assert mode == os.R_OK | os.W_OK
        return str(path) not in denied

    monkeypatch.setattr(os, "access", access)
    assert pci.choose(TARGET, card, dev) == "type1"
    denied |= {str(dev / name) for name in GROUP}
    assert pci.choose(TARGET, card, dev) == "iommufd"


@pytest.mark.parametrize("asked", ["type1", "iommufd", "uio"])
def test_the_target_may_say_which(sysfs: Path, tmp_path: Path, asked: str) -> None:
    card = pci_sysfs.function(Bdf.parse(CARD), sysfs)
    target = Target.parse(f"pci:{CARD}?backend={asked}")
    assert pci.choose(target, card, tmp_path) == asked


def test_all_functions_of_a_group_are_served_together(sysfs: Path) -> None:
    sister = Target.parse(f"pci:{SISTER}")
    assert pci.group_targets(TARGET, sysfs) == [TARGET, sister]
    assert pci.group_targets(sister, sysfs) == [sister, TARGET]


def test_siblings_go_the_same_way_but_keep_their_own_width(sysfs: Path) -> None:
    target = Target.parse(f"pci:{CARD}?dma_bits=40&backend=type1")
    sister = Target.parse(f"pci:{SISTER}?backend=type1")
    assert pci.group_targets(target, sysfs) == [target, sister]


def test_a_sibling_without_vfio_is_not_served(sysfs: Path) -> None:
    (sysfs / "bus/pci/devices" / SISTER / "driver").unlink()
    assert pci.group_targets(TARGET, sysfs) == [TARGET]


def test_without_an_iommu_a_function_is_alone(sysfs: Path) -> None:
    uio = Target.parse(f"pci:{CARD}?backend=uio")
    assert pci.group_targets(uio, sysfs) == [uio]
    (sysfs / "bus/pci/devices" / CARD / "iommu_group").unlink()
    assert pci.group_targets(TARGET, sysfs) == [TARGET]


def test_only_what_has_no_iommu_is_cautioned_about() -> None:
    assert pci.caution(TARGET) is None
    assert pci.caution(Target.parse("emu:edu?backend=uio")) is None
    text = pci.caution(Target.parse(f"pci:{CARD}?backend=uio"))
    assert text is not None
    assert "IOMMU" in text


def test_a_function_that_is_not_there_is_a_bad_target() -> None:
    with pytest.raises(BadTarget, match="no such PCI function"):
        backends.connect(Target.parse("pci:ffff:ff:1f.7"))


@pytest.fixture
def card(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fabricated card in the place of the machine's; returns its directory."""
    monkeypatch.setattr(pci, "function", lambda bdf: pci_sysfs.function(bdf, sysfs))

    def examine(bdf: Bdf, *, backend: str) -> list[Finding]:
        assert (str(bdf), backend) == (CARD, "vfio")
        return FINDINGS

    monkeypatch.setattr(pci_usable, "examine", examine)
    return sysfs / "bus/pci/devices" / CARD


FINDINGS = [
    Finding("IOMMU", True, "on"),
    Finding("reset", None, "none", "buy another"),
    Finding("driver", False, "nouveau has it", "holdfast bind 0000:03:00.0"),
    Finding("group", False, "more", "something later"),
]


def test_an_error_names_the_first_fix_that_doctor_finds(card: Path) -> None:
    (card / "driver").unlink()
    with pytest.raises(NotSupported, match="no driver") as refused:
        pci.open_target(TARGET)
    assert refused.value.hint == "holdfast bind 0000:03:00.0"
    assert "nouveau has it" in refused.value.what


def test_a_function_without_an_iommu_is_not_opened(card: Path) -> None:
    (card / "iommu_group").unlink()
    with pytest.raises(NotSupported, match="no IOMMU"):
        pci.open_target(TARGET)


def test_an_error_that_knows_its_remedy_keeps_it(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(found: pci_sysfs.PciFunction, way: str, target: str) -> HoldfastError:
        raise Busy("held by pid 7", target=target, hint="end it")

    monkeypatch.setattr(pci, "_open", busy)
    with pytest.raises(Busy) as refused:
        pci.open_target(TARGET)
    assert refused.value.hint == "end it"
