# SPDX-License-Identifier: Apache-2.0
"""What goes on around the tests inside a guest, on the host: deadlines, leftovers, functions."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from holdfast.lab import guest, inside

FUNCTION = "0000:00:03.0"


@pytest.fixture
def pci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A function in a directory that takes writes as sysfs does, but does nothing on them."""
    monkeypatch.setattr(inside, "PCI", tmp_path)
    monkeypatch.setattr(inside, "PATIENCE", 0.2)
    monkeypatch.setenv(guest.FUNCTIONS, f"f0={FUNCTION}")
    monkeypatch.setenv(guest.DRIVER, "vfio-pci")
    device = tmp_path / "devices" / FUNCTION
    device.mkdir(parents=True)
    for name in ("vfio-pci", "other"):
        (tmp_path / "drivers" / name).mkdir(parents=True)
    (device / "driver").symlink_to(tmp_path / "drivers" / "vfio-pci")
    return tmp_path


def child(ignored: signal.Signals | None = None) -> int:
    """A child process that waits for ever."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)
        os.write(tell, b"x")
        while True:
            signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    return pid


def test_a_status_is_passed_on(clean: None) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(3)
    assert inside.wait(pid, "file") == 3


def test_a_file_that_hangs_is_asked_where_and_ended(
    clean: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inside, "DEADLINE", 0.1)
    assert inside.wait(child(), "file") == 128 + signal.SIGABRT
    assert "SIGABRT" in capsys.readouterr().out


def test_a_file_that_does_not_even_end_then_is_killed(
    clean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside, "DEADLINE", 0.1)
    monkeypatch.setattr(inside, "GRACE", 0.1)
    assert inside.wait(child(ignored=signal.SIGABRT), "file") == 128 + signal.SIGKILL


def test_what_a_file_left_running_is_ended_and_named(
    clean: None, capsys: pytest.CaptureFixture[str]
) -> None:
    # As in a guest, where orphans belong to process 1: reaped by somebody else.
    shell = subprocess.Popen(
        ["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True
    )
    assert shell.stdout is not None
    left = int(shell.stdout.readline())
    while b"sleep" not in Path(f"/proc/{left}/cmdline").read_bytes():
        os.sched_yield()  # no command line for a moment: it is just being executed
    inside.end_processes("file.py", {left})
    shell.wait(10)
    shell.stdout.close()
    assert not os.path.exists(f"/proc/{left}")
    told = capsys.readouterr().out
    assert f"file.py left a process, which is ended now: {left} " in told


def test_a_function_in_its_place_is_left_alone(
    pci: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside.restore("file.py")
    assert capsys.readouterr().out == ""
    assert not (pci / "drivers_probe").exists()


def test_a_function_with_another_driver_is_given_back(
    pci: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = pci / "devices" / FUNCTION
    (device / "driver").unlink()
    (device / "driver").symlink_to(pci / "drivers" / "other")
    inside.restore("file.py")
    assert "file.py left f0 with driver other" in capsys.readouterr().out
    assert (pci / "drivers/other/unbind").read_text() == FUNCTION
    assert (device / "driver_override").read_text() == "vfio-pci"
    assert (pci / "drivers_probe").read_text() == FUNCTION


def test_a_function_that_was_pulled_out_is_put_back(
    pci: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = pci / "devices" / FUNCTION
    (device / "driver").unlink()
    device.rmdir()
    asked: list[str] = []

    def ask(what: str, name: str) -> bool:
        asked.append(f"{what} {name}")
        if what == "plug":
            device.mkdir()
        return True

    monkeypatch.setattr(guest, "ask", ask)
    inside.restore("file.py")
    assert asked == ["unplugged f0", "plug f0"]
    assert (device / "driver_override").read_text() == "vfio-pci"
    assert "out of the machine" in capsys.readouterr().out


def test_a_function_that_does_not_come_back_is_told(
    pci: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = pci / "devices" / FUNCTION
    (device / "driver").unlink()
    device.rmdir()
    monkeypatch.setattr(guest, "ask", lambda *_: False)
    inside.restore("file.py")
    assert (pci / "rescan").read_text() == "1"
    assert "f0 cannot be put back" in capsys.readouterr().out
