# SPDX-License-Identifier: Apache-2.0
"""Named steps: each is somewhere in the code, and whoever reaches an armed one dies there."""

from __future__ import annotations

import ast
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import holdfast
from holdfast import steps
from holdfast.steps import Board

SOURCE = Path(holdfast.__file__).parent


def calls_of_reach() -> list[tuple[str, Path, ast.Call, list[ast.AST]]]:
    """Every ``reach(...)``: the step, the file, the call, and the nodes around it."""
    found = []
    names: set[str] = set()

    def walk(node: ast.AST, path: Path, around: list[ast.AST]) -> None:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            [name] = node.args
            assert isinstance(name, ast.Constant), f"{path}:{node.lineno}: not a plain name"
            found.append((str(name.value), path, node, around))
        for child in ast.iter_child_nodes(node):
            walk(child, path, [*around, node])

    for path in sorted(SOURCE.rglob("*.py")):
        names = {"steps.reach"}
        if "from holdfast.steps import reach" in path.read_text(encoding="utf-8"):
            names.add("reach")
        walk(ast.parse(path.read_text(encoding="utf-8")), path, [])
    return found


def test_every_step_of_the_catalogue_is_somewhere_and_no_other() -> None:
    assert {name for name, *_ in calls_of_reach()} == set(steps.STEPS)


def test_a_step_is_reached_by_its_role() -> None:
    homes = {
        "client": {"keeper", "dma", "drivers", "device.py", "transfer.py"},
        "keeper": {"keeper", "backends"},
        "function": {"emu"},
    }
    for name, path, *_ in calls_of_reach():
        home = path.relative_to(SOURCE).parts[0]
        assert home in homes[name.partition(".")[0]], (name, path)


def test_no_step_is_reached_once_per_descriptor() -> None:
    """On the data path no step stands in a loop: neither while posting nor while moving."""
    data_path = {"xdma_ring.py", "xdma_engine.py", "transfer.py", "xdma_plan.py", "xdma_fetch.py"}
    for name, path, call, around in calls_of_reach():
        if path.name in data_path:
            loops = [node for node in around if isinstance(node, ast.For | ast.While)]
            assert not loops, f"{path}:{call.lineno}: {name} is in a loop"


# -- boards ------------------------------------------------------------


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with Board(tmp_path / "board", create=True) as made:
        yield made
    steps.arm(None)


def child(body: Callable[[], None]) -> int:
    """Run ``body`` in a forked process that then says it is still there; its raw status."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(7)
    return os.waitpid(pid, 0)[1]


def alive(status: int) -> bool:
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 7


def killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def enlisted(board: Board, *names: str) -> Callable[[], None]:
    def body() -> None:
        own = steps.join(str(board.path))
        assert own is not None
        own.enlist([0])
        for name in names:
            steps.reach(name)

    return body


def test_the_one_who_reaches_an_armed_step_dies_there(board: Board) -> None:
    board.arm(0, "client.posted", ["client"])
    assert killed(child(enlisted(board, "client.post", "client.posted", "client.doorbell")))
    hit = board.hit(0)
    assert hit is not None
    assert hit.killed == {"client"}


def test_a_step_is_counted_down(board: Board) -> None:
    board.arm(0, "client.posted", ["client"], count=3)
    assert alive(child(enlisted(board, "client.posted", "client.posted")))
    assert board.hit(0) is None
    assert killed(child(enlisted(board, "client.posted")))


def test_a_client_counts_its_own_steps_only(board: Board) -> None:
    board.arm(0, "client.posted", ["client"], client=os.getpid())

    def other() -> None:
        assert steps.join(str(board.path))
        steps.reach("client.posted")

    assert alive(child(other))
    assert board.hit(0) is None


def test_an_unarmed_and_a_sleeping_slot_kill_nobody(board: Board) -> None:
    board.arm(0, "client.posted", ["client"], asleep=True)
    assert alive(child(enlisted(board, *steps.STEPS)))
    board.arm(0, "client.posted", ["client"])
    board.clear(0)
    assert alive(child(enlisted(board, "client.posted")))


def test_a_slot_can_be_woken_by_the_client(board: Board) -> None:
    board.arm(0, "client.posted", ["client"], asleep=True)

    def body() -> None:
        enlisted(board, "client.posted")()
        assert steps.board is None  # this process was not started under a board
        board.wake([0])
        steps.reach("client.posted")

    assert killed(child(body))


def test_others_are_dead_before_the_one_who_kills_goes_on(board: Board) -> None:
    waiting = os.fork()
    if waiting == 0:
        signal.pause()
        os._exit(1)
    board.set_role("keeper", waiting)
    board.arm(0, "client.posted", ["keeper"])

    def body() -> None:
        enlisted(board, "client.posted")()
        state = Path(f"/proc/{waiting}/stat").read_text().rpartition(")")[2].split()[0]
        os._exit(7 if state == "Z" else 1)

    assert alive(child(body))
    assert killed(os.waitpid(waiting, 0)[1])
    hit = board.hit(0)
    assert hit is not None
    assert hit.killed == {"keeper"}


def test_a_pair_dies_together(board: Board) -> None:
    waiting = os.fork()
    if waiting == 0:
        signal.pause()
        os._exit(1)
    board.set_role("anchor", waiting)
    board.arm(0, "client.doorbell", ["client", "anchor"])
    assert killed(child(enlisted(board, "client.doorbell")))
    assert killed(os.waitpid(waiting, 0)[1])
    hit = board.hit(0)
    assert hit is not None
    assert hit.killed == {"client", "anchor"}


def test_a_process_that_has_the_pid_now_is_not_hit(board: Board) -> None:
    waiting = os.fork()
    if waiting == 0:
        signal.pause()
        os._exit(1)
    started = steps.start_time(waiting)
    assert started is not None
    assert steps.kill(waiting, started + 1) is None
    pidfd = steps.kill(waiting, started)
    assert pidfd is not None
    os.close(pidfd)
    assert killed(os.waitpid(waiting, 0)[1])
    assert steps.start_time(waiting) is None


def test_keeper_and_function_tell_who_they_are(board: Board) -> None:
    def body() -> None:
        assert steps.join(str(board.path))
        steps.reach("function.move")

    pid = os.fork()
    if pid == 0:
        body()
        os._exit(7)
    os.waitpid(pid, 0)
    assert board.role("function") == pid


def test_a_board_that_is_gone_arms_nothing(tmp_path: Path) -> None:
    assert steps.join(str(tmp_path / "none")) is None
    assert steps.join(None) is None
