# SPDX-License-Identifier: Apache-2.0
"""What the commands of ``holdfast spec`` share: strategies by name, progress, files of traces."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Self

import click

from holdfast.errors import BadTarget, HoldfastError, SystemFailure, UsageError
from holdfast.loading import load_class
from holdfast.spec.setting import Iommu, Profile, Setting
from holdfast.spec.strategy import Strategy
from holdfast.spec.trace import Trace

if TYPE_CHECKING:
    from holdfast.replay.outcome import Outcome

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C: that of a shell, 128 + SIGINT."""
LARGEST: Final = 8 << 20
"""Bytes of a trace file that are read. A story has some ten steps of some hundred bytes each."""
EVERY: Final = 0.2
"""Seconds between two lines of progress."""


def strategies() -> Mapping[str, type[Strategy]]:
    """The known ones by key, in the order of the table."""
    from holdfast.spec.catalogue import STRATEGIES

    return STRATEGIES


def known_key(text: str) -> str:
    """The same, if a strategy is called so. Raises UsageError."""
    if text not in strategies():
        raise UsageError(f"no strategy is called {text!r}", operation="spec", hint=_hint())
    return text


def _hint() -> str:
    return f"one of {', '.join(strategies())}"


def find(text: str) -> type[Strategy]:
    """A known strategy, or a class of a user's file: ``FILE.py:Class``. Raises UsageError."""
    if ":" not in text:
        return strategies()[known_key(text)]
    hint = f"FILE.py:Class, or {_hint()}"
    try:
        found = load_class(text, Strategy, target=text, hint=hint)
    except HoldfastError:
        raise
    except Exception as error:
        raise BadTarget(
            f"it cannot be loaded: {type(error).__name__}: {error}",
            operation="spec",
            target=text,
            hint="mend the file: python3 FILE.py says where it fails",
        ) from error
    for name in ("key", "title"):
        if not isinstance(getattr(found, name, None), str):
            raise BadTarget(f"{found.__name__} has no {name}", operation="spec", target=text,
                            hint=f'give it one: {name} = "..."')  # fmt: skip
    return found


def places(strategy: type[Strategy]) -> list[str]:
    """Where a strategy exists: ``7.x (none, strict)``."""
    said = []
    for profile in Profile:
        fitting = [str(iommu) for iommu in Iommu if strategy.fits(Setting(profile, iommu))]
        if fitting:
            said.append(f"{profile} ({', '.join(fitting)})")
    return said


def happened(outcome: Outcome, trace: Trace) -> Iterator[str]:
    """What came of carrying out a story, line by line."""
    begin = outcome.timeline[0].begun_ns if outcome.timeline else 0
    for at, step in enumerate(outcome.timeline, 1):
        yield f"{at:>3}. {(step.begun_ns - begin) / 1e6:9.2f} ms  {step.text}"
    if outcome.timeline:
        yield ""
    for found, text in (
        (outcome.corrupted, "{who}: {count} bytes of its memory were written by the card"),
        (outcome.stray, "{who}, which nobody has: {count} bytes were written by the card"),
        (outcome.lost, "{who}: {count} bytes that it waited for went elsewhere"),
        (outcome.disclosed, "{who}: {count} bytes of its memory were read by the card"),
    ):
        for who, count in found.items():
            yield text.format(who=who, count=number(count))
    if outcome.refused:
        yield f"{number(outcome.refused)} accesses of the card were refused"
    broken = f"{trace.breaks} is" if trace.breaks else "nothing is"
    said = f"the story says that {broken} broken"
    match outcome.agrees:
        case True:
            yield f"AGREES: {said}, and so it is on {outcome.target}"
        case False:
            yield f"DISAGREES: {said}; on {outcome.target} it is not so"
        case None:
            yield f"NOT SEEN: {said}; nothing of it can be seen in memory yet"


class Watch:
    """Shows how far a search is, and ends it at Ctrl-C, so that what was found is not lost.

    Use as context manager: inside it the first SIGINT is a request, the second one a
    KeyboardInterrupt. Not thread-safe; of the main thread.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self.what = ""
        self._live = self._is_live()
        self._begun = self._shown = time.monotonic()
        self._wide = 0

    @staticmethod
    def _is_live() -> bool:
        return sys.stderr.isatty()

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        self._erase()

    def _asked(self, _number: int, _frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def begin(self, what: str) -> None:
        """Name the search that follows."""
        self.what = what
        self._begun = time.monotonic()

    def __call__(self, states: int, level: int) -> bool:
        """Tell how far it is; False: no further."""
        rate = states / max(time.monotonic() - self._begun, 1e-3)
        self.say(f"{self.what}: level {level}, {number(states)} states, {number(rate)} a second")
        return not self.interrupted

    def say(self, text: str) -> None:
        """Show a line in the place of the former one, not too often."""
        now = time.monotonic()
        if self._live and now - self._shown >= EVERY:
            self._shown = now
            padding = " " * max(0, self._wide - len(text))
            click.echo(f"\r{text}{padding}", nl=False, err=True)
            self._wide = len(text)

    def _erase(self) -> None:
        if self._wide:
            click.echo(f"\r{' ' * self._wide}\r", nl=False, err=True)
            self._wide = 0


def number(value: float) -> str:
    """With spaces between thousands."""
    return f"{value:,.0f}".replace(",", " ")


def read_trace(source: str) -> Trace:
    """A trace from a file, or from standard input if it is ``-``. Raises UsageError."""
    try:
        if source == "-":
            data = sys.stdin.buffer.read(LARGEST + 1)
        else:
            with Path(source).open("rb") as file:
                data = file.read(LARGEST + 1)
    except OSError as error:
        raise _bad_trace(str(error.strerror), source, error.errno) from error
    if len(data) > LARGEST:
        raise _bad_trace(f"more than {LARGEST >> 20} MiB are no trace", source)
    try:
        return Trace.loads(data.decode())
    except (ValueError, RecursionError, OverflowError) as error:
        raise _bad_trace(str(error) or type(error).__name__, source) from error


def _bad_trace(what: str, source: str, errno: int | None = None) -> UsageError:
    hint = "holdfast spec trace STRATEGY --json FILE writes one"
    return UsageError(what, operation="read trace", target=source, errno=errno, hint=hint)


def write_text(destination: str, text: str) -> None:
    """Into a file, or to standard output if it is ``-``. Raises SystemFailure."""
    if destination == "-":
        click.echo(text, nl=not text.endswith("\n"))
        return
    try:
        Path(destination).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SystemFailure(str(error.strerror), operation="write", target=destination,
                            errno=error.errno) from error  # fmt: skip


def to_json(told: Any) -> str:
    """As text that people can read."""
    return json.dumps(told, indent=2, ensure_ascii=False)


_STYLES: Final[Mapping[str, dict[str, Any]]] = {
    "head": {"bold": True},
    "frame": {"fg": "cyan"},
    "note": {"dim": True},
    "breach": {"fg": "red"},
}


def show_story(trace: Trace) -> None:
    """Print a trace as a story."""
    from holdfast.spec import story

    width = story.WIDTH
    if sys.stdout.isatty():  # elsewhere it is the same on every machine
        width = min(max(shutil.get_terminal_size().columns, 60), 110)
    for line in story.lines(trace, width):
        click.echo(click.style(line.text, **_STYLES.get(line.kind, {})))
