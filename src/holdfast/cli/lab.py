# SPDX-License-Identifier: Apache-2.0
"""``holdfast lab``: virtual machines with a real kernel and an emulated IOMMU."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Final

import click

from holdfast.errors import UsageError
from holdfast.lab import GuestFailed, GuestTimeout, LabUnavailable, cache, kernel
from holdfast.lab.machine import DRIVERS, Guest
from holdfast.lab.runner import prepare, run

NO_STATUS: Final = 125
TIMED_OUT: Final = 124
"""Exit codes of ``lab run`` where there is no command's to pass on; those of timeout(1)."""


class _Group(click.Group):
    """The commands below, and ``strategies`` from its own module, loaded when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "strategies"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "strategies":
            from holdfast.cli import lab_strategies

            return lab_strategies.command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Group, help="Virtual machines with a real kernel and an emulated IOMMU (VT-d).")
def command() -> None:
    """Entry of the group."""


def _progress(text: str) -> None:
    click.echo(f"lab: {text}", err=True)


def _output(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@command.command(
    "run",
    help="Run CMD in a guest, in a copy of this source tree at /work. Its output is all that goes "
    "to standard output. Exit status: the command's (128+n after signal n); 124 if the time was "
    "up, 125 if the guest ended without a status or could not be started, 2 for wrong usage.",
)
@click.option("--kernel", "image", default="stock", show_default=True, metavar="stock|full|PATH")
@click.option(
    "--function",
    "functions",
    multiple=True,
    metavar="SPEC",
    help="edu or nvme, with properties and a place: edu,dma_mask=0xffffffff@port. Places: root "
    "(the default), port, bridge. Without any: one edu at 0000:00:03.0.",
)
@click.option("--iommu/--no-iommu", default=True, show_default=True)
@click.option("--memory", default="2G", show_default=True)
@click.option("--cpus", type=int, default=2, show_default=True)
@click.option(
    "--driver",
    type=click.Choice(DRIVERS),
    help="bound to each function  [default: vfio-pci, without an IOMMU uio_pci_generic]",
)
@click.option("--hugepages", type=int, default=0, show_default=True, help="of 2 MiB")
@click.option("--append", default="", metavar="TEXT", help="for the kernel's command line")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="seconds")
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    help="put what CMD leaves in /results here, with the kernel's log",
)
@click.option(
    "--console", type=click.Path(path_type=Path, dir_okay=False), help="keep the console here"
)
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED)
def run_command(
    image: str,
    functions: tuple[str, ...],
    iommu: bool,
    memory: str,
    cpus: int,
    driver: str | None,
    hugepages: int,
    append: str,
    timeout: float,
    results: Path | None,
    console: Path | None,
    cmd: tuple[str, ...],
) -> None:
    guest = Guest(
        kernel=image,
        functions=functions or ("edu",),
        iommu=iommu,
        memory=memory,
        cpus=cpus,
        driver=driver or ("vfio-pci" if iommu else "uio_pci_generic"),
        hugepages=hugepages,
        append=append,
        timeout=timeout,
    )
    try:
        status = run(
            guest, cmd, output=_output, results=results, console=console, progress=_progress
        )
    except (GuestFailed, LabUnavailable) as error:
        click.echo(f"holdfast: {error}", err=True)
        status = TIMED_OUT if isinstance(error, GuestTimeout) else NO_STATUS
    sys.exit(status)


@command.command(
    "kernel",
    help="Build the second kernel, with what Debian's leave out, and print where it is.",
)
@click.option("--cached", is_flag=True, help="do not build; exit status 1 if there is none")
def kernel_command(cached: bool) -> None:
    found = kernel.cached() if cached else kernel.built(_progress)
    if found is None:
        click.echo("lab: the second kernel is not built; holdfast lab kernel builds it", err=True)
        sys.exit(1)
    click.echo(found)


@command.command("prepare", help="Fetch and build what guests of the stock kernel start from.")
def prepare_command() -> None:
    parts = prepare(Guest(), _progress)
    _progress(f"ready: {parts.emulator.accelerator}")


@command.command(
    "test",
    help="Run the tests of tests/vm/guest in guests of this kernel. Exit status 1 if one failed, "
    "was skipped without need, or if the kernel's log shows trouble.",
)
@click.option(
    "--kernel", "image", type=click.Choice(["stock", "full"]), default="stock", show_default=True
)
@click.option("--keyword", default="", help="only tests that fit (pytest -k)")
@click.option("--scenario", "only", multiple=True, help="only this machine")
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    help="keep reports, consoles and kernel logs here, in a directory for each machine",
)
def test_command(image: str, keyword: str, only: tuple[str, ...], results: Path | None) -> None:
    from holdfast.lab.suites import SCENARIOS, run_scenario

    chosen = [
        one for one in SCENARIOS if one.guest.kernel == image and (not only or one.name in only)
    ]
    if not chosen:
        raise UsageError(f"no scenario {', '.join(only)}", operation="lab test")
    bad = False
    with tempfile.TemporaryDirectory(prefix="holdfast-lab-") as temporary:
        for scenario in chosen:
            place = (results or Path(temporary)) / scenario.name
            place.mkdir(parents=True, exist_ok=True)
            report = run_scenario(
                scenario, place, output=_output, progress=_progress, keyword=keyword
            )
            click.echo(report.summary())
            for problem in report.problems():
                bad = True
                click.echo(f"FAILED: {problem}")
    if bad:
        sys.exit(1)


@command.command("clean", help="Remove everything the lab keeps: root file system, kernel, QEMU.")
def clean_command() -> None:
    click.echo(f"{cache.clean() / 1e6:.0f} MB given back from {cache.directory()}")
