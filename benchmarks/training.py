"""Training small models for a comparison: the same data, schedule and evaluation for all; time counts training alone."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minimodels import LM, Config
from minimodels.command import has_bfloat16
from minimodels.data.tasks import Task
from minimodels.data.text import Text, open_data
from minimodels.ledger import ledger
from minimodels.ops.linear_cross_entropy import tally
from minimodels.training.optim import adamw, learning_rate

PROBED, SCORED = (
    4,
    64,
)  # batches by which a model is judged: while it trains, where a few do, and at the end


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
    """what is done to the model before training"""


def train(
    run: Run, seed: int, probes: int, device: torch.device, bar: tqdm
) -> tuple[LM, list[dict[str, float]]]:
    """The trained model and what was recorded along the way. Seconds count training alone."""
    data = open_data(run.data, run.context)
    torch.manual_seed(seed)
    model = LM(replace(run.config, vocab=data.vocab))
    run.change(model)
    model.to(device)
    optimizer = adamw(model, run.lr, 0.1)
    flops = ledger(model.config, run.context).training_flops
    records, seconds = [], 0.0
    for step in range(run.steps):
        start = time.perf_counter()
        tokens, targets = (part.to(device) for part in data.batch(seed, step, run.batch))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.lr, "cosine", step, run.steps // 20, step / run.steps)
        training_step(model, optimizer, tokens, targets)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        bar.update(run.batch * run.context)
        # as many probes as asked for, evenly spaced, the last at the end
        if (step + 1) * probes // run.steps > step * probes // run.steps:
            overload = model.observations().get("overload")
            seen = (step + 1) * run.batch * run.context
            record = {"step": step + 1, "tokens": seen, "flops": flops * seen, "seconds": seconds}
            record |= evaluate(
                model, data, device, run.batch, SCORED if step + 1 == run.steps else PROBED
            )
            record |= {"overload": statistics.mean(overload)} if overload else {}
            records.append(record)
    return model, records


def training_step(
    model: LM,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    targets: Tensor,
    loss_function: Callable | None = None,
) -> Tensor:
    """One step as train.py makes it, in bf16 on a GPU that has it; returns the loss, detached.

    tokens, targets: (B, T). loss_function: the model's, compiled.
    """
    device = tokens.device
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
        loss, _ = (loss_function or model.loss)(tokens, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    model.after_step()
    return loss.detach()


@torch.no_grad()
def evaluate(
    model: LM,
    data: Text | Task,
    device: torch.device,
    batch: int,
    batches: int,
    watch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Bits per target, the fraction that is right and the number of targets, in evaluation mode, on the same batches always;
    `watch` is called after each."""
    model.eval()
    total = 0.0
    for tokens, targets in data.validation(batch, batches):
        logits, _ = model(tokens.to(device))
        watch()
        total += tally(logits, targets.to(device))
    model.train()
    loss, right, count = total.tolist()
    return {"bits": loss / count / math.log(2), "accuracy": right / count, "targets": int(count)}
