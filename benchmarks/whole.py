"""Whole models in a measuring session: tokens per second of training, then against context.

Every preset is trained for a few steps with the torch path and with the kernels, from the same
weights on the same tokens. If the losses of a kernel path differ from those of the torch path, it
is named and not timed. Against context, benchmarks.throughput times the transformer and Mamba, one
context after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from minimodels import LM, Config, preset
from minimodels.ledger import ledger
from minimodels.measure import interleave, peak_bytes, per_second
from minimodels.training.optim import adamw
from minimodels.training.step import training_step

from . import throughput
from .session import Job, Session
from .training import CLIP, precision

STEPS = 4  # whose losses are compared before anything is timed
TOLERANCE = 1e-2  # of |loss - expected| / expected
BUILDING = 60.0  # seconds for building a model and its first steps
TURNS = 20.0  # seconds that all rounds may take
POINT = 60.0  # seconds that all providers may take at one context

# the layers of a preset when each branch is only tried: one of each kind
TOY_LAYERS = {
    "transformer": "attention mlp",
    "mamba": "mamba",
    "moe": "attention moe",
    "mod": "attention mod(mlp)",
    "hybrid": "mamba moe",
}
ORDER = ("transformer", "mamba", "moe", "hybrid", "mod")


def config_of(name: str, impl: str, toy: bool) -> Config:
    """A preset with a path."""
    if toy:
        return preset(name, "tiny", impl=impl, width=32, layers=TOY_LAYERS[name])
    return preset(name, "small", impl=impl)


@cache
def operations_of(config: Config) -> frozenset[str]:
    """The operations for which the model chooses a path."""
    with torch.device("meta"):
        model = LM(config)
    return frozenset(name for part in model.modules() for name in getattr(part, "operations", ()))


def training_jobs() -> list[Job]:
    """One job for each preset."""
    return [Job(f"train {name}", partial(train, name), 25) for name in ORDER]


def train(name: str, session: Session) -> None:
    """Tokens per second of training steps of one preset, with each path, and the
    losses of the first steps."""
    batch, context = (1, 8) if session.toy else (32, 1024)
    row = {
        "benchmark": "training",
        "job": f"train {name}",
        "size": "toy" if session.toy else "small",
    }
    cost = ledger(config_of(name, "torch", session.toy), context)
    row |= {"base": name, "batch": batch, "context": context, "tokens": batch * context}
    row |= {"flops": cost.training_flops, "parameters": cost.parameters}
    limit, calls, known, expected = session.limits["TFLOP/s"] * 1e12, {}, {}, None
    for impl in ("torch", "triton"):
        own = {**row, "model": f"{name}, {impl}", "impl": impl}
        config = config_of(name, impl, session.toy)
        if impl == "triton" and (refusal := session.refusal(operations_of(config))):
            session.journal.add("left out", **own, error=refusal)
            continue
        started = session.journal.attempt(
            own, partial(start, config, batch, context, session), BUILDING
        )
        if started is None:
            continue
        call, losses, memory = started
        expected = expected or losses
        own |= {"losses": losses, "bytes": memory}
        pairs = zip(losses, expected, strict=True)
        if not all(abs(loss - other) <= TOLERANCE * abs(other) for loss, other in pairs):
            session.journal.add("wrong", **own, error=f"losses {losses}, of the first {expected}")
            continue
        calls[impl], known[impl] = call, own
    turns = partial(interleave, calls, 1 if session.toy else 5, 0 if session.toy else 0.5, False)
    for impl, seconds in (
        (session.journal.attempt(row, turns, TURNS) if calls else None) or {}
    ).items():
        share = per_second(row["tokens"] * row["flops"], seconds) / limit
        session.journal.add("done", **known[impl], seconds=seconds, limit=limit, share=share)


def start(
    config: Config, batch: int, context: int, session: Session
) -> tuple[Callable[[], Tensor], list[float], int | None]:
    """A call that makes one training step and returns its loss; the losses of the steps made so
    far; and the bytes that a step takes."""
    torch.manual_seed(0)
    model = LM(config).to(session.device)
    optimizer = adamw(model, 1e-4, 0.1)
    tokens = torch.randint(256, (batch, context + 1)).to(session.device)
    batches, autocast = [(tokens[:, :-1], tokens[:, 1:])], precision(session.device)

    def call() -> Tensor:
        return sum(training_step(model, optimizer, batches, autocast, CLIP).parts.values())

    losses = [float(call()) for _ in range(2 if session.toy else STEPS)]
    return call, losses, None if session.toy else peak_bytes(call, session.device)


def context_jobs(toy: bool) -> list[Job]:
    """One job for each mode and context, with the modes in turn, from
    short contexts to long ones."""
    longest = {"train": 2**15, "prefill": 2**17, "decode": 2**14}
    if toy:
        points = [("train", 8), ("prefill", 8), ("decode", 4)]
    else:
        lengths = throughput.contexts(2**10, max(longest.values()))
        points = [(mode, at) for at in lengths for mode in longest if at <= longest[mode]]
    return [Job(f"{mode} {at}", partial(against_context, mode, at), 30) for mode, at in points]


def against_context(mode: str, context: int, session: Session) -> None:
    """Time the transformer and Mamba at one context."""
    toy = session.toy
    impls = ("torch", "triton")
    if session.device.type == "cuda":
        impls = ("torch", "cudnn", "triton")
    models = ("transformer", "mamba")
    if toy and mode == "decode":  # the interpreter takes a minute to decode with Mamba
        models = ("transformer",)
    options = throughput.Options(
        models=models,
        match="none",
        impl=impls,
        rounds=1 if toy else 5,
        compile=mode == "decode",
        device=session.device.type,
    )
    tokens = 8 if toy else 2**16
    batch = (1 if toy else 8) if mode == "decode" else max(1, tokens // context)
    row = {"benchmark": "throughput", "job": f"{mode} {context}", "mode": mode, "context": context}
    configs = {name: config_of(name, "torch", toy) for name in models}
    given = {}
    for name, provider in throughput.providers(configs, options, mode).items():
        refusal = session.refusal(operations_of(provider.config))
        if provider.impl == "triton" and refusal:
            own = {"model": name, "base": provider.base, "batch": batch, "seconds": None}
            session.journal.add("left out", **row, **own, error=refusal)
        else:
            given[name] = provider
    if toy:  # the interpreter takes a minute for 32 tokens, and a test covers it
        given.pop("transformer, triton in place", None)
    if "mamba, triton" in given:
        given.pop("mamba, torch", None)  # far slower, so it would take the others' time
    point = partial(throughput.measure_point, mode, given, context, batch, options, session.device)
    for measured in session.journal.attempt({**row, "benchmark": "point"}, point, POINT) or ():
        measured |= {"job": row["job"], "limit": session.limits["TFLOP/s"] * 1e12}
        session.journal.add(status_of(measured), **measured)


def status_of(row: dict) -> str:
    """How a point of benchmarks.throughput ended."""
    if row["seconds"]:
        return "done"
    return "out of memory" if "memory" in row["error"] else "failed"
