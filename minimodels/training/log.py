"""log.jsonl: what a run measured, one JSON object per line."""

from __future__ import annotations

import json
import math
from pathlib import Path

from minimodels.files import atomic_write

FILE = "log.jsonl"


def write_log(run: Path, record: dict) -> None:
    """Append a record. Numbers that are not finite are left out, because JSON has none."""
    record = json.loads(json.dumps(record), parse_constant=lambda _: None)
    record = {name: value for name, value in record.items() if value is not None}
    with (run / FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")


def forget_after(run: Path, step: int) -> None:
    """Delete what was measured after a step, because the resumed run measures it again."""
    log = run / FILE
    if log.is_file():
        kept = [
            line for line in log.read_text(errors="replace").splitlines() if step_of(line) <= step
        ]
        with atomic_write(log) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept))


def step_of(line: str) -> float:
    """The step of a line; infinite if the line is broken."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
