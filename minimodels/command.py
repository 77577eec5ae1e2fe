"""What every command line shares: errors told in one line, the device, the memory of the process."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from tqdm import tqdm

from minimodels.errors import InputError

Options = TypeVar("Options")


def run_command(main: Callable[[Options], None], options: Callable[[], Options]) -> None:
    """Parse the options and run: bad input ends in one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="replace"
            )  # a terminal may lack characters that a model writes
    try:
        main(options())
    except InputError as error:
        line = str(error).removesuffix(error.excerpt).replace("\n", " ").strip()
        fail(f"error: {line}\n{error.excerpt}".rstrip(), 2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).rpartition("Allocator: ")[2].partition("\n")[0] or "MemoryError"
        fail(f"out of memory: a smaller model, batch or context takes less ({reason})", 1)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC and error.filename is None:
            raise
        fail(f"error: {error}", 1)


def fail(message: str, status: int) -> NoReturn:
    """Say why, not in the line of a progress bar, and exit."""
    tqdm.write(message, file=sys.stderr)
    sys.exit(status)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what was lacking: on a CPU PyTorch has no class for it."""
    lacking = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        text in str(error) for text in lacking
    )


def pick_device(name: str) -> torch.device:
    """The device that a command names; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(
            "device", name, "auto, cpu" + ", cuda" * torch.cuda.is_available()
        ) from None
    return device


def require_compiler(device: torch.device) -> None:
    """Raise InputError where torch.compile lacks what it makes a CPU's code with."""
    from torch._inductor import config  # which takes a second to import

    names = [name for name in config.cpp.cxx if name]
    if device.type == "cpu" and not any(map(shutil.which, names)):
        raise InputError(
            "compile", True, f"False, for PyTorch finds no C++ compiler: {', '.join(names)}"
        )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device is a GPU that computes in bfloat16, not emulating it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next step, not return it to the kernel, which clears each page anew.

    A training step frees and takes the same large tensors again and again: on a CPU this can double its speed. It concerns
    Linux with glibc; elsewhere nothing changes.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    trim_threshold, mmap_max = -1, -4  # mallopt(3)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_max, 0)
