# SPDX-License-Identifier: Apache-2.0
"""Names for PCI ids, from the pci.ids file that distributions ship; numbers where there is none.

The file (https://pci-ids.ucw.cz, 1.5 MB of text) is read once, when the first name is asked for,
and searched as bytes: a listing asks for a dozen of its 40,000 names, so nothing is parsed that is
not asked for. Its layout: a vendor starts a line with four hex digits, its devices follow indented
by one tab; classes come last, ``C`` and two digits, with their subclasses indented by one tab.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

PLACES: Final = (
    Path("/usr/share/misc/pci.ids"),
    Path("/usr/share/hwdata/pci.ids"),
    Path("/usr/share/misc/pci.ids.gz"),
    Path("/usr/share/hwdata/pci.ids.gz"),
    Path("/var/lib/pciutils/pci.ids"),
)
_MOST = 16 << 20
"""Bytes taken of the (unpacked) file at most: ten times its size today."""


class PciNames:
    """Names of vendors, devices and classes. Not thread-safe; never raises."""

    def __init__(self, places: Sequence[Path] = PLACES) -> None:
        self._places = places
        self._data: bytes | None = None
        self._known: dict[bytes, bytes] = {}

    def vendor(self, vendor: int) -> str:
        """Name of a vendor, or its number as four hex digits."""
        return _title(self._section(b"%04x" % vendor)) or f"{vendor:04x}"

    def device(self, vendor: int, device: int) -> str:
        """Name of a device, or its number as four hex digits."""
        return _entry(self._section(b"%04x" % vendor), b"%04x" % device) or f"{device:04x}"

    def of_class(self, class_code: int) -> str:
        """Name of a 24-bit class code: its subclass, else its base class, else its number."""
        section = self._section(b"C %02x" % (class_code >> 16))
        sub = _entry(section, b"%02x" % (class_code >> 8 & 0xFF))
        return sub or _title(section) or f"{class_code:06x}"

    def _section(self, head: bytes) -> bytes:
        """The line that starts with ``head`` and two blanks, with what is indented below it."""
        if head not in self._known:
            data = self._load()
            start = data.find(b"\n%s  " % head)
            end = start
            while end >= 0:
                end = data.find(b"\n", end + 1)
                if data[end + 1 : end + 2] not in (b"\t", b"#"):
                    break
            self._known[head] = b"" if start < 0 else data[start + 1 : end + 1 or None]
        return self._known[head]

    def _load(self) -> bytes:
        if self._data is None:
            self._data = b"\n" + next(filter(None, map(_read, self._places)), b"")
        return self._data


def _title(section: bytes) -> str:
    line, _, _ = section.partition(b"\n")
    return _clean(line.partition(b"  ")[2])


def _entry(section: bytes, number: bytes) -> str:
    start = section.find(b"\n\t%s  " % number)
    if start < 0:
        return ""
    return _clean(section[start + 1 :].partition(b"\n")[0].partition(b"  ")[2])


def _clean(name: bytes) -> str:
    """The name as printable text: what it says goes to a terminal."""
    text = name.decode("utf-8", "replace").strip()
    return "".join(c if c.isprintable() else "?" for c in text)


def _read(path: Path) -> bytes:
    """The file's text, or nothing: names are a convenience."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as packed:
                return packed.read(_MOST)
        with path.open("rb") as file:
            return file.read(_MOST)
    except (OSError, EOFError, zlib.error):
        return b""
