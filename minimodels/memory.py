"""Check whether a training step fits in memory before the first one is taken.

A step needs at least the weights, AdamW's two moments, and either the gradients or what autograd
stores for the backward pass, whichever is larger. What autograd stores is measured on a short text
and scaled up to the tokens of the batch, because no layer stores less per token in a longer text.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from minimodels.data.files import amount
from minimodels.errors import InputError
from minimodels.lm import LM

PROBE = 256  # tokens of the short text
# elements that a layer stores per token, over the model's width: more than any layer here needs
GENEROUS = 200


class Memory(NamedTuple):
    """Bytes that a device has, and how many of them are free."""

    total: float
    free: float


def check_memory(
    model: LM, batch_size: int, context: int, autocast: torch.autocast, exact: bool = True
) -> str:
    """A note if a training step might not fit in the free memory, otherwise "".

    Raises InputError if it needs more than the device has. `exact` is false if the step may store
    other tensors than model.loss does, as a compiled one may; then there is only the note.
    """
    memory = memory_of(next(model.parameters()).device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    tokens, config = batch_size * context, model.config
    if 4 * weights + GENEROUS * 4 * config.depth * config.width * tokens < memory.free:
        return ""
    # the activations are freed as the gradients are made
    activations = activation_bytes(model, batch_size, context, autocast)
    least = 3 * weights + max(weights, activations)
    needed = f"at least {amount(int(least))} for a step"
    smaller = "a smaller --batch-size (with --accumulate), --context or model takes less"
    if exact and least > memory.total:
        accepted = f"up to {amount(int(memory.total))}, which this device has; {smaller}"
        raise InputError("memory", needed, accepted)
    if least > memory.free:
        return f"{needed}, and only {amount(int(memory.free))} are free; {smaller}"
    return ""


def activation_bytes(model: LM, batch_size: int, context: int, autocast: torch.autocast) -> float:
    """A lower bound on the bytes that autograd stores in a forward pass: what a second row of a
    short text adds, scaled up. The model and the random state do not change."""
    length = min(context, PROBE)
    kept = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng():
        row = stored_bytes(model, 2, length, autocast) - stored_bytes(model, 1, length, autocast)
    for buffer, before in zip(model.buffers(), kept, strict=True):
        buffer.copy_(before)
    return row * batch_size * context / length


def stored_bytes(model: LM, rows: int, length: int, autocast: torch.autocast) -> int:
    """Bytes of the tensors that autograd holds after the forward pass of a batch (rows, length)."""
    held: dict[int, int] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    vocab = model.embedding.num_embeddings
    tokens = torch.randint(vocab, (rows, length), device=device)
    with saved_tensors_hooks(hold, lambda tensor: tensor), autocast:
        loss, _ = model.loss(tokens, tokens)
    total = sum(held.values())
    del loss  # until here it kept the tensors alive, so that no two had the same address
    return total


def memory_of(device: torch.device) -> Memory:
    """The memory of a device; infinite if it is unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    if device.type != "cpu":
        return Memory(float("inf"), float("inf"))
    total, free = machine_memory()
    limit = cgroup_limit()
    return Memory(min(total, limit), min(free, limit))


def machine_memory() -> tuple[float, float]:
    """Bytes of memory and swap of this machine: all, and those that are free or can be freed."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {name: 1024 * int(size.split()[0]) for name, size in (x.split(":") for x in lines)}
        swap = sizes["SwapTotal"], sizes["SwapFree"]
        return sizes["MemTotal"] + swap[0], sizes["MemAvailable"] + swap[1]
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf"), float("inf")
    return total, total


def cgroup_limit(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")):
    """The lowest memory limit, in bytes, of the control groups of this process; infinite if
    there is none."""
    limits = [float("inf")]
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return limits[0]
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number == "0":  # version 2
            top, name = root, "memory.max"
        elif "memory" in kinds.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = top / path.strip("/")
        for each in (folder, *folder.parents):
            if not each.is_relative_to(top):
                break
            try:
                limits.append(float((each / name).read_text()))
            except (OSError, ValueError):  # no such file, or "max"
                continue
    return min(limits)
