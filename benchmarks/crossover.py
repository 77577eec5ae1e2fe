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
    """The context from which on one model is faster than another: median, least and greatest over
    the rounds. The first of the contexts stands for any that is not longer. Infinity means that the
    other model is faster at the last."""

    contexts: list[int]
    median: float
    low: float
    high: float
    sooner: bool  # whether it is faster at a context before the last, in the median round
    overlap: bool = False  # whether their spreads at the longest context overlap


def crossover(contexts: list[int], ratios: list[list[float]]) -> Crossover:
    """Where the ratio (the other's seconds over its own) last rises above 1.

    contexts: ascending. ratios: one list of rounds for each context; only the rounds that all
    contexts have are used.
    """
    places = [rise(contexts, values) for values in zip(*ratios, strict=False)]
    # in logarithms, because a disturbed round must not decide the middle of an even number
    sooner = any(statistics.median(map(math.log, values)) >= 0 for values in ratios[:-1])
    return Crossover(contexts, statistics.median(places), min(places), max(places), sooner)


def rise(contexts: list[int], values: tuple[float, ...]) -> float:
    """Where the values of one round last rise above 1, interpolated linearly in the logarithms."""
    below = [i for i, value in enumerate(values) if value < 1]
    if not below:
        return contexts[0]
    if below[-1] == len(values) - 1:
        return math.inf
    low, high = below[-1], below[-1] + 1
    share = math.log(values[low]) / math.log(values[low] / values[high])
    return contexts[low] * (contexts[high] / contexts[low]) ** share


def overtaking(rows: list[dict], other: str = "transformer") -> dict[str, Crossover]:
    """Where each model overtakes the `other`, in the rows of one file, mode and batch. At each
    context a model's fastest path counts. Models that share fewer than two contexts with the
    `other` are left out. So are those that were timed only once, because that may be noise."""
    fastest: dict[str, dict[int, list[float]]] = {}  # model -> context -> seconds
    noise: dict[int, list[float]] = {}  # context -> further seconds of the other's fastest path
    again = {(row["model"], row["context"]): row["seconds"] or [] for row in rows}
    for row in sorted(rows, key=lambda row: row["context"]):
        if row["seconds"] and not row["model"].endswith(" again"):
            base, context = row.get("base", row["model"]), row["context"]
            times = fastest.setdefault(base, {})
            known = times.get(context)
            if known is None or statistics.median(row["seconds"]) < statistics.median(known):
                times[context] = row["seconds"]
                if base == other:
                    noise[context] = again.get((f"{row['model']} again", context), [])
    base, found = fastest.pop(other, {}), {}
    for model, times in fastest.items():
        contexts = [context for context in times if context in base]
        ratios = [
            [theirs / own for theirs, own in zip(base[context], times[context], strict=False)]
            for context in contexts
        ]
        if len(contexts) > 1 and min(map(len, ratios)) > 1:
            last = contexts[-1]
            meet = overlap(base[last] + noise[last], times[last])
            found[model] = replace(crossover(contexts, ratios), overlap=meet)
    return found


def sentence(found: dict[str, Crossover], other: str = "transformer") -> str:
    """Which models are faster than the `other`, and from which context on."""
    groups: dict[str, list[str]] = {}  # where -> models; "": at a context of their own
    for model, place in found.items():
        first, last, name, where = place.contexts[0], place.contexts[-1], unbroken(model), ""
        close = f" (too close to tell at {last:,})" if place.overlap else ""
        if place.high == first:
            where = f" everywhere from {first:,} to {last:,}"
        elif place.median < math.inf:
            high = f"{place.high:,.0f}" if place.high < math.inf else f"above {last:,}"
            name += unbroken(f" from {place.median:,.0f} on ({place.low:,.0f}-{high})") + close
        elif place.sooner:
            where = f" in parts, but not at {last:,}"
        else:
            where = f" nowhere from {first:,} to {last:,}"
        groups.setdefault(where and where + close, []).append(name)
    texts = [", ".join(names) + where for where, names in groups.items()]
    return f"Faster than the {other}: {'; '.join(texts)}" if texts else ""
