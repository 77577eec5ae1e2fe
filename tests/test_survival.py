"""What happens to a run does not lose it: processes that come and go, kills, full disks."""

import contextlib
import errno
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # now, because fully_shard would import it in each process
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
from processes import in_processes, run_train
from safetensors.torch import load_file
from small import small
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import train
from minimodels import LM, Config, InputError, command, ledger
from minimodels.data.mixture import Mixture
from minimodels.data.text import Text, open_data
from minimodels.presets import MAIN
from minimodels.published import save_pretrained
from minimodels.training import checkpoint, parallel, shards
from minimodels.training.budget import Budget
from minimodels.training.guard import Guard, explain
from minimodels.training.optim import adamw
from minimodels.training.options import Options, new_folder
from minimodels.training.step import training_step

LAYERS = "attention(heads=2) moe(experts=3, router=sigmoid_bias, bias_step=0.1) mamba"
CONFIG = Config(layers=LAYERS, width=12, vocab=7)
TINY = (
    "--threads 1 --layers mlp --width 8 --context 16 --batch-size 2 --warmup 0 --eval-batches 1 "
    "--log-every 1 --device cpu"
)
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def make(mesh: str = "") -> tuple[LM, torch.optim.Optimizer]:
    """A model and its optimizer, in this process alone, or "shard"ed or "replicate"d."""
    torch.manual_seed(0)
    model = LM(CONFIG)
    optimizer = adamw(model, 1e-2, 0.1)
    if mesh:
        parallel.distribute(model, optimizer, mesh == "shard")
    return model, optimizer


def take_steps(model: LM, optimizer: torch.optim.Optimizer, *steps: int, guard=None) -> None:
    """Take training steps, each on its own tokens, the same in every process."""
    for step in steps:
        tokens = torch.randint(7, (2, 10), generator=torch.Generator().manual_seed(step))
        batch = (tokens[:, :-1], tokens[:, 1:])
        training_step(model, optimizer, [batch], NO_AUTOCAST, guard=guard)


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
    torch.manual_seed(shards.number() + 10)
    checkpoint.save(folder, model, optimizer, {"step": 2})
    saved = {name: tensor.clone() for name, tensor in whole(model, optimizer).items()}
    torch.save(saved, folder / f"saved-{shards.number()}")
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


def test_the_newest_checkpoint_is_that_of_the_last_step_whatever_the_clock_says(tmp_path):
    """A clock that is set back gives later files earlier dates."""
    model, optimizer = make()
    for step in (9, 10, 11):
        checkpoint.save(tmp_path, model, optimizer, {"step": step}, keep=2)
        for file in (tmp_path / f"checkpoints/step-{step}").rglob("*"):
            os.utime(file, (10**9 - step, 10**9 - step))
        os.utime(tmp_path / f"checkpoints/step-{step}", (10**9 - step, 10**9 - step))
    assert checkpoint.load(tmp_path, model, optimizer) == {"step": 11}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-10", "step-11"}


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


def train_preset(
    rank: int, folder: Path, model: str, mesh: str, victim: int = -1, when: dict | None = None
) -> None:
    """A run of train.py, with --shard if `mesh` is "shard": six steps, a checkpoint after every
    second."""
    operations = die(folder, **(when or {} if rank == victim else {}))
    (folder.parent / "text").write_bytes(bytes(range(32, 127)) * 60)
    chosen = [part for each in small(model) for part in ("--set", each)]
    started = (
        f"--model {model} --data {folder.parent}/text --width 16 --context 16 --batch-size 2 "
        f"--eval-batches 1 --eval-every 2 --log-every 1 --device cpu --steps 6 --out {folder}"
    )
    started += " --shard" if mesh == "shard" else ""
    resumed = f"--resume {folder}"
    arguments = resumed.split() if checkpoint.exists(folder) else [*started.split(), *chosen]
    sys.argv = ["train.py", "--threads", "1", *arguments]
    parallel.stop = lambda status=0: None  # it would end the process
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main(train.parse(""))
    (folder.parent / f"operations-{rank}").write_text(json.dumps(operations))


def stored(folder: Path, step: int = 6) -> dict[str, list[bytes]]:
    """The bytes of all tensors in the newest checkpoint, which is of that step. A sharded tensor has
    pieces in several files; which file has a whole one makes no difference."""
    found = checkpoint.find(folder)
    assert found.passed_over == []
    assert found.about["progress"]["step"] == step
    pieces: dict[str, list[bytes]] = {}
    for file in sorted(found.folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            pieces.setdefault(name, []).append(tensor.numpy().tobytes())
    return pieces


def killed_and_resumed(kinds, tmp_path: Path, points=None, moments: int = 0) -> None:
    """Kill runs before operations on files (`points`: how many, spread evenly; None: all) and at
    random moments. Each run, started again, ends with the weights of an undisturbed one.

    kinds: (processes, function, its further arguments)."""
    count, function, *arguments = kinds
    start = time.monotonic()
    in_processes(count, function, tmp_path / "whole", *arguments)
    duration = 1000 * (time.monotonic() - start)
    expected = stored(tmp_path / "whole")
    plans = []
    for victim in range(count):
        operations = json.loads((tmp_path / f"operations-{victim}").read_text())
        every = range(1, len(operations) + 1)
        chosen = every if points is None else every[:: -(-len(every) // points)]
        plans += [(victim, {"operation": number}) for number in chosen]
    draw = random.Random(0)
    plans += [
        (draw.randrange(count), {"milliseconds": draw.uniform(0, duration)}) for _ in range(moments)
    ]
    for number, (victim, when) in enumerate(plans):
        folder = tmp_path / f"run-{number}"
        # if one of two processes is killed, the other loses its connection
        expected_errors = (ProcessExitedException, *[ProcessRaisedException] * (count > 1))
        with contextlib.suppress(*expected_errors):
            in_processes(count, function, folder, *arguments, victim, when)
        in_processes(count, function, folder, *arguments)
        assert stored(folder) == expected, (victim, when)
        shutil.rmtree(folder)


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    killed_and_resumed((1, train_preset, "transformer", ""), tmp_path, points=5)


def test_two_processes_of_which_one_is_killed_end_with_the_weights_of_undisturbed_ones(tmp_path):
    killed_and_resumed((2, train_preset, "transformer", "shard"), tmp_path, points=1)


def replace_checkpoint(rank: int, folder: Path, operation: int) -> None:
    model, _ = make()
    operations = die(folder / "checkpoints", operation)
    torch.nn.init.constant_(model.embedding.weight, 2)
    checkpoint.save(folder, model, None, {"step": 1})
    (folder / "count").write_text(str(len(operations)))


def test_a_checkpoint_that_is_replaced_is_whole_at_every_moment(tmp_path):
    """If a run is saved again at the same step, no kill leaves it without a checkpoint."""
    model, _ = make()
    found = []
    for operation in itertools.count(1):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        torch.nn.init.constant_(model.embedding.weight, 1)
        checkpoint.save(tmp_path, model, None, {"step": 1})
        with contextlib.suppress(ProcessExitedException):
            in_processes(1, replace_checkpoint, tmp_path, operation)
        assert checkpoint.load(tmp_path, model) == {"step": 1}
        found += model.embedding.weight.unique().tolist()
        if (tmp_path / "count").exists():
            break
    assert found == sorted(found)  # the old one, and from some operation on the new one
    assert found.count(1) > 4
    assert found.count(2) > 1


@pytest.mark.nightly
@pytest.mark.parametrize("count, mesh", [(1, ""), (2, "replicate"), (2, "shard")])
@pytest.mark.parametrize("model", MAIN)
def test_every_kill_of_a_preset_is_survived(model, count, mesh, tmp_path):
    """MINIMODELS_KILLS=4 kills at four operations and four moments instead."""
    points = int(os.environ.get("MINIMODELS_KILLS", "0")) or None
    kinds = (count, train_preset, model, mesh)
    killed_and_resumed(kinds, tmp_path, points, moments=points or 30)


# bad steps


def spoil(model: LM) -> None:
    """Make the next gradients of the embedding NaN."""
    model.embedding.weight.register_hook(lambda gradient: gradient * math.nan)


def snapshot(model: LM, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in whole(model, optimizer).items()}


def test_a_bad_step_changes_nothing_and_after_too_many_no_step_does():
    """Weights, moments, their count and the router's selection bias stay as they are."""
    model, optimizer = make()
    guard = Guard(model, allowed=1)
    take_steps(model, optimizer, 1, 2, guard=guard)
    before = snapshot(model, optimizer)
    hook = model.embedding.weight.register_hook(lambda gradient: gradient * math.nan)
    take_steps(model, optimizer, 3, guard=guard)
    after = snapshot(model, optimizer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert guard.failing(3) is None
    hook.remove()
    take_steps(model, optimizer, 4, guard=guard)
    after = snapshot(model, optimizer)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {"layers.1.layer.bias", "embedding.weight", "embedding.weight.step"} <= moved
    assert guard.failing(4) is None
    spoil(model)
    take_steps(model, optimizer, 5, guard=guard)
    model.embedding.weight._backward_hooks.clear()
    take_steps(model, optimizer, 6, guard=guard)
    last = snapshot(model, optimizer)
    assert [name for name in after if not torch.equal(after[name], last[name])] == []
    assert (guard.failing(6), guard.bad.item()) == (4, 2)


@pytest.mark.parametrize(
    "loss, bad", [(math.inf, 1), (10.1 * math.log(7), 1), (9 * math.log(7), 0)]
)
def test_a_loss_far_above_that_of_guessing_is_bad(loss, bad):
    guard = Guard(make()[0])
    assert guard.skip([torch.tensor(1.0), torch.tensor(loss)], torch.tensor(1.0)) == bad


def test_an_explanation_names_the_first_layer_and_the_largest_activation():
    model, _ = make()
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        model.layers[2].layer.out_proj.weight.fill_(math.inf)
        model.layers[0].layer.out.weight.fill_(1e20)
    said = explain(model, [(tokens, tokens)], NO_AUTOCAST)
    assert "the loss is nan; the first output that is not finite is that of layers.2" in said
    assert re.search(r"the largest activation is \d\.?\d*e\+\d+, in layers\.0", said)
    assert all(parameter.grad is None for parameter in model.parameters())
    model, _ = make()
    spoil(model)
    said = explain(model, [(tokens, tokens)], NO_AUTOCAST)
    assert "the first gradient that is not finite is that of embedding.weight" in said


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_run_skips_as_many_bad_steps_as_it_may(allowed, tmp_path, monkeypatch, capsys):
    """Its log contains no NaN. If there are more, it stops before it saves."""
    calls, loss = [], LM.loss

    def bad_once(model, *batch):
        calls.append(1)
        total, parts = loss(model, *batch)
        factor = math.nan if len(calls) >= 3 and (len(calls) == 3 or not allowed) else 1.0
        return total * factor, {name: value * factor for name, value in parts.items()}

    monkeypatch.setattr(LM, "loss", bad_once)
    arguments = f"{TINY} --steps 5 --skip-bad-steps {allowed} --out {tmp_path}/a".split()
    arguments += ["--data", "copying(tokens=2)"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    if not allowed:
        with pytest.raises(SystemExit, match="1"):
            train.main(train.parse(""))
        said = capsys.readouterr().err
        assert re.search("step 3 was bad: the loss is nan; .* nothing was saved", said)
        assert not checkpoint.exists(tmp_path / "a")
        return
    train.main(train.parse(""))
    lines = (tmp_path / "a/log.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [(r["step"], r["skipped"], "loss" in r) for r in records[:5]] == [
        (1, 0, True), (2, 0, True), (3, 1, False), (4, 1, True), (5, 1, True)]  # fmt: skip


def one_bad_rank(rank: int, mesh: str, what: str) -> None:
    """Three steps, of which the second has a NaN in the loss or the gradient of rank 1 alone. The
    ranks have the same weights, those of two steps."""
    model, optimizer = make(mesh)
    guard = Guard(model, allowed=1)
    take_steps(model, optimizer, 1, guard=guard)
    before = snapshot(model, optimizer)
    loss = model.loss

    def spoiled(*batch):
        total, parts = loss(*batch)
        nan = torch.tensor(math.nan)
        return (total * nan, parts) if what == "gradient" else (total, {"cross_entropy": nan})

    if rank == 1:
        model.loss = spoiled
    take_steps(model, optimizer, 2, guard=guard)
    after = snapshot(model, optimizer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    model.loss = loss
    take_steps(model, optimizer, 3, guard=guard)
    last = snapshot(model, optimizer)
    assert not torch.equal(last["embedding.weight"], after["embedding.weight"])
    for name, tensor in last.items():
        of_first = tensor.clone()
        dist.broadcast(of_first, 0)
        assert torch.equal(tensor, of_first), name
    assert guard.bad.item() == 1


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("mesh", ["shard", "replicate"])
def test_a_step_that_is_bad_in_one_rank_is_skipped_by_all(mesh, what):
    in_processes(2, one_bad_rank, mesh, what)


def stop_at_bad_step(rank: int, folder: Path) -> None:
    """A run whose third step has a NaN in rank 1 alone, and which may skip none."""
    calls, loss = [], LM.loss

    def bad_in_one(model, *batch):
        calls.append(1)
        total, parts = loss(model, *batch)
        return total * (math.nan if rank == 1 and len(calls) >= 3 else 1.0), parts

    LM.loss = bad_in_one
    sys.argv = ["train.py", *TINY.split(), "--data", "copying(tokens=2)", "--out", str(folder)]
    train.main(train.parse(""))


def test_a_bad_step_of_one_rank_ends_all_with_one_message(tmp_path, capfd):
    """Rank 0 ends first. Then the launcher sends SIGTERM to rank 1, which says nothing."""
    with pytest.raises(ProcessExitedException) as ended:
        in_processes(2, stop_at_bad_step, tmp_path / "run")
    assert (ended.value.error_index, ended.value.exit_code) == (0, 1)
    said = capfd.readouterr().err
    assert said.count("step 3 was bad") == said.count("nothing was saved") == 1, said
    assert not checkpoint.exists(tmp_path / "run")


# ramps


RAMP = "context=8:32@0.5 batch_size=4:2 b=1:4"
TOKENS = [32, 48, 80, 128, 192, 256, 320, 384]  # after each of eight steps


def test_a_run_with_ramps_counts_what_it_spent_and_resumes_to_the_bit(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(range(32, 127)) * 60)
    weights, batch = [], Mixture.batch

    def watched(*given, **named):
        weights.append(named["weights"]["b"])
        return batch(*given, **named)

    def run(*arguments) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        train.main(train.parse(""))
        lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "loss" in record]

    monkeypatch.setattr(Mixture, "batch", watched)
    data = ["--data", f"a=1:{tmp_path}/a b=1:{tmp_path}/b", "--ramp", RAMP, "--keep", "9"]
    bounds = ["--steps", "8", "--eval-every", "3", "--out", str(tmp_path / "run")]
    first = run(*TINY.split(), *data, *bounds)
    assert [record["tokens"] for record in first] == TOKENS
    assert weights[-8:] == [1 + 3 * step / 8 for step in range(8)]
    config = checkpoint.load_model(tmp_path / "run").config
    costs = {8: 48, 16: 32, 24: 48, 32: 256}  # context: tokens
    flops = sum(
        tokens * ledger(config, context).training_flops for context, tokens in costs.items()
    )
    assert first[-1]["flops"] == pytest.approx(flops)
    expected = stored(tmp_path / "run", 8)
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step}")
    again = run("--resume", str(tmp_path / "run"))
    keys = ("loss", "tokens", "flops", "lr")
    assert [[r[key] for key in keys] for r in again] == [[r[key] for key in keys] for r in first]
    assert stored(tmp_path / "run", 8) == expected


def test_a_run_whose_accumulation_changes_repeats_no_batch(tmp_path, monkeypatch):
    """Nor does it leave one out, at the change or after another resumption."""
    (tmp_path / "text").write_bytes(bytes(range(32, 127)) * 60)
    drawn, batch = [], Text.batch

    def watched(data, seed, number, *given):
        drawn.append(number)
        return batch(data, seed, number, *given)

    monkeypatch.setattr(Text, "batch", watched)
    run = f"--resume {tmp_path}/run"
    start = f"{TINY} --data {tmp_path}/text --out {tmp_path}/run --accumulate 3"
    for arguments in (f"{start} --steps 2", f"{run} --steps 4 --accumulate 2", f"{run} --steps 5"):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments.split()])
        train.main(train.parse(""))
    assert drawn == list(range(12))


@pytest.mark.parametrize("bound", ["tokens", "flops"])
def test_a_bound_is_never_passed_whatever_the_steps_cost(bound):
    config = Config(layers="attention(heads=2)", width=8, vocab=16)
    data = open_data("copying(tokens=2)", 32)
    for limit in (700.0, 701.0, 1000.0):
        limit *= 1 if bound == "tokens" else 30_000
        options = Options(config, ramp="context=8:32@0.5", batch_size=2, **{bound: limit})
        budget = Budget(options, config, data, {})
        while budget.allows(shape := budget.shape(budget.progress(0.0)), 0.0):
            budget.spend(shape)
        cost = shape.tokens if bound == "tokens" else budget.cost(shape)
        assert budget.ended(0.0)
        assert getattr(budget, bound) <= limit < getattr(budget, bound) + cost
        assert shape.context == 32


def test_a_ramp_beyond_the_positions_of_the_model_is_refused_at_the_start(tmp_path, monkeypatch):
    layers = ["--layers", "learned_positions(context=20) attention(heads=2)"]
    arguments = [*TINY.split(), *layers, "--data", "copying(tokens=2)", "--steps", "9"]
    arguments += ["--context", "8", "--ramp", "context=8:32", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(InputError, match="text: 32 .* at most 20 tokens"):
        train.main(train.parse(""))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "ramp, accepted",
    [
        ("width=1:2", "NAME is context or batch_size"),
        ("context=8:9999999", "at least context"),
        ("context=8", "FIRST:LAST"),
    ],
)
def test_a_ramp_that_cannot_be_followed_is_refused_at_the_start(ramp, accepted, tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(32, 127)) * 60)
    options = Options(Config(layers="mlp", width=8, vocab=256), ramp=ramp, context=16)
    with pytest.raises(InputError, match=accepted):
        Budget(options, options.config, open_data(str(tmp_path / "text"), 16), {})


# signals and folders


@pytest.mark.parametrize("seconds, code", [(0.9, 7), (1.1, 128 + signal.SIGTERM)])
def test_a_signal_that_is_repeated_within_a_second_is_one(seconds, code, monkeypatch):
    """torchrun repeats Ctrl-C. Later, a second signal ends the process at once."""
    process = os.fork()
    if not process:
        with command.stopped_by_signals() as stopped:
            os.kill(os.getpid(), signal.SIGINT)
            later = time.monotonic() + seconds
            monkeypatch.setattr(command.time, "monotonic", lambda: later)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7 if stopped.is_set() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == code


@pytest.mark.parametrize("seconds, code", [(0.9, 7), (1.1, 8)])
def test_the_same_signal_may_come_again_after_the_run_has_saved(seconds, code, monkeypatch):
    process = os.fork()
    if not process:
        signal.signal(signal.SIGINT, lambda *given: os._exit(8))
        with command.stopped_by_signals():
            os.kill(os.getpid(), signal.SIGINT)
        later = time.monotonic() + seconds
        monkeypatch.setattr(command.time, "monotonic", lambda: later)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == code


def test_a_folder_that_is_lost_is_one_line(tmp_path):
    model, optimizer = make()
    for _ in range(2):  # the first time, the folder is gone; then a file has its name
        with pytest.raises(InputError, match="a folder with room for a checkpoint"):
            checkpoint.save(tmp_path / "run", model, optimizer, {"step": 1})
        (tmp_path / "run").touch()


def test_a_folder_that_no_system_can_make_is_refused():
    with pytest.raises(InputError, match="^out: .*embedded null"):
        new_folder(Options(Config(), out=Path("a\0b")))


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def forbid_writing(folder: Path) -> None:
    """From now on, this process finds the folder as on a disk that is mounted read-only."""

    def refuse(event: str, arguments: tuple) -> None:
        if event in FILE_OPERATIONS and str(arguments[0]).startswith(str(folder)):
            reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not reads and event not in ("os.listdir", "os.scandir", "fcntl.flock"):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])

    sys.addaudithook(refuse)


def lose_folder(rank: int, folder: Path, how, stopped: bool) -> None:
    """A run whose folder is lost in its third step. Then it writes its log, or is stopped and saves."""
    calls, loss = [], LM.loss

    def losing(model, *batch):
        calls.append(1)
        if len(calls) == 3:
            how(folder)
            if stopped:
                os.kill(os.getpid(), signal.SIGTERM)
        return loss(model, *batch)

    LM.loss = losing
    arguments = f"{TINY} --steps 6 --eval-every 2 --log-every 9 --out {folder}".split()
    status, lines = run_train([*arguments, "--data", "copying(tokens=2)"])
    assert status != 0
    assert len(lines) == 1
    assert str(folder) in lines[0]


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("how", [shutil.rmtree, replace_by_file, forbid_writing])
def test_a_folder_that_is_lost_during_a_run_ends_it_with_one_line(how, stopped, tmp_path):
    """A checkpoint that is still there is whole."""
    in_processes(1, lose_folder, tmp_path / "run", how, stopped)
    if how is forbid_writing:
        assert checkpoint.find(tmp_path / "run").about["progress"]["step"] == 2


# starting from other weights


@pytest.mark.parametrize("kind", ["run", "checkpoint", "published"])
def test_a_run_starts_from_the_weights_of_another(kind, tmp_path, monkeypatch):
    """With its layers and its tokenizer. Its optimizer and its steps are its own."""

    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--threads", "1"])
        train.main(train.parse(""))

    (tmp_path / "text").write_bytes(bytes(range(32, 127)) * 60)
    common = (
        f"--data {tmp_path}/text --context 16 --batch-size 2 --eval-batches 1 --device cpu".split()
    )
    layers = ["--layers", "attention(heads=2) mlp", "--width", "16"]
    run(*common, *layers, "--steps", "2", "--out", str(tmp_path / "first"))
    first = checkpoint.load_model(tmp_path / "first")
    source = {"run": "first", "checkpoint": "first/checkpoints/step-2", "published": "hub"}[kind]
    if kind == "published":
        save_pretrained(first, tmp_path / "hub")
    still = ["--lr", "1e-30", "--weight-decay", "0", "--steps", "1"]
    run(*common, *still, "--init", str(tmp_path / source), "--out", str(tmp_path / "second"))
    second = checkpoint.load_model(tmp_path / "second")
    assert second.config == first.config
    weights = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    assert checkpoint.find(tmp_path / "second").about["progress"]["step"] == 1
    run("--resume", str(tmp_path / "second"), "--steps", "2")
    with pytest.raises(InputError, match="init: .* it has width 16, not 8"):
        run(*common, "--init", str(tmp_path / source), "--width", "8")
