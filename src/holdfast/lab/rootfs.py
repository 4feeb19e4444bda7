# SPDX-License-Identifier: Apache-2.0
"""The guest's root file system and Debian's kernel, from one set of packages.

Facts: packages are unpacked, not installed, so links and byte code that their scripts would make
are missing; under software emulation Python compiles its library at a tenth of a host's speed.
Choice: what matters of the scripts' work is done here, once, and the byte code is compiled on the
host by the guest's own Python. The result is an initial file system in memory: no disk, no mount,
no root on the host. Cost: the guest needs about 250 MB of its memory for it.

Per run, a small archive with /init, the command and the source tree goes behind the base.
"""

from __future__ import annotations

import lzma
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.errors import UsageError
from holdfast.lab import cache, packages
from holdfast.lab.cpio import Writer
from holdfast.lab.failure import LabUnavailable
from holdfast.lab.machine import Guest, PlacedFunction

PACKAGES: Final = (
    "busybox-static",
    "kmod",
    "libc6-dev",
    "linux-image-cloud-amd64",
    "pci.ids",
    "python3",
    "python3-click",
    "python3-hypothesis",
    "python3-msgspec",
    "python3-numpy",
    "python3-prometheus-client",
    "python3-pytest",
    "python3-rich",
    "tcc",
)
MODULES: Final = ("vfio_iommu_type1", "vfio-pci", "uio_pci_generic")
"""Kernel modules loaded at boot, where the kernel has them as modules."""
RECIPE: Final = "2"
"""Raised when this file makes something else of the same packages."""

CHECKOUT: Final = ("src", "tests", "docs", "examples", "pyproject.toml", "README.md")
"""What of a source tree goes into the guest."""

_SKIP: Final = (
    "boot",
    "dev",
    "etc/alternatives",
    "tmp",
    "var",
    "usr/lib/modules",
    "usr/lib/python3/dist-packages/numpy/f2py",
    "usr/lib/systemd",
    "usr/lib/udev",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/systemd",
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/zoneinfo",
)
_PRESENT: Final = ("usr/lib", "usr/lib64", "usr/bin", "usr/sbin")
_EMPTY: Final = ("dev", "lab", "mnt", "proc", "root", "run", "sys", "tmp", "var", "work")
_FILES: Final = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
    "user:x:1000:1000:user:/tmp:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost lab\n",
}
_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
_LINKS: Final = {
    # update-alternatives would make these.
    f"{_LIBRARIES}/libblas.so.3": "blas/libblas.so.3",
    f"{_LIBRARIES}/liblapack.so.3": "lapack/liblapack.so.3",
}


@dataclass(frozen=True, slots=True)
class Base:
    """What every guest starts from."""

    archive: Path
    kernel: Path
    """Debian's kernel image; its modules are in the archive."""
    root: Path
    """The packages, unpacked: to run the guest's programs on the host."""


def base(progress: Callable[[str], None]) -> Base:
    """The cached base, built if need be (half a minute; needs a mirror)."""
    key = cache.key(RECIPE, packages.SUITE, *PACKAGES, *MODULES)

    def build(place: Path) -> None:
        progress("building the guest's root file system from Debian packages")
        _build(place)

    entry = cache.get("base", key, build)
    return Base(entry / "base.cpio", entry / "vmlinuz", entry / "root")


def _build(place: Path) -> None:
    root = place / "root"
    packages.fetch(PACKAGES, root)
    for name in _PRESENT:
        (root / name).mkdir(parents=True, exist_ok=True)
    images = list((root / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise LabUnavailable(f"{len(images)} kernels in Debian's packages", operation="lab")
    images[0].rename(place / "vmlinuz")
    version = images[0].name.removeprefix("vmlinuz-")
    modules = _modules(root, version, place / "modules")
    compile_python(root, root / "usr", "/usr", "lib/python3", *_stdlib(root))
    with (place / "base.cpio").open("wb") as out, Writer(out) as writer:
        for name in ("bin", "lib", "lib64", "sbin"):
            writer.symlink(name, f"usr/{name}")
        for name in _EMPTY:
            writer.directory(name)
        writer.tree("", root, skip=[*_SKIP, "lib", *_FILES, *_LINKS])
        for name, text in _FILES.items():
            writer.file(name, text.encode())
        for name, target in _LINKS.items():
            writer.symlink(name, target)
        writer.directory("usr/local")
        for name in ("usr/local/bin", "usr/local/sbin"):
            writer.directory(name)
        for name, target in _applets(root).items():
            writer.symlink(name, target)
        for parent in ("usr/lib/modules", f"usr/lib/modules/{version}"):
            writer.directory(parent)
        writer.tree(f"usr/lib/modules/{version}", modules)
    for left in (place / "modules", *(root / name for name in _SKIP)):
        shutil.rmtree(left, ignore_errors=True)


def _applets(root: Path) -> dict[str, str]:
    """Links for BusyBox's programs where there is none of Debian's (which come first)."""
    busybox = root / "usr/bin/busybox"
    done = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    found = {"usr/bin/sh": "busybox"}
    for name in done.stdout.split():
        found[f"usr/local/bin/{name}"] = "/usr/bin/busybox"
    taken = {path.name for part in ("bin", "sbin") for path in (root / "usr" / part).iterdir()}
    return {link: to for link, to in found.items() if Path(link).name not in taken}


def _stdlib(root: Path) -> list[str]:
    return [f"lib/{path.name}" for path in (root / "usr/lib").glob("python3.*")]


def _modules(root: Path, version: str, place: Path) -> Path:
    """The wanted modules and what they need, decompressed, with their index; its directory."""
    every = root / "usr/lib/modules" / version
    (root / "lib").symlink_to("usr/lib")
    _depmod(root, root, version)
    own = place / "usr/lib/modules" / version
    own.mkdir(parents=True)
    (place / "lib").symlink_to("usr/lib")
    for relative in wanted_modules((every / "modules.dep").read_text(), MODULES):
        target = own / relative.removesuffix(".xz")
        target.parent.mkdir(parents=True, exist_ok=True)
        data = (every / relative).read_bytes()
        target.write_bytes(lzma.decompress(data) if relative.endswith(".xz") else data)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copyfile(every / name, own / name)
    _depmod(root, place, version)
    return own


def wanted_modules(index: str, names: Sequence[str]) -> list[str]:
    """Paths of the modules ``names`` and of all they need, by a ``modules.dep``.

    A name that is not there is built into the kernel, or not in it at all: the guest will see.
    """
    needs: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for line in index.splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
        paths[Path(path).name.partition(".ko")[0].replace("_", "-")] = path
    found: list[str] = []
    for name in names:
        # modules.dep lists the needs of needs, too (depmod(8)).
        if (path := paths.get(name.replace("_", "-"), "")) in needs:
            found += [path, *needs[path]]
    return sorted(set(found))


def _depmod(tools: Path, target: Path, version: str) -> None:
    loader = packages.loader(tools)
    command = [loader[0], "--argv0", "depmod", *loader[1:], str(tools / "usr/bin/kmod")]
    _tool([*command, "-b", str(target), version], {})


def compile_python(tools: Path, tree: Path, prefix: str, *parts: str) -> None:
    """Byte code for the Python files below ``tree``'s ``parts``, by the guest's own Python.

    ``prefix`` is where the tree will be in the guest. Files that are no valid Python (a test's
    data) stay as they are. The code is taken unchecked: times do not survive the archive.
    """
    command = [*packages.loader(tools), str(tools / "usr/bin/python3"), "-m", "compileall", "-q"]
    command += ["--invalidation-mode", "unchecked-hash", "-s", str(tree), "-p", prefix]
    home = {"PYTHONHOME": str(tools / "usr"), "PYTHONDONTWRITEBYTECODE": "1"}
    _tool([*command, *(str(tree / part) for part in parts)], home, accept=(0, 1))


def _tool(command: list[str], extra: dict[str, str], accept: tuple[int, ...] = (0,)) -> None:
    """Run a program of the unpacked packages on the host."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        env=kept | extra,
    )
    if done.returncode not in accept:
        told = done.stdout.decode(errors="replace").strip()[-500:]
        raise LabUnavailable(f"exit status {done.returncode}: {told}", operation=command[0])


def overlay(
    out: Path,
    made: Base,
    guest: Guest,
    placed: list[PlacedFunction],
    command: Sequence[str],
    environment: Mapping[str, str],
) -> None:
    """Append what is particular to one run to the archive ``out``."""
    with cache.scratch("overlay") as scratch, out.open("ab") as file:
        work = scratch / "work"
        copy_checkout(work)
        compile_python(made.root, work, "/work", ".")
        with Writer(file) as writer:
            init = Path(__file__).with_name("init.sh")
            writer.file_from("init", init, 0o755)
            writer.file("lab/settings", settings(guest, placed).encode())
            writer.file("lab/command", command_script(guest, command, environment))
            writer.tree("work", work)


def copy_checkout(work: Path) -> None:
    """Copy the source tree this package runs from, or the package alone if there is none."""
    package = Path(__file__).resolve().parents[1]
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "_build", ".*")
    root = package.parents[1]
    if package.parent.name == "src" and (root / "pyproject.toml").is_file():
        work.mkdir()
        for name in CHECKOUT:
            source = root / name
            if source.is_dir():
                shutil.copytree(source, work / name, ignore=ignored, symlinks=True)
            elif source.is_file():
                shutil.copyfile(source, work / name)
    else:
        shutil.copytree(package, work / "src" / "holdfast", ignore=ignored)


def settings(guest: Guest, placed: list[PlacedFunction]) -> str:
    """Shell assignments that /init reads."""
    functions = "\n".join(f"{one.name} {one.path}" for one in placed)
    values = {"DRIVER": guest.driver, "MODULES": " ".join(MODULES), "FUNCTIONS": functions}
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def command_script(guest: Guest, command: Sequence[str], environment: Mapping[str, str]) -> bytes:
    """The shell script that becomes the command."""
    if not command:
        raise UsageError("no command to run in the guest", operation="lab run")
    values = {
        "HOLDFAST_LAB_GUEST": "1",
        "HOLDFAST_LAB_IOMMU": "on" if guest.iommu else "off",
        "HOLDFAST_LAB_DRIVER": guest.driver,
        # Tests measure what grows in memory; the root file system is memory.
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": "/work/src",
        "PYTHONUNBUFFERED": "1",
        "XDG_RUNTIME_DIR": "/run/user/0",
        **environment,
    }
    lines = []
    for name, value in values.items():
        if not name.isidentifier() or not name.isascii():
            raise UsageError(f"no name of an environment variable: {name!r}", operation="lab run")
        lines.append(f"export {name}={shlex.quote(value)}\n")
    lines.append("exec " + " ".join(shlex.quote(word) for word in command) + "\n")
    script = os.fsencode("".join(lines))
    if b"\0" in script:
        raise UsageError("a command has no zero bytes", operation="lab run")
    return script
