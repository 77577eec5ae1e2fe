"""Text as bytes, read where it lies.

A corpus is any file, any folder, or `stdlib`: the source of Python's own standard library, which every reader has on disk.
Files are memory-mapped when first touched and joined by position only, so a batch costs its own bytes and nothing else. Which
tokens a batch holds is a function of (seed, step): two architectures trained with one seed see the same text in the same order,
and a run that is resumed needs no position but its step.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minimodels.errors import LARGEST, InputError
from minimodels.training.checkpoint import FILE as CHECKPOINT

HELD_OUT = 20  # one byte (or file) in this many is kept for validation
FEW = 200  # files, of which a twentieth chosen by chance may be none, or none of those that matter


class Text:
    """Bytes for language modelling: training windows drawn at random, validation windows evenly spread."""

    vocab = 256

    def __init__(self, training: Span, validation: Span, context: int, fingerprint: str = ""):
        self.spans = {"training": training, "validation": validation}
        self.context, self.fingerprint = (
            context,
            fingerprint,
        )  # by which a resumed run knows its text again
        for name, span in self.spans.items():
            if len(span) < context + 1:
                raise InputError(
                    "data",
                    f"{len(span)} bytes of {name} text",
                    f"at least context + 1 = {context + 1} bytes",
                )

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        """The tokens and next tokens of one training step, (size, context) int64 each."""
        windows = len(self.spans["training"]) - self.context
        starts = torch.randint(windows, (size,), generator=generator("training", seed, step))
        return self.read("training", starts.tolist())

    def validation(self, size: int, batches: int):
        """The same `batches` batches every time, from the start of the held-out text to its end."""
        windows = len(self.spans["validation"]) - self.context
        starts = torch.linspace(0, windows - 1, size * batches, dtype=torch.float64).long()
        for chosen in starts.split(size):
            yield self.read("validation", chosen.tolist())

    def read(self, split: str, starts: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.stack(
            [self.spans[split][start : start + self.context + 1] for start in starts]
        ).long()
        return rows[:, :-1], rows[:, 1:]


class Piece(NamedTuple):
    """Bytes `start` to `stop` of a file."""

    path: Path
    start: int
    stop: int


class Span:
    """Stretches of files, seen as one uint8 tensor that can be sliced and is never copied whole."""

    def __init__(self, pieces: list[Piece]):
        self.pieces = [piece for piece in pieces if piece.start < piece.stop]
        self.ends = list(itertools.accumulate(piece.stop - piece.start for piece in self.pieces))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, where: slice) -> Tensor:
        found, start = [], where.start
        first = bisect.bisect_right(self.ends, start)
        for piece, end in zip(self.pieces[first:], self.ends[first:], strict=True):
            skipped = piece.stop - end  # from a place in the span to that in the file
            found.append(map_file(piece.path)[start + skipped : min(where.stop, end) + skipped])
            start = end
            if start >= where.stop:
                break
        return torch.cat(found)


def generator(*key: object) -> torch.Generator:
    """A random generator that is a function of the key, such as (seed, step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def open_data(name: str, context: int):
    """The Text or Task that `--data` names: "stdlib", a task (with options, "mqar:pairs=8,vocab=256"), a file, a folder.

    One file, or a folder of fewer than 200 joined in the order of their paths, is split by position: the last twentieth is
    held out. A larger folder and stdlib are split by file: one in twenty is held out, by a hash of its relative path. Folders
    that hold a checkpoint are passed over. Raises InputError where there is nothing to read or too little.
    """
    from minimodels.data.tasks import TASKS

    task, _, options = name.partition(":")
    if task in TASKS:
        return TASKS[task](context, **parse_options(options, TASKS[task]))
    try:
        return open_text(name, context)
    except (OSError, RuntimeError) as error:
        raise InputError(
            "data", name, f"files that can be read ({str(error).splitlines()[0]})"
        ) from None


def is_task(name: str) -> bool:
    """Whether `--data` names a task, with or without options."""
    from minimodels.data.tasks import TASKS

    return re.split(r"[:(]", name, maxsplit=1)[0] in TASKS


def open_text(name: str, context: int) -> Text:
    """The bytes of stdlib, a file or a folder."""
    from minimodels.data.tasks import TASKS

    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        files = [f for f in root.rglob("*.py") if skip.isdisjoint(f.relative_to(root).parts)]
    else:
        root = Path(name)
        found = [root] if root.is_file() else walk(root) if root.is_dir() else []
        files = [f for f in found if f == root or not (f.parent / CHECKPOINT).exists()]
    if not files or not name:
        raise InputError(
            "data", name, f"stdlib, a file, a folder with files, or a task: {', '.join(TASKS)}"
        )
    whole = {os.fsencode(f.relative_to(root).as_posix()): Piece(f, 0, size_of(f)) for f in files}
    paths = sorted(whole)
    if len(files) < FEW and name != "stdlib":
        spans = cut([whole[path] for path in paths])
    else:
        held_out = [path for path in paths if zlib.crc32(path) % HELD_OUT == 0]
        training = [path for path in paths if zlib.crc32(path) % HELD_OUT]
        spans = [Span([whole[path] for path in part]) for part in (training, held_out)]
    sizes = [(path.hex(), whole[path].stop) for path in paths]
    return Text(
        *spans, context, fingerprint=f"{len(files)} files, {zlib.crc32(repr(sizes).encode()):08x}"
    )


def walk(root: Path) -> Iterator[Path]:
    """The files in a folder and the folders within. Raises OSError where one of these cannot be listed."""

    def refuse(error: OSError):
        raise error

    for folder, _, names in os.walk(root, onerror=refuse):
        yield from (path for name in names if (path := Path(folder, name)).is_file())


def size_of(path: Path) -> int:
    """Bytes of a file. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size


def cut(pieces: list[Piece]) -> list[Span]:
    """Two spans: the pieces without the last twentieth of their bytes, and that twentieth."""
    ends = list(itertools.accumulate(piece.stop for piece in pieces))
    place = ends[-1] - ends[-1] // HELD_OUT
    before = [
        min(piece.stop, max(0, place - (end - piece.stop)))
        for piece, end in zip(pieces, ends, strict=True)
    ]
    parts = list(zip(pieces, before, strict=True))
    return [
        Span([Piece(p.path, 0, stop) for p, stop in parts]),
        Span([Piece(p.path, stop, p.stop) for p, stop in parts]),
    ]


def parse_options(text: str, task: type) -> dict[str, int]:
    """ "pairs=8,vocab=256" -> {"pairs": 8, "vocab": 256}."""
    known = [field.name for field in dataclasses.fields(task) if field.name != "context"]
    options = {}
    for option in filter(None, text.split(",")):
        key, _, value = option.partition("=")
        if (
            key not in known
            or not re.fullmatch(r"\d{1,10}", value)
            or not 0 < int(value) <= LARGEST
        ):
            raise InputError("data", option, f"name=number with a name of {', '.join(known)}")
        options[key] = int(value)
    return options


@functools.lru_cache(4096)  # a process may hold only so many maps
def map_file(path: Path) -> Tensor:
    """The bytes of a file as a uint8 tensor over a private memory map: read when touched, never loaded whole."""
    return torch.from_numpy(np.memmap(path, np.uint8, "c"))
