"""Which settings make the selective scan fastest? Its kernel file lists those to try.

`SWEEP` in minimodels.kernels.selective_scan is a list of (name, settings). A setting with the name
of a constant of that file, such as STEPS, replaces the constant. Any other setting, such as
num_warps or maxnreg, is an option for launching the file's kernels.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

from .races import FIRST_CALLS, TOLERANCE, Race, distance, inputs_of, outcome, take_turns
from .session import Job, Session

SIZES = (
    Race("selective_scan", (2**16, 1024, 1536), (16, 8, 32)),
    Race("selective_scan", (2**16, 16384, 1536), (9, 9, 32)),
)


def jobs() -> list[Job]:
    """One job for each size."""
    return [Job(f"sweep {race.name}", partial(sweep, race)) for race in SIZES]


def sweep(this: Race, session: Session) -> None:
    """Time each setting whose results agree with the torch path."""
    journal, module = session.journal, importlib.import_module("minimodels.kernels.selective_scan")
    row = {"benchmark": "sweep", "job": f"sweep {this.name}", "operation": this.operation}
    settings = [("as it is", {}), *getattr(module, "SWEEP", [])]
    if reason := session.refusal([this.operation]):
        journal.add("left out", **row, error=reason)
        return
    if len(settings) == 1:
        journal.add("skipped", **row, error="the kernel file lists no settings in SWEEP")
        return
    case, arguments = inputs_of(module, this, session.toy)
    row |= {"case": case.label, "unit": case.unit, "ceiling": session.limits[case.unit]}
    own = {**row, "provider": "torch"}
    torch_path = partial(module.operation, impl="torch")
    expected = journal.attempt(own, partial(outcome, torch_path, arguments), FIRST_CALLS)
    for name, setting in settings if expected else ():
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
    """The kernel file with other constants and launch options."""
    # here, because the command that imports this file also runs without Triton
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import KernelInterface

    constants = {name: value for name, value in setting.items() if hasattr(module, name)}
    options = {name: value for name, value in setting.items() if name not in constants}
    kernels = [kernel for kernel in vars(module).values() if isinstance(kernel, KernelInterface)]
    with ExitStack() as stack:
        for name, value in constants.items():
            stack.enter_context(patch.object(module, name, value))
        for kernel in kernels if options else ():
            if isinstance(kernel, Autotuner):
                configs = [changed(config, options) for config in kernel.configs]
                stack.enter_context(patch.object(kernel, "configs", configs))
                stack.enter_context(patch.object(kernel, "cache", {}))
            else:
                stack.enter_context(
                    patch.object(kernel, "run", partial(launch, kernel.run, options))
                )
        yield


def launch(run, options: dict[str, object], *arguments, **given) -> object:
    """Launch a kernel with some of its options replaced."""
    return run(*arguments, **{**given, **options})


def changed(config, options: dict[str, object]) -> object:
    """A copy of a configuration with other options."""
    config = copy.copy(config)
    config.kwargs = dict(config.kwargs)
    for name, value in options.items():
        if hasattr(config, name):
            setattr(config, name, value)
        else:
            config.kwargs[name] = value
    return config
