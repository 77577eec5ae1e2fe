"""What a model learns. To add an objective, add a line to OBJECTIVES.

An objective is a module, created as `Objective(config)`. It may have parameters of its own. Its
forward takes the model, the input of the model's head (B, T, D), the targets (B, T) and the pass's
Context, and returns the loss in nats per predicted token. It adds any further losses to the
context's record, as layers do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.context import Context
from minimodels.ops.linear_cross_entropy import IGNORE, linear_cross_entropy
from minimodels.paths import full_precision
from minimodels.ranks import average


class NextToken(nn.Module):
    """The cross-entropy of the next token."""

    def __init__(self, config: Config):
        super().__init__()
        self.impl = config.impl

    def forward(self, model: nn.Module, x: Tensor, targets: Tensor, context: Context) -> Tensor:
        """The mean cross-entropy in nats per predicted token. Targets of IGNORE are left out.

        Each rank returns its share: the mean of the shares is the mean over all ranks' targets.
        """
        head, targets = model.plain_head, targets.flatten()
        count = (targets != IGNORE).to(full_precision(x).dtype).sum()
        share = count / average(count)
        # a rank without targets gets one, because a mean over none is NaN; its share is 0
        first = torch.where(count > 0, targets[:1], 0)
        targets = torch.cat((first, targets[1:]))
        if head is None:  # the joint operation takes only a matrix
            logits = full_precision(model.logits(x)).flatten(0, 1)
            return share * F.cross_entropy(logits, targets, ignore_index=IGNORE)
        return share * linear_cross_entropy(x.flatten(0, 1), head.weight, targets, self.impl)


OBJECTIVES = {"next_token": NextToken}
