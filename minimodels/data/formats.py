"""Reads documents from files: plain text, JSON lines and Parquet, compressed or not, and data
sets of the Hugging Face hub.

The end of a file's name gives its format: `.jsonl` or `.ndjson`, `.parquet`; anything else is plain
text. A further `.gz` or `.zst` gives its compression. `.json.gz` is read as JSON lines, because
such files usually are. A byte order mark at the beginning gives the encoding and is left out.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from minimodels.data.files import File
from minimodels.errors import InputError, missing

CHUNK = 2**20  # bytes that are in memory at once
LONGEST = 2**28  # longest line of JSON in bytes
COMPRESSIONS = {"gz": "gzip", "zst": "zstd", "zstd": "zstd"}
FORMATS = {"jsonl": "json", "ndjson": "json", "parquet": "parquet"}
MARKS = {  # UTF-32 first, because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # owner/name or owner/name:configuration

Advance = Callable[[int], None]  # is called with the number of bytes of a file that have been read


def kind_of(path: Path, field: str) -> tuple[str, str]:
    """(compression, format) of a file, from its name. Without a field,
    JSON lines are plain text."""
    *_, before, last = ("", "", *path.name.lower().split(".")[1:])
    compression = COMPRESSIONS.get(last, "")
    if compression:
        last = "jsonl" if before == "json" else before
    format = FORMATS.get(last, "text")
    return compression, "text" if format == "json" and not field else format


def is_plain(file: File, field: str) -> bool:
    """Whether the bytes of a file are its text, without any conversion."""
    return kind_of(file.path, field) == ("", "text") and encoding_of(file.start) == "utf-8"


def mark_length(file: File) -> int:
    """The length in bytes of the byte order mark of a plain file: 3 if it has one."""
    return 3 * file.start.startswith(codecs.BOM_UTF8)


def encoding_of(start: bytes) -> str:
    """The encoding given by a byte order mark; UTF-8 without one."""
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")


def read_text(path: Path, field: str, advance: Advance) -> Iterator[bytes]:
    """The UTF-8 text of one plain file, in chunks of about 1 MiB."""
    compression, _ = kind_of(path, field)
    with readable_errors(path), open_stream(path, compression) as (stream, raw):
        while chunk := stream.read(CHUNK):
            yield chunk
            advance(raw.tell())


def read_records(path: Path, field: str, advance: Advance) -> Iterator[bytes]:
    """The documents of a file of JSON lines or a Parquet file: the content of `field`
    in each record, as UTF-8."""
    compression, format = kind_of(path, field)
    with readable_errors(path):
        if format == "json":
            yield from read_json_lines(path, compression, field, advance)
        elif compression:
            raise InputError("data", str(path), "Parquet files that are not compressed as a whole")
        else:
            yield from read_parquet(path, field, advance)


def read_json_lines(path: Path, compression: str, field: str, advance: Advance) -> Iterator[bytes]:
    """One document for each line, which must be a JSON object. Empty lines are skipped."""
    with open_stream(path, compression) as (stream, raw):
        for number in itertools.count(1):
            line = stream.readline(LONGEST + 1)
            if not line:
                return
            where = f"{path}, line {number}"
            if len(line) > LONGEST:
                raise InputError("data", where, f"lines of at most {LONGEST} bytes")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError("data", where, f"one JSON object a line ({error})") from None
            if not isinstance(record, dict):
                raise InputError("data", where, "one JSON object a line")
            yield to_bytes(record, field, where)
            advance(raw.tell())


def read_parquet(path: Path, field: str, advance: Advance) -> Iterator[bytes]:
    """One document for each row."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise missing("pyarrow", "data") from None
    with ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if field not in columns:
            raise InputError("field", field, f"a column of {path}: {', '.join(columns)}")
        size, rows, done = path.stat().st_size, max(1, file.metadata.num_rows), 0
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0).to_pylist():
                yield to_bytes({field: value}, field, str(path))
            done += batch.num_rows
            advance(size * done // rows)


def read_hub(name: str, field: str) -> Iterator[bytes]:
    """The documents of the training split of a data set of the Hugging Face hub,
    streamed over the network."""
    try:
        import datasets
    except ImportError:
        accepted = (
            'a file or folder that exists; for a data set of that id, pip install -e ".[hub]"'
        )
        raise InputError("data", name, accepted) from None
    identity, _, configuration = name.partition(":")
    try:
        records = datasets.load_dataset(
            identity, configuration or None, split="train", streaming=True
        )
        for number, record in enumerate(records):
            yield to_bytes(record, field, f"{name}, record {number}")
    except InputError:
        raise
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).partition("\n")[0]
        accepted = f"a file or folder that exists, or a data set that can be read ({reason})"
        raise InputError("data", name, accepted) from None


def to_bytes(record: dict, field: str, where: str) -> bytes:
    """The text of a record, with a newline at its end; b"" if it has none."""
    if field not in record:
        names = ", ".join(map(str, record)) or "none"
        raise InputError("field", field, f"a field of {where}: {names}")
    text = record[field]
    if text is None or text == "":
        return b""
    if not isinstance(text, (str, bytes)):
        raise InputError("field", field, f"a field that is text; {where} has {type(text).__name__}")
    content = text.encode("utf-8", "replace") if isinstance(text, str) else text
    return content if content.endswith(b"\n") else content + b"\n"


@contextlib.contextmanager
def open_stream(path: Path, compression: str) -> Iterator[tuple[io.BufferedReader, io.FileIO]]:
    """The UTF-8 text of a file as a stream, without its mark, and the file itself, whose
    position shows the progress."""
    with path.open("rb", buffering=0) as raw:
        stream = io.BufferedReader(decompress(raw, compression), CHUNK)
        encoding = encoding_of(stream.peek(4))
        if encoding != "utf-8":
            text = io.TextIOWrapper(stream, encoding=encoding, newline="\n")
            stream = io.BufferedReader(IteratorStream(recode(text)), CHUNK)
        elif stream.peek(3).startswith(codecs.BOM_UTF8):
            stream.read(3)
        yield stream, raw


def decompress(raw: io.FileIO, compression: str) -> io.RawIOBase:
    """A stream of the decompressed content of another stream."""
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if compression == "zstd":
        try:
            import zstandard
        except ImportError:
            raise missing("zstandard", "data") from None
        return IteratorStream(decompress_zstd(raw, zstandard.ZstdDecompressor()))
    return raw


def decompress_zstd(raw: io.FileIO, library) -> Iterator[bytes]:
    """The content of the frames, one after the other. Raises EOFError if the
    last frame is incomplete."""
    frame = None
    while content := raw.read(2**12):  # decompressed, this may be 30,000 times as long
        while content:
            frame = frame or library.decompressobj()
            yield frame.decompress(content)
            content = b""
            if frame.eof:
                content, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the file ends within a frame")


def recode(text: io.TextIOWrapper) -> Iterator[bytes]:
    """Text in another encoding, converted to UTF-8."""
    while part := text.read(2**13):
        yield part.encode("utf-8", "replace")


class IteratorStream(io.RawIOBase):
    """A stream of the bytes that an iterator yields."""

    def __init__(self, parts: Iterator[bytes]):
        self.parts, self.rest = parts, b""

    def readable(self) -> bool:
        """Always true, as io.RawIOBase requires."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer with the next bytes. Returns their number; 0 at the end."""
        while not self.rest:
            part = next(self.parts, None)
            if part is None:
                return 0
            self.rest = part
        part, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


@contextlib.contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Turn an error in reading a file into an InputError, which is one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise damaged(path, error) from None
    except Exception as error:
        # these libraries have errors of their own
        if type(error).__module__.partition(".")[0] not in ("zstandard", "zstd", "pyarrow"):
            raise
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> InputError:
    """An InputError for a file that cannot be read."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    return InputError("data", str(path), f"an intact file of the type in its name ({reason})")
