"""What the jobs of a measuring session share, and the order in which they get their time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from .journal import Journal


@dataclass
class Session:
    """A journal, and what its jobs must know."""

    journal: Journal
    device: torch.device
    toy: bool
    """sizes at which every branch is only tried"""
    limits: dict[str, float] = field(default_factory=dict)
    """what the machine reaches at best, in GB/s and TFLOP/s"""
    unproven: dict[str, str] = field(default_factory=dict)
    """operations whose kernels are not known to be right, and why"""

    def refusal(self, operations: Collection[str]) -> str:
        """Why kernels of these operations may not be timed, empty if they may."""
        reasons = (self.unproven.get(operation, "") for operation in sorted(operations))
        return "; ".join(filter(None, reasons))


@dataclass(frozen=True)
class Job:
    """Something to measure, which writes its own rows."""

    name: str
    run: Callable[[Session], None]
    seconds: float = 20.0
    """not begun when less time than this is left"""


def work(jobs: list[Job], session: Session) -> None:
    """One job after the other. What there is no time for becomes a row."""
    journal = session.journal
    for job in jobs:
        needed = 0.5 if session.toy else job.seconds
        if journal.left() < needed:
            journal.add("no time", job=job.name, error=f"it takes {needed:g} s or more")
            continue
        try:
            job.run(session)
        except Exception as error:  # of what the job does not attempt itself, such as comparing
            journal.failed({"job": job.name}, error)
        journal.tidy({"job": job.name})
