# SPDX-License-Identifier: Apache-2.0
"""A guest's life as the host sees it, with a program in QEMU's place that misbehaves at will."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.lab import (
    Guest,
    GuestFailed,
    GuestTimeout,
    LabUnavailable,
    cache,
    qemu,
    rootfs,
    run,
    runner,
)

FAKE = Path(__file__).with_name("fake_qemu.py")
BYTES = bytes(range(256)) * 4096

Run = Callable[..., int]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: None) -> Run:
    """``fake(mode, output, **more)``: run a guest under the program in QEMU's place."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(rootfs, "compile_python", lambda *_: None)
    for name in ("vmlinuz", "base.cpio"):
        (tmp_path / name).write_bytes(b"")
    base = rootfs.Base(tmp_path / "base.cpio", tmp_path / "vmlinuz", tmp_path)

    def start(mode: str, output: Callable[[bytes], None], **more: object) -> int:
        emulator = qemu.Emulator((sys.executable, str(FAKE), mode), own=False)
        parts = runner.Parts(emulator, tmp_path / "vmlinuz", base)
        monkeypatch.setattr(runner, "prepare", lambda *_: parts)
        timeout = more.pop("timeout", 60.0)
        assert isinstance(timeout, float)
        return run(Guest(timeout=timeout), ["true"], output=output, **more)  # type: ignore[arg-type]

    return start


def nothing_is_left(tmp_path: Path) -> bool:
    return not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_output_and_status_are_passed_on_exactly(fake: Run, tmp_path: Path) -> None:
    output = bytearray()
    assert fake("well", output.extend) == 37
    assert bytes(output) == BYTES
    assert nothing_is_left(tmp_path)
    assert not list((tmp_path / "cache" / runner.CONSOLES).iterdir())


def test_a_guest_that_does_not_power_off_is_switched_off(
    fake: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "POWER_OFF", 0.3)
    output = bytearray()
    assert fake("no-power-off", output.extend) == 37
    assert bytes(output) == BYTES + b"late"


def test_a_guest_that_hangs_is_killed_when_its_time_is_up(fake: Run, tmp_path: Path) -> None:
    output = bytearray()
    start = time.monotonic()
    with pytest.raises(GuestTimeout, match="still running") as caught:
        fake("hangs", output.extend, timeout=1.0)
    assert 0.9 < time.monotonic() - start < 10
    assert bytes(output) == b"so far\n"
    assert caught.value.console.read_text() == "console of hangs\n"
    assert str(caught.value.console) in str(caught.value)
    assert nothing_is_left(tmp_path)


def test_a_guest_that_does_not_boot_is_killed_earlier(
    fake: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "BOOT_DEADLINE", 0.5)
    with pytest.raises(GuestTimeout, match="still booting"):
        fake("no-boot", bytes)


@pytest.mark.parametrize(
    ("mode", "what"),
    [
        ("panics", "without an exit status"),
        ("fails", "no driver takes f0"),
        ("nonsense", "a record nobody knows"),
        ("dies-early", "could not open the kernel"),
    ],
)
def test_a_guest_without_a_status_is_an_error_with_its_console(
    fake: Run, tmp_path: Path, mode: str, what: str
) -> None:
    console = tmp_path / "kept"
    with pytest.raises(GuestFailed, match=what) as caught:
        fake(mode, bytes, console=console)
    assert caught.value.console == console
    assert console.read_text() == f"console of {mode}\n"


def test_a_guest_may_ask_for_its_own_functions_only(fake: Run) -> None:
    output = bytearray()
    assert fake("asks", output.extend) == 37
    answers = [json.loads(line) for line in bytes(output)[: -len(BYTES)].splitlines()]
    assert answers == [
        {"done": False, "why": "no such function in this guest"},
        {"done": False, "why": "the host does not do 'reboot'"},
        {"done": False, "why": ""},
        {"done": True, "why": ""},
        {"done": True, "why": ""},
    ]


def test_an_error_of_the_caller_ends_the_guest(fake: Run, tmp_path: Path) -> None:
    def fail(_: bytes) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        fake("hangs", fail)
    assert nothing_is_left(tmp_path)


def test_an_emulator_that_is_not_there_is_told(fake: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "arguments", lambda *_: ["/no/such/qemu"])
    with pytest.raises(LabUnavailable, match="does not start"):
        fake("well", bytes)


def test_old_consoles_do_not_pile_up(fake: Run, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / runner.CONSOLES
    kept.mkdir(parents=True)
    for number in range(runner.KEPT_CONSOLES + 5):
        (kept / f"20000101-{number:06}.log").touch()
    assert fake("well", bytes) == 37
    assert len(list(kept.iterdir())) == runner.KEPT_CONSOLES


def test_kvm_is_believed_only_after_a_guest_ran_and_until_the_next_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    for name in ("KVM", "BOOT_ID"):
        (tmp_path / name).write_text("first boot\n")
        monkeypatch.setattr(qemu, name, tmp_path / name)
    emulator = qemu.Emulator(("/q",), own=True)
    probes: list[bool] = []
    works = False

    def probe(*_: object) -> bool:
        probes.append(works)
        return works

    monkeypatch.setattr(qemu, "_probe", probe)

    def ask() -> bool:
        return qemu.with_kvm(emulator, tmp_path, tmp_path, lambda _: None).kvm

    assert not ask()
    works = True
    assert not ask()  # the verdict stands
    (tmp_path / "BOOT_ID").write_text("second boot\n")
    assert ask()
    assert probes == [False, True]
    next((tmp_path / "cache").glob("kvm-*.json")).write_text("{half")
    assert ask()
    assert len(probes) == 3
    (tmp_path / "KVM").unlink()
    assert not ask()
