"""What a session writes in addition to its rows: tables and pictures, in a few files."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from . import plot, table
from .journal import Journal

MOST = 5  # pictures at most


def write(out: Path, journal: Journal) -> None:
    """Write tables.md, then the pictures as long as there is time."""
    rows = [{**row, "file": str(journal.path)} for row in journal.rows]
    text = "\n".join(
        filter(
            None, (table.kernels(rows, every=True), table.training(rows), table.throughput(rows))
        )
    )
    (out / "tables.md").write_text(text)
    print(text)
    job = {"benchmark": "summary", "job": "pictures"}
    start = time.monotonic()
    if any(row.get("benchmark") in ("throughput", "kernels") for row in rows):
        drawn = journal.attempt(job, partial(plot.draw, rows, out, ("png",), MOST))
        if drawn:
            took = f"{len(drawn)} in {time.monotonic() - start:.0f} s"
            journal.add("done", **job, said=took)
