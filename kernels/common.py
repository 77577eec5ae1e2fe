"""What the kernels share: the sigmoid, launches on the right device, tuning and reports.

Each kernel file prints its report when it is run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from minimodels.kernels import INTERPRETED
from torch import Tensor
from torch._functorch import config as functorch_config

from minimodels.command import keep_freed_memory, parse_options, run_command
from minimodels.errors import InputError
from minimodels.measure import ceilings, environment, interleave, peak_bytes

GPU = torch.cuda.is_available()
# where and in which dtype operations are timed
TIMED = (
    {"device": "cuda", "dtype": torch.bfloat16}
    if GPU
    else {"device": "cpu", "dtype": torch.float32}
)
PRETENDED = 3  # multiprocessors (SMs) if there is no GPU
# the precisions in which results are compared
CHECKED = (torch.float32, torch.bfloat16) if GPU else (torch.float32, torch.float64)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v)), by exp2, which takes one instruction (exp takes four)."""
    return 1 / (1 + tl.exp2(v * -LOG2_E))


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the GPU of the tensor, whichever GPU is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def innermost(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, whatever its other strides are; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense(*parts: Tensor | None) -> list[Tensor | None]:
    """The tensors, each contiguous; None stays None."""
    return [part if part is None else part.contiguous() for part in parts]


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask in the form that a kernel reads: contiguous bytes, 1 for True."""
    return mask if mask is None else mask.contiguous().view(torch.uint8)


def full(tensor: Tensor) -> tl.dtype:
    """The precision in which a kernel computes: fp32, or fp64 if the tensor is."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def tuned(configs: list[triton.Config], key: list[str], prune: Callable | None = None) -> Callable:
    """Tune a kernel: time its configurations and keep the fastest one.

    It does so once for each value of the key and each combination of the arguments' dtypes. `prune`
    selects the configurations to time. The choice is also saved in Triton's cache on disk. The
    interpreter takes the first configuration.
    """

    def decorate(kernel):
        if INTERPRETED:
            tuner = triton.autotune(configs[:1], key)(kernel)
        else:
            prune_by = prune and {"early_config_prune": prune}
            tuner = triton.autotune(configs, key, prune_configs_by=prune_by, cache_results=True)(
                kernel
            )
        tuner.candidates = configs
        return tuner

    return decorate


def size_of(rows: int) -> int:
    """The number of rows by which a kernel is tuned: rounded up, and limited, because more rows
    would be tuned in the same way."""
    return min(triton.next_power_of_2(rows), 4096)


def configurations(*kernels) -> Iterator[str]:
    """Make tuned kernels use their first configuration, then their second, and so on, untuned.

    A kernel with fewer configurations repeats its last one. Yields a description of the choice.
    """
    before = [kernel.configs for kernel in kernels]
    try:
        for i in range(max((len(kernel.candidates) for kernel in kernels), default=1)):
            for kernel in kernels:
                kernel.configs = [kernel.candidates[min(i, len(kernel.candidates) - 1)]]
            yield "; ".join(f"{kernel.base_fn.__name__} {kernel.configs[0]}" for kernel in kernels)
    finally:
        for kernel, configs in zip(kernels, before, strict=True):
            kernel.configs = configs


def multiprocessors(tensor: Tensor) -> int:
    """The number of SMs of the tensor's GPU, or PRETENDED if there is none."""
    return (
        torch.cuda.get_device_properties(tensor.device).multi_processor_count
        if tensor.is_cuda
        else PRETENDED
    )


# a GPU's exponential may be off by up to 2⁻²², perhaps always in the same direction, and in a long
# product of decays these errors add up
FLOORS = {
    torch.float64: 1e-12,
    torch.float32: 1e-4 if GPU else 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}


def compare(
    kernel: Callable,
    reference: Callable,
    arguments: tuple,
    dtypes: tuple[torch.dtype, ...] = CHECKED,
) -> None:
    """Assert that outputs and gradients are close to the reference in fp64, at each precision.

    The bound is twice the reference's own error at that precision, or a floor if that error is
    small by chance.
    """
    device = TIMED["device"]
    exact = run(reference, [move(part, device, torch.float64) for part in arguments])
    for dtype in dtypes:
        inputs = [move(part, device, dtype) for part in arguments]
        results, plain = run(kernel, inputs), run(reference, inputs)
        for i, (result, low, true) in enumerate(zip(results, plain, exact, strict=True)):
            if not true.numel():
                continue
            error, allowed = (result - true).abs().max(), 2 * (low - true).abs().max()
            floor = FLOORS[dtype] * (1 + true.abs().max())
            if not error <= max(allowed, floor):
                raise AssertionError(
                    f"{dtype}, result {i} of {len(exact)}: off by {error:.2e}, allowed {max(allowed, floor):.2e}"
                )


def compare_all(
    tuned: tuple,
    kernel: Callable,
    reference: Callable,
    odd: list[tuple],
    full: list[tuple],
    dtypes: tuple[torch.dtype, ...] = CHECKED,
) -> None:
    """Compare at odd sizes and at sizes that fill blocks, in several configurations.

    The first configuration of the tuned kernels is compared at every precision. The others
    are compared at full sizes, and not in fp32.

    Nothing is tuned here. So other work on the GPU during the check cannot put a wrong winner into
    Triton's cache, and the measurement can reuse what was compiled. A configuration that needs more
    shared memory than there is would never be chosen, so it is left out.
    """
    for i, chosen in enumerate(configurations(*tuned)):
        for arguments in [*odd, *full] if i == 0 else full:
            try:
                compare(kernel, reference, arguments, dtypes if i == 0 else dtypes[1:])
            except triton.runtime.errors.OutOfResources as error:
                print(f"not checked, because it is too large: {chosen}: {error}")
            except AssertionError as error:
                raise AssertionError(f"{error} {chosen}".strip()) from None


def move(part: object, device: str, dtype: torch.dtype) -> object:
    """Move an argument to a device.

    A floating-point tensor also gets the dtype and requires its gradient.
    """
    if not isinstance(part, Tensor):
        return part
    if not part.is_floating_point():
        return part.to(device)
    return part.detach().to(device, dtype).requires_grad_()


def run(operation: Callable, arguments: list) -> list[Tensor]:
    """The floating-point outputs, and the gradients of a loss in which each number has a weight."""
    outputs = operation(*arguments)
    outputs = [
        o
        for o in (outputs if isinstance(outputs, tuple) else (outputs,))
        if isinstance(o, Tensor) and o.is_floating_point()
    ]
    weights = [
        torch.linspace(-1, 1, o.numel(), device=o.device, dtype=torch.float64)
        .view(o.shape)
        .to(o.dtype)
        for o in outputs
    ]
    wanted = [part for part in arguments if isinstance(part, Tensor) and part.requires_grad]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, weights)]


@dataclass
class Case:
    """One size at which an operation is timed.

    TIMED says how: in fp32 on a CPU, and in bf16 on a GPU, except for some small parameters.
    """

    label: str
    inputs: Callable[[], tuple]
    """makes the arguments, x or q first; those that need gradients have requires_grad"""
    forward: float
    """the numbers that the forward pass must move, or the FLOPs that it must take"""
    backward: float
    """the same for the backward pass; 0 if it is not timed alone"""
    unit: str = "GB/s"
    """or TFLOP/s: which of the machine's ceilings the two above are compared with"""


@dataclass
class Peer:
    """Another implementation of the operation."""

    package: str
    """the package that must be installed"""
    call: Callable
    """has the signature of the operation"""
    gpu: bool = True
    """whether it needs a GPU"""
    module: str = ""
    """the name under which the package is imported, if it differs"""
    same: bool = True
    """whether its results should be the same; if so, it is left out when they differ"""


def available(peers: dict[str, Peer]) -> dict[str, Callable]:
    """The peers that can run here. The names of the others are printed."""
    found = {}
    for name, peer in peers.items():
        if importlib.util.find_spec(peer.module or peer.package.replace("-", "_")) is None:
            print(f"  {name}: skipped, because {peer.package} is not installed")
        elif peer.gpu and not GPU:
            print(f"  {name}: skipped, because it needs a GPU")
        else:
            found[name] = peer.call
    return found


@dataclass(frozen=True)
class Options:
    """Check an operation and time it against its torch path, plain and compiled, and its peers."""

    out: Path | None = None
    """file for JSON rows; new rows of an operation replace earlier ones"""
    rounds: int = 5
    """rounds of interleaved timings"""
    check_only: bool = False
    """compare with the reference and time nothing"""


def report(
    name: str,
    kernel: Callable,
    operation: Callable,
    cases: list[Case],
    peers: dict[str, Peer],
    check: Callable,
) -> Callable:
    """The command of a kernel file: run `check`, then time every case.

    Each case is timed forward and backward, with the providers in turn, and their memory is
    measured. `operation` is that of the architecture, with an argument `impl`. In the last case its
    torch path is also compiled and timed. Without a GPU the kernel is checked only if
    TRITON_INTERPRET=1 is set, and the reference is timed in its place. If a kernel fails its check,
    only the other providers are timed. With --check-only the exit status is then 1, and the last
    line gives the reason.
    """

    def main(options: Options) -> None:
        if not GPU and not INTERPRETED and options.check_only:
            raise InputError("check-only", True, "a machine with a GPU, or TRITON_INTERPRET=1")
        wrong = find_fault(name, check) if GPU or INTERPRETED else ""
        if not GPU and not INTERPRETED:
            print(
                f"{name}: the kernel is not checked or timed without a GPU (TRITON_INTERPRET=1 checks it)"
            )
        if options.check_only:
            sys.exit(1 if wrong else 0)
        if options.rounds < 1:
            raise InputError("rounds", options.rounds, "1 or more")
        keep_freed_memory()  # as train.py does
        device = torch.device(TIMED["device"])
        rows = Rows(options.out, environment(device), name)
        torch_path, installed = partial(operation, impl="torch"), available(peers)
        for case in cases:
            torch._dynamo.reset()  # otherwise a second size makes it compile for any size
            compiled = (
                {"torch.compile": torch.compile(torch_path, dynamic=False)}
                if case is cases[-1]
                else {}
            )
            ours = {"triton": kernel} if GPU and not wrong else {}
            plain = {} if GPU else {"reference": partial(operation, impl="reference")}
            # the torch path comes first, because the others are compared with it
            providers = {"torch": torch_path, **ours, **plain, **compiled, **installed}
            others = {peer for peer, what in peers.items() if not what.same}
            limits = ceilings(device)  # measured again, because a shared machine drifts
            print(
                f"{rows.common['device']}: copy {limits['GB/s']:.3g} GB/s, matrix products {limits['TFLOP/s']:.3g} TFLOP/s"
            )
            time_case(case, providers, others, rows, limits, options.rounds)

    return main


def time_case(
    case: Case,
    providers: dict[str, Callable],
    others: set[str],
    rows: Rows,
    limits: dict[str, float],
    rounds: int,
) -> None:
    """Time a case's forward and backward pass, and write the rows."""
    for direction, work in (("forward", case.forward), ("backward", case.backward)):
        if not work:
            continue
        timings, memory = time_providers(providers, others, case.inputs, direction, rounds)
        for provider, seconds in timings.items():
            rows.add(case, direction, work, provider, seconds, memory[provider], limits[case.unit])


class Rows:
    """Prints what was measured, and appends it to a file if there is one.

    The file loses the operation's earlier rows.
    """

    def __init__(self, out: Path | None, common: dict, operation: str):
        self.out, self.common, self.operation = out, common, operation
        if out:
            forget(out, operation)

    def add(
        self,
        case: Case,
        direction: str,
        work: float,
        provider: str,
        seconds: list[float],
        memory: int | None,
        ceiling: float,
    ) -> None:
        """Print one row of measurements, and append it to the file if there is one."""
        median = statistics.median(seconds)
        scale = TIMED["dtype"].itemsize / 1e9 if case.unit == "GB/s" else 1e-12
        rate = work * scale / median
        print(
            f"  {case.label:40} {direction:8} {provider:14} {median * 1e3:9.3f} ms {rate:8.3g} {case.unit} "
            f"{rate / ceiling:5.0%} of the machine's {(memory or 0) / 1e6:8,.0f} MB"
        )
        row = {"benchmark": "kernels", "operation": self.operation, "case": case.label}
        row |= {"direction": direction, "provider": provider, "seconds": seconds, "bytes": memory}
        row |= {"rate": rate, "unit": case.unit, "ceiling": ceiling}
        if self.out:
            with self.out.open("a") as file:
                file.write(json.dumps({**self.common, **row}) + "\n")


def find_fault(name: str, check: Callable) -> str:
    """Why a kernel fails its check, in one line; empty if it passes. Prints the result."""
    try:
        check()
    except Exception as error:  # the compiler or the GPU may raise anything
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        print(f"{name}: the kernel fails its check and is left out: {reason}", flush=True)
        return reason
    print(f"{name}: outputs and gradients match the reference", flush=True)
    return ""


def forget(path: Path, operation: str) -> None:
    """Keep only the rows of other operations. Raises InputError if the file has other contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        kept = [line for line in lines if line and json.loads(line)["operation"] != operation]
    except (ValueError, KeyError, TypeError):
        raise InputError("out", str(path), "a new file, or one with rows of kernels") from None
    path.write_text("".join(f"{line}\n" for line in kept))


def time_providers(
    providers: dict[str, Callable],
    others: set[str],
    inputs: Callable[[], tuple],
    direction: str,
    rounds: int,
) -> tuple:
    """The seconds of each provider, timed in turn, and the bytes that it takes.

    All must return the first provider's results. One that fails or returns other results is named
    and left out. `others` compute something else and are not compared.
    """
    functorch_config.donated_buffer = False  # so that a compiled backward pass can run repeatedly
    calls, memory, expected = {}, {}, None
    first = next(iter(providers))
    for name, provider in providers.items():
        try:
            torch.manual_seed(0)
            arguments = inputs()
            call = prepare(provider, arguments, direction)
            results = tensors(call())  # compiles and tunes
            if name == first:
                expected = results
            elif expected is None:
                print(f"  {name}: not compared, because {first} failed")
            elif name not in others:
                agree(results, expected)
            memory[name] = peak_bytes(
                partial(once, provider, arguments, direction), torch.device(TIMED["device"])
            )
            calls[name] = call
        except Exception as error:  # a peer may raise anything
            reason = (str(error).splitlines() or [""])[0]
            print(f"  {name}: left out, because it failed ({type(error).__name__}: {reason})")
    return interleave(calls, rounds=rounds, seconds=0.05 if GPU else 0.2, warm=False), memory


def tensors(results: object) -> list[Tensor]:
    """The first output, which all providers return, or the gradients."""
    return (
        list(results)
        if isinstance(results, list)
        else [results[0] if isinstance(results, tuple) else results]
    )


def agree(results: list[Tensor], expected: list[Tensor]) -> None:
    """Raise AssertionError unless the results agree up to rounding in the timed precision.

    The bound is on the norm of their difference. A bound on the largest difference would accept an
    error of that size in every number.
    """
    allowed = 1e-2 if TIMED["dtype"] == torch.bfloat16 else 1e-3
    for i, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        result, wanted = result.double(), wanted.double()
        error = (result - wanted).norm() / wanted.norm().clamp(min=1e-30)
        if not error < allowed:
            raise AssertionError(f"result {i} is off by {error:.2e} of its norm, allowed {allowed}")


def once(provider: Callable, arguments: tuple, direction: str) -> None:
    """One forward pass without gradients, or a forward and a backward pass, to measure memory."""
    prepare(provider, arguments, direction)()


def prepare(provider: Callable, arguments: tuple, direction: str) -> Callable[[], object]:
    """Make a call that does one forward pass, or one backward pass.

    For a backward pass, the forward pass runs here, before the clock starts.
    """
    if direction == "forward":

        def forward():
            with torch.no_grad():
                return provider(*arguments)

        return forward
    outputs = provider(*arguments)
    output = outputs[0] if isinstance(outputs, tuple) else outputs
    wanted = [tensor for tensor in arguments if isinstance(tensor, Tensor) and tensor.requires_grad]
    # the same values whatever the strides
    gradient = torch.randn(output.shape, device=output.device, dtype=output.dtype)
    return lambda: list(torch.autograd.grad(output, wanted, gradient, retain_graph=True))


def command(main: Callable, description: str) -> None:
    """Run a kernel file's report from the command line."""
    run_command(main, lambda: parse_options(Options, description))
