"""Forked processes that form a group."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing


def in_processes(count: int, function, *arguments) -> None:
    """Call function(rank, *arguments) in forked processes that form a group. Raises what one
    raises."""
    with tempfile.TemporaryDirectory() as store:
        torch.multiprocessing.start_processes(
            join_group,
            (count, Path(store, "group"), function, arguments),
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
