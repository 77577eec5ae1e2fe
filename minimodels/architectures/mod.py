"""Mixture-of-depths: some tokens take a group of layers, the others pass it by.

Raposo et al., "Mixture-of-Depths: Dynamically allocating compute in transformer-based language
models", arXiv:2404.02258.

A router scores each token. In training the C · T highest-scored tokens of each sequence take the
group and attend only to one another. The group's change to these tokens, times their score, is
added to them. All other tokens keep their value. So the group costs a fraction C of its linear and
C² of its attention computation. Which tokens score highest is known only at the end of the text. To
generate text, the model uses a causal decision instead, which it learns in training.

    name        paper   shape
    x           X       (B, T, D)      all tokens
    scores      r       (B, T)         the router's raw score of each token
    weights     r       (B, k, 1)      the scores of the chosen tokens
    capacity            ()             C: the fraction of tokens that take the group; the paper's C
                                       is their number k
    index               (B, k)         the tokens that take the group, ascending, then filling
    real                (B, k)         bool: False for filling
    gathered    X̃       (B, k, D)      the values of the chosen tokens; k is their number
    output      f(X̃)+X̃  (B, k, D)      the group's output, its residual sums included
    update      r f(X̃)  (B, k, D)      the group's change to the chosen tokens, times the weights

Why the raw score multiplies: choosing has no gradient, so without this factor the router would get
none. As in the paper, the factor is the raw score and not a sigmoid of it.

What filling is: in evaluation or with documents, rows may route different numbers of tokens, but
the rows of a tensor have one length. Shorter rows are filled with tokens that were not chosen, at
position -1. The group treats these as padding, and their weight is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.context import Context
from minimodels.errors import Fraction, NonNegative
from minimodels.layers import Place, Stack, flops, inactive_parameters, state_bytes, unrouted_flops
from minimodels.ops.documents import top_per_document
from minimodels.options import option
from minimodels.parts import FullPrecisionLinear, linear
from minimodels.paths import is_transformed


class DepthState(NamedTuple):
    """What the wrapper remembers. The group itself remembers only the tokens that it processed."""

    seen: Tensor  # (B,) int64, the position of the next token
    # (B,) int64, the start of the document that the group's last token is in; -1: no token yet
    document: Tensor
    group: Any  # the group's state


class MixtureOfDepths(nn.Module):
    """A router around any group of layers, which a fraction of the tokens takes.

    In training mode the top k tokens of each document take the group. If a row is one document, its
    padding counts towards T in k = C · T but is never chosen. This choice is not causal. In
    evaluation mode the decision is causal. With route=router it is sigmoid(r) > ½. An auxiliary
    loss teaches it, and affects the rest of the model a little, because its gradient reaches the
    router's input. With route=predictor a small MLP decides from the detached input, so its loss
    trains nothing else. If the attribute `topk` of this layer is True, the top k take the group in
    evaluation too, which measures what the causal decision costs.
    """

    paper = "Raposo et al., arXiv:2404.02258"
    presets = {"mod": "(attention mlp mod(attention mlp))*{half}"}
    topk = False
    waits = "mixture-of-depths counts the tokens that take the group"

    @dataclass(frozen=True)
    class Options:
        capacity: Fraction = option(0.125, "C, fraction of the tokens that take the group")
        route: Literal["router", "predictor"] = option(
            "predictor",
            "what decides causally: router (the score's sign) or predictor (a small MLP)",
        )
        loss: NonNegative = option(0.01, "weight of the loss that trains the causal decision")

    def __init__(self, options: Options, config: Config, place: Place, group: Stack):
        super().__init__()
        self.options, self.group = options, group
        self.router = linear(config.width, 1, config.init_std, kind=FullPrecisionLinear)
        self.predictor = None
        if options.route == "predictor":
            hidden = max(1, config.width // 4)
            self.predictor = nn.Sequential(
                FullPrecisionLinear(config.width, hidden),
                nn.SiLU(),
                FullPrecisionLinear(hidden, 1),
            )

    @property
    def causal(self) -> bool:
        """Whether, in the present mode, no token depends on a later one."""
        return not (self.training or self.topk)

    def forward(self, x: Tensor, state: DepthState | None = None, context: Context | None = None):
        context = context or Context()
        B, T, _ = x.shape
        seen, document, remembered = state or (
            x.new_zeros(B, dtype=torch.int64),
            x.new_full((B,), -1, dtype=torch.int64),
            None,
        )
        positions = context.positions
        if positions is None:
            positions = seen[:, None] + torch.arange(T, device=x.device)
        with torch.autocast(x.device.type, enabled=False):  # routing needs full precision
            scores = self.router(x).squeeze(-1)  # (B, T)
            decision = scores
            if self.predictor is not None:
                decision = self.predictor(x.detach()).squeeze(-1)
        index, real = self.select(scores.detach(), decision, positions, context)
        seen = torch.maximum(seen, positions.amax(1) + 1)
        if index.shape[1] == 0:  # no token takes the group
            return x, DepthState(seen, document, remembered)

        tokens = x.flatten(0, 1)  # (B · T, D)
        # rows of `tokens`
        chosen = (index + T * torch.arange(B, device=x.device).unsqueeze(1)).flatten()
        gathered = tokens.index_select(0, chosen).view(B, -1, x.shape[-1])  # (B, k, D)
        weights = scores.gather(1, index).masked_fill(~real, 0.0).unsqueeze(-1)  # (B, k, 1)
        original = positions.gather(1, index).masked_fill(~real, -1)  # (B, k)
        resets = None
        if context.starts is None:  # one document, which begins at position 0
            document = document.masked_fill(real.any(1), 0)
        else:
            resets, document = first_of_documents(context.starts.gather(1, index), document, real)
        inner = context.take(index, original, resets)
        output, remembered = self.group(gathered, remembered, inner)
        update = (weights * (output - gathered)).to(x.dtype)  # equation 1
        y = tokens.index_add(0, chosen, update.flatten(0, 1)).view_as(x)
        return y, DepthState(seen, document, remembered)

    def select(self, scores: Tensor, decision: Tensor, positions: Tensor, context: Context):
        """The tokens that take the group, (B, k), ascending, and which of them are not filling.

        Selection needs no gradient, because the weights of the selected tokens teach the router.
        """
        present = positions >= 0
        if not (self.training or self.topk):
            taken = (decision > 0) & present
            context.record.observe("routed", taken.sum() / present.sum().clamp(min=1))
        elif context.starts is not None:
            taken = top_per_document(scores, context.starts, self.options.capacity, present)
            self.account(decision, taken, present, context)
        else:
            k = self.routed(scores.shape[1])
            index = scores.masked_fill(~present, float("-inf")).topk(k).indices.sort(1).values
            taken = torch.zeros_like(present).scatter(1, index, True)
            self.account(decision, taken, present, context)
            context.record.trace("taken", taken & present)
            return index, present.gather(1, index)
        context.record.trace("taken", taken)
        # shorter rows are filled up to k, which cannot depend on values in a transformed program
        k = taken.shape[1] if is_transformed() else int(taken.sum(1).amax())
        # each token's place: first the tokens that take the group, then the others
        place = torch.where(taken, taken.cumsum(1), taken.sum(1, True) + (~taken).cumsum(1)) - 1
        tokens = torch.arange(taken.shape[1], device=taken.device).expand_as(place)
        index = torch.zeros_like(place).scatter(1, place, tokens)[:, :k]
        return index, taken.gather(1, index)

    def account(self, decision: Tensor, taken: Tensor, present: Tensor, context: Context) -> None:
        """Teach the causal decision to find the top k, and record how often it is right.

        A decision that never routes a token is already right for a fraction 1 - C of the tokens.
        """
        target, real = taken.to(decision.dtype), present.to(decision.dtype)
        loss = F.binary_cross_entropy_with_logits(decision, target, real, reduction="sum")
        context.record.add_mean("mod", self.options.loss, loss, real.sum())
        routed, weight = decision > 0, real / real.sum().clamp(min=1)
        context.record.observe("routed", (routed * weight).sum())
        context.record.observe("accuracy", ((routed == taken) * weight).sum())

    def flops(self, context: int) -> float:
        """Forward FLOPs per token.

        All tokens use the router and the predictor. A fraction C uses the group, whose text has
        C · context tokens.
        """
        k = self.routed(context)
        return self.routing_flops(context) + k / context * flops(self.group, k)

    def unrouted_flops(self, context: int) -> float:
        """Forward FLOPs per token if every token took the group."""
        return self.routing_flops(context) + unrouted_flops(self.group, context)

    def routing_flops(self, context: int) -> float:
        """Forward FLOPs per token of the router and the predictor."""
        return flops(self.router, context) + (
            flops(self.predictor, context) if self.predictor else 0
        )

    def routed(self, T: int) -> int:
        """How many of T tokens take the group in training: k = C · T, rounded up."""
        # rounded first, because 0.07 · 100 is 7.000000000000001
        return max(1, math.ceil(round(self.options.capacity * T, 6)))

    def inactive_parameters(self) -> float:
        """Parameters that a token does not use, on average."""
        size = sum(p.numel() for p in self.group.parameters())
        return size - self.options.capacity * (size - inactive_parameters(self.group))

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes remembered per sequence if a fraction C of the tokens takes the group."""
        return state_bytes(self.group, self.routed(context), itemsize)


def first_of_documents(starts: Tensor, document: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the chosen tokens begin a document for the group, and each row's last document.

    A document's own first token may not be among them. starts (B, k); document (B,), the document
    of the group's previous token; real (B, k).
    """
    # filling comes after all tokens
    before = torch.cat((document.unsqueeze(1), starts[:, :-1]), dim=1)
    last = (real.sum(1, keepdim=True) - 1).clamp(min=0)
    document = torch.where(real.any(1), starts.gather(1, last).squeeze(1), document)
    return (starts != before) & real, document
