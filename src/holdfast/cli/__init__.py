# SPDX-License-Identifier: Apache-2.0
"""The ``holdfast`` command: the only place that prints and exits.

Commands are loaded when used, so that ``holdfast emu`` and ``holdfast serve`` start quickly.
Exit codes: 0 done · 1 it ran and found what must not be (``demo``, ``bench`` verification,
``doctor`` where something is not usable)
· 2 wrong usage · 3 resource · 4 device · 5 peer · 6 system (by the fault of the error).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from holdfast import __version__
from holdfast.errors import HoldfastError

_COMMANDS = {
    "bench": "measure: each figure a ratio against a limit or a peer of the same run",
    "bind": "give PCI functions to vfio-pci, and remember what they had",
    "demo": "kill processes in the middle of DMA, and see what becomes of the memory",
    "doctor": "say whether PCI functions can be used, and if not, why and what fixes it",
    "emu": "run an emulated function on a vfio-user socket",
    "ls": "list PCI functions: driver, IOMMU group, resets, who holds them",
    "lab": "virtual machines with a real kernel and IOMMU, to run commands and tests in",
    "ps": "show leases: who holds what, and why memory is still held",
    "regs": "print a function's registers, from the rows its driver uses",
    "run": "run a command, and report its exit only after its leases have been released",
    "serve": "keep a function: hand out leases, outlive their holders",
    "spec": "try every order of events: which ways of holding DMA memory are safe, and why not",
    "torture": "kill everybody at every named step, and look from outside",
    "unbind": "give PCI functions back to the drivers they had",
}

EXIT_CODES = {"you": 2, "resource": 3, "device": 4, "peer": 5, "system": 6}


class _Lazy(click.Group):
    """A group whose commands are modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(f"holdfast.cli.{cmd_name}").command
        return command if isinstance(command, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.command(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="PCI functions driven from Python, with DMA memory that outlives the process.",
)
@click.version_option(__version__, prog_name="holdfast")
def holdfast() -> None:
    """Entry of the command group."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors end in one line on stderr and the exit code of their fault."""
    try:
        holdfast(args=arguments, prog_name="holdfast")
    except HoldfastError as error:
        click.echo(f"holdfast: {error}", err=True)
        sys.exit(EXIT_CODES[error.fault])
