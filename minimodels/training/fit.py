"""`--batch-size auto`: as many of a step's sequences in one forward pass as the memory holds.

The rest of the step's sequences follow in further passes, so a step is the same whatever is found.
Each number is tried with a step of a model that is then forgotten: on a GPU in this process, on a CPU
in a child that may not take more memory than there is, because there the system ends a process that
takes too much.
"""

from __future__ import annotations

import contextlib
import gc
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

try:
    import resource
except ImportError:  # on Windows
    resource = None

from minimodels.command import is_out_of_memory
from minimodels.config import Config
from minimodels.errors import InputError
from minimodels.lm import LM
from minimodels.ranks import largest, world
from minimodels.training.blocks import recompute
from minimodels.training.optim import adamw
from minimodels.training.options import DEFAULT_ROWS, Options
from minimodels.training.step import training_step

SPARE = 0.9  # the share of the free memory that a trial may take; the rest is for what comes later
LACKING = 3  # exit status of a trial that finds too little memory
GROUPS = Path("/sys/fs/cgroup")
CONTAINER = [  # a container's limit and what it uses, in the two versions of control groups
    (GROUPS / "memory.max", GROUPS / "memory.current"),
    (GROUPS / "memory/memory.limit_in_bytes", GROUPS / "memory/memory.usage_in_bytes"),
]


def fill_memory(
    options: Options, config: Config, device: torch.device, autocast: torch.autocast
) -> Options:
    """The options with the default batch, in as few forward passes as the memory of every rank
    allows."""
    pieces = options.context_parallel
    teams = max(1, world() // pieces)
    rows = DEFAULT_ROWS[options.size] * options.accumulate
    fits = tries(
        config, device, autocast, options.context // pieces, options.checkpoint_activations
    )
    own = largest_batch(rows, teams, lambda size: fits(size // teams))
    size = int(-largest(-own)[0])  # the smallest of all ranks
    return replace(options, batch_size=size, accumulate=rows // size)


def largest_batch(rows: int, teams: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `rows` that is a multiple of `teams` and fits. Raises InputError if none
    does."""
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0 and size % teams == 0]
    if not sizes:
        raise InputError("batch_size", "auto", f"a multiple of {teams}, the number of processes")
    found = next((size for size in sizes if fits(size)), None)
    if found is None:
        accepted = "a smaller model or context: the memory does not hold one sequence of this"
        raise InputError("batch_size", "auto", accepted)
    return found


def tries(
    config: Config, device: torch.device, autocast: torch.autocast, context: int, again: bool
) -> Callable[[int], bool]:
    """A function of a number of rows: whether a model can be trained with so many of them.

    context: tokens of a row. again: whether blocks are computed again in the backward pass. Raises
    InputError where free memory is unknown.
    """
    if device.type != "cuda" and not (resource and Path("/proc/meminfo").exists()):
        raise InputError("batch_size", "auto", "a number, because the free memory is unknown here")

    def train(rows: int) -> None:
        model = LM(config).to(device)
        if again:
            recompute(model)
        optimizer = adamw(model, 1e-3, 0.1)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments, which a training step finds
        optimizer.zero_grad()
        tokens = torch.randint(config.vocab, (rows, context), device=device)
        training_step(model, optimizer, [(tokens, tokens)], autocast)

    return partial(fits_gpu if device.type == "cuda" else fits_cpu, train)


def fits_gpu(train: Callable[[int], None], rows: int) -> bool:
    """Whether training with so many rows finds enough memory on the GPU."""
    fits = False
    with contextlib.suppress(torch.OutOfMemoryError):
        train(rows)
        fits = True
    gc.collect()  # after the error is gone, because it keeps the tensors of the trial
    torch.cuda.empty_cache()
    return fits


def fits_cpu(train: Callable[[int], None], rows: int) -> bool:
    """The same in a child whose memory is limited to what is free."""
    limit = used_memory() + int(SPARE * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    child = os.fork()
    if child == 0:
        try_within(limit, train, rows)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code > 0 and code != LACKING:
        raise RuntimeError(f"a trial with {rows} sequences failed")
    return code == 0  # below 0: a signal has ended it


def try_within(limit: int, train: Callable[[int], None], rows: int) -> NoReturn:
    """Train in this process, which ends then, with at most `limit` bytes of memory."""
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.set_num_threads(1)  # those of the parent have not been forked
        train(rows)
        status = 0
    except Exception as error:
        if is_out_of_memory(error):
            status = LACKING
        else:
            traceback.print_exc()
    finally:
        os._exit(status)


def used_memory() -> int:
    """Bytes of addresses that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int:
    """Bytes that processes of this machine, or of this container, may still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    for most, used in CONTAINER:
        if most.exists() and (limit := most.read_text().strip()).isdigit():
            free.append(int(limit) - int(used.read_text()))
    return min(free)
