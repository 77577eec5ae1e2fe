"""Text for language modelling: windows cut at random places.

A text is read in place, as bytes or as the tokens that a tokenizer made of it, so a batch costs
only its own bytes. Every reader has one on disk: `stdlib`, the source of Python's own standard
library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from minimodels.data.files import amount
from minimodels.data.source import Source, generator
from minimodels.data.span import Span
from minimodels.data.tokenizer import Bytes, LibraryTokenizer
from minimodels.errors import InputError

BYTES = Bytes()


class Text(Source):
    """Training windows are drawn at random, and validation windows are evenly spread.

    training, validation: the tokens. sizes: for each validation token, the number of bytes of text
    that it represents; None: one.
    """

    def __init__(
        self,
        training: Span,
        validation: Span,
        context: int,
        fingerprint: str = "",
        tokenizer: Bytes | LibraryTokenizer = BYTES,
        sizes: Span | None = None,
        description: str = "",
    ):
        self.spans = {"training": training, "validation": validation}
        self.context, self.fingerprint, self.tokenizer = context, fingerprint, tokenizer
        self.vocab, self.sizes, self.description = tokenizer.vocab, sizes, description
        self.require(context)

    def require(self, context: int) -> None:
        """Raise InputError if either split of the text is shorter than one window."""
        for name, span in self.spans.items():
            if len(span) < context + 1:
                unit = "bytes" if self.vocab == Bytes.vocab else "tokens"
                given = f"{len(span)} {unit} of {name} text"
                raise InputError("data", given, f"at least context + 1 = {context + 1} {unit}")

    def describe(self) -> str:
        """A description of the text, its amount, and how much is held out."""
        training, validation = (len(span) for span in self.spans.values())
        if self.vocab == Bytes.vocab:
            return f"{self.description}; {amount(validation)} held out"
        tokens = f"{training + validation:,} tokens of {self.vocab:,} kinds"
        return f"{self.description}; {tokens}, {validation:,} held out"

    def batch(
        self, seed: int, step: int, size: int, context: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The tokens and next tokens of one training step, (size, context) int64 each."""
        context = context or self.context
        windows = len(self.spans["training"]) - context
        if windows < 1:
            self.require(context)
        starts = torch.randint(windows, (size,), generator=generator("training", seed, step))
        return self.read("training", starts.tolist(), context)

    def validation(self, size: int, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same `batches` batches every time, from the start of the held-out text to its end."""
        for starts in self.validation_starts(size * batches).split(size):
            yield self.read("validation", starts.tolist(), self.context)

    def validation_bytes(self, size: int, batches: int) -> int:
        """The bytes of text that all targets of `validation` represent."""
        if self.sizes is None:
            return size * batches * self.context
        starts = self.validation_starts(size * batches).tolist()
        windows = (self.sizes[start + 1 : start + 1 + self.context] for start in starts)
        return sum(int(window.sum(dtype=np.int64)) for window in windows)

    def validation_targets(self, size: int, batches: int) -> int:
        """The number of targets of `validation`."""
        return size * batches * self.context

    def validation_starts(self, rows: int) -> Tensor:
        """Where the windows begin, (rows,) int64."""
        windows = len(self.spans["validation"]) - self.context
        return torch.linspace(0, windows - 1, rows, dtype=torch.float64).long()

    def read(self, split: str, starts: Sequence[int], context: int) -> tuple[Tensor, Tensor]:
        """The tokens and next tokens of windows that begin at `starts`,
        (rows, context) int64 each."""
        span = self.spans[split]
        rows = np.stack([span[start : start + context + 1] for start in starts])
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1], rows[:, 1:]
