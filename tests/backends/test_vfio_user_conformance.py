# SPDX-License-Identifier: Apache-2.0
"""The vfio-user client keeps the backend contract, against each emulated function."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast import backends
from holdfast.contracts import FunctionBackend
from holdfast.emu import registry
from holdfast.emu.server import Server
from holdfast.errors import BadTarget, DeviceGone
from holdfast.testing.conformance import BackendConformance
from holdfast.values import CONFIG_REGION, Target


@pytest.fixture(params=["edu", "xdma"])
def function_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestVfioUserBackend(BackendConformance):
    @pytest.fixture
    def backend(self, function_name: str, clean: None) -> Iterator[FunctionBackend]:
        function = registry.create(function_name, {})
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        thread = threading.Thread(target=Server(function).serve_socket, args=(theirs,))
        thread.start()
        backend = backends.adopt(ours, f"emu:{function_name}")
        yield backend
        backend.close()
        thread.join()
        function.close()


@pytest.fixture
def listening(tmp_path: Path, clean: None) -> Iterator[Callable[[], Path]]:
    """Start a server at a path; it is stopped after the test."""
    function = registry.create("edu", {})
    server = Server(function)
    path = tmp_path / "edu.sock"
    thread = threading.Thread(target=server.serve_path, args=(path,))

    def start() -> Path:
        thread.start()
        return path

    yield start
    server.stop()
    if thread.ident is not None:
        thread.join()
    function.close()


def test_a_target_names_the_socket_to_connect_to(listening: Callable[[], Path]) -> None:
    path = listening()
    while not path.exists():
        threading.Event().wait(0.001)
    while True:
        try:
            backend = backends.connect(Target.parse(f"vfio-user:{path}"))
            break
        except DeviceGone:
            continue  # between bind and listen
    assert backend.region_read(CONFIG_REGION, 0, 4) == bytes.fromhex("3412e811")
    backend.close()


def test_a_socket_that_is_not_there_is_a_device_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DeviceGone, match="is the server running"):
        backends.connect(Target.parse(f"vfio-user:{tmp_path}/none.sock"))


def test_a_scheme_without_a_backend_is_a_bad_target() -> None:
    with pytest.raises(BadTarget, match="no backend"):
        backends.connect(Target("emu", "edu"))
