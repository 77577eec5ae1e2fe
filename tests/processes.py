"""Forked processes that form a group, and runs of train.py in them."""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import train
from minimodels import command


def in_processes(count: int, function, *arguments) -> None:
    """Call function(rank, *arguments) in forked processes that form a group. An error in one is
    raised here. What they write into the folder of temporary files is deleted."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        torch.multiprocessing.start_processes(
            join_group,
            (count, Path(folder, "group"), function, arguments),
            count,
            start_method="fork",
        )


def join_group(rank: int, count: int, store: Path, function, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if count > 1:
        rendezvous = dist.FileStore(str(store), count)
        dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=count)
    function(rank, *arguments)
    if count > 1:
        dist.destroy_process_group()
    os._exit(0)


def run_train(arguments: list[str]) -> tuple[int, list[str]]:
    """Run train.py. Returns its exit status and the lines of its errors. Anything but one line
    for bad input fails."""
    said, status = io.StringIO(), 0
    sys.argv = ["train.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            command.run_command(train.main, lambda: train.parse(""))
        except SystemExit as end:
            status = end.code
    reasons = ("error: ", "out of memory: ", "; a lower lr may help; ")
    lines = [
        line for line in said.getvalue().splitlines() if any(reason in line for reason in reasons)
    ]
    assert status in (0, 130) or len(lines) == 1, said.getvalue()
    assert "Traceback" not in said.getvalue()
    return status, lines
