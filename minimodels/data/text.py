"""The data that `--data` names: a task, a text, or several texts in a mixture."""

from __future__ import annotations

import itertools
from pathlib import Path

from minimodels.data.cache import Writer, default_cache, key_of, make_once
from minimodels.data.corpus import Corpus, open_corpus
from minimodels.data.documents import Documents
from minimodels.data.mixture import Mixture, parse_mixture
from minimodels.data.span import open_file
from minimodels.data.tasks import is_task, open_task
from minimodels.data.tokenizer import (
    Bytes,
    LibraryTokenizer,
    TokenizerFile,
    is_bpe,
    open_tokenizer,
    parse_bpe,
    train_bpe,
)
from minimodels.data.tokens import SAMPLE, sample_text, tokenize
from minimodels.data.windows import Text
from minimodels.errors import InputError

__all__ = ["Text", "open_data"]


def open_data(
    name: str,
    context: int,
    tokenizer: str = "bytes",
    field: str = "text",
    cache: str | Path | None = None,
    packed: bool = False,
):
    """Open the Text, Documents, Mixture or Task that a name describes.

    name: "stdlib", a file, a folder, a data set of the Hugging Face hub (OWNER/NAME), several of
        these with weights ("code=0.7:DIR prose=0.3:FILE"), or a task, with or without options
        ("mqar(pairs=8, vocab=256)").
    tokenizer: "bytes", a tokenizer.json, or "bpe(vocab=8192)", which is trained on the training
        split of the text.
    field: the field to read from JSON lines and Parquet.
    cache: the folder for converted text and tokens, by default ~/.cache/minimodels.
    packed: rows of whole documents instead of windows cut at random.

    Raises InputError if there is nothing to read, or too little.
    """
    task = open_task(name, context)
    if task is not None:
        if tokenizer != "bytes" or packed:
            given = f"{tokenizer}, packed" if packed else tokenizer
            raise InputError("tokenizer", given, f"bytes, not packed, because {name} is a task")
        return task
    cache = Path(cache) if cache else default_cache()
    open_file.cache_clear()  # files may have been replaced since other data were opened
    mixture = parse_mixture(name)
    if mixture is None:
        corpus = open_named(name, field, cache)
        return open_text(
            corpus, context, pick_tokenizer(tokenizer, [corpus], [1.0], cache), cache, packed
        )
    weights = {part: weight for part, (weight, _) in mixture.items()}
    corpora = {part: open_named(text, field, cache) for part, (_, text) in mixture.items()}
    picked = pick_tokenizer(tokenizer, list(corpora.values()), list(weights.values()), cache)
    parts = {
        part: open_text(corpus, context, picked, cache, packed) for part, corpus in corpora.items()
    }
    return Mixture(parts, weights)


def open_named(name: str, field: str, cache: Path) -> Corpus:
    """Open the text with this name. Raises InputError if it names a task, or
    if there is no such text."""
    if is_task(name):
        raise InputError("data", name, "texts in a mixture, not tasks")
    return open_corpus(name, field, cache)


def open_text(
    corpus: Corpus,
    context: int,
    tokenizer: Bytes | LibraryTokenizer,
    cache: Path,
    packed: bool,
) -> Text:
    """A corpus as training data."""
    spans, sizes = corpus.spans, None
    fingerprint, description = corpus.fingerprint, corpus.description
    if isinstance(tokenizer, LibraryTokenizer):
        spans, sizes, invalid = tokenize(corpus, tokenizer, cache)
        fingerprint = f"{fingerprint}, tokenizer {tokenizer.fingerprint}"
        if invalid:
            description = f"{description}, {100 * invalid:.2g}% of it not UTF-8"
    kind = Documents if packed else Text
    return kind(
        spans["training"],
        spans["validation"],
        context,
        fingerprint,
        tokenizer,
        sizes,
        description,
    )


def pick_tokenizer(
    spec: str, corpora: list[Corpus], weights: list[float], cache: Path
) -> Bytes | LibraryTokenizer:
    """The tokenizer of a text. A BPE is trained on the training splits, in proportion to their
    weights, and stored in the cache."""
    if not is_bpe(spec):
        return open_tokenizer(spec)
    vocab, total = parse_bpe(spec), sum(weights)

    def fill(writer: Writer) -> None:
        samples = [
            sample_text(corpus.spans["training"], int(SAMPLE * weight / total))
            for corpus, weight in zip(corpora, weights, strict=True)
        ]
        train_bpe(itertools.chain(*samples), vocab).save(writer.folder)

    key = key_of(vocab, [corpus.key for corpus in corpora], weights)
    return TokenizerFile(make_once(cache, f"bpe-{key}", "uint8", fill))
