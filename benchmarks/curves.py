"""Overlay the learning curves of training runs on the axis that the comparison is about.

    python -m benchmarks.curves runs/transformer runs/mamba --axis flops --out curves

Axes: tokens, flops, seconds, step. Writes curves.png and curves.svg from the runs' log.jsonl alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import tyro

from minimodels import InputError
from minimodels.command import run_command

from .plot import COLOURS, canvas, label_lines, read, save

AXES = {
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "seconds": "seconds of training",
    "step": "optimizer steps",
}


@dataclass(frozen=True)
class Options:
    """Draw the loss of training runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, or their logs"""
    axis: str = "tokens"
    """tokens, flops, seconds or step"""
    out: Path = Path("curves")
    """name of the pictures, without .png and .svg"""


def main(options: Options) -> None:
    """Training loss as a thin line, validation as points joined."""
    if options.axis not in AXES:
        raise InputError("axis", options.axis, ", ".join(AXES))
    if not options.runs:
        raise InputError("runs", (), "folders of training runs")
    figure, axes = canvas(f"Which run learns fastest, counted in {AXES[options.axis]}?", "", [])
    axes.set(xlabel=AXES[options.axis], ylabel="bits per predicted token (points: validation)")
    for path, colour in zip(options.runs, cycle(COLOURS), strict=False):
        rows = read(path / "log.jsonl" if path.is_dir() else path)
        training, validation = points(rows, options.axis)
        axes.plot(*training, color=colour, linewidth=0.8, alpha=0.5)
        axes.plot(
            *validation,
            color=colour,
            marker="o",
            label=path.name.removesuffix(".jsonl").replace("$", r"\$"),
        )
    label_lines(axes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for path in save(figure, options.out):
        print(path)


def points(rows: list[dict], axis: str) -> tuple[tuple[list, list], tuple[list, list]]:
    """(x, y) of training and of validation. In older logs a validation has the tokens and FLOPs of the training row before
    it."""
    bit = 0.6931471805599453
    training, validation, spent = ([], []), ([], []), {}
    for row in rows:
        if "loss" in row:
            spent = row
            training[0].append(row[axis])
            training[1].append(row["loss"] / bit)
        elif "validation_loss" in row:
            validation[0].append(row.get(axis, spent.get(axis)))
            validation[1].append(row["validation_loss"] / bit)
    if not training[0] or None in validation[0]:
        raise InputError("runs", rows[0]["file"], "the log.jsonl of a training run")
    return training, validation


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options, description=__doc__))
