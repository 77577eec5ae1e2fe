"""A language model of any layers: embed, layers, norm, head, loss.

name        shape
tokens      (B, T)         int64 token ids below V
logits      (B, T, V)
targets     (B, T)         int64; IGNORE if nothing is to be predicted
state       list           one state per layer
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.architectures.registry import build
from minimodels.config import Config
from minimodels.context import Context, Record
from minimodels.errors import InputError
from minimodels.layers import flops
from minimodels.objectives import OBJECTIVES
from minimodels.parts import is_plain, linear, scaled
from minimodels.paths import is_transformed
from minimodels.ranks import averaged
from minimodels.residual import make_norm


class LM(nn.Module):
    """tokens -> logits. The caller passes the state of all layers in and gets it back."""

    operations = ("linear_cross_entropy",)

    def __init__(self, config: Config):
        super().__init__()
        if not isinstance(config, Config):
            raise InputError("config", config, "a Config, such as preset(NAME) returns")
        self.config = config
        self.published = None  # what minimodels.published knows about a model that it has read
        self.tokenizer = None  # the tokenizer of a loaded model; None: bytes
        # what the layers recorded in the last call of `loss`
        self.observed: dict[str, list[Tensor]] = {}
        self.vocab = config.vocab or 256
        self.embedding = nn.Embedding(self.vocab, config.width)
        nn.init.normal_(self.embedding.weight, std=config.init_std)
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.layers = build(config)
        self.routers = [module for module in self.layers.modules() if hasattr(module, "causal")]
        self.norm = make_norm(config)
        # None: the head uses the embedding's matrix
        self.head = (
            None if config.tie_embeddings else linear(config.width, self.vocab, config.init_std)
        )
        self.objective = OBJECTIVES[config.objective](config)

    def forward(
        self,
        tokens: Tensor,
        state: list | None = None,
        positions: Tensor | None = None,
        starts: Tensor | None = None,
        record: Record | None = None,
    ):
        """tokens (B, T), positions and starts as in Context -> logits (B, T, V), state.

        `record` collects the layers' losses and observations. Raises InputError if there is a state
        but some layers are not causal, and ValueError if a shape is wrong.
        """
        context = self.context(tokens, state, positions, starts, record)
        x, state = self.features(tokens, state, context)
        return self.logits(x), state

    def context(self, tokens, state=None, positions=None, starts=None, record=None) -> Context:
        """The context of a pass. Arguments and errors as in forward."""
        if tokens.ndim != 2 or not tokens.numel():
            raise ValueError(f"tokens are {tuple(tokens.shape)}; accepted: (B, T), both 1 or more")
        for name, given in (("positions", positions), ("starts", starts)):
            if given is not None and given.shape != tokens.shape:
                raise ValueError(
                    f"{name} are {tuple(given.shape)}; accepted: {tuple(tokens.shape)}"
                )
        if starts is not None and state is not None and positions is None:
            raise ValueError("starts are given with a state; accepted: with positions too")
        if not torch.compiler.is_compiling():
            self.check_tokens(tokens)
        if positions is not None and not torch.compiler.is_compiling():
            check_positions(positions)
        return Context(positions, starts, tokens=tokens, record=record)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise InputError unless the tokens are ids of the vocabulary. On a GPU the embedding
        checks the range, because reading it back here would take time."""
        if tokens.dtype not in (torch.int64, torch.int32):
            given = str(tokens.dtype).removeprefix("torch.")
            raise InputError("tokens", given, "int64 or int32 ids")
        if tokens.device.type == "cpu" and not is_transformed():
            least, most = map(int, tokens.aminmax())
            if least < 0 or most >= self.vocab:
                raise InputError("tokens", f"{least} to {most}", f"ids 0 to {self.vocab - 1}")

    def features(self, tokens: Tensor, state: list | None = None, context: Context | None = None):
        """The input of the head (B, T, D), and the state. Errors as in forward."""
        context = context or self.context(tokens, state)
        if state is not None and not self.causal:
            accepted = (
                "None, because a layer routes over the whole sequence: eval(), or another router"
            )
            raise InputError("state", "carried", accepted)
        context.embedded = scaled(self.embedding(tokens), self.config.embedding_scale)
        if self.embedding_norm is not None:
            context.embedded = self.embedding_norm(context.embedded)
        x, state = self.layers(context.embedded, state, context)
        return scaled(self.norm(x), self.config.logit_scale), state

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def logits(self, x: Tensor) -> Tensor:
        """The head's output for `features`: (..., D) -> (..., V)."""
        cap = self.config.logit_softcap
        logits = F.linear(x, self.tied_matrix()) if self.head is None else self.head(x)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def tied_matrix(self) -> Tensor:
        """The embeddings of all tokens (V, D), with what an adapter adds to them."""
        if type(self.embedding) is nn.Embedding:
            return self.embedding.weight
        return self.embedding(torch.arange(self.vocab, device=self.device))

    @property
    def plain_head(self) -> nn.Module | None:
        """The part whose weight is the head's matrix (V, D); None if the head is more than that
        (see is_plain), so that logits must be computed."""
        part = self.embedding if self.head is None else self.head
        return part if self.config.logit_softcap is None and is_plain(part) else None

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        starts: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and its parts, detached.

        The parts are "cross_entropy", in nats per predicted token, and the layers' own losses.
        tokens, targets, starts and positions (B, T); a target is IGNORE if nothing is to be
        predicted. Afterwards `observed` contains what the layers recorded. Raises ValueError if
        shapes disagree.
        """
        if targets.shape != tokens.shape:
            accepted = f"the shape of tokens, {tuple(tokens.shape)}"
            raise ValueError(f"targets are {tuple(targets.shape)}; accepted: {accepted}")
        context = self.context(tokens, positions=positions, starts=starts)
        x, _ = self.features(tokens, None, context)
        total = self.objective(self, x, targets, context)
        parts = {"cross_entropy": total.detach()}
        learns = torch.is_grad_enabled() and all(p.requires_grad for p in self.parameters())
        for name, value in context.record.finish().items():
            if learns and not value.requires_grad:
                accepted = (
                    "a loss with a gradient: torch.utils.checkpoint needs use_reentrant=False"
                )
                raise ValueError(f"the loss {name!r} has no gradient; accepted: {accepted}")
            total = total + value
            parts[name] = value.detach()
        self.observed = context.record.observed
        return total, parts

    @property
    def causal(self) -> bool:
        """Whether, in the present mode, no token depends on a later one. Generation requires it."""
        return all(module.causal for module in self.routers)

    def after_step(self, taken: Tensor | float = 1.0):
        """Call this once after each optimizer step, so that layers can balance themselves. taken: 0
        if the optimizer skipped the step."""
        for module in self.layers.modules():
            if hasattr(module, "after_step"):
                module.after_step(taken)

    def flops(self, context: int) -> float:
        """Forward FLOPs per token of the layers and of the head's product."""
        return flops(self.layers, context) + 2 * self.embedding.weight.numel()

    def observations(self) -> dict[str, list]:
        """What the layers recorded in the last call of `loss`, one entry per layer; the mean over
        the ranks."""
        return {
            name: [value.tolist() for value in values]
            for name, values in averaged(self.observed).items()
        }


def check_positions(positions: Tensor) -> None:
    """Raise ValueError unless positions (B, T) ascend in each row, with padding (-1) only at its
    end."""
    before, after = positions[:, :-1], positions[:, 1:]
    fits = ((after > before) & (before >= 0)) | (after == -1)
    if not (fits.all() and (positions >= -1).all()):
        accepted = "ascending in each row, with -1 (padding) only at its end; documents need starts"
        raise ValueError(f"positions are {positions.tolist()[:2]}; accepted: {accepted}")
