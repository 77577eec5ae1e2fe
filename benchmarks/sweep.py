"""Which settings make the selective scan fastest? Its kernel file lists those to try.

`SWEEP` in minimodels.kernels.selective_scan is a list of settings: how time is split, the steps of
a group, the registers of a thread, forward and backward. A setting replaces some constants of that
file. Each is compared with the torch path, and then timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

from .races import FIRST_CALLS, TOLERANCE, Race, distance, inputs_of, outcome, take_turns
from .session import Job, Session

SIZES = (
    Race("selective_scan", (2**16, 1024, 1536), (8, 4, 8)),
    Race("selective_scan", (2**16, 16384, 1536), (5, 5, 8)),
)


def jobs() -> list[Job]:
    """One job for each size."""
    return [Job(f"sweep {race.name}", partial(sweep, race)) for race in SIZES]


def sweep(this: Race, session: Session) -> None:
    """Time each setting whose results agree with the torch path."""
    journal, module = session.journal, importlib.import_module("minimodels.kernels.selective_scan")
    row = {"benchmark": "sweep", "job": f"sweep {this.name}", "operation": this.operation}
    if reason := session.refusal([this.operation]):
        journal.add("left out", **row, error=reason)
        return
    case, arguments = inputs_of(module, this, session.toy)
    row |= {"case": case.label, "unit": case.unit, "ceiling": session.limits[case.unit]}
    torch_path = partial(module.operation, impl="torch")
    own = {**row, "provider": "torch"}
    expected = journal.attempt(own, partial(outcome, torch_path, arguments), FIRST_CALLS)
    for setting in ({}, *module.SWEEP) if expected else ():
        name = ", ".join(f"{name} {value}" for name, value in setting.items()) or "as it is"
        own = {**row, "provider": name}
        with applied(module, setting):
            call = module.selective_scan
            results = journal.attempt(own, partial(outcome, call, arguments), FIRST_CALLS)
            if results is None:
                continue
            off = distance(results, expected)
            if not off <= TOLERANCE:
                journal.add("wrong", **own, off=off, error=f"off by {off:.1e}, allowed {TOLERANCE}")
                continue
            for direction, work in (("forward", case.forward), ("backward", case.backward)):
                right = {name: (call, off)}
                take_turns(
                    right, arguments, direction, {**row, "direction": direction}, work, session
                )


@contextmanager
def applied(module, setting: dict[str, object]) -> Iterator[None]:
    """The kernel file with other constants. An unknown name raises AttributeError."""
    with ExitStack() as stack:
        for name, value in setting.items():
            stack.enter_context(patch.object(module, name, value))
        yield
