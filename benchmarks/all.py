"""Measures a machine with one command, the most valuable results first.

    python -m benchmarks.all --minutes 9 --out benchmarks/results/h100
    python -m benchmarks.all --again benchmarks/results/h100 --minutes 4 --out runs/again
    python -m benchmarks.all --dry --out runs/dry    toy sizes on a CPU, in a minute

On a GPU the kernels check themselves first, all at once. If a kernel is wrong, only its own rows
are lost. Then one process times each operation against the other installed implementations. It also
times training with the torch path and with the kernels. In the remaining time it measures further
sizes, and speed against context. Each row is written to rows.jsonl as soon as it is measured, so an
interruption loses nothing. --again repeats what failed, measures what there was no time for, and
tries the scan's settings.

On a CPU (benchmarks.steps) the benchmarks run one after the other. --resume continues where they
were interrupted.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from minimodels.kernels import INTERPRETED, OPERATIONS

from minimodels import InputError
from minimodels.command import keep_freed_memory, parse_options, pick_device, run_command
from minimodels.measure import ceilings, environment

from . import checks, races, steps, summary, sweep, whole
from .journal import Journal
from .session import Job, Session, work

ROWS, CHECKS = "rows.jsonl", "checks.txt"
CHECKED = 180.0  # seconds that all checks together may take
CLOSING = 12.0  # seconds kept for the tables and pictures
REPEATED = ("failed", "wrong", "cut off", "lost")  # the endings of jobs that --again repeats first
MISSED = ("no time", "left out")  # and those that it repeats last


@dataclass(frozen=True)
class Options:
    """Measure a machine within a time limit."""

    out: Path
    """folder for the results"""
    minutes: float = 9.0
    """time limit in minutes"""
    again: Path | None = None
    """folder of an earlier session on a GPU: repeat what failed, do what there was no time for"""
    dry: bool = False
    """try every branch at toy sizes on a CPU, with Triton's interpreter"""
    resume: bool = False
    """continue in the folder, and skip what is finished"""
    impl: str = "auto"
    """on a CPU: auto, reference or torch"""
    device: str = "auto"
    """auto, cpu or cuda"""


def main(options: Options) -> None:
    """Run a session on a GPU, or its rehearsal; on a CPU, run the benchmarks."""
    if not options.minutes > 0:
        raise InputError("minutes", options.minutes, "more than 0")
    if options.impl not in ("auto", "reference", "torch"):
        raise InputError("impl", options.impl, "auto, reference, torch")
    if options.again and not (options.again / ROWS).exists():
        raise InputError("again", str(options.again), f"a folder with {ROWS}")
    device = torch.device("cpu") if options.dry else pick_device(options.device)
    if device.type == "cpu" and not options.dry:
        if options.again:
            raise InputError("again", str(options.again), "a machine with a GPU, or --dry")
        options.out.mkdir(parents=True, exist_ok=True)
        steps.measure(options.out, options.minutes, options.resume, options.impl)
    elif options.dry and not INTERPRETED:
        interpret(options)
    else:
        measure(options, device)


def interpret(options: Options) -> None:
    """Restart this process with Triton's interpreter, because that must be chosen
    before Triton is imported."""
    hidden = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *arguments_of(options)], {**os.environ, **hidden})


def arguments_of(options: Options) -> list[str]:
    """The command line for these options."""
    flags = [f"--{name}" for name in ("dry", "resume") if getattr(options, name)]
    again = ["--again", str(options.again)] if options.again else []
    place = ["--out", str(options.out), "--minutes", str(options.minutes)]
    return ["-m", "benchmarks.all", *place, *again, *flags, "--device", options.device]


def measure(options: Options, device: torch.device) -> None:
    """Check, measure, summarise."""
    rows = options.out / ROWS
    if rows.exists() and not options.resume:
        raise InputError("out", str(options.out), f"a folder without {ROWS}, or --resume")
    options.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    end = time.monotonic() + 60 * options.minutes
    restart = partial(start_again, options, end)
    journal = Journal(rows, end - CLOSING, environment(device), restart)
    session = Session(journal, device, options.dry)
    earlier = Journal(options.again / ROWS, end, {}).rows if options.again else []
    check(session, earlier, options.out / CHECKS)
    session.limits = ceilings(device)
    journal.add(
        "done", benchmark="machine", job="machine", said=f"{session.limits}", **session.limits
    )
    work(remaining(plan(options.dry), earlier, journal.rows), session)
    journal.end = end
    summary.write(options.out, journal)
    unfinished = unmeasured(journal.rows, REPEATED + MISSED)
    print(f"not measured: {', '.join(unfinished)}" if unfinished else "everything was measured")


def plan(toy: bool) -> list[Job]:
    """All jobs, the most valuable first. flex_attention is last, because it compiles slowly."""
    return [
        *races.jobs(races.FIRST),
        *whole.training_jobs(),
        *races.jobs(races.LATER),
        *whole.context_jobs(toy),
        *races.jobs(races.LAST),
    ]


def remaining(jobs: list[Job], earlier: list[dict], rows: list[dict]) -> list[Job]:
    """The jobs without rows. After an earlier session: those that failed there, the sweep,
    and those that it missed."""
    if earlier:
        failed, missed = unmeasured(earlier, REPEATED), unmeasured(earlier, MISSED)
        begun = {row.get("job") for row in earlier}
        again = [job for job in jobs if job.name in failed]
        late = [job for job in jobs if job.name in missed or job.name not in begun]
        jobs = [*again, *sweep.jobs(), *(job for job in late if job not in again)]
    ended = {row.get("job") for row in rows}
    return [job for job in jobs if job.name not in ended]


def unmeasured(rows: list[dict], statuses: tuple[str, ...]) -> dict[str, None]:
    """The jobs in which one of our own providers ended in one of these ways. Peers are ignored,
    because one that failed would fail again."""
    ours = ("torch", "triton")
    return dict.fromkeys(
        row["job"]
        for row in rows
        if row["status"] in statuses and row.get("provider", "triton") in ours
    )


def check(session: Session, earlier: list[dict], log: Path) -> None:
    """Find the operations whose kernels may be timed. A check of the same code is not repeated."""
    journal = session.journal
    for row in earlier:
        same = row.get("commit") == journal.common["commit"] and not row["commit"].endswith("+")
        if row.get("benchmark") == "check" and row["status"] == "done" and same:
            journal.add("done", benchmark="check", job=row["job"], operation=row["operation"])
    known = {row["operation"] for row in journal.rows if row.get("benchmark") == "check"}
    # the tests check all kernels in the interpreter, so one check is enough for a rehearsal
    operations = [
        name for name in (OPERATIONS[:1] if session.toy else OPERATIONS) if name not in known
    ]
    if operations:
        checks.check(operations, min(CHECKED, journal.left() / 2), journal, log, session.device)
    session.unproven = checks.unproven(journal.rows)


def start_again(options: Options, end: float) -> None:
    """Replace this process with one that continues after the last written row."""
    left = end - time.monotonic()
    if left < 30:
        print("no time to continue", flush=True)
        os._exit(1)
    rest = replace(options, minutes=left / 60, resume=True)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *arguments_of(rest)])


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
