# SPDX-License-Identifier: Apache-2.0
"""Units on workers: any ``concurrent.futures.Executor`` will do.

A unit is a picklable value and :func:`~holdfast.torture.unit.run` a plain function that starts an
interpreter of its own for it, so it does not matter whether a worker is a thread here, a process,
or a Dask worker elsewhere, as long as Holdfast is installed there.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager

from holdfast.errors import SystemFailure, UsageError
from holdfast.torture.schedule import Unit
from holdfast.torture.stack import SERVE
from holdfast.torture.unit import Found, run

LOCAL = "local"
DASK = "dask:"


@contextmanager
def compiled_once() -> Iterator[None]:
    """Interpreters that are started meanwhile compile each module once, all together.

    Where bytecode must not be written (PYTHONDONTWRITEBYTECODE), each would compile them all again,
    which is most of what a start costs. Not thread-safe: it sets environment variables.
    """
    names = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    before = {name: os.environ.pop(name, None) for name in names}
    with tempfile.TemporaryDirectory(prefix="holdfast-bytecode-") as directory:
        os.environ["PYTHONPYCACHEPREFIX"] = directory
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


@contextmanager
def executor_of(text: str, workers: int | None = None) -> Iterator[Executor]:
    """``local`` (threads, one stack each) or ``dask:ADDRESS`` (a running scheduler).

    Raises UsageError for anything else or if Dask is not installed, SystemFailure if its scheduler
    cannot be reached.
    """
    if text == LOCAL:
        with ThreadPoolExecutor(workers or 2 + (os.cpu_count() or 1)) as pool:
            yield pool
        return
    if not text.startswith(DASK):
        raise UsageError(f"no executor {text!r}", operation="torture", target=text,
                         hint="local, or dask:tcp://HOST:PORT")  # fmt: skip
    try:
        distributed = importlib.import_module("distributed")
    except ImportError as error:
        raise UsageError(
            "Dask is not installed",
            operation="torture",
            target=text,
            hint="pip install 'holdfast[dask]', here and on every worker",
        ) from error
    try:
        client = distributed.Client(text.removeprefix(DASK), timeout="10s")
    except (OSError, ValueError) as error:
        raise SystemFailure(
            f"{error}", operation="reach the Dask scheduler", target=text.removeprefix(DASK),
            hint="start one: dask scheduler, and dask worker ADDRESS --nthreads 1",
        ) from error  # fmt: skip
    with client:
        with client.get_executor(pure=False) as pool:
            yield pool


def run_all(
    units: Sequence[Unit],
    driver: str,
    executor: Executor,
    progress: Callable[[int], None] = lambda _: None,
    serve: Sequence[str] = SERVE,
) -> list[Found]:
    """Run every unit; in the order of ``units``. ``progress`` is told of every case's end.

    Cancels what has not begun if it is interrupted.
    """
    here = isinstance(executor, ThreadPoolExecutor)
    futures: dict[Future[Found], Unit] = {}
    for unit in units:
        if here:
            # Only a worker in this process can call back while a unit runs.
            future = executor.submit(run, unit, driver, lambda _: progress(1), serve)
        else:
            future = executor.submit(run, unit, driver, serve=serve)
        futures[future] = unit
    found: dict[int, Found] = {}
    try:
        for future in as_completed(futures):
            found[futures[future].number] = future.result()
            if not here:
                progress(len(futures[future].cases))
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return [found[unit.number] for unit in units]
