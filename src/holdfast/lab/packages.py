# SPDX-License-Identifier: Apache-2.0
"""Debian packages by name, unpacked without being installed.

mmdebstrap's ``extract`` variant resolves dependencies with apt, downloads, and unpacks; no
package's scripts run, so nothing of it needs root beyond what the mode chosen by mmdebstrap needs
(root, or a user namespace, or fakechroot). What the scripts would have done is the caller's.

Packages come from the mirror the host itself uses, if that is a Debian mirror, or from the one that
``HOLDFAST_LAB_MIRROR`` names. Signatures are checked with Debian's archive keyring whatever the
host trusts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from holdfast.lab.failure import LabUnavailable

SUITE: Final = "trixie"
BACKPORTS: Final = "trixie-backports"
MIRROR_VARIABLE: Final = "HOLDFAST_LAB_MIRROR"
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT: Final = Path("/etc/apt")

_ONE_LINE: Final = re.compile(r"deb\s+(?:\[[^\]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<rest>.*)")
_LONGEST_SOURCES: Final = 1 << 20
_TAIL: Final = 6
"""Lines of mmdebstrap's messages that an error shows."""


def mirrors(apt: Path = APT) -> list[str]:
    """Debian mirrors to try: the one that was named, then the host's.

    Unreadable or strange files count as empty.
    """
    found = [os.environ[MIRROR_VARIABLE]] if os.environ.get(MIRROR_VARIABLE) else []
    files = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]
    for path in files:
        try:
            text = path.read_bytes()[:_LONGEST_SOURCES].decode(errors="replace")
        except OSError:
            continue
        if path.suffix == ".sources":
            found += deb822_mirrors(text)
        elif path.suffix == ".list":
            found += one_line_mirrors(text)
    return list(dict.fromkeys(found))


def one_line_mirrors(text: str) -> list[str]:
    """Debian mirrors of a ``sources.list`` (sources.list(5), one-line style)."""
    found = []
    for line in text.splitlines():
        entry = _ONE_LINE.match(line.partition("#")[0].strip())
        if entry and "main" in entry["rest"].split() and is_debian(entry["uri"]):
            found.append(entry["uri"].rstrip("/"))
    return found


def deb822_mirrors(text: str) -> list[str]:
    """Debian mirrors of a ``.sources`` file (sources.list(5), deb822 style)."""
    found = []
    for fields in _stanzas(text):
        if fields.get("enabled", "yes").lower() in {"no", "false", "0", "off"}:
            continue
        if (
            "deb" in fields.get("types", "").split()
            and "main" in fields.get("components", "").split()
        ):
            found += [u.rstrip("/") for u in fields.get("uris", "").split() if is_debian(u)]
    return found


def is_debian(uri: str) -> bool:
    """Whether this is, by its form, a mirror of Debian's main archive.

    Snapshots are not taken: they lie at ``.../archive/debian/DATE`` and may be of a time before
    the packages wanted here.
    """
    scheme, separator, rest = uri.partition("://")
    return bool(
        separator and scheme in {"http", "https"} and rest.rstrip("/").split("/")[-1] == "debian"
    )


def fetch(packages: Iterable[str], root: Path, *, backports: bool = False) -> None:
    """Unpack ``packages`` and what they depend on into the new directory ``root``.

    With ``backports``, the newer suite is preferred for everything it has. Everything belongs to
    the caller afterwards. Raises LabUnavailable with mmdebstrap's own words.
    """
    program = shutil.which("mmdebstrap")
    if program is None:
        raise LabUnavailable(
            "mmdebstrap is not installed", operation="lab", hint="apt-get install mmdebstrap"
        )
    if not KEYRING.is_file():
        raise LabUnavailable(
            "Debian's archive keyring is missing",
            operation="lab",
            target=str(KEYRING),
            hint="apt-get install debian-archive-keyring",
        )
    wanted = sorted(packages)
    proxies = _proxies()
    told: dict[str, str] = {}
    known = mirrors()
    if not known:
        raise LabUnavailable(
            "this host's package sources name no Debian mirror",
            operation="lab",
            target=str(APT),
            hint=f"set {MIRROR_VARIABLE} to the address of one",
        )
    for mirror in known:
        for mode in modes():
            archive = root.with_name(f"{root.name}.tar") if mode != "fakechroot" else root
            command = arguments(program, mode, wanted, archive, mirror, backports=backports)
            done = subprocess.run(
                [*command[:1], *proxies, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            if done.returncode == 0:
                if archive != root:
                    unpack(archive, root)
                    archive.unlink()
                return
            told[mode] = _last_lines(done.stdout.decode(errors="replace"))
            shutil.rmtree(root, ignore_errors=True)
    raise LabUnavailable(
        "; ".join(f"mmdebstrap (mode {mode}) failed: {words}" for mode, words in told.items()),
        operation="lab",
        hint="it needs a Debian mirror, and without root an entry in /etc/subuid or fakechroot",
    )


def modes() -> tuple[str, ...]:
    """Ways in which mmdebstrap may work for this user, the best first."""
    return ("root",) if os.geteuid() == 0 else ("unshare", "fakechroot")


def arguments(
    program: str, mode: str, packages: list[str], out: Path, mirror: str, *, backports: bool
) -> list[str]:
    """The command that does it.

    The result is an archive, because a directory made in a user namespace belongs to other ids;
    but under fakechroot mmdebstrap would look for ``tar`` among the packages to make one.
    """
    suites = [SUITE, BACKPORTS] if backports else [SUITE]
    prefer = ['--aptopt=APT::Default-Release "' + BACKPORTS + '"'] if backports else []
    return [
        program,
        f"--mode={mode}",
        "--variant=extract",
        f"--format={'directory' if mode == 'fakechroot' else 'tar'}",
        "--architectures=amd64",
        *prefer,
        f"--include={','.join(packages)}",
        SUITE,
        str(out),
        *(f"deb [signed-by={KEYRING}] {mirror} {suite} main" for suite in suites),
    ]


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    told = [line for line in lines if line and not line.startswith(("I:", "Get:"))]
    return " / ".join(told[-_TAIL:])


def unpack(archive: Path, place: Path) -> None:
    """Unpack regular files, directories and links of a tar archive as the calling user."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if not (member.isfile() or member.isdir() or member.islnk() or member.issym()):
                continue
            member.mode = (member.mode or 0o644) | (0o700 if member.isdir() else 0o600)
            # "tar" lets absolute links pass (Debian has them); nothing is written through one.
            tar.extract(member, place, set_attrs=not member.issym(), filter="tar")


def loader(root: Path) -> list[str]:
    """Arguments that start a program of an unpacked root with that root's own C library."""
    libraries = root / "usr/lib/x86_64-linux-gnu"
    return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)]


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    """Fields of each paragraph, names in lower case, continuation lines joined."""
    fields: dict[str, str] = {}
    last = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, last = {}, ""
        elif line[0].isspace():
            if last:
                fields[last] += f" {line.strip()}"
        else:
            name, _, value = line.partition(":")
            last = name.strip().lower()
            fields[last] = value.strip()


def _proxies() -> list[str]:
    """The host's proxies for apt; mmdebstrap reads none of the host's configuration."""
    if (program := shutil.which("apt-config")) is None:
        return []
    done = subprocess.run(
        [program, "dump", "--format", '%F "%v"%n', "Acquire"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    wanted = re.compile(r'Acquire::https?::[Pp]roxy\S* ".+"')
    return [f"--aptopt={line}" for line in done.stdout.splitlines() if wanted.fullmatch(line)]
