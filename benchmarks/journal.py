"""The record of a measuring session with a time limit. Every row is written to disk at once.

A session runs one job after the other. Every failure in a job becomes a row too: a provider that
fails, that runs out of memory or time, or that makes the GPU unusable. So no measurement is lost,
and the next job still runs.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from minimodels.command import is_out_of_memory
from minimodels.measure import synchronise

GRACE = 15.0  # seconds that a call may hang after its time limit, before the process is replaced

Result = TypeVar("Result")


class OutOfTime(BaseException):
    """A call took longer than allowed. It is not an Exception, because libraries catch those."""


class Journal:
    """Rows as JSON lines in a file, and the time that is left.

    path: the file. end: when the session must end, by time.monotonic(). common: the entries that
    every row has. restart: replaces this process with one that continues; it is called when the GPU
    no longer answers, or when a call hangs.
    """

    def __init__(
        self, path: Path, end: float, common: dict, restart: Callable[[], None] = lambda: None
    ):
        self.path, self.end, self.common, self.restart = path, end, common, restart
        self.rows = read_rows(path)

    def left(self) -> float:
        """Seconds until the session must end."""
        return self.end - time.monotonic()

    def add(self, status: str, **row) -> None:
        """Write a row, and print it as a line."""
        row = {**self.common, **row, "status": status}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"[{self.left():4.0f} s left] {describe(row)}", flush=True)

    def attempt(
        self, row: dict, call: Callable[[], Result], seconds: float = 60.0
    ) -> Result | None:
        """The result of a call. If it fails, or takes longer than `seconds` or than the time left,
        the result is None, and a row gives the reason."""
        allowed = max(0.1, min(seconds, self.left()))
        watch = threading.Timer(allowed + GRACE, self.give_up, (row,))
        watch.daemon = True
        watch.start()
        try:
            with limit(allowed):
                return call()
        except OutOfTime:
            self.add("cut off", **row, error=f"took more than {allowed:.0f} s")
        except Exception as error:  # errors of Triton and of the peers have no common base class
            self.failed(row, error)
        finally:
            watch.cancel()
        self.tidy(row)
        return None

    def failed(self, row: dict, error: Exception) -> None:
        """Write a row about an error."""
        status = "out of memory" if is_out_of_memory(error) else "failed"
        reason = (str(error).splitlines() or [""])[0][:300]
        self.add(status, **row, error=f"{type(error).__name__}: {reason}")

    def tidy(self, row: dict) -> None:
        """Free what a call left in memory. If the GPU no longer answers, replace this process."""
        gc.collect()
        try:
            synchronise()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        except Exception as error:
            self.add("lost", **row, error=f"the GPU: {(str(error).splitlines() or [''])[0]}")
            self.restart()
            raise

    def give_up(self, row: dict) -> None:
        """Leave a call that even OutOfTime could not end, because no Python code runs in it."""
        self.add("lost", **row, error="hangs")
        self.restart()
        os._exit(1)


def describe(row: dict) -> str:
    """A row as one line of text."""
    seconds = row.get("seconds")
    place = [row.get("job"), row.get("direction"), row.get("model") or row.get("provider")]
    text = " | ".join(str(part) for part in place if part)
    if row["status"] != "done":
        return f"{text}: {row['status'].upper()} {row.get('error', '')}".rstrip()
    if not seconds:
        return f"{text}: {row.get('said', 'done')}"
    middle = sorted(seconds)[len(seconds) // 2]
    if "rate" in row:
        said = (
            f"{row['rate']:,.4g} {row['unit']}, {row['rate'] / row['ceiling']:.0%} of the machine's"
        )
    else:
        said = f"{row['tokens'] / middle:,.0f} tokens/s"
    off = f", off by {row['off']:.1e}" if row.get("off") is not None else ""
    losses = (
        f", losses {' '.join(f'{loss:.4f}' for loss in row['losses'])}" if "losses" in row else ""
    )
    memory = f", {row['bytes'] / 1e6:,.0f} MB" if row.get("bytes") else ""
    return f"{text}: {middle * 1e3:.3f} ms, {said}{memory}{off}{losses}"


def read_rows(path: Path) -> list[dict]:
    """The rows of a file; none if there is no file. An incomplete last line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after this number of seconds, as soon as Python code runs."""

    def stop(*_) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
