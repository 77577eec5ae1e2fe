"""Sections of files, read in place.

Files are neither mapped nor loaded whole. A read costs only the bytes that it returns, whatever the
size of the file. If a file has become shorter in the meantime, the read raises an error; in a
mapped file, a signal would end the process.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from minimodels.errors import InputError

BLOCK = 2**9  # documents whose edges are in memory at once


class Piece(NamedTuple):
    """Items `start` to `stop` of a file: its bytes, or its tokens."""

    path: Path
    start: int
    stop: int


class Span:
    """Pieces of files, read as one array of items that is never copied whole.

    ends: where each document ends in the span, ascending int64, in memory or in a file; by default
        each piece is a document.
    """

    def __init__(
        self, pieces: list[Piece], dtype: type = np.uint8, ends: np.ndarray | Span | None = None
    ):
        self.pieces = [piece for piece in pieces if piece.start < piece.stop]
        self.dtype = np.dtype(dtype)
        self.stops = list(itertools.accumulate(piece.stop - piece.start for piece in self.pieces))
        self.ends = np.array(self.stops, dtype=np.int64) if ends is None else ends

    def edges(self, block: int) -> np.ndarray:
        """Where the documents of a block of BLOCK begin, and where the last of them ends: one
        number more than there are documents."""
        first = block * BLOCK
        if block == 0:
            return np.concatenate(([0], self.ends[0:BLOCK]))
        return self.ends[first - 1 : first + BLOCK]

    def all_edges(self) -> Iterator[np.ndarray]:
        """The edges of each block of documents."""
        return map(self.edges, range(-(-len(self.ends) // BLOCK)))

    def __len__(self) -> int:
        return self.stops[-1] if self.stops else 0

    def __getitem__(self, where: slice) -> np.ndarray:
        """The items from where.start to where.stop. Raises InputError if a file has
        become shorter or unreadable."""
        start, stop = where.start, min(where.stop, len(self))
        found = []
        for index in range(bisect.bisect_right(self.stops, start), len(self.pieces)):
            if start >= stop:
                break
            piece, end = self.pieces[index], min(stop, self.stops[index])
            # offset from a place in the span to that in the file
            skipped = piece.stop - self.stops[index]
            found.append(read_items(piece.path, start + skipped, end - start, self.dtype))
            start = end
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty(0, self.dtype)


def read_items(path: Path, start: int, count: int, dtype: np.dtype) -> np.ndarray:
    """`count` items of a file, from item `start` on, read-only."""
    start, count = start * dtype.itemsize, count * dtype.itemsize  # in bytes
    try:
        descriptor = open_file(path).fileno()
        content = os.pread(descriptor, count, start)
        while 0 < len(content) < count:  # one read returns at most 2 GB
            more = os.pread(descriptor, count - len(content), start + len(content))
            if not more:
                break
            content += more
    except OSError as error:
        raise InputError("data", str(path), f"a file that can be read ({error.strerror})") from None
    if len(content) < count:
        raise InputError(
            "data", str(path), f"a file that still has {start + count} bytes or more; it has shrunk"
        )
    return np.frombuffer(content, dtype)


@functools.lru_cache(256)  # a process may have only so many open files
def open_file(path: Path) -> BinaryIO:
    """A file that can be read at any place. It closes after it has left the cache and its
    last reader has finished."""
    return path.open("rb", buffering=0)
