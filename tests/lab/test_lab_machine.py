# SPDX-License-Identifier: Apache-2.0
"""Machine descriptions, and the command lines they turn into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.lab import machine, qemu, rootfs
from holdfast.lab.machine import Guest

PORTS = {"output": 5, "records": 6, "questions": 7, "monitor": 8}
BOOT = qemu.Boot(Path("/k"), Path("/i"), Path("/c"), ("-device", "edu"), PORTS)
OWN = qemu.Emulator(("/q",), own=True)


def devices(*specs: str) -> list[str]:
    return [device for one in machine.place_functions(specs) for device in one.devices]


def paths(*specs: str) -> list[str]:
    return [one.path.removeprefix("/sys/devices/") for one in machine.place_functions(specs)]


def test_the_first_function_on_the_root_bus_is_in_slot_three() -> None:
    assert devices("edu") == ["edu,id=f0,addr=0x3"]
    assert paths("edu", "edu") == ["pci0000:00/0000:00:03.0", "pci0000:00/0000:00:04.0"]


def test_properties_go_to_the_device() -> None:
    assert devices("edu,dma_mask=0xffffffffff") == ["edu,id=f0,dma_mask=0xffffffffff,addr=0x3"]


def test_each_port_holds_one_function() -> None:
    assert devices("edu@port", "edu", "edu@port") == [
        "pcie-root-port,id=port-f0,chassis=16,slot=16,addr=0x10",
        "edu,id=f0,bus=port-f0",
        "edu,id=f1,addr=0x3",
        "pcie-root-port,id=port-f2,chassis=17,slot=17,addr=0x11",
        "edu,id=f2,bus=port-f2",
    ]


def test_functions_on_the_bridge_share_it() -> None:
    assert [text.partition(",")[0] for text in devices("edu@bridge", "edu@bridge")] == [
        "pcie-root-port",
        "pcie-pci-bridge",
        "edu",
        "edu",
    ]
    assert paths("edu@bridge", "edu@bridge") == [
        "pci0000:00/0000:00:1c.0/0000:*:00.0/0000:*:01.0",
        "pci0000:00/0000:00:1c.0/0000:*:00.0/0000:*:02.0",
    ]


def test_a_function_can_be_put_back_as_it_was() -> None:
    one, two = machine.place_functions(("edu,dma_mask=0xff@port", "edu@bridge"))
    assert machine.properties(one) == {
        "driver": "edu",
        "id": "f0",
        "dma_mask": 255,
        "bus": "port-f0",
    }
    assert machine.properties(two)["addr"] == "0x1"


def test_an_nvme_has_a_drive(tmp_path: Path) -> None:
    arguments = machine.device_arguments(machine.place_functions(("nvme",)), tmp_path)
    assert arguments == [
        "-drive",
        f"if=none,id=df0,format=raw,file={tmp_path / 'f0.img'}",
        "-device",
        "nvme,id=f0,serial=holdfast-f0,drive=df0,addr=0x3",
    ]
    assert (tmp_path / "f0.img").stat().st_size == 64 << 20


@pytest.mark.parametrize(
    "spec", ["", "e1000", "edu@moon", "edu,dma_mask", "edu,a=b c", "edu,=", "edu@port@port"]
)
def test_what_is_not_understood_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        machine.place_functions((spec,))


@given(st.lists(st.sampled_from(["edu", "nvme", "edu@port", "edu@bridge"]), max_size=8))
def test_no_two_functions_share_a_place(specs: list[str]) -> None:
    placed = machine.place_functions(tuple(specs))
    assert len({one.path for one in placed}) == len(specs)
    assert [one.name for one in placed] == [f"f{index}" for index in range(len(specs))]
    assert sum("pcie-pci-bridge" in text for text in devices(*specs)) <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory": "64M"},
        {"memory": "2"},
        {"memory": "2G,maxmem=4G"},
        {"cpus": 0},
        {"cpus": 99},
        {"driver": "e1000e"},
        {"hugepages": 600},
        {"hugepages": -1},
        {"timeout": 0.0},
        {"append": "a\nb"},
        {"kernel": "/no/such/file"},
        {"functions": ("edu",) * 9},
    ],
)
def test_a_wrong_description_is_refused_before_anything_starts(wrong: dict[str, object]) -> None:
    values: dict[str, object] = {name: getattr(Guest(), name) for name in Guest.__slots__}
    with pytest.raises(UsageError):
        machine.check(Guest(**(values | wrong)))  # type: ignore[arg-type]


def test_the_machine_has_an_iommu_unless_it_must_not() -> None:
    line = qemu.arguments(OWN, Guest(), BOOT)
    assert "intel-iommu,intremap=on,caching-mode=on" in line
    assert "q35,kernel-irqchip=split" in line
    assert " intel_iommu=on" in line[line.index("-append") + 1]
    line = qemu.arguments(OWN, Guest(iommu=False, hugepages=9, append=" x=1  y"), BOOT)
    assert not any("intel-iommu," in word for word in line)
    assert line[line.index("-append") + 1].endswith(
        " intel_iommu=off hugepagesz=2M hugepages=9 x=1 y"
    )


def test_the_ports_follow_the_console() -> None:
    line = qemu.arguments(OWN, Guest(), BOOT)
    assert [line[i + 1] for i, word in enumerate(line) if word == "-serial"] == [
        "chardev:console",
        "chardev:output",
        "chardev:records",
        "chardev:questions",
    ]
    assert line[line.index("file,id=records,path=/dev/fdset/1,append=on") - 2] == "fd=6,set=1"
    assert "socket,id=questions,fd=7" in line
    assert line[-2:] == ["-device", "edu"]


def test_processor_and_accelerator_fit_the_emulator() -> None:
    def processor(emulator: qemu.Emulator) -> tuple[str, str]:
        line = qemu.arguments(emulator, Guest(), BOOT)
        return line[line.index("-accel") + 1], line[line.index("-cpu") + 1]

    assert processor(OWN) == ("tcg,thread=single", "max")
    assert processor(replace(OWN, own=False)) == ("tcg,thread=single", "max,-cx16")
    assert processor(replace(OWN, kvm=True)) == ("kvm", "host")


def test_the_command_survives_the_shell() -> None:
    script = rootfs.command_script(Guest(), ["echo", "it's", "$HOME *", ""], {"A": "b 'c'"})
    text = script.decode()
    assert "export A='b '\"'\"'c'\"'\"''\n" in text
    assert text.endswith("exec echo 'it'\"'\"'s' '$HOME *' ''\n")
    assert "export HOLDFAST_LAB_IOMMU=on\n" in text


@pytest.mark.parametrize("name", ["", "A-B", "1A", "A;B", "Ä"])
def test_a_name_that_no_variable_has_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        rootfs.command_script(Guest(), ["true"], {name: "x"})


def test_no_command_is_refused() -> None:
    with pytest.raises(UsageError):
        rootfs.command_script(Guest(), [], {})


def test_modules_come_with_what_they_need() -> None:
    index = (
        "kernel/virt/lib/irqbypass.ko.xz:\n"
        "kernel/drivers/vfio/vfio.ko.xz:\n"
        "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz "
        "kernel/virt/lib/irqbypass.ko.xz\n"
        "kernel/drivers/vfio/vfio_iommu_type1.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n"
        "kernel/drivers/other.ko.xz:\n"
    )
    assert rootfs.wanted_modules(index, ["vfio-iommu-type1", "vfio_pci", "built_in"]) == [
        "kernel/drivers/vfio/pci/vfio-pci.ko.xz",
        "kernel/drivers/vfio/vfio.ko.xz",
        "kernel/drivers/vfio/vfio_iommu_type1.ko.xz",
        "kernel/virt/lib/irqbypass.ko.xz",
    ]


def test_the_source_tree_goes_along_without_what_is_built(tmp_path: Path) -> None:
    rootfs.copy_checkout(tmp_path / "work")
    copied = {str(path.relative_to(tmp_path / "work")) for path in (tmp_path / "work").rglob("*")}
    assert "src/holdfast/lab/init.sh" in copied
    assert "pyproject.toml" in copied
    assert not [path for path in copied if "__pycache__" in path or path.startswith(".")]
