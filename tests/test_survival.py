"""What happens to a run does not lose it: processes that come and go, kills, full disks."""

import os
from pathlib import Path

import pytest
import torch
import torch._dynamo  # now, because fully_shard would import it in each process
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from minimodels import LM, Config, InputError
from minimodels.training import checkpoint, shards
from minimodels.training.optim import adamw
from minimodels.training.step import training_step

LAYERS = "attention(heads=2) moe(experts=3, router=sigmoid_bias, bias_step=0.1) mamba"
CONFIG = Config(layers=LAYERS, width=12, vocab=7)
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def in_processes(count: int, function, *arguments) -> None:
    """Call function(rank, *arguments) in forked processes that form a group. Raises what one
    raises."""
    store = Path(arguments[0]) / f"group-{os.urandom(4).hex()}"
    torch.multiprocessing.start_processes(
        join_group, (count, store, function, arguments), count, start_method="fork"
    )


def join_group(rank: int, count: int, store: Path, function, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), count), rank=rank, world_size=count
    )
    function(rank, *arguments)
    dist.destroy_process_group()
    os._exit(0)


def make(mesh: str = "") -> tuple[LM, torch.optim.Optimizer]:
    """A model and its optimizer, in this process alone, or "shard"ed or "replicate"d."""
    torch.manual_seed(0)
    model = LM(CONFIG)
    if mesh:
        count = dist.get_world_size()
        shape = (count, 1) if mesh == "replicate" else (1, count)
        device_mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        for layer in model.layers:
            fully_shard(layer, mesh=device_mesh)
        fully_shard(model, mesh=device_mesh)
        register_fsdp_forward_method(model, "loss")
    return model, adamw(model, 1e-2, 0.1)


def take_steps(model: LM, optimizer: torch.optim.Optimizer, *steps: int) -> None:
    """Take training steps, each on its own tokens, the same in every process."""
    for step in steps:
        tokens = torch.randint(7, (2, 10), generator=torch.Generator().manual_seed(step))
        training_step(model, optimizer, [(tokens[:, :-1], tokens[:, 1:])], NO_AUTOCAST)


def whole(model: LM, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All that a checkpoint stores, each tensor gathered from all processes."""
    tensors = dict(checkpoint.persistent_tensors(model))
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}.{key}"] = value
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in tensors.items()
    }


def save(folder: Path, mesh: str) -> tuple[dict, torch.Tensor, dict]:
    """Train and save. Returns the state, the next random numbers, and the state a step later."""
    model, optimizer = make(mesh)
    take_steps(model, optimizer, 1, 2)
    torch.manual_seed(shards.rank() + 10)
    checkpoint.save(folder, model, optimizer, {"step": 2})
    saved = {name: tensor.clone() for name, tensor in whole(model, optimizer).items()}
    torch.save(saved, folder / f"saved-{shards.rank()}")
    random = torch.rand(3)
    take_steps(model, optimizer, 3)
    return saved, random, whole(model, optimizer)


def resume(folder: Path, mesh: str) -> tuple[LM, torch.optim.Optimizer]:
    """A model and an optimizer that are in the saved state."""
    model, optimizer = make(mesh)
    assert checkpoint.load(folder, model, optimizer) == {"step": 2}
    saved, restored = torch.load(folder / "saved-0"), whole(model, optimizer)
    assert saved.keys() == restored.keys()
    assert [name for name in saved if not torch.equal(saved[name], restored[name])] == []
    return model, optimizer


def save_and_resume(rank: int, folder: Path, mesh: str) -> None:
    _, random, after = save(folder, mesh)
    dist.barrier()
    model, optimizer = resume(folder, mesh)
    assert torch.equal(torch.rand(3), random)
    take_steps(model, optimizer, 3)
    again = whole(model, optimizer)
    assert [name for name in after if not torch.equal(after[name], again[name])] == []


@pytest.mark.parametrize("mesh", ["shard", "replicate"])
def test_two_processes_resume_to_the_bit_and_one_and_three_resume_the_same(mesh, tmp_path):
    """Weights, buffers, moments. Each process of two has its own random state again."""
    in_processes(2, save_and_resume, tmp_path, mesh)
    resume(tmp_path, "")
    if mesh == "shard":
        in_processes(3, lambda rank, folder: resume(folder, "shard"), tmp_path)


def test_what_one_process_saved_two_resume(tmp_path):
    save(tmp_path, "")
    in_processes(2, lambda rank, folder: resume(folder, "shard"), tmp_path)


def fail_in_one(rank: int, folder: Path) -> None:
    model, optimizer = make("shard")
    checkpoint.save(folder, model, optimizer, {"step": 1})

    def fail(path):
        raise OSError("no space left on process 1")

    if rank == 1:
        shards.checksum = fail
    with pytest.raises(InputError, match="no space left on process 1"):
        checkpoint.save(folder, model, optimizer, {"step": 2})
    with pytest.raises(InputError, match="a run with a whole checkpoint.* no space left"):
        checkpoint.load(folder, model, optimizer)
    dist.barrier()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-1"]


def test_what_fails_in_one_process_fails_in_all_and_leaves_the_last_checkpoint(tmp_path):
    in_processes(2, fail_in_one, tmp_path)
