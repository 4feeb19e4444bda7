# SPDX-License-Identifier: Apache-2.0
"""Who may come in, what each sees of others, and what a user may hold over all leases.

As root with real users: forked children change their ids. Without root the rules are tried on what
the kernel would have told.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

import holdfast
from holdfast.errors import Busy, HoldfastError, NoPermission, QuotaExceeded, UsageError, to_fields
from holdfast.keeper import embedded
from holdfast.keeper.admission import AllowList, require_operator, visible
from holdfast.keeper.gate import MOST_SILENT, SPARE, Gate
from holdfast.kernel import packets
from holdfast.kernel.pidfd import Peer
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack
from holdfast.values import Target

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")
LONG = 15.0
GUEST, MEMBER, STRANGER, GROUP = 64001, 64002, 64003, 64100


def peer(uid: int, gid: int = 9, groups: tuple[int, ...] = ()) -> Peer:
    return Peer(pidfd=-1, pid=77, uid=uid, gid=gid, groups=groups)


# -- the rules ------------------------------------------------------------------------------------


def test_the_owner_and_root_come_in_others_by_user_or_by_any_group() -> None:
    allow = AllowList(frozenset({GUEST}), frozenset({GROUP}))
    me = os.geteuid()
    assert all(AllowList().permits(peer(uid)) for uid in (0, me))
    assert allow.permits(peer(GUEST))
    assert allow.permits(peer(MEMBER, gid=GROUP))
    assert allow.permits(peer(MEMBER, groups=(5, GROUP)))
    for stranger in (peer(STRANGER), peer(GROUP, gid=GUEST), peer(STRANGER, groups=(GUEST,))):
        assert not allow.permits(stranger)
        with pytest.raises(NoPermission, match=f"user {stranger.uid} .* is not on"):
            allow.require(stranger, "emu:xdma")


def test_names_and_numbers_make_a_list_and_unknown_names_are_refused() -> None:
    allow = AllowList.of(["root", "64001"], ["64100"])
    assert allow == AllowList(frozenset({0, GUEST}), frozenset({GROUP}))
    assert not AllowList.of([], [])
    for users, groups in ((["no-such-user"], []), ([], ["no-such-group"])):
        with pytest.raises(UsageError, match="no-such"):
            AllowList.of(users, groups)


def test_operator_requests_are_for_whoever_runs_the_keeper() -> None:
    require_operator(peer(0), "retry", "emu:xdma")
    require_operator(peer(os.geteuid()), "retry", "emu:xdma")
    with pytest.raises(NoPermission, match="does not run this keeper"):
        require_operator(peer(STRANGER), "retry", "emu:xdma")


TOLD: dict[str, Any] = {
    "lease": 3, "uid": GUEST, "state": "draining", "bytes": 4096, "pid": 4711, "lifeline": 99,
    "run": "token", "log": [("alive", 1, "opened")], "process_dead": True, "withheld": ["x"],
    "something new": {"iova": 1 << 32},
}  # fmt: skip


def test_others_see_that_a_lease_is_there_but_not_who_and_where() -> None:
    seen = visible(TOLD, peer(STRANGER))
    assert {key: seen[key] for key in ("lease", "uid", "state", "bytes")} == {
        "lease": 3, "uid": GUEST, "state": "draining", "bytes": 4096,
    }  # fmt: skip
    assert seen["pid"] == 0
    assert seen["run"] == ""
    assert not seen["log"]
    assert not seen["something new"], "what is not known to be public is not shown"
    assert seen.keys() == TOLD.keys()
    for everything in (visible(TOLD, None), visible(TOLD, peer(GUEST)), visible(TOLD, peer(0)),
                       visible(TOLD, peer(STRANGER), "token")):  # fmt: skip
        assert everything == TOLD
    assert visible(TOLD, peer(STRANGER), "guess")["pid"] == 0
    assert visible({**TOLD, "run": ""}, peer(STRANGER), "")["pid"] == 0


def test_silent_connections_of_one_user_are_bounded_and_told_why() -> None:
    gate = Gate(None)
    with ExitStack() as stack:

        def connection() -> tuple[socket.socket, socket.socket]:
            pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for each in pair:
                stack.enter_context(each)
            return pair

        assert all(gate.enter(connection()[0]) == os.getuid() for _ in range(MOST_SILENT))
        ours, theirs = connection()
        assert gate.enter(ours) is None
        assert ours.fileno() < 0
        told = msgspec.msgpack.decode(theirs.recv(4096))
        assert told["error"]["kind"] == QuotaExceeded.__name__
        gate.greeted(os.getuid())
        assert gate.enter(connection()[0]) == os.getuid()


# -- real users -----------------------------------------------------------------------------------


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for keepers that serve others."""
    with tempfile.TemporaryDirectory(prefix="holdfast-") as name:
        os.chmod(name, 0o755)
        monkeypatch.setenv(embedded.SYSTEM_VARIABLE, name)
        yield Path(name)


def as_user(
    uid: int, body: Callable[[], object], *, gid: int | None = None, groups: tuple[int, ...] = ()
) -> Any:
    """What ``body`` returns (as JSON), or the fields of the error it raises, as another user."""

    def child(_: int, writing: int) -> None:
        with tempfile.TemporaryDirectory(prefix="holdfast-") as private:
            os.chown(private, uid, gid or uid)
            os.environ[embedded.RUNTIME_VARIABLE] = private
            pid = os.fork()
            if pid == 0:
                try:
                    os.setgroups(groups)
                    os.setresgid(gid or uid, gid or uid, gid or uid)
                    os.setresuid(uid, uid, uid)
                    try:
                        answer: object = {"is": body()}
                    except HoldfastError as error:
                        answer = to_fields(error)
                    except Exception:  # noqa: BLE001 - it is told to the parent
                        answer = traceback.format_exc()
                    os.write(writing, msgspec.json.encode(answer))
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)

    made = actors.spawn(child)
    told = b""
    while piece := os.read(made.reading, 65536):
        told += piece
    made.reap()
    answer = msgspec.json.decode(told)
    assert isinstance(answer, dict), answer
    return answer.get("is", answer)


def guest_opens(target: str, size: int = 4096) -> Callable[[], int]:
    def body() -> int:
        with holdfast.open(target, channels=0) as card:
            card.alloc(size)
            return card.lease.number

    return body


@needs_root
def test_users_and_groups_on_the_list_come_in_and_others_are_told_why(
    system: Path, serve: Callable[..., Stack]
) -> None:
    stack = serve("emu:xdma", "--allow-user", str(GUEST), "--allow-group", str(GROUP))
    path = system / embedded.socket_name(Target.parse(stack.target))
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    with holdfast.open(stack.target, channels=0) as own:
        assert as_user(GUEST, guest_opens(stack.target)) > own.lease.number
        assert as_user(MEMBER, guest_opens(stack.target), gid=GROUP)
        assert as_user(MEMBER, guest_opens(stack.target), groups=(7, *range(300, 700), GROUP))
        refused = as_user(STRANGER, guest_opens(stack.target))
        assert refused["kind"] == NoPermission.__name__
        assert str(STRANGER) in refused["what"]
        assert "--allow-user" in refused["hint"]
    assert stack.ps()["unaccounted_bytes"] == 0


@needs_root
def test_a_user_sees_its_own_leases_and_only_the_outside_of_others(
    system: Path, serve: Callable[..., Stack]
) -> None:
    stack = serve("emu:xdma", "--allow-user", str(GUEST))

    def look() -> list[Any]:
        from holdfast.keeper.opening import connect

        with holdfast.open(stack.target, channels=0) as mine:
            client = connect(Target.parse(stack.target))
            leases = client.ps_all()["leases"]
            client.close()
            return [os.getpid(), mine.lease.number, leases]

    with holdfast.open(stack.target, channels=0) as own:
        pid, number, leases = as_user(GUEST, look)
        by_number = {lease["lease"]: lease for lease in leases}
        assert by_number[number]["pid"] == pid
        other = by_number[own.lease.number]
        assert (other["pid"], other["log"], other["lifeline"]) == (0, [], 0)
        assert other["channels"] == list(own.lease.channels)
        every = {lease["lease"]: lease["pid"] for lease in stack.ps()["leases"]}
        assert every[number] == pid, "the operator sees everything"


@needs_root
def test_quotas_hold_for_a_user_over_all_leases_and_not_for_the_next_user(
    system: Path, serve: Callable[..., Stack]
) -> None:
    stack = serve("emu:xdma", "--allow-user", str(GUEST), "--allow-user", str(MEMBER),
                  "--user-quota", "8M", "--user-leases", "3", "--user-buffers", "4")  # fmt: skip

    def many() -> list[str]:
        said = []
        with ExitStack() as leases:
            cards = [leases.enter_context(holdfast.open(stack.target, channels=0))
                     for _ in range(3)]  # fmt: skip
            keep = [card.alloc(3 << 20) for card in cards[:2]]
            for attempt in (
                lambda: cards[2].alloc(3 << 20),
                lambda: leases.enter_context(holdfast.open(stack.target, channels=0)),
                lambda: [cards[2].lease.take_slab(4096) for _ in range(9)],
            ):
                try:
                    attempt()
                    said.append("nothing")
                except QuotaExceeded as error:
                    said.append(f"{error}")
            del keep
        return said

    for uid in (GUEST, MEMBER):
        nbytes, leases, pieces = as_user(uid, many)
        assert f"user {uid}" in nbytes
        assert f"quota of {8 << 20}" in nbytes
        assert "--user-quota" in nbytes
        assert "3 leases" in leases
        assert "--user-leases" in leases
        assert "4 pieces" in pieces
    assert settle(
        lambda: sum(lease["state"] != "released" for lease in stack.ps()["leases"]),
        goal=0, timeout=LONG,
    ) == 0  # fmt: skip
    with holdfast.open(stack.target, channels=0) as own:
        own.alloc(3 << 20)


@needs_root
def test_who_posts_directly_has_the_function_for_one_user(
    system: Path, serve: Callable[..., Stack]
) -> None:
    stack = serve("emu:xdma", "--allow-user", str(GUEST))

    def direct() -> int:
        with holdfast.open(stack.target, access="shared", channels=1) as card:
            return card.lease.number

    with holdfast.open(stack.target, channels=0) as own:
        own.alloc(4096)
        refused = as_user(GUEST, direct)
        assert refused["kind"] == Busy.__name__
        assert "post directly" in refused["what"]
        assert "mediated" in refused["hint"]
        assert isinstance(as_user(GUEST, guest_opens(stack.target)), int)
    assert settle(
        lambda: sum(lease["state"] != "released" for lease in stack.ps()["leases"]),
        goal=0, timeout=LONG,
    ) == 0  # fmt: skip
    assert isinstance(as_user(GUEST, direct), int)
    with holdfast.open(stack.target, access="shared", channels=1, timeout=LONG):
        assert as_user(GUEST, guest_opens(stack.target))["kind"] == Busy.__name__


@needs_root
def test_a_guests_connections_are_bounded_and_the_owner_still_comes_in(
    system: Path, serve: Callable[..., Stack]
) -> None:
    stack = serve("emu:xdma", "--allow-user", str(GUEST), "--user-leases", "2")
    path = str(system / embedded.socket_name(Target.parse(stack.target)))

    def crowd() -> list[int]:
        with ExitStack() as stack:
            every = [
                stack.enter_context(packets.connect(path, LONG)) for _ in range(2 + SPARE + 20)
            ]
            told: list[socket.socket] = []
            while len(told) < 20:
                told = select.select(every, [], [], LONG)[0]
            refused = [b"QuotaExceeded" in sock.recv(4096) for sock in told]
            return [len(every) - len(told), sum(refused)]

    assert as_user(GUEST, crowd) == [2 + SPARE, 20]
    with holdfast.open(stack.target, channels=0) as own:
        own.alloc(4096)


def test_a_directory_that_others_can_write_to_is_not_trusted(
    system: Path, serve: Callable[..., Stack]
) -> None:
    stack = serve("emu:xdma", "--allow-user", "root")
    system.chmod(0o777)
    try:
        with pytest.raises(NoPermission, match="could be anybody"):
            holdfast.open(stack.target)
    finally:
        system.chmod(0o755)


def test_a_socket_anywhere_is_reached_by_its_name(
    serve: Callable[..., Stack], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "here.sock"
    monkeypatch.setenv(embedded.SOCKET_VARIABLE, str(place))
    stack = serve("emu:edu", "--socket", str(place))
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    with holdfast.open(stack.target) as card:
        assert card.bars[0].load(0)
    monkeypatch.setenv(embedded.SOCKET_VARIABLE, str(tmp_path / "nowhere.sock"))
    with pytest.raises(HoldfastError, match="no keeper listens there"):
        holdfast.open(stack.target)
    monkeypatch.setenv(embedded.SOCKET_VARIABLE, str(place))
