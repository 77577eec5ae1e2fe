"""A language model of any layers: embed, layers, norm, head, loss.

A new architecture joins with one line in LAYERS (or WRAPPERS, if it holds other layers).

    name        shape
    tokens      (B, T)         int64 token ids below V
    logits      (B, T, V)
    targets     (B, T)         int64; IGNORE where nothing is to be predicted
    state       list           one state per layer
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.architectures.mamba import Mamba
from minimodels.architectures.mod import MixtureOfDepths
from minimodels.architectures.moe import MoE, pooled_imbalance
from minimodels.architectures.transformer import Attention, SwiGLU
from minimodels.config import Config, Layers, parse_layers
from minimodels.errors import InputError
from minimodels.layers import Residual, RMSNorm, Stack, flops, linear
from minimodels.ops.linear_cross_entropy import linear_cross_entropy

LAYERS = {
    "attention": Attention,
    "window": lambda config: Attention(config, config.window),
    "mlp": SwiGLU,
    "mamba": Mamba,
    "moe": MoE,
}
WRAPPERS = {"mod": MixtureOfDepths}


def build(config: Config, layers: Layers) -> Stack:
    """The stack of layers that the data describes. Raises InputError on a name that no layer has."""
    blocks = []
    for layer in layers:
        match layer:
            case str() if layer in LAYERS:
                blocks.append(
                    Residual(config.width, LAYERS[layer](config), config.norm_eps, config.impl)
                )
            case (name, group) if name in WRAPPERS:
                blocks.append(WRAPPERS[name](config, build(config, group)))
            case _:
                given = layer if isinstance(layer, str) else f"{layer[0]}(...)"
                raise InputError(
                    "layers",
                    given,
                    ", ".join([*LAYERS, *(f"{wrapper}(...)" for wrapper in WRAPPERS)]),
                )
    return Stack(blocks)


class LM(nn.Module):
    """tokens -> logits, with the state of all layers handed in and out."""

    operations = ("linear_cross_entropy",)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.published = None  # what minimodels.pretrained knows of a model that it read
        self.embedding = nn.Embedding(config.vocab or 256, config.width)
        nn.init.normal_(self.embedding.weight, std=config.init_std)
        self.layers = build(config, parse_layers(config.layers))
        self.routers = [
            module for module in self.layers.modules() if hasattr(module, "causal")
        ]  # which may not be causal
        self.norm = RMSNorm(config.width, config.norm_eps)
        # None: the embedding's matrix is the head's too
        self.head = (
            None
            if config.tie_embeddings
            else linear(config.width, config.vocab or 256, config.init_std)
        )

    def forward(self, tokens: Tensor, state: list | None = None, positions: Tensor | None = None):
        """tokens (B, T), state and positions as in the layer contract -> logits (B, T, V), state.

        Raises InputError where a state is carried into layers that are not causal, ValueError on another shape.
        """
        x, state = self.features(tokens, state, positions)
        return self.logits(x), state

    def features(self, tokens: Tensor, state: list | None = None, positions: Tensor | None = None):
        """What the head sees (B, T, D), and the state. Arguments and errors as in forward."""
        if tokens.ndim != 2 or not tokens.numel():
            raise ValueError(f"tokens are {tuple(tokens.shape)}; accepted: (B, T), both 1 or more")
        if state is not None and not self.causal:
            raise InputError(
                "state",
                "carried",
                "None, for a layer routes over the whole sequence: eval(), or another router",
            )
        x, state = self.layers(self.embedding(tokens), state, positions)
        return self.norm(x), state

    def logits(self, x: Tensor) -> Tensor:
        """What the head makes of `features`: (..., D) -> (..., V)."""
        return F.linear(x, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix (V, D): its own, or the embedding's where they are tied."""
        return (self.head or self.embedding).weight

    def loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and its parts, detached: "cross_entropy" in nats per predicted token, the layers' own.

        tokens and targets (B, T), targets IGNORE where nothing is to be predicted.
        """
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets are {tuple(targets.shape)}; accepted: the shape of tokens, {tuple(tokens.shape)}"
            )
        x, _ = self.features(tokens)
        cross_entropy = linear_cross_entropy(
            x.flatten(0, 1), self.head_weight, targets.flatten(), self.config.impl
        )
        auxiliary = [
            item
            for module in self.layers.modules()
            for item in getattr(module, "auxiliary_losses", {}).items()
        ]
        if self.config.balance == "pooled":
            auxiliary.append(("balance", self.config.balance_loss * pooled_imbalance(self.layers)))
        parts, total = {"cross_entropy": cross_entropy.detach()}, cross_entropy
        for name, value in auxiliary:
            total = total + value
            # not 0 + value, which a compiler makes the value itself, taken then for one that has no gradient
            parts[name] = parts[name] + value.detach() if name in parts else value.detach()
        return total, parts

    @property
    def causal(self) -> bool:
        """Whether, in the present mode, no token depends on a later one: what generation requires."""
        return all(module.causal for module in self.routers)

    def after_step(self):
        """Call once after each optimizer step: layers that balance themselves do it now."""
        for module in self.layers.modules():
            if hasattr(module, "after_step"):
                module.after_step()

    def flops(self, context: int) -> float:
        """Forward FLOPs per token: those of the layers and of the head's product."""
        return flops(self.layers, context) + 2 * self.head_weight.numel()

    def observations(self) -> dict[str, list]:
        """What the layers recorded in their last forward pass, one entry per layer that recorded it."""
        found: dict[str, list] = {}
        for module in self.layers.modules():
            for name, value in getattr(module, "observed", {}).items():
                found.setdefault(name, []).append(value.tolist())
        return found
