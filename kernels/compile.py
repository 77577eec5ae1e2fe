"""Compile the kernels for a GPU, as they are launched, without needing one.

    python -m minimodels.kernels.compile [OPERATION ...]      for Hopper (sm_90); by default all

Each kernel file has EXAMPLES, inputs of its operation. The command runs each operation on them
forward and backward in bf16. It binds each launch to its arguments and compiles it in every
configuration that tuning would try, but nothing is launched, so the outputs are meaningless. Every
core compiles one example at a time. Kernels that are not in Triton's cache take some minutes.

It prints registers per thread, spilled bytes and shared memory. For each innermost loop it prints
what a warp must issue in each round: the instructions, and how many of them are special functions
(exponentials, reciprocals) or matrix products. If the assembler expects a loss of speed, its
message is quoted. For example, "serialized" products wait for each other, which can halve a
kernel's speed. The command fails if there is such a message or, with the compiler's message, if
compilation fails.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import triton
import tyro
from minimodels.kernels import INTERPRETED, OPERATIONS, common
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from minimodels.command import parse_options, run_command
from minimodels.errors import InputError

SHARED = 227 * 1024  # bytes of shared memory that a program may use


class Hopper:
    """What Triton asks a GPU's driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def launches(operation: Callable, arguments: tuple) -> list[tuple]:
    """Run an operation forward and backward without a GPU.

    Returns the name, the tuned constants and the binary of each launch.
    """
    found, bind, tune = [], JITFunction.run, Autotuner.run

    def compile_only(
        kernel: JITFunction, *values, grid, warmup: bool = False, tuned: str = "", **options
    ):
        found.append(
            (kernel.__name__, tuned, bind(kernel, *values, grid=grid, warmup=True, **options))
        )

    def try_all(tuner: Autotuner, *values, **options):
        tuner.nargs = dict(zip(tuner.arg_names, values, strict=False))
        for config in tuner.prune_configs(options):
            sizes = [
                *config.kwargs.items(),
                (config.num_warps, "warps"),
                (config.num_stages, "stages"),
            ]
            tuned = "  [" + ", ".join(f"{name} {value}" for name, value in sizes) + "]"
            tuner.fn.run(*values, **options, **config.all_kwargs(), tuned=tuned)

    JITFunction.run, Autotuner.run = compile_only, try_all
    try:
        outputs = operation(*arguments)
        outputs = [
            part
            for part in (outputs if isinstance(outputs, tuple) else (outputs,))
            if part.requires_grad
        ]
        torch.autograd.backward(outputs, [torch.zeros_like(part) for part in outputs])
    finally:
        JITFunction.run, Autotuner.run = bind, tune
    return found


def resources(compiled) -> str:
    """Registers per thread, spilled bytes, expected losses and shared memory."""
    # Triton 3.5 has only one assembler, and its function takes no architecture
    takes_architecture = inspect.signature(get_ptxas).parameters
    assembler = (get_ptxas(90) if takes_architecture else get_ptxas()).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [assembler, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (
        re.search(r"Used (\d+) registers", said).group(1),
        re.search(r"(\d+) bytes spill stores", said).group(1),
    )
    shared, losses = (
        compiled.metadata.shared,
        re.findall(r"Potential Performance Loss: (.*) in the function", said),
    )
    return (
        f"{registers:>4} registers, {spilled:>5} bytes spilled, {shared:>7} bytes of shared memory"
        + (", too many to launch" if shared > SHARED else "")
        + "".join(f", LOSS: {loss}" for loss in losses)
    )


def loops(compiled) -> str:
    """The innermost loops of the machine code.

    A loop runs from the target of a backward jump to the jump, with no other such jump in between.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels, found = {}, []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(\w.*)", line):
            code.append(instruction.group(1))
            jump = re.match(r"BRA.*\((\.L_\w+)\)", code[-1])
            start = labels.get(jump.group(1), -1) if jump else -1
            if 0 <= start < len(code) - 1 and not any(start <= inner for inner, _ in found):
                found.append((start, len(code)))
    texts = []
    for start, end in found:
        counts = {"special": "MUFU", "products": "HGMMA"}
        counts = {
            name: sum(line.startswith(op) for line in code[start:end])
            for name, op in counts.items()
        }
        texts.append(
            ", ".join(
                [str(end - start), *(f"{count} {name}" for name, count in counts.items() if count)]
            )
        )
    return "loops: " + "; ".join(texts) if texts else "no loop"


@dataclass(frozen=True)
class Options:
    """Compile kernels for Hopper, without a GPU."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """operations; all by default"""


def main(options: Options) -> None:
    """Compile the kernels, and exit with 1 if the assembler expects losses."""
    if INTERPRETED:
        raise InputError(
            "TRITON_INTERPRET", 1, "unset, because interpreted kernels are not compiled"
        )
    for name in options.names:
        if name not in OPERATIONS:
            raise InputError("operation", name, ", ".join(OPERATIONS))
    names = options.names or OPERATIONS
    examples = [(name, i) for name in names for i in range(len(module_of(name).EXAMPLES))]
    lossy, seen, shown = [], set(), None
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), pretend) as pool:
        for (name, _), lines in zip(examples, pool.map(compile_example, examples), strict=True):
            if name != shown:
                print(name)
                shown = name
            for digest, kernel, line in lines:
                if digest not in seen:
                    seen.add(digest)
                    print(line, flush=True)
                    lossy += [f"{name}.{kernel}"] if "LOSS" in line else []
    if lossy:
        sys.exit(f"the assembler expects losses in {', '.join(lossy)}")


def pretend() -> None:
    """Let this process compile for a Hopper GPU that it does not have."""
    torch.set_num_threads(1)
    driver.set_active(Hopper())
    common.TIMED.update(device="cpu", dtype=torch.bfloat16)
    common.PRETENDED = 132  # an H100's


def module_of(name: str):
    """The kernel file of an operation."""
    return importlib.import_module(f"minimodels.kernels.{name}")


def compile_example(which: tuple[str, int]) -> list[tuple[str, str, str]]:
    """The hash, the kernel and the printed line of each launch of an operation on one example."""
    name, i = which
    module, lines = module_of(name), {}
    try:
        for kernel, tuned, compiled in launches(getattr(module, name), module.EXAMPLES[i]()):
            if compiled.hash not in lines:
                line = f"  {kernel:28} {resources(compiled)}, {loops(compiled)}{tuned}"
                lines[compiled.hash] = compiled.hash, kernel, line
    except Exception as error:  # the compiler's own errors cannot be sent to another process
        raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from None
    return list(lines.values())


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
