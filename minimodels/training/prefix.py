"""Context parallelism without waiting, for models that remember only linear recurrences.

In wavefront.py a rank waits for the state of the rank before. A recurrence that is linear in its
state needs no waiting: all ranks apply the same block at the same time, and each operation finds
its state by one exchange between them (see minimodels/ops/before.py). No layer knows of it, because
a layer only hands its state to its operations.

The price is arithmetic. The selective scan and the linear scan run twice. The delta rule carries K
more columns if it has an erase vector, and otherwise reads once more. With activation checkpointing
the exchanges are repeated too. The wavefront's price is that L blocks on N ranks take L + N - 1
rounds instead of L, and more with sharding. So the exchange is faster for the delta rule, and for
every model if there are many pieces. It is slower for Mamba in two pieces, and if the ranks have to
share one processor.

A model with any other state takes the wavefront for all its layers, because an exchange would make
rank 0 wait for the ranks after it. Ring attention would need no state of another rank, but it does
not fit the layers. The state of an attention layer is the keys and values of all earlier tokens,
and a ring never has these in one place. It would need a second path beside `attention`, with
windows, documents, sinks and softcaps, and one more each for latent and for sparse attention. To
balance its work it would also need pieces that are not contiguous, which a recurrence cannot use.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from minimodels.context import Context
from minimodels.lm import LM
from minimodels.ops.before import Before
from minimodels.training.blocks import blocks

# the operations that find their state from a Before
LINEAR = {"causal_conv1d", "delta_rule", "linear_scan", "selective_scan"}


def is_linear(model: LM) -> bool:
    """Whether the model's layers remember nothing but states of the operations in LINEAR."""
    remember = [module for module in model.layers.modules() if hasattr(module, "state_bytes")]
    return all(LINEAR.issuperset(getattr(layer, "operations", [None])) for layer in remember)


def split_linear(model: LM, pieces: int) -> None:
    """Let every `pieces` consecutive ranks share their texts, if the model is linear."""
    group, _ = dist.new_subgroups(pieces)
    for block in blocks(model):
        block.forward = Together(block, Before(group))


class Together:
    """The forward of a block that all ranks apply at the same time."""

    def __init__(self, block: nn.Module, before: Before):
        self.block, self.forward, self.before = block, block.forward, before
        self.form: Any = None  # the block's state after one token

    def __call__(self, x: Tensor, *arguments):
        """As the block: x, perhaps an update, state, context -> x, perhaps an update, state."""
        *update, _, context = arguments
        if self.form is None:
            self.form = self.after_token(x, update, context)
        earlier = dist.get_rank(self.before.group) * x.shape[1]  # tokens before the piece
        state = tree_map_only(Tensor, lambda _: self.before, self.form)
        state = tree_map_only(int, lambda seen: seen * earlier, state)
        return self.forward(x, *update, state, context)

    @torch.no_grad()
    def after_token(self, x: Tensor, update: list, context: Context) -> Any:
        """The block's state after the first token: its tensors, and how many tokens it has seen.

        The block does not train on it.
        """
        x, *update, tokens, embedded = (
            None if part is None else part[:, :1]
            for part in (x, *update, context.tokens, context.embedded)
        )
        training = self.block.training
        self.block.eval()
        *_, state = self.forward(x, *update, None, Context(tokens=tokens, embedded=embedded))
        self.block.train(training)
        return state
