"""Everything worth knowing about a machine in one command, the most valuable first.

    python -m benchmarks.all --minutes 9 --out benchmarks/results/h100
    python -m benchmarks.all --minutes 9 --out benchmarks/results/h100 --resume     what did not fit in the time

Correctness first, then what the machine reaches at best, the kernels (on a CPU, last), training, throughput against context,
pictures. Each step writes its file in the folder while it runs, so being cut off loses nothing; done.json says which steps have
ended, and how.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from minimodels.kernels import OPERATIONS

from minimodels import InputError
from minimodels.command import pick_device, run_command
from minimodels.files import write_json
from minimodels.measure import ceilings, environment

Steps = dict[str, list[str]]  # name -> arguments of python


def steps(out: Path, gpu: bool, impl: str) -> Steps:
    """What is done, in this order. Correctness comes first, for figures of a wrong result are worth nothing."""

    def to(name: str, module: str, *arguments: str) -> list[str]:
        return ["-m", f"benchmarks.{module}", *arguments, "--out", str(out / name)]

    def throughput(name: str, *arguments: str) -> list[str]:
        return to(name, "throughput", *(["--size", "small"] if gpu else []), *arguments)

    kernels = {
        f"kernels {name}": to("kernels.jsonl", "kernels", "--only", name) for name in OPERATIONS
    }
    ceilings = {"ceilings": to("", "all", "--only-ceilings")}
    at_1024 = ["--match", "none", "--modes", "train", "--shortest", "1024", "--longest", "1024"]
    models = ["--models", "transformer", "mamba"]
    if not gpu:
        paths = ["--impl", impl]
        return {
            "correctness": ["-m", "pytest", "-q", "-x", "tests/test_laws.py"],
            **ceilings,
            "parts": to("parts.jsonl", "parts"),
            "training": throughput("training.jsonl", *paths, *at_1024, "--tokens", "2048"),
            "crossover": throughput(
                "crossover.jsonl",
                *paths,
                *models,
                "--modes",
                "train",
                "prefill",
                "--longest",
                str(2**13),
            ),
            "throughput": throughput("throughput.jsonl", *paths),
            "peers": to("peers.jsonl", "peers"),
            **kernels,
        }
    once = ["--patience", "1", "--sweeps", "1", "--rounds", "5"]
    kernels_used = impl != "torch"
    training = ["--impl", "torch", *["triton"] * kernels_used, *once, *at_1024, "--tokens", "32768"]
    fastest = ["--impl", "flash", "cudnn", "triton" if kernels_used else "torch", *once]
    quick = ["--impl", "flash", "triton" if kernels_used else "torch", *once]

    def crossover(mode: str, longest: int, *more: str) -> list[str]:
        name, ways = f"crossover-{mode}.jsonl", quick if mode == "decode" else fastest
        return throughput(name, *ways, *more, *models, "--modes", mode, "--longest", str(longest))

    def every_model(mode: str, longest: int) -> list[str]:
        return throughput(
            f"throughput-{mode}.jsonl", *quick, "--modes", mode, "--longest", str(longest)
        )

    return {
        **({"correctness": ["-m", "benchmarks.kernels", "--check-only"]} if kernels_used else {}),
        **ceilings,
        **kernels,
        "training": throughput("training.jsonl", *training),
        "crossover, train": crossover("train", 2**16),
        "crossover, prefill": crossover("prefill", 2**17),
        "crossover, decode": crossover("decode", 2**14, "--compile"),
        "mixture-of-depths": to("parts.jsonl", "parts", "--only", "mod", "--device", "cuda"),
        "throughput, train": every_model("train", 2**15),
        "throughput, prefill": every_model("prefill", 2**16),
        "throughput, decode": every_model("decode", 2**14),
        "compiled": throughput(
            "compiled.jsonl", *fastest, *at_1024, "--tokens", "32768", "--compile", *models
        ),
        "tests": [
            "-m",
            "pytest",
            "-q",
            "tests/test_kernel_laws.py",
            *(f"tests/test_kernel_{name}.py" for name in OPERATIONS),
        ],
    }


@dataclass(frozen=True)
class Options:
    """Measure a machine within a time."""

    out: Path
    """folder for the results"""
    minutes: float = 9.0
    """when to stop"""
    resume: bool = False
    """leave out the steps that done.json says have ended well"""
    impl: str = "auto"
    """auto (on a GPU the kernels, beside what PyTorch has) or torch (models without the kernels)"""
    device: str = "auto"
    """auto, cpu or cuda"""
    only_ceilings: bool = False
    """measure nothing but what the machine reaches at best"""


def main(options: Options) -> None:
    """One step after the other, each in its own process, until the time is over."""
    if not options.minutes > 0:
        raise InputError("minutes", options.minutes, "more than 0")
    if options.impl not in ("auto", "torch"):
        raise InputError("impl", options.impl, "auto, torch")
    device = pick_device(options.device)
    done_file = options.out / "done.json"
    if done_file.exists() and not options.resume and not options.only_ceilings:
        raise InputError(
            "out", str(options.out), "a folder without done.json, or --resume to go on in it"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only_ceilings:
        limits = {**environment(device), **ceilings(device)}
        write_json(options.out / "ceilings.json", limits)
        print(limits)
        return
    end = time.monotonic() + 60 * options.minutes
    done = read_done(done_file)
    gpu = device.type == "cuda"
    plan = steps(options.out, gpu, options.impl)
    for name in list(plan):
        arguments, left = plan[name], end - time.monotonic()
        if done.get(name, {}).get("status") == "done" or left < 10:
            continue
        print(f"--- {name}: {left / 60:.1f} minutes left", flush=True)
        rows = Path(arguments[-1])
        if (
            name in done
            and rows.suffix == ".jsonl"
            and rows.exists()
            and not name.startswith("kernels")
        ):
            rows.rename(rows.with_suffix(".cut.jsonl"))  # what it had measured when it was cut off
        start = time.monotonic()
        status = run(arguments, left, device)
        done[name] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        write_json(done_file, done)
        print(f"--- {name}: {status}", flush=True)
        if name == "correctness" and status.startswith("failed"):
            torch_only = (
                "; --impl torch times models without kernels, and those kernels that are right"
                * gpu
            )
            raise InputError(
                "correctness", status, f"results that are right; nothing was measured{torch_only}"
            )
    for name in ("throughput", "crossover"):
        found = [
            str(path)
            for path in sorted(options.out.glob(f"{name}*.jsonl"))
            if not path.stem.endswith(".cut")
        ]
        if found:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.plot", *found, "--out", str(options.out / name)]
            )
    missing = [name for name in plan if done.get(name, {}).get("status") != "done"]
    print(
        "everything is done"
        if not missing
        else f"not done: {', '.join(missing)}; --resume does these, each from its start"
    )


def run(arguments: list[str], seconds: float, device: torch.device) -> str:
    """How the step ended; at the end of its time it is stopped with all that it has started."""
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {})}
    with subprocess.Popen(
        [sys.executable, *arguments], start_new_session=True, env=environment
    ) as process:
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


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options, description=__doc__))
