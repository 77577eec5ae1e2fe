"""Text as bytes, read where it lies.

A corpus is any file, any folder, or `stdlib`: the source of Python's own standard library, which every reader has on disk.
Files are memory-mapped and joined by position only, so a batch costs its own bytes and nothing else. Which tokens a batch
holds is a function of (seed, step): two architectures trained with one seed see the same text in the same order, and a run
that is resumed needs no position but its step.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .config import InputError

HELD_OUT = 20  # one byte (or file) in this many is kept for validation


class Text:
    """Bytes for language modelling: training windows drawn at random, validation windows evenly spread."""

    vocab = 256

    def __init__(self, training: Span, validation: Span, context: int):
        self.spans = {"training": training, "validation": validation}
        self.context = context
        for name, span in self.spans.items():
            if len(span) < context + 1:
                raise InputError("data", f"{len(span)} bytes of {name} text", f"at least context + 1 = {context + 1} bytes")

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
        rows = torch.stack([self.spans[split][start : start + self.context + 1] for start in starts]).long()
        return rows[:, :-1], rows[:, 1:]


class Span:
    """Stretches of memory-mapped files, seen as one uint8 tensor that can be sliced and is never copied whole."""

    def __init__(self, parts: list[Tensor]):
        self.parts = [part for part in parts if len(part)]
        self.ends = list(itertools.accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, where: slice) -> Tensor:
        pieces, start = [], where.start
        first = bisect.bisect_right(self.ends, start)
        for part, end in zip(self.parts[first:], self.ends[first:], strict=True):
            begin = end - len(part)
            pieces.append(part[start - begin : where.stop - begin])
            start = end
            if start >= where.stop:
                break
        return torch.cat(pieces)


def generator(*key: object) -> torch.Generator:
    """A random generator that is a function of the key, such as (seed, step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def open_data(name: str, context: int):
    """The Text or Task that `--data` names: "stdlib", a task (with options, "mqar:pairs=8,vocab=256"), a file, a folder.

    One file is split by position, its last twentieth held out; a folder and stdlib by file, one in twenty held out by a
    hash of its relative path. Raises InputError where there is nothing to read or too little.
    """
    from .tasks import TASKS  # which builds on this file

    task, _, options = name.partition(":")
    if task in TASKS:
        return TASKS[task](context, **parse_options(options, TASKS[task]))
    try:
        return open_text(name, context)
    except (OSError, RuntimeError) as error:
        raise InputError("data", name, f"files that can be read ({str(error).splitlines()[0]})") from None


def open_text(name: str, context: int) -> Text:
    """The bytes of stdlib, a file or a folder."""
    from .tasks import TASKS

    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        files = [f for f in root.rglob("*.py") if skip.isdisjoint(f.relative_to(root).parts)]
    else:
        root = Path(name)
        files = [root] if root.is_file() else [f for f in root.rglob("*") if f.is_file()]
    if not files or not name:
        raise InputError("data", name, f"stdlib, a file, a folder with files, or a task: {', '.join(TASKS)}")
    if files == [root]:
        content = map_file(root)
        cut = len(content) - len(content) // HELD_OUT
        return Text(Span([content[:cut]]), Span([content[cut:]]), context)
    paths = sorted((f.relative_to(root).as_posix(), f) for f in files)
    held_out = [f for path, f in paths if zlib.crc32(path.encode()) % HELD_OUT == 0]
    training = [f for path, f in paths if zlib.crc32(path.encode()) % HELD_OUT]
    return Text(Span([map_file(f) for f in training]), Span([map_file(f) for f in held_out]), context)


def parse_options(text: str, task: type) -> dict[str, int]:
    """ "pairs=8,vocab=256" -> {"pairs": 8, "vocab": 256}."""
    known = [field.name for field in dataclasses.fields(task) if field.name != "context"]
    options = {}
    for option in filter(None, text.split(",")):
        key, _, value = option.partition("=")
        if key not in known or not value.isdecimal() or not int(value):
            raise InputError("data", option, f"name=number with a name of {', '.join(known)}")
        options[key] = int(value)
    return options


def map_file(path: Path) -> Tensor:
    """The bytes of a file as a uint8 tensor over a private memory map: read when touched, never loaded whole."""
    size = path.stat().st_size
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0)
