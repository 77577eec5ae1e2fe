"""How everything here is timed: in one process, by turns, on the same inputs.

The inputs are built before the clock starts. Because the speed of a shared machine drifts, a figure
is the ratio of two providers timed side by side in the same rounds, with the median and the spread
over the rounds.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minimodels.command import has_bfloat16
from minimodels.errors import InputError

Timings = dict[str, list[float]]  # provider -> seconds of one call, one per round


def interleave(
    providers: dict[str, Callable[[], object]],
    rounds: int = 7,
    seconds: float = 0.2,
    warm: bool = True,
) -> Timings:
    """Time each provider `rounds` times, in turns of about `seconds` each.

    A turn repeats the call. Two calls warm a provider up, or only one if `warm` is false, which
    suits long calls. Returns the seconds of one call, per provider and round.
    """
    repeats = {}
    for name, call in providers.items():
        if warm:
            call()
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        repeats[name] = max(1, round(seconds / (time.perf_counter() - start)))
    timings: Timings = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in providers.items():
            synchronise()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            synchronise()
            timings[name].append((time.perf_counter() - start) / repeats[name])
    return timings


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def per_second(work: float, seconds: list[float]) -> float:
    """Work per second in the median round."""
    return work / statistics.median(seconds)


def ratio(timings: Timings, name: str, other: str) -> tuple[float, float, float]:
    """How many times faster `name` is than `other`: median, minimum and maximum over the rounds."""
    ratios = [b / a for a, b in zip(timings[name], timings[other], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which a call raises the peak memory of a fresh process on the CPU.

    `call` must be importable by name.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_raise_of_peak, (call,))


def _raise_of_peak(call: Callable[[], object]) -> int:
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # the first product allocates memory for good
    before = _peak()
    call()
    return _peak() - before


def _peak() -> int:
    """The peak memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # preferred, because getrusage would include the parent's peak
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def environment(device: torch.device) -> dict[str, object]:
    """What a figure depends on besides the code.

    These are the commit (with a + if files differ from it), the device, the precision of the timed
    operations unless a row says otherwise, the versions and the number of threads.
    """
    names = {
        "cpu": lambda: f"{processor()}, {os.cpu_count()} cores",
        "cuda": lambda: torch.cuda.get_device_name(device),
    }
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "device": names.get(device.type, lambda: device.type)(),
        "dtype": "bfloat16" if has_bfloat16(device) else "float32",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton")
        if importlib.util.find_spec("triton")
        else None,
        "python": platform.python_version(),
    }


def git(*arguments: str) -> str:
    """The output of git in the code's folder; empty without git or a repository."""
    try:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except FileNotFoundError:
        return ""


def processor() -> str:
    """The name of the CPU."""
    listing = Path("/proc/cpuinfo")
    names = (
        [line for line in listing.read_text().splitlines() if line.startswith("model name")]
        if listing.exists()
        else []
    )
    return names[0].split(": ")[1] if names else platform.machine()


def check_writable(path: Path) -> None:
    """Raise InputError if rows could not be written to a file, before anything is measured.

    The folder is made, and the file stays as it is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise InputError(
            "out", str(path), f"a file that can be written ({error.strerror})"
        ) from None


def write(path: Path, rows: list[dict], device: torch.device) -> None:
    """Write rows as JSON lines, each with the environment in which it was measured."""
    shared = environment(device)
    path.write_text("".join(json.dumps({**shared, **row}) + "\n" for row in rows))


def ceilings(device: torch.device) -> dict[str, float]:
    """The best speed of this machine, measured now.

    "GB/s" is the speed of a copy, read plus written. "TFLOP/s" is the speed of a matrix product, in
    bf16 on a GPU and in fp32 on a CPU.
    """
    gpu = device.type == "cuda"
    source = torch.empty(2**28 if gpu else 2**25, device=device)
    target = torch.empty_like(source)
    square = torch.randn(
        8192 if gpu else 2048,
        8192 if gpu else 2048,
        device=device,
        dtype=torch.bfloat16 if gpu else None,
    )
    timings = interleave(
        {"copy": lambda: target.copy_(source), "product": lambda: square @ square},
        rounds=5,
        seconds=0.05,
    )
    copied, product = (min(timings[name]) for name in ("copy", "product"))
    return {
        "GB/s": 2 * source.nbytes / copied / 1e9,
        "TFLOP/s": 2 * square.shape[0] ** 3 / product / 1e12,
    }


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which a call raises the peak of the memory in use; None if it is unknown."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # memory that was freed but kept would hide what the call takes
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is in use
    except OSError:
        return None
    before = _peak()
    call()
    return _peak() - before
