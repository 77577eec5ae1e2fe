"""A cache of text or tokens made from other files. Each folder is either complete or absent.

CACHE/KEY/training.bin      the items of all training documents, one after the other:
                            uint8, uint16 or uint32
CACHE/KEY/training.ends     where each document ends among them: int64
CACHE/KEY/validation.bin, validation.ends
CACHE/KEY/validation.bytes  how many bytes of text each token represents: uint32; only for tokens
CACHE/KEY/about.json        the counts; written last
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from minimodels.data.files import CACHE_TAG
from minimodels.data.span import Piece, Span
from minimodels.errors import InputError
from minimodels.files import write_json

VERSION = 2  # of the format; after a change everything is made again
SPLITS = ("training", "validation")
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by minimodels; may be deleted.\n"


def default_cache() -> Path:
    """The folder for files that can be made again, as the XDG rules define it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimodels"


def key_of(*content: object) -> str:
    """A name derived from the content: the same content gives the same name."""
    return hashlib.blake2b(repr((VERSION, *content)).encode(), digest_size=12).hexdigest()


class Writer:
    """Writes the documents of both splits, item by item."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, np.dtype(dtype)
        self.counts = dict.fromkeys(SPLITS, 0)
        self.documents = dict.fromkeys(SPLITS, 0)
        self.last_end = dict.fromkeys(SPLITS, 0)
        self.checksum = 0
        self.files = {}

    def write(self, split: str, items: np.ndarray, sizes: np.ndarray | None = None) -> None:
        """Append items to the current document, with the number of bytes that each represents."""
        content = items.astype(self.dtype, copy=False).tobytes()
        self.checksum = zlib.crc32(content, self.checksum)
        self.append(split, "bin", content)
        if sizes is not None:
            self.append(split, "bytes", sizes.astype(np.uint32).tobytes())
        self.counts[split] += len(items)

    def end_document(self, split: str) -> None:
        """End a document: the next items belong to another. An empty document is not counted."""
        if self.counts[split] > self.last_end[split]:
            self.last_end[split] = self.counts[split]
            self.documents[split] += 1
            self.append(split, "ends", np.int64(self.counts[split]).tobytes())

    def append(self, split: str, kind: str, content: bytes) -> None:
        """Write at the end of a file, which is opened when it gets its first bytes."""
        name = f"{split}.{kind}"
        if name not in self.files:
            self.files[name] = (self.folder / name).open("wb", buffering=2**20)
        self.files[name].write(content)

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()


def make_once(cache: Path, key: str, dtype: type, fill: Callable[[Writer], dict | None]) -> Path:
    """The folder of a key, filled by `fill` unless it is already complete.

    Processes that want the same folder wait for the one that makes it. `fill` writes the documents
    and returns any further entries for about.json. Raises InputError if the cache cannot be
    written.
    """
    folder = cache / key
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache / CACHE_TAG).exists():
            (cache / CACHE_TAG).write_text(TAG)
        with locked(cache / f"{key}.lock"):
            if not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                fill_folder(folder, np.dtype(dtype), fill)
    except OSError as error:
        accepted = f"a folder that can be written, with room for the text ({error.strerror})"
        raise InputError("cache", str(cache), accepted) from None
    return folder


def fill_folder(folder: Path, dtype: np.dtype, fill: Callable[[Writer], dict | None]) -> None:
    """Write a folder under a temporary name and rename it at the end."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    writer = Writer(partial, dtype)
    try:
        try:
            more = fill(writer) or {}
        finally:
            writer.close()
        about = {
            "dtype": dtype.name,
            "items": writer.counts,
            "documents": writer.documents,
            "checksum": writer.checksum,
            "files": {file.name: file.stat().st_size for file in sorted(partial.iterdir())},
        }
        write_json(partial / "about.json", about | more)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_about(folder: Path) -> dict:
    """The content of about.json; {} if it is missing or damaged."""
    try:
        about = json.loads((folder / "about.json").read_text())
        return about if isinstance(about, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def is_whole(folder: Path) -> bool:
    """Whether all files of a folder exist and have the length that was written.

    Their content is not compared with the checksum, because that would read the whole text each
    time. The ends of documents are checked when they are opened.
    """
    sizes = read_about(folder).get("files")
    if not isinstance(sizes, dict):
        return False
    paths = {folder / name: size for name, size in sizes.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def open_span(folder: Path, split: str, kind: str = "bin") -> Span:
    """One split of a folder, or with kind="bytes" the number of bytes that each
    of its tokens represents."""
    dtype = np.uint32 if kind == "bytes" else np.dtype(read_about(folder)["dtype"])
    ends = Span([whole_file(folder / f"{split}.ends", np.int64)], np.int64)
    span = Span([whole_file(folder / f"{split}.{kind}", dtype)], dtype, ends)
    last = ends[len(ends) - 1 : len(ends)].sum()  # 0 without any document
    if last != len(span) or not all((np.diff(edges) > 0).all() for edges in span.all_edges()):
        raise InputError("cache", str(folder), "an intact folder; this one is damaged")
    return span


def whole_file(path: Path, dtype: type) -> Piece:
    """All items of a file; none if it does not exist."""
    size = path.stat().st_size if path.exists() else 0
    return Piece(path, 0, size // np.dtype(dtype).itemsize)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is in this block with the same path. A
    process that dies leaves no lock."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
