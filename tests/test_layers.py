# SPDX-License-Identifier: Apache-2.0
"""The rooms and their order, enforced on the syntax tree of every source file.

A file imports lower layers or its own room, wherever in the file the import stands. Rooms on one
layer do not see each other: that is how ``emu`` and ``backends`` meet only in ``wire``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
LONGEST = 450
"""Lines. Files stay near 400; who needs more has two files."""

LAYERS: list[list[set[str]]] = [
    # Each layer is a list of rooms, each room the set of modules and packages in it.
    [{"errors", "values", "steps"}],
    [{"uapi"}, {"regs.spec"}],
    [{"regs"}, {"wire"}, {"kernel"}, {"loading"}],
    [{"pci"}, {"dma"}],
    [{"contracts"}],
    [{"backends"}, {"emu"}, {"testing"}],
    [{"device", "driver", "bar", "interrupt", "transfer", "poster", "mediated"}],
    [{"drivers"}, {"keeper"}],
    [{""}],  # the package itself: the public names
    [{"spec"}],
    [{"torture"}, {"lab"}],
    [{"bench"}, {"replay"}],
    [{"cli", "__main__"}],
]
SYSTEM = {"os", "socket", "mmap", "fcntl", "asyncio"}
PURE = [
    "uapi",
    "wire",
    "regs.spec",
    "dma.iova",
    "dma.pool",
    "dma.arena",
    "dma.ledger",
    "keeper.state",
    "keeper.map_state",
    "spec",
]
"""Modules and packages that know nothing of the system they run on."""
TABLES = {"keeper.state", "keeper.map_state"}
"""All that the specification sees of the code."""
FOREIGN = {"ctypes", "cffi"}
"""Ways into libc."""

FILES = sorted(SOURCE.rglob("*.py"))
EVERY_FILE = FILES + sorted((ROOT / "tests").rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name below ``holdfast``; empty for the package itself."""
    parts = path.relative_to(SOURCE / "holdfast").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


ROOMS = {name for rooms in LAYERS for room in rooms for name in room if name}
MODULES = {module_name(path) for path in FILES} | ROOMS


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def place(module: str) -> tuple[int, int]:
    """Layer and room of a module, by the longest name that fits; LookupError if it has none."""
    fitting = [
        (len(name), layer, room)
        for layer, rooms in enumerate(LAYERS)
        for room, names in enumerate(rooms)
        for name in names
        if (inside(module, name) if name else not module)
    ]
    if not fitting:
        raise LookupError(module)
    _, layer, room = max(fitting)
    return layer, room


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; a relative import as a leading dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_module = full.removeprefix("holdfast.") in MODULES
                yield node.lineno, full if is_module else base


def own_import_fault(module: str, imported: str) -> str | None:
    """Why ``module`` must not import ``imported`` (both below ``holdfast``), or None."""
    here, there = place(module), place(imported)
    if there != here and there[0] >= here[0]:
        return "is not on a lower layer"
    if inside(module, "drivers") and inside(imported, "backends"):
        return "is hidden from drivers"
    if inside(module, "spec") and not (inside(imported, "spec") or imported in TABLES):
        return "is more than the transition tables"
    return None


def violations(module: str, source: str) -> list[str]:
    """Every broken rule of a module's source text, with its line."""
    found = []
    tree = ast.parse(source)
    pure = any(inside(module, name) for name in PURE)
    for line, name in imports(tree):
        top = name.partition(".")[0]
        fault = None
        if name.startswith("."):
            fault = "is a relative import"
        elif top == "holdfast":
            fault = own_import_fault(module, name.partition(".")[2])
        elif pure and top in SYSTEM:
            fault = "is the system, which a pure module does not know"
        elif top in FOREIGN and not inside(module, "kernel"):
            fault = "is for the kernel room"
        if fault:
            found.append(f"{module}:{line}: {name} {fault}")
    if not inside(module, "kernel"):
        found += [
            f"{module}:{node.lineno}: ioctl is for the kernel room"
            for node in ast.walk(tree)
            if (isinstance(node, ast.Attribute) and node.attr == "ioctl")
            or (isinstance(node, ast.Name) and node.id == "ioctl")
        ]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or "holdfast")
def test_a_file_imports_only_what_is_below_it(path: Path) -> None:
    assert not violations(module_name(path), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dma.pool", "from holdfast.keeper import server"),
        ("dma.pool", "import holdfast.device"),
        ("dma.pool", "def late():\n    from holdfast.device import Device"),
        ("dma.pool", "if TYPE_CHECKING:\n    from holdfast.device import Device"),
        ("dma.pool", "from holdfast import device"),
        ("dma.pool", "from .slab import Slab"),
        ("dma.pool", "import os.path"),
        ("dma.slab", "import ctypes"),
        ("dma.slab", "import fcntl\nfcntl.ioctl(0, 0)"),
        ("dma.slab", "from fcntl import ioctl\nioctl(0, 0)"),
        ("dma.slab", "from holdfast.contracts import Doorbell"),
        ("wire.lease", "from socket import socket"),
        ("keeper.state", "import asyncio"),
        ("emu.server", "from holdfast.backends import vfio_user"),
        ("backends.vfio_user", "from holdfast.emu import port"),
        ("drivers.xdma", "from holdfast.backends import registry"),
        ("drivers.xdma", "from holdfast.keeper import client"),
        ("keeper.client", "from holdfast import open"),
        ("spec.model", "from holdfast.errors import HoldfastError"),
        ("regs.spec", "from holdfast.regs import view"),
        ("errors", "from holdfast.uapi import pci_regs"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernel.libc", "import ctypes, fcntl\nfcntl.ioctl(0, 0)"),
        ("dma.slab", "import os\nfrom holdfast.dma.arena import FramePool\narray.ctypes.data"),
        ("keeper.server", "from holdfast.keeper.state import State\nimport asyncio"),
        ("spec.model", "from holdfast.keeper.state import TABLE"),
        ("backends", 'REGISTRY = {"emu": "holdfast.keeper.embedded:connect"}'),
        ("cli.demo", "import holdfast\nfrom holdfast.torture import campaign"),
    ],
)
def test_what_is_allowed_is_not_complained_about(module: str, source: str) -> None:
    assert not violations(module, source)


def test_every_module_has_a_room() -> None:
    for path in FILES:
        place(module_name(path))
    with pytest.raises(LookupError):
        place("attic.things")


def test_every_file_names_its_licence_first() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in EVERY_FILE
        if "# SPDX-License-Identifier: Apache-2.0" not in path.read_text("utf-8").splitlines()[:2]
    ]
    assert not wrong


def test_no_source_file_is_too_long() -> None:
    long = {
        module_name(path): lines
        for path in FILES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert not long
