"""Draws measured rows: one picture per question, from JSON alone.

    python -m benchmarks.plot benchmarks/results/cpu/throughput.jsonl
    python -m benchmarks.plot here.jsonl there.jsonl --out pictures    several devices

Each picture is written as PNG and SVG. Its title is the question and the answer. The lines are
labelled with their names, a band shows the spread over the rounds, and the caption gives device and
commit.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from benchmarks.crossover import overtaking, sentence
from minimodels import InputError
from minimodels.command import parse_options, run_command
from minimodels.measure import per_second

from .drawing import (
    STYLES,
    amount,
    canvas,
    label_lines,
    level,
    line,
    looks,
    number,
    save,
    scale_axis,
    sources,
)
from .plot_operations import operations
from .verdict import score, unbroken, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict]
Figures = Iterator[tuple[str, "Figure"]]  # with the name of the file


@dataclass(frozen=True)
class Options:
    """Draw the rows of result files."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """files of JSON rows"""
    out: Path | None = None
    """folder for the pictures; by default the folder of the first file"""


def main(options: Options) -> None:
    """Read the rows, draw every kind of picture that they allow, and print
    where the pictures are."""
    if not options.results:
        raise InputError("results", "", "one or more files of JSON rows")
    rows = [row for path in options.results for row in read(path)]
    folder = options.out or options.results[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw(rows, folder)
    if not drawn:
        raise InputError(
            "results",
            " ".join(map(str, options.results)),
            "rows of benchmarks.all, kernels, throughput or claims",
        )
    for path in drawn:
        print(path)


def draw(
    rows: Rows, folder: Path, formats: tuple[str, ...] = ("png", "svg"), most: int | None = None
) -> list[Path]:
    """Draw every kind of picture that the rows allow, up to a number, and return the files."""
    figures = (figure for picture in PICTURES for figure in picture(rows))
    return [
        path
        for name, figure in islice(figures, most)
        for path in save(figure, folder / name, formats)
    ]


def read(path: Path, field: str = "results") -> Rows:
    """The rows of a file. Raises InputError, which names `field`, if it cannot be read."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise InputError(field, str(path), f"a file of JSON rows ({error.strerror})") from None
    except ValueError as error:
        raise InputError(field, str(path), f"a file of JSON rows ({error})") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(field, str(path), "a file of JSON rows, at least one")
    return [{**row, "file": str(path)} for row in rows]


def throughput(rows: Rows) -> Figures:
    """Tokens per second against context, one picture for each mode and batch."""
    pictures = defaultdict(list)
    for row in rows:
        if row.get("benchmark") == "throughput" and row["seconds"]:
            pictures[row["mode"], row["batch"] if row["mode"] == "decode" else 0].append(row)
    for (mode, batch), picture in pictures.items():
        doing = {"train": "train", "prefill": "read", "decode": f"write (batch {batch})"}[mode]
        title = f"How many tokens a second does each architecture {doing}, as the context grows?"
        figure, axes = canvas(title, overtaken(picture), sources(picture))
        picture = [row for row in picture if not row["model"].endswith(" again")]
        contexts = [row["context"] for row in picture]
        scale_axis(axes, "x", "context, tokens", contexts, log=True)
        rates = [row["tokens"] / seconds for row in picture for seconds in row["seconds"]]
        scale_axis(axes, "y", "tokens a second", rates, log=True)
        draw_lines(axes, picture, speeds)
        yield f"throughput-{mode}" + (f"-{batch}" if mode == "decode" else ""), figure


def overtaken(rows: Rows) -> str:
    """A sentence that says from which context on each model is faster than the transformer."""
    files = dict.fromkeys(row["file"] for row in rows)
    found = [sentence(overtaking([row for row in rows if row["file"] == file])) for file in files]
    if not any(found) and all(len(row["seconds"]) == 1 for row in rows):
        return "Each was timed once, which may be noise, so no winner is named"
    return "; ".join(dict.fromkeys(filter(None, found)))


def claims(rows: Rows) -> Figures:
    """The curves of benchmarks.claims: mean over the seeds, and their spread."""
    pictures = defaultdict(list)
    for row in rows:
        if row.get("benchmark") == "claim" and row.get("x") is not None:
            pictures[row["claim"], row["panel"]].append(row)
    for (claim, panel), picture in pictures.items():
        picture = at_best_rate(picture)
        first, accuracy = picture[0], is_accuracy(picture[0])
        figure, axes = canvas(first["question"], ends(picture), sources(picture))
        logarithmic = bool(first.get("x_log"))
        scale_axis(axes, "x", first["x_label"], [row["x"] for row in picture], log=logarithmic)
        scale_axis(axes, "y", first["y_label"], [row["y"] for row in picture], share=accuracy)
        if accuracy and (share := chance(first["data"])):
            level(axes, share, f"chance, {share:.1%}")
        draw_lines(axes, picture, curve)
        yield f"{claim}-{panel}", figure


def at_best_rate(rows: Rows) -> Rows:
    """The rows of one panel: for each model, only those of its best learning rate, by the mean over
    the seeds at the last x. A rate with fewer seeds than another was tried and passed over. Rows
    without a rate belong to models that were trained at only one."""
    ended = defaultdict(dict)  # (model, layers), rate -> seed -> (x, y)
    for row in rows:
        seeds = ended[model_of(row), row.get("lr")]
        seeds[row["seed"]] = max(seeds.get(row["seed"], (-math.inf, 0)), (row["x"], row["y"]))
    sign = 1 if is_accuracy(rows[0]) else -1
    best: dict[tuple, tuple[tuple[int, float], float | None]] = {}
    for (model, rate), seeds in ended.items():
        found = len(seeds), sign * statistics.mean(y for _, y in seeds.values())
        if model not in best or found > best[model][0]:
            best[model] = found, rate
    return [row for row in rows if row.get("lr") == best[model_of(row)][1]]


def model_of(row: dict) -> tuple:
    """What identifies a model of a claim: a name may have several sizes."""
    return row["model"], row.get("layers")


def is_accuracy(row: dict) -> bool:
    """Whether a claim's row counts right answers, of which more are better. Other
    rows count bits or load."""
    return " right" in row["y_label"]


def chance(data: str) -> float | None:
    """The share of a task's answers that guessing gets right; None if the data are not a task.
    data: as in --data."""
    name, vocab = re.match(r"\w*", data).group(), re.search(r"vocab=(\d+)", data)
    answers = {  # how many answers there are, given the vocabulary; the default vocabulary
        "copying": (lambda size: size - 2, 16),  # neither noise nor the question
        "induction": (lambda size: size - 1, 16),  # not the special token
        "mqar": (lambda size: size // 2, 8192),  # values are half of it
        "overwrite": (lambda size: size // 2, 64),  # the same
        "parity": (lambda size: size, 2),
        "s3": (lambda size: size, 6),
    }
    if name not in answers:
        return None
    count, default = answers[name]
    return 1 / count(int(vocab.group(1)) if vocab else default)


def curve(rows: Rows) -> list[tuple]:
    """The first points of all seeds as one point, then the second points, and so on: the median x
    (because seconds differ), the mean y, every y. A probe just before the end is left out, because
    the end is scored on more batches."""
    seeds = defaultdict(list)
    for row in rows:
        seeds[row["seed"]].append((row["x"], row["y"]))
    for points in seeds.values():
        points.sort()
        if len(points) > 2 and points[-2][0] > 0.98 * points[-1][0]:
            del points[-2]
    points = (tuple(zip(*group, strict=True)) for group in zip(*seeds.values(), strict=False))
    return [
        (statistics.median(places), statistics.mean(values), values) for places, values in points
    ]


def ends(rows: Rows) -> str:
    """A sentence that says which model is ahead at the last place that all lines reach. If there is
    none, or they end at different places of a logarithmic axis, it says where each line ends."""
    models = dict.fromkeys(row["model"] for row in rows)
    curves = {model: curve([row for row in rows if row["model"] == model]) for model in models}
    lasts = {model: max(place for place, *_ in points) for model, points in curves.items()}
    share, logarithmic = is_accuracy(rows[0]), rows[0].get("x_log")
    apart = max(min(points)[0] for points in curves.values()) > min(lasts.values())
    if apart or (logarithmic and len({*lasts.values()}) > 1):
        told = ((model, *max(points)[:2]) for model, points in curves.items())
        texts = (
            f"{name} {score(mean, share)} at {number(round(place, 1))}"
            for name, place, mean in told
        )
        unit = rows[0]["x_label"]
        return "; ".join(map(unbroken, texts)) + f" {unit}"
    last = min(lasts.values())
    scores = {model: at(points, last) for model, points in curves.items()}
    same = max(lasts.values()) <= 1.02 * last
    unit = rows[0]["x_label"].split(" (")[0]
    where = (
        f"at {last:,.0f}"
        if logarithmic
        else "at the end"
        if same
        else f"after {amount(last)} {unit}"
    )
    return verdict(scores, share, where, "seed", share)


def at(points: list[tuple], place: float) -> list[float]:
    """The value of each sample of a curve at a place, interpolated linearly between its points.
    After the last point it stays constant; the place is not before the first."""
    points = sorted(points)
    if place >= points[-1][0]:
        return list(points[-1][2])
    after = next(i for i, point in enumerate(points) if point[0] > place)
    (low, _, lows), (high, _, highs) = points[after - 1], points[after]
    part = (place - low) / (high - low)
    return [a + part * (b - a) for a, b in zip(lows, highs, strict=True)]


def speeds(rows: Rows) -> list[tuple]:
    """Tokens per second against context: in the median round, and in each."""
    return [
        (
            row["context"],
            per_second(row["tokens"], row["seconds"]),
            [row["tokens"] / s for s in row["seconds"]],
        )
        for row in rows
    ]


def draw_lines(axes, rows: Rows, points_of: Callable[[Rows], list[tuple]]) -> None:
    """Draw a line for each model and file, with the spread over the rounds, or seeds, as a band.
    If there are several files, the style distinguishes them; otherwise it distinguishes the
    variants of an architecture."""
    look = looks(list(dict.fromkeys(row["model"] for row in rows)))
    files = list(dict.fromkeys(row["file"] for row in rows))
    named = set()
    for row_file, file_style in zip(files, cycle(STYLES), strict=False):
        for model, (colour, marker, style) in look.items():
            own = [row for row in rows if (row["model"], row["file"]) == (model, row_file)]
            if own:
                drawn = colour, marker, style if len(files) == 1 else file_style
                line(axes, "" if model in named else model, sorted(points_of(own)), drawn)
                named.add(model)
    label_lines(axes)


PICTURES = (operations, throughput, claims)


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
