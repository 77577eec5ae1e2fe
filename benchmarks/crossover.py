"""From which context on is one model faster than another?

The crossover is computed separately for each round of measurements, which also gives its spread.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Crossover:
    """The context from which one model is faster than another: median, least and greatest over the
    rounds; None if it is outside the measured contexts."""

    contexts: list[int]
    median: float | None
    low: float | None
    high: float | None
    faster: bool  # at the longest context
    steady: bool  # and the same at all others

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
    """Where the ratio (the other's seconds over its own) last rises above 1. Between contexts it is
    interpolated linearly in the logarithms.

    contexts: ascending. ratios: one list of rounds for each context; only the rounds that all
    contexts have are used. A round may have no such place. If more than half of the rounds have
    one, the median is over these.
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
    """The crossover in the rows of one file, mode and batch. Each model is taken at its fastest
    path at each context. None if fewer than two contexts have both models."""
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
