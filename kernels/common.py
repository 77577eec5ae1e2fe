"""What the kernels share: launching on the tensor's device, tuning, and the report that each file prints when it is run."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
import triton.language as tl
import tyro
from torch import Tensor

from minimodels.measure import ceilings, environment, interleave

from . import INTERPRETED


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch where the tensor is, whichever GPU is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def full(tensor: Tensor) -> tl.dtype:
    """What a kernel computes in: fp32, or fp64 where the tensor is."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def tuned(configs: list[triton.Config], key: list[str]):
    """Time the configurations once for each value of the key and keep the fastest; the interpreter takes the first."""
    return triton.autotune(configs=configs[:1] if INTERPRETED else configs, key=key)


def programs(tensor: Tensor, per_processor: int = 4) -> int:
    """How many programs keep the machine busy, each with a share of the rows."""
    return per_processor * torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 3


def compare(kernel: Callable, reference: Callable, arguments: tuple) -> None:
    """Assert that outputs and gradients are the reference's in fp64, up to twice the error of the reference at the precision
    tested, or to a floor where that is chance: fp32 and, interpreted, fp64; on a GPU fp32 and bf16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = run(reference, [move(part, device, torch.float64) for part in arguments])
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32, torch.float64):
        inputs = [move(part, device, dtype) for part in arguments]
        results, plain = run(kernel, inputs), run(reference, inputs)
        for i, (result, low, true) in enumerate(zip(results, plain, exact, strict=True)):
            error, allowed = (result - true).abs().max(), 2 * (low - true).abs().max()
            floor = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * (1 + true.abs().max())
            if not error <= max(allowed, floor):
                raise AssertionError(
                    f"{dtype}, result {i} of {len(exact)}: off by {error:.2e}, allowed {max(allowed, floor):.2e}"
                )


def move(part: object, device: str, dtype: torch.dtype) -> object:
    """A floating-point argument on a device, in a dtype, wanting its gradient; anything else as it is, on the device."""
    if not isinstance(part, Tensor):
        return part
    if not part.is_floating_point():
        return part.to(device)
    return part.detach().to(device, dtype).requires_grad_()


def run(operation: Callable, arguments: list) -> list[Tensor]:
    """The floating-point outputs, and the gradients of a loss that weighs each of their numbers differently."""
    outputs = operation(*arguments)
    outputs = [
        o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor) and o.is_floating_point()
    ]
    weights = [
        torch.linspace(-1, 1, o.numel(), device=o.device, dtype=torch.float64).view(o.shape).to(o.dtype) for o in outputs
    ]
    wanted = [part for part in arguments if isinstance(part, Tensor) and part.requires_grad]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, weights)]


@dataclass
class Case:
    """One size at which an operation is timed."""

    label: str
    inputs: Callable[[], tuple]
    """makes the arguments; the tensors that want gradients require them"""
    forward: float
    """the bytes, or FLOPs, that the forward pass must cost"""
    backward: float
    """and the backward pass; 0 where the providers do both in one call"""
    unit: str = "GB/s"
    """or TFLOP/s: what the two above are counted in, and which of the machine's ceilings they are held against"""
    peers: dict[str, Callable] = field(default_factory=dict)
    """further providers with the operation's signature"""


@dataclass(frozen=True)
class Options:
    """Check an operation and time it against its torch path, the same compiled, and what else is installed."""

    out: Path | None = None
    """file for JSON rows, appended"""
    rounds: int = 5
    """rounds of interleaved timings"""
    check_only: bool = False
    """compare with the reference and time nothing"""


def report(operation: str, kernel: Callable, torch_path: Callable, cases: list[Case], check: Callable[[], None]) -> Callable:
    """The command of a kernel file: `check` first, then forward and backward of every case, providers in turn."""

    def main(options: Options) -> None:
        check()
        print(f"{operation}: outputs and gradients are those of the reference")
        if options.check_only:
            return
        if not torch.cuda.is_available():
            print("no GPU: nothing is timed (the check ran interpreted)")
            return
        limits, shared = ceilings(torch.device("cuda")), environment(torch.device("cuda"))
        print(f"{shared['device']}: copy {limits['GB/s']:,.0f} GB/s, bf16 products {limits['TFLOP/s']:,.0f} TFLOP/s")
        for case in cases:
            providers = {"triton": kernel, "torch": torch_path, "torch.compile": torch.compile(torch_path), **case.peers}
            for direction, work in (("forward", case.forward), ("backward", case.backward)):
                if not work:  # the forward pass did both
                    continue
                timings = time_providers(providers, case.inputs, direction, options.rounds)
                for name, seconds in timings.items():
                    median = statistics.median(seconds)
                    rate = work / median / (1e9 if case.unit == "GB/s" else 1e12)
                    print(
                        f"  {case.label:40} {direction:8} {name:14} {median * 1e3:8.3f} ms {rate:8,.0f} {case.unit} "
                        f"{rate / limits[case.unit]:5.0%} of the machine's"
                    )
                    row = {"operation": operation, "case": case.label, "direction": direction, "provider": name}
                    row |= {"seconds": seconds, "rate": rate, "unit": case.unit, "ceiling": limits[case.unit]}
                    if options.out:
                        with options.out.open("a") as file:
                            file.write(json.dumps({**shared, **row}) + "\n")

    return main


def time_providers(providers: dict[str, Callable], inputs: Callable[[], tuple], direction: str, rounds: int) -> dict:
    """Interleaved seconds of each provider that runs at all; one that fails is named and left out."""
    calls = {}
    for name, provider in providers.items():
        try:
            calls[name] = prepare(provider, inputs(), direction)
            calls[name]()
        except Exception as error:  # a peer may raise anything
            reason = (str(error).splitlines() or [""])[0]
            print(f"  {name}: left out, for it failed ({type(error).__name__}: {reason})")
            calls.pop(name, None)
    return interleave(calls, rounds=rounds)


def prepare(provider: Callable, arguments: tuple, direction: str) -> Callable[[], object]:
    """A call that does one forward pass, or one backward pass of a forward pass made before the clock starts."""
    if direction == "forward":

        def forward():
            with torch.no_grad():
                return provider(*arguments)

        return forward
    outputs = provider(*arguments)
    output = outputs[0] if isinstance(outputs, tuple) else outputs
    wanted = [tensor for tensor in arguments if isinstance(tensor, Tensor) and tensor.requires_grad]
    gradient = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, wanted, gradient, retain_graph=True)


def command(main: Callable, description: str) -> None:
    """Run a kernel file's report from the command line."""
    from minimodels.command import run_command

    run_command(main, lambda: tyro.cli(Options, description=description))
