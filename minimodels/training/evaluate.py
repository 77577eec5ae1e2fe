"""The score of a model on held-out text, or on a task."""

from __future__ import annotations

import math

import torch

from minimodels.data.source import Source
from minimodels.data.tasks import Task
from minimodels.lm import LM
from minimodels.ops.linear_cross_entropy import tally
from minimodels.ranks import alone, total
from minimodels.training.parallel import own


@torch.no_grad()
def evaluate(
    model: LM, data: Source, batch_size: int, batches: int, autocast: torch.autocast
) -> dict[str, float]:
    """The loss in nats and the fraction of right answers over the held-out batches; for
    text, also the bits per byte. Each rank scores its own rows. The model is in evaluation mode, in which
    mixture-of-depths decides causally."""
    model.eval()
    counts, device = torch.zeros(3), model.embedding.weight.device
    for batch in data.validation(batch_size, batches):
        tokens, targets, *starts = (part.to(device) for part in own(batch))
        with autocast, alone():  # ranks may route differently, and nothing is averaged
            logits, _ = model(tokens, starts=starts[0] if starts else None)
        counts = counts.to(device) + tally(logits, targets)
    model.train()
    loss, right, count = total(counts).tolist()
    nats = loss / count
    scores = {"validation_loss": nats, "accuracy": right / count}
    if isinstance(data, Task):
        return scores
    bits = nats / math.log(2) / data.bytes_per_token(batch_size, batches)
    return scores | {"bits_per_byte": bits}
