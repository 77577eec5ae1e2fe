"""Several processes train one model: `torchrun --nproc-per-node 8 train.py ...`.

PyTorch's `fully_shard` does the work, on one of two meshes. Replicated: each rank has the whole
model, and gradients are averaged. Sharded: each rank stores a part of every matrix, of its gradient
and of its moments, and the parts of a block are gathered when it runs. Nothing else differs.

Every rank draws the whole batch of a step from (seed, step) and takes every world-th row. So a step
sees the same tokens with any number of ranks, and a run may continue with another number.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from minimodels.errors import InputError
from minimodels.lm import LM
from minimodels.ranks import joined, rank, whole, world
from minimodels.training.blocks import blocks
from minimodels.training.checkpoint import persistent_tensors

TIMEOUT = timedelta(minutes=10)  # how long a rank waits for the others
STARTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun


def start(device: torch.device) -> torch.device:
    """Join the other processes if torchrun started several, and return this one's device."""
    given = os.environ.get("WORLD_SIZE", "1")
    if given == "1":
        return device
    if missing := [name for name in STARTED if name not in os.environ]:
        accepted = f"1 without torchrun, which also sets {', '.join(missing)}"
        raise InputError("WORLD_SIZE", given, accepted)
    if device.type == "mps":
        raise InputError("device", "mps", "cpu or cuda with several processes")
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            given = os.environ.get("LOCAL_WORLD_SIZE", local + 1)
            raise InputError("nproc-per-node", given, f"at most {count}, one process per GPU")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # gloo, because small messages between CPUs need not wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def stop(status: int = 0) -> None:
    """Wait for the other processes and exit; return if there are none and the status is 0."""
    if joined():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # threads of gloo may abort an ordinary exit
    if status:
        sys.exit(status)


def own_shape(batch_size: int, context: int, pieces: int) -> tuple[int, int]:
    """Rows, and tokens per row, of each rank's part of a batch whose texts are cut into `pieces`.

    Raises InputError if the batch cannot be divided equally.
    """
    if world() % pieces:
        accepted = f"a divisor of {world()}, the number of processes (torchrun starts several)"
        raise InputError("context_parallel", pieces, accepted)
    if context % pieces:
        accepted = f"a multiple of {pieces}, the pieces of context_parallel"
        raise InputError("context", context, accepted)
    if batch_size % (teams := world() // pieces):
        of = " / context_parallel" if pieces > 1 else ""
        accepted = f"a multiple of {teams}, the number of processes{of}"
        raise InputError("batch_size", batch_size, accepted)
    return batch_size // teams, context // pieces


def own(batch: tuple[Tensor, ...], pieces: int = 1) -> tuple[Tensor, ...]:
    """This rank's part of a batch (tokens, targets) or (tokens, targets, starts).

    Every `pieces` consecutive ranks share their rows, and each has one piece of them. If there are
    starts and several pieces, the tokens' positions in the whole row are added.
    """
    (team, place), teams = divmod(rank(), pieces), world() // pieces
    if pieces > 1 and len(batch) > 2:
        batch = (*batch, torch.arange(batch[0].shape[1]).expand_as(batch[0]))
    return tuple(part[team::teams].chunk(pieces, dim=1)[place] for part in batch)


def distribute(model: LM, optimizer: torch.optim.Optimizer, shard: bool) -> None:
    """Spread a model over the ranks, in place, and give its optimizer the spread parameters. The
    model must be the same in all ranks, and the optimizer must not have taken a step."""
    if world() == 1:
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # some blocks return their input, but nothing changes it in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = mesh_of(model.device.type, shard)
    before = {parameter: name for name, parameter in model.named_parameters()}
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=shard and module is not model)
    register_fsdp_forward_method(model, "loss")

    after = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [after[before[parameter]] for parameter in group["params"]]


@functools.cache
def mesh_of(device: str, shard: bool):
    """The ranks as a mesh in which each stores a part of the weights, or all of them."""
    from torch.distributed.device_mesh import init_device_mesh

    if shard:
        return init_device_mesh(device, (world(),), mesh_dim_names=("shard",))
    return init_device_mesh(device, (world(), 1), mesh_dim_names=("replicate", "shard"))


def gathered(model: LM) -> LM:
    """The whole model, no longer distributed. All ranks must call this."""
    if world() == 1:
        return model
    plain = LM(model.config).to(model.device)
    plain.tokenizer = model.tokenizer
    copies = persistent_tensors(plain)
    for name, tensor in persistent_tensors(model).items():
        copies[name].copy_(whole(tensor))
    return plain


def synchronise(model: LM, now: bool) -> None:
    """Let the next backward pass average the gradients over the ranks, or only accumulate them."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)
