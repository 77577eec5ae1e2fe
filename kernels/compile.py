"""Do the kernels compile for a GPU? Needs none.

    python -m minimodels.kernels.compile [OPERATION]      every kernel of an operation, or of all, for Hopper (sm_90)

Each kernel file lists in SIGNATURES what to compile. Prints registers per thread, spilled bytes, shared memory, and of each
innermost loop the instructions, and how many of them are special functions (exponentials, reciprocals) or matrix products: what
a warp must issue each time round. Where the assembler expects a loss, it is quoted: products that are "serialized" wait one for
the other, which can halve a kernel's speed, and the command fails, as it does with the compiler's message where there is one.
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
    """Compile one kernel for sm_90. `signature` has a type for each argument that is no constant: *bf16, i32, or i32:16 for a
    multiple of 16, as sizes mostly are and Triton sees when it launches."""
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # pointers are multiples of 16 bytes, as PyTorch allocates them
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or types[name].endswith(":16")
    }
    types = {name: kind.removesuffix(":16") for name, kind in types.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})


def resources(compiled) -> str:
    """What the assembler says: registers per thread, spilled bytes, expected losses; and shared memory."""
    assembler = get_ptxas(90).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [assembler, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    losses = re.findall(r"Potential Performance Loss: (.*) in the function", said)
    return (
        f"{registers.group(1) if registers else '?':>4} registers, {spilled.group(1) if spilled else '?':>5} bytes spilled, "
        f"{compiled.metadata.shared:>7} bytes of shared memory" + "".join(f", LOSS: {loss}" for loss in losses)
    )


def loops(compiled) -> str:
    """The innermost loops of the machine code: from the target of a jump back to the jump, where none lies between."""
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
        counts = {name: sum(line.startswith(op) for line in code[start:end]) for name, op in counts.items()}
        texts.append(", ".join([str(end - start), *(f"{count} {name}" for name, count in counts.items() if count)]))
    return "loops: " + "; ".join(texts) if texts else "no loop"


def main(names: list[str]) -> None:
    """Compile the kernels of the named operations, of all by default."""
    lossy = []
    for operation in names or OPERATIONS:
        module = importlib.import_module(f"minimodels.kernels.{operation}")
        for name, signature, constants, warps in module.SIGNATURES:
            kernel = getattr(module, name)
            kernel = kernel.fn if hasattr(kernel, "configs") else kernel  # without its tuner
            compiled = compile_kernel(kernel, signature, constants, warps)
            used = resources(compiled)
            print(f"{operation:22} {name:28} {used}, {loops(compiled)}", flush=True)
            if "LOSS" in used:
                lossy.append(f"{operation}.{name}")
    if lossy:
        sys.exit(f"the assembler expects losses in {', '.join(lossy)}")


if __name__ == "__main__":
    main(sys.argv[1:])
