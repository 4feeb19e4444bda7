# SPDX-License-Identifier: Apache-2.0
"""The peer in C: the same work as a post, and the same pieces copied, without Python.

It is compiled with ``cc`` when a figure asks for it, and runs as a process of its own that takes
orders on its standard input, so that it can take turns with Python. Without a compiler its methods
answer None, and the figures say so.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from holdfast.bench.source import SOURCE
from holdfast.errors import HoldfastError

U32s = npt.NDArray[np.uint32]

COMPILE = ("-O2", "-Wall", "-o")
END = 10.0


class CPeer:
    """The compiled peer, if there is a compiler. A context manager. Not thread-safe."""

    def __init__(self, compiler: str = "cc") -> None:
        self._compiler = shutil.which(compiler)
        self._directory = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._compiler is None:
            return self
        self._directory = tempfile.mkdtemp(prefix="holdfast-bench-")
        try:
            source = Path(self._directory, "peer.c")
            source.write_text(SOURCE)
            binary = str(source.with_suffix(""))
            subprocess.run(
                [self._compiler, *COMPILE, binary, str(source)], check=True, capture_output=True
            )
            self._process = subprocess.Popen(
                [binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        except subprocess.CalledProcessError:
            self._compiler = None  # a compiler that cannot compile is none
            self._clean()
        except BaseException:
            self._clean()
            raise
        return self

    @property
    def available(self) -> bool:
        """Whether there is a peer to compare with."""
        return self._process is not None

    def posts(self, descriptors: int, count: int, burst: int) -> U32s | None:
        """Nanoseconds of each of ``count`` posts of ``descriptors`` descriptors.

        ``burst`` posts follow each other before the peer waits for its card, as in Python.
        """
        return self._ask(f"post {descriptors} {count} {burst}\n".encode(), b"", count)

    def copy_pieces(self, host: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64],
                    size: int, to_card: bool) -> float | None:  # fmt: skip
        """Seconds for one ``memcpy`` per piece between ``host`` offsets and consecutive bytes.

        ``size`` is that of the host memory in bytes, which is the peer's own.
        """
        table = np.stack([host, lengths], axis=1).astype("<u8").tobytes()
        order = f"copy {len(lengths)} {size} {int(to_card)}\n".encode()
        told = self._ask(order, table, 1)
        return None if told is None else int(told[0]) / 1e9

    def _ask(self, order: bytes, body: bytes, answers: int) -> U32s | None:
        if self._process is None:
            return None
        to_peer, from_peer = _pipes(self._process)
        to_peer.write(order + body)
        to_peer.flush()
        raw = from_peer.read(4 * answers)
        if len(raw) != 4 * answers:
            raise HoldfastError("the C peer ended", operation="bench", target=order.decode())
        return np.frombuffer(raw, "<u4")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean()

    def _clean(self) -> None:
        if self._process is not None:
            for pipe in _pipes(self._process):
                pipe.close()  # end of file is its order to end
            try:
                self._process.wait(END)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        raise HoldfastError("the C peer has no pipes", operation="bench")
    return process.stdin, process.stdout
