# SPDX-License-Identifier: Apache-2.0
"""Huge page files: found, named, counted, and refused with the command that helps."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from holdfast.errors import BadBuffer, NotSupported, OutOfMemory, SystemFailure
from holdfast.kernel import hugetlb

PAGE = 4096


def mounts(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "mounts"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def make_pool(tmp_path: Path, total: int, free: int, reserved: int) -> Path:
    directory = tmp_path / "kernel/mm/hugepages/hugepages-2048kB"
    directory.mkdir(parents=True)
    for name, value in (
        ("nr_hugepages", total),
        ("free_hugepages", free),
        ("resv_hugepages", reserved),
    ):
        (directory / name).write_text(f"{value}\n")
    return tmp_path


def test_the_mount_with_pages_of_the_right_size_is_found(tmp_path: Path) -> None:
    path = mounts(
        tmp_path,
        "proc /proc proc rw 0 0",
        "none /dev/giant hugetlbfs rw,relatime,pagesize=1024M 0 0",
        "none /dev/unsaid hugetlbfs rw,relatime 0 0",
        r"none /dev/huge\040pages hugetlbfs rw,pagesize=2M,gid=4 0 0",
        "none /dev/later hugetlbfs rw,pagesize=2M 0 0",
    )
    assert hugetlb.mount_point(mounts=path) == Path("/dev/huge pages")
    assert hugetlb.mount_point(1 << 30, mounts=path) == Path("/dev/giant")


def test_without_a_mount_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    path = mounts(tmp_path, "none /dev/giant hugetlbfs rw,pagesize=1024M 0 0", "short")
    with pytest.raises(NotSupported, match="mount -t hugetlbfs"):
        hugetlb.mount_point(mounts=path)


def test_a_pool_is_what_a_new_mapping_can_have(tmp_path: Path) -> None:
    pool = hugetlb.pool(sysfs=make_pool(tmp_path, 10, 6, 2))
    assert pool == hugetlb.Pool(10, 6, 2)
    assert pool.available == 4
    assert hugetlb.Pool(4, 0, 1).available == 0
    with pytest.raises(NotSupported):
        hugetlb.pool(1 << 30, tmp_path)


def test_too_few_pages_name_the_command_and_how_many(tmp_path: Path) -> None:
    sysfs = make_pool(tmp_path, 10, 6, 2)
    error = hugetlb.too_few(7 * hugetlb.HUGE_PAGE - 1, sysfs=sysfs)
    assert isinstance(error, OutOfMemory)
    assert "echo 13 > /proc/sys/vm/nr_hugepages" in error.hint
    assert "4 are free" in error.what


def test_a_boot_has_an_id(tmp_path: Path) -> None:
    assert re.fullmatch("[0-9a-f]{32}", hugetlb.boot_id())
    assert hugetlb.boot_id() == hugetlb.boot_id()
    strange = tmp_path / "boot_id"
    strange.write_text("../../etc")
    with pytest.raises(SystemFailure, match="no boot id"):
        hugetlb.boot_id(strange)


def test_a_file_has_its_name_and_size_and_is_nobody_elses(tmp_path: Path) -> None:
    page = hugetlb.page_size(tmp_path)
    fd = hugetlb.create(tmp_path, "slab", 3 * page)
    status = os.stat(tmp_path / "slab")
    assert status.st_size == 3 * page
    assert status.st_mode & 0o777 == 0o600
    assert not os.get_inheritable(fd)
    with pytest.raises(SystemFailure, match="exists"):
        hugetlb.create(tmp_path, "slab", page)
    os.close(fd)


@pytest.mark.parametrize("size", [0, -PAGE, 1, PAGE + 1])
def test_a_size_that_is_no_whole_pages_makes_no_file(tmp_path: Path, size: int) -> None:
    with pytest.raises(BadBuffer):
        hugetlb.create(tmp_path, "slab", size)
    assert not os.listdir(tmp_path)


def test_a_size_that_no_file_has_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure):
        hugetlb.create(tmp_path, "slab", 1 << 62)
    assert not os.listdir(tmp_path)


def test_a_name_is_not_followed_to_another_place(tmp_path: Path) -> None:
    (tmp_path / "slab").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemFailure):
        hugetlb.create(tmp_path, "slab", hugetlb.page_size(tmp_path))
    assert not (tmp_path / "elsewhere").exists()


def test_a_mapping_is_not_inherited_by_a_forked_child(tmp_path: Path) -> None:
    fd = hugetlb.create(tmp_path, "slab", PAGE * 4)
    address = hugetlb.map_whole(fd, PAGE * 4)
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    flags = smaps.partition(f"{address:x}-")[2].partition("VmFlags:")[2].partition("\n")[0]
    assert "dc" in flags.split()
    hugetlb.unmap(address, PAGE * 4)
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text(encoding="utf-8")
    os.close(fd)
    with pytest.raises(SystemFailure):
        hugetlb.map_whole(fd, PAGE)
