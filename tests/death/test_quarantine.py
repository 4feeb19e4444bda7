# SPDX-License-Identifier: Apache-2.0
"""Quarantine: what it shows, what it refuses, and how it is left."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import holdfast
from holdfast.cli.ps import _duration
from holdfast.cli.ps import command as ps
from holdfast.errors import Busy, NoPermission, QuarantineFull, UsageError
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.kernel import packets
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.values import Target

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 15.0
SHORT = (
    "--drain-deadline", "0.1", "--stop-deadline", "0.1", "--isolate-deadline", "0.1",
    "--reset-deadline", "1", "--arena", "8M",
)  # fmt: skip
NEVER = ("--quarantine-period", "1000", "--quarantine-longest", "1000")
"""Only an operator has it looked at again."""
OFTEN = ("--quarantine-period", "0.05", "--quarantine-longest", "0.4")
XDMA = "emu:xdma?memory=1M"
STUBBORN = "hang@2-2,refuse_reset@1"
"""Hangs once, and never resets."""


def quarantined(scene: Callable[..., Any], *options: str, faults: str = STUBBORN) -> Any:
    """A stage with one lease in quarantine: ``stage.pid``."""
    stage = scene(XDMA, *SHORT, *options, "--test-faults", faults)
    stage.fill_card()
    stage.pid = stage.kill_in_mid_dma()
    stage.reached(stage.pid, "quarantine")
    return stage


def run(*arguments: str) -> Any:
    return CliRunner().invoke(ps, arguments)


# -- what it shows --------------------------------------------------------------------------------


def test_ps_shows_what_is_held_since_when_why_and_by_which_dead_process(
    scene: Callable[..., Any],
) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    stage = quarantined(scene, *NEVER)
    (keeper,) = json.loads(run("--json").output)
    (lease,) = keeper["leases"]
    held = lease["quarantine"]
    assert held["bytes"] == lease["bytes"] == keeper["quarantined_bytes"] > 0
    assert before <= datetime.fromisoformat(held["since"]) <= datetime.now(UTC)
    assert 0 <= held["seconds"] < LONG
    assert held["why"] == "DEVICE_RESET was refused"
    assert lease["pid"] == stage.pid
    with open("/proc/self/comm", encoding="utf-8") as comm:
        assert lease["command"] == comm.read().strip()
    assert lease["withheld"]
    text = run().output
    assert f"process {stage.pid} ({lease['command']}) in quarantine since {held['since']}" in text
    assert f"{held['bytes']} bytes" in text
    assert "held because not observed: " in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (200, "3 min 20 s"), (3600, "1 h"),
     (18_200, "5 h 3 min"), (200_000, "2 d 7 h")],
)  # fmt: skip
def test_durations_read_well(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


# -- what it refuses ------------------------------------------------------------------------------


def test_at_the_bound_neither_leases_nor_memory_are_given_out(scene: Callable[..., Any]) -> None:
    stage = scene(
        XDMA, *SHORT, *OFTEN, "--quarantine", "64K", "--test-faults", "hang@2-2,refuse_reset@1"
    )
    stage.fill_card()
    with stage.innocent() as living:
        living.take()
        stage.reached(stage.kill_in_mid_dma(), "quarantine")
        with pytest.raises(QuarantineFull, match="at the bound of 65536") as refused:
            holdfast.open(stage.stack.target, channels=0)
        assert "--retry" in refused.value.hint
        with pytest.raises(QuarantineFull):
            living.device.alloc(1 << 20)
        assert living.foreign(0) == 0, "what it has it keeps"


# -- how it is left -------------------------------------------------------------------------------


def test_a_later_reset_that_is_acknowledged_frees_it(
    scene: Callable[..., Any], rungs_of: Callable[..., list[str]]
) -> None:
    # The reset of the ladder is refused, and three more.
    stage = scene(
        XDMA, *SHORT, *OFTEN, "--stop-deadline", "2", "--test-faults", "hang@2-2,refuse_reset@1-4"
    )
    stage.fill_card()
    with stage.innocent() as innocent:
        told = stage.reached(stage.kill_in_mid_dma(), "released")
        innocent.take()
        assert rungs_of(told)[-3:] == ["quarantine", "quiet", "released"]
        assert told["log"][-2][2] == "reset acknowledged"
        assert innocent.foreign() == 0
    assert stage.stack.ps()["quarantined_bytes"] == 0
    with holdfast.open(XDMA, timeout=LONG) as card:  # the fault is over, and the channel is back
        card.dma.to_card(card.alloc(512)).wait(LONG)


def test_looks_become_rarer(scene: Callable[..., Any]) -> None:
    stage = quarantined(scene, *OFTEN)

    def pause() -> float:
        return float(stage.lease(stage.pid)["quarantine"]["next_look_s"])

    assert settle(lambda: pause() < 0.4, goal=0, timeout=LONG) == 0
    held = stage.lease(stage.pid)["quarantine"]
    assert held["looks"] >= 3  # after 0.05, 0.1 and 0.2 s
    assert held["last_look"]


def test_an_operator_can_have_it_looked_at_now(scene: Callable[..., Any]) -> None:
    stage = quarantined(scene, *NEVER, faults="hang@2-2,refuse_reset@1-2")
    number = stage.lease(stage.pid)["lease"]
    # The ladder's reset was the first refusal; this is the second.
    first = run("--retry", str(number), "--json")
    assert first.exit_code == 1, first.output
    assert json.loads(first.output)["state"] == "quarantine"
    second = run("--retry", str(number), "--target", XDMA)
    assert second.exit_code == 0, second.output
    assert "released" in second.output
    assert stage.lease(stage.pid)["state"] == "released"
    third = run("--retry", str(number))
    assert isinstance(third.exception, UsageError)
    assert "0 keepers" in str(third.exception)


def test_nobody_but_the_keepers_own_user_can_ask(scene: Callable[..., Any]) -> None:
    stage = quarantined(scene, *NEVER, faults="hang@2-2,refuse_reset@1")
    lease = stage.lease(stage.pid)["lease"]

    def stranger(_: int, writing: int) -> None:
        path = str(embedded.socket_path(Target.parse(XDMA)))
        # What a socket's peer is told is the effective user; files are opened as before.
        os.seteuid(65534)
        ctypes.CDLL(None).setfsuid(0)
        client = LeaseClient(packets.connect(path, LONG), Target.parse(XDMA))
        try:
            client.greet()  # refused here already, unless the user is on the keeper's list
            client.retry(lease, force=True)
        except NoPermission:
            os.write(writing, b"n")

    if os.getuid() == 0:  # else tests/keeper has it, without another user
        child = actors.spawn(stranger)
        said = child.read(1)
        child.reap()
        assert said == b"n"
    client = LeaseClient(
        packets.connect(str(embedded.socket_path(Target.parse(XDMA))), LONG), Target.parse(XDMA)
    )
    client.greet()
    try:
        for number in (lease + 1, 0):
            with pytest.raises(UsageError, match="not in quarantine"):
                client.retry(number)
        assert client.retry(lease)["state"] == "quarantine"
    finally:
        client.close()


# -- others ---------------------------------------------------------------------------------------


def test_what_waits_for_a_stubborn_function_recovers_by_itself(scene: Callable[..., Any]) -> None:
    stage = scene(
        XDMA, *SHORT, *NEVER, "--stop-deadline", "2", "--test-faults", "hang@2-2,refuse_reset@1-2"
    )
    stage.fill_card()
    with holdfast.open(XDMA, timeout=LONG) as living:
        told = stage.reached(stage.kill_in_mid_dma(), "quarantine")
        with pytest.raises(Busy):
            living.reset()
        for expected in ("quarantine", "released"):
            assert (
                json.loads(run("--retry", str(told["lease"]), "--json").output)["state"] == expected
            )
        _verify(living)


def _verify(card: holdfast.Device) -> None:
    source, back = card.alloc(4096), card.alloc(4096)
    source.array[:] = np.arange(4096) % 251
    card.dma.to_card(source, 0x1000).wait(LONG)
    card.dma.from_card(back, 0x1000).wait(LONG)
    assert (source.array == back.array).all()
