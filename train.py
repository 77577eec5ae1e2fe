"""Train any model of minimodels on any text or task.

    python train.py                                         a small transformer on Python's own source
    python train.py --model mamba                           the same with another architecture
    python train.py --layers "mamba mlp window mlp" --data FILE --minutes 10
    python train.py --resume runs/transformer               go on where a run stopped

A run ends at the first of its bounds: steps, tokens, FLOPs or minutes. It leaves a folder with its options, a checkpoint and
log.jsonl. Ctrl-C saves and stops; on a CPU, going on from there gives the same bits as not having stopped, unless --minutes
is among the bounds: then the schedule follows the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from minimodels import checkpoint
from minimodels.command import keep_freed_memory, pick_device, run_command
from minimodels.config import Config, InputError, check_types, preset
from minimodels.data import Text, open_data
from minimodels.layers import choose
from minimodels.ledger import ledger
from minimodels.lm import LM
from minimodels.loss import IGNORE
from minimodels.optim import SCHEDULES, adamw, learning_rate
from minimodels.sample import Sampling, generate
from minimodels.tasks import Task
from minimodels.tokenizer import Bytes


@dataclass(frozen=True)
class Options:
    """What to train, on what, for how long. Any field of the model's configuration is an option too."""

    config: tyro.conf.OmitArgPrefixes[Config]
    model: str = "transformer"
    """preset that the layers and widths start from: transformer, mamba, moe, mod or hybrid"""
    size: str = "tiny"
    """tiny, for a CPU; small, for a GPU: the shape of GPT-2's 124M, of which 85M are left with bytes for a vocabulary"""
    data: str = "stdlib"
    """stdlib (Python's own source), a file, a folder, or a task: copying, induction, mqar (mqar:pairs=8,vocab=256)"""

    steps: int | None = None
    """bound: optimizer steps; 600 for tiny and 20,000 for small where no bound is given"""
    tokens: float | None = None
    """bound: training tokens"""
    flops: float | None = None
    """bound: training FLOPs, as the ledger counts them"""
    minutes: float | None = None
    """bound: wall-clock minutes of training, evaluation included"""

    context: int = 256
    """tokens per sequence"""
    batch_size: int = 8
    """sequences per forward pass"""
    accumulate: int = 1
    """forward passes per optimizer step"""
    lr: float = 2e-3
    """peak learning rate of AdamW"""
    schedule: str = "cosine"
    """cosine (to a tenth), wsd (stable, then to zero over the last fifth) or constant"""
    warmup: int = 50
    """steps over which the learning rate rises"""
    weight_decay: float = 0.1
    """of matrices; norms, biases, A_log and D never decay"""
    clip: float = 1.0
    """largest norm of the gradient; 0: any"""
    seed: int = 0
    """of the weights and of the order of the data"""

    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: str = "auto"
    """auto (bfloat16 autocast on GPUs that have it), float32 or bfloat16"""
    compile: bool = False
    """torch.compile the training step"""

    eval_every: int = 100
    """steps between validations, each followed by a checkpoint; 0: only at the end"""
    eval_batches: int = 8
    """batches of a validation"""
    sample_every: int = 0
    """steps between samples; 0: only at the end"""
    prompt: str = "import "
    """what the samples continue"""
    log_every: int = 10
    """steps between lines of log.jsonl"""
    out: Path | None = None
    """folder of the run, new or empty; by default runs/MODEL (runs/custom with other layers), or the next free name"""
    resume: Path | None = None
    """folder of a run to go on with; its options hold, bounds too (--steps None lifts one), and only bounds, device and
    reporting may be changed"""


TRAINING = {  # size -> the options that differ from the defaults
    "tiny": {},
    "small": {"context": 1024, "batch_size": 32, "lr": 6e-4, "warmup": 500, "eval_every": 1000},
}
DEFAULT_STEPS = {"tiny": 600, "small": 20_000}  # where no bound is given
BOUNDS = ("steps", "tokens", "flops", "minutes")
CHANGEABLE = {*BOUNDS, "impl", "device", "dtype", "compile", "eval_every", "eval_batches", "sample_every", "prompt",
              "log_every", "resume"}  # fmt: skip


def main(options: Options) -> None:
    check(options)
    keep_freed_memory()
    device = pick_device(options.device)
    data = open_data(options.data, options.context)
    if 0 < options.config.vocab < data.vocab:
        raise InputError("vocab", options.config.vocab, f"{data.vocab} or more, for that many tokens are in the data")
    config = replace(options.config, vocab=options.config.vocab or data.vocab)

    torch.manual_seed(options.seed)
    model = LM(config).to(device)
    impl = {name: choose(config.impl, name, device) for m in model.modules() for name in getattr(m, "operations", ())}
    bfloat16 = use_bfloat16(options.dtype, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    optimizer = adamw(model, options.lr, options.weight_decay)
    loss_function = model.loss
    if options.compile:
        torch._dynamo.config.capture_dynamic_output_shape_ops = True  # routed tokens are counted inside the graph
        loss_function = torch.compile(model.loss, fullgraph=True)

    cost = ledger(config, options.context)
    tokens_per_step = options.batch_size * options.accumulate * options.context
    last_step = count_steps(options, tokens_per_step, cost.training_flops)
    if options.resume:
        run, done = options.resume, checkpoint.load(options.resume, model, optimizer)
        if done.get("data", data.fingerprint) != data.fingerprint:
            raise InputError("data", f"{options.data}: {data.fingerprint}", f"what {run} was started with: {done['data']}")
        checkpoint.forget_after(run, done["step"])
    else:
        run, done = new_folder(options), {"step": 0, "seconds": 0.0}
    checkpoint.save_options(run, asdict(replace(options, config=config, out=None, resume=None)))
    step = done["step"]
    print(f"model    {label(options)}: {config.layers}")
    print(f"ledger   {cost}")
    paths = ", ".join(f"{name}: {path}" for name, path in impl.items())
    print(f"runs on  {device.type}, {'bfloat16 autocast' if bfloat16 else 'float32'}; {paths}")
    print(f"data     {options.data}, {tokens_per_step} tokens a step")
    bounds = [f"{last_step} steps"] * (last_step < math.inf) + [f"{options.minutes} minutes"] * bool(options.minutes)
    print(f"run      {run}, from step {step}, to {' or '.join(bounds)}", flush=True)

    interrupted, at_interrupt = threading.Event(), signal.getsignal(signal.SIGINT)

    def stop(*_):  # after the step; a second Ctrl-C does not wait for it
        interrupted.set()
        signal.signal(signal.SIGINT, at_interrupt)

    signal.signal(signal.SIGINT, stop)
    bar = tqdm(total=1.0, bar_format="{percentage:3.0f}% |{bar:20}| {elapsed}<{remaining} {postfix}", mininterval=0.5)
    start = time.perf_counter() - done["seconds"]
    lap, lap_step, losses = time.perf_counter(), step, []

    while not interrupted.is_set():
        seconds = time.perf_counter() - start
        progress = max(step / last_step, seconds / 60 / options.minutes if options.minutes else 0)
        if progress >= 1:
            break
        rate = learning_rate(options.lr, options.schedule, step, options.warmup, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for part in range(options.accumulate):
            tokens, targets = data.batch(options.seed, step * options.accumulate + part, options.batch_size)
            with autocast:
                loss, parts = loss_function(tokens.to(device), targets.to(device))
            (loss / options.accumulate).backward()
            losses.append(parts["cross_entropy"])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        step += 1
        progress = max(step / last_step, progress)

        if step % options.log_every == 0 or step == last_step:
            mean = torch.stack(losses).mean().item()
            speed = (step - lap_step) * tokens_per_step / (time.perf_counter() - lap)
            lap, lap_step, losses = time.perf_counter(), step, []
            spent = {"tokens": step * tokens_per_step, "flops": step * tokens_per_step * cost.training_flops}
            measured = {"loss": mean, "grad_norm": norm.item(), "lr": rate, "tokens_per_second": speed}
            layers = {name: value.item() for name, value in parts.items() if name != "cross_entropy"} | model.observations()
            refuse_nan(model, step, run)
            write_log(run, {"step": step, "seconds": lap - start, **spent, **measured, **layers})
            bar.set_postfix_str(f"step {step}, loss {mean:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update(min(progress, 1.0) - bar.n)
        if options.eval_every and step % options.eval_every == 0 and step < last_step:
            refuse_nan(model, step, run)
            report(run, evaluate(model, data, options, autocast), step, time.perf_counter() - start, bar.write)
            now = {"step": step, "seconds": time.perf_counter() - start, "data": data.fingerprint}
            checkpoint.save(run, model, optimizer, now)
            lap, lap_step = time.perf_counter(), step
        if options.sample_every and step % options.sample_every == 0 and step < last_step:
            bar.write(sample(model, data, options.prompt))
            lap, lap_step = time.perf_counter(), step

    bar.close()
    signal.signal(signal.SIGINT, at_interrupt)
    seconds = time.perf_counter() - start
    refuse_nan(model, step, run)
    checkpoint.save(run, model, optimizer, {"step": step, "seconds": seconds, "data": data.fingerprint})
    if interrupted.is_set():
        print(f"\ninterrupted at step {step} and saved; to go on: python train.py --resume {run}")
        sys.exit(130)
    report(run, evaluate(model, data, options, autocast), step, seconds, print)
    print(sample(model, data, options.prompt))
    print(f"\nsaved in {run}; more of it: python -m minimodels.sample {run} --prompt {options.prompt!r}")


@torch.no_grad()
def evaluate(model: LM, data: Text | Task, options: Options, autocast: torch.autocast) -> dict[str, float]:
    """Loss and metric over the held-out batches, in evaluation mode: mixture-of-depths decides causally there."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for tokens, targets in data.validation(options.batch_size, options.eval_batches):
        device = model.embedding.weight.device
        tokens, targets = tokens.to(device), targets.to(device)
        with autocast:
            logits, _ = model(tokens)
        loss += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        right += (logits.argmax(-1) == targets).sum()
        count += (targets != IGNORE).sum()
    model.train()
    nats = float(loss / count)
    scores = {"validation_loss": nats, "accuracy": float(right / count)}
    return scores | {"bits_per_byte": nats / math.log(2)} if isinstance(data, Text) else scores


def report(run: Path, scores: dict[str, float], step: int, seconds: float, write: Callable[[str], object]) -> None:
    """Put the scores of a validation into the log and before the reader."""
    write_log(run, {"step": step, "seconds": seconds, **scores})
    bits = f"{scores['bits_per_byte']:.3f} bits per byte, " if "bits_per_byte" in scores else ""
    write(f"step {step}: validation {bits}{scores['accuracy']:.1%} right")


def sample(model: LM, data: Text | Task, prompt: str) -> str:
    """200 tokens of text, or why there are none."""
    if not isinstance(data, Text):
        return "no sample: a task has answers, not text"
    model.eval()
    if not model.causal:
        text = "no sample: this model routes over the whole sequence, which does not exist yet when generating"
    else:
        start = Bytes().encode(prompt)
        tokens = (int(token) for token in generate(model, [start], 200, Sampling(temperature=0.7)))
        text = "--- sample ---\n" + "".join(Bytes().stream(start, tokens))
    model.train()
    return text


def refuse_nan(model: LM, step: int, run: Path) -> None:
    """Stop before a broken model is saved over a whole one."""
    if not sum(parameter.detach().sum() for parameter in model.parameters()).isfinite():
        kept = f"the last checkpoint is whole: --resume {run}" if (run / checkpoint.FILE).exists() else "nothing was saved"
        sys.exit(f"the weights are not finite at step {step}; a lower lr may help; {kept}")


def write_log(run: Path, record: dict) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def parse() -> Options:
    """The command line, over the defaults of the preset that it names or the options of the run that it resumes."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--size", "--resume"):
        first.add_argument(name)
    named, _ = first.parse_known_args()
    if named.resume is None:
        model = "transformer" if named.model is None else named.model
        size = "tiny" if named.size is None else named.size
        return tyro.cli(Options, default=Options(preset(model, size), model, size, **TRAINING[size]), description=__doc__)

    saved = read_options(Path(named.resume))
    options = tyro.cli(Options, default=saved, description=__doc__)
    before, after = ({**asdict(each), **asdict(each.config)} for each in (saved, options))
    for name in before.keys() - CHANGEABLE - {"config"}:
        if before[name] != after[name]:
            raise InputError(name, after[name], f"{before[name]!r}, with which {saved.resume} was started")
    return options


def read_options(run: Path) -> Options:
    """The options that a run was started with, or last resumed with."""
    try:
        saved = json.loads((run / "options.json").read_text())
        options = Options(**{**saved, "config": Config(**saved["config"]), "out": None, "resume": run})
        check(options)
        return options
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError("resume", str(run), f"the folder of a training run ({error})") from None


def check(options: Options) -> None:
    """Refuse what cannot be meant before anything is read or written."""
    check_types(options)
    for name in (*BOUNDS, "context", "batch_size", "accumulate", "lr", "eval_batches", "log_every"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(name, value, "a number above 0")
    for name in ("warmup", "weight_decay", "clip", "eval_every", "sample_every", "seed"):
        if not 0 <= getattr(options, name) < 2**63:
            raise InputError(name, getattr(options, name), "0 or more, below 2^63")
    if options.schedule not in SCHEDULES:
        raise InputError("schedule", options.schedule, ", ".join(SCHEDULES))
    if options.dtype not in ("auto", "float32", "bfloat16"):
        raise InputError("dtype", options.dtype, "auto, float32 or bfloat16")
    if not options.prompt:
        raise InputError("prompt", options.prompt, "at least one character")


def use_bfloat16(dtype: str, device: torch.device) -> bool:
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return capable if dtype == "auto" else dtype == "bfloat16"


def count_steps(options: Options, tokens_per_step: int, flops_per_token: float) -> float:
    """The step that the first of the bounds on steps, tokens and FLOPs allows; infinite where only minutes bound."""
    bounds = [
        math.inf if options.steps is None else options.steps,
        math.inf if options.tokens is None else options.tokens // tokens_per_step,
        math.inf if options.flops is None else options.flops // (tokens_per_step * flops_per_token),
    ]
    if min(bounds) < 1:
        raise InputError("tokens, flops", (options.tokens, options.flops), f"enough for one step of {tokens_per_step} tokens")
    if min(bounds) == math.inf:
        return DEFAULT_STEPS[options.size] if options.minutes is None else math.inf
    return int(min(bounds))


def label(options: Options) -> str:
    """What a run is called: its preset, or "custom" if it has other layers."""
    return options.model if options.config.layers == preset(options.model, options.size).layers else "custom"


def new_folder(options: Options) -> Path:
    """The folder of a new run: the one named, if it is empty, or the first free name."""
    if options.out is None:
        names = (Path("runs") / f"{label(options)}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 10_000))))
        run = next(name for name in names if not name.exists())
    else:
        run = options.out
    try:
        if os.path.lexists(run) and (not run.is_dir() or any(run.iterdir())):
            raise InputError("out", str(run), f"a new or empty folder; to go on with the run in it: --resume {run}")
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("out", str(run), f"a folder that can be made ({error.strerror})") from None
    return run


if __name__ == "__main__":
    run_command(main, parse)
