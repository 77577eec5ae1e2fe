"""A training run in progress: the model, what it has seen, its clock, and its folder."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from minimodels.data.source import Source
from minimodels.lm import LM
from minimodels.ranks import averaged, rank, world
from minimodels.training import checkpoint, parallel
from minimodels.training.blocks import compiled_loss, recompute
from minimodels.training.budget import Budget, Shape
from minimodels.training.evaluate import evaluate
from minimodels.training.guard import Guard, mean_of_finite, refuse_bad_step, refuse_score
from minimodels.training.log import forget_after, write_log, write_scores
from minimodels.training.options import Options
from minimodels.training.step import Step, set_learning_rate, training_step
from minimodels.training.wavefront import split_context


class Run:
    """A run after any number of steps.

    model, optimizer: spread over the ranks. budget: what the run may spend; nothing is spent yet.
    A resumed run continues from its newest undamaged checkpoint, and raises InputError if there is
    none. All ranks call every method together; rank 0 writes.
    """

    def __init__(
        self,
        folder: Path,
        options: Options,
        model: LM,
        optimizer: torch.optim.Optimizer,
        data: Source,
        budget: Budget,
        autocast: torch.autocast,
    ):
        self.folder, self.options, self.data, self.budget = folder, options, data, budget
        self.model, self.optimizer, self.autocast = model, optimizer, autocast
        self.guard = Guard(model, options.skip_bad_steps)
        self.losses: list[torch.Tensor] = []  # not yet logged
        self.shapes: dict[int, Shape] = {}  # of the steps since the guard was last checked
        seconds = self.resume() if options.resume else 0.0
        if rank() == 0:
            if not options.resume and options.tokenizer != "bytes":
                data.tokenizer.save(folder)
            checkpoint.save_options(folder, asdict(replace(options, out=None, resume=None)))
        self.loss = model.loss
        if options.compile:
            self.loss = compiled_loss(model, by_block=world() > 1)
        if options.checkpoint_activations:
            recompute(model)
        split_context(model, options.context_parallel)
        self.started = time.perf_counter() - seconds
        self.begin_lap()

    def resume(self) -> float:
        """Continue from the newest undamaged checkpoint. Returns the seconds spent before it."""
        done = checkpoint.resume(self.folder, self.model, self.optimizer, self.data.fingerprint)
        self.budget = Budget(self.options, self.options.config, self.data, done)
        device = self.model.device
        self.losses = [torch.tensor(loss, device=device) for loss in done.get("losses", [])]
        if rank() == 0:
            forget_after(self.folder, done["step"])
        return done["seconds"]

    @property
    def seconds(self) -> float:
        """The seconds that the run has taken, including those before it was resumed."""
        return time.perf_counter() - self.started

    def begin_lap(self) -> None:
        """Measure the speed from now on."""
        self.lap = time.perf_counter(), self.budget.tokens

    def batches(self, shape: Shape) -> list[tuple]:
        """This rank's part of the batches of a step."""
        pieces = self.options.context_parallel
        drawn = (parallel.own(batch, pieces) for batch in self.budget.draw(shape))
        return [tuple(part.to(self.model.device) for part in batch) for batch in drawn]

    def step(self, shape: Shape, rate: float) -> Step:
        """Take the next step."""
        set_learning_rate(self.optimizer, rate)
        batches = self.batches(shape)
        taken = training_step(
            self.model, self.optimizer, batches, self.autocast, self.options.clip, self.loss, self.guard
        )  # fmt: skip
        self.losses += taken.losses
        self.shapes[self.budget.step] = shape
        self.budget.spend(shape)
        return taken

    def refuse_bad_steps(self) -> None:
        """Exit with an explanation if there were too many bad steps. Waits for the device."""
        failing = self.guard.failing(self.budget.step)
        again = () if failing is None else self.batches(self.shapes[failing])
        refuse_bad_step(failing, self.model, again, self.autocast, self.folder)
        self.shapes.clear()

    def log(self, taken: Step, rate: float) -> dict[str, float]:
        """Write what was measured since the last record, and return it."""
        self.refuse_bad_steps()
        mean, parts = averaged((mean_of_finite(self.losses), taken.parts))
        start, tokens = self.lap
        record = {
            "loss": mean.item(),
            "grad_norm": taken.norm.item(),
            "lr": rate,
            "tokens_per_second": (self.budget.tokens - tokens) / (time.perf_counter() - start),
            "skipped": self.guard.bad.item(),
        }
        record |= {name: loss.item() for name, loss in parts.items() if name != "cross_entropy"}
        record |= self.model.observations()
        if rank() == 0:
            write_log(self.folder, {**self.budget.record(self.seconds), **record})
        self.losses = []
        self.begin_lap()
        return record

    def validate_and_save(self) -> str:
        """Score the model on held-out data, save both, and return a line to print."""
        self.refuse_bad_steps()
        options = self.options
        scores = evaluate(
            self.model, self.data, options.batch_size, options.eval_batches, self.autocast,
            options.context_parallel,
        )  # fmt: skip
        refuse_score(scores["validation_loss"], self.folder)
        if rank() == 0:
            write_scores(self.folder, {**self.budget.record(self.seconds), **scores})
        self.save(scores.get("bits_per_byte", scores["validation_loss"]))
        self.begin_lap()
        bits = f"{scores['bits_per_byte']:.3f} bits per byte, " if "bits_per_byte" in scores else ""
        return f"step {self.budget.step}: validation {bits}{scores['accuracy']:.1%} right"

    def save(self, score: float | None = None) -> None:
        """Write a checkpoint. score: of the model on held-out data, lower is better."""
        pending = [loss.item() for loss in averaged(self.losses) if loss.isfinite()]
        progress = {**self.budget.record(self.seconds), "losses": pending}
        progress["data"] = self.data.fingerprint
        keep = self.options.keep
        checkpoint.save(self.folder, self.model, self.optimizer, progress, score, keep)
