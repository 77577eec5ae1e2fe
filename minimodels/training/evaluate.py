"""The score of a model on held-out text, or on a task."""

from __future__ import annotations

import math

import torch

from minimodels.data.source import Source
from minimodels.data.tasks import Task
from minimodels.lm import LM
from minimodels.ops.linear_cross_entropy import tally
from minimodels.ranks import total
from minimodels.training.parallel import own


@torch.no_grad()
def evaluate(
    model: LM,
    data: Source,
    batch_size: int,
    batches: int,
    autocast: torch.autocast,
    pieces: int = 1,
) -> dict[str, float]:
    """The loss in nats and the fraction of right answers over the held-out batches; for
    text, also the bits per byte. Each rank scores its own part
    of a batch; `pieces` ranks share each row. The model is in evaluation mode, in which
    mixture-of-depths decides causally."""
    model.eval()
    counts, device = torch.zeros(3), model.device
    for batch in data.validation(batch_size, batches):
        tokens, targets, *packed = (part.to(device) for part in own(batch, pieces))
        packed = dict(zip(("starts", "positions"), packed, strict=False))
        with autocast:
            logits, _ = model(tokens, **packed)
        counts = counts.to(device) + tally(logits, targets)
    model.train()
    loss, right, count = total(counts).tolist()
    nats = loss / count
    scores = {"validation_loss": nats, "accuracy": right / count}
    if isinstance(data, Task):
        return scores
    bits = nats / math.log(2) / data.bytes_per_token(batch_size, batches)
    return scores | {"bits_per_byte": bits}
