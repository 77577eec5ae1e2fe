"""Draws the learning curves of training runs in one picture, against the axis of the comparison.

    python -m benchmarks.curves runs/transformer runs/mamba --axis flops --out curves

Axes: tokens, flops, seconds, step. It writes curves.png and curves.svg, and reads only the runs'
log.jsonl.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import tyro

from minimodels import InputError
from minimodels.command import parse_options, run_command

from .drawing import amount, canvas, label_lines, looks, save, scale_axis
from .plot import at, read
from .verdict import verdict

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
    """Training loss as a thin line, validation as connected points."""
    if options.axis not in AXES:
        raise InputError("axis", options.axis, ", ".join(AXES))
    if not options.runs:
        raise InputError("runs", "", "folders of training runs")
    logs, texts, units = {}, {}, set()
    for path in options.runs:
        if not path.exists():
            raise InputError("runs", str(path), "the folder of a training run, or its log.jsonl")
        rows = read(path / "log.jsonl" if path.is_dir() else path, "runs")
        name = name_of(path, logs)
        logs[name], texts[name] = points(rows, options.axis), data_of(path)
        units.add("byte" if any("bits_per_byte" in row for row in rows) else "predicted token")
    axis = AXES[options.axis]
    question = f"Which run learns fastest, counted in {axis}?"
    figure, axes = canvas(question, answer(logs, axis), caption(logs, axis, texts))
    places = [place for curves in logs.values() for x, _ in curves for place in x]
    losses = [loss for curves in logs.values() for _, y in curves for loss in y]
    scale_axis(axes, "x", axis, places)
    scale_axis(axes, "y", f"bits per {' or '.join(sorted(units))}", losses)
    for (name, (training, validation)), look in zip(
        logs.items(), looks([*logs]).values(), strict=True
    ):
        colour, marker, style = look
        axes.plot(*training, style, color=colour, linewidth=0.8, alpha=0.5)
        axes.plot(*validation, style, color=colour, marker=marker, label=name)
    label_lines(axes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for path in save(figure, options.out):
        print(path)


def name_of(path: Path, taken: dict) -> str:
    """The name of the folder or of the log; the whole path if that name is taken."""
    name = path.name.removesuffix(".jsonl")
    return str(path) if name in taken else name


def answer(logs: dict, axis: str) -> str:
    """A sentence that says which run has the lowest validation loss at the last
    place that all runs reached."""
    validated = {name: list(zip(*curves[1], strict=True)) for name, curves in logs.items()}
    if not all(validated.values()):
        return ""
    curves = {name: [(x, y, [y]) for x, y in pairs] for name, pairs in validated.items()}
    last = min(max(pairs)[0] for pairs in curves.values())
    if max(min(pairs)[0] for pairs in curves.values()) > last:
        ends = (
            f"{name} {max(pairs)[1]:.2f} after {amount(max(pairs)[0])}"
            for name, pairs in curves.items()
        )
        return f"There is no place at which all runs were scored, in {axis}: {'; '.join(ends)}"
    scores = {name: at(pairs, last) for name, pairs in curves.items()}
    return verdict(scores, False, f"after {amount(last)} {axis}", "run", False)


def data_of(path: Path) -> str:
    """The data of a run; "" if no options are in its folder."""
    options = path / "options.json"
    try:
        return json.loads(options.read_text())["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def caption(logs: dict, axis: str, texts: dict[str, str]) -> str:
    """How to read the picture, how far each run went, and the data of each if they differ."""
    reached = {
        name: amount(max(training[0] + validation[0]))
        for name, (training, validation) in logs.items()
    }
    ends = [f"{name} {end}" for name, end in reached.items()]
    if len(set(reached.values())) == 1:
        ends = [f"all {next(iter(reached.values()))}"]
    told = f"thin: training; thick, with points: validation. Reached, in {axis}: {', '.join(ends)}"
    if len(set(texts.values())) > 1:
        told += f". Different data: {', '.join(f'{name} {text}' for name, text in texts.items())}"
    return told


def points(rows: list[dict], axis: str) -> tuple[tuple[list, list], tuple[list, list]]:
    """(x, y) of training and of validation.

    y is in bits per byte of text. The training loss is per token, so it is divided by the bytes per
    token of the validation text. A task has no bytes, so y is in bits per predicted token. In older
    logs a validation row has no tokens and FLOPs of its own, so it gets those of the training row
    before it.
    """
    bit = math.log(2)
    for row in rows:
        if "bits_per_byte" in row:
            bit = row["validation_loss"] / row["bits_per_byte"]  # ln 2 times the bytes per token
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
    run_command(main, lambda: parse_options(Options, __doc__))
