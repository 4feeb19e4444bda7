# SPDX-License-Identifier: Apache-2.0
"""Which mirror, what is asked of mmdebstrap, and what is unpacked."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from holdfast.lab import packages
from holdfast.lab.failure import LabUnavailable

DEB822 = """\
# A comment
Types: deb deb-src
URIs: https://mirror.example/debian/ http://other.example:3142/deb/debian
Suites: bookworm bookworm-updates
Components: main
 contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: https://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
Enabled: no
URIs: https://disabled.example/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: https://source.example/debian
Suites: bookworm
Components: main
"""
ONE_LINE = """\
# deb http://commented.example/debian trixie main
deb http://first.example/debian trixie main non-free # why
deb [arch=amd64 signed-by=/k.gpg] https://second.example:8080/debian/ trixie main
deb-src http://source.example/debian trixie main
deb http://security.example/debian-security trixie-security main
deb https://snapshot.example/archive/debian/20250520T000000Z trixie main
deb cdrom:[Debian]/ trixie main
deb http://third.example/debian trixie contrib
deb
"""


def test_mirrors_of_a_deb822_file() -> None:
    assert packages.deb822_mirrors(DEB822) == [
        "https://mirror.example/debian",
        "http://other.example:3142/deb/debian",
    ]


def test_mirrors_of_a_one_line_file() -> None:
    assert packages.one_line_mirrors(ONE_LINE) == [
        "http://first.example/debian",
        "https://second.example:8080/debian",
    ]


def test_a_mirror_that_is_named_comes_before_the_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(packages.MIRROR_VARIABLE, "http://named.example/debian")
    (tmp_path / "sources.list").write_text(ONE_LINE)
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (parts / "debian.sources").write_text(DEB822)
    (parts / "ignored.save").write_text("deb http://saved.example/debian trixie main")
    (parts / "odd.list").write_bytes(b"\xff\xfe deb")
    (parts / "directory.list").mkdir()
    assert packages.mirrors(tmp_path) == [
        "http://named.example/debian",
        "http://first.example/debian",
        "https://second.example:8080/debian",
        "https://mirror.example/debian",
        "http://other.example:3142/deb/debian",
    ]


def test_without_any_sources_no_mirror_is_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(packages.MIRROR_VARIABLE, raising=False)
    assert packages.mirrors(tmp_path) == []


def test_the_command_checks_signatures_and_prefers_backports_only_when_asked() -> None:
    plain = packages.arguments(
        "m", "root", ["a", "b"], Path("/o"), "http://x/debian", backports=False
    )
    assert "--include=a,b" in plain
    assert plain[-1] == f"deb [signed-by={packages.KEYRING}] http://x/debian trixie main"
    assert not any("Default-Release" in word for word in plain)
    newer = packages.arguments(
        "m", "fakechroot", ["a"], Path("/o"), "http://x/debian", backports=True
    )
    assert newer[-1].endswith(" trixie-backports main")
    assert any("Default-Release" in word for word in newer)
    assert ("--format=tar" in plain, "--format=directory" in newer) == (True, True)


def test_without_mmdebstrap_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabUnavailable, match="apt-get install mmdebstrap"):
        packages.fetch(["a"], tmp_path / "out")


def test_a_failure_of_mmdebstrap_is_told_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "mmdebstrap"
    program.write_text("#!/bin/sh\necho 'I: on the way'\necho 'E: no such mirror' >&2\nexit 25\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(packages, "KEYRING", program)
    monkeypatch.setattr(packages, "modes", lambda: ("unshare", "fakechroot"))
    with pytest.raises(LabUnavailable, match="failed: E: no such mirror") as caught:
        packages.fetch(["a"], tmp_path / "out")
    assert "on the way" not in str(caught.value)
    assert "mode fakechroot" in str(caught.value)


def test_a_second_mode_is_tried_when_the_first_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "mmdebstrap"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--mode=unshare*) echo "E: no namespaces"; exit 1;; esac\n'
        f"/bin/mkdir {tmp_path}/out && echo > {tmp_path}/out/file\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(packages, "KEYRING", program)
    monkeypatch.setattr(packages, "modes", lambda: ("unshare", "fakechroot"))
    packages.fetch(["a"], tmp_path / "out")
    assert (tmp_path / "out/file").exists()


def test_unpacking_keeps_links_and_leaves_devices_out(tmp_path: Path) -> None:
    archive = tmp_path / "archive.tar"
    with tarfile.open(archive, "w") as tar:
        for name, kind, mode, target in (
            ("./d", tarfile.DIRTYPE, 0o555, ""),
            ("./d/f", tarfile.REGTYPE, 0o4755, ""),
            ("./d/l", tarfile.SYMTYPE, 0o777, "/absolute"),
            ("./d/h", tarfile.LNKTYPE, 0o755, "./d/f"),
            ("./null", tarfile.CHRTYPE, 0o666, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.linkname = kind, mode, target
            member.size = 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"abc"))
    packages.unpack(archive, tmp_path / "root")
    root = tmp_path / "root"
    assert (root / "d/h").read_bytes() == b"abc"
    assert (root / "d/l").readlink() == Path("/absolute")
    assert sorted(path.name for path in root.iterdir()) == ["d"]
    assert (root / "d").stat().st_mode & 0o700 == 0o700
