"""The style of the pictures: a canvas with a question, its answer and a source; one colour per
architecture; readable numbers."""

from __future__ import annotations

import math
import re
import textwrap
import zlib
from itertools import cycle, pairwise
from pathlib import Path

from minimodels.colours import COLOURS, OTHERS
from minimodels.errors import missing

STYLES = ("-", "--", ":", "-.")
STYLE_NAMES = ("solid", "dashed", "dotted", "dash-dotted")
MARKERS = ("o", "s", "^", "D", "v")
SCALES = {1e9: "billion", 1e12: "trillion", 1e15: "quadrillion", 1e18: "quintillion"}
LINE, SMALL_LINE = 100, 150  # characters of a title and of a caption that fit into a line
GAP = 13.0  # minimum distance in points between the names of two lines


def pyplot():
    """pyplot from matplotlib, set to draw only into files. Raises InputError
    if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise missing("matplotlib", "plot") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "minimodels"  # the same rows give the same file
    from matplotlib import pyplot

    return pyplot


def canvas(question: str, answer: str, caption: str):
    """A figure with its question, the answer below it, and the source of
    the figures at the bottom."""
    figure, axes = pyplot().subplots(figsize=(9, 5.4), layout="constrained")
    title = "\n".join(wrap(text, LINE) for text in (question, answer) if text)
    source = "\n".join(wrap(text, SMALL_LINE) for text in caption.splitlines())
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.supxlabel(source, fontsize=8, color="#666666", x=0.01, ha="left")
    axes.grid(True, which="major", color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def wrap(text: str, width: int) -> str:
    """Wrap text into lines that fit. A dollar stays a dollar and does not begin a formula."""
    return textwrap.fill(text, width, break_on_hyphens=False).replace("$", r"\$")


def sources(rows: list[dict]) -> str:
    """The source of the rows, one line per file. If there are several files, also
    the line style of each."""
    found = {row["file"]: source(row) for row in rows}
    if len(found) == 1:
        return next(iter(found.values()))
    named = zip(cycle(STYLE_NAMES), found.values(), strict=False)
    return "\n".join(f"{style}: {source}" for style, source in named)


def source(row: dict) -> str:
    """Where a row was measured: device, threads, versions. A "+" after the commit means that files
    differed from it."""
    commit = str(row.get("commit")).replace("+", ", changed")
    device, threads = str(row.get("device")), row.get("threads")
    told = f", threads: {threads}" if threads and "core" in device else ""
    return f"{device}{told}, torch {row.get('torch')}, commit {commit}"


def looks(names: list[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and style of each name. The architecture decides the colour, so variants share
    it and differ in the rest. For an unknown architecture, the letters of the name choose the
    colour, or the next one if that is taken."""
    found, taken, variants = {}, set(), {}
    for name in names:
        words = re.findall(r"[a-z0-9_]+", name.lower())
        architecture = next((word for word in words if word in COLOURS), name)
        if architecture in COLOURS:
            colour = COLOURS[architecture]
        else:
            start = zlib.crc32(architecture.encode()) % len(OTHERS)
            ring = OTHERS[start:] + OTHERS[:start]
            colour = next((other for other in ring if other not in taken), ring[0])
        variant = variants[colour] = variants.get(colour, -1) + 1
        taken.add(colour)
        found[name] = colour, MARKERS[variant % len(MARKERS)], STYLES[variant % len(STYLES)]
    return found


def unit_of(value: float) -> float:
    """The largest of SCALES that is not above the value; 1 if the value is below all."""
    return max((scale for scale in SCALES if value >= scale), default=1)


def amount(value: float) -> str:
    """A number in a sentence, rounded to three digits: 1.49 trillion, 614,000, 12.9."""
    unit = unit_of(value)
    rounded = float(f"{value / unit:.3g}")
    return number(rounded) + (f" {SCALES[unit]}" if unit > 1 else "")


def number(value: float) -> str:
    """A number without exponents: 256, 1,024, 0.25; never 2^8 or 1e6."""
    text = f"{value:,.6f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


# the ratio of the ends of a logarithmic axis, below which -> its ticks within a factor of ten
TICKS = {
    2.5: (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 2.8, 3.2, 3.6, 4, 4.5, 5, 5.6, 6.3, 7, 8, 9),
    10: (1, 1.5, 2, 3, 4, 5, 7),
    math.inf: (1, 2, 5),
}


def scale_axis(
    axes, side: str, label: str, places: list[float], log: bool = False, share: bool = False
) -> None:
    """Label the x or y axis and its ticks. `places`: the values on the axis. If there are
    few of them, they become the ticks of a logarithmic x axis. `share`: the values are from
    0 to 1, written as percent."""
    from matplotlib import ticker

    unit = unit_of(max(map(abs, places), default=0.0))
    axis = getattr(axes, f"{side}axis")
    axis.set_label_text(label + (f", {SCALES[unit]}s" if unit > 1 else ""))
    if log:
        getattr(axes, f"set_{side}scale")("log")
        marks = sorted({*places})
        subs = next(subs for ratio, subs in TICKS.items() if marks[-1] < ratio * marks[0])
        rounded = ticker.LogLocator(10, subs=subs)
        measured = side == "x" and few(marks)
        axis.set_major_locator(ticker.FixedLocator(marks) if measured else rounded)
        axis.set_minor_locator(ticker.NullLocator())
    elif all(float(place).is_integer() for place in places):
        axis.get_major_locator().set_params(integer=True)
    plain = ticker.FuncFormatter(lambda value, _: number(value / unit))
    axis.set_major_formatter(ticker.PercentFormatter(1, decimals=0) if share else plain)


def few(marks: list[float]) -> bool:
    """Whether the marks of a logarithmic axis are few enough, and far enough
    apart, to be its ticks."""
    pairs = pairwise(marks)
    return len(marks) <= 13 and all(b >= 1.4 * a for a, b in pairs)


def line(axes, name: str, points: list, look: tuple[str, str, str]) -> None:
    """Draw a line through the centres, and a band that contains all samples; for a single point, a
    bar. points: (place, centre, samples)."""
    places, centres, samples = zip(*points, strict=True)
    colour, marker, style = look
    axes.plot(places, centres, style, color=colour, marker=marker, markersize=4, label=name or None)
    low, high = [min(values) for values in samples], [max(values) for values in samples]
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    if len(points) == 1:  # a band of no width
        axes.vlines(places, low, high, color=colour, linewidth=1)


def level(axes, height: float, name: str) -> None:
    """Draw a thin horizontal line, such as the level of chance, with its name at the left end."""
    axes.axhline(height, color="#6b7280", linewidth=1, linestyle=(0, (1, 2)), label="_level")
    place = axes.get_yaxis_transform()
    offset = {"xytext": (4, 3), "textcoords": "offset points"}
    axes.annotate(name, (0, height), xycoords=place, **offset, color="#6b7280", fontsize=8)


def label_lines(axes) -> None:
    """Write the names of the lines in the right margin, where they cover no line. Each is next to
    the end of its line if the others leave room."""
    figure = axes.figure
    lines = [drawn for drawn in axes.get_lines() if not drawn.get_label().startswith("_")]
    figure.draw_without_rendering()  # fixes the position of the axes
    ends = [
        axes.transData.transform((drawn.get_xdata()[-1], drawn.get_ydata()[-1])) for drawn in lines
    ]
    box, point = axes.get_window_extent(), figure.dpi / 72
    heights = spread([(height - box.y0) / point for _, height in ends], GAP, box.height / point)
    for drawn, height in zip(lines, heights, strict=True):
        axes.annotate(
            drawn.get_label().replace("$", r"\$"), (1, 0), xycoords="axes fraction", xytext=(8, height),
            textcoords="offset points", color=drawn.get_color(), va="center", fontsize=9,
        )  # fmt: skip


def spread(heights: list[float], gap: float, most: float) -> list[float]:
    """Move heights apart until neighbours have the gap. Each group moves no further than necessary,
    and no height is above `most`."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    groups: list[list] = []  # [centre, members]
    for index in order:
        groups.append([heights[index], [index]])
        while len(groups) > 1 and bottom(groups[-1], gap) < top(groups[-2], gap) + gap:
            (low, first), (high, second) = groups[-2:]
            size = len(first) + len(second)
            middle = (low * len(first) + high * len(second)) / size
            groups[-2:] = [[middle, first + second]]
    moved = [0.0] * len(heights)
    for group in groups:
        for place, index in enumerate(group[1]):
            moved[index] = bottom(group, gap) + place * gap
    for index in reversed(order):
        moved[index] = min(moved[index], most)
        most = moved[index] - gap
    return moved


def bottom(group: list, gap: float) -> float:
    """The height of a group's lowest member."""
    return group[0] - gap * (len(group[1]) - 1) / 2


def top(group: list, gap: float) -> float:
    """The height of a group's highest member."""
    return group[0] + gap * (len(group[1]) - 1) / 2


def save(figure, path: Path, formats: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Write a file for each format. A dot in the name is kept."""
    paths = [path.with_name(f"{path.name}.{suffix}") for suffix in formats]
    for target in paths:
        undated = {"Date": None} if target.suffix == ".svg" else None
        figure.savefig(target, dpi=160, metadata=undated)
    pyplot().close(figure)
    return paths
