"""Synthetic tasks, each asking for one ability: the sequences that tell architectures apart at toy scale.

A task makes its batches from (seed, step), like text, and its length is the context. Only the answers are targets; the metric
is the fraction of them that is right. Parameters follow the name: `--data mqar:pairs=8,vocab=256`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minimodels.data.text import generator
from minimodels.errors import InputError
from minimodels.ops.linear_cross_entropy import IGNORE


@dataclass
class Task:
    """A source of batches (tokens, targets), both (size, context) int64."""

    context: int

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        """The sequences of one training step."""
        return self.make(generator("training", seed, step), size)

    def validation(self, size: int, batches: int):
        """The same `batches` batches every time, drawn apart from those of training."""
        for step in range(batches):
            yield self.make(generator("validation", step), size)

    @property
    def fingerprint(self) -> str:
        """By which a resumed run knows its task again."""
        return str(self)

    def require(self, minimum: int):
        if self.context < minimum:
            raise InputError("context", self.context, f"{minimum} or more, for {self}")


@dataclass
class SelectiveCopying(Task):
    """Remember `tokens` tokens strewn at random places among noise, and repeat them in order at the end.

    Mamba (arXiv:2312.00752) §4.1.1. Token 0 is noise, 1 asks for the next answer, the rest are to be remembered.
    """

    tokens: int = 16
    vocab: int = 16

    def __post_init__(self):
        if self.vocab < 3:
            raise InputError(
                "vocab", self.vocab, "3 or more: noise, the question, one token to remember"
            )
        self.require(2 * self.tokens)

    def make(self, random: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        length = self.context - self.tokens  # the text; the answers come after
        remembered = torch.randint(2, self.vocab, (size, self.tokens), generator=random)
        places = torch.rand(size, length, generator=random).topk(self.tokens).indices.sort(1).values
        text = torch.zeros(size, length, dtype=torch.int64).scatter(1, places, remembered)
        tokens = torch.cat((text, torch.ones_like(remembered)), dim=1)
        targets = torch.cat((torch.full_like(text, IGNORE), remembered), dim=1)
        return tokens, targets


@dataclass
class InductionHeads(Task):
    """One special token stands somewhere in random text, and again at the end: say what followed it the first time.

    Mamba §4.1.2; the mechanism was named by Olsson et al., arXiv:2209.11895. The special token is the last of the vocabulary.
    """

    vocab: int = 16

    def __post_init__(self):
        if self.vocab < 3:
            raise InputError("vocab", self.vocab, "3 or more")
        self.require(3)

    def make(self, random: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(self.vocab - 1, (size, self.context), generator=random)
        place = torch.randint(self.context - 2, (size, 1), generator=random)
        answer = tokens.gather(1, place + 1)
        tokens = tokens.scatter(1, place, self.vocab - 1)
        tokens[:, -1] = self.vocab - 1
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -1:] = answer
        return tokens, targets


@dataclass
class AssociativeRecall(Task):
    """Multi-query associative recall: key-value pairs first, then some keys again, each to be answered by its value.

    Arora et al., "Zoology", arXiv:2312.04927. Keys are the lower half of the vocabulary, values the upper; a key comes back
    after a gap drawn from a power law, so that most are asked for early; between the questions stands random filling.
    """

    pairs: int = 8
    vocab: int = 8192
    POWER = 0.01

    def __post_init__(self):
        if self.vocab < 2 * self.pairs:
            raise InputError(
                "vocab",
                self.vocab,
                f"{2 * self.pairs} or more: a key and a value for each of {self.pairs} pairs",
            )
        self.require(4 * self.pairs)

    def make(self, random: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        half, slots = self.vocab // 2, (self.context - 2 * self.pairs) // 2
        keys = (
            torch.rand(size, half, generator=random).topk(self.pairs).indices
        )  # distinct in each row
        values = torch.randint(half, 2 * half, (size, self.pairs), generator=random)
        chance = torch.arange(1, slots + 1, dtype=torch.float64) ** (self.POWER - 1)
        gaps = torch.multinomial(chance.expand(size, -1), self.pairs, generator=random)  # distinct
        questions = 2 * self.pairs + 2 * gaps
        tokens = torch.randint(self.vocab, (size, self.context), generator=random)
        tokens[:, : 2 * self.pairs] = torch.stack((keys, values), dim=2).flatten(1)
        tokens.scatter_(1, questions, keys)
        targets = torch.full_like(tokens, IGNORE).scatter(1, questions, values)
        return tokens, targets


TASKS = {"copying": SelectiveCopying, "induction": InductionHeads, "mqar": AssociativeRecall}
