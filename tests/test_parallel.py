"""Several ranks that train one model do what one process does.

The ranks are forked, which takes a fraction of a second. Four tests start `torchrun`, which takes
longer.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # once, and not in every rank
import torch.distributed as dist
import torch.distributed.fsdp
from models import MODELS, NAMES, WIDTH
from processes import in_processes
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from minimodels import LM, Config, InputError
from minimodels.architectures.moe import MoE
from minimodels.ops.before import Before
from minimodels.ops.linear_cross_entropy import IGNORE
from minimodels.ops.linear_scan import linear_scan
from minimodels.presets import PRESETS
from minimodels.ranks import average, averaged, from_first, largest, total
from minimodels.training import checkpoint, parallel
from minimodels.training.blocks import recompute
from minimodels.training.optim import adamw
from minimodels.training.prefix import is_linear
from minimodels.training.step import training_step
from minimodels.training.wavefront import split_context

ROOT = Path(__file__).parents[1]
VOCAB, B, T = 31, 4, 12
PRESET_TEXTS = [*MODELS.values(), PRESETS["mamba"].format(twice=4)]
OTHERS = [
    "moe(experts=4, router=sigmoid_bias, bias_step=0.1)",
    "moe(experts=4, balance=pooled)*2",
    "A:=mamba(state_size=4) mod(A mod(moe(experts=4), capacity=0.5), capacity=0.75) A",
]
MIXERS = " ".join(["learned_positions(context=160)", *NAMES])  # one of each, in one model
SPLIT_TOO = [MODELS["hybrid"], PRESET_TEXTS[-1], OTHERS[0]]
CASES = [(2, text) for text in (*PRESET_TEXTS, MIXERS, *OTHERS)]
CASES += [(4, text) for text in (*PRESET_TEXTS, MIXERS)]


def forked(world: int, function, folder: Path, *arguments):
    """What `function` returns in rank 0 of several forked processes, as JSON."""
    torch.multiprocessing.start_processes(
        join, (world, function, folder, arguments), nprocs=world, start_method="fork"
    )
    return json.loads((folder / "result.json").read_text())


def join(rank: int, world: int, function, folder: Path, arguments) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    result = function(*arguments)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    parallel.stop()


def steps_of_batches() -> list[list[tuple]]:
    """Two optimizer steps: rows without targets and packed documents, then a plain batch."""
    g = torch.Generator().manual_seed(0)
    tokens, targets, starts = torch.randint(VOCAB, (3, 3, B, T), generator=g)
    starts = starts[0] % (T - 1)
    starts = torch.where(torch.arange(T) < starts[:, :1], 0, starts[:, :1])
    targets[0, ::2] = IGNORE  # half of the ranks have nothing to predict
    targets[0, 1, ::3] = IGNORE
    masked, packed, plain = zip(tokens, targets, strict=True)
    return [[masked, (*packed, starts)], [plain]]


def train_on(layers: str, shard: bool = False, pieces: int = 1) -> list[list[float]]:
    """The losses, the layers' own losses, the norm of the gradient and the loads of each step.

    If the context is split, blocks are computed again.
    """
    torch.manual_seed(0)
    model = LM(Config(layers=layers, width=WIDTH, vocab=VOCAB))
    optimizer, autocast = adamw(model, 1e-3, 0.1), torch.autocast("cpu", enabled=False)
    parallel.distribute(model, optimizer, shard)
    if pieces > 1:
        recompute(model)
        split_context(model, pieces)
    found = []
    for batches in steps_of_batches():
        own = [parallel.own(batch, pieces) for batch in batches]
        taken = training_step(model, optimizer, own, autocast, 1.0)
        losses, parts = averaged((taken.losses, taken.parts))
        measured = [*losses, *parts.values(), taken.norm]
        found.append([value.item() for value in measured])
        loads = model.observations().get("load", [])
        found.append([share for layer in loads for share in layer])
    return found


def ways(layers: str, world: int) -> list[tuple[bool, int]]:
    """Whether to shard, and into how many pieces to split the context."""
    found = [(True, 1), (False, 1)]
    if layers in SPLIT_TOO:
        found.append((world == 2, 2))
    return found


def train_all(texts: list[str]) -> dict[str, list]:
    return {
        text: [train_on(text, *way) for way in ways(text, dist.get_world_size())] for text in texts
    }


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """world -> what that many ranks measure; they are started once."""
    found = {}

    def measure(world: int) -> dict[str, list]:
        if world not in found:
            texts = [text for ranks, text in CASES if ranks == world]
            found[world] = forked(world, train_all, tmp_path_factory.mktemp("ranks"), texts)
        return found[world]

    return measure


@pytest.mark.parametrize("world, layers", CASES)
def test_ranks_have_the_losses_and_gradient_norms_of_one_process(world, layers, several):
    """With and without sharding; with masked targets, packed documents and accumulation; in some
    models with a split context too."""
    one = train_on(layers)
    for way, many in zip(ways(layers, world), several(world)[layers], strict=True):
        for step, expected in zip(many, one, strict=True):
            assert step == pytest.approx(expected, rel=1e-5, abs=1e-5), way


def continue_from(folder: str, shard: bool) -> list[list[float]]:
    """The losses of two steps that are saved, and of two more by a model that has loaded them."""
    config = Config(layers="moe(experts=4, router=sigmoid_bias, bias_step=0.1)", width=WIDTH)
    torch.manual_seed(0)
    batches = [tuple(torch.randint(256, (2, B, T))) for _ in range(4)]

    def prepared(load: bool) -> tuple:
        torch.manual_seed(int(load))
        model = LM(config)
        optimizer = adamw(model, 1e-2, 0.1)
        parallel.distribute(model, optimizer, shard)
        if load:
            checkpoint.load(Path(folder), model, optimizer)
        return model, optimizer

    def trained(model: LM, optimizer, batches) -> list[float]:
        autocast = torch.autocast("cpu", enabled=False)
        own = [[parallel.own(batch)] for batch in batches]
        taken = [training_step(model, optimizer, each, autocast) for each in own]
        return [averaged(step.losses[0]).item() for step in taken]

    run = prepared(load=False)
    trained(*run, batches[:2])
    checkpoint.save(Path(folder), *run, {"step": 2})
    return [trained(*run, batches[2:]), trained(*prepared(load=True), batches[2:])]


@pytest.mark.parametrize("shard", [False, True])
def test_a_run_of_ranks_is_saved_whole_and_continues_exactly(shard, tmp_path):
    through, resumed = forked(2, continue_from, tmp_path, str(tmp_path), shard)
    assert resumed == through
    # and by one process
    torch.manual_seed(1)
    model = LM(checkpoint.saved_config(checkpoint.find(tmp_path)))
    optimizer = adamw(model, 1e-2, 0.1)
    checkpoint.load(tmp_path, model, optimizer)
    torch.manual_seed(0)
    batches = [tuple(torch.randint(256, (2, B, T))) for _ in range(4)][2:]
    autocast = torch.autocast("cpu", enabled=False)
    losses = [training_step(model, optimizer, [each], autocast).losses[0] for each in batches]
    assert torch.stack(losses).tolist() == pytest.approx(through, rel=1e-5)


def reduce() -> list:
    rank = dist.get_rank()
    x = torch.tensor([1.0, 10.0], requires_grad=True)
    # the mean over the ranks of (rank + 1) · total², whose derivative by x is that of 1.5 · total²
    ((rank + 1) * total(x * (rank + 1)).square()).sum().backward()
    assert x.grad.tolist() == [18 * (rank + 1), 180 * (rank + 1)]
    with pytest.raises(InputError, match="folder: 'here' is not accepted; accepted: another"):
        from_first(refuse)
    means = averaged({"a": [torch.tensor(rank), torch.full((2, 1), float(rank))]})
    return [average(torch.tensor(rank)).item(), means["a"][1].tolist(), largest(rank, -rank)]


def refuse() -> None:
    assert dist.get_rank() == 0
    raise InputError("folder", "here", "another")


def test_sums_over_ranks_have_gradients_and_errors_of_the_first_are_of_all(tmp_path):
    assert forked(2, reduce, tmp_path) == [0.5, [[0.5], [0.5]], [1.0, 0.0]]


class Reductions(TorchDispatchMode):
    """The sizes of the buffers of gradients that are reduced over the ranks."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "reduce" in str(function):
            largest = max(x.numel() for x in tree_leaves(arguments) if isinstance(x, Tensor))
            if largest > 1:  # a scalar is the number of targets
                self.sizes.append(largest)
        return function(*arguments, **(options or {}))


def reductions(shard: bool) -> list[list[int]]:
    """Of a step with one forward pass, and of one with three."""
    found = []
    for forwards in (1, 3):
        model = LM(Config(layers="mlp*2", width=WIDTH, vocab=VOCAB))
        optimizer = adamw(model, 1e-3, 0.1)
        parallel.distribute(model, optimizer, shard)
        batches = [tuple(torch.randint(VOCAB, (2, 1, T))) for _ in range(forwards)]
        with Reductions() as watched:
            training_step(model, optimizer, batches, torch.autocast("cpu", enabled=False))
        found.append(watched.sizes)
    return found


@pytest.mark.parametrize("shard", [False, True])
def test_gradients_of_several_forward_passes_are_reduced_once(shard, tmp_path):
    one, three = forked(2, reductions, tmp_path, shard)
    assert len(one) == 3  # two blocks, and the embedding and the last norm
    assert three == one


def route(shard: bool) -> list[str]:
    """The types that a router computes with, under autocast."""
    model = LM(Config(layers="moe(experts=4) mod(mlp, capacity=0.5)", width=WIDTH))
    parallel.distribute(model, adamw(model, 1e-3, 0.1), shard)
    seen, linear = [], torch.nn.functional.linear

    def watch(x, weight, bias=None):
        y = linear(x, weight, bias)
        if len(weight) in (1, 4):  # scores of experts, or of a token
            seen.extend(str(part.dtype) for part in (x, weight, y))
        return y

    torch.nn.functional.linear = watch
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(*torch.randint(256, (2, 2, 5)))[0].backward()
    return sorted(set(seen))


@pytest.mark.parametrize("shard", [False, True])
def test_routers_of_ranks_compute_in_full_precision_under_autocast(shard, tmp_path):
    assert forked(2, route, tmp_path, shard) == ["torch.float32"]


def refused() -> list[str]:
    said = []
    for given in ((7, 8, 1), (7, 8, 2), (8, 9, 2), (8, 9, 3)):
        try:
            said.append(parallel.own_shape(*given))
        except InputError as error:
            said.append(str(error))
    return said


def test_a_batch_that_ranks_cannot_divide_is_refused(tmp_path):
    assert forked(2, refused, tmp_path) == [
        "batch_size: 7 is not accepted; accepted: a multiple of 2, the number of processes",
        [7, 4],
        "context: 9 is not accepted; accepted: a multiple of 2, the pieces of context_parallel",
        "context_parallel: 3 is not accepted; accepted: a divisor of 2, the number of processes "
        "(torchrun starts several)",
    ]


def test_several_processes_without_torchrun_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="'2' is not accepted; accepted: 1 without torchrun"):
        parallel.start(torch.device("cpu"))


SMALL = (
    "--layers attention,moe(experts=4) --width 16 --context 16 --batch-size 4 --eval-batches 1 "
    "--log-every 1 --threads 1 --data text --device cpu"
).split()
SMALL[1] = SMALL[1].replace(",", " ")


def write_text(folder: Path) -> None:
    (folder / "text").write_bytes(bytes(range(32, 127)) * 60)


def torchrun(folder: Path, *arguments: str, script: str = "train.py") -> subprocess.Popen:
    """train.py in two processes, started in a folder with a text."""
    write_text(folder)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(ROOT / script), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def log(run: Path) -> dict[int, list[float]]:
    """Step -> what was measured."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {
        (line["step"], kind): [line[kind], line.get("grad_norm", 0), *line.get("load", [[]])[0]]
        for line in lines
        for kind in ("loss", "bits_per_byte")
        if kind in line
    }


def test_torchrun_takes_the_steps_of_one_process_which_continues_its_run(tmp_path, monkeypatch):
    process = torchrun(tmp_path, *SMALL, "--shard", "--steps", "3", "--out", "run")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert out.count("model    custom") == out.count("--- sample ---") == 1
    assert "runs on  cpu, threads: 1, 2 processes" in out
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["--resume", "run", "--steps", "5"],
        [*SMALL, "--steps", "3", "--out", "one"],
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        train.main(train.parse(""))
    many, one = log(tmp_path / "run"), log(tmp_path / "one")
    assert max(many) == (5, "loss")
    for key, measured in one.items():
        assert many[key] == pytest.approx(measured, rel=1e-5), key


def run_in(folder: Path, *arguments: str) -> None:
    """A run of train.py in a folder with a text."""
    os.chdir(folder)
    sys.argv = ["train.py", *SMALL, "--out", "run", *arguments]
    train.main(train.parse(""))


def watched_run(rank: int, folder: Path, options: list[str]) -> None:
    """Three steps. Writes how many tokens of a text this rank sees, how often the MoE runs in
    training, and how many blocks are compiled."""
    tokens, runs, compiled = set(), [], []
    loss, forward, compile = LM.loss, MoE.forward, torch.compile

    def watched_loss(model, batch, *given):
        tokens.add(batch.shape[1])
        return loss(model, batch, *given)

    def watched_forward(layer, *given):
        runs.extend([1] * layer.training)
        return forward(layer, *given)

    def watched_compile(function):
        compiled.append(1)
        return compile(function, backend="eager")

    LM.loss, MoE.forward, torch.compile = watched_loss, watched_forward, watched_compile
    parallel.stop = lambda: None  # it would end the process
    run_in(folder, "--steps", "3", *options)
    (folder / f"seen-{rank}").write_text(json.dumps([*tokens, len(runs), len(compiled)]))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> dict:
    """The log of one process without options."""
    folder = tmp_path_factory.mktemp("plain")
    write_text(folder)
    in_processes(1, watched_run, folder, [])
    return log(folder / "run")


@pytest.mark.parametrize(
    "options, tokens, runs, compiled",
    [
        ("--context-parallel 2", 8, 3, 0),
        ("--checkpoint-activations", 16, 6, 0),
        ("--shard --context-parallel 2 --checkpoint-activations", 8, 6, 0),
        ("--shard --compile", 16, 3, 2),
    ],
)
def test_options_of_ranks_reach_the_model_and_change_no_number(
    options, tokens, runs, compiled, plain_run, tmp_path
):
    write_text(tmp_path)
    in_processes(2, watched_run, tmp_path, options.split())
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen-{rank}").read_text())
        assert seen == [tokens, runs, compiled]
    files = checkpoint.find(tmp_path / "run").folder.glob("*.safetensors")
    stored = sum("model.embedding.weight" in load_file(file) for file in files)
    assert stored == (2 if "--shard" in options else 1)
    many = log(tmp_path / "run")
    assert many.keys() == plain_run.keys()
    for key, measured in plain_run.items():
        assert many[key] == pytest.approx(measured, rel=1e-5), key


def stopped_run(rank: int, folder: Path) -> None:
    """Rank 1 alone receives a signal, in its third step. Writes how many steps each rank took."""
    calls, loss = [], LM.loss

    def signalled(model, *batch):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(model, *batch)

    signal.alarm(60)  # if one rank waits for the other, it does so for ten minutes
    LM.loss, parallel.stop = signalled, sys.exit
    with pytest.raises(SystemExit, match="130"):
        run_in(folder, "--steps", "9")
    (folder / f"steps-{rank}").write_text(str(len(calls)))


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_saves(tmp_path):
    write_text(tmp_path)
    in_processes(2, stopped_run, tmp_path)
    assert [(tmp_path / f"steps-{rank}").read_text() for rank in range(2)] == ["3", "3"]
    assert checkpoint.find(tmp_path / "run").about["progress"]["step"] == 3


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the processes are not listed")
def test_a_rank_that_dies_ends_the_job_with_its_number_and_reason(tmp_path):
    process = torchrun(tmp_path, *SMALL, "--steps", "1000000", "--out", "run")
    wait_for(tmp_path / "run" / "log.jsonl")
    started = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = (
        pid for pid in started if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )
    os.kill(int(second), signal.SIGKILL)
    begun = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - begun < 30
    assert process.returncode == 1
    # as the root cause, or beside the failure of the rank that lost its neighbour, if torchrun
    # notices both at once
    assert re.search(r"rank +: 1 [^[]*Signal 9 \(SIGKILL\)", out), out


RAISES = """
import os, runpy
from minimodels import LM
loss, calls = LM.loss, []
def fail_once(*batch):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 4:
        raise ValueError("a defect of rank 1")
    return loss(*batch)
LM.loss = fail_once
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_rank_that_raises_ends_the_job_with_its_number_and_reason(tmp_path):
    (tmp_path / "raises.py").write_text(RAISES.replace("train.py", str(ROOT / "train.py")))
    arguments = [*SMALL, "--steps", "1000000", "--out", "run"]
    process = torchrun(tmp_path, *arguments, script=str(tmp_path / "raises.py"))
    wait_for(tmp_path / "run" / "log.jsonl")
    begun = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - begun < 30
    assert process.returncode == 1
    assert re.search(r"rank +: 1 [^[]*ValueError: a defect of rank 1", out), out


def test_sigterm_to_torchrun_saves(tmp_path):
    process = torchrun(tmp_path, *SMALL, "--steps", "1000000", "--out", "run")
    wait_for(tmp_path / "run" / "log.jsonl")
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert "and saved; to continue: python train.py --resume" in out
    checkpoint.load_model(tmp_path / "run")


def wait_for(path: Path) -> None:
    """Wait until a run has written a file; on a busy machine it takes a while to start."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} is not there after two minutes"
        time.sleep(0.1)


SPLIT = [
    "attention mlp attention",
    "attention(window=5) attention(window=1)",
    "mamba(state_size=4)*2",
    "mamba2(state_size=4)*2",
    "deltanet(gate=scalar)*2",
    MODELS["hybrid"],
    "A:=retention A mlp A short_convolution",
    "learned_positions(context=160) latent_attention",
]
LINEAR = [
    "mamba(state_size=4) learned_positions(context=160) moe(experts=4)",
    "mamba2(state_size=4, groups=2)",
    "deltanet(gate=scalar, heads=4, key_heads=2)",
    "deltanet(gate=vector, beta_max=2, steps=2)",
    "retention retention(rope_base=0, feature_map=elu, decay=channels, norm=sum)",
    "short_convolution(conv_width=10) short_convolution(conv_width=1)",
]
FOUR = (
    "attention(window=5) mamba(state_size=4) mamba2(state_size=4) deltanet moe(experts=4) attention"
)


def split_and_whole(layers: str, pieces: int, packed: bool) -> float:
    """The largest difference of logits, loss or gradients between a model whose context is split and
    the same model in one process."""
    B, T = 2, 24
    config = Config(layers=layers, width=WIDTH, vocab=VOCAB)
    batch = tuple(torch.randint(VOCAB, (2, B, T), generator=torch.Generator().manual_seed(1)))
    batch[1][0, :15] = IGNORE
    if packed:
        starts = torch.zeros(B, T, dtype=torch.int64)
        starts[0, 9:], starts[1, 3:], starts[1, 12:] = 9, 3, 12
        batch = (*batch, starts)

    def learn(batch: tuple, prepare) -> tuple:
        torch.manual_seed(0)
        model = LM(config).double()
        prepare(model)
        loss, _ = model.loss(*batch)
        loss.backward()
        named = dict(zip(("starts", "positions"), batch[2:], strict=False))
        with torch.no_grad():
            logits, _ = model.eval()(batch[0], **named)
        return logits, loss.detach(), [parameter.grad for parameter in model.parameters()]

    logits, loss, gradients = learn(batch, lambda model: None)
    own = parallel.own(batch, pieces)
    found = learn(own, lambda model: split_context(model, pieces))
    differences = [found[0] - parallel.own((logits,), pieces)[0], average(found[1]) - loss]
    differences += [average(mine) - whole for mine, whole in zip(found[2], gradients, strict=True)]
    return max(difference.abs().max().item() for difference in differences)


def split_all(pieces: int, texts: list[str]) -> dict[str, float]:
    """The same for all texts, in one process group, because starting one takes longer."""
    return {
        f"{layers} {packed}": split_and_whole(layers, pieces, packed)
        for layers in texts
        for packed in (False, True)
    }


@pytest.mark.parametrize(
    "world, pieces, texts",
    [(2, 2, SPLIT), (4, 4, [FOUR, SPLIT[0], *LINEAR]), (4, 2, [SPLIT[0], SPLIT[3]])],
)
def test_a_split_context_gives_the_outputs_and_gradients_of_the_whole(
    world, pieces, texts, tmp_path
):
    """With and without documents in a row; the third case splits rows too."""
    for case, difference in forked(world, split_all, tmp_path, pieces, texts).items():
        assert difference < 1e-10, case


def scan_pieces() -> float:
    """The largest difference between a linear scan of pieces and one of the whole text."""
    g = torch.Generator().manual_seed(0)
    a, x, weight = torch.rand(3, 2, 12, 3, generator=g, dtype=torch.float64)
    resets = torch.arange(12).expand(2, 12) == torch.tensor([[5], [7]])

    def learn(a: Tensor, x: Tensor, weight: Tensor, resets: Tensor, state: Before | None) -> tuple:
        a, x = (part.clone().requires_grad_() for part in (a, x))
        h, end = linear_scan(a, x, state, resets=resets)
        ((h * weight).sum() + end.square().sum() * (state is None or is_last)).backward()
        return h.detach(), a.grad, x.grad

    pieces = dist.get_world_size()
    is_last = dist.get_rank() == pieces - 1

    def own(part: Tensor) -> Tensor:
        return parallel.own((part,), pieces)[0]

    differences = []
    for documents in (torch.zeros_like(resets), resets):
        given = (a, x, weight, documents)
        found = learn(*map(own, given), Before(dist.group.WORLD))
        whole = learn(*given, None)
        differences += [mine - own(all) for mine, all in zip(found, whole, strict=True)]
    return average(torch.stack(differences).abs().max()).item()


def test_a_linear_scan_of_pieces_is_that_of_the_whole(tmp_path):
    assert forked(4, scan_pieces, tmp_path) < 1e-10


def test_only_models_of_linear_recurrences_need_no_state_of_another_rank():
    for layers in SPLIT + LINEAR + [FOUR]:
        model = LM(Config(layers=layers, width=WIDTH))
        assert is_linear(model) == ("attention" not in layers), layers


def test_a_layer_that_routes_over_the_whole_text_has_no_split_context():
    for layers in ("mod(mlp)", "moe(experts=4, router=expert_choice)"):
        with pytest.raises(InputError, match="context_parallel: 2 .* routes over the whole text"):
            split_context(LM(Config(layers=layers, width=WIDTH)), 2)
