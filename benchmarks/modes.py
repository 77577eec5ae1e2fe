"""The three ways in which a whole model is timed: a training step, reading a prompt,
and writing tokens after it.

Each mode takes a model, a context in tokens, a batch and a provider. It returns a call that does
the same work every time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minimodels import LM, Config
from minimodels.architectures.mod import MixtureOfDepths
from minimodels.command import has_bfloat16
from minimodels.decoding import ROOM, FixedStep, GrowingStep, tensors
from minimodels.training.optim import adamw
from minimodels.training.step import Step, training_step

from .training import CLIP, precision

DECODED = 32  # tokens per call of decode
PIECE = 2**16  # tokens that are read at once to make a state for decoding
BACKENDS = {  # chosen here, because PyTorch's own choice differs by version
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Provider(NamedTuple):
    """A model and how it is run."""

    base: str
    """name of the model"""
    config: Config
    impl: str
    """a path, or one of BACKENDS"""
    compiled: bool = False
    """compile the training step with torch.compile, and decode as a CUDA graph"""


def train(model: LM, context: int, batch: int, provider: Provider) -> Callable[[], Step]:
    """Forward, backward, clipping, AdamW."""
    device = model.device
    optimizer = adamw(model, 1e-4, 0.1)
    tokens = torch.randint(model.embedding.num_embeddings, (batch, context + 1), device=device)
    loss_function = compiled(model, provider) if provider.compiled else model.loss
    batches, autocast = [(tokens[:, :-1], tokens[:, 1:])], precision(device)
    return partial(training_step, model, optimizer, batches, autocast, CLIP, loss_function)


def prefill(model: LM, context: int, batch: int, provider: Provider) -> Callable[[], tuple]:
    """The state after a prompt and the logits of its next token."""
    model = at_capacity(in_bfloat16(model.eval()))
    tokens = torch.randint(model.embedding.num_embeddings, (batch, context), device=model.device)

    @torch.inference_mode()
    def call() -> tuple:
        x, state = model.features(tokens)
        return model.logits(x[:, -1]), state

    return call


@torch.inference_mode()
def decode(model: LM, context: int, batch: int, provider: Provider) -> Callable[[], None]:
    """Write DECODED tokens, one by one, after `context` tokens. The context is read in pieces that
    need little memory. The first new token copies the state, because every call continues from the
    same one. A step of fixed size does not copy it, see `repeated`."""
    model, start = at_capacity(in_bfloat16(model.eval())), None
    token = torch.zeros(batch, dtype=torch.int64, device=model.device)
    for length in torch.arange(context).split(max(1, PIECE // batch)):
        _, start = model.features(token[:, None].expand(batch, len(length)), start)
    if provider.compiled:
        return partial(repeated, FixedStep(model, start, batch), context, token)
    return partial(written, model, start, token)


@torch.inference_mode()
def written(model: LM, start: list, token: Tensor) -> None:
    """Write DECODED tokens with a state that grows."""
    step = GrowingStep(model, start)
    for _ in range(DECODED):
        step(token)


@torch.inference_mode()
def repeated(step: FixedStep, context: int, token: Tensor) -> None:
    """Write DECODED tokens after `context` with a step of fixed size, which a GPU repeats as a
    graph. Each call resets only the positions: later keys are then invisible, and the cost of a
    recurrent state does not depend on its values."""
    for part in tensors(step.state):
        if part.dtype == torch.int64 and part.ndim == 1:
            part.fill_(context)
    step.left = ROOM
    for _ in range(DECODED):
        step(token)


def run(impl: str, call: Callable[[], object]) -> None:
    """Run the call with the attention that the path asks for."""
    with sdpa_kernel(BACKENDS[impl]) if impl in BACKENDS else nullcontext():
        call()


def compiled(model: LM, provider: Provider) -> Callable:
    """The loss as one graph for exactly this size. A chosen attention backend disables the caches,
    because no cache key contains it."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    torch._dynamo.config.recompile_limit = 1000  # every model, path and size is a recompilation
    options = {"force_disable_caches": True} if provider.impl in BACKENDS else None
    return torch.compile(model.loss, fullgraph=True, dynamic=False, options=options)


class AtCapacity(nn.Module):
    """Replaces the causal decision of a mixture-of-depths. An untrained model would decide at
    random, and alike for all tokens. This decision costs the same, but takes the share of tokens
    that a trained model aims at."""

    def __init__(self, decide: nn.Module, capacity: float):
        super().__init__()
        self.decide, self.capacity = decide, capacity

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, T, 1), above 0 with a probability equal to the capacity."""
        decision = self.decide(x)  # (B, T, 1)
        return self.capacity - torch.rand_like(decision) + 0 * decision


def at_capacity(model: LM) -> LM:
    """Make every mixture-of-depths take its share of the tokens."""
    for module in model.modules():
        if isinstance(module, MixtureOfDepths):
            decide, capacity = module.predictor or module.router, module.options.capacity
            module.predictor = AtCapacity(decide, capacity)
    return model


def in_bfloat16(model: LM) -> LM:
    """The model in bf16 if its GPU supports it."""
    return model.bfloat16() if has_bfloat16(model.device) else model


MODES = {"train": train, "prefill": prefill, "decode": decode}
