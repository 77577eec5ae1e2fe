"""Sentences that say which model is ahead, or that none is."""

from __future__ import annotations

import math


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether the ranges of two samples overlap."""
    return max(min(one), min(other)) <= min(max(one), max(other))


def verdict(
    scores: dict[str, list[float]], higher: bool, where: str, samples: str, share: bool
) -> str:
    """A sentence that says which model is ahead, with all means. If the range of another model
    overlaps with that of the best, it says that none is ahead.

    scores: by name, the values of each seed or round, which `samples` names. higher: whether more
    is better.
    """
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    means = dict(sorted(means.items(), key=lambda item: item[1], reverse=higher))
    best = next(iter(means))
    told = "; ".join(unbroken(f"{name} {score(mean, share)}") for name, mean in means.items())
    if len(means) == 1:
        return f"{where}: {told}"
    if min(map(len, scores.values())) == 1:
        return f"No winner can be told {where} with one {samples} each: {told}"
    if rivals := [name for name in means if name != best and overlap(scores[best], scores[name])]:
        names = [unbroken(name) for name in (best, *rivals)]
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        return f"No winner {where}, because the spreads of {listed} overlap: {told}"
    return f"{unbroken(best)} is ahead {where}: {told}"


def unbroken(text: str) -> str:
    """The text with spaces at which no line is broken."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def score(value: float, share: bool) -> str:
    """A mean in a sentence, rounded to three digits."""
    if share:
        return f"{value:.1%}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 6)}f}"
