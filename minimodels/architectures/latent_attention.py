"""Multi-head latent attention, which remembers one small vector per token for all heads.

DeepSeek-V2, arXiv:2405.04434, section 2.1; DeepSeek-V3, arXiv:2412.19437.

A token's keys and values are linear maps of a latent vector of rank r, which all heads share. So
the layer only has to remember the latent. Rotation does not commute with such a map, so a second,
narrow key carries the positions; all heads share it too. Training expands the keys and values from
the latents. Decoding moves the map to the keys into the query, and applies the map to the values
after the weighted sum. Each head then attends to the latents themselves, and nothing is expanded.

    name        paper       shape
    x           h           (B, T, D)
    latent      c^KV        (B, S, r)           after its norm
    key         k^R         (B, S, d_r)         rotated, shared by all heads
    memory                  (B, 1, S, r + d_r)  both of these; the state
    plain       q^C, k^C    (B, H, T or S, d)   the parts of queries and keys that are not rotated
    turned      q^R         (B, H, T, d_r)
    values      v^C         (B, H, S, d_v)

This second form (`absorbed`) is the first (`expanded`) with the brackets moved: q·(U c) = (Uᵀ q)·c
and Σ p (V c) = V (Σ p c). It takes more operations per pair of tokens, but none per remembered
token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.context import Context
from minimodels.errors import Count, InputError, NonNegative, Positive
from minimodels.layers import Place, flops
from minimodels.ops.attention import attention
from minimodels.ops.cache import AttentionState, advance, carry
from minimodels.ops.rotary import Scaling, check_pairs, rotary, rotate, scaling_text
from minimodels.options import option
from minimodels.parts import RMSNorm, is_plain, linear


class LatentAttention(nn.Module):
    """Causal self-attention that remembers one latent and one rotary key per token."""

    paper = "DeepSeek-AI, arXiv:2405.04434"
    operations = ("attention",)

    @dataclass(frozen=True)
    class Options:
        heads: Count = option(4, "H, heads")
        head_dim: Count | None = option(
            None, "d, unrotated width of queries and keys; by default width / heads"
        )
        rope_dim: Count | None = option(
            None,
            "d_r, width of the rotary key; by default head_dim, because half of it costs quality",
        )
        value_dim: Count | None = option(None, "d_v, width of a value; by default head_dim")
        kv_rank: Count | None = option(None, "r, width of the latent; by default width / 4")
        q_rank: Count | None = option(
            None, "width of the queries' latent; by default they have none"
        )
        rope_base: NonNegative = option(
            10_000.0, "base of the rotary angles; 0 leaves positions out (Kimi Linear)"
        )
        rope_scaling: Scaling = option(
            None, "slower angles for texts longer than those of training"
        )
        scale: Positive | None = option(
            None, "factor on the scores; by default 1 / sqrt(head_dim + rope_dim)"
        )
        norm_eps: NonNegative = option(1e-6, "epsilon of the latents' norms")
        bias: bool = option(False, "biases in the maps to the latents and in the output projection")

    def __init__(self, options: Options, config: Config, place: Place = Place()):
        super().__init__()
        if not options.head_dim and config.width % options.heads:
            accepted = f"a divisor of width {config.width}, or a head_dim"
            raise InputError("heads", options.heads, accepted)
        D, H, std = config.width, options.heads, config.init_std
        self.options, self.impl, self.heads = options, config.impl, H
        self.plain = options.head_dim or D // H
        self.turned = options.rope_dim or self.plain
        self.value = options.value_dim or self.plain
        self.rank = options.kv_rank or max(1, D // 4)
        field = "rope_dim" if options.rope_dim else "head_dim"
        check_pairs(options.rope_dim or options.head_dim, D, H, field)
        self.scaling = scaling_text(options.rope_scaling, self.turned)
        self.scale = options.scale or (self.plain + self.turned) ** -0.5
        q_width = H * (self.plain + self.turned)
        self.q_down = self.q_norm = None
        if options.q_rank:
            self.q_down = linear(D, options.q_rank, std, options.bias)
            self.q_norm = RMSNorm(options.q_rank, options.norm_eps)
        self.q = linear(options.q_rank or D, q_width, std)
        self.kv_down = linear(D, self.rank + self.turned, std, options.bias)
        self.kv_norm = RMSNorm(self.rank, options.norm_eps)
        self.kv_up = linear(self.rank, H * (self.plain + self.value), std)
        self.out = linear(H * self.value, D, std / config.depth**0.5, options.bias)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, context: Context | None = None
    ):
        context = context or Context()
        B, T, _ = x.shape
        seen, starts = 0 if state is None else state.seen, context.starts
        positions, at, seen = advance(seen, x, context.positions, starts)
        _, plain, turned, memory = self.project(x, at, context.cache)
        now = AttentionState(memory, memory.new_empty(B, 1, T, 0), positions, seen)
        joined, after = carry(state, now, None)  # S tokens
        y = self.read(plain, turned, joined, positions, starts)  # (B, H, T, d_v)
        return self.out(y.transpose(1, 2).flatten(2)), after

    def project(self, x: Tensor, at: Tensor, cache: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A chunk x at positions `at` -> the queries' latent (x if they have none), both parts of
        the queries, and the memory of the chunk."""
        B, T, _ = x.shape
        low = x if self.q_down is None else self.q_norm(self.q_down(x)).to(x.dtype)
        q = self.q(low).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, d + d_r)
        plain, turned = q.split((self.plain, self.turned), dim=-1)
        latent, key = self.kv_down(x).split((self.rank, self.turned), dim=-1)
        latent = self.kv_norm(latent).to(key.dtype)  # a norm may return another dtype
        key = key.unsqueeze(1)  # (B, 1, T, d_r)
        if self.options.rope_base:
            angles = self.angles(at, cache)
            turned, key = (rotate(pairs_apart(part), *angles) for part in (turned, key))
        return low, plain, turned, torch.cat((latent.unsqueeze(1), key), dim=-1)

    def read(
        self,
        plain: Tensor,
        turned: Tensor,
        memory: AttentionState,
        queries: Tensor | None,
        starts: Tensor | None,
    ) -> Tensor:
        """Attention to the whole memory, in the form that takes fewer operations."""
        T, S = plain.shape[2], memory.keys.shape[2]
        # only the expanded form calls the map itself, as an adapter or a hook requires
        absorb = T < S and is_plain(self.kv_up) and self.absorbing_saves(T, S)
        form = self.absorbed if absorb else self.expanded
        return form(plain, turned, memory.keys, queries, memory.positions, starts)

    def expanded(
        self,
        plain: Tensor,
        turned: Tensor,
        memory: Tensor,
        queries: Tensor | None,
        keys: Tensor | None,
        starts: Tensor | None,
    ) -> Tensor:
        """Attention over keys and values made from the latents: DeepSeek-V2, (10) to (19)."""
        q = torch.cat((plain, turned), dim=-1)
        return self.attend(q, *self.expand(memory), queries, keys, starts)

    def absorbed(
        self,
        plain: Tensor,
        turned: Tensor,
        memory: Tensor,
        queries: Tensor | None,
        keys: Tensor | None,
        starts: Tensor | None,
    ) -> Tensor:
        """The same over the latents, which are the keys and values of all heads."""
        q, to_values = self.absorb(plain, turned)
        y = self.attend(q, memory, memory, queries, keys, starts)[..., : self.rank]
        return y @ to_values.to(y.dtype)

    def expand(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, H, S, d + d_r) and values (B, H, S, d_v) made from the memory."""
        latent, key = memory.split((self.rank, self.turned), dim=-1)  # (B, 1, S, r or d_r)
        up = self.kv_up(latent.squeeze(1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = up.split((self.plain, self.value), dim=-1)
        return torch.cat((k, key.expand(-1, self.heads, -1, -1)), dim=-1), v

    def absorb(self, plain: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """Queries for the memory (B, H, T, r + d_r), and the map from latents to values
        (H, r, d_v)."""
        up = self.kv_up.weight.view(self.heads, -1, self.rank)  # (H, d + d_v, r)
        to_keys, to_values = up.split((self.plain, self.value), dim=1)
        return torch.cat((plain @ to_keys.to(plain.dtype), turned), dim=-1), to_values.mT

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Tensor | None,
        keys: Tensor | None,
        starts: Tensor | None,
    ) -> Tensor:
        """Attention for values and keys of different widths: zeros fill up the narrower ones."""
        width = max(q.shape[-1], v.shape[-1])
        filled = [
            F.pad(part, (0, width - part.shape[-1]))
            for part in (q * (self.scale * width**0.5), k, v)
        ]
        y = attention(*filled, queries, keys, impl=self.impl, query_starts=starts)
        return y[..., : v.shape[-1]]

    def absorbing_saves(self, T: int, S: int) -> bool:
        """Whether the absorbed form takes fewer operations for T tokens over S tokens."""
        up = self.rank * (self.plain + self.value)
        expanded = S * up + T * S * (self.plain + self.turned + self.value)
        return T * up + T * S * (2 * self.rank + self.turned) < expanded

    def angles(self, positions: Tensor, cache: dict) -> tuple[Tensor, Tensor]:
        """The angles of `rotary`, computed once for all layers with the same rotation."""
        key = ("rotary", self.turned, self.options.rope_base, self.scaling)
        if key not in cache:
            cache[key] = rotary(positions, *key[1:])
        return cache[key]

    def flops(self, context: int) -> float:
        """Forward FLOPs per token of the expanded form: maps, and QKᵀ and PV with all keys."""
        maps = [part for part in self.children() if isinstance(part, nn.Linear)]
        width = max(self.plain + self.turned, self.value)
        return sum(flops(part, context) for part in maps) + 4 * self.heads * width * context

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes of latents and rotary keys remembered per sequence after `context` tokens."""
        return context * (self.rank + self.turned) * itemsize


def pairs_apart(x: Tensor) -> Tensor:
    """Move adjacent pairs, as in DeepSeek's weights, to the two halves that `rotate` turns."""
    return x.unflatten(-1, (-1, 2)).mT.flatten(-2)
