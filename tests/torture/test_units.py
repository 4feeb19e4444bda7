# SPDX-License-Identifier: Apache-2.0
"""Units on real stacks: in any executor, on other targets, and with whoever can be killed there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pytest

from holdfast.errors import UsageError
from holdfast.torture.pool import executor_of, run_all
from holdfast.torture.run import driver_of, ready
from holdfast.torture.schedule import Unit
from holdfast.torture.tally import problems_of
from holdfast.torture.unit import Found, run

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def sound(unit: Unit, found: Found) -> Found:
    """Nothing is wrong, and every case killed whom it was to kill."""
    assert not problems_of(unit, found)
    assert len(found.records) == len(unit.cases)
    for record in found.records:
        killed = {role for hit in record["hits"] for role in hit["killed"]}
        assert killed == unit.cases[record["case"]].kill, record
    return found


def test_a_unit_runs_in_any_executor() -> None:
    line = "drain/arena/shared/none/2 client.posted#2=client function.moved#3=client"
    units = [
        Unit.parse(ready("emu:xdma"), line, 1),
        Unit.parse(ready("emu:xdma"), "revoke/files/exclusive/none/1 client.alloc=client!fresh", 2),
    ]
    progress: list[int] = []
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        found = run_all(units, "xdma", pool, progress.append)
    assert [one.number for one in found] == [1, 2]
    for unit, one in zip(units, found, strict=True):
        sound(unit, one)
    assert sum(progress) == 3
    assert found[0].survivor["rounds"] > 0


def test_the_functions_own_death_ends_a_stack_without_a_trace() -> None:
    line = "drain/arena/shared/none/1 client.complete=client function.moved#2=client+function"
    unit = Unit.parse(ready("emu:xdma"), line, 1)
    sound(unit, run(unit, "xdma"))


def test_the_negative_control_is_found_corrupt() -> None:
    # Memory is given back in the middle of slow transfers, to a victim that looks.
    target = ready("emu:xdma?link_rate=4M")
    line = "release/arena/shared/none/1" + 4 * " client.doorbell#3=client"
    unit = Unit.parse(target, line, 1)
    problems = problems_of(unit, run(unit, "xdma"))
    assert any("corrupted" in problem.what for problem in problems)


def test_an_edu_device_is_tortured_as_well() -> None:
    setting = "revoke/arena/exclusive/none/1"
    line = f"{setting} client.doorbell=client function.moved=client client.pin=client"
    unit = Unit.parse(ready("emu:edu"), line, 1)
    sound(unit, run(unit, "edu"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A vfio-user server that is nobody's child here: an emulated card on a socket."""
    path = tmp_path / "card.sock"
    reading, writing = os.pipe2(os.O_CLOEXEC)
    command = [
        sys.executable, "-m", "holdfast", "emu", "xdma?memory=1M&link_rate=16M",
        "--socket", str(path), "--ready-fd", str(writing),
    ]  # fmt: skip
    process = subprocess.Popen(command, pass_fds=(writing,))
    os.close(writing)
    with os.fdopen(reading, "rb") as ready_line:
        ready_line.readline()
    yield f"vfio-user:{path}"
    process.terminate()
    process.wait(20)


def test_somebody_elses_server_is_asked_for_its_driver_and_tortured(server: str) -> None:
    assert driver_of(server) == "xdma"
    unit = Unit.parse(
        server, "drain/files/shared/none/2 client.posted=client client.wait=client", 1
    )
    sound(unit, run(unit, "xdma"))


def test_a_function_without_a_clients_life_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from holdfast.emu.edu import Edu\n"
        "class Own(Edu):\n"
        "    identity = Edu.identity.__class__(vendor=0x1234, device=0x9999, class_code=0xFF0000)\n"
    )
    with pytest.raises(UsageError, match="xdma and edu"):
        driver_of(f"emu:{own}:Own")


def test_an_executor_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(UsageError, match="no executor"), executor_of("elsewhere"):
        pass


@pytest.mark.skipif(find_spec("distributed") is not None, reason="Dask is installed")
def test_dask_that_is_not_installed_is_a_clear_error() -> None:
    with pytest.raises(UsageError, match="Dask"), executor_of("dask:tcp://127.0.0.1:1"):
        pass
