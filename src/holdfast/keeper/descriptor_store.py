# SPDX-License-Identifier: Apache-2.0
"""What a service manager kept of a keeper whose processes have all ended.

Under systemd with ``FileDescriptorStoreMax=`` the anchor puts every descriptor into the manager's
store as well, by name. When the service is started again, they are there with the first process
(sd_listen_fds(3)), and a new anchor gets them: to the keeper that it orders, everything looks as if
only its predecessor had been killed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import MutableMapping
from contextlib import suppress

from holdfast.keeper.anchor_link import Item

FIRST = 3
"""SD_LISTEN_FDS_START"""
_LENGTHS = struct.Struct("<II")
MOST_NOTES = 64 << 20


def take(environment: MutableMapping[str, str]) -> dict[str, Item]:
    """What the manager passed to this process, by key; empty if that is not a whole keeper.

    The caller owns the descriptors. What is not part of a keeper is closed.
    """
    if environment.pop("LISTEN_PID", "") != str(os.getpid()):
        return {}
    count = int(environment.pop("LISTEN_FDS", "0"))
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    stored = dict(zip(names, range(FIRST, FIRST + count), strict=False))
    for fd in range(FIRST, FIRST + count):
        os.set_inheritable(fd, False)
    notes = _notes(stored)
    items: dict[str, Item] = {}
    used: set[int] = set()
    for key, note in notes.items():
        fds = _descriptors(stored, key)
        items[key] = Item(note, fds)
        used.update(fds)
    whole = {"0/up", "0/backend", "0/journal", "0/listener"} <= items.keys()
    for fd in range(FIRST, FIRST + count):
        if not whole or fd not in used:
            os.close(fd)
    return items if whole else {}


def _notes(stored: dict[str, int]) -> dict[str, bytes]:
    """Each key's note that was written last, from the newest file of them."""
    found: dict[str, bytes] = {}
    ages = [int(name[6:]) for name in stored if name.startswith("notes-") and name[6:].isdigit()]
    if not ages:
        return found
    text = os.pread(stored[f"notes-{max(ages)}"], MOST_NOTES, 0)
    at = 0
    with suppress(struct.error, UnicodeDecodeError):  # an end that was cut off has no effect yet
        while at < len(text):
            key_size, note_size = _LENGTHS.unpack_from(text, at)
            at += _LENGTHS.size
            end = at + key_size + note_size
            if end > len(text):
                break
            found[text[at : at + key_size].decode()] = text[at + key_size : end]
            at = end
    # What was removed since has no descriptor any more.
    return {
        key: note for key, note in found.items() if _descriptors(stored, key) or key.endswith("/up")
    }


def _descriptors(stored: dict[str, int], key: str) -> tuple[int, ...]:
    """Those of a key, in their order."""
    fds: list[int] = []
    while (fd := stored.get(f"{key}#{len(fds)}")) is not None:
        fds.append(fd)
    return tuple(fds)
