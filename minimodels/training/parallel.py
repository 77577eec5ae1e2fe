"""Several processes train one model: `torchrun --nproc-per-node 8 train.py ...`.

PyTorch's `fully_shard` does the work, with one mesh or another. Replicated, each rank has the whole
model, and gradients are averaged. Sharded, each rank stores a part of every matrix, of its gradient
and of its moments, and a block is collected when it is its turn. Nothing else differs.

Every rank draws the whole batch of a step from (seed, step) and takes every world-th row. So any
number of ranks sees the same tokens in a step, and a run may continue with another number.
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

TIMEOUT = timedelta(minutes=10)  # how long a rank waits for another that may hang
STARTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun


def start(device: torch.device) -> torch.device:
    """Join the other processes if torchrun started several; return this one's own device."""
    given = os.environ.get("WORLD_SIZE", "1")
    if given == "1":
        return device
    if missing := [name for name in STARTED if name not in os.environ]:
        accepted = f"1 without torchrun, which sets {', '.join(missing)} too"
        raise InputError("WORLD_SIZE", given, accepted)
    if device.type == "mps":
        raise InputError("device", "mps", "cpu, cuda with several processes")
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise InputError("nproc-per-node", local + 1, f"at most {count}, one process a GPU")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # small messages between CPUs do not wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def stop(status: int = 0) -> None:
    """Leave the other processes after success, and exit."""
    if joined():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # threads of gloo may abort an ordinary exit
    if status:
        sys.exit(status)


def check_division(batch_size: int, context: int, pieces: int) -> None:
    """Raise InputError unless a batch can be divided equally among the ranks, with each text in so
    many pieces."""
    if world() % pieces:
        accepted = f"a divisor of {world()}, the number of processes"
        raise InputError("context_parallel", pieces, accepted)
    if context % pieces:
        accepted = f"a multiple of {pieces}, the pieces of context_parallel"
        raise InputError("context", context, accepted)
    if batch_size % (teams := world() // pieces):
        of = " / context_parallel" if pieces > 1 else ""
        accepted = f"a multiple of {teams}, the number of processes{of}"
        raise InputError("batch_size", batch_size, accepted)


def own(batch: tuple[Tensor, ...], pieces: int = 1) -> tuple[Tensor, ...]:
    """This rank's part of a batch (tokens, targets) or (tokens, targets, starts).

    Every `pieces` consecutive ranks share their rows, and each of them has a piece. With documents,
    the tokens' positions in the whole row are added.
    """
    (team, place), teams = divmod(rank(), pieces), world() // pieces
    if pieces > 1 and len(batch) > 2:
        batch = (*batch, torch.arange(batch[0].shape[1]).expand_as(batch[0]))
    return tuple(part[team::teams].chunk(pieces, dim=1)[place] for part in batch)


def distribute(model: LM, optimizer: torch.optim.Optimizer, shard: bool) -> None:
    """Spread a model, which is equal in all ranks, over them, in place. Its optimizer, which has
    taken no step, then has the spread parameters."""
    if world() == 1:
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # a block that returns its input; nothing changes it in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = mesh_of(model.embedding.weight.device.type, shard)
    before = {parameter: name for name, parameter in model.named_parameters()}
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=shard and module is not model)
    register_fsdp_forward_method(model, "loss")

    after = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [after[before[parameter]] for parameter in group["params"]]


@functools.cache
def mesh_of(device: str, shard: bool):
    """The ranks as a mesh: each stores a part of the weights, or all of them."""
    from torch.distributed.device_mesh import init_device_mesh

    if shard:
        return init_device_mesh(device, (world(),), mesh_dim_names=("shard",))
    return init_device_mesh(device, (world(), 1), mesh_dim_names=("replicate", "shard"))


def gathered(model: LM) -> LM:
    """In rank 0, the whole model. In the others it is useless. All ranks must call this."""
    if world() == 1:
        return model
    plain = LM(model.config).to(model.embedding.weight.device)
    plain.tokenizer = model.tokenizer
    copies = persistent_tensors(plain)
    for name, tensor in persistent_tensors(model).items():
        copies[name].copy_(whole(tensor))
    return plain


def synchronise(model: LM, now: bool) -> None:
    """Whether the next backward pass averages the gradients; before the last it only adds them up."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)
