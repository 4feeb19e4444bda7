# SPDX-License-Identifier: Apache-2.0
"""Boots real kernels and runs the guest suites in them; slow, in a phase of its own (``lab``)."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from holdfast.lab import Guest, GuestFailed, LabUnavailable, kernel, run
from holdfast.lab.runner import prepare, to_stderr
from holdfast.lab.suites import LOG, SCENARIOS, Scenario, log_trouble, run_scenario

REQUIRED = "HOLDFAST_LAB_REQUIRED"
"""Environment variable: where it is set, a lab that cannot be had is a failure."""

pytestmark = pytest.mark.lab


def by_kernel(scenario: Scenario) -> object:
    # A group of its own each: they take minutes, and must not all wait for one worker.
    marks = [pytest.mark.xdist_group(scenario.name)]
    if scenario.guest.kernel == "full":
        marks.append(pytest.mark.full_kernel)
    return pytest.param(scenario, id=scenario.name, marks=marks)


@pytest.fixture(scope="session")
def lab() -> None:
    """Guests can be run here; skips, or fails where that is wanted, with one line."""
    try:
        prepare(Guest())
    except LabUnavailable as error:
        if os.environ.get(REQUIRED):
            raise
        pytest.skip(f"no lab on this machine: {error.what}; {error.hint}")


@pytest.fixture(scope="session")
def second_kernel(lab: None) -> None:
    """The second kernel is there, or is built now."""
    kernel.built(to_stderr)


def told(data: bytes) -> None:
    """Output of a guest, shown when the test fails."""
    sys.stdout.write(data.decode(errors="replace"))


@pytest.mark.parametrize("scenario", [by_kernel(one) for one in SCENARIOS])
def test_a_guest_suite_passes(scenario: Scenario, lab: None, tmp_path: Path) -> None:
    report = run_scenario(scenario, tmp_path, output=told)
    sys.stdout.write(report.summary() + "\n")
    assert not report.problems()


def test_output_status_and_results_come_out_of_a_guest_as_they_are(
    lab: None, tmp_path: Path
) -> None:
    script = (
        "import os, pathlib, signal, sys; "
        "sys.stdout.buffer.write(bytes(range(256)) * 64); sys.stdout.flush(); "
        "os.write(2, os.environb[b'WORD'] + os.getcwd().encode()); "
        "pathlib.Path('/results/kept').write_bytes(bytes(range(256)) * 4096); "
        "assert os.readlink('/sys/bus/pci/devices/0000:00:03.0/driver').endswith('vfio-pci'); "
        "os.kill(os.getpid(), signal.SIGUSR1)"
    )
    output = bytearray()
    status = run(
        Guest(),
        ["python3", "-c", script],
        output=output.extend,
        results=tmp_path,
        environment={"WORD": "it's \N{EURO SIGN} $HOME\n"},
    )
    assert bytes(output) == bytes(range(256)) * 64 + "it's \N{EURO SIGN} $HOME\n/work".encode()
    assert status == 128 + 10
    assert (tmp_path / "kept").read_bytes() == bytes(range(256)) * 4096
    assert "Linux version" in (tmp_path / LOG).read_text()


def test_a_panic_is_told_with_the_console(lab: None, tmp_path: Path) -> None:
    console = tmp_path / "console"
    with pytest.raises(GuestFailed, match="without an exit status"):
        run(
            Guest(functions=()),
            ["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 60"],
            output=told,
            console=console,
        )
    assert "Kernel panic" in console.read_text(errors="replace")


@pytest.mark.full_kernel
def test_trouble_in_the_kernel_log_is_found(second_kernel: None, tmp_path: Path) -> None:
    """The negative control of the log's judgement, on the kernel and command line it is for."""
    scenario = next(one for one in SCENARIOS if one.watched)
    script = (
        "from pathlib import Path; from holdfast.lab.guest import damage_expected\n"
        "def say(text): Path('/dev/kmsg').write_text(text)\n"
        "with damage_expected('a negative control'): say('BUG: on purpose\\n')\n"
        "say('WARNING: planted at line 1\\n'); say('pagealloc: memory corruption\\n')\n"
    )
    command = ["sh", "-c", f"python3 -c {shlex.quote(script)}"]
    assert run(scenario.guest, command, output=told, results=tmp_path) == 0
    trouble = log_trouble((tmp_path / LOG).read_text(errors="replace"))
    assert [line.partition("] ")[2] for line in trouble] == [
        "WARNING: planted at line 1",
        "pagealloc: memory corruption",
    ]
