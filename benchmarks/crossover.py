"""From which context on is one model faster than another?

A crossover is found in each round of measurements on its own, so that its spread is known too.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Crossover:
    """The context from which one model is faster than another, each round on its own; None: not within what was measured."""

    contexts: list[int]
    median: float | None
    low: float | None
    high: float | None
    faster: bool  # at the longest context
    steady: bool  # and at all others alike

    def __str__(self) -> str:
        first, last = self.contexts[0], self.contexts[-1]
        if self.median is None:
            where = (
                f"from {first:,} to {last:,}"
                if self.steady
                else f"at {last:,}, but not at every context from {first:,} on"
            )
            return f"Mamba is {'faster' if self.faster else 'slower'} than the transformer {where}"
        return f"Mamba is faster than the transformer from {self.median:,.0f} tokens on ({self.low:,.0f}-{self.high:,.0f})"


def crossover(contexts: list[int], ratios: list[list[float]]) -> Crossover:
    """Where the ratio (the other's seconds over its own) last rises through 1, between contexts straight in their logarithms.

    contexts ascending; ratios: one list of rounds for each of them, of which as many count as all have. A round without such a
    place counts as none; the median is over the rounds that have one, if they are most.
    """
    places = []
    rounds = list(zip(*ratios, strict=False))
    for values in rounds:
        logs = [math.log(value) for value in values]
        for i in reversed(range(len(logs) - 1)):
            if logs[i] < 0 <= logs[i + 1]:
                share = -logs[i] / (logs[i + 1] - logs[i])
                places.append(
                    math.exp(
                        (1 - share) * math.log(contexts[i]) + share * math.log(contexts[i + 1])
                    )
                )
                break
    wins = [statistics.median(values) >= 1 for values in ratios]
    if 2 * len(places) <= len(rounds) or not wins[-1]:
        return Crossover(contexts, None, None, None, wins[-1], len(set(wins)) == 1)
    return Crossover(contexts, statistics.median(places), min(places), max(places), wins[-1], False)


def overtaking(rows: list[dict]) -> Crossover | None:
    """The crossover of the rows of one file, mode and batch, the fastest way of either model taken at each context; None where
    two contexts do not have both models."""
    fastest: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        if row["seconds"] and not row["model"].endswith(" again"):
            models, base = fastest.setdefault(row["context"], {}), row.get("base", row["model"])
            if base not in models or statistics.median(row["seconds"]) < statistics.median(
                models[base]
            ):
                models[base] = row["seconds"]
    both = {
        context: models
        for context, models in sorted(fastest.items())
        if {"mamba", "transformer"} <= models.keys()
    }
    ratios = [
        [t / m for t, m in zip(models["transformer"], models["mamba"], strict=False)]
        for models in both.values()
    ]
    return crossover(list(both), ratios) if len(both) > 1 else None
