# SPDX-License-Identifier: Apache-2.0
"""``python3 -m holdfast.lab.strategies --json FILE``: this machine's rows, inside a lab guest.

Exit status 1 if something was not as expected. ``holdfast lab strategies`` runs it in its guests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from holdfast.lab.strategies.report import encode, mismatches
from holdfast.lab.strategies.trials import TRIALS, compile_programs, run_all


def main() -> int:
    """Compile, run, write the JSON; progress goes to standard error."""
    parser = argparse.ArgumentParser(prog="holdfast.lab.strategies")
    parser.add_argument("--json", type=Path, required=True, help="write what was seen here")
    parser.add_argument("--trials", type=int, default=TRIALS, help="to be judged in each cell")
    parser.add_argument("--row", type=int, action="append", help="only these rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        compile_programs(Path(place))
        boot = run_all(
            Path(place),
            trials=options.trials,
            only=options.row,
            progress=lambda line: _tell(f"row {line}"),
        )
    options.json.write_bytes(encode(boot))
    wrong = mismatches([boot], complete=False)
    for line in wrong:
        _tell(f"NOT AS EXPECTED: {line}")
    _tell(f"{boot.machine}, Linux {boot.kernel}: {boot.seconds:g} s")
    return 1 if wrong else 0


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
