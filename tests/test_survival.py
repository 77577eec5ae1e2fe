"""What happens to a run does not lose it: processes that come and go, kills, full disks."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint  # once, before processes are forked
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


def save_and_go_on(rank: int, folder: Path, mesh: str) -> None:
    model, optimizer = make(mesh)
    take_steps(model, optimizer, 1, 2)
    torch.manual_seed(rank + 10)
    checkpoint.save(folder, model, optimizer, {"step": 2})
    saved = {name: tensor.clone() for name, tensor in whole(model, optimizer).items()}
    random = torch.rand(3)
    take_steps(model, optimizer, 3)
    torch.save((saved, whole(model, optimizer), random), folder / f"expected-{rank}")


def resume(rank: int, folder: Path, mesh: str, exact: bool) -> None:
    model, optimizer = make(mesh)
    torch.manual_seed(99)
    assert checkpoint.load(folder, model, optimizer) == {"step": 2}
    saved, after, random = torch.load(folder / f"expected-{min(rank, 1)}")
    restored = whole(model, optimizer)
    assert restored.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(saved[name], restored[name])] == []
    assert (rank < 2) == torch.equal(random, torch.rand(3))
    take_steps(model, optimizer, 3)
    if exact:
        for name, tensor in whole(model, optimizer).items():
            assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("mesh", ["shard", "replicate"])
def test_what_two_processes_saved_any_number_resumes(mesh, tmp_path):
    """Weights, buffers and moments are the same in one, two and three processes, also split in
    another way. In two, the next step gives the same bits."""
    in_processes(2, save_and_go_on, tmp_path, mesh)
    in_processes(2, resume, tmp_path, mesh, True)
    in_processes(3, resume, tmp_path, "shard" if mesh == "replicate" else "replicate", False)
    resume(0, tmp_path, "", False)


def test_what_one_process_saved_two_resume(tmp_path):
    save_and_go_on(0, tmp_path, "")
    (tmp_path / "expected-1").symlink_to("expected-0")
    in_processes(2, resume_of_one, tmp_path)


def resume_of_one(rank: int, folder: Path) -> None:
    model, optimizer = make("shard")
    checkpoint.load(folder, model, optimizer)
    saved = torch.load(folder / "expected-0")[0]
    restored = whole(model, optimizer)
    assert [name for name in saved if not torch.equal(saved[name], restored[name])] == []


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
