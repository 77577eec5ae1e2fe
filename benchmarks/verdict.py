"""Who is ahead, in words, and when nobody can be said to be."""

from __future__ import annotations

import math


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether the spreads of two samples meet."""
    return max(min(one), min(other)) <= min(max(one), max(other))


def verdict(
    scores: dict[str, list[float]], higher: bool, where: str, samples: str, share: bool
) -> str:
    """Who is ahead, in words, with all means; nobody, if the spread of another reaches into that of
    the best.

    scores: by name, the values of each seed or round, which `samples` names; higher: whether more
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
    """The text with spaces at which no line ends."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def score(value: float, share: bool) -> str:
    """A mean in a sentence, with three digits."""
    if share:
        return f"{value:.1%}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 6)}f}"
