"""What happens to a run does not lose it: processes that come and go, kills, full disks."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torch._dynamo  # now, because fully_shard would import it in each process
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.multiprocessing
from safetensors.torch import load_file
from small import small
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import train
from minimodels import LM, Config, InputError
from minimodels.presets import MAIN
from minimodels.training import checkpoint, shards
from minimodels.training.optim import adamw
from minimodels.training.step import training_step

LAYERS = "attention(heads=2) moe(experts=3, router=sigmoid_bias, bias_step=0.1) mamba"
CONFIG = Config(layers=LAYERS, width=12, vocab=7)
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def in_processes(count: int, function, *arguments) -> None:
    """Call function(rank, *arguments) in forked processes that form a group. Raises what one
    raises."""
    store = Path(tempfile.mkdtemp()) / "group"
    torch.multiprocessing.start_processes(
        join_group, (count, store, function, arguments), count, start_method="fork"
    )


def join_group(rank: int, count: int, store: Path, function, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if count > 1:
        rendezvous = dist.FileStore(str(store), count)
        dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=count)
    function(rank, *arguments)
    if count > 1:
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


# kills


FILE_OPERATIONS = {
    "open", "os.chmod", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir",
    "os.truncate", "fcntl.flock", "shutil.rmtree",
}  # fmt: skip


def die(folder: Path, operation: int | None = None, milliseconds: float | None = None) -> list:
    """Have this process killed before its n-th operation on files in a folder, or after some time.
    Returns a list of the operations so far."""
    operations: list[str] = []

    def count(event: str, arguments: tuple) -> None:
        if event in FILE_OPERATIONS and str(arguments[0]).startswith(str(folder)):
            operations.append(f"{event} {arguments[0]}")
            if len(operations) == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if milliseconds is not None:
        timer = threading.Timer(milliseconds / 1000, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    return operations


def train_directly(rank: int, folder: Path, victim: int = -1, when: dict | None = None) -> None:
    """A run in small: six steps, a checkpoint after every second."""
    folder.mkdir(exist_ok=True)
    operations = die(folder, **(when or {} if rank == victim else {}))
    model, optimizer = make("shard" if dist.is_initialized() else "")
    done = checkpoint.load(folder, model, optimizer)["step"] if checkpoint.exists(folder) else 0
    for step in range(done + 1, 7):
        take_steps(model, optimizer, step)
        if step % 2 == 0:
            checkpoint.save(folder, model, optimizer, {"step": step}, score=abs(step - 2))
    (folder.parent / f"operations-{rank}").write_text(json.dumps(operations))


def train_preset(
    rank: int, folder: Path, model: str, victim: int = -1, when: dict | None = None
) -> None:
    """The same with train.py."""
    operations = die(folder, **(when or {} if rank == victim else {}))
    (folder.parent / "text").write_bytes(bytes(range(32, 127)) * 60)
    settings = [part for each in small(model) for part in ("--set", each)]
    started = f"--model {model} --data {folder.parent}/text --width 16 --context 16 --batch-size 2"
    started += (
        f" --eval-batches 1 --eval-every 2 --log-every 1 --device cpu --steps 6 --out {folder}"
    )
    resumed = f"--resume {folder}"
    arguments = resumed.split() if checkpoint.exists(folder) else [*started.split(), *settings]
    sys.argv = ["train.py", "--threads", "1", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main(train.parse(""))
    (folder.parent / f"operations-{rank}").write_text(json.dumps(operations))


def stored(folder: Path) -> dict[str, bytes]:
    """The bytes of all tensors in the newest checkpoint, file by file."""
    found = checkpoint.find(folder)
    assert found.passed_over == []
    assert found.about["progress"]["step"] == 6
    return {
        f"{file.name} {name}": tensor.numpy().tobytes()
        for file in found.folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def killed_and_resumed(kinds, tmp_path: Path, points=None, moments: int = 0) -> None:
    """Kill runs before operations on files (`points`: how many, spread evenly; None: all) and at
    random moments. Each run, started again, ends with the weights of an undisturbed one.

    kinds: (processes, function, its further arguments)."""
    count, function, *arguments = kinds
    in_processes(count, function, tmp_path / "whole", *arguments)
    expected = stored(tmp_path / "whole")
    plans = []
    for victim in range(count):
        operations = json.loads((tmp_path / f"operations-{victim}").read_text())
        every = range(1, len(operations) + 1)
        chosen = every if points is None else every[:: -(-len(every) // points)]
        plans += [(victim, {"operation": number}) for number in chosen]
    draw = random.Random(0)
    plans += [
        (draw.randrange(count), {"milliseconds": draw.uniform(0, 2000)}) for _ in range(moments)
    ]
    for number, (victim, when) in enumerate(plans):
        folder = tmp_path / f"run-{number}"
        with contextlib.suppress(ProcessExitedException, ProcessRaisedException):
            in_processes(count, function, folder, *arguments, victim, when)
        in_processes(count, function, folder, *arguments)
        assert stored(folder) == expected, (victim, when)
        shutil.rmtree(folder)


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    killed_and_resumed((1, train_preset, "transformer"), tmp_path, points=5)


def test_two_processes_of_which_one_is_killed_end_with_the_weights_of_undisturbed_ones(tmp_path):
    killed_and_resumed((2, train_directly), tmp_path, points=1)


@pytest.mark.nightly
@pytest.mark.parametrize("count", [1, 2])
def test_every_kill_of_some_processes_is_survived(count, tmp_path):
    killed_and_resumed((count, train_directly), tmp_path, moments=30)


@pytest.mark.nightly
@pytest.mark.parametrize("model", MAIN)
def test_every_kill_of_a_preset_is_survived(model, tmp_path):
    killed_and_resumed((1, train_preset, model), tmp_path, moments=30)
