# SPDX-License-Identifier: Apache-2.0
"""``holdfast ls``, ``doctor``, ``bind``, ``unbind`` on fabricated machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from holdfast import cli
from holdfast.cli import bind, doctor, holdfast, ls, pci_common, unbind
from holdfast.errors import BadTarget, Busy
from holdfast.kernel.pci_names import PciNames
from holdfast.testing.pci_tree import PciTree

EDU = "0000:00:03.0"
SIBLING = "0000:00:03.1"

Run = Callable[..., Result]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PciTree:
    made = PciTree(tmp_path)
    for module in (ls, doctor, bind, unbind):
        monkeypatch.setattr(module, "this_machine", made.machine)
    monkeypatch.setattr(ls, "PciNames", lambda: PciNames([tmp_path / "none"]))
    monkeypatch.setenv("HOLDFAST_RUNTIME_DIR", str(tmp_path / "keepers"))
    return made


@pytest.fixture
def run(tree: PciTree) -> Run:
    def invoke(*arguments: str) -> Result:
        result = CliRunner().invoke(holdfast, arguments)
        unexpected = not isinstance(result.exception, (SystemExit, type(None), Busy, BadTarget))
        if unexpected and result.exception is not None:
            raise result.exception
        return result

    return invoke


def test_ls_shows_functions_and_the_target_to_write(tree: PciTree, run: Run) -> None:
    tree.add(EDU, driver="vfio-pci", reset="flr bus")
    tree.add("0000:00:04.0", driver="uio_pci_generic", group=None, reset="")
    tree.add("0000:00:00.0", class_code=0x060000)
    tree.process(42, "qemu", [f"{tree.dev}/vfio/7"])
    lines = run("ls").output.splitlines()
    assert len(lines) == 3
    assert lines[1].split() == (
        f"pci:{EDU} 1234:11e8 00ff00 vfio-pci 7 (DMA) flr bus pid 42 (qemu)".split()
    )
    assert lines[2].startswith("pci:0000:00:04.0?backend=uio ")
    assert len(run("ls", "--all").output.splitlines()) == 4


def test_ls_speaks_json(tree: PciTree, run: Run) -> None:
    tree.add(EDU, driver="vfio-pci")
    tree.process(42, "qemu", [f"{tree.dev}/vfio/7"])
    (row,) = json.loads(run("ls", "--json").output)
    assert row["target"] == f"pci:{EDU}"
    assert (row["vendor"], row["class"], row["iommu_group"]) == (0x1234, 0x00FF00, 7)
    assert row["holders"] == [
        {"pid": 42, "command": "qemu", "how": f"{tree.dev}/vfio/7", "certain": True}
    ]
    assert row["keeper"] is None


def test_a_keeper_is_named_as_one(tree: PciTree, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.add(EDU, driver="vfio-pci")
    tree.process(42, "python3", [f"{tree.dev}/vfio/7"])
    told = {42: f"keeper 42 of pci:{EDU}, 1 leases"}
    for module in (ls, doctor):
        monkeypatch.setattr(module, "keepers", lambda: told)
    assert told[42] in run("ls").output
    result = run("doctor", EDU)
    assert result.exit_code == 0
    assert f"kept by Holdfast: {told[42]}" in result.output


def test_an_empty_machine_says_so(run: Run) -> None:
    assert "no PCI functions" in run("ls").output
    result = run("doctor")
    assert result.exit_code == 1
    assert "holdfast ls" in result.output


def test_doctor_ends_with_0_where_all_is_usable_and_1_where_not(tree: PciTree, run: Run) -> None:
    tree.add(EDU, driver="vfio-pci")
    tree.add("0000:00:04.0", driver="e1000e", group=8)
    assert run("doctor").exit_code == 0  # asked for: what is bound for use
    assert run("doctor", EDU).exit_code == 0
    result = run("doctor", EDU, "0000:00:04.0")
    assert result.exit_code == 1
    assert "sudo holdfast bind 0000:00:04.0" in result.output


def test_doctor_speaks_json(tree: PciTree, run: Run) -> None:
    tree.add(EDU, driver="e1000e")
    result = run("doctor", "--json", EDU)
    told = json.loads(result.output)
    assert (result.exit_code, told["usable"]) == (1, False)
    (function,) = told["functions"]
    assert function["bdf"] == EDU
    wrong = [finding for finding in function["findings"] if finding["ok"] is False]
    assert [finding["name"] for finding in wrong] == ["driver"]
    assert wrong[0]["fix"] == f"sudo holdfast bind {EDU}"
    assert any(finding["name"] == "IOMMU" for finding in told["machine"])


def test_a_function_for_uio_does_not_need_the_machines_iommu(tree: PciTree, run: Run) -> None:
    tree.add(EDU, driver="uio_pci_generic", group=None)
    tree.fill(
        tree.sysfs,
        {"kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "3"},
    )
    assert run("doctor", EDU).exit_code == 0
    assert run("doctor", EDU, "--backend", "vfio").exit_code == 1


def test_try_needs_a_name(run: Run) -> None:
    assert run("doctor", "--try").exit_code == 2


def test_bind_says_what_changed_and_unbind_too(tree: PciTree, run: Run) -> None:
    tree.add(EDU, driver="e1000e")
    assert run("bind", EDU).output == f"{EDU}: e1000e -> vfio-pci\n"
    assert run("bind", f"pci:{EDU}").output == f"{EDU}: vfio-pci has it already\n"
    assert run("unbind", "00:03.0").output == f"{EDU}: vfio-pci -> e1000e\n"
    assert "not bound by Holdfast" in run("unbind", EDU).output


def test_a_dry_run_prints_each_write_and_does_none(tree: PciTree, run: Run) -> None:
    tree.add(EDU, driver="e1000e")
    dry = run("bind", "--dry-run", EDU).output
    assert tree.written == []
    assert not tree.runtime.exists()
    run("bind", EDU)
    assert [line for line in dry.splitlines() if not line.startswith("#")] == tree.written
    tree.written.clear()
    dry = run("unbind", "--dry-run", EDU).output
    assert f"# {EDU}: vfio-pci -> e1000e" in dry
    assert tree.written == []
    run("unbind", EDU)
    assert [line for line in dry.splitlines() if not line.startswith("#")] == tree.written


def test_siblings_are_named_and_touched_only_when_asked(tree: PciTree, run: Run) -> None:
    tree.add(EDU, driver="e1000e")
    tree.add(SIBLING, driver="snd_hda_intel")
    tree.add("0000:00:01.0", driver="pcieport", class_code=0x060400)
    result = run("bind", EDU)
    assert result.exit_code == 0
    assert f"{SIBLING} (snd_hda_intel)" in result.output
    assert f"next: sudo holdfast bind {SIBLING}" in result.output
    assert not any(SIBLING in line for line in tree.written)
    result = run("bind", "--group", EDU)
    assert f"{SIBLING}: snd_hda_intel -> vfio-pci" in result.output
    assert "not viable" not in result.output
    assert not any("00:01.0" in line for line in tree.written)


def test_what_the_system_uses_is_refused_unless_forced(tree: PciTree, run: Run) -> None:
    tree.add(EDU, driver="nvme")
    tree.add("0000:00:04.0", group=8)
    tree.fill(tree.here(EDU) / "block/nvme0n1", {"dev": "259:0"})
    (tree.sysfs / "class/block/nvme0n1").symlink_to(tree.here(EDU) / "block/nvme0n1")
    tree.fill(tree.proc, {"self/mountinfo": "20 1 259:0 / / rw - ext4 /dev/nvme0n1 rw\n"})
    refused = run("bind", "0000:00:04.0", EDU)
    assert isinstance(refused.exception, Busy)
    assert "nvme0n1 is mounted on /" in str(refused.exception)
    assert tree.written == []  # not even the function that nobody uses
    assert run("bind", "--force", EDU).output == f"{EDU}: nvme -> vfio-pci\n"


def test_uio_under_a_translating_iommu_is_warned_of(tree: PciTree, run: Run) -> None:
    tree.add(EDU)
    result = run("bind", "--driver", "uio_pci_generic", EDU)
    assert "physical addresses would fault" in result.output
    assert "next:" in result.output


@pytest.mark.parametrize("wrong", ["", "edu", "0000:00:03", "0:0:3.0", "emu:edu"])
def test_what_is_no_address_is_a_usage_error(run: Run, wrong: str) -> None:
    for command in ("bind", "unbind", "doctor"):
        result = run(command, wrong)
        assert result.exit_code == 2
        assert "not a PCI address" in result.output


def test_a_function_that_is_not_there_is_the_callers_mistake(tree: PciTree) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bind", EDU])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "text", ["0000:03:00.0", "03:00.0", "pci:0000:03:00.0", "pci:0000:03:00.0?backend=uio"]
)
def test_addresses_are_taken_as_people_write_them(text: str) -> None:
    assert str(pci_common.parse_bdf(text)) == "0000:03:00.0"


def test_keepers_that_do_not_answer_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    (tmp_path / "stale.sock").touch()
    assert pci_common.keepers() == {}
    tmp_path.chmod(0o755)  # not a place for sockets: an error for who serves, not for who looks
    assert pci_common.keepers() == {}
