"""What the jobs of a measuring session share, and the order in which they run."""

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
    """use sizes that only try every branch"""
    limits: dict[str, float] = field(default_factory=dict)
    """the machine's best rates, in GB/s and TFLOP/s"""
    unproven: dict[str, str] = field(default_factory=dict)
    """operations whose kernels are not known to be right, with the reason"""

    def refusal(self, operations: Collection[str]) -> str:
        """Why kernels of these operations may not be timed; empty if they may."""
        reasons = (self.unproven.get(operation, "") for operation in sorted(operations))
        return "; ".join(filter(None, reasons))


@dataclass(frozen=True)
class Job:
    """One measurement, which writes its own rows."""

    name: str
    run: Callable[[Session], None]
    seconds: float = 20.0
    """seconds; the job does not start if less time is left"""


def work(jobs: list[Job], session: Session) -> None:
    """Run one job after the other. A job for which there is no time becomes a row."""
    journal = session.journal
    for job in jobs:
        needed = 0.5 if session.toy else job.seconds
        if journal.left() < needed:
            journal.add("no time", job=job.name, error=f"it takes {needed:g} s or more")
            continue
        try:
            job.run(session)
        except Exception as error:  # an error outside the measured calls, such as in a comparison
            journal.failed({"job": job.name}, error)
        journal.tidy({"job": job.name})
