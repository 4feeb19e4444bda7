# SPDX-License-Identifier: Apache-2.0
"""Behaves as QEMU with a guest does, as far as its ports show; the first argument says how."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time


class Pipe:
    """A port that the guest only writes to."""

    def __init__(self, number: int) -> None:
        found = re.search(rf"fd=(\d+),set={number}", "\n".join(sys.argv))
        assert found
        self._fd = int(found[1])

    def sendall(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]


def port(name: str) -> socket.socket:
    found = re.search(rf"socket,id={name},fd=(\d+)", "\n".join(sys.argv))
    assert found
    return socket.socket(fileno=int(found[1]))


def main() -> None:
    mode = sys.argv[1]
    console = re.search(r"file,id=console,path=(\S+)", "\n".join(sys.argv))
    assert console
    with open(console[1], "w", encoding="utf-8") as file:
        file.write(f"console of {mode}\n")
    output, records = Pipe(0), Pipe(1)
    questions, monitor = port("questions"), port("monitor")
    if mode == "no-boot":
        signal.pause()
    if mode == "dies-early":
        sys.exit("could not open the kernel")
    records.sendall(b"started\n")
    if mode == "hangs":
        output.sendall(b"so far\n")
        signal.pause()
    if mode == "panics":
        os.kill(os.getpid(), signal.SIGABRT)
    if mode == "fails":
        records.sendall(b"failed no driver takes f0\n")
        return
    if mode == "nonsense":
        records.sendall(b"what?\n")
        signal.pause()
    if mode == "asks":
        ask(questions, monitor, output)
    output.sendall(bytes(range(256)) * 4096)
    records.sendall(b"exit 37\nresults 0\nend\n")
    if mode == "no-power-off":
        output.sendall(b"late")
        signal.pause()
    time.sleep(0.05)


def ask(questions: socket.socket, monitor: socket.socket, output: Pipe) -> None:
    """A guest that asks for this and that; and QEMU's side of what comes of it."""
    monitor.recv(1000)
    for what, name in (("unplug", "f9"), ("reboot", "f0"), ("unplugged", "f0")):
        questions.sendall(json.dumps({"ask": what, "id": name}).encode() + b"\n")
        output.sendall(questions.recv(1000))
    questions.sendall(b'{"ask": "unplug", "id": "f0"}\n')
    command = json.loads(monitor.recv(1000))
    assert command["execute"] == "device_del"
    assert command["arguments"] == {"id": "f0"}
    monitor.sendall(json.dumps({"id": command["id"], "return": {}}).encode() + b"\n")
    output.sendall(questions.recv(1000))
    monitor.sendall(b'{"event": "DEVICE_DELETED", "data": {"device": "f0"}}\n')
    told = b""
    while b"true" not in told:
        questions.sendall(b'{"ask": "unplugged", "id": "f0"}\n')
        told = questions.recv(1000)
    output.sendall(told)


main()
