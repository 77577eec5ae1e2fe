"""Optional Triton kernels, one operation a file, each with the name and signature of its reference in minimodels/.

OPERATIONS lists the operations that have a kernel here. A layer told `impl="triton"` calls `require` first, so that a choice
which cannot be honoured is refused with its reason and nothing falls back silently.
"""

from __future__ import annotations

import importlib.util

import torch

from minimodels.config import InputError

OPERATIONS: frozenset[str] = frozenset()


def require(operation: str, device: torch.device) -> None:
    """Raise InputError unless `operation` has a kernel that runs on `device`."""
    accepted = "auto, reference or torch"
    if device.type != "cuda":
        raise InputError("impl", "triton", f"{accepted}, for Triton compiles only for a GPU and the device is {device.type}")
    if importlib.util.find_spec("triton") is None:
        raise InputError("impl", "triton", f"{accepted}, for the package triton is not installed")
    if operation not in OPERATIONS:
        raise InputError("impl", "triton", f"{accepted}, for {operation} has no kernel")
