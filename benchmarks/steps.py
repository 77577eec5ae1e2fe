"""The measurements on a CPU: the benchmarks run one after the other, each in its own
process, until the time is over.

Each writes its file in the folder while it runs, so an interruption loses nothing. done.json
records how each ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from minimodels.kernels import OPERATIONS

from minimodels import InputError
from minimodels.files import write_json

Steps = dict[str, list[str]]  # name -> arguments of python


def steps(out: Path, impl: str) -> Steps:
    """The steps, in order. Correctness comes first, because the speed of a
    wrong result has no value."""

    def to(name: str, module: str, *arguments: str) -> list[str]:
        return ["-m", f"benchmarks.{module}", *arguments, "--out", str(out / name)]

    def throughput(name: str, *arguments: str) -> list[str]:
        return to(name, "throughput", "--impl", impl, *arguments)

    at_1024 = ["--match", "none", "--modes", "train", "--shortest", "1024", "--longest", "1024"]
    growing = ["--models", "transformer", "mamba", "--modes", "train", "prefill"]
    return {
        "correctness": ["-m", "pytest", "-q", "-x", "tests/test_laws.py"],
        "parts": to("parts.jsonl", "parts"),
        "training": throughput("training.jsonl", *at_1024, "--tokens", "2048"),
        "crossover": throughput("crossover.jsonl", *growing, "--longest", "8192"),
        "throughput": throughput("throughput.jsonl"),
        "peers": to("peers.jsonl", "peers"),
        **{f"kernels {name}": to("kernels.jsonl", "kernels", "--only", name) for name in OPERATIONS},
    }  # fmt: skip


def measure(out: Path, minutes: float, resume: bool, impl: str) -> None:
    """Run the steps. With `resume`, those that have ended well are left out.

    Raises InputError if the folder is in use, or if the results are wrong.
    """
    done_file = out / "done.json"
    if done_file.exists() and not resume:
        raise InputError("out", str(out), "a folder without done.json, or --resume to continue")
    end, done, plan = time.monotonic() + 60 * minutes, read_done(done_file), steps(out, impl)
    for name, arguments in plan.items():
        left = end - time.monotonic()
        if done.get(name, {}).get("status") == "done" or left < 10:
            continue
        print(f"--- {name}: {left / 60:.1f} minutes left", flush=True)
        if name in done:
            keep_cut(name, Path(arguments[-1]))
        start = time.monotonic()
        status = run(arguments, left)
        done[name] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        write_json(done_file, done)
        print(f"--- {name}: {status}", flush=True)
        if name == "correctness" and status.startswith("failed"):
            accepted = "results that are right; nothing was measured"
            raise InputError("correctness", status, accepted)
    draw(out)
    missing = [name for name in plan if done.get(name, {}).get("status") != "done"]
    again = f"not done: {', '.join(missing)}; --resume does these, each from its start"
    print(again if missing else "everything is done")


def keep_cut(name: str, rows: Path) -> None:
    """Rename the rows of a step that was interrupted. The kernels share a file, in which they
    replace their own rows."""
    if rows.suffix == ".jsonl" and rows.exists() and not name.startswith("kernels"):
        rows.rename(rows.with_suffix(".cut.jsonl"))


def draw(out: Path) -> None:
    """Draw the pictures of the measurements."""
    for name in ("throughput", "crossover"):
        rows = out / f"{name}.jsonl"
        if rows.exists():
            command = ["-m", "benchmarks.plot", str(rows), "--out", str(out / name)]
            subprocess.run([sys.executable, *command])


def run(arguments: list[str], seconds: float) -> str:
    """Run a step and return how it ended. At the end of its time it is stopped, with
    everything that it has started."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, start_new_session=True, env=environment) as process:
        try:
            code = process.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, KeyboardInterrupt):
                raise
            return "cut off"
    return "done" if code == 0 else f"failed with {code}"


def read_done(path: Path) -> dict:
    """Which steps have ended, and how."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError("done.json", str(path), f"a JSON file ({error})") from None
