"""One picture of all operations: how close is each provider to the machine's own rate of
copying or multiplying?"""

from __future__ import annotations

import statistics
from collections import defaultdict

from .drawing import canvas, sources
from .verdict import overlap

OURS = {"triton": "#111827", "torch": "#6b7280", "reference": "#d1d5db"}  # and their colours
PEERS = ("#0891b2", "#ec4899", "#84cc16", "#92400e", "#c026d3")  # colours of the others
PEER_MARKERS = ("o", "s", "^", "v")  # when all colours are taken, they return with the next marker
ROW = 0.24  # inches


def operations(rows: list[dict]):
    """The picture, if any operation was timed. It has a line for each case and direction, and a
    mark for each provider."""
    cases = defaultdict(dict)
    for row in rows:
        if row.get("benchmark") == "kernels" and row.get("seconds"):
            label = f"{row['operation']} {row['direction']}, {row['case']}"
            cases[label][row["provider"]] = row
    if not cases:
        return
    timed = [row for providers in cases.values() for row in providers.values()]
    question = "What share of the machine's copying or multiplying does each operation reach?"
    figure, axes = canvas(question, ahead(list(cases.values())), sources(timed))
    figure.set_size_inches(11, 1.8 + ROW * len(cases))
    draw(axes, cases)
    yield "operations", figure


def draw(axes, cases: dict[str, dict[str, dict]]) -> None:
    """Draw a mark at the median of each provider, with the first case at the top."""
    from matplotlib import ticker

    names = dict.fromkeys(name for providers in cases.values() for name in providers)
    peers = [name for name in names if name not in OURS]
    looks = {name: (colour, "D") for name, colour in OURS.items() if name in names}
    for i, name in enumerate(peers):
        looks[name] = PEERS[i % len(PEERS)], PEER_MARKERS[i // len(PEERS) % len(PEER_MARKERS)]
    lines = list(reversed(cases.items()))
    for name, (colour, marker) in looks.items():
        points = [
            (providers[name]["rate"] / providers[name]["ceiling"], place)
            for place, (_, providers) in enumerate(lines)
            if name in providers
        ]
        shares, places = zip(*points, strict=True)
        axes.scatter(shares, places, s=26, color=colour, marker=marker, label=name, zorder=3)
    axes.set_yticks(
        range(len(lines)), [label.replace("$", r"\$") for label, _ in lines], fontsize=8
    )
    axes.set_ylim(-0.7, len(lines) - 0.3)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(1))
    axes.set_xlabel("share of the rate of a large copy, or of a large matrix product")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)


def ahead(cases: list[dict[str, dict]]) -> str:
    """A sentence with the number of cases in which the kernel is ahead of the torch path. Without
    kernels, it compares the torch path with the reference."""
    ours, other = (
        ("triton", "torch") if any("triton" in case for case in cases) else ("torch", "reference")
    )
    won = lost = open_ = 0
    for case in cases:
        if ours in case and other in case:
            mine, theirs = case[ours]["seconds"], case[other]["seconds"]
            if overlap(mine, theirs):
                open_ += 1
            elif statistics.median(mine) < statistics.median(theirs):
                won += 1
            else:
                lost += 1
    if not won + lost + open_:
        return "No case has times to compare."
    undecided = f"; in {open_} the spreads overlap" if open_ else ""
    cases_in_all = won + lost + open_
    return f"{ours} is faster than {other} in {won} of {cases_in_all} cases, slower in {lost}{undecided}."
