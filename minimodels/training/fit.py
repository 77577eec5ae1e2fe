"""`--batch-size auto`: as many of a step's sequences in one forward pass as fit in memory.

The step's other sequences follow in further passes, so the result does not depend on the number.
Each number is tried with one step of a model that is then discarded: on a GPU in this process, on a
CPU in a child process with limited memory, because the system kills one that takes too much.
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
from minimodels.memory import memory_of
from minimodels.ranks import alone, largest, world
from minimodels.training.blocks import recompute
from minimodels.training.optim import adamw
from minimodels.training.options import DEFAULT_ROWS, Options
from minimodels.training.step import training_step

SPARE = 0.9  # the share of a CPU's free memory that a trial may take; the rest is a reserve
LACKING = 3  # exit status of a trial without enough memory


def fill_memory(
    options: Options, config: Config, device: torch.device, autocast: torch.autocast
) -> Options:
    """The options with the default batch in as few forward passes as every rank's memory allows."""
    pieces = options.context_parallel
    teams = max(1, world() // pieces)
    rows = DEFAULT_ROWS[options.size] * options.accumulate
    fits = tries(
        config, device, autocast, options.context // pieces, options.checkpoint_activations
    )
    with alone():  # ranks may need different numbers of trials
        own = largest_batch(rows, teams, lambda size: fits(size // teams))
    size = int(-largest(-own)[0])  # the smallest of all ranks
    return replace(options, batch_size=size, accumulate=rows // size)


def largest_batch(rows: int, teams: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `rows` that is a multiple of `teams` and fits.

    Raises InputError if there is none.
    """
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0 and size % teams == 0]
    if not sizes:
        raise InputError("batch_size", "auto", f"a multiple of {teams}, the number of processes")
    found = next((size for size in sizes if fits(size)), None)
    if found is None:
        accepted = "a smaller model or context, because the memory does not hold one sequence"
        raise InputError("batch_size", "auto", accepted)
    return found


def tries(
    config: Config, device: torch.device, autocast: torch.autocast, context: int, again: bool
) -> Callable[[int], bool]:
    """A function that says whether a model can be trained with a given number of rows.

    context: tokens of a row. again: whether blocks are recomputed in the backward pass. Raises
    InputError if the free memory is unknown.
    """
    if device.type != "cuda" and not (resource and Path("/proc/meminfo").exists()):
        raise InputError("batch_size", "auto", "a number, because the free memory is unknown")

    def train(rows: int) -> None:
        model = LM(config).to(device)
        if again:
            recompute(model)
        optimizer = adamw(model, 1e-3, 0.1)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments, so that they take their memory
        optimizer.zero_grad()
        tokens = torch.randint(config.vocab, (rows, context), device=device)
        training_step(model, optimizer, [(tokens, tokens)], autocast)

    return partial(fits_gpu if device.type == "cuda" else fits_cpu, train)


def fits_gpu(train: Callable[[int], None], rows: int) -> bool:
    """Whether the GPU has enough memory to train with so many rows."""
    fits = False
    with contextlib.suppress(torch.OutOfMemoryError):
        train(rows)
        fits = True
    gc.collect()  # only now, because the error kept the tensors of the trial
    torch.cuda.empty_cache()
    return fits


def fits_cpu(train: Callable[[int], None], rows: int) -> bool:
    """The same for the CPU, in a child process limited to this rank's share of the free memory."""
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks of this machine
    limit = used_memory() + int(SPARE * memory_of(torch.device("cpu")).free / sharers)
    child = os.fork()
    if child == 0:
        try_within(limit, train, rows)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code > 0 and code != LACKING:
        raise RuntimeError(f"a trial with {rows} sequences failed")
    return code == 0  # below 0: a signal ended it


def try_within(limit: int, train: Callable[[int], None], rows: int) -> NoReturn:
    """Train with at most `limit` bytes of memory, then end this process."""
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.set_num_threads(1)  # a fork does not copy the parent's threads
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
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
