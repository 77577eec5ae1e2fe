"""How good is a trained model at each position, within its training context and beyond?

    python -m benchmarks.positions runs/transformer    up to four times the trained context
    python -m benchmarks.positions runs/transformer runs/mamba --longest 8192

Each window of the held-out text is read as a whole. The loss of its tokens is averaged in bins of
positions, which grow by a constant factor. One bin begins where the training context ends. A row
has the bits per byte in one bin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from minimodels import LM, InputError
from minimodels.command import parse_options, pick_device, run_command
from minimodels.data.source import Source
from minimodels.data.tasks import is_task
from minimodels.data.text import open_data
from minimodels.errors import Count, Natural, check_types
from minimodels.files import read_json
from minimodels.measure import check_writable, write
from minimodels.training.checkpoint import load_model

from .training import precision


@dataclass(frozen=True)
class Options:
    """Measure the loss of trained models by position."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of training runs on text"""
    longest: Natural = 0
    """tokens in a window; 0: four times the context that the run was trained on"""
    per_doubling: Count = 2
    """number of bins per doubling of the position"""
    batch_size: Count = 8
    """windows read at once"""
    batches: Count = 8
    """batches of windows, spread evenly over the held-out text"""
    device: str = "auto"
    """auto, cpu or cuda"""
    out: Path = Path("runs/benchmarks/positions.jsonl")
    """file for the JSON rows"""

    def __post_init__(self):
        check_types(self)


def main(options: Options) -> None:
    """Measure, print and write each run as soon as it is done."""
    if not options.runs:
        raise InputError("runs", "", "folders of training runs")
    rows, device = [], pick_device(options.device)
    check_writable(options.out)
    for folder in options.runs:
        measured = measure(folder, options, device)
        print(f"{folder}, trained on {measured[0]['context']} tokens, bits per byte at")
        for row in measured:
            print(f"  {row['first']:>9,} to {row['last']:>9,}: {row['bits_per_byte']:.4f}")
        rows += measured
        write(options.out, rows, device)
    print(f"written to {options.out}")


def measure(folder: Path, options: Options, device: torch.device) -> list[dict]:
    """The rows of one run."""
    if not (folder / "options.json").is_file():
        raise InputError("runs", str(folder), "the folder of a training run")
    run = read_json(folder / "options.json", "runs")
    if not {"data", "context"} <= run.keys():
        raise InputError("runs", str(folder), "the folder of a training run")
    if is_task(run["data"]):
        raise InputError("runs", str(folder), f"a run on text; {run['data']} is a task")
    longest = options.longest or 4 * run["context"]
    try:
        data = open_data(run["data"], longest)
    except InputError as error:
        accepted = f"{error.accepted}; --longest sets the tokens of a window, here {longest}"
        raise InputError(error.field, error.value, accepted) from None
    model = load_model(folder).to(device)
    nats = loss_by_position(model, data, options.batch_size, options.batches)
    byte = math.log(2) * data.bytes_per_token(options.batch_size, options.batches)
    edges = bins(run["context"], longest, options.per_doubling)
    shared = {"benchmark": "positions", "run": str(folder), "layers": model.config.layers,
              "data": run["data"], "context": run["context"], "longest": longest}  # fmt: skip
    windows = options.batch_size * options.batches
    return [
        {**shared, "first": first, "last": stop - 1, "targets": windows * (stop - first),
         "bits_per_byte": nats[first:stop].mean().item() / byte}
        for first, stop in pairwise(edges)
    ]  # fmt: skip


@torch.no_grad()
def loss_by_position(model: LM, data: Source, batch_size: int, batches: int) -> Tensor:
    """The mean loss in nats at each position, (T,), in evaluation mode, on the held-out windows."""
    model.eval()
    device = model.device
    total = torch.zeros(data.context, dtype=torch.float64)
    for tokens, targets in data.validation(batch_size, batches):
        with precision(device):
            logits, _ = model(tokens.to(device))
        nats = F.cross_entropy(logits.float().mT, targets.to(device), reduction="none")  # (B, T)
        total += nats.sum(0).cpu()
    return total / (batch_size * batches)


def bins(context: int, longest: int, per_doubling: int) -> list[int]:
    """The first position of each bin, from 0 to `longest`, ascending; the last entry is `longest`
    itself. The training context is one of them, unless it is longer than `longest`."""
    down = math.ceil(per_doubling * math.log2(context))
    up = math.ceil(per_doubling * math.log2(max(1, longest / context)))
    edges = {round(context * 2 ** (i / per_doubling)) for i in range(-down, up + 1)}
    return sorted({0, longest} | {edge for edge in edges if edge < longest})


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
