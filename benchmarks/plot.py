"""Draw measured rows: one picture per question, from JSON alone.

    python -m benchmarks.plot benchmarks/results/cpu/throughput.jsonl
    python -m benchmarks.plot here.jsonl there.jsonl --out pictures           several devices or commits in one picture

Each picture is written as PNG and SVG. Its title is the question and the answer; lines carry their names, a band shows the
spread over the rounds, the caption names device and commit.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from benchmarks.crossover import overtaking
from minimodels import InputError
from minimodels.command import run_command

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563")
STYLES = ("-", "--", ":", "-.")  # one per result file
Rows = list[dict]
Figures = Iterator[tuple[str, "Figure"]]  # with the name of the file


@dataclass(frozen=True)
class Options:
    """Draw the rows of result files."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """files of JSON rows"""
    out: Path | None = None
    """folder for the pictures; by default beside the first file"""


def main(options: Options) -> None:
    """Read, draw every kind of picture that the rows allow, say where they are."""
    if not options.results:
        raise InputError("results", (), "one or more files of JSON rows")
    rows = [row for path in options.results for row in read(path)]
    folder = options.out or options.results[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw(rows, folder)
    if not drawn:
        raise InputError(
            "results",
            [str(path) for path in options.results],
            "rows of benchmarks.throughput or benchmarks.claims",
        )
    for path in drawn:
        print(path)


def draw(
    rows: Rows, folder: Path, formats: tuple[str, ...] = ("png", "svg"), most: int | None = None
) -> list[Path]:
    """Draw every kind of picture that the rows allow, at most so many, and return the files."""
    figures = (figure for picture in PICTURES for figure in picture(rows))
    return [
        path
        for name, figure in islice(figures, most)
        for path in save(figure, folder / name, formats)
    ]


def read(path: Path) -> Rows:
    """The rows of a file. Raises InputError where it cannot be read."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError("results", str(path), f"a file of JSON rows ({error})") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError("results", str(path), "a file of JSON rows, at least one")
    return [{**row, "file": str(path)} for row in rows]


def throughput(rows: Rows) -> Figures:
    """Tokens a second against context, a picture for each mode and batch."""
    pictures = defaultdict(list)
    for row in rows:
        if (
            row.get("benchmark") == "throughput"
            and row["seconds"]
            and not row["model"].endswith(" again")
        ):
            pictures[row["mode"], row["batch"] if row["mode"] == "decode" else 0].append(row)
    for (mode, batch), picture in pictures.items():
        doing = {"train": "train", "prefill": "read", "decode": f"write (batch {batch})"}[mode]
        title = f"How many tokens a second does each architecture {doing}, as the context grows?"
        figure, axes = canvas(title, answer(picture), picture)
        axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="tokens/s")
        axes.set_xscale("log", base=2)
        draw_lines(axes, picture, speeds)
        name = f"throughput-{mode}" + (f"-{batch}" if mode == "decode" else "")
        yield name, figure


def answer(rows: Rows) -> str:
    """What the title asks, in words: where Mamba overtakes the transformer."""
    texts = []
    for file in dict.fromkeys(row["file"] for row in rows):
        if place := overtaking([row for row in rows if row["file"] == file]):
            texts.append(str(place))
    return "; ".join(dict.fromkeys(texts))


def claims(rows: Rows) -> Figures:
    """The curves of benchmarks.claims: mean over the seeds, and their spread."""
    pictures = defaultdict(list)
    for row in rows:
        if row.get("benchmark") == "claim" and row.get("x") is not None:
            pictures[row["claim"], row["panel"]].append(row)
    for (claim, panel), picture in pictures.items():
        first = picture[0]
        figure, axes = canvas(first["question"], ends(picture), picture)
        axes.set(xlabel=first["x_label"], ylabel=first["y_label"])
        if first.get("x_log"):
            axes.set_xscale("log", base=2)
        draw_lines(axes, picture, curve)
        yield f"{claim}-{panel}", figure


def curve(rows: Rows) -> list[tuple]:
    """The first point of every seed as one, the second, and so on: the median x (for seconds differ), the mean y, every y."""
    seeds = defaultdict(list)
    for row in rows:
        seeds[row["seed"]].append((row["x"], row["y"]))
    points = (tuple(zip(*group, strict=True)) for group in zip(*seeds.values(), strict=False))
    return [
        (statistics.median(places), statistics.mean(values), values) for places, values in points
    ]


def ends(rows: Rows) -> str:
    """Where each line ends, in words: the mean over the seeds, and at which x, if a line says more than how training went."""
    texts, places = [], set()
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        last = max(row["x"] for row in own) if rows[0].get("x_log") else None
        finals = {row["seed"]: row["y"] for row in own if last in (None, row["x"])}
        texts.append((model, statistics.mean(finals.values()), last))
        places.add(last)
    if len(places) > 1:
        return ", ".join(f"{model} {mean:.3g} at {last:,.0f}" for model, mean, last in texts)
    (last,) = places
    where = "at the end" if last is None else f"at {last:,.0f}"
    return f"{where}: " + ", ".join(f"{model} {mean:.3g}" for model, mean, _ in texts)


def canvas(title: str, subtitle: str, rows: Rows):
    """A figure with its question, the answer below it, and where the figures come from."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("matplotlib", "not installed", 'pip install "minimodels[plot]"') from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "minimodels"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
    axes.set_title(title + (f"\n{subtitle}" if subtitle else ""), loc="left", fontsize=11)
    sources = {
        row["file"]: f"{row.get('device')}, torch {row.get('torch')}, commit {row.get('commit')}"
        for row in rows
    }
    caption = "\n".join(f"{STYLES[i % 4]}  {source}" for i, source in enumerate(sources.values()))
    figure.supxlabel(caption, fontsize=8, color="#666666", x=0.01, ha="left")
    axes.grid(True, which="major", color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def speeds(rows: Rows) -> list[tuple]:
    """Tokens a second against context: the median over the rounds, and each."""
    rates = [
        (row["context"], [row["tokens"] / seconds for seconds in row["seconds"]]) for row in rows
    ]
    return [(context, statistics.median(values), values) for context, values in rates]


def draw_lines(axes, rows: Rows, points_of: Callable[[Rows], list[tuple]]) -> None:
    """A line for each model and file, with the spread over the rounds, or seeds, as a band."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    files = list(dict.fromkeys(row["file"] for row in rows))
    for row_file, style in zip(files, cycle(STYLES), strict=False):
        for model, colour in zip(models, cycle(COLOURS), strict=False):
            named = any(drawn.get_label() == model for drawn in axes.get_lines())
            own = [row for row in rows if (row["model"], row["file"]) == (model, row_file)]
            if own:
                line(axes, "" if named else model, sorted(points_of(own)), colour, style)
    label_lines(axes)


def line(axes, name: str, points: list, colour: str, style: str) -> None:
    """The centres as a line, all samples within the band."""
    places, centres, samples = zip(*points, strict=True)
    axes.plot(places, centres, style, color=colour, marker="o", markersize=3, label=name or None)
    axes.fill_between(
        places,
        [min(v) for v in samples],
        [max(v) for v in samples],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )


def label_lines(axes) -> None:
    """Names at the ends of the lines, moved apart where they would meet."""
    lines = [drawn for drawn in axes.get_lines() if not drawn.get_label().startswith("_")]
    ends = [
        (axes.transData.transform((drawn.get_xdata()[-1], drawn.get_ydata()[-1])), drawn)
        for drawn in lines
    ]
    ends.sort(key=lambda end: end[0][1])
    height = None
    for (_, place_y), drawn in ends:
        height = place_y if height is None else max(place_y, height + 14)
        axes.annotate(
            drawn.get_label(), (drawn.get_xdata()[-1], drawn.get_ydata()[-1]), xytext=(8, (height - place_y) * 0.72),
            textcoords="offset points", color=drawn.get_color(), va="center", fontsize=9,
        )  # fmt: skip


def save(figure, path: Path, formats: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """A file for each format."""
    from matplotlib import pyplot

    paths = [
        path.with_name(f"{path.name}.{suffix}") for suffix in formats
    ]  # keeps a dot in the name
    for target in paths:  # the same rows give the same file
        figure.savefig(
            target, dpi=160, metadata={"Date": None} if target.suffix == ".svg" else None
        )
    pyplot.close(figure)
    return paths


PICTURES = (throughput, claims)


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options, description=__doc__))
