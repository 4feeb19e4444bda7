# SPDX-License-Identifier: Apache-2.0
"""Functions change drivers as planned, and get back what they had; nothing waits for ever."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.errors import BadTarget, Busy, NoPermission, NotSupported, SystemFailure
from holdfast.kernel import pci_binding, pci_sysfs, sysfs_writes
from holdfast.kernel.pci_binding import Before, plan_bind, plan_unbind
from holdfast.kernel.sysfs_writes import Write, WriteFailed, WriteHangs, carry_out
from holdfast.testing.pci_tree import BOOT, PciTree
from holdfast.values import Bdf

EDU = "0000:00:03.0"
AT = Bdf.parse(EDU)


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path)


def driver(tree: PciTree) -> str | None:
    return pci_sysfs.function(AT, tree.sysfs).driver


def bind(tree: PciTree, name: str = "vfio-pci") -> None:
    pci_binding.bind(plan_bind(AT, name, tree.machine()), tree.machine())


def unbind(tree: PciTree) -> str | None:
    return pci_binding.unbind(plan_unbind(AT, tree.machine()), tree.machine())


def override(tree: PciTree) -> str:
    return (tree.here(EDU) / "driver_override").read_text().strip()


# -- there and back ------------------------------------------------------------


def test_a_function_goes_to_vfio_and_back_to_the_driver_it_had(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    bind(tree)
    assert (driver(tree), override(tree)) == ("vfio-pci", "vfio-pci")
    assert unbind(tree) == "e1000e"
    assert (driver(tree), override(tree)) == ("e1000e", "(null)")
    assert not list(tree.runtime.iterdir())


def test_the_writes_are_the_plan_in_its_order(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    plan = plan_bind(AT, "vfio-pci", tree.machine())
    assert plan.lines() == [
        f"echo vfio-pci > {tree.sysfs}/bus/pci/devices/{EDU}/driver_override",
        f"echo {EDU} > {tree.sysfs}/bus/pci/drivers/e1000e/unbind",
        f"echo {EDU} > {tree.sysfs}/bus/pci/drivers_probe",
    ]
    assert tree.written == []
    assert driver(tree) == "e1000e"
    bind(tree)
    assert tree.written == plan.lines()


def test_a_second_bind_or_unbind_writes_nothing(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    bind(tree)
    tree.written.clear()
    bind(tree)
    assert tree.written == []
    unbind(tree)
    tree.written.clear()
    assert unbind(tree) == "e1000e"
    assert tree.written == []


def test_a_function_without_a_driver_has_none_again(tree: PciTree) -> None:
    tree.add(EDU)
    bind(tree)
    tree.native[EDU] = "e1000e"  # came in meanwhile; it did not have it
    assert unbind(tree) is None


def test_what_it_had_first_is_what_it_gets_back(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    bind(tree)
    bind(tree, "uio_pci_generic")
    assert driver(tree) == "uio_pci_generic"
    assert unbind(tree) == "e1000e"


def test_an_override_set_by_somebody_else_is_restored(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    (tree.here(EDU) / "driver_override").write_text("e1000e\n")
    bind(tree)
    assert unbind(tree) == "e1000e"
    assert override(tree) == "e1000e"


def test_of_two_drivers_that_match_it_gets_the_one_it_had(tree: PciTree) -> None:
    tree.add(EDU, driver="nvidia")
    tree.native[EDU] = "nouveau"
    bind(tree)
    assert unbind(tree) == "nvidia"


def test_with_nothing_remembered_the_kernel_chooses(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    bind(tree)
    pci_binding.forget(AT, tree.machine())
    assert unbind(tree) == "e1000e"


def test_a_function_that_was_never_bound_here_is_left_alone(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    plan = plan_unbind(AT, tree.machine())
    assert (plan.writes, plan.why) == ((), "e1000e has it; not bound by Holdfast")
    assert pci_binding.unbind(plan, tree.machine()) == "e1000e"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    had=st.sampled_from([None, "e1000e", "vfio-pci", "uio_pci_generic"]),
    steps=st.lists(st.sampled_from(["vfio-pci", "uio_pci_generic", None]), max_size=6),
    number=st.integers(0, 1 << 60),
)
def test_after_any_changes_unbind_restores_the_first_state(
    tmp_path: Path, had: str | None, steps: list[str | None], number: int
) -> None:
    root = tmp_path / f"{had}-{steps}-{number}"
    tree = PciTree(root)
    if not (root / "sys/bus/pci/devices" / EDU).exists():
        tree.add(EDU, driver=had)
    first = (driver(tree), override(tree))
    changed = False
    for step in steps:
        if step is None:
            unbind(tree)
        else:
            changed |= driver(tree) != step
            bind(tree, step)
            assert driver(tree) == step
    if changed:
        unbind(tree)
        # bound to one of ours from the start, with nothing remembered: the kernel chooses
        assert (driver(tree), override(tree)) == first


# -- what is refused ------------------------------------------------------------


def test_no_function_bridges_and_vfio_without_an_iommu_are_refused(tree: PciTree) -> None:
    with pytest.raises(BadTarget):
        plan_bind(AT, "vfio-pci", tree.machine())
    tree.add("0000:00:01.0", class_code=0x060400, driver="pcieport")
    with pytest.raises(NotSupported, match="bridge"):
        plan_bind(Bdf.parse("0000:00:01.0"), "vfio-pci", tree.machine())
    tree.add(EDU, group=None)
    with pytest.raises(NotSupported, match="no IOMMU") as caught:
        plan_bind(AT, "vfio-pci", tree.machine())
    assert "uio_pci_generic" in caught.value.hint
    assert plan_bind(AT, "uio_pci_generic", tree.machine()).writes


# -- what goes wrong ------------------------------------------------------------


def test_a_probe_that_fails_is_noticed_and_the_function_given_back(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    tree.broken.add("vfio-pci")
    with pytest.raises(SystemFailure, match="vfio-pci was to have it, and no driver has") as caught:
        bind(tree)
    assert "dmesg" in caught.value.hint
    assert (driver(tree), override(tree)) == ("e1000e", "(null)")
    assert not list(tree.runtime.iterdir())


def test_a_refused_write_names_the_write(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    tree.refused["driver_override"] = errno.EACCES
    with pytest.raises(NoPermission, match="driver_override") as caught:
        bind(tree)
    assert caught.value.errno == errno.EACCES
    assert "root" in caught.value.hint
    assert driver(tree) == "e1000e"


def test_a_write_that_is_too_slow_is_said_to_be_called_off(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    tree.refused["drivers_probe"] = errno.ETIMEDOUT
    with pytest.raises(SystemFailure, match="called off") as caught:
        bind(tree)
    assert "--timeout" in caught.value.hint
    assert driver(tree) == "e1000e"


def test_a_held_function_names_its_holder_and_can_be_finished_later(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    bind(tree)
    tree.process(42, "keeper", [f"{tree.dev}/vfio/7"])
    tree.held.add(EDU)
    with pytest.raises(Busy, match=r"pid 42 \(keeper\) holds") as caught:
        unbind(tree)
    assert "goes on in the kernel" in caught.value.hint
    written = list(tree.written)
    for again in (lambda: plan_unbind(AT, tree.machine()), lambda: bind(tree)):
        with pytest.raises(Busy, match="an earlier unbind is still waiting"):
            again()
    assert tree.written == written  # nothing more is written while it waits
    (tree.proc / "42/fd/3").unlink()
    tree.held.clear()
    assert unbind(tree) == "e1000e"


def test_a_module_that_is_missing_is_asked_for_and_named(tree: PciTree, tmp_path: Path) -> None:
    tree.add(EDU, driver="e1000e")
    (tree.sysfs / "bus/pci/drivers/vfio-pci").rmdir()
    plan = plan_bind(AT, "vfio-pci", tree.machine())
    assert plan.lines()[0] == "modprobe vfio-pci"
    with pytest.raises(SystemFailure, match="vfio-pci is not loaded") as caught:
        pci_binding.bind(plan, tree.machine())
    assert "sudo modprobe vfio-pci" in caught.value.hint
    assert tree.written == []
    program = tmp_path / "modprobe"
    program.write_text(f'#!/bin/sh\nmkdir "{tree.sysfs}/bus/pci/drivers/$1"\n')
    program.chmod(0o755)
    pci_binding.bind(plan, replace(tree.machine(), modprobe=str(program)))
    assert driver(tree) == "vfio-pci"


def test_no_modprobe_at_all_is_no_crash(tree: PciTree, tmp_path: Path) -> None:
    tree.add(EDU)
    (tree.sysfs / "bus/pci/drivers/vfio-pci").rmdir()
    machine = replace(tree.machine(), modprobe=str(tmp_path / "none"))
    with pytest.raises(SystemFailure, match=r"is not loaded: .*No such file"):
        pci_binding.bind(plan_bind(AT, "vfio-pci", machine), machine)


# -- remembering ------------------------------------------------------------


def test_what_is_remembered_says_what_it_is_and_is_private(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    bind(tree)
    (place,) = tree.runtime.iterdir()
    told = json.loads(place.read_text())
    assert "holdfast unbind" in told["what"]
    assert (told["function"], told["driver"]) == (EDU, "e1000e")
    assert stat.S_IMODE(tree.runtime.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        json.dumps({"boot": "another", "driver": "e1000e"}),
        json.dumps({"boot": BOOT, "driver": "../../../../tmp/x"}),
        json.dumps({"boot": BOOT, "driver": ".."}),
    ],
)
def test_a_record_that_is_broken_stale_or_hostile_is_none(tree: PciTree, content: str) -> None:
    tree.fill(tree.runtime, {f"bound-{EDU}.json": content})
    assert pci_binding.recall(AT, tree.machine()) is None


def test_a_directory_that_others_can_write_is_not_used(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    tree.runtime.mkdir(parents=True)
    tree.runtime.chmod(0o777)
    with pytest.raises(NoPermission, match="others can write"):
        bind(tree)
    assert driver(tree) == "e1000e"


def test_the_record_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_RUNTIME_DIR", "/run/mine")
    assert pci_binding.Machine().directory() == Path("/run/mine")
    monkeypatch.delenv("HOLDFAST_RUNTIME_DIR")
    assert pci_binding.Machine().directory() == Path("/run/holdfast")


def test_a_crash_after_remembering_loses_nothing(tree: PciTree) -> None:
    tree.add(EDU, driver="e1000e")
    pci_binding.remember(AT, Before("e1000e", ""), tree.machine())
    assert unbind(tree) == "e1000e"
    assert not list(tree.runtime.iterdir())


# -- writes that may never return ------------------------------------------------------------


@pytest.mark.usefixtures("clean")
def test_writes_are_done_in_order_by_a_child(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.touch()
    carry_out([Write(paths[0], "first"), Write(paths[1], "\n")], 30.0)
    assert [path.read_text() for path in paths] == ["first", "\n"]


@pytest.mark.usefixtures("clean")
def test_a_write_that_is_refused_ends_it(tmp_path: Path) -> None:
    last = tmp_path / "last"
    last.touch()
    with pytest.raises(WriteFailed) as caught:
        carry_out([Write(tmp_path / "missing", "x"), Write(last, "y")], 30.0)
    assert caught.value.errno == errno.ENOENT
    assert last.read_text() == ""
    assert not (tmp_path / "missing").exists()  # an attribute is never created


@pytest.fixture
def endless(tmp_path: Path) -> list[Write]:
    """Three writes; the second waits for a reader of a FIFO."""
    os.mkfifo(tmp_path / "fifo")
    for name in ("done", "last"):
        (tmp_path / name).touch()
    names = ("done", "fifo", "last")
    return [Write(tmp_path / name, "x") for name in names]


@pytest.mark.usefixtures("clean")
def test_a_write_that_takes_too_long_is_called_off_with_those_after_it(
    endless: list[Write],
) -> None:
    with pytest.raises(WriteFailed) as caught:
        carry_out(endless, 0.5)
    assert (caught.value.write, caught.value.errno) == (endless[1], errno.ETIMEDOUT)
    reader = os.open(endless[1].path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert os.read(reader, 1) == b""  # nobody writes any more
    finally:
        os.close(reader)
    assert [endless[0].path.read_text(), endless[2].path.read_text()] == ["x", ""]


@pytest.mark.usefixtures("clean")
def test_a_write_that_cannot_be_called_off_is_said_to_hang(
    endless: list[Write], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = os.kill
    spared: list[int] = []
    monkeypatch.setattr(sysfs_writes, "_LAST_MOMENT", 0.2)
    # deaf, as in the kernel
    monkeypatch.setattr("os.kill", lambda pid, _: spared.append(pid))
    with pytest.raises(WriteHangs) as caught:
        carry_out(endless, 0.5)
    assert caught.value.write == endless[1]
    (child,) = spared
    kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.usefixtures("clean")
def test_a_child_that_dies_is_not_taken_for_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysfs_writes, "_CHILD", "import os; os.abort()")
    with pytest.raises(SystemFailure, match="died"):
        carry_out([Write(tmp_path / "a", "x")], 30.0)


@pytest.mark.usefixtures("clean")
def test_a_child_that_cannot_be_started_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "no python"))
    with pytest.raises(SystemFailure):
        carry_out([Write(tmp_path / "a", "x")], 30.0)
