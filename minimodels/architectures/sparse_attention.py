"""DeepSeek Sparse Attention: an indexer chooses k keys per token, and attention reads no others.

DeepSeek-V3.2, arXiv:2512.02556, on top of latent attention (latent_attention.py).

A small scorer, the lightning indexer, compares a token with every earlier one. Attention then reads
only the k tokens with the highest scores. So only the cost of the indexer, which has few narrow
heads and no values, grows with the text.

A choice has no gradient, so the language model's loss does not train the indexer. It learns from
attention itself: the softmax of its scores approaches the weights of attention over the same keys,
averaged over the heads. Its inputs and this target are detached, so its loss reaches no other part
of the model.

If k is at least the length of the text, every key is chosen, and the layer computes latent
attention. With such a k, and all parameters frozen except those with `.indexer.` in their names,
training is the paper's dense warm-up. With a smaller k it is the sparse stage. `latent` has the
parameters of the layer latent_attention, so an indexer can be added to a trained model.

    name        paper       shape
    x           h           (B, T, D)
    queries     q^I         (B, T, H_I, d_I)    of the indexer, from the latent of the queries
    keys        k^I         (B, 1, S, d_I)      of the indexer, the same for all its heads
    shares      w^I         (B, T, H_I)         how much each of its heads counts
    scores      I           (B, T, S)           -∞ where a token does not see another
    memory      c^KV, k^R   (B, 1, S, r + d_r)  latents and rotary keys; with the keys, the state
    weights     p           (B, T, H, k)        of attention, over the chosen keys

An exported program (torch.export) takes texts of at most k tokens, so that all are chosen.

The ReLU makes many scores exactly zero, so keys are often tied. The latest of tied keys are chosen.
Without such a rule, a token could see other keys in decoding than in training.

Compared with latent attention at 4096 tokens, width 768 and 12 heads, k = 64 saves 73 % of the
FLOPs, and the state is 25 % larger (first command). On a shared CPU a decoded token took 0.44 of
the time, or 0.85 at 1024 tokens (second command). In a small model, a training step on 256 to 1024
tokens took 1.6 times as long (third), because PyTorch copies the chosen latents of every token.

    python -m minimodels.ledger --size small --context 4096 --layers "sparse_attention(heads=12)"
    python -m benchmarks.throughput --size small --match none --modes decode --shortest 1024
        --models --layers "latent_attention(heads=12)" "sparse_attention(heads=12)"
    python -m benchmarks.throughput --match none --modes train --longest 1024
        --models sparse_attention --layers "(latent_attention mlp)*4"
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.architectures.latent_attention import LatentAttention
from minimodels.config import Config
from minimodels.context import Context
from minimodels.errors import Count, InputError, NonNegative
from minimodels.layers import Place, flops
from minimodels.ops.attention import positions_of, sees
from minimodels.ops.cache import AttentionState, advance, carry
from minimodels.ops.rotary import rotate
from minimodels.options import option
from minimodels.parts import is_plain, linear
from minimodels.paths import choose, full_precision

ENTRIES = 2**25  # most scores and gathered numbers at once; longer chunks are read in blocks


class SparseAttention(nn.Module):
    """Latent attention to the k tokens that an indexer chooses."""

    paper = "DeepSeek-AI, arXiv:2512.02556"
    presets = {"sparse_attention": "(sparse_attention mlp)*{n}"}
    operations = ("sparse_attention",)

    @dataclass(frozen=True)
    class Options(LatentAttention.Options):
        keys: Count = option(64, "k, keys that a token attends to (DeepSeek-V3.2: 2048)")
        index_heads: Count = option(4, "H_I, heads of the indexer (DeepSeek-V3.2: 64)")
        index_dim: Count | None = option(
            None, "d_I, width of the indexer's heads; by default that of the rotary key"
        )
        index_loss: NonNegative = option(
            1.0, "weight of the indexer's loss, from which no other part learns"
        )

    def __init__(self, options: Options, config: Config, place: Place = Place()):
        super().__init__()
        self.options, self.impl = options, config.impl
        self.latent = LatentAttention(options, config, place)
        turned = self.latent.turned if options.rope_base else 1
        width = options.index_dim or self.latent.turned
        if width < turned:
            accepted = f"{turned} or more, because {turned} of its numbers are rotated"
            raise InputError("index_dim", width, accepted)
        self.indexer = Indexer(options.q_rank or config.width, options.index_heads, width, config)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, context: Context | None = None
    ):
        context = context or Context()
        seen, starts = 0 if state is None else state.seen, context.starts
        positions, at, seen = advance(seen, x, context.positions, starts)
        low, plain, turned, memory = self.latent.project(x, at, context.cache)
        angles = self.latent.angles(at, context.cache) if self.options.rope_base else None
        queries, keys, shares = self.indexer(x.detach(), low.detach(), angles)
        now = AttentionState(memory, keys.to(memory.dtype), positions, seen)
        joined, after = carry(state, now, None)  # S tokens

        if joined.keys.shape[2] <= self.options.keys and not self.learns:
            y = self.latent.read(plain, turned, joined, positions, starts)  # nothing to choose
        else:
            y, losses = self.read(plain, turned, queries, shares, joined, positions, starts)
            if losses is not None:
                real = torch.ones_like(losses) if context.real is None else context.real
                total = (losses * real).sum()
                context.record.add_mean("index", self.options.index_loss, total, real.sum())
        return self.latent.out(y.transpose(1, 2).flatten(2)), after

    @property
    def learns(self) -> bool:
        """Whether the indexer has a loss in the present mode."""
        return self.training and self.options.index_loss > 0

    def read(
        self,
        plain: Tensor,
        turned: Tensor,
        queries: Tensor,
        shares: Tensor,
        memory: AttentionState,
        positions: Tensor | None,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention to the chosen keys (B, H, T, d_v), and each token's loss of the indexer (B, T),
        if it learns."""
        path = choose(self.impl, "sparse_attention", plain.device)
        # only `masked` calls the map of the latents itself, as an adapter or a hook requires
        gather = path != "reference" and is_plain(self.latent.kv_up)
        attend = self.gathered if gather else self.masked
        asked, present = positions_of(plain, memory.keys, positions, memory.positions)
        (B, _, S, width), k = memory.keys.shape, self.options.keys
        rows = max(1, ENTRIES // (B * (self.indexer.heads * S + min(k, S) * width)))
        outputs, losses = [], []
        for start in range(0, plain.shape[2], rows):
            at = slice(start, start + rows)
            visible = sees(asked[:, at], present, None, None if starts is None else starts[:, at])
            scores = index_scores(queries[:, at], memory.values, shares[:, at])  # (B, T, S)
            scores = scores.masked_fill(~visible.squeeze(1), float("-inf"))
            y, weights, scores = attend(plain[:, :, at], turned[:, :, at], memory.keys, scores)
            outputs.append(y)
            if self.learns:
                losses.append(divergence(weights.detach().mean(2), scores))
        return torch.cat(outputs, dim=2), torch.cat(losses, dim=1) if losses else None

    def masked(
        self, plain: Tensor, turned: Tensor, memory: Tensor, scores: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The reference: attention over expanded keys, with all but the chosen ones masked.

        Returns the output, and the weights and scores of all keys.
        """
        k, v = self.latent.expand(memory)
        order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)  # the latest first
        chosen = order.shape[-1] - 1 - order[..., : self.options.keys]
        unread = torch.ones_like(scores, dtype=torch.bool).scatter(-1, chosen, False)
        scores = scores.masked_fill(unread, float("-inf"))
        logits = torch.cat((plain, turned), dim=-1) @ k.mT * self.latent.scale  # (B, H, T, S)
        weights = masked_softmax(logits, scores.unsqueeze(1))
        return weights.to(v.dtype) @ v, weights.transpose(1, 2), scores

    def gathered(
        self, plain: Tensor, turned: Tensor, memory: Tensor, scores: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same over the chosen latents, not expanded. Weights and scores are only theirs."""
        (B, _, S, width), T, k = memory.shape, plain.shape[2], self.options.keys
        read = memory  # (B, 1, S, r + d_r), for all tokens
        if k < S:
            chosen = latest_of_the_best(scores, k)  # (B, T, k)
            scores = scores.gather(-1, chosen)
            rows = chosen + S * torch.arange(B, device=chosen.device).view(B, 1, 1)
            read = memory.flatten(0, 2).index_select(0, rows.flatten()).view(B, T, k, width)
        q, to_values = self.latent.absorb(plain, turned)  # (B, H, T, r + d_r)
        q = q.transpose(1, 2).reshape(B, read.shape[1], -1, width)  # heads that read the same keys
        logits = (q @ read.mT * self.latent.scale).view(B, T, plain.shape[1], -1)
        weights = masked_softmax(logits, scores.unsqueeze(2))  # (B, T, H, k)
        y = weights.to(read.dtype).view(*q.shape[:3], -1) @ read[..., : self.latent.rank]
        y = y.view(B, T, -1, self.latent.rank).transpose(1, 2)  # (B, H, T, r)
        return y @ to_values.to(y.dtype), weights, scores

    def flops(self, context: int) -> float:
        """Forward FLOPs per token in training: maps, the indexer's scores of all keys, attention
        over the chosen latents."""
        latent, indexer = self.latent, self.indexer
        parts = (*latent.children(), *indexer.children())
        maps = sum(flops(part, context) for part in parts if isinstance(part, nn.Linear))
        scores = 2 * indexer.heads * (indexer.width + 1) * context
        chosen = 2 * latent.heads * (2 * latent.rank + latent.turned)
        return maps + scores + chosen * min(self.options.keys, context)

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes of latents, rotary keys and the indexer's keys after `context` tokens."""
        return self.latent.state_bytes(context, itemsize) + context * self.indexer.width * itemsize


class Indexer(nn.Module):
    """The lightning indexer: few narrow heads, which share one key per token."""

    def __init__(self, low: int, heads: int, width: int, config: Config):
        super().__init__()
        self.heads, self.width = heads, width
        self.q = linear(low, heads * width, config.init_std)
        self.k = linear(config.width, width, config.init_std)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.shares = linear(config.width, heads, config.init_std)

    def forward(
        self, x: Tensor, low: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), low (B, T, r_q) -> queries (B, T, H_I, d_I), keys (B, 1, T, d_I),
        shares (B, T, H_I).

        The shares include the scale of the scores, because a positive factor can be taken out of
        the ReLU.
        """
        q = self.q(low).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.norm(self.k(x)).unsqueeze(1)
        if angles is not None:  # rotates the first numbers of a head, paired by halves
            q, k = rotate(q, *angles), rotate(k, *angles)
        return q.transpose(1, 2), k, self.shares(x) * (self.heads * self.width) ** -0.5


def index_scores(queries: Tensor, keys: Tensor, shares: Tensor) -> Tensor:
    """I = Σ_h w_h ReLU(q_h · k), equation (1), in full precision even under autocast: (B, T, S)."""
    with torch.autocast(keys.device.type, enabled=False):
        products = full_precision(queries).flatten(1, 2) @ full_precision(keys).squeeze(1).mT
        products = torch.relu(products).unflatten(1, queries.shape[1:3])  # (B, T, H_I, S)
        return (full_precision(shares).unsqueeze(2) @ products).squeeze(2)


def latest_of_the_best(scores: Tensor, k: int) -> Tensor:
    """The places of the k highest of S scores, the latest among equal ones: (..., S) -> (..., k).

    `topk` alone may take any of them.
    """
    least = scores.topk(k, dim=-1).values[..., -1:]
    S = scores.shape[-1]
    place = torch.arange(S, device=scores.device)
    rank = torch.where(scores > least, S, torch.where(scores == least, place, -1))
    return rank.topk(k, dim=-1, sorted=False).indices


def masked_softmax(logits: Tensor, scores: Tensor) -> Tensor:
    """The softmax over the keys whose index scores are not -∞, in full precision."""
    full = torch.promote_types(logits.dtype, torch.float32)
    return logits.masked_fill(scores.isneginf(), float("-inf")).softmax(-1, dtype=full)


def divergence(target: Tensor, scores: Tensor) -> Tensor:
    """KL(target || softmax(scores)) over the chosen keys, equations (3) and (4).

    target, scores (B, T, k) -> (B, T).
    """
    logs = scores.log_softmax(-1).masked_fill(scores.isneginf(), 0.0)
    return F.kl_div(logs, target.to(logs.dtype), reduction="none").sum(-1)
