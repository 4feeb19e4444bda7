# SPDX-License-Identifier: Apache-2.0
"""The keeper's loop: accepts clients, answers their requests, notices their deaths.

One asyncio loop serves everything; what blocks goes through ``FunctionHost.call``. A client is one
connection is one lease. Its requests are answered in order. Its end is noticed twice, by its pidfd
and by the hang-up of its socket; whichever comes first freezes the lease, and the rest is
:mod:`holdfast.keeper.quiesce`. Nothing a client sends or does not send can end the keeper: a broken
protocol ends that connection only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import time
from collections import deque
from typing import Any

from holdfast import steps
from holdfast.dma.ledger import Ledger
from holdfast.errors import (
    NoPermission,
    ProtocolError,
    QuarantineFull,
    UsageError,
    to_fields,
)
from holdfast.keeper import admission
from holdfast.keeper.adoption import adopt_leases
from holdfast.keeper.anchor_link import AnchorLink
from holdfast.keeper.connection import Connection, Traffic
from holdfast.keeper.continuity import Inherited
from holdfast.keeper.event_log import EventLog
from holdfast.keeper.gate import GREETING, Gate
from holdfast.keeper.greeting import greet
from holdfast.keeper.journal import Stage
from holdfast.keeper.lease import Lease
from holdfast.keeper.mediation import Mediation
from holdfast.keeper.memory import MemoryDesk
from holdfast.keeper.quiesce import Quiesce
from holdfast.keeper.session import Session
from holdfast.keeper.settings import Settings
from holdfast.keeper.state import Machine, State
from holdfast.keeper.unit import Unit
from holdfast.kernel import pidfd, procfs
from holdfast.values import Access, LeaseId
from holdfast.wire import lease as wire

__all__ = ["Keeper", "Settings"]

HISTORY = 4096
"""How many ended leases ``ps`` can still tell about."""
WIND_UP_POLL = 0.05
"""Seconds between two looks at whether what is still dying has come to quarantine."""
LEAVE_GRACE = 5.0
"""Seconds that clients have to let go of a function that the system wants back."""


class Keeper:
    """Serves one function. Construct and :meth:`serve` inside a running loop."""

    def __init__(
        self, inherited: Inherited, settings: Settings, unit: Unit, link: AnchorLink, log: EventLog
    ) -> None:
        continuity = inherited.continuity
        self.host = inherited.host
        self.continuity = continuity
        self.journal = continuity.journal
        self.settings = settings
        self.unit = unit
        self.unit.keepers.append(self)
        self.link = link
        self.log = log
        ledger = Ledger(settings.quota, settings.buffers, settings.per_user)
        # Numbers that no slab and no pin of a keeper before this one can have had.
        numbers = itertools.count(1 + (continuity.counters.successions << 32))
        self.desk = MemoryDesk(self.host, self.journal, continuity.scope, ledger, numbers)
        self.leases: dict[LeaseId, Lease] = {}
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self.sessions: dict[LeaseId, Session] = {}
        self.greeted: dict[LeaseId, Lease] = {}
        """Clients that said Hello and have not opened a lease."""
        self._gate = Gate(settings.user_leases)
        self.traffic = Traffic()
        self._connections: set[asyncio.Task[None]] = set()
        self._deaths: dict[LeaseId, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()
        self._quiet_since = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._request_fd: int | None = None
        self.leaving = False
        self._one_less = asyncio.Event()
        self.mediation = Mediation(self)
        self.watch()
        if inherited.contents is not None:
            adopt_leases(self, inherited.contents)
        self._take_in_lost(inherited)

    # -- the function ------------------------------------------------------------

    def watch(self) -> None:
        """Notice when the function goes away, or is wanted back by the system."""
        self.host.backend.on_gone = self._function_gone
        self._request_fd = self.host.backend.request_fd
        if self._request_fd is not None:
            self._loop.add_reader(self._request_fd, self._requested)

    def unwatch(self) -> None:
        """Before the backend is closed."""
        if self._request_fd is not None:
            self._loop.remove_reader(self._request_fd)
            self._request_fd = None

    def _requested(self) -> None:
        """An unbind or a hot-removal waits for us (vfio_main.c ``vfio_unregister_group_dev``)."""
        self.unwatch()
        self.leaving = True
        for session in list(self.sessions.values()):
            session.notify("leave", "the system wants the function back")
        self.host.keep(self._leave())

    async def _leave(self) -> None:
        """Let clients close, then end: who does not is treated as dead."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_GRACE):
                while self.leases:
                    self._one_less.clear()
                    await self._one_less.wait()
        self.stop()

    def _take_in_lost(self, inherited: Inherited) -> None:
        """Memory that a dead keeper left behind is a lease whose process is dead."""
        left = [*inherited.lost, *self.host.source.leftovers()]
        if not left and not inherited.wreck:
            return
        self.host.usable.clear()
        peer = pidfd.Peer(pid=0, uid=os.getuid(), gid=os.getgid(), pidfd=pidfd.open_self())
        lease = self.new_lease(peer)
        lease.claimed = True
        lease.access = Access.EXCLUSIVE
        lease.channels = self.host.claim(Access.EXCLUSIVE, None)
        lease.everything = inherited.wreck
        self.desk.adopt_memory(lease, left)
        lease.note(f"{lease.nbytes} bytes were left behind by a keeper that is dead")
        self.leases[lease.number] = lease
        self.host.isolated.add(lease.number)
        # Its clients never had registers mapped, or have been hung up on with bus mastering off,
        # and the keeper that carried their accesses is gone.
        lease.signal(hung_up=True, process_dead=True)
        self.end(lease, "left behind")

    # -- life ------------------------------------------------------------

    async def serve(self, listener: socket.socket) -> None:
        """Accept clients until :meth:`stop`, idleness or the end of the function."""
        listener.setblocking(False)
        accepting = asyncio.create_task(self._accept(listener))
        try:
            while not self._stop.is_set():
                try:
                    async with asyncio.timeout(self._patience()):
                        await self._stop.wait()
                except TimeoutError:
                    if self.unit.idle(self.settings.idle or 0):
                        self.unit.stop()
        finally:
            accepting.cancel()
            # While it listens nobody else can have taken its name; a moment later a successor may.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(listener.getsockname())
            listener.close()
            await self._wind_up()

    @property
    def ending(self) -> bool:
        """Whether it was told to stop."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End serving: living leases are treated as dead, and quieted by their policy."""
        self._stop.set()

    def _patience(self) -> float | None:
        if self.settings.idle is None:
            return None
        return max(0.01, self.settings.idle - self.idle_for())

    def idle_for(self) -> float:
        """Seconds without a client or a lease that dies."""
        if self._connections or self._deaths:
            self._quiet_since = time.monotonic()
        return time.monotonic() - self._quiet_since

    async def _wind_up(self) -> None:
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        # What is not quiet by then keeps its memory until the function itself is let go.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.deadlines.ladder()):
                while tasks := [
                    task
                    for number, task in self._deaths.items()
                    if self.leases[number].machine.state is not State.QUARANTINE
                ]:
                    await asyncio.wait(tasks, timeout=WIND_UP_POLL)
        self.mediation.close()
        for task in [*self._deaths.values(), *self.host.tasks]:
            task.cancel()
        self.unwatch()
        await asyncio.get_running_loop().run_in_executor(None, self.host.close)

    def _function_gone(self) -> None:
        """Called from the backend's thread: no new lease makes sense any more."""
        self._loop.call_soon_threadsafe(self._on_function_gone)

    def _on_function_gone(self) -> None:
        for session in list(self.sessions.values()):
            session.notify("gone", "the function went away")
        self.stop()

    # -- clients ------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError:  # out of descriptors: try again rather than die
                await asyncio.sleep(0.05)
                continue
            user = self._gate.enter(sock)
            if user is None:
                await asyncio.sleep(0)  # there may be a long queue of them
                continue
            task = asyncio.create_task(self._attend(sock, user))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _attend(self, sock: socket.socket, user: int) -> None:
        steps.reach("keeper.accepted")
        connection = Connection(sock, self.traffic)
        # Not a timeout around the coroutine: nothing it has received may be lost.
        silence = self._loop.call_later(GREETING, connection.close)
        lease: Lease | None = None
        try:
            try:
                greeted = await greet(self, connection)
            finally:
                silence.cancel()
                self._gate.greeted(user)
            if greeted is None:
                return
            peer, hello = greeted
            lease = self.new_lease(peer, hello.lifeline)
            lease.run = hello.run
            self.greeted[lease.number] = lease
            session = Session(self, lease, connection)
            await session.serve()
        except ProtocolError as error:
            connection.send(wire.Failed(error=to_fields(error)))
        finally:
            self._gate.leave(user)
            self._hung_up(lease, connection)

    # -- leases ------------------------------------------------------------

    def new_lease(self, peer: pidfd.Peer, lifeline: int = 0) -> Lease:
        """A lease that nothing is known of yet. It owns the peer's pidfd."""
        number = LeaseId(self.continuity.next_lease())
        machine = Machine(self.settings.policy)
        return Lease(number, peer, machine, lifeline=lifeline, recorder=self.log.step)

    def anchor_client(self, lease: Lease, session: Session) -> None:
        """Have a client's socket and pidfd outlive this process. Blocking."""
        fd = session.connection.sock.fileno()
        self.continuity.scope.put(f"lease/{lease.number}/pidfd", [lease.peer.pidfd])
        self.continuity.scope.put(f"lease/{lease.number}/socket", [fd])

    def admit(self, lease: Lease, session: Session) -> None:
        """A lease begins: from now on its death is watched, and it outlives this process."""
        self.require_room()
        others = {n: each for n, each in self.leases.items() if each is not self.mediation.house}
        admission.require_admissible(lease, others, self.settings, str(self.host.target))
        self.greeted.pop(lease.number, None)
        lease.command = procfs.command_of(lease.peer.pid)
        self.journal.lease(lease.record())
        self.leases[lease.number] = lease
        self.sessions[lease.number] = session
        self.watch_client(lease)

    def require_room(self, operation: str = "open") -> None:
        """Raise QuarantineFull if too much memory is in quarantine to give any more out."""
        held = self.quarantined()
        if held >= self.settings.quarantine_bound:
            raise QuarantineFull(
                f"{held} bytes are in quarantine, at the bound of {self.settings.quarantine_bound}",
                operation=operation,
                target=str(self.host.target),
            )

    async def retry(self, number: int, uid: int, *, force: bool) -> dict[str, Any]:
        """Look at a quarantined lease now; what became of it. For the keeper's own user."""
        target = str(self.host.target)
        if uid not in (0, os.geteuid()):
            raise NoPermission(
                f"the keeper belongs to user {os.geteuid()}, not to user {uid}",
                operation="retry",
                target=target,
                hint="ask as the user who runs the keeper",
            )
        lease = self.leases.get(LeaseId(number))
        held = lease.quarantined if lease is not None else None
        if lease is None or held is None or lease.machine.state is not State.QUARANTINE:
            raise UsageError(
                f"lease {number} is not in quarantine",
                operation="retry",
                target=target,
                hint="see holdfast ps",
            )
        ask = held.ask(force=force)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.deadlines.ladder()):
                await ask.answer.wait()
        return lease.outcome()

    def _died(self, lease: Lease) -> None:
        lease.signal(process_dead=True)
        if lease.number not in self.leases:  # its memory is back, its channels were withheld
            return self._unwatch(lease)
        self._loop.remove_reader(lease.peer.pidfd)
        return self.end(lease, "its process died")

    def _hung_up(self, lease: Lease | None, connection: Connection) -> None:
        if lease is not None:
            self.continuity.scope.drop(f"lease/{lease.number}/socket")
        connection.close()
        if lease is None:
            return
        self.greeted.pop(lease.number, None)
        session = self.sessions.pop(lease.number, None)
        if session is None:  # never admitted, so nobody else closes it
            self._unwatch(lease)
            return
        if session.closed_orderly:
            lease.signal(goodbye=True)
        lease.signal(hung_up=True)
        # An orphan may hold the connection until long after the lease was released.
        if lease.number in self.leases:
            self.end(lease, "its connection hung up")

    def end(self, lease: Lease, why: str) -> None:
        """Begin the death protocol, if it has not begun."""
        if lease.number in self._deaths:
            return
        lease.stage = Stage.ENDING
        self.journal.lease(lease.record())
        quiesce = Quiesce(lease, self.host, self.desk, self.settings.deadlines, self)
        task = asyncio.get_running_loop().create_task(quiesce.run(why))
        self._deaths[lease.number] = task
        task.add_done_callback(lambda done: self._ended(lease, done))

    def _ended(self, lease: Lease, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            # A fault of ours: keep everything that the lease holds, and say so.
            lease.note(f"internal error, memory kept: {type(error).__name__}: {error}")
            return
        self.history.append(lease.describe())
        self._deaths.pop(lease.number, None)
        self.mediation.leave(lease)
        self.leases.pop(lease.number, None)
        self._one_less.set()
        self.settled(lease)
        if lease.process_dead or lease.stage is not Stage.WITHHELD:
            self._unwatch(lease)

    def _unwatch(self, lease: Lease) -> None:
        self._loop.remove_reader(lease.peer.pidfd)
        self.continuity.scope.drop(f"lease/{lease.number}/pidfd")
        os.close(lease.peer.pidfd)

    async def restored(self) -> None:
        """The function is usable again: the requests of mediated leases were cut off as well."""
        await self.mediation.restart()

    def settled(self, lease: Lease) -> None:
        """Write down how far a lease is whose memory is back; nothing, if nothing is left of it."""
        if lease.stage is Stage.WITHHELD:
            self.journal.lease(lease.record())
        else:
            self.journal.end_lease(lease.number)

    @property
    def dying(self) -> bool:
        """Whether a lease is on its way through the death protocol."""
        return bool(self._deaths)

    def watch_client(self, lease: Lease) -> None:
        """Notice the death of a lease's process."""
        self._loop.add_reader(lease.peer.pidfd, self._died, lease)

    def attend_again(self, lease: Lease, connection: Connection) -> None:
        """Go on serving a client of a predecessor, once what was begun for it is undone."""
        session = Session(self, lease, connection, adopted=True)
        self.sessions[lease.number] = session
        task = asyncio.create_task(self._go_on(session))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _go_on(self, session: Session) -> None:
        try:
            async with session.lease.serving:
                if session.lease.alive:
                    await self.desk.settle(session.lease)
                    session.notify("successor", "the keeper was killed and has a successor")
            steps.reach("keeper.adopted")
            await session.serve()
        except ProtocolError as error:
            session.connection.send(wire.Failed(error=to_fields(error)))
        finally:
            self._hung_up(session.lease, session.connection)

    def announce(self, what: str, text: str, *, but: Lease | None) -> None:
        """Tell every other living lease of a function-level step."""
        for number, session in self.sessions.items():
            if but is None or number != but.number:
                session.notify(what, text)

    def at_work(self, *, but: Lease) -> list[int]:
        """Other leases that would lose what they have in flight by a function-level step."""
        return [
            int(lease.number)
            for lease in self.leases.values()
            if lease is not but
            and lease.claimed
            and lease.machine.state in (State.ALIVE, State.FROZEN, State.DRAINING)
        ]

    def quarantined(self) -> int:
        kept = (each for each in self.leases.values() if each.machine.state is State.QUARANTINE)
        return sum(lease.nbytes for lease in kept)

    def unaccounted(self) -> int:
        """Bytes that the source of memory has given out and no lease holds: must be 0."""
        held = sum(lease.nbytes for lease in self.leases.values())
        return self.host.source.held_bytes - held
