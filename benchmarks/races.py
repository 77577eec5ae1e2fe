"""How fast is each operation: its kernel, compared with its torch path
and other installed packages?

A race is one operation at one size. First the outputs and gradients of each provider are compared
with those of the torch path. Only the times of providers that agree count. Then the providers take
turns, forward and backward.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
from minimodels.kernels import OPERATIONS
from torch import Tensor

from minimodels.measure import interleave, peak_bytes, per_second, synchronise

from .session import Job, Session

TOLERANCE = 1e-2  # of ‖result - expected‖ / ‖expected‖
SLOW, SLOW_TOY = 0.7, 0.05  # seconds; a provider that takes longer is timed only once
FIRST_CALLS = 60.0  # seconds that a provider may take to compile and tune both passes
TURNS = 20.0  # seconds that all rounds of one direction may take

Provider = Callable[..., object]


def all_but_flex(module) -> dict:
    """Every peer in the kernel file except flex_attention, which takes a minute to compile."""
    return {name: peer for name, peer in module.PEERS.items() if name != "flex_attention"}


def flex_alone(module) -> dict:
    """Only flex_attention."""
    return {name: peer for name, peer in module.PEERS.items() if name == "flex_attention"}


def losses(module) -> dict:
    """The peers of the loss, which return it with its graph. Those in the kernel file
    run backward themselves."""
    calls = {"plain": module.plain, "liger": module.liger(None)}
    return {name: replace(module.PEERS[name], call=call) for name, call in calls.items()}


def case(module, *sizes) -> object:
    """The kernel file's own case with these sizes."""
    return module.case(*sizes)


def decoding(module, S: int, H: int, G: int, d: int) -> object:
    """One query of H heads. Each of the S keys and values is shared by H/G heads. The cost is that
    of reading the keys and values."""

    def inputs() -> tuple:
        sizes = (1, H, 1, d), (1, G, S, d), (1, G, S, d)
        return tuple(torch.randn(size, **module.TIMED) for size in sizes)

    label = f"decoding: B 1, H {H}, G {G}, S {S}, d {d}"
    return SimpleNamespace(
        label=label, inputs=inputs, forward=2 * G * S * d, backward=0, unit="GB/s"
    )


def paths(module, operation: str) -> tuple[Provider, Provider]:
    """The torch path and the kernel."""
    return partial(module.operation, impl="torch"), getattr(module, operation)


def with_rate(module, operation: str) -> tuple[Provider, Provider]:
    """The torch path and the kernel of the delta rule, with a rate, as its peers take it."""
    return tuple(partial(module.with_rate, impl=impl) for impl in ("torch", "triton"))


@dataclass(frozen=True)
class Race:
    """An operation at one size."""

    operation: str
    """its kernel file defines the inputs and the peers"""
    full: tuple[int | str, ...]
    """sizes on a GPU, as `maker` takes them"""
    toy: tuple[int | str, ...]
    """sizes that only try every branch"""
    maker: Callable[..., object] = case
    """makes the case from the kernel file and the sizes"""
    paths: Callable[..., tuple[Provider, Provider]] = paths
    peers: Callable[[object], dict] = all_but_flex
    directions: tuple[str, ...] = ("forward", "backward")
    """or ("both",), because some providers compute the gradients in the forward pass"""

    @property
    def name(self) -> str:
        """The operation and its sizes."""
        kind = " flex" if self.peers is flex_alone else ""
        return f"{self.operation}{kind} {self.maker.__name__}({', '.join(map(str, self.full))})"


GATED, TOY_GATED = ("gated delta", 2**16), ("gated delta", 16)
FIRST = (
    *(Race("selective_scan", (2**16, T, 1536), (16, 8, 32)) for T in (1024, 4096, 16384)),
    *(Race("attention", (2**14, T, 16, d), (16, 16, 1, 16)) for T in (4096, 16384) for d in (64, 128)),
    Race("grouped_mlp", (32768, 128, 8, 2048, 768), (8, 2, 1, 16, 16)),
    Race("causal_conv1d", (16, 8192, 1536), (2, 8, 32)),
    Race("rmsnorm", (2**27 // 768, 768), (4, 32)),
    *(Race("attention", (2**17, H, G, 128), (64, 2 * H // G, 2, 16), decoding, directions=("forward",))
      for H, G in ((16, 16), (32, 8))),
    Race("delta_rule", (*GATED, 2048, 16, 16, 128, 128), (*TOY_GATED, 16, 1, 1, 16, 16), paths=with_rate),
)  # fmt: skip
LATER = (
    Race("linear_cross_entropy", (8192, 2048, 50304), (8, 16, 32), peers=losses, directions=("both",)),
    *(Race("attention", (2**14, 1024, 16, d), (16, 16, 1, 16)) for d in (64, 128)),
    Race("grouped_mlp", (8192, 8, 2, 2048, 5632), (8, 2, 2, 16, 16)),
    Race("rmsnorm", (2**15, 4096), (3, 16)),
    Race("norm_rotate", (2**17, 1024, 12, 64), (4, 4, 1, 16)),
    Race("linear_scan", (2**17, 4096, 1536), (16, 8, 32)),
    Race("delta_rule", (*GATED, 2**16, 16, 16, 128, 128), (*TOY_GATED, 8, 1, 1, 16, 16), paths=with_rate),
    Race("selective_scan", (2**16, 2**16, 1536), (9, 9, 32)),
)  # fmt: skip
LAST = (Race("attention", (2**14, 4096, 16, 64), (16, 16, 1, 16), peers=flex_alone),)


def jobs(races: Iterable[Race]) -> list[Job]:
    """One job for each race whose operation has a kernel."""
    return [Job(race.name, partial(run, race)) for race in races if race.operation in OPERATIONS]


def run(this: Race, session: Session) -> None:
    """Compare all providers, then time those that are right."""
    journal = session.journal
    row = {"benchmark": "kernels", "job": this.name, "operation": this.operation}
    module = importlib.import_module(f"minimodels.kernels.{this.operation}")
    prepared = journal.attempt(row, partial(inputs_of, module, this, session.toy))
    if prepared is None:
        return
    made, arguments = prepared
    row |= {"case": made.label, "unit": made.unit, "ceiling": session.limits[made.unit]}
    right, expected = {}, None
    for name, (call, same, missing) in providers(module, this, session).items():
        if missing:
            status = "left out" if name == "triton" else "skipped"
            journal.add(status, **row, provider=name, error=missing)
            continue
        own = {**row, "provider": name}
        results = journal.attempt(own, partial(outcome, call, arguments), FIRST_CALLS)
        if results is None and expected is None:
            journal.add("left out", **row, error="the torch path failed: nothing to compare with")
            return
        if results is None:
            continue
        off = distance(results, expected) if same and expected is not None else None
        expected = results if expected is None else expected
        if off is not None and not off <= TOLERANCE:
            journal.add("wrong", **own, off=off, error=f"off by {off:.1e}, allowed {TOLERANCE}")
        else:
            right[name] = call, off
    del expected
    for direction in this.directions:
        work = made.backward if direction == "backward" else made.forward
        take_turns(right, arguments, direction, {**row, "direction": direction}, work, session)


def inputs_of(module, this: Race, toy: bool) -> tuple:
    """The case, and the arguments that all providers share."""
    torch.manual_seed(0)
    made = this.maker(module, *(this.toy if toy else this.full))
    return made, made.inputs()


def providers(module, this: Race, session: Session) -> dict[str, tuple]:
    """For each provider by name: the call, whether it must return the results of the torch path,
    and the reason if it cannot run. The torch path comes first."""
    torch_path, kernel = this.paths(module, this.operation)
    found = {
        "torch": (torch_path, True, ""),
        "triton": (kernel, True, session.refusal([this.operation])),
    }
    for name, peer in this.peers(module).items():
        missing = ""
        if importlib.util.find_spec(peer.module or peer.package.replace("-", "_")) is None:
            missing = f"{peer.package} is not installed"
        elif peer.gpu and session.device.type != "cuda":
            missing = "needs a GPU"
        found[name] = peer.call, peer.same, missing
    return found


def outcome(call: Provider, arguments: tuple) -> list[Tensor | None]:
    """The output, and the gradients of a loss that gives each number of the
    output a different weight."""
    output = first(call(*arguments))
    wanted = wanted_of(arguments)
    if not wanted:
        return [output.detach()]
    gradients = torch.autograd.grad(output, wanted, weights(output), allow_unused=True)
    synchronise()
    return [output.detach(), *gradients]


def first(outputs: Tensor | tuple) -> Tensor:
    """The output that all providers return."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def wanted_of(arguments: tuple) -> list[Tensor]:
    """The arguments that need gradients."""
    return [part for part in arguments if isinstance(part, Tensor) and part.requires_grad]


def weights(output: Tensor) -> Tensor:
    """A gradient of the output, in which all numbers differ; 1 for a loss."""
    if not output.ndim:
        return torch.ones_like(output)
    rising = torch.linspace(-1, 1, output.numel(), device=output.device)
    return rising.view(output.shape).to(output.dtype)


def distance(results: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The largest ‖result - expected‖ / ‖expected‖ of outputs and gradients; infinite if one is
    missing or not a number."""
    worst = 0.0
    for result, wanted in zip(results, expected, strict=True):
        if result is None and wanted is None:
            continue
        if result is None or wanted is None or result.shape != wanted.shape:
            return math.inf
        size = wanted.float().norm().clamp(min=1e-30)
        off = float((result.float() - wanted.float()).norm() / size)
        worst = max(worst, off if math.isfinite(off) else math.inf)
    return worst


def take_turns(
    right: dict[str, tuple], arguments: tuple, direction: str, row: dict, work: float, session: Session
) -> None:  # fmt: skip
    """Time the providers in turn. A slow provider is timed once."""
    calls, memory, seconds = {}, {}, {}
    journal, device, slowest = session.journal, session.device, SLOW_TOY if session.toy else SLOW
    for name, (call, _) in right.items():
        own = {**row, "provider": name}
        timed = journal.attempt(own, partial(warm, call, arguments, direction, device), TURNS)
        if timed is not None:
            calls[name], memory[name], seconds[name] = timed
    slow = {name for name in calls if seconds[name][0] > slowest}
    quick = {name: call for name, call in calls.items() if name not in slow}
    turns = partial(interleave, quick, 5, 0 if session.toy else 0.04, warm=False)
    seconds |= (journal.attempt(row, turns, TURNS) if quick else None) or {}
    for name in calls:
        if name in quick and len(seconds[name]) == 1:
            continue  # it ran out of time, as another row says
        size = arguments[0].dtype.itemsize / 1e9 if row["unit"] == "GB/s" else 1e-12
        speed = per_second(work * size, seconds[name])
        told = {"seconds": seconds[name], "bytes": memory[name], "off": right[name][1]}
        journal.add("done", **row, provider=name, rate=speed, **told)


def warm(call: Provider, arguments: tuple, direction: str, device: torch.device) -> tuple:
    """A call that runs one pass in this direction, the bytes that it takes, and its
    seconds as a list of one."""
    timed = passes(call, arguments, direction)
    memory = peak_bytes(timed, device)
    synchronise()
    start = time.perf_counter()
    timed()
    synchronise()
    return timed, memory, [time.perf_counter() - start]


def passes(call: Provider, arguments: tuple, direction: str) -> Callable[[], object]:
    """The call to time: the forward pass; or the backward pass alone, with the forward pass made
    before the timing; or both."""
    wanted = wanted_of(arguments)
    if direction == "forward":
        return partial(torch.no_grad()(call), *arguments)
    if direction == "both":
        return lambda: torch.autograd.grad(first(call(*arguments)), wanted)
    output = first(call(*arguments))
    gradient = weights(output)
    return lambda: torch.autograd.grad(
        output, wanted, gradient, retain_graph=True, allow_unused=True
    )
