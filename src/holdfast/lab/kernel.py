# SPDX-License-Identifier: Apache-2.0
"""The second kernel: what Debian's kernels leave out, and oracles that watch memory.

Debian's kernels have VFIO's type1 and neither IOMMUFD, VFIO_NOIOMMU, IOMMU_DEBUG_PAGEALLOC nor
PAGE_OWNER. This one is built from Debian's own kernel source: the smallest configuration there is
(``tinyconfig``) plus the options of ``kernel.config``, all built in. ``olddefconfig`` silently
drops an option whose dependencies are not met, so each wanted option is looked for afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from holdfast.lab import cache, packages
from holdfast.lab.failure import LabUnavailable

SOURCE: Final = "linux-source-7.3"
RECIPE: Final = "1"
CONFIG: Final = Path(__file__).with_name("kernel.config")
TOOLS: Final = {
    "gcc": "gcc",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "perl": "perl",
    "tar": "tar",
    "xz": "xz-utils",
    "gzip": "gzip",
}
"""Programs the build needs, and the packages they are in."""
HEADERS: Final = {"libelf.h": "libelf-dev"}

_OPTION: Final = re.compile(r"(CONFIG_[A-Z0-9_]+)=(.+)")
_UNSET: Final = re.compile(r"# (CONFIG_[A-Z0-9_]+) is not set")
_TAIL: Final = 2000


def cached() -> Path | None:
    """The kernel image, if it was built before."""
    entry = cache.find("kernel", _key())
    return entry / "bzImage" if entry else None


def built(progress: Callable[[str], None]) -> Path:
    """The kernel image, built if need be (six minutes on two processors)."""

    def build(place: Path) -> None:
        missing = missing_packages()
        if missing:
            raise LabUnavailable(
                "programs to build a kernel are missing",
                operation="lab kernel",
                hint=f"apt-get install {' '.join(missing)}",
            )
        _build(place, progress)

    return cache.get("kernel", _key(), build) / "bzImage"


def missing_packages() -> list[str]:
    """Debian packages that have to be installed before a kernel can be built here."""
    found = [package for program, package in TOOLS.items() if shutil.which(program) is None]
    for header, package in HEADERS.items():
        places = [Path("/usr/include"), Path("/usr/include/x86_64-linux-gnu")]
        if not any((place / header).is_file() for place in places):
            found.append(package)
    if "gcc" in found:
        found.append("libc6-dev")
    return sorted(set(found))


def wanted_options(text: str) -> dict[str, str]:
    """Options of a configuration; ``n`` is one that must not be set."""
    found = {}
    for line in text.splitlines():
        if match := _OPTION.fullmatch(line.strip()):
            found[match[1]] = match[2]
        elif match := _UNSET.fullmatch(line.strip()):
            found[match[1]] = "n"
    return found


def not_as_wanted(wanted: dict[str, str], config: str) -> list[str]:
    """Options that the finished configuration does not have as they were asked for."""
    have = wanted_options(config)
    return sorted(
        f"{name}={value}" for name, value in wanted.items() if have.get(name, "n") != value
    )


def _key() -> str:
    return cache.key(RECIPE, packages.SUITE, SOURCE, CONFIG.read_text(encoding="utf-8"))


def _build(place: Path, progress: Callable[[str], None]) -> None:
    progress(f"fetching {SOURCE}")
    root = place / "packages"
    packages.fetch([SOURCE], root, backports=True)
    _step(["tar", "-xf", str(root / "usr/src" / f"{SOURCE}.tar.xz"), "-C", str(place)], place)
    shutil.rmtree(root)
    source = place / SOURCE
    _configure(source)
    processors = len(os.sched_getaffinity(0))
    progress(f"building the kernel on {processors} processors")
    start = time.monotonic()
    _step(["make", "-s", f"-j{processors}", "bzImage"], source)
    progress(f"built in {time.monotonic() - start:.0f} s")
    (source / "arch/x86/boot/bzImage").rename(place / "bzImage")
    (source / ".config").rename(place / "config")
    shutil.rmtree(source)


def _configure(source: Path) -> None:
    """tinyconfig, our options on top, and a look whether they are all there."""
    wanted = wanted_options(CONFIG.read_text(encoding="utf-8"))
    _step(["make", "-s", "tinyconfig"], source)
    config = source / ".config"
    with config.open("a", encoding="utf-8") as file:
        file.writelines(f"{name}={value}\n" for name, value in wanted.items())
    _step(["make", "-s", "olddefconfig"], source)
    wrong = not_as_wanted(wanted, config.read_text(encoding="utf-8"))
    if wrong:
        raise LabUnavailable(
            f"the kernel does not take {', '.join(wrong)}",
            operation="lab kernel",
            hint=f"their dependencies are missing in {CONFIG.name}, or {SOURCE} knows them no more",
        )


def _step(command: list[str], directory: Path) -> None:
    done = subprocess.run(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        env=os.environ | {"LC_ALL": "C", "KBUILD_BUILD_HOST": "lab", "KBUILD_BUILD_USER": "lab"},
    )
    if done.returncode:
        said = done.stdout[-_TAIL:].decode(errors="replace").strip()
        raise LabUnavailable(f"{' '.join(command[:3])} failed: {said}", operation="lab kernel")
