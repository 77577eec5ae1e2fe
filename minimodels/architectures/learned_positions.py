"""Learned positions: GPT-2 adds a learned vector for each position to the residual stream.

Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), after Vaswani et al.,
arXiv:1706.03762, who found learned positions as good as fixed sinusoids. The layer comes first in a
model, before the blocks:

    learned_positions(context=1024) (attention(rope_base=0) mlp)*12

A text cannot be longer than the table. The state is only the position of the next token.

    name        shape
    x           (B, T, D)    the residual stream
    weight      (n, D)       a vector for each of n positions
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.context import Context
from minimodels.errors import Count, InputError
from minimodels.layers import Place
from minimodels.ops.cache import advance
from minimodels.options import option


class PositionState(NamedTuple):
    """What the layer remembers: the position of the next token."""

    seen: Tensor | int  # the position of the next token


class LearnedPositions(nn.Module):
    """Adds a learned vector for each position to the residual stream itself."""

    paper = "Vaswani et al., arXiv:1706.03762"
    on_stream = True
    waits = "learned_positions compares positions with the size of its table"

    @dataclass(frozen=True)
    class Options:
        context: Count = option(1024, "n, the longest text")

    def __init__(self, options: Options, config: Config, place: Place = Place()):
        super().__init__()
        self.context = options.context
        self.weight = nn.Parameter(config.init_std * torch.randn(options.context, config.width))

    def forward(
        self, x: Tensor, state: PositionState | None = None, context: Context | None = None
    ):
        context = context or Context()
        before = 0 if state is None else state.seen
        _, at, seen = advance(before, x, context.positions, context.starts)
        if at.ndim == 3:
            at = at.squeeze(1)  # (B, T)
        longest = seen if isinstance(seen, int) else None
        if longest is None and not torch.compiler.is_compiling():
            longest = int(at.amax()) + 1
        if longest is not None and longest > self.context:
            accepted = f"at most {self.context} tokens, for which the model has learned positions"
            raise InputError("text", longest, accepted)
        return x + F.embedding(at.clamp(min=0), self.weight), PositionState(seen)
