"""Optional Triton kernels, one operation a file, each with the name and signature of its reference in minimodels/.

    python -m minimodels.kernels.rmsnorm        checks an operation, times it, prints the share of the machine's limit reached

A layer told `impl="triton"` calls `require` first, so that a choice which cannot be honoured is refused with its reason and
nothing falls back silently. A kernel adds nothing atomically, so that it gives the same bits each time in one process; another
process may tune it to other blocks, which round differently. Without a GPU Triton can interpret kernels, slowly: set
TRITON_INTERPRET=1 before Python starts.
"""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version

import torch
from torch.torch_version import TorchVersion

from minimodels.errors import InputError

OPERATIONS = (
    "rmsnorm",
    "selective_scan",
    "causal_conv1d",
    "attention",
    "grouped_mlp",
    "linear_cross_entropy",
    "delta_rule",
    "linear_scan",
)
FASTER: frozenset[str] = (
    frozenset()
)  # whose kernel "auto" takes on a GPU, for it was measured to be faster: none so far
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REFUSED = ""  # why Triton's interpreter cannot be used, if so
if (
    INSTALLED
    and INTERPRETED
    and TorchVersion(version("triton")) < (3, 7)
    and TorchVersion(version("numpy")) >= (2, 4)
):
    REFUSED = f"Triton {version('triton')} interprets only with NumPy before 2.4, and {version('numpy')} is installed"


ACCEPTED = "auto, reference or torch"


def require(operation: str, device: torch.device) -> None:
    """Raise InputError unless `operation` has a kernel that runs on `device`."""
    if operation not in OPERATIONS:
        raise InputError("impl", "triton", f"{ACCEPTED}, for {operation} has no kernel")
    if not INSTALLED:
        raise InputError("impl", "triton", f"{ACCEPTED}, for the package triton is not installed")
    if device.type != "cuda" and not INTERPRETED:
        reason = f"Triton compiles only for a GPU and the device is {device.type}; TRITON_INTERPRET=1 interprets it, slowly"
        raise InputError("impl", "triton", f"{ACCEPTED}, for {reason}")
    if REFUSED:
        raise InputError("impl", "triton", f"{ACCEPTED}, for {REFUSED}")


def require_product(dtype: torch.dtype) -> None:
    """Raise InputError if Triton would multiply matrices of a `dtype` wrongly, as its interpreter does in bfloat16."""
    if INTERPRETED and dtype == torch.bfloat16:
        reason = "its interpreter multiplies matrices of bfloat16 wrongly; it is right with float32"
        raise InputError("impl", "triton", f"{ACCEPTED}, for {reason}")
