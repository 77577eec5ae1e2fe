"""Trains small models for a comparison, with the same data, schedule and evaluation for all. Only
training time is counted."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from minimodels import LM, Config
from minimodels.command import has_bfloat16
from minimodels.data.source import Source
from minimodels.data.text import open_data
from minimodels.ledger import ledger
from minimodels.ops.linear_cross_entropy import IGNORE
from minimodels.training.evaluate import evaluate
from minimodels.training.optim import adamw, learning_rate
from minimodels.training.step import set_learning_rate, training_step

CLIP = 1.0  # largest norm of a gradient

PROBED, SCORED = 4, 64  # batches per evaluation: during training, and at the end


@dataclass
class Run:
    """One model and how it is trained."""

    model: str
    config: Config
    data: str
    context: int
    steps: int
    batch: int = 32
    lr: float = 2e-3
    change: Callable[[LM], None] = lambda model: None
    """changes the model before training"""


def train(
    run: Run, seed: int, probes: int, device: torch.device, bar: tqdm
) -> tuple[LM, list[dict[str, float]]]:
    """The trained model, and what was recorded during training. Seconds count only training."""
    data = open_data(run.data, run.context)
    torch.manual_seed(seed)
    model = LM(replace(run.config, vocab=data.vocab))
    run.change(model)
    model.to(device)
    optimizer = adamw(model, run.lr, 0.1)
    flops = ledger(model.config, run.context).training_flops
    records, seconds, autocast = [], 0.0, precision(device)
    for step in range(run.steps):
        start = time.perf_counter()
        batch = tuple(part.to(device) for part in data.batch(seed, step, run.batch))
        rate = learning_rate(run.lr, "cosine", step, run.steps // 20, step / run.steps)
        set_learning_rate(optimizer, rate)
        training_step(model, optimizer, [batch], autocast, CLIP)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        bar.update(run.batch * run.context)
        # as many probes as requested, evenly spaced, the last at the end
        if (step + 1) * probes // run.steps > step * probes // run.steps:
            overload = model.observations().get("overload")
            seen = (step + 1) * run.batch * run.context
            record = {"step": step + 1, "tokens": seen, "flops": flops * seen, "seconds": seconds}
            batches = SCORED if step + 1 == run.steps else PROBED
            record |= score(model, data, run.batch, batches)
            record |= {"targets": count_targets(data, run.batch, batches)}
            record |= {"overload": statistics.mean(overload)} if overload else {}
            records.append(record)
    return model, records


def score(model: LM, data: Source, batch: int, batches: int) -> dict[str, float]:
    """Bits per target and the fraction of right answers, in evaluation mode and full precision,
    always on the same batches."""
    full = torch.autocast(model.device.type, enabled=False)
    found = evaluate(model, data, batch, batches, full)
    return {"bits": found["validation_loss"] / math.log(2), "accuracy": found["accuracy"]}


def count_targets(data: Source, batch: int, batches: int) -> int:
    """The number of targets in the batches of `score`."""
    return sum(int((targets != IGNORE).sum()) for _, targets in data.validation(batch, batches))


def precision(device: torch.device) -> torch.autocast:
    """Autocast for training: bf16 on a GPU that supports it, as in train.py."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))
