"""Train any model of minimodels on any text or task.

    python train.py                              a small transformer on Python's own source
    python train.py --model mamba                the same with another architecture
    python train.py --layers "mamba mlp attention(window=64) mlp" --data FILE --minutes 10
    python train.py --resume runs/transformer    continue where a run stopped
    torchrun --nproc-per-node 8 train.py         the same on eight GPUs

A run ends when it reaches the first of its bounds: steps, tokens, FLOPs or minutes. It writes its
options, checkpoints and log.jsonl into a folder. Ctrl-C saves and stops. On a CPU a resumed run
gives the same bits as one that was never stopped, unless it is bounded by --minutes, because then
the schedule follows the clock.
"""

from __future__ import annotations

import minimodels  # noqa: F401, first, so that Ctrl-C ends the other imports at once

# isort: split
import shlex
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record as recorded
from tqdm import tqdm

from minimodels.command import (
    has_bfloat16,
    keep_freed_memory,
    pick_device,
    require_compiler,
    run_command,
    stopped_by_signals,
)
from minimodels.data.source import Source
from minimodels.data.tasks import Task
from minimodels.data.text import open_data
from minimodels.errors import InputError
from minimodels.files import locked
from minimodels.generate import Sampling, complete
from minimodels.layers import choose, operations
from minimodels.ledger import ledger
from minimodels.lm import LM
from minimodels.memory import check_memory
from minimodels.pace import Pace, pick_threads
from minimodels.ranks import alone, averaged, from_first, largest, rank, world
from minimodels.training import checkpoint, parallel
from minimodels.training.blocks import compiled_loss, recompute
from minimodels.training.budget import Budget, Shape
from minimodels.training.evaluate import evaluate
from minimodels.training.fit import fill_memory
from minimodels.training.guard import Guard, mean_of_finite, refuse_bad_step, refuse_score
from minimodels.training.initial import copy_weights
from minimodels.training.log import forget_after, write_log, write_scores
from minimodels.training.optim import adamw, learning_rate
from minimodels.training.options import Options, changes, label, new_folder, parse
from minimodels.training.step import set_learning_rate, training_step
from minimodels.training.wavefront import check_causal, split_context


def main(options: Options) -> None:
    """Train a model, or continue its run, and report its validation scores and a sample."""
    keep_freed_memory()
    device = parallel.start(pick_device(options.device))
    # a resumed run has kept its tokenizer
    kept = options.resume is not None and options.tokenizer != "bytes"
    tokenizer = str(options.resume) if kept else options.tokenizer
    data = open_data(
        options.data, options.context, tokenizer, options.field, options.cache, options.pack
    )
    if 0 < options.config.vocab < data.vocab:
        accepted = f"{data.vocab} or more, because that many tokens are in the data"
        raise InputError("vocab", options.config.vocab, accepted)
    config = replace(options.config, vocab=options.config.vocab or data.vocab)
    threads = pick_threads(options.threads, device)
    options = replace(options, config=config, threads=threads.count)
    bfloat16 = has_bfloat16(device) if options.dtype == "auto" else options.dtype == "bfloat16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    if options.batch_size == "auto":
        options = fill_memory(options, config, device, autocast)

    torch.manual_seed(options.seed)
    model = LM(config).to(device)
    if options.init and not options.resume:
        copy_weights(model, options.init)
    model.tokenizer = None if isinstance(data, Task) else data.tokenizer
    paths = {name: choose(config.impl, name, device) for name in operations(model)}
    check_causal(model, options.context_parallel)
    optimizer = adamw(model, options.lr, options.weight_decay)
    if options.compile:
        require_compiler(device)

    budget = Budget(options, config, data, {})
    for shape in (budget.first, budget.last, budget.largest):
        own = parallel.own_shape(shape.batch_size, shape.context, options.context_parallel)
    cost = ledger(config, options.context)
    pace = Pace(threads, cost.training_flops)
    with alone():  # it computes a loss, perhaps, which is of no batch
        exact = not (options.compile or options.checkpoint_activations)
        memory = check_memory(model, *own, autocast, exact)
    changed = changes(options)
    run = options.resume or from_first(lambda: new_folder(options))
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(locked(run)))
        stopped = stack.enter_context(stopped_by_signals())
        parallel.distribute(model, optimizer, options.shard)
        done = {"step": 0, "seconds": 0.0}
        if options.resume:
            done = checkpoint.resume(run, model, optimizer, data.fingerprint)
            budget = Budget(options, config, data, done)
        if rank() == 0:
            if options.resume:
                forget_after(run, done["step"])
            elif options.tokenizer != "bytes":
                data.tokenizer.save(run)
            checkpoint.save_options(run, asdict(replace(options, out=None, resume=None)))
        loss_function = model.loss
        if options.compile:
            loss_function = compiled_loss(model, by_block=world() > 1)
        if options.checkpoint_activations:
            recompute(model)
        split_context(model, options.context_parallel)
        guard = Guard(model, options.skip_bad_steps)

        chosen = ", ".join(f"{name}: {path}" for name, path in paths.items())
        why = f" ({threads.reason})" if threads.reason else ""
        cpu = f", threads: {threads.count}{why}" if device.type == "cpu" else ""
        print(f"model    {label(options)}: {config.layers}")
        print(f"ledger   {cost}")
        dtype = "bfloat16 autocast" if bfloat16 else "float32"
        several = f", {world()} processes" if world() > 1 else ""
        print(f"runs on  {device.type}{cpu}{several}, {dtype}; {chosen}")
        print(f"data     {data.describe()}, {budget.describe_steps()}")
        for change in changed:
            print(f"changed  {change}")
        print(f"run      {run}, from step {budget.step}, to {budget.describe()}", flush=True)

        if memory:
            print(f"memory   {memory}", flush=True)
        if budget.ended(done["seconds"]):
            print("the run is at its bound; --steps continues it to a later step")
        bar_format = "{percentage:3.0f}% |{bar:20}| {elapsed}<{remaining} {postfix}"
        bar = tqdm(total=1.0, bar_format=bar_format, mininterval=0.5, disable=rank() > 0)
        start = time.perf_counter() - done["seconds"]
        lap, lap_tokens = time.perf_counter(), budget.tokens
        # not yet logged
        losses = [torch.tensor(loss, device=device) for loss in done.get("losses", [])]
        shapes: dict[int, Shape] = {}  # of the steps since the last look at the guard

        def spent() -> dict[str, float]:
            return budget.record(time.perf_counter() - start)

        def batches(shape: Shape) -> list[tuple]:
            drawn = (parallel.own(each, options.context_parallel) for each in budget.draw(shape))
            return [tuple(part.to(device) for part in batch) for batch in drawn]

        def refuse() -> None:
            failing = guard.failing(budget.step)
            again = () if failing is None else batches(shapes[failing])
            refuse_bad_step(failing, model, again, autocast, run)
            shapes.clear()

        def save(score: float | None = None) -> None:
            pending = [loss.item() for loss in averaged(losses) if loss.isfinite()]
            progress = {**spent(), "losses": pending, "data": data.fingerprint}
            checkpoint.save(run, model, optimizer, progress, score, options.keep)

        def validate_and_save() -> str:
            scores = evaluate(
                model,
                data,
                options.batch_size,
                options.eval_batches,
                autocast,
                options.context_parallel,
            )
            refuse_score(scores["validation_loss"], run)
            said = report(run, spent(), scores)
            save(scores.get("bits_per_byte", scores["validation_loss"]))
            return said

        while True:
            # all ranks stop together, by the clock of the slowest
            interrupted, seconds = largest(stopped.is_set(), time.perf_counter() - start)
            step, progress = budget.step, budget.progress(seconds)
            shape = budget.shape(progress)
            if interrupted or not budget.allows(shape, seconds):
                break
            rate = learning_rate(options.lr, options.schedule, step, options.warmup, progress)
            set_learning_rate(optimizer, rate)
            taken = training_step(
                model, optimizer, batches(shape), autocast, options.clip, loss_function, guard
            )
            losses += taken.losses
            shapes[step] = shape
            budget.spend(shape)
            step, ended = budget.step, budget.ended(seconds)

            if step % options.log_every == 0 or ended:
                refuse()
                mean, parts = averaged((mean_of_finite(losses), taken.parts))
                speed = (budget.tokens - lap_tokens) / (time.perf_counter() - lap)
                lap, lap_tokens, losses = time.perf_counter(), budget.tokens, []
                record = {
                    "loss": mean.item(),
                    "grad_norm": taken.norm.item(),
                    "lr": rate,
                    "tokens_per_second": speed,
                    "skipped": guard.bad.item(),
                }
                record |= {
                    name: value.item() for name, value in parts.items() if name != "cross_entropy"
                }
                record |= model.observations()
                if rank() == 0:
                    write_log(run, {**spent(), **record})
                bar.set_postfix_str(
                    f"step {step}, loss {record['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False
                )
                bar.update(budget.progress(seconds) - bar.n)
                if remark := pace.remark(speed):
                    bar.write(f"note: {remark}")
            if options.eval_every and step % options.eval_every == 0 and not ended:
                refuse()
                bar.write(validate_and_save())
                lap, lap_tokens = time.perf_counter(), budget.tokens
            if options.sample_every and step % options.sample_every == 0 and not ended:
                refuse()
                bar.write(sample(model, data, options.prompt))
                lap, lap_tokens = time.perf_counter(), budget.tokens

        bar.close()
        refuse()
        if interrupted:
            save()
        else:
            said = validate_and_save()
            (interrupted,) = largest(stopped.is_set())
    if interrupted:
        print(
            f"\ninterrupted at step {budget.step} and saved; to continue: python train.py --resume {shlex.quote(str(run))}"
        )
        parallel.stop(130)
    print(f"saved in {run}", flush=True)
    print(said)
    print(text := sample(model, data, options.prompt))
    if not text.startswith("no sample"):
        more = f"python -m minimodels.sample {shlex.quote(str(run))} --prompt {shlex.quote(options.prompt)}"
        print(f"\nmore of it: {more}")
    parallel.stop()


def report(run: Path, spent: dict[str, float], scores: dict[str, float]) -> str:
    """Write the scores of a validation, and what was `spent` so far, to the log;
    return a line to print."""
    if rank() == 0:
        write_scores(run, {**spent, **scores})
    bits = f"{scores['bits_per_byte']:.3f} bits per byte, " if "bits_per_byte" in scores else ""
    return f"step {spent['step']}: validation {bits}{scores['accuracy']:.1%} right"


def sample(model: LM, data: Source, prompt: str) -> str:
    """200 tokens of text, or a sentence that says why there are none. Rank 0 writes the text."""
    if isinstance(data, Task):
        return "no sample: a task has answers, not text"
    model.eval()
    if not model.causal:
        text = "no sample: this model routes over the whole sequence, which does not exist yet when generating"
    else:
        whole_model = parallel.gathered(model)
        written = ""
        if rank() == 0:
            written = complete(whole_model.eval(), prompt, 200, Sampling(temperature=0.7), seed=0)
        text = f"--- sample ---\n{prompt}{written}"
    model.train()
    return text


if __name__ == "__main__":
    run_command(recorded(main), lambda: parse(__doc__))
