"""log.jsonl: what a run measured, one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from minimodels.errors import InputError
from minimodels.files import atomic_write

FILE = "log.jsonl"


def write_log(run: Path, record: dict) -> None:
    """Append a record, without numbers that are not finite, because JSON has none. Raises
    InputError if the log is not a regular file, because a pipe would block."""
    path = run / FILE
    if path.exists() and not path.is_file():
        raise InputError("log", str(path), "a regular file, or none")
    record = json.loads(json.dumps(record), parse_constant=lambda _: None)
    record = {name: value for name, value in record.items() if value is not None}
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def write_scores(run: Path, record: dict) -> None:
    """Append the scores of a validation. They replace those of the same step, because a finished
    run measures them again when it is resumed."""
    keep(run, lambda line: not (step_of(line) == record["step"] and "validation_loss" in line))
    write_log(run, record)


def forget_after(run: Path, step: int) -> None:
    """Delete what was measured after a step, because the resumed run measures it again."""
    keep(run, lambda line: step_of(line) <= step)


def keep(run: Path, wanted: Callable[[str], bool]) -> None:
    """Delete the lines that are not wanted."""
    log = run / FILE
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    kept = [line for line in lines if wanted(line)]
    if kept != lines:
        with atomic_write(log) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept))


def step_of(line: str) -> float:
    """The step of a line; infinite if the line is broken."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
