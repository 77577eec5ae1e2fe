"""Documents packed into rows, so that no document that fits into a row is split.

Krell et al., "Efficient Sequence Packing without Cross-contamination", arXiv:2107.02027; Ding et
al., "Fewer Truncations Improve Language Modeling", arXiv:2404.10830. Many documents are drawn at
once. The longest goes first, into the row in which it leaves the least space. `starts` gives each
layer the place where a token's document begins, so that no document sees another.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minimodels.data.source import generator
from minimodels.data.windows import Text
from minimodels.errors import InputError
from minimodels.ops.linear_cross_entropy import IGNORE

ROWS = 256  # packed together, rounded up to whole batches


class Part(NamedTuple):
    """`length` tokens of a document, from index `start` of the span on. `more`: whether
    the document continues."""

    start: int
    length: int
    more: bool


class Documents(Text):
    """Rows of whole documents. A document longer than the context is cut into parts,
    which are drawn separately.

    A batch is (tokens, targets, starts), (B, T) int64 each. starts: the column in which the token's
    document begins. The target of a document's last token is IGNORE. The end of a row that no
    document fills is a document of zeros without targets.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.counts = functools.lru_cache(16)(self.count_parts)
        self.window = functools.lru_cache(2)(self.pack_window)  # several steps share a packing
        self.validation_rows = functools.lru_cache(2)(self.pack_validation)

    def require(self, context: int) -> None:
        """Raise InputError if either split of the text has no document with a token to predict."""
        for name, span in self.spans.items():
            if all((np.diff(edges) < 2).all() for edges in span.all_edges()):
                given = f"{len(span.ends)} documents of {name} text, none with two tokens"
                raise InputError("data", given, "documents of 2 tokens or more")

    def describe(self) -> str:
        """The text, the number of its tokens and documents, and how much is held out."""
        documents = sum(len(span.ends) for span in self.spans.values())
        return f"{super().describe()}; {documents:,} documents, packed"

    def batch(
        self, seed: int, step: int, size: int, context: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of one training step."""
        steps = -(-ROWS // size)  # steps that share a packing
        rows = self.window(seed, step // steps, steps, size, context or self.context)
        first = step % steps * size
        return self.fill("training", rows[first : first + size], context or self.context)

    def pack_window(
        self, seed: int, window: int, steps: int, size: int, context: int
    ) -> list[list[Part]]:
        """The rows of `steps` steps: parts drawn at random with equal chances.

        More parts are drawn than needed, and all are packed, but only as many rows are kept as
        needed. Leaving out parts that do not fit would leave out the short ones, which are packed
        last. If the size or the context changes during a run, new parts are drawn.
        """
        random = generator("documents", seed, window, size, context)
        parts, tokens, rows = [], 0, steps * size
        count = int(self.counts("training", context)[-1])
        while tokens < rows * context:
            for index in torch.randint(count, (rows,), generator=random).tolist():
                parts.append(self.part("training", index, context))
                tokens += parts[-1].length
        packed = pack(parts, context)
        order = torch.randperm(len(packed), generator=random).tolist()
        return [packed[index] for index in order[:rows]]

    def validation(self, size: int, batches: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same `batches` batches every time, of parts spread evenly over the held-out text."""
        rows = self.validation_rows(size * batches)
        for first in range(0, len(rows), size):
            yield self.fill("validation", rows[first : first + size], self.context)

    def validation_bytes(self, size: int, batches: int) -> int:
        """The bytes of text that all targets of `validation` represent."""
        parts = [part for row in self.validation_rows(size * batches) for part in row]
        if self.sizes is None:
            return sum(part.length - (not part.more) for part in parts)
        targets = (
            self.sizes[part.start + 1 : part.start + part.length + part.more] for part in parts
        )
        return sum(int(sizes.sum(dtype=np.int64)) for sizes in targets)

    def validation_targets(self, size: int, batches: int) -> int:
        """The number of targets of `validation`."""
        rows = self.validation_rows(size * batches)
        return sum(part.length - (not part.more) for row in rows for part in row)

    def pack_validation(self, rows: int) -> list[list[Part]]:
        """Packed parts of held-out documents. If all of them do not fill the rows, they
        are used several times."""
        count = int(self.counts("validation", self.context)[-1])
        mean = len(self.spans["validation"]) / count
        wanted = max(rows, int(rows * self.context / mean))
        while True:
            spread = np.linspace(0, count - 1, wanted).astype(np.int64).tolist()
            parts = [self.part("validation", index, self.context) for index in spread]
            packed = pack(parts, self.context)
            if len(packed) >= rows:
                order = torch.randperm(len(packed), generator=generator("validation", rows))
                return [packed[index] for index in order[:rows].tolist()]
            wanted += wanted // 4 + 1

    def count_parts(self, split: str, context: int) -> np.ndarray:
        """The cumulative number of parts, from 0 on, block by block of documents."""
        blocks = self.spans[split].all_edges()
        return np.cumsum([0, *((-(-np.diff(edges) // context)).sum() for edges in blocks)])

    def part(self, split: str, index: int, context: int) -> Part:
        """The part with this index, in the order of the text."""
        block = int(np.searchsorted(self.counts(split, context), index, side="right")) - 1
        edges = self.spans[split].edges(block)
        counts = np.cumsum(-(-np.diff(edges, prepend=edges[0]) // context))  # before each document
        place = index - int(self.counts(split, context)[block])
        document = int(np.searchsorted(counts, place, side="right")) - 1
        end = int(edges[document + 1])
        start = int(edges[document]) + (place - int(counts[document])) * context
        length = min(context, end - start)
        return Part(start, length, start + length < end)

    def fill(
        self, split: str, rows: list[list[Part]], context: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens, targets and starts of rows of parts."""
        tokens = np.zeros((len(rows), context), np.int64)
        targets = np.full((len(rows), context), IGNORE, np.int64)
        starts = np.zeros((len(rows), context), np.int64)
        for row, parts in enumerate(rows):
            column = 0
            for part in parts:
                end = column + part.length
                text = self.spans[split][part.start : part.start + part.length + part.more]
                tokens[row, column:end] = text[: part.length]
                targets[row, column : column + len(text) - 1] = text[1:]
                starts[row, column:end] = column
                column = end
            starts[row, column:] = column
        return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(starts)


def pack(parts: list[Part], context: int) -> list[list[Part]]:
    """Rows of at most `context` tokens. The longest parts go first, each into the row where it
    leaves the least space."""
    rows: list[list[Part]] = []
    spaces: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for part in sorted(parts, key=lambda part: -part.length):
        place = bisect.bisect_left(spaces, (part.length, 0))
        if place < len(spaces):
            space, row = spaces.pop(place)
        else:
            space, row = context, len(rows)
            rows.append([])
        rows[row].append(part)
        if space > part.length:
            bisect.insort(spaces, (space - part.length, row))
    return rows
