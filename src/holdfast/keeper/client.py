# SPDX-License-Identifier: Apache-2.0
"""The client's end of a lease.

Everything a client asks of its keeper goes through :class:`LeaseClient`: one request at a time over
one packet socket, whose existence *is* the lease. The socket, like every descriptor here, is
close-on-exec and closed in forked children.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from holdfast import steps
from holdfast.bar import Bell
from holdfast.dma.buffer import SlabView
from holdfast.dma.sg import SgList
from holdfast.errors import (
    Closed,
    DeviceGone,
    HoldfastError,
    KeeperGone,
    ProtocolError,
    UsageError,
    from_fields,
)
from holdfast.keeper import embedded
from holdfast.kernel import dma_pin, events, packets, pidfd, procfs
from holdfast.kernel.mapping import PAGE, Mapping
from holdfast.values import Access, Target
from holdfast.wire import lease as wire

R = TypeVar("R")

REQUEST_TIMEOUT = 60.0
"""Seconds that a keeper may take for any request; its own deadlines are shorter."""


class LeaseClient:
    """One connection to a keeper. Thread-safe; fulfils ``device.LeasePort``."""

    def __init__(self, sock: socket.socket, target: Target) -> None:
        self.target = target
        self.number = 0
        self.access = Access.SHARED
        self.channels: tuple[int, ...] = ()
        self.grant: dict[str, Any] = {}
        self._sock = sock
        self._lock = threading.Lock()
        self._seq = 0
        self._resets = 0
        self.granted = 0
        self.news = events.make()
        """Rung whenever the generation or the end changed: see ``interrupt.LeaseEnd``."""
        self._gone: HoldfastError | None = None
        self.leave: HoldfastError | None = None
        """Why the function must be let go of, once the keeper said so."""
        self._sent_memory = False
        self._later: deque[tuple[int, object]] = deque()
        self._owner = os.getpid()

    # -- requests ------------------------------------------------------------

    def greet(self) -> wire.Welcome:
        """The handshake. Raises VersionMismatch, NoPermission or ProtocolError."""
        own = pidfd.open_self()
        try:
            hello = wire.Hello(
                version=wire.VERSION,
                client=f"pid {os.getpid()}",
                lifeline=procfs.socket_inode(self._sock),
                run=embedded.run_token(),
            )
            reply, _ = self.request(hello, [own])
        finally:
            os.close(own)
        return expect(reply, wire.Welcome)

    def request(
        self, message: wire.Message, fds: Sequence[int] = ()
    ) -> tuple[wire.Reply, list[int]]:
        """Ask, wait for the answer; returns it with its descriptors, which the caller owns.

        Raises the keeper's error for :class:`wire.Failed`, KeeperGone if it hung up.
        """
        with self._lock:
            self._require_open()
            self._flush_later()
            return self._ask(message, fds)

    def _tell(self, message: wire.Message) -> None:
        """Send something that is not answered."""
        with self._lock:
            self._require_open()
            try:
                packets.send(self._sock, wire.encode(message), ())
            except OSError as error:
                raise self._lost("the keeper hung up", error.errno) from error

    def _ask(self, message: wire.Message, fds: Sequence[int] = ()) -> tuple[wire.Reply, list[int]]:
        self._seq += 1
        packet = _packet(_with_seq(message, self._seq))
        try:
            packets.send(self._sock, packet, fds)
        except OSError as error:
            # The keeper may have said why before it hung up.
            self._drain_after(error)
        while True:
            reply, received = self._receive()
            if isinstance(reply, wire.Notice):
                if reply.what == "successor":
                    # Whether the one that was killed had it carried out, its successor knows. If
                    # that one has hung up by now, what it said before is still to be read.
                    with contextlib.suppress(BrokenPipeError):
                        packets.send(self._sock, packet, fds)
                self._take_notice(reply)
            elif isinstance(reply, wire.Failed) and reply.seq in (self._seq, 0):
                close_all(received)
                raise from_fields(reply.error)
            elif reply.seq == self._seq:
                return reply, received
            else:
                close_all(received)

    def _receive(self) -> tuple[wire.Reply, list[int]]:
        self._sock.settimeout(REQUEST_TIMEOUT)
        try:
            packet, fds = packets.receive(self._sock, wire.MAX_PACKET, wire.MAX_FDS)
        except TimeoutError as error:
            raise self._lost("the keeper does not answer") from error
        except OSError as error:
            raise self._lost("the keeper hung up", error.errno) from error
        if not packet:
            raise self._lost("the keeper hung up")
        try:
            return wire.decode_reply(packet), fds
        except ProtocolError:
            close_all(fds)
            raise

    def _drain_after(self, error: OSError) -> None:
        if error.errno is None:
            raise error
        try:
            self._sock.getpeername()
        except OSError:
            raise self._lost("the keeper hung up", error.errno) from error

    def _lost(self, why: str, number: int | None = None) -> HoldfastError:
        if self._gone is None:  # what the keeper said before it hung up tells more
            self._gone = KeeperGone(
                why, operation="talk to the keeper", target=str(self.target), errno=number
            )
            events.ring(self.news, 1)
        return self._gone

    def _require_open(self) -> None:
        if self._sock.fileno() < 0 and self.leave is not None:
            raise self.leave
        if self._owner != os.getpid() or self._sock.fileno() < 0:
            raise Closed("the lease is closed", operation="talk to the keeper",
                         target=str(self.target))  # fmt: skip
        if self._gone is not None:
            raise self._gone

    # -- notices ------------------------------------------------------------

    def fileno(self) -> int:
        """The lease's socket, for waiters that must notice its end."""
        return self._sock.fileno()

    def pump(self) -> None:
        """Take waiting notices. Raises KeeperGone if the keeper hung up."""
        if not self._lock.acquire(timeout=0.05):
            return  # a request is under way and takes them itself
        try:
            self._require_open()
            while True:
                self._sock.setblocking(False)
                try:
                    packet, fds = packets.receive(self._sock, wire.MAX_PACKET, wire.MAX_FDS)
                except BlockingIOError:
                    return
                except OSError as error:
                    raise self._lost("the keeper hung up", error.errno) from error
                close_all(fds)
                if not packet:
                    raise self._lost("the keeper hung up")
                reply = wire.decode_reply(packet)
                if isinstance(reply, wire.Notice):
                    self._take_notice(reply)
        finally:
            self._lock.release()

    def _take_notice(self, notice: wire.Notice) -> None:
        if notice.what == "successor":
            return
        if notice.what == "gone":
            self._gone = DeviceGone(notice.text, operation="lease", target=str(self.target))
            events.ring(self.news, 1)
        elif notice.what == "leave":
            self.leave = DeviceGone(
                notice.text,
                operation="lease",
                target=str(self.target),
                hint="open it again once it is back",
            )
            events.ring(self.news, 1)
        else:
            self._restarted()

    def _restarted(self) -> None:
        """What was in flight is lost: whoever sleeps for it must look."""
        self._resets += 1
        events.ring(self.news, 1)

    def generation(self) -> int:
        """How often the function was reset under this lease. Closed after close or fork.

        Every post asks, so the usual answer costs no system call; the fork hook sees to the rest.
        """
        if self._gone is not None or self.news < 0:
            self._require_open()
        return self._resets

    # -- memory ------------------------------------------------------------

    def take_slab(self, nbytes: int) -> SlabView:
        """A new slab, mapped into this process."""
        reply, fds = self.request(wire.TakeSlab(nbytes=nbytes))
        steps.reach("client.alloc.granted")
        try:
            return map_slab(expect(reply, wire.SlabTaken).info, fds)
        finally:
            close_all(fds)

    def give_slab(self, slab: SlabView) -> None:
        """Unmap a slab and give it back."""
        self.request(wire.GiveSlab(slab=slab.number))
        steps.reach("client.trimmed")
        slab.close()

    def pin(self, data: npt.NDArray[np.uint8], *, writable: bool) -> tuple[int, int, str]:
        """Make own memory reachable; returns the pin's number, its IOVA, and how it is kept."""
        address = data.ctypes.data
        fds = [] if self._sent_memory else [procfs.open_own_memory()]
        try:
            reply, received = self.request(
                wire.Pin(address=address, nbytes=data.nbytes, writable=writable), fds
            )
        finally:
            close_all(fds)
        self._sent_memory = True
        if isinstance(reply, wire.PinHere):
            return self._pin_in_place(reply, received, address, writable)
        pinned = expect(reply, wire.Pinned)
        return pinned.pin, pinned.iova, "relayed"

    def _pin_in_place(
        self, here: wire.PinHere, fds: list[int], address: int, writable: bool
    ) -> tuple[int, int, str]:
        """Ask the kernel to pin own pages where the keeper reserved room for them.

        The keeper wrote the room down first, so it finds the pins if we die anywhere in here.
        """
        first = address % PAGE
        steps.reach("client.pin.reserved")
        try:
            if len(fds) != 1:
                raise ProtocolError("a pin needs one descriptor", operation="pin")
            dma_pin.map_own(
                here.kind, fds[0], here.ioas, address - first, here.size, here.iova, writable
            )
        except HoldfastError:
            self.request(wire.Unpin(pin=here.pin))
            raise
        finally:
            close_all(fds)
        steps.reach("client.pin.placed")
        self._tell(wire.PinDone(pin=here.pin))
        return here.pin, here.iova + first, "in place"

    def unpin(self, pin: int, *, later: object | None) -> None:
        """Take a pin away: now, or (from a finalizer) with the next request."""
        if later is not None:
            self._later.append((pin, later))
        elif self._gone is None and self._sock.fileno() >= 0:
            self.request(wire.Unpin(pin=pin))

    def _flush_later(self) -> None:
        while self._later:
            pin, _ = self._later[0]
            self._ask(wire.Unpin(pin=pin))
            self._later.popleft()

    # -- registers, commands ------------------------------------------------------------

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        reply, _ = self.request(wire.RegionRead(index=index, offset=offset, count=count))
        return expect(reply, wire.Data).data

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        self.request(wire.RegionWrite(index=index, offset=offset, data=data))

    def unmask(self) -> None:
        """Let INTx be raised again."""
        self.request(wire.Unmask())

    def command(self, name: str, args: dict[str, Any]) -> Any:
        reply, _ = self.request(wire.Command(name=name, args=args))
        return expect(reply, wire.Result).value

    def reset(self) -> None:
        self.request(wire.Reset())
        self._restarted()

    def regrant(self) -> list[tuple[int, Bell]]:
        """Start the channels anew; returns fresh doorbells, which the caller owns."""
        with self._lock:
            self._require_open()
            self._flush_later()
            reply, fds = self._ask(wire.Regrant())
            # Before anybody else can take a notice that came after the reply.
            self._restarted()
            self.granted = self._resets
        again = expect(reply, wire.Regranted)
        self.grant = again.grant
        return take_bells(again.bells, fds)

    def ps(self, after: int = 0, run: int = 0) -> dict[str, Any]:
        """One page of the keeper's leases, see ``wire.lease.Ps``."""
        reply, _ = self.request(wire.Ps(after=after, run=run))
        value = expect(reply, wire.Result).value
        if not isinstance(value, dict):
            raise ProtocolError("ps did not answer with a dict", operation="ps")
        return value

    def ps_all(self, after: int = 0, run: int = 0) -> dict[str, Any]:
        """All leases above ``after``, living and ended, in one answer."""
        told = self.ps(after, run)
        while told["more"]:
            page = self.ps(told["leases"][-1]["lease"], run)
            told["leases"] += page["leases"]
            told["more"] = page["more"]
        return told

    def retry(self, lease: int, *, force: bool = False) -> dict[str, Any]:
        """Have a quarantined lease looked at now: its state then, and why. See ``wire.Retry``."""
        reply, _ = self.request(wire.Retry(lease=lease, force=force))
        value = expect(reply, wire.Result).value
        if not isinstance(value, dict):
            raise ProtocolError("retry did not answer with a dict", operation="retry")
        return value

    def close(self) -> None:
        """Say goodbye and hang up. Idempotent; never raises for a keeper that is gone."""
        if self._sock.fileno() < 0:
            return
        if self._owner == os.getpid() and self._gone is None:
            try:
                self.request(wire.Close())
            except HoldfastError:
                pass  # it is gone; hanging up says the same
            steps.reach("client.closed")
        self._sock.close()
        self._close_news()

    def drop(self) -> None:
        """In a forked child: close the socket without a word."""
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self._sock.close()
        self._close_news()

    def _close_news(self) -> None:
        news, self.news = self.news, -1
        if news >= 0:
            events.close(news)


def map_slab(info: wire.SlabInfo, fds: list[int]) -> SlabView:
    """Map a slab that the keeper described; the descriptor stays the caller's."""
    return SlabView(info.slab, Mapping.extents(fds[info.fd], info.extents), sg_of(info))


def sg_of(info: wire.SlabInfo) -> SgList:
    """Where the function sees a slab."""
    sizes = [size for _, size in info.extents]
    return SgList.of(zip(info.iovas, sizes, strict=True))


def take_bells(infos: list[wire.BellInfo], fds: list[int]) -> list[tuple[int, Bell]]:
    """Doorbells that came with a message, as ``(bar, bell)``; they own their descriptors."""
    return [(info.region, Bell(info.offset, info.value, fds[info.fd])) for info in infos]


def expect(reply: wire.Reply, kind: type[R]) -> R:
    """The reply as what it must be; ProtocolError if it is something else."""
    if not isinstance(reply, kind):
        raise ProtocolError(
            f"expected {kind.__name__}, the keeper sent {type(reply).__name__}", operation="lease"
        )
    return reply


def _packet(message: wire.Message) -> bytes:
    """The packet of a request; UsageError for values that the keeper would hang up on."""
    try:
        packet = wire.encode(message)
        wire.decode_request(packet)
    except (ProtocolError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(str(error), operation=type(message).__name__) from error
    return packet


def _with_seq(message: wire.Message, seq: int) -> wire.Message:
    return msgspec.structs.replace(message, seq=seq)


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that came with a message and were not used."""
    for fd in fds:
        os.close(fd)
