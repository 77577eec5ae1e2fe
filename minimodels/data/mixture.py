"""Several texts in one source, each with a weight: "code=0.7:DIR prose=0.3:FILE"."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from minimodels.data.source import Source, generator
from minimodels.data.windows import Text
from minimodels.errors import InputError

PART = re.compile(r"(?:^|\s+)([A-Za-z_]\w*)=([^\s:=]+):(?=\S)")


class Mixture(Source):
    """Several texts. Each row of a batch is drawn from one of them, by weight. All share one
    tokenizer and one context."""

    def __init__(self, parts: Mapping[str, Text], weights: Mapping[str, float]):
        self.parts, self.weights = dict(parts), dict(weights)
        first = next(iter(self.parts.values()))
        self.context, self.vocab, self.tokenizer = first.context, first.vocab, first.tokenizer
        self.fingerprint = "; ".join(
            f"{name}={weights[name]:g}: {part.fingerprint}" for name, part in self.parts.items()
        )

    def describe(self) -> str:
        """Each part with its share of the rows."""
        total = sum(self.weights.values())
        summaries = [
            f"{name} {self.weights[name] / total:.0%}: {part.describe()}"
            for name, part in self.parts.items()
        ]
        return " | ".join(summaries)

    def batch(
        self,
        seed: int,
        step: int,
        size: int,
        context: int | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> tuple[Tensor, ...]:
        """The rows of one training step, each from a part that is drawn by its weight. `weights`
        replaces the mixture's own."""
        chances = torch.tensor(
            [(weights or {}).get(name, self.weights[name]) for name in self.parts]
        )
        random = generator("mixture", seed, step)
        chosen = torch.multinomial(chances, size, replacement=True, generator=random)  # (size,)
        counts = torch.bincount(chosen, minlength=len(self.parts)).tolist()
        drawn = [
            part.batch(seed, step, count, context)
            for part, count in zip(self.parts.values(), counts, strict=True)
            if count
        ]
        place = chosen.argsort(stable=True).argsort()  # of each row among the rows of all parts
        return tuple(torch.cat(tensors)[place] for tensors in zip(*drawn, strict=True))

    def validation(self, size: int, batches: int) -> Iterator[tuple[Tensor, ...]]:
        """Held-out rows of every part, in proportion to its weight, in mixed order."""
        drawn = [
            next(part.validation(count, 1))
            for part, count in zip(self.parts.values(), self.shares(size * batches), strict=True)
            if count
        ]
        order = torch.randperm(size * batches, generator=generator("validation", size * batches))
        tensors = [torch.cat(tensors)[order] for tensors in zip(*drawn, strict=True)]
        yield from zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def validation_bytes(self, size: int, batches: int) -> int:
        """The bytes of text that all targets of `validation` represent."""
        shares = zip(self.parts.values(), self.shares(size * batches), strict=True)
        return sum(part.validation_bytes(count, 1) for part, count in shares if count)

    def validation_targets(self, size: int, batches: int) -> int:
        """The number of targets of `validation`."""
        shares = zip(self.parts.values(), self.shares(size * batches), strict=True)
        return sum(part.validation_targets(count, 1) for part, count in shares if count)

    def shares(self, rows: int) -> list[int]:
        """How many rows come from each part. The numbers add up to all rows."""
        total, passed, shares = sum(self.weights.values()), 0.0, []
        for weight in self.weights.values():
            before, passed = passed, passed + weight / total
            shares.append(round(rows * passed) - round(rows * before))
        return shares


def parse_mixture(text: str) -> dict[str, tuple[float, str]] | None:
    """ "code=0.7:DIR prose=0.3:FILE" -> {"code": (0.7, "DIR"), "prose": (0.3, "FILE")}; None
    if the text is not a mixture.

    File names may contain spaces. Raises InputError if a weight is not a positive number, or a name
    appears twice.
    """
    found = list(PART.finditer(text))
    if not found or found[0].start() != 0:
        return None
    parts = {}
    for match, following in zip(found, [*found[1:], None], strict=True):
        name, weight = match[1], to_weight(match[2])
        if name in parts or not 0 < weight < math.inf:
            accepted = "NAME=WEIGHT:TEXT with names that differ and weights above 0"
            raise InputError("data", match[0].strip() + "...", accepted)
        parts[name] = (weight, text[match.end() : following.start() if following else None])
    return parts


def to_weight(text: str) -> float:
    """The number in a text; 0 if the text is not a number."""
    try:
        return float(text)
    except ValueError:
        return 0.0
