"""Text as tokens on disk. They are made once for a text and a tokenizer, in bounded
memory, and read in place.

The text is split into training and held-out text before it is tokenized, so every tokenizer is
judged on the same text. Nats per byte of text are comparable between models with different tokens.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minimodels.data.cache import SPLITS, Writer, key_of, make_once, open_span, read_about
from minimodels.data.corpus import Corpus, progress
from minimodels.data.span import Span
from minimodels.data.tokenizer import LibraryTokenizer, load_tokenizer
from minimodels.errors import InputError

PIECE = 2**14  # bytes that are tokenized together; a longer document is cut at the ends of lines
BATCH = 64  # pieces that are tokenized at once, by several threads
SAMPLE = 2**26  # most bytes of text that a tokenizer is trained on; its memory grows with them
BLOCK = 2**20  # bytes of a sample that are read at one place


def sample_text(span: Span, most: int = SAMPLE) -> Iterator[str]:
    """The text of a span of bytes, or evenly spread blocks of it that add up to `most` bytes."""
    stride = BLOCK * max(1, -(-len(span) // max(most, 1)))
    with progress(len(span), "reading for the tokenizer") as bar:
        for start in range(0, len(span), stride):
            yield span[start : start + BLOCK].tobytes().decode("utf-8", "replace")
            bar.update(min(stride, len(span) - start))


class Tokens(NamedTuple):
    """The tokens of both splits of a corpus, the number of bytes that each held-out token
    represents, and the share of all bytes that are not UTF-8."""

    spans: dict[str, Span]
    sizes: Span
    invalid: float


def tokenize(corpus: Corpus, tokenizer: LibraryTokenizer, cache: Path) -> Tokens:
    """The tokens of a corpus. A document ends with the tokenizer's separator, if it has one, which
    represents no byte."""

    def fill(writer: Writer) -> dict:
        with progress(total, "tokenizing") as bar:
            for split in SPLITS:
                pieces = cut_documents(corpus.spans[split])
                while batch := list(itertools.islice(pieces, BATCH)):
                    write_pieces(writer, split, batch, encoder, tokenizer.separator)
                    bar.update(sum(len(raw) for raw, _ in batch))
        return {"invalid": encoder.invalid}

    encoder = Encoder(tokenizer)
    total = sum(len(span) for span in corpus.spans.values())
    dtype = np.uint16 if tokenizer.vocab <= 2**16 else np.uint32
    key = key_of(corpus.key, tokenizer.fingerprint, tokenizer.separator)
    folder = make_once(cache, f"tokens-{key}", dtype, fill)
    spans = {split: open_span(folder, split) for split in SPLITS}
    invalid = read_about(folder)["invalid"] / max(total, 1)
    return Tokens(spans, open_span(folder, "validation", "bytes"), invalid)


def write_pieces(
    writer: Writer,
    split: str,
    pieces: list[tuple[bytes, bool]],
    encoder: Encoder,
    separator: int | None,
) -> None:
    """Append the tokens of pieces of documents and, if they are held out,
    the number of bytes of each token."""
    texts = [raw for raw, _ in pieces]
    found = encoder.with_sizes(texts) if split == "validation" else encoder.tokens(texts)
    for (tokens, sizes), (_, ends) in zip(found, pieces, strict=True):
        if ends and separator is not None:
            tokens = np.append(tokens, separator)
            sizes = None if sizes is None else np.append(sizes, 0)
        writer.write(split, tokens, sizes)
        if ends:
            writer.end_document(split)


def cut_documents(span: Span, most: int = PIECE) -> Iterator[tuple[bytes, bool]]:
    """The documents of a span of bytes, in pieces of `most` bytes or less: (bytes, whether
    its document ends here)."""
    for edges in span.all_edges():
        for start, end in itertools.pairwise(edges.tolist()):
            while start < end:
                raw = span[start : min(start + most, end)].tobytes()
                if start + len(raw) < end:
                    raw = raw[: place_to_cut(raw)]
                start += len(raw)
                yield raw, start == end


def place_to_cut(raw: bytes) -> int:
    """Where to cut text that continues: after its last line, before its last space, or else
    between two characters."""
    place = raw.rfind(b"\n") + 1 or raw.rfind(b" ")
    if place > 0:
        return place
    for place in range(len(raw), max(len(raw) - 4, 0), -1):
        if raw[place - 1] < 0x80:
            return place
        if raw[place - 1] >= 0xC0:  # the first byte of a character, which may be incomplete
            return place - 1 or len(raw)
    return len(raw)


class Encoder:
    """Turns bytes into tokens. Text that looks like a special token stays text. A byte that is
    not UTF-8 becomes U+FFFD; `invalid` counts these bytes."""

    def __init__(self, tokenizer: LibraryTokenizer):
        self.library = load_tokenizer(tokenizer.content)
        self.library.encode_special_tokens = True
        known = tokenizer.token_bytes
        self.sizes = np.array([len(known.get(token, b"")) for token in range(tokenizer.vocab)])
        self.vocab, self.invalid = tokenizer.vocab, 0

    def tokens(self, pieces: list[bytes]) -> Iterable[tuple[np.ndarray, None]]:
        """The tokens of each piece."""
        for tokens in self.ids(self.texts(pieces)):
            yield tokens, None

    def with_sizes(self, pieces: list[bytes]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """The tokens of each piece, and how many of its bytes each token represents.
        Together they cover all bytes."""
        texts = self.texts(pieces)
        for tokens, text, raw in zip(self.ids(texts), texts, pieces, strict=True):
            sizes = self.sizes[tokens]
            if sizes.sum() != len(raw):  # the tokenizer is not byte-level or changes the text
                sizes = self.sizes_by_offsets(text, raw)
            yield tokens, sizes

    def texts(self, pieces: list[bytes]) -> list[str]:
        """The text of each piece."""
        decoded = [decode(raw) for raw in pieces]
        self.invalid += sum(invalid for _, invalid in decoded)
        return [text for text, _ in decoded]

    def ids(self, texts: list[str]) -> Iterable[np.ndarray]:
        """The token ids of each text, int64. Raises InputError if the
        tokenizer cannot encode one."""
        try:
            found = self.library.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            accepted = f"a tokenizer that can encode any text ({error})"
            raise InputError("tokenizer", "tokenizer.json", accepted) from None
        for encoding in found:
            yield np.array(encoding.ids, dtype=np.int64)

    def sizes_by_offsets(self, text: str, raw: bytes) -> np.ndarray:
        """The number of bytes of each token, from the end of the token before it to its own end.
        The last token takes all that are left."""
        encoding = self.library.encode(text, add_special_tokens=False)
        if not encoding.ids:
            return np.empty(0, np.int64)
        ends = np.maximum.accumulate([end for _, end in encoding.offsets])
        places = np.concatenate(([0], np.cumsum(widths(raw))))[ends]
        places[-1] = len(raw)
        return np.diff(places, prepend=0)


INVALID = re.compile("[\udc80-\udcff]")


def decode(raw: bytes) -> tuple[str, int]:
    """UTF-8 text in which each invalid byte became U+FFFD, and the number of these bytes."""
    try:
        return raw.decode(), 0
    except UnicodeDecodeError:
        return INVALID.subn("\ufffd", raw.decode("utf-8", "surrogateescape"))


def widths(raw: bytes) -> np.ndarray:
    """How many bytes of raw each character of its decoded text comes from."""
    text = raw.decode("utf-8", "surrogateescape")
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    invalid = (code >= 0xDC80) & (code <= 0xDCFF)
    return np.where(invalid, 1, 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000))
