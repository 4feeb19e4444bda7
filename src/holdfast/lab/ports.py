# SPDX-License-Identifier: Apache-2.0
"""What passes the guest's serial ports and QEMU's monitor, without the ports: bytes in, facts out.

Records from the guest (ttyS2) are lines; ``results`` is followed by that many bytes::

    started                 user space is there
    failed TEXT             /init gave up; the command did not run
    exit N                  the command's exit status
    results SIZE            SIZE bytes of tar archive follow
    end                     nothing follows

Questions from the guest (ttyS3) are JSON objects, a line each; every one is answered by a line.
The monitor speaks QMP (QEMU's docs/interop/qmp-spec.rst). Everything from the guest is bounded:
a broken guest must not fill the host's memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from holdfast.errors import ProtocolError

LONGEST_LINE: Final = 4096
LONGEST_MESSAGE: Final = 1 << 20
"""Of the monitor, which is QEMU's own."""
LARGEST_RESULTS: Final = 64 << 20

_NOTHING: Final[Mapping[str, str | int]] = MappingProxyType({})


class Lines:
    """Cuts a stream into lines; ProtocolError for one that is too long. Not thread-safe."""

    def __init__(self, longest: int = LONGEST_LINE) -> None:
        self._longest = longest
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The complete lines, without their ends."""
        self._held += data
        while (end := self._held.find(b"\n")) >= 0:
            line = bytes(self._held[:end])
            del self._held[: end + 1]
            if len(line) > self._longest:
                break
            yield line.rstrip(b"\r")
        else:
            if len(self._held) <= self._longest:
                return
        raise ProtocolError("a line that does not end", operation="lab run")


@dataclass(slots=True)
class Records:
    """What the guest has reported so far. Not thread-safe."""

    started: bool = False
    failed: str = ""
    status: int | None = None
    results: bytearray = field(default_factory=bytearray)
    ended: bool = False
    _held: bytearray = field(default_factory=bytearray)
    _expected: int = 0

    def feed(self, data: bytes) -> None:
        """Take what came; ProtocolError if the guest talks nonsense."""
        self._held += data
        while self._held:
            if (missing := self._expected - len(self.results)) > 0:
                self.results += self._held[:missing]
                del self._held[:missing]
                continue
            end = self._held.find(b"\n", 0, LONGEST_LINE)
            if end < 0:
                if len(self._held) >= LONGEST_LINE:
                    raise ProtocolError("a record that does not end", operation="lab run")
                return
            line = self._held[:end].decode(errors="replace")
            del self._held[: end + 1]
            self._record(line.rstrip("\r"))

    @property
    def complete(self) -> bool:
        """Whether the status is known and all results are here."""
        return self.ended and self.status is not None and len(self.results) == self._expected

    def _record(self, line: str) -> None:
        kind, _, value = line.partition(" ")
        if kind == "started":
            self.started = True
        elif kind == "failed":
            self.failed = value or "for no reason given"
        elif kind == "exit" and value.isdecimal() and int(value) <= 255:
            self.status = int(value)
        elif kind == "results" and value.isdecimal() and not self._expected:
            if int(value) > LARGEST_RESULTS:
                raise ProtocolError(
                    f"{value} bytes of results",
                    operation="lab run",
                    hint=f"leave at most {LARGEST_RESULTS >> 20} MiB in /results",
                )
            self._expected = int(value)
        elif kind == "end":
            self.ended = True
        else:
            raise ProtocolError(f"a record nobody knows: {line!r}", operation="lab run")


@dataclass(frozen=True, slots=True)
class Question:
    """What a guest asked for, and of which function."""

    what: str
    name: str

    @classmethod
    def parse(cls, line: bytes) -> Question | None:
        """None if this is no question."""
        try:
            told = json.loads(line)
        except ValueError:
            return None
        if not isinstance(told, dict):
            return None
        what, name = told.get("ask"), told.get("id")
        return cls(what, name) if isinstance(what, str) and isinstance(name, str) else None


def answer(*, done: bool, why: str = "") -> bytes:
    """The line for the guest."""
    return json.dumps({"done": done, "why": why}).encode() + b"\n"


class Monitor:
    """A QMP session: commands out by :meth:`command`, events and replies in by :meth:`feed`."""

    def __init__(self) -> None:
        self._lines = Lines(LONGEST_MESSAGE)
        self._waiting: dict[int, tuple[str, str]] = {}
        self._next = 0
        self.deleted: set[str] = set()
        """Names of devices that the guest has let go of."""

    def command(self, execute: str, arguments: Mapping[str, str | int] = _NOTHING) -> bytes:
        """Bytes to send; the reply comes out of :meth:`feed` under the argument ``id``."""
        self._next += 1
        self._waiting[self._next] = (execute, str(arguments.get("id", "")))
        message: dict[str, object] = {"execute": execute, "id": self._next}
        if arguments:
            message["arguments"] = dict(arguments)
        return json.dumps(message).encode() + b"\n"

    def feed(self, data: bytes) -> Iterator[tuple[str, str, str]]:
        """Replies that came: command, its ``id`` argument, the error's text (empty: success)."""
        for line in self._lines.feed(data):
            message = json.loads(line)
            if message.get("event") == "DEVICE_DELETED":
                self.deleted.add(str(message.get("data", {}).get("device", "")))
            elif "id" in message and message["id"] in self._waiting:
                execute, name = self._waiting.pop(message["id"])
                error = message.get("error") or {}
                yield execute, name, str(error.get("desc", ""))
