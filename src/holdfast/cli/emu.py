# SPDX-License-Identifier: Apache-2.0
"""``holdfast emu NAME``."""

from __future__ import annotations

import signal
import socket
from types import FrameType

import click

from holdfast.emu import registry
from holdfast.emu.faults import FaultPlan
from holdfast.emu.function import Function
from holdfast.emu.server import Server, tune_process
from holdfast.errors import HoldfastError
from holdfast.keeper.embedded import report_ready


@click.command(help="Run an emulated function on a vfio-user socket.")
@click.argument("name")
@click.option("--socket", "path", type=click.Path(), help="listen here; clients one at a time")
@click.option("--fd", type=int, default=None, help="serve this connected socket, then end")
@click.option(
    "-o", "--option", "options", multiple=True, metavar="KEY=VALUE", help="option of the function"
)
@click.option("--test-faults", default="", help="tests only: misbehave on purpose, as listed")
@click.option("--ready-fd", type=int, default=None, hidden=True)
def command(
    name: str,
    path: str | None,
    fd: int | None,
    options: tuple[str, ...],
    test_faults: str,
    ready_fd: int | None,
) -> None:
    if (path is None) == (fd is None):
        raise click.UsageError("give either --socket PATH or --fd N")
    try:
        function = _create(name, options, test_faults)
    except HoldfastError as error:
        if ready_fd is not None:
            report_ready(ready_fd, error)
        raise
    if ready_fd is not None:
        report_ready(ready_fd, None)
    tune_process()
    server = Server(function)

    def stop(_: int, __: FrameType | None) -> None:
        server.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        if fd is not None:
            server.serve_socket(socket.socket(fileno=fd))
        elif path is not None:
            click.echo(f"{name}: listening on {path}", err=True)
            server.serve_path(path)
    finally:
        function.close()


def _create(name: str, options: tuple[str, ...], faults: str) -> Function:
    """The function, with options from the command line and behind the ``?`` of its name."""
    plain, _, query = name.partition("?")
    pairs = [pair.partition("=") for pair in (*options, *query.split("&")) if pair]
    chosen = {key: value for key, _, value in pairs}
    return registry.create(plain, chosen, faults=FaultPlan.parse(faults))
