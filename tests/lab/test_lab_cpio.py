# SPDX-License-Identifier: Apache-2.0
"""The cpio writer, against a reader of its own kind and against cpio(1) where there is one."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.lab.cpio import Writer

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

MEMBER = st.tuples(
    st.text("abcdefgh.-_ ä", min_size=1, max_size=40).filter(lambda t: t not in {".", ".."}),
    st.binary(max_size=600),
)


@dataclass(frozen=True)
class Member:
    name: str
    mode: int
    data: bytes
    inode: int


def read(archive: bytes) -> tuple[list[Member], int]:
    """Members up to the trailer, and the bytes read; by the format's text, not by the writer."""
    found: list[Member] = []
    at = 0
    while True:
        header = archive[at : at + 110]
        assert header[:6] == b"070701"
        fields = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        inode, mode, size, length = fields[0], fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length]
        assert name.endswith(b"\0")
        start = (at + 110 + length + 3) & ~3
        at = (start + size + 3) & ~3
        if name == b"TRAILER!!!\0":
            return found, (at + 511) & ~511
        data = archive[start : start + size]
        assert len(data) == size
        found.append(Member(name[:-1].decode(), mode, data, inode))


def test_every_kind_of_member_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "own").write_bytes(b"x" * 1001)
    (tmp_path / "own").chmod(0o751)
    out = io.BytesIO()
    with Writer(out) as writer:
        writer.directory("d")
        writer.symlink("d/l", "../elsewhere")
        writer.file("d/f", b"abc", 0o640)
        writer.file_from("d/own", tmp_path / "own")
    members, end = read(out.getvalue())
    assert [(one.name, one.mode, one.data) for one in members] == [
        ("d", stat.S_IFDIR | 0o755, b""),
        ("d/l", stat.S_IFLNK | 0o777, b"../elsewhere"),
        ("d/f", stat.S_IFREG | 0o640, b"abc"),
        ("d/own", stat.S_IFREG | 0o751, b"x" * 1001),
    ]
    assert end == len(out.getvalue())
    assert len({one.inode for one in members}) == len(members)


@given(st.lists(MEMBER, max_size=20, unique_by=lambda pair: pair[0]))
def test_whatever_is_written_is_read_back(files: list[tuple[str, bytes]]) -> None:
    out = io.BytesIO()
    with Writer(out) as writer:
        for name, data in files:
            writer.file(name, data)
    members, _ = read(out.getvalue())
    assert [(one.name, one.data) for one in members] == files


def test_a_second_archive_can_follow_the_first() -> None:
    out = io.BytesIO()
    for text in (b"first", b"second"):
        with Writer(out) as writer:
            writer.file("same", text)
    first, end = read(out.getvalue())
    second, _ = read(out.getvalue()[end:])
    assert [one.data for one in (*first, *second)] == [b"first", b"second"]


def make_tree(root: Path) -> None:
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/file").write_text("text")
    (root / "a/link").symlink_to("b")
    (root / "left").mkdir()
    (root / "left/out").write_text("not wanted")


def test_a_tree_comes_parents_first_and_without_what_is_left_out(tmp_path: Path) -> None:
    make_tree(tmp_path)
    out = io.BytesIO()
    with Writer(out) as writer:
        writer.tree("top", tmp_path, skip=["left"])
    names = [one.name for one in read(out.getvalue())[0]]
    assert names == ["top/a", "top/a/b", "top/a/link", "top/a/b/file"]


def test_equal_trees_give_equal_archives(tmp_path: Path) -> None:
    archives = []
    for name in ("one", "two"):
        make_tree(tmp_path / name)
        out = io.BytesIO()
        with Writer(out) as writer:
            writer.tree("", tmp_path / name)
        archives.append(out.getvalue())
    assert archives[0] == archives[1]


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio(1)")
def test_cpio_unpacks_it(tmp_path: Path) -> None:
    make_tree(tmp_path / "in")
    archive = tmp_path / "archive"
    with archive.open("wb") as out, Writer(out) as writer:
        writer.tree("", tmp_path / "in")
    (tmp_path / "out").mkdir()
    with archive.open("rb") as file:
        subprocess.run(
            ["cpio", "-id", "--quiet", "--no-preserve-owner"],
            stdin=file,
            cwd=tmp_path / "out",
            check=True,
        )
    assert (tmp_path / "out/a/link/file").read_text() == "text"


class Meddler(io.BytesIO):
    """Gives a file another length as soon as something is written here."""

    def __init__(self, path: Path, length: int) -> None:
        super().__init__()
        self._path, self._length = path, length

    def write(self, data: Buffer) -> int:
        os.truncate(self._path, self._length)
        return super().write(data)


def test_a_file_that_grows_while_it_is_read_is_taken_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    out = Meddler(path, 1000)
    with Writer(out) as writer:
        writer.file_from("file", path)
    assert [one.data for one in read(out.getvalue())[0]] == [b"x" * 10]


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    with Writer(Meddler(path, 3)) as writer, pytest.raises(OSError, match="shorter"):
        writer.file_from("file", path)
