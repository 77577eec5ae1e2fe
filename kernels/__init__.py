"""Optional Triton kernels, one operation per file, with the names and signatures of minimodels.

    python -m minimodels.kernels.rmsnorm        checks and times an operation

The command prints what share of the machine's limit the kernel reaches.

A layer with `impl="triton"` calls `require` first. If the kernel cannot be used, `require` raises
an error with the reason, and nothing falls back silently. A kernel uses no atomic additions, so in
one process it gives the same bits each time. Another process may tune it to other blocks, which
round differently. Without a GPU Triton can interpret kernels, slowly: set TRITON_INTERPRET=1 before
Python starts.
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
    "norm_rotate",
)
# Operations for which "auto" takes the kernel on a GPU, because it was measured to be faster: none
# so far. Even if attention were listed, PyTorch would compute the plain causal case, see
# ops/attention.py.
FASTER: frozenset[str] = frozenset()
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REFUSED = ""  # why Triton's interpreter cannot be used, or empty if it can
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
        raise InputError("impl", "triton", f"{ACCEPTED}, because {operation} has no kernel")
    if not INSTALLED:
        raise InputError(
            "impl",
            "triton",
            f'{ACCEPTED}, because triton is not installed: pip install -e ".[gpu]"',
        )
    if device.type != "cuda" and not INTERPRETED:
        reason = (
            f"Triton compiles only for a GPU and the device is {device.type}; "
            "TRITON_INTERPRET=1 interprets kernels, slowly"
        )
        raise InputError("impl", "triton", f"{ACCEPTED}, because {reason}")
    if REFUSED:
        raise InputError("impl", "triton", f"{ACCEPTED}, because {REFUSED}")


def require_product(dtype: torch.dtype) -> None:
    """Raise InputError if Triton would multiply matrices of `dtype` wrongly.

    Its interpreter does so with bfloat16.
    """
    if INTERPRETED and dtype == torch.bfloat16:
        reason = "Triton's interpreter multiplies matrices of bfloat16 wrongly; choose float32"
        raise InputError("impl", "triton", f"{ACCEPTED}, because {reason}")
