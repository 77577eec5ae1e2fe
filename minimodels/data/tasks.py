"""Synthetic tasks. Each tests one ability, with sequences that distinguish
architectures at toy scale.

A task makes its batches from (seed, step), like text, and each sequence fills the context. Only the
answers are targets. The metric is the fraction of answers that are right. Options follow the name:
`--data mqar(pairs=8, vocab=256)`.

Recall tests what a state can store (copying, induction, mqar, overwrite). State tracking tests what
it can compute (parity, s3).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minimodels.data.source import Source, generator
from minimodels.errors import Count, InputError, describe, fits, nearest
from minimodels.grammar import excerpt, parse_call
from minimodels.ops.linear_cross_entropy import IGNORE


@dataclass
class Task(Source):
    """A source of batches (tokens, targets), both (size, context) int64."""

    context: int

    def describe(self) -> str:
        """The task with its options and context, for the header of a run."""
        return str(self)

    def batch(
        self, seed: int, step: int, size: int, context: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sequences of one training step."""
        task = self if context is None else dataclasses.replace(self, context=context)
        return task.make(generator("training", seed, step), size)

    def validation(self, size: int, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same `batches` batches every time, drawn separately from those of training."""
        for step in range(batches):
            yield self.make(generator("validation", step), size)

    @property
    def fingerprint(self) -> str:
        """Identifies the task when a run is resumed."""
        return str(self)

    def require(self, minimum: int):
        """Raise InputError if the context is shorter than `minimum`."""
        if self.context < minimum:
            raise InputError("context", self.context, f"{minimum} or more, for {self}")


@dataclass
class SelectiveCopying(Task):
    """Remember `tokens` tokens at random places among noise, and repeat them in order at the end.

    Mamba (arXiv:2312.00752) §4.1.1. Token 0 is noise, 1 asks for the next answer, and the others
    are to be remembered.
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
        """(tokens, targets) of `size` sequences, (size, context) int64 each."""
        length = self.context - self.tokens  # the text; the answers come after
        remembered = torch.randint(2, self.vocab, (size, self.tokens), generator=random)
        places = torch.rand(size, length, generator=random).topk(self.tokens).indices.sort(1).values
        text = torch.zeros(size, length, dtype=torch.int64).scatter(1, places, remembered)
        tokens = torch.cat((text, torch.ones_like(remembered)), dim=1)
        targets = torch.cat((torch.full_like(text, IGNORE), remembered), dim=1)
        return tokens, targets


@dataclass
class InductionHeads(Task):
    """A special token appears somewhere in random text, and again at the end. Answer with the token
    that followed it the first time.

    Mamba §4.1.2; the mechanism was named by Olsson et al., arXiv:2209.11895. The special token is
    the last of the vocabulary.
    """

    vocab: int = 16

    def __post_init__(self):
        if self.vocab < 3:
            raise InputError("vocab", self.vocab, "3 or more")
        self.require(3)

    def make(self, random: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets) of `size` sequences, (size, context) int64 each."""
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
    """Multi-query associative recall: first key-value pairs, then some of the keys again. The
    answer to each key is its value.

    Arora et al., "Zoology", arXiv:2312.04927. Keys are the lower half of the vocabulary, values the
    upper. A key appears again after a gap drawn from a power law, so that most keys are asked for
    early. Random tokens fill the gaps between the questions.
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
        """(tokens, targets) of `size` sequences, (size, context) int64 each."""
        half, slots = self.vocab // 2, (self.context - 2 * self.pairs) // 2
        # distinct in each row
        keys = torch.rand(size, half, generator=random).topk(self.pairs).indices
        values = torch.randint(half, 2 * half, (size, self.pairs), generator=random)
        chance = torch.arange(1, slots + 1, dtype=torch.float64) ** (self.POWER - 1)
        gaps = torch.multinomial(chance.expand(size, -1), self.pairs, generator=random)  # distinct
        questions = 2 * self.pairs + 2 * gaps
        tokens = torch.randint(self.vocab, (size, self.context), generator=random)
        tokens[:, : 2 * self.pairs] = torch.stack((keys, values), dim=2).flatten(1)
        tokens.scatter_(1, questions, keys)
        targets = torch.full_like(tokens, IGNORE).scatter(1, questions, values)
        return tokens, targets


@dataclass
class Overwrite(Task):
    """Keys are given values again and again. At the end each key is asked for its last value.

    A state that only adds keeps the old values too; the delta rule (Schlag et al.,
    arXiv:2102.11174) removes them. Keys are the lower half of the vocabulary, values the upper.
    Every key is written once at the beginning. Then keys drawn at random are written until the
    questions begin. If the length leaves a single token over, it comes first and has no meaning.
    """

    keys: int = 8
    vocab: int = 64

    def __post_init__(self):
        if self.vocab < 2 * self.keys:
            accepted = f"{2 * self.keys} or more: {self.keys} keys, and as many values"
            raise InputError("vocab", self.vocab, accepted)
        self.require(3 * self.keys)

    def make(self, random: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets) of `size` sequences, (size, context) int64 each."""
        half, writes = self.vocab // 2, (self.context - self.keys) // 2
        names = torch.rand(size, half, generator=random).topk(self.keys).indices  # (B, keys)
        first = torch.arange(self.keys).expand(size, -1)
        later = torch.randint(self.keys, (size, writes - self.keys), generator=random)
        written = torch.cat((first, later), dim=1)  # index of the key, (B, writes)
        values = torch.randint(half, 2 * half, (size, writes), generator=random)
        memory = torch.zeros(size, self.keys, dtype=torch.int64)
        for write in range(writes):
            memory.scatter_(1, written[:, write : write + 1], values[:, write : write + 1])
        asked = torch.rand(size, self.keys, generator=random).argsort(1)
        filler = torch.randint(
            half, 2 * half, (size, (self.context - self.keys) % 2), generator=random
        )
        pairs = torch.stack((names.gather(1, written), values), dim=2).flatten(1)
        tokens = torch.cat((filler, pairs, names.gather(1, asked)), dim=1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -self.keys :] = memory.gather(1, asked)
        return tokens, targets


@dataclass
class Parity(Task):
    """Random bits. At every position, answer whether the number of ones so far is odd.

    This is the smallest problem of state tracking. Linear recurrences with positive decays cannot
    solve it at every length (Grazzi et al., arXiv:2411.12537).
    """

    vocab = 2

    def __post_init__(self):
        self.require(1)

    def make(self, random: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets) of `size` sequences, (size, context) int64 each."""
        tokens = torch.randint(2, (size, self.context), generator=random)
        return tokens, tokens.cumsum(1) % 2


@dataclass
class SymmetricGroup(Task):
    """Random permutations of three things. At every position, answer with
    the product of all so far.

    The word problem of S3 (Merrill et al., "The Illusion of State in State-Space Models",
    arXiv:2404.08819). A token or an answer is the index of a permutation. The product applies
    earlier permutations first. The order matters, because S3 does not commute.
    """

    vocab = 6
    PERMUTATIONS = tuple(itertools.permutations(range(3)))

    def __post_init__(self):
        self.require(1)

    def make(self, random: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets) of `size` sequences, (size, context) int64 each."""
        tokens = torch.randint(6, (size, self.context), generator=random)
        table = torch.tensor(  # [product so far, next] -> product
            [
                [
                    self.PERMUTATIONS.index(tuple(after[i] for i in before))
                    for after in self.PERMUTATIONS
                ]
                for before in self.PERMUTATIONS
            ]
        )
        targets = torch.empty_like(tokens)
        product = torch.zeros(size, dtype=torch.int64)  # permutation 0 changes nothing
        for t in range(self.context):
            product = table[product, tokens[:, t]]
            targets[:, t] = product
        return tokens, targets


TASKS = {
    "copying": SelectiveCopying,
    "induction": InductionHeads,
    "mqar": AssociativeRecall,
    "overwrite": Overwrite,
    "parity": Parity,
    "s3": SymmetricGroup,
}


def is_task(text: str) -> bool:
    """Whether a text names a task, with or without options."""
    return text.partition("(")[0].strip() in TASKS


def open_task(text: str, context: int) -> Task | None:
    """The task that a text names, such as "mqar(pairs=8, vocab=256)"; None if it names none.

    Raises InputError if the task does not have an option, or if its value is not a whole number
    above 0.
    """
    if not is_task(text):
        return None
    call = parse_call(text, "data")
    kind = TASKS[call.name]
    known = [field.name for field in dataclasses.fields(kind) if field.name != "context"]
    for option in call.options:
        where = excerpt(text, option.at)
        if option.name not in known:
            accepted = nearest(option.name, known) or "no options"
            raise InputError(f"data: {call.name}", option.name, accepted, where)
        if not fits(option.value, Count):
            raise InputError(
                f"data: {call.name}.{option.name}", option.value, describe(Count), where
            )
    return kind(context, **{option.name: option.value for option in call.options})
