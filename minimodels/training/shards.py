"""Folders of tensors that are either complete or absent, written by any number of processes and
read by any other number.

    RUN/checkpoints/step-100/shard-*.safetensors   each process writes the tensors that it has
    RUN/checkpoints/step-100/progress.json         everything else, and the CRC-32 of each file

A folder is written as step-100.partial and renamed when it is completely on the disk. PyTorch's
distributed checkpoints split and join the tensors. No pickle is written or read.

`write`, `find` and `read` are collective: every process of a group calls them. They succeed in all
processes, or raise InputError in all.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from minimodels.data.files import runs_near
from minimodels.errors import InputError
from minimodels.files import read_json, sync, write_synced
from minimodels.ranks import rank, world

FOLDER = "checkpoints"
PROGRESS = "progress.json"
REPLACED = ".replaced"  # suffix of a complete checkpoint that another of the same step replaces
NAME = re.compile(rf"step-(\d+)({REPLACED})?")
OLD_FILE = "checkpoint.safetensors"  # of earlier versions


class Found(NamedTuple):
    """The newest complete folder, and the damaged ones that are newer."""

    folder: Path
    about: dict[str, Any]
    passed_over: list[str]  # "step-100: why"


def write(run: Path, step: int, tensors: dict[str, Tensor], about: dict, keep: int) -> None:
    """Write tensors, and the JSON object `about`, as the checkpoint of a step.

    Then delete the older checkpoints, except the last `keep` (including this one) and the best,
    which has the lowest `about["score"]`.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save  # a second to import

    target = run / FOLDER / f"step-{step}"
    partial = target.with_name(target.name + ".partial")
    with together("out", run, "a folder with room for a checkpoint"):
        if number() == 0:
            partial.parent.mkdir(exist_ok=True)
            for left in partial.parent.glob("*.partial"):  # by a process that was killed
                shutil.rmtree(left)
            partial.mkdir()
    try:
        with together("out", run, "a folder with room for a checkpoint"), one_process_is_fine():
            save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
            )
        mine: dict[str, int] = {}
        with together("out", run, "a folder that can be read"):
            for file in partial.glob(f"shard-{number() + 1:05}-*"):
                mine[file.name] = checksum(file)
        files = {name: value for each in gather(mine) for name, value in each.items()}
        with together("out", run, "a folder with room for a checkpoint"):
            if number() == 0:
                publish(partial, target, {**about, "files": files})
                delete_older(target.parent, step, keep)
    except InputError:
        if number() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def publish(partial: Path, target: Path, content: dict) -> None:
    """Write the last file of a folder, and rename the folder. If another has that name already, one
    of the two is complete at every moment."""
    text = json.dumps(content)
    write_synced(partial / PROGRESS, json.dumps({**content, "checksum": zlib.crc32(text.encode())}))
    sync(partial)
    if target.exists():
        replaced = target.with_name(target.name + REPLACED)
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)
    sync(target.parent)
    for replaced in target.parent.glob(f"*{REPLACED}"):
        if replaced.with_suffix("").exists():
            shutil.rmtree(replaced)


def delete_older(parent: Path, step: int, keep: int) -> None:
    """Delete the checkpoints up to a step, except the last `keep` and the one with the
    lowest score."""
    older = [folder for number, folder in folders(parent) if number <= step]  # newest first
    scores = {}
    for folder in older:
        with contextlib.suppress(InputError):
            scores[folder] = read_json(folder / PROGRESS).get("score")
    scores = {folder: score for folder, score in scores.items() if isinstance(score, (int, float))}
    best = min(scores, key=scores.__getitem__, default=None)
    for folder in older[keep:]:
        if folder != best:
            gone = folder.rename(folder.with_name(folder.name + ".partial"))
            shutil.rmtree(gone)


def folders(parent: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder with their steps, newest first."""
    paths = parent.iterdir() if parent.is_dir() else ()
    named = [(match, path) for path in paths if (match := NAME.fullmatch(path.name))]
    named.sort(key=lambda each: (int(each[0][1]), each[0][2] is None), reverse=True)
    return [(int(match[1]), path) for match, path in named]


def exists(run: Path) -> bool:
    """Whether a run has saved a checkpoint."""
    return bool(folders(run / FOLDER))


def find(run: Path) -> Found:
    """The newest complete checkpoint of a run. `run` can also be the folder of one checkpoint.

    Raises InputError if there is none.
    """
    candidates = [run] if (run / PROGRESS).exists() else [path for _, path in folders(run / FOLDER)]
    passed_over: list[str] = []
    for folder in gather(candidates)[0]:
        about, damage = inspect(folder)
        damage = next(filter(None, gather(damage)), "")
        if not damage:
            return Found(folder, about, passed_over)
        passed_over.append(f"{folder.name}: {damage}")
    old = f"{OLD_FILE} is of an earlier version" if (run / OLD_FILE).exists() else "it has none"
    reason = "; ".join(passed_over) or old
    accepted = f"{runs_near(run)}a run with a whole checkpoint, {FOLDER}/step-N ({reason})"
    raise InputError("checkpoint", str(run), accepted)


def inspect(folder: Path) -> tuple[dict, str]:
    """The content of progress.json, and what is wrong with the folder, if anything. Each process
    reads its share of the files."""
    try:
        about = read_json(folder / PROGRESS)
        known = about.pop("checksum", None)
        if known != zlib.crc32(json.dumps(about).encode()):
            return {}, f"the checksum of {PROGRESS} is not that of its contents"
        files = about.pop("files")
        if {path.name for path in folder.glob("*.safetensors")} != files.keys():
            return {}, f"its files are not {', '.join(sorted(files))}"
        for name in sorted(files)[number() :: world()]:
            if not (folder / name).is_file():
                return {}, f"{name} is not a regular file"
            if checksum(folder / name) != files[name]:
                return {}, f"the checksum of {name} is not that of its contents"
    except (InputError, OSError, AttributeError, KeyError, TypeError) as error:
        return {}, str(error)
    return about, ""


def described(folder: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    """The shape and type of each tensor in a complete folder."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    tensors = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (list(each.size), each.properties.dtype) for name, each in tensors.items()}


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read these tensors from a complete folder, in place."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    with together("checkpoint", folder, "a folder that can be read"), one_process_is_fine():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def number() -> int:
    """This process's number among those that write together; 0 if it is the only one."""
    return rank() if world() > 1 else 0


def gather(value: Any) -> list:
    """The values of all processes, in the order of their ranks."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def together(field: str, path: Path, accepted: str) -> Iterator[None]:
    """A block that ends in all processes at once. If it fails in one, all raise InputError."""
    from torch.distributed.checkpoint import CheckpointException

    failure = ""
    try:
        yield
    except (OSError, SafetensorError) as error:
        failure = str(error)
    except CheckpointException as error:  # not a subclass of Exception
        failure = str(next(iter(error.failures.values()))[0])
    failures = list(filter(None, gather(failure)))
    if failures:
        raise InputError(field, str(path), f"{accepted} ({failures[0]})")


@contextlib.contextmanager
def one_process_is_fine() -> Iterator[None]:
    """A block in which PyTorch does not warn that there is no group of processes, or about its own
    use of deprecated storage."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is disabled|TypedStorage is deprecated"
        )
        yield
