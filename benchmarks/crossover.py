"""From which context on is a model faster than another one?

The crossover is computed separately for each round of measurements, which also gives its spread.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from .verdict import overlap, unbroken


@dataclass(frozen=True)
class Crossover:
    """The context from which one model is faster than another: median, least and greatest over the
    rounds; None if it is outside the measured contexts."""

    contexts: list[int]
    median: float | None
    low: float | None
    high: float | None
    faster: bool  # at the longest context
    steady: bool  # whether `faster` is the same at all contexts
    overlap: bool = False  # whether their spreads at the longest context overlap


def crossover(contexts: list[int], ratios: list[list[float]]) -> Crossover:
    """Where the ratio (the other's seconds over its own) last rises above 1. Between contexts it is
    interpolated linearly in the logarithms.

    contexts: ascending. ratios: one list of rounds for each context; only the rounds that all
    contexts have are used. Rounds without a crossing are left out, and there is a result only if
    most rounds have one.
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


def overtaking(rows: list[dict], other: str = "transformer") -> dict[str, Crossover]:
    """Where each model overtakes the `other`, in the rows of one file, mode and batch. At each
    context a model's fastest path counts. Models that share fewer than two contexts with the
    `other` are left out. So are those that were timed only once, because that may be noise."""
    fastest: dict[str, dict[int, list[float]]] = {}  # model -> context -> seconds
    for row in sorted(rows, key=lambda row: row["context"]):
        if row["seconds"] and not row["model"].endswith(" again"):
            times = fastest.setdefault(row.get("base", row["model"]), {})
            known = times.get(row["context"])
            if known is None or statistics.median(row["seconds"]) < statistics.median(known):
                times[row["context"]] = row["seconds"]
    base, found = fastest.pop(other, {}), {}
    for model, times in fastest.items():
        contexts = [context for context in times if context in base]
        ratios = [
            [theirs / own for theirs, own in zip(base[context], times[context], strict=False)]
            for context in contexts
        ]
        if len(contexts) > 1 and min(map(len, ratios)) > 1:
            last = contexts[-1]
            meet = overlap(base[last], times[last])
            found[model] = replace(crossover(contexts, ratios), overlap=meet)
    return found


def sentence(found: dict[str, Crossover], other: str = "transformer") -> str:
    """Which models are faster than the `other`, and from which context on."""
    groups: dict[str, list[str]] = {}  # where -> models; "": at a context of their own
    for model, place in found.items():
        first, last, name, where = place.contexts[0], place.contexts[-1], unbroken(model), ""
        if place.median is not None:
            name += unbroken(f" from {place.median:,.0f} on ({place.low:,.0f}-{place.high:,.0f})")
        elif place.steady:
            where = f" {'everywhere' if place.faster else 'nowhere'} from {first:,} to {last:,}"
        else:
            where = f" in parts, {'and' if place.faster else 'but not'} at {last:,}"
        if place.overlap:
            name += " (too close to tell at the end)"
        groups.setdefault(where, []).append(name)
    texts = [", ".join(names) + where for where, names in groups.items()]
    return f"Faster than the {other}: {'; '.join(texts)}" if texts else ""
