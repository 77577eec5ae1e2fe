"""Do the kernels compile for a GPU? Needs none.

    python -m minimodels.kernels.compile [OPERATION]      every kernel of an operation, or of all, for Hopper (sm_90)

Each kernel file lists in SIGNATURES what to compile. Prints registers per thread, spilled bytes and shared memory; a kernel
that does not compile ends the command with the compiler's message.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from . import OPERATIONS


def compile_kernel(kernel, signature: dict[str, str], constants: dict[str, object], warps: int, stages: int = 3):
    """Compile one kernel for sm_90; `signature` has a type for each argument that is no constant, such as *bf16 or i32."""
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # pointers are multiples of 16 bytes, as PyTorch allocates them
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=types, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})


def resources(compiled) -> str:
    """What the assembler says: registers per thread, spilled bytes; and shared memory."""
    assembler = get_ptxas(90).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [assembler, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    return (
        f"{registers.group(1) if registers else '?':>4} registers, {spilled.group(1) if spilled else '?':>5} bytes spilled, "
        f"{compiled.metadata.shared:>7} bytes of shared memory"
    )


def main(names: list[str]) -> None:
    """Compile the kernels of the named operations, of all by default."""
    for operation in names or OPERATIONS:
        module = importlib.import_module(f"minimodels.kernels.{operation}")
        for name, signature, constants, warps in module.SIGNATURES:
            kernel = getattr(module, name)
            kernel = kernel.fn if hasattr(kernel, "configs") else kernel  # without its tuner
            compiled = compile_kernel(kernel, signature, constants, warps)
            print(f"{operation:22} {name:28} {resources(compiled)}")


if __name__ == "__main__":
    main(sys.argv[1:])
