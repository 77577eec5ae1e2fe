"""Checks that the kernels are right, before anything is timed. Every kernel checks itself in
its own process, all at once.

Each check has its own Triton cache, because settings tuned while the checks compete for the machine
must not be used later. If a check fails or does not end in time, only its own kernel is
affected: what needs that kernel is left out and named.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch

from .journal import Journal


def check(
    operations: Iterable[str], seconds: float, journal: Journal, log: Path, device: torch.device
) -> None:
    """Write a row for each operation as soon as its check ends, and the output
    of the checks to `log`."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if device.type == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        outputs = {operation: Path(folder) / operation for operation in operations}
        start = time.monotonic()
        running = {name: launch(name, path, environment) for name, path in outputs.items()}
        try:
            while running:
                took = time.monotonic() - start
                for name in [*running]:
                    code = running[name].poll()
                    if code is not None or took > seconds:
                        stop(running.pop(name))
                        report(journal, name, code, took, last_line(outputs[name]))
                time.sleep(0.05)
        finally:
            for process in running.values():
                stop(process)
        with log.open("a") as file:
            for name, path in outputs.items():
                file.write(f"--- {name}\n{path.read_text(errors='replace')}")


def command(operation: str) -> list[str]:
    """The command that checks the kernel of an operation."""
    return [sys.executable, "-m", f"minimodels.kernels.{operation}", "--check-only"]


def launch(operation: str, output: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start a check in its own process group, which can be stopped as a whole, with its own cache."""
    environment = {**environment, "TRITON_CACHE_DIR": f"{output}.cache"}
    with output.open("w") as file:
        return subprocess.Popen(
            command(operation),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def stop(process: subprocess.Popen) -> None:
    """End the process and everything that it started, if they are still running."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def report(journal: Journal, operation: str, code: int | None, took: float, said: str) -> None:
    """Write how a check ended. `code` is its exit status; None if it had to be stopped."""
    row = {"benchmark": "check", "job": f"check {operation}", "operation": operation}
    row["took"] = round(took, 1)
    if code == 0:
        journal.add("done", **row)
    elif code is None:
        journal.add("cut off", **row, error=f"the check took more than {took:.0f} s")
    else:
        journal.add("wrong", **row, error=said)


def last_line(path: Path) -> str:
    """The last line of a file, which is the error of a failed check; empty if there is none."""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def unproven(rows: list[dict]) -> dict[str, str]:
    """The operations whose kernels are not known to be right, with the reason: the last check did
    not pass, or the kernel made the GPU unusable."""
    found = {}
    for row in rows:
        if row.get("benchmark") == "check" and row["status"] == "done":
            found.pop(row["operation"], None)
        elif row.get("benchmark") == "check":
            found[row["operation"]] = f"{row['operation']}'s check: {row['status']}, {row['error']}"
    for row in rows:
        if row["status"] == "lost" and row.get("provider") == "triton":
            found[row["operation"]] = f"{row['operation']}: it took the GPU down"
    return found
