"""The two splits of a text, for training and for validation, from any kind of files."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minimodels.data.cache import SPLITS, Writer, key_of, make_once, open_span, read_about
from minimodels.data.files import (
    WHOLE,
    File,
    amount,
    count_of,
    find_files,
    fingerprint,
    inspect_file,
    is_leftover,
    relative_name,
)
from minimodels.data.formats import (
    HUB_ID,
    is_plain,
    kind_of,
    mark_length,
    read_hub,
    read_records,
    read_text,
)
from minimodels.data.span import Piece, Span
from minimodels.data.tasks import TASKS
from minimodels.errors import InputError, meant

HELD_OUT = 20  # one byte (or file, or document) in this many is kept for validation
FEW = 200  # with fewer files, a random twentieth may hold no file, or only tiny ones
ACCEPTED = (
    "stdlib, a file, a folder with files that are not hidden, a mixture NAME=WEIGHT:TEXT ..., a data set OWNER/NAME, "
    f"or a task: {', '.join(TASKS)}"
)


@dataclass(frozen=True)
class Corpus:
    """A text: its spans of bytes, a fingerprint of its content, and its line in the header."""

    spans: dict[str, Span]
    fingerprint: str
    description: str
    key: str  # names its folders in the cache: the fingerprint, and what the fingerprint may miss


def open_corpus(name: str, field: str, cache: Path) -> Corpus:
    """The text that a name means: stdlib, a file, a folder, or a data set of the Hugging Face hub.

    A single file is split by position: the last twentieth is held out. So are fewer than 200 files,
    joined in the order of their paths. More files are split by file: one in twenty is held out, by
    a hash of its relative path. The same rule applies to documents in JSON lines and Parquet, by a
    hash of their text. Plain files are read in place. Others are first converted to plain text in
    the cache. Raises InputError if there is nothing to read.
    """
    try:
        if is_hub_id(name):
            return open_hub(name, field, cache)
        files = list_files(name)
        if not files:
            word = name.partition("(")[0]
            there = "is no file in it" if Path(name).exists() else "is no such file"
            accepted = f"{meant(word, [*TASKS, 'stdlib'])}{ACCEPTED} (there {there})"
            raise InputError("data", name, accepted)
        digest, total = fingerprint(files), sum(file.size for file in files.values())
        newest = max(file.path.stat().st_mtime_ns for file in files.values())
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: the name contains a NUL
        raise InputError("data", name, f"files that can be read ({error})") from None
    summary = f"{count_of(len(files), 'file')}, {amount(total)}"
    overlooked = newest if total > WHOLE else 0  # only a sample of a large text is in its digest
    if all(is_plain(file, field) for file in files.values()):
        return Corpus(
            split_files(files, name == "stdlib"), digest, summary, f"{digest}, {overlooked}"
        )
    digest = f"{digest}, field {field!r}"
    key = f"{digest}, {overlooked}"
    folder = make_plain(name, files, key, field, cache)
    return Corpus(read_prepared(folder), digest, f"{summary}, {describe_prepared(folder)}", key)


def make_plain(name: str, files: dict[bytes, File], key: str, field: str, cache: Path) -> Path:
    """The cache folder with the documents of files that are not plain text."""

    def fill(writer: Writer) -> dict:
        with progress(sum(file.size for file in files.values()), f"reading {name}") as bar:
            for relative, file in files.items():
                write_file(writer, file.path, is_held_out(relative), field, bar)
        return hold_out(writer)

    return make_once(cache, f"text-{key_of(key)}", np.uint8, fill)


def is_hub_id(name: str) -> bool:
    """Whether a name can only be a data set of the hub: it looks like an id, and neither
    that path nor its parent folder exists."""
    return (
        bool(HUB_ID.fullmatch(name)) and not Path(name).exists() and not Path(name).parent.is_dir()
    )


def list_files(name: str) -> dict[bytes, File]:
    """The files of a text, in order of their relative names."""
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        found = [f for f in root.rglob("*.py") if skip.isdisjoint(f.relative_to(root).parts)]
    else:
        root = Path(name)
        if name and root.is_file() and not is_leftover(root.name):
            found = [root]
        else:
            found = find_files(root) if name and root.is_dir() else []
    return {
        name: inspect_file(path)
        for name, path in sorted((relative_name(f, root), f) for f in found)
    }


def split_files(files: dict[bytes, File], by_file: bool) -> dict[str, Span]:
    """The two splits of plain files, which are read in place."""
    pieces = {name: Piece(file.path, mark_length(file), file.size) for name, file in files.items()}
    if len(files) < FEW and not by_file:
        return cut(Span(list(pieces.values())))
    return {
        "training": Span([piece for name, piece in pieces.items() if not is_held_out(name)]),
        "validation": Span([piece for name, piece in pieces.items() if is_held_out(name)]),
    }


def is_held_out(content: bytes) -> bool:
    """Whether a file with this name, or a document with this content, is
    held out for validation."""
    return zlib.crc32(content) % HELD_OUT == 0


def cut(span: Span) -> dict[str, Span]:
    """A span without the last twentieth of its items, and that last twentieth."""
    place, passed = len(span) - len(span) // HELD_OUT, 0
    before, after = [], []
    for piece in span.pieces:
        middle = min(max(piece.start, piece.start + place - passed), piece.stop)
        before.append(Piece(piece.path, piece.start, middle))
        after.append(Piece(piece.path, middle, piece.stop))
        passed += piece.stop - piece.start
    ends = np.append(span.ends[span.ends < place], [place] if place else []).astype(np.int64)
    return {
        "training": Span(before, span.dtype, ends),
        "validation": Span(after, span.dtype, span.ends[span.ends > place] - place),
    }


def write_file(writer: Writer, path: Path, held_out: bool, field: str, bar: tqdm) -> None:
    """Append the documents of a file. A plain file is one document, held out or not;
    others have one per record."""
    begun = bar.n

    def advance(position: int) -> None:
        bar.update(begun + position - bar.n)

    if kind_of(path, field)[1] == "text":
        split = SPLITS[held_out]
        for chunk in read_text(path, field, advance):
            writer.write(split, np.frombuffer(chunk, np.uint8))
        writer.end_document(split)
    else:
        write_records(writer, read_records(path, field, advance))
    advance(path.stat().st_size)


def write_records(writer: Writer, records: Iterable[bytes]) -> None:
    """Append documents. One in twenty is held out by a hash of its text, so equal
    documents are on the same side."""
    for record in records:
        split = SPLITS[is_held_out(record)]
        writer.write(split, np.frombuffer(record, np.uint8))
        writer.end_document(split)


def hold_out(writer: Writer) -> dict:
    """Return an entry for about.json that says whether there were too few
    documents to split by document."""
    return {"few": sum(writer.documents.values()) < FEW}


def read_prepared(folder: Path) -> dict[str, Span]:
    """The spans of a folder made by `write_file` or `write_records`."""
    spans = {split: open_span(folder, split) for split in SPLITS}
    if not read_about(folder)["few"]:
        return spans
    training, validation = spans.values()
    joined = np.concatenate([training.ends[0:FEW], len(training) + validation.ends[0:FEW]])
    return cut(Span(training.pieces + validation.pieces, training.dtype, joined))


def describe_prepared(folder: Path) -> str:
    """Counts of a prepared folder, as text for the header of a run."""
    about = read_about(folder)
    documents = count_of(sum(about["documents"].values()), "document")
    return f"{documents} with {amount(sum(about['items'].values()))} of text"


def open_hub(name: str, field: str, cache: Path) -> Corpus:
    """The training split of a data set of the Hugging Face hub, streamed into the cache once."""

    def fill(writer: Writer) -> dict:
        with progress(None, f"reading {name} from the Hugging Face hub") as bar:
            write_records(writer, counted(read_hub(name, field), bar))
        return hold_out(writer)

    folder = make_once(cache, f"text-{key_of(name, field)}", np.uint8, fill)
    about = read_about(folder)
    size = sum(about["items"].values())
    digest = f"{name}, {size} bytes, {about['checksum']:08x}, field {field!r}"
    return Corpus(read_prepared(folder), digest, describe_prepared(folder), digest)


def counted(records: Iterable[bytes], bar: tqdm) -> Iterator[bytes]:
    """Pass records on and advance the bar by their bytes."""
    for record in records:
        yield record
        bar.update(len(record))


def progress(total: int | None, what: str) -> tqdm:
    """A progress bar over bytes on standard error, if that is a terminal. It disappears when it is
    full."""
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        leave=False,
        mininterval=0.5,
        disable=None,
    )
