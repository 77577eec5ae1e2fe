"""What training may do to a model block by block: recompute or compile it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minimodels.lm import LM
from minimodels.residual import Residual


def blocks(model: LM) -> list[nn.Module]:
    """The model's blocks, each once; wrappers last, because they may contain other blocks."""
    unique = dict.fromkeys(model.layers)
    return sorted(unique, key=lambda block: not isinstance(block, Residual))


def recompute(model: LM) -> None:
    """Keep only the input of each block, and recompute the block in the backward pass.

    A step takes about a third longer, and only one block's activations are in memory at a time.
    """
    for block in blocks(model):
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def compiled_loss(model: LM, by_block: bool) -> Callable:
    """The model's loss, compiled: in one graph, or by block with several ranks, because their
    blocks communicate."""
    # routed tokens are counted in the graph
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    if not by_block:
        return torch.compile(model.loss, fullgraph=True)
    # blocks of one kind share their code, so all their graphs count towards its limit
    torch._dynamo.config.recompile_limit = 8 * len(model.layers)
    for block in blocks(model):
        block.forward = partial(train_compiled, block, block.forward, torch.compile(block.forward))
    return model.loss


def train_compiled(block: nn.Module, plain: Callable, compiled: Callable, *arguments):
    """Use the compiled block in training only, because validation would compile it again."""
    return (compiled if block.training else plain)(*arguments)
