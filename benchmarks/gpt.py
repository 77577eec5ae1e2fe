"""GPT-2 in plain PyTorch. It is the peer of our transformer for small training
steps, in which overhead counts.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; without biases and
dropout, as [nanoGPT](https://github.com/karpathy/nanoGPT) trains it. It has LayerNorm, one product
for q, k and v, GELU in an MLP of four times the width, and a learned vector for each position. At
width 128, with 64 positions, it has 1 % fewer parameters than ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels import Config


class Block(nn.Module):
    """Attention and an MLP, each with a norm before it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.up, self.down = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, d)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """GPT-2 with the width, vocabulary and depth of a config, for up to `context` tokens."""

    def __init__(self, config: Config, heads: int, context: int):
        super().__init__()
        self.embedding, self.positions = (
            nn.Embedding(config.vocab, config.width),
            nn.Embedding(context, config.width),
        )
        self.blocks = nn.Sequential(*(Block(config.width, heads) for _ in range(config.depth // 2)))
        self.norm = nn.LayerNorm(config.width, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.init_std)

    def loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy in nats per token, twice, in the form of LM.loss.
        tokens and targets (B, T)."""
        x = self.embedding(tokens) + self.positions(
            torch.arange(tokens.shape[1], device=tokens.device)
        )  # (B, T, D)
        logits = F.linear(self.norm(self.blocks(x)), self.embedding.weight)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, {"cross_entropy": loss.detach()}

    def after_step(self, taken: float = 1.0) -> None:
        """Does nothing, because there are no experts to balance."""
