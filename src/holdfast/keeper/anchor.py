# SPDX-License-Identifier: Apache-2.0
"""The anchor: holds a duplicate of every descriptor of a keeper, and has it succeeded.

Facts. What a process has pinned, mapped or opened goes when the last descriptor of it goes. A
keeper is a large program that runs drivers: it can crash, and it can be killed.

Consequence. Some process must hold the same descriptors that has nothing in it which could fail:
no driver, no decoding of what clients or cards send, no dependency. This file is that process. It
is run by itself (``python -I -S anchor.py``) and imports the standard library only.

Choice. The keeper sends each descriptor under a key with a note that means nothing here; the
anchor answers, and not before then does the keeper use it for DMA. When the keeper's end of the
link closes, or no heartbeat comes, the keeper is killed (that it is dead is then certain), and the
*standby*, a process that has everything imported, is told to fork a successor, which asks for
everything held. A standby that is gone is started again. Under systemd each descriptor goes into
its store, too, so that even the end of all these processes loses nothing.
Cost: one more process of a few megabytes, and one round trip before each map.

Messages are packets: one letter, a number that the answer repeats, then ``key NUL note``.
"""

import array
import contextlib
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

HEAD = struct.Struct("<cI")
PACKET = 192 * 1024
MAX_FDS = 253
SAFE_WITHIN = 10.0  # seconds; so many crashes as the third argument says: no driver any more
START_LIMIT = 20.0  # seconds for a successor's first word; then another standby is told
STANDBY_PAUSE = 1.0  # seconds between two starts of a standby


class Anchor:
    """Everything held, and the two processes at the other ends. One thread."""

    def __init__(self, link: socket.socket, heartbeat: float, safe_after: int) -> None:
        self.link = link
        self.heartbeat = heartbeat
        self.safe_after = safe_after
        self.held: dict[bytes, tuple[bytes, list[int]]] = {}
        self.keeper = -1
        self.standby: socket.socket | None = None
        self.standby_pid = 0
        self.standby_started = 0.0
        self.crashes: list[float] = []
        self.successions = 0
        self.deadline: float | None = None
        self.starting = False
        self.store = Store(os.environ.get("NOTIFY_SOCKET", ""))

    # -- waiting ------------------------------------------------------------

    def run(self) -> None:
        """Serve for ever; ends the process when the keeper says that it has ended."""
        while True:
            poller = select.poll()
            poller.register(self.link, select.POLLIN)
            if self.standby is not None:
                poller.register(self.standby, select.POLLIN)
            before = time.monotonic()
            ready = {fd for fd, _ in poller.poll(1000)}
            slept = time.monotonic() - before
            if self.deadline is not None and slept > 2.0:
                self.deadline += slept  # it was us who did not run
            if self.standby is not None and self.standby.fileno() in ready:
                self._drop_standby()  # it says nothing, so it is gone
            if self.link.fileno() in ready:
                self._receive()
            elif self.deadline is not None and time.monotonic() > self.deadline:
                self._silent()
            self._keep_standby()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass

    def _receive(self) -> None:
        try:
            data, fds, flags, _ = socket.recv_fds(self.link, PACKET, MAX_FDS)
        except OSError:
            data, fds, flags = b"", [], 0
        if len(data) < HEAD.size or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            close_all(fds)  # hung up; or something was lost that its sender must not rely on
            self._succeed()
            return
        kind, number = HEAD.unpack_from(data)
        key, _, note = data[HEAD.size :].partition(b"\0")
        self._handle(kind, number, key, note, fds)

    def _handle(self, kind: bytes, number: int, key: bytes, note: bytes, fds: list[int]) -> None:
        if self.starting:
            self.starting = False
            self.deadline = None
        if kind in (b"P", b"p"):  # put; the small one is not answered
            self._hold(key, note, fds)
        elif kind == b"H":  # hello: the keeper's pidfd
            close_all([self.keeper])
            self.keeper = fds.pop()
        else:
            close_all(fds)
        if kind in (b"D", b"d"):  # drop; the small one is not answered
            self._drop(key)
        elif kind == b"B":  # heartbeat
            self.deadline = time.monotonic() + self.heartbeat
        elif kind == b"Q":  # no more heartbeats: it is ending
            self.deadline = None
        elif kind == b"E":
            self._end()
        elif kind == b"G":  # get everything
            for name, (text, numbers) in self.held.items():
                self._send(b"i", number, name + b"\0" + text, numbers)
        if kind not in (b"B", b"Q", b"d", b"p"):
            self._send(b"a", number, str(self.standby_pid).encode())

    def _drop(self, key: bytes) -> None:
        gone = self.held.pop(key, (b"", []))[1]
        self.store.remove(key)
        if key.endswith(b"/socket"):  # what a client left in it unread may make the close wait
            threading.Thread(target=close_all, args=(gone,), daemon=True).start()
        else:
            close_all(gone)

    def _end(self) -> None:
        for name in list(self.held):
            self.store.remove(name)
        sys.exit(0)

    def _hold(self, key: bytes, note: bytes, fds: list[int]) -> None:
        close_all(self.held.get(key, (b"", []))[1])
        self.held[key] = (note, fds)
        if key == b"standby":
            self.standby = socket.socket(fileno=os.dup(fds[0]))
            self.standby_pid = int(note or b"0")
        self.store.put(key, note, fds)

    def _send(self, kind: bytes, number: int, body: bytes, fds: list[int] | None = None) -> None:
        # If the keeper is gone, the next look at the link says so.
        with contextlib.suppress(OSError):
            socket.send_fds(self.link, [HEAD.pack(kind, number) + body], fds or [])

    # -- succession ------------------------------------------------------------

    def _silent(self) -> None:
        if self.starting:
            self._drop_standby()
        self._succeed()

    def _succeed(self) -> None:
        """See to it that the keeper is dead, then have another one forked."""
        self._kill_keeper()
        now = time.monotonic()
        self.crashes = [at for at in self.crashes if now - at < SAFE_WITHIN] + [now]
        self.successions += 1
        if len(self.crashes) > 2 * self.safe_after:
            time.sleep(0.5)  # it crashes as fast as it is started
        order = {"safe": len(self.crashes) >= self.safe_after, "successions": self.successions}
        self.link.close()
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            while not self._order(json.dumps(order).encode(), theirs):
                self._drop_standby()
                self._start_standby()
        self.starting = True
        self.deadline = time.monotonic() + START_LIMIT

    def _kill_keeper(self) -> None:
        if self.keeper < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.keeper, signal.SIGKILL)
        poller = select.poll()
        poller.register(self.keeper, select.POLLIN)
        poller.poll()  # a successor beside a keeper that lives would be two masters
        close_all([self.keeper])
        self.keeper = -1

    def _order(self, order: bytes, link: socket.socket) -> bool:
        if self.standby is None:
            return False
        try:
            socket.send_fds(self.standby, [b"F" + order], [link.fileno()])
        except OSError:
            return False
        return True

    # -- the standby ------------------------------------------------------------

    def _drop_standby(self) -> None:
        if self.standby is not None:
            self.standby.close()
            self.standby = None
        if self.standby_pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.standby_pid, signal.SIGKILL)
            self.standby_pid = 0

    def _keep_standby(self) -> None:
        rested = time.monotonic() - self.standby_started > STANDBY_PAUSE
        # Not before it was told of the one that there is: a new anchor gets one after another.
        known = b"command" in self.held and b"standby" in self.held
        if self.standby is None and rested and known:
            self._start_standby()

    def _start_standby(self) -> None:
        pause = STANDBY_PAUSE - (time.monotonic() - self.standby_started)
        if self.standby_started and pause > 0:
            time.sleep(pause)
        self.standby_started = time.monotonic()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = json.loads(self.held[b"command"][0])
        with theirs:
            process = subprocess.Popen(
                [*command, "--standby-fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        process.returncode = 0  # reaped with everything else
        close_all(self.held.get(b"standby", (b"", []))[1])
        self.held[b"standby"] = (str(process.pid).encode(), [os.dup(ours.fileno())])
        self.standby, self.standby_pid = ours, process.pid


class Store:
    """systemd's descriptor store (sd_notify(3), FDSTORE), if this is a service that has one.

    Each descriptor has a name of its own there, ``key#place``. Notes have no place in it: they are
    in a file among the descriptors, ``notes-N``, which is written anew, as N + 1, when most of it
    is out of date.
    """

    def __init__(self, address: str) -> None:
        self.address = "\0" + address[1:] if address.startswith("@") else address
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        self.counts: dict[bytes, int] = {}
        self.texts: dict[bytes, bytes] = {}
        self.file = -1
        self.generation = 0

    def put(self, key: bytes, note: bytes, fds: list[int]) -> None:
        if self.sock is None or b"/" not in key:  # what starts a keeper is not worth keeping
            return
        self.remove(key)
        self.texts[key] = struct.pack("<II", len(key), len(note)) + key + note
        self._write(self.texts[key])
        self.counts[key] = len(fds)
        for place, fd in enumerate(fds):
            self._tell(b"FDSTORE=1\nFDPOLL=0\nFDNAME=%b#%d" % (key, place), [fd])

    def remove(self, key: bytes) -> None:
        self.texts.pop(key, None)
        for place in range(self.counts.pop(key, 0)):
            self._tell(b"FDSTOREREMOVE=1\nFDNAME=%b#%d" % (key, place))

    def _write(self, text: bytes) -> None:
        needed = sum(map(len, self.texts.values()))
        if self.file >= 0 and os.fstat(self.file).st_size < 4 * needed + 65536:
            os.write(self.file, text)
            return
        old, self.file = self.file, os.memfd_create("holdfast-notes", os.MFD_CLOEXEC)
        os.write(self.file, b"".join(self.texts.values()))
        self.generation += 1
        self._tell(b"FDSTORE=1\nFDPOLL=0\nFDNAME=notes-%d" % self.generation, [self.file])
        self._tell(b"FDSTOREREMOVE=1\nFDNAME=notes-%d" % (self.generation - 1))
        close_all([old])

    def _tell(self, text: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        if self.sock is not None:
            with contextlib.suppress(OSError):  # it may be full: this process holds it all the same
                self.sock.sendmsg([text], rights, 0, self.address)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def main(link: str, heartbeat: str, safe_after: str) -> None:
    # Its end is the keeper's to decide; a service manager or a terminal signals all of us at once.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    Anchor(socket.socket(fileno=int(link)), float(heartbeat), int(safe_after)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
