"""How fast is every operation, compared with its torch path, its reference and other packages?

    python -m benchmarks.kernels                           all of them
    python -m benchmarks.kernels --only selective_scan

The file of each operation in kernels/ checks itself. Then it measures the time and memory of the
kernel, forward and backward, against the torch path, the compiled torch path, and the peers that
are installed. The rows go into one file. On a CPU the torch path is timed against the reference and
the peers that run there. If TRITON_INTERPRET=1 is set, the kernels are also checked in the
interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from minimodels.kernels import OPERATIONS

from minimodels import InputError
from minimodels.command import parse_options, run_command
from minimodels.errors import missing


@dataclass(frozen=True)
class Options:
    """Check and time every kernel."""

    only: str = ""
    """one operation; all by default"""
    rounds: int = 5
    """rounds of interleaved timings"""
    check_only: bool = False
    """only compare with the references, without timing"""
    out: Path = Path("runs/benchmarks/kernels.jsonl")
    """file for the JSON rows; new rows of an operation replace earlier ones"""


def main(options: Options) -> None:
    """Run the file of each operation in its own process, so that a failure does not stop the
    others. Checks run in parallel, because they mostly wait for the compiler."""
    if options.only and options.only not in OPERATIONS:
        raise InputError("only", options.only, ", ".join(OPERATIONS))
    if options.rounds < 1:
        raise InputError("rounds", options.rounds, "1 or more")
    if importlib.util.find_spec("triton") is None:
        raise missing("triton", "gpu")
    operations = [options.only] if options.only else OPERATIONS

    def start(operation: str) -> int:
        command = [sys.executable, "-m", f"minimodels.kernels.{operation}"]
        command += [
            "--rounds",
            str(options.rounds),
            "--out",
            str(options.out),
            *["--check-only"] * options.check_only,
        ]
        return subprocess.run(command).returncode

    with ThreadPoolExecutor(
        os.cpu_count() if options.check_only else 1
    ) as pool:  # timings run alone
        codes = dict(zip(operations, pool.map(start, operations), strict=True))
    if failed := [operation for operation, code in codes.items() if code]:
        raise InputError(
            "kernels", ", ".join(failed), "kernels that pass their own check (the errors are above)"
        )


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
