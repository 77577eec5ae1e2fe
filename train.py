"""Train any model of minimodels on any text or task.

    python train.py                              a small transformer on Python's own source
    python train.py --model mamba                the same with another architecture
    python train.py --layers "mamba mlp attention(window=64) mlp" --data FILE --minutes 10
    python train.py --resume runs/transformer    continue where a run stopped
    torchrun --nproc-per-node 8 train.py         train on eight GPUs

A run ends when it reaches the first of its bounds: steps, tokens, FLOPs or minutes. It writes its
options, checkpoints and log.jsonl into a folder. Ctrl-C saves and stops. On a CPU a resumed run
gives the same bits as one that was never stopped, unless it is bounded by --minutes, because then
the schedule follows the clock.
"""

from __future__ import annotations

import minimodels  # noqa: F401 (it comes first, so that Ctrl-C ends the other imports at once)

# isort: split
import shlex
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch.distributed.elastic.multiprocessing.errors import record as recorded
from tqdm import tqdm

from minimodels.command import (
    escaped,
    has_bfloat16,
    keep_freed_memory,
    pick_device,
    require_compiler,
    run_command,
    stopped_by_signals,
)
from minimodels.config import Config
from minimodels.data.source import Source
from minimodels.data.tasks import Task
from minimodels.data.text import open_data
from minimodels.errors import InputError
from minimodels.files import locked
from minimodels.generate import Sampling, complete
from minimodels.layers import operations
from minimodels.ledger import ledger
from minimodels.lm import LM
from minimodels.memory import check_memory
from minimodels.pace import Pace, Threads, pick_threads
from minimodels.paths import choose
from minimodels.ranks import alone, from_first, largest, rank, world
from minimodels.training import parallel
from minimodels.training.budget import Budget
from minimodels.training.fit import fill_memory
from minimodels.training.initial import copy_weights
from minimodels.training.optim import adamw, learning_rate
from minimodels.training.options import Options, changes, label, new_folder, parse, refuse_used
from minimodels.training.run import Run
from minimodels.training.wavefront import check_causal


def main(options: Options) -> None:
    """Train a model, or continue its run, and report its validation scores and a sample."""
    keep_freed_memory()
    device = parallel.start(pick_device(options.device))
    if options.out is not None:
        refuse_used(options.out)  # before the data is read, which takes time
    data = open_source(options)
    threads = pick_threads(options.threads, device)
    options = replace(options, config=with_vocab(options, data), threads=threads.count)
    bfloat16 = has_bfloat16(device) if options.dtype == "auto" else options.dtype == "bfloat16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    notes = []
    if options.batch_size == "auto":
        options = fill_memory(options, options.config, device, autocast)
        passes = f"{options.accumulate} pass{'es' if options.accumulate > 1 else ''}"
        notes.append(f"memory   a step fits in {passes} of {options.batch_size} sequences")

    torch.manual_seed(options.seed)
    model = LM(options.config).to(device)
    model.tokenizer = None if isinstance(data, Task) else data.tokenizer
    if options.init and not options.resume:
        copy_weights(model, options.init)
    check_causal(model, options.context_parallel)
    if options.compile:
        require_compiler(device)
    optimizer = adamw(model, options.lr, options.weight_decay)
    budget = Budget(options, options.config, data, {})
    machine = describe_machine(model, threads, bfloat16)
    if options.init and not options.resume:
        notes.append(f"init     the weights of {options.init}")
    notes += [f"changed  {change}" for change in changes(options)]
    if memory := check_fit(model, budget, autocast):
        notes.append(f"memory   {memory}")

    folder = options.resume or from_first(lambda: new_folder(options))
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(locked(folder)))
        stopped = stack.enter_context(stopped_by_signals())
        parallel.distribute(model, optimizer, options.shard)
        run = Run(folder, options, model, optimizer, data, budget, autocast)
        introduce(run, machine, notes)
        interrupted = train(run, stopped, threads)
        if interrupted:
            run.save()
        else:
            scores = run.validate_and_save()
            (interrupted,) = largest(stopped.is_set())
    again = shlex.quote(str(folder))
    if interrupted:
        step = run.budget.step
        print(
            f"\ninterrupted at step {step} and saved; to continue: python train.py --resume {again}"
        )
        parallel.stop(130)
    print(f"saved in {folder}", flush=True)
    print(scores)
    print(text := sample(model, data, options.prompt))
    if not text.startswith("no sample"):
        prompt = shlex.quote(options.prompt)
        print(f"\nmore of it: python -m minimodels.sample {again} --prompt {prompt}")
    parallel.stop()


def train(run: Run, stopped: threading.Event, threads: Threads) -> bool:
    """Take steps until a bound is reached or a signal arrives. Returns whether a signal arrived."""
    options = run.options
    pace = Pace(threads, ledger(options.config, options.context).training_flops)
    if run.budget.ended(run.seconds):
        print(
            f"the run has reached its bound, {run.budget.reached(run.seconds)}; a larger one continues it"
        )
    bar_format = "{percentage:3.0f}% |{bar:20}| {elapsed}<{remaining} {postfix}"
    # seconds between updates: more in a file, which keeps every update
    wait = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=1.0, bar_format=bar_format, mininterval=wait, disable=rank() > 0) as bar:
        # all ranks stop together, by the clock of the slowest
        interrupted, seconds = largest(stopped.is_set(), run.seconds)
        while not interrupted and not run.budget.ended(seconds):
            step, progress = run.budget.step, run.budget.progress(seconds)
            rate = learning_rate(options.lr, options.schedule, step, options.warmup, progress)
            taken = run.step(run.budget.shape(progress), rate)

            interrupted, seconds = largest(stopped.is_set(), run.seconds)
            step, ended = run.budget.step, run.budget.ended(seconds)
            if step % options.log_every == 0 or ended:
                record = run.log(taken, rate)
                speed = record["tokens_per_second"]
                told = f"step {step}, loss {record['loss']:.3f} nats, {speed:,.0f} tokens/s"
                bar.set_postfix_str(told, refresh=False)
                bar.update(run.budget.progress(seconds) - bar.n)
                if not ended and (remark := pace.remark(speed)):
                    bar.write(f"note: {remark}")
            if options.eval_every and step % options.eval_every == 0 and not ended:
                bar.write(run.validate_and_save())
            if options.sample_every and step % options.sample_every == 0 and not ended:
                run.refuse_bad_steps()
                bar.write(sample(run.model, run.data, options.prompt))
                run.begin_lap()
    run.refuse_bad_steps()
    return bool(interrupted)


def sample(model: LM, data: Source, prompt: str) -> str:
    """200 tokens of text, or a sentence that says why there are none. Only rank 0 generates."""
    if isinstance(data, Task):
        return "no sample: a task has answers, not text"
    model.eval()
    if model.causal:
        whole, written = parallel.gathered(model), ""
        if rank() == 0:
            written = complete(whole.eval(), prompt, 200, Sampling(temperature=0.7), seed=0)
        text = f"--- sample ---\n{escaped(prompt + written)}"
    else:
        text = "no sample: this model routes over the whole sequence, and so it cannot generate"
    model.train()
    return text


def open_source(options: Options) -> Source:
    """Open the data. A resumed run uses the tokenizer that is saved in its folder."""
    kept = options.resume is not None and options.tokenizer != "bytes"
    tokenizer = str(options.resume) if kept else options.tokenizer
    try:
        return open_data(
            options.data, options.context, tokenizer, options.field, options.cache, options.pack
        )
    except InputError as error:
        if options.resume is None or error.field != "data":
            raise
        accepted = (
            f"the run's text; if it has moved, give its new path as --data ({error.accepted})"
        )
        raise InputError("data", error.value, accepted) from None


def with_vocab(options: Options, data: Source) -> Config:
    """The model's configuration. Its vocabulary is the data's unless a larger one is set."""
    if 0 < options.config.vocab < data.vocab:
        accepted = f"{data.vocab} or more, because the data has token ids up to {data.vocab - 1}"
        raise InputError("vocab", options.config.vocab, accepted)
    return replace(options.config, vocab=options.config.vocab or data.vocab)


def check_fit(model: LM, budget: Budget, autocast: torch.autocast) -> str:
    """A note if a step might not fit in memory, otherwise "". Raises InputError if the ranks cannot
    have equal parts of a batch, if the model cannot read texts as long as those at the end of the
    run, or if a step certainly does not fit."""
    options = budget.options
    if budget.last.context > budget.first.context:
        with torch.no_grad(), alone():
            model.eval()(
                torch.zeros(1, budget.last.context, dtype=torch.int64, device=model.device)
            )
        model.train()
    for shape in (budget.first, budget.last, budget.largest):  # memory is checked for the largest
        own = parallel.own_shape(shape.batch_size, shape.context, options.context_parallel)
    with alone():  # one rank's trial must not wait for the others
        exact = not (options.compile or options.checkpoint_activations)
        return check_memory(model, *own, autocast, exact)


def describe_machine(model: LM, threads: Threads, bfloat16: bool) -> str:
    """The device, its threads, the dtype, and the path of each operation. Raises InputError if a
    path cannot be taken on the device."""
    impl, device = model.config.impl, model.device
    paths = ", ".join(f"{name}: {choose(impl, name, device)}" for name in operations(model))
    why = f" ({threads.reason})" if threads.reason else ""
    cpu = f", threads: {threads.count}{why}" if device.type == "cpu" else ""
    several = f", {world()} processes" if world() > 1 else ""
    dtype = "bfloat16 autocast" if bfloat16 else "float32"
    return f"{device.type}{cpu}{several}, {dtype}; {paths}"


def introduce(run: Run, machine: str, notes: list[str]) -> None:
    """Print what is trained, on what, and for how long."""
    options, budget = run.options, run.budget
    print(f"model    {label(options)}: {options.config.layers}")
    print(f"ledger   {ledger(options.config, options.context)}")
    print(f"runs on  {machine}")
    print(f"data     {run.data.describe()}, {budget.describe_steps()}")
    for note in notes:
        print(note)
    print(f"run      {run.folder}, from step {budget.step}, to {budget.describe()}", flush=True)


if __name__ == "__main__":
    run_command(recorded(main), lambda: parse(__doc__))
