"""The interface of every source of training data."""

from __future__ import annotations

import hashlib

import torch


class Source:
    """A source of batches.

    A batch is a function of (seed, step, size). So two models trained with one seed see the same
    tokens in the same order, and a resumed run needs only its step to continue. Validation gives
    the same batches every time.
    """

    context: int  # tokens per row
    vocab: int  # all token ids are below it
    fingerprint: str  # identifies the data when a run is resumed

    def describe(self) -> str:
        """A description of the data, for the header of a run."""
        raise NotImplementedError

    def batch(self, seed: int, step: int, size: int, context: int | None = None) -> tuple:
        """(tokens, targets), or (tokens, targets, starts) if documents are packed:
        (size, context) int64 each.

        context: tokens per row, if different from the source's own.
        """
        raise NotImplementedError

    def validation(self, size: int, batches: int):
        """`batches` batches of `size` rows of the held-out data."""
        raise NotImplementedError

    def validation_bytes(self, size: int, batches: int) -> int:
        """The bytes of text that all targets of `validation` represent."""
        raise NotImplementedError

    def validation_targets(self, size: int, batches: int) -> int:
        """The number of targets of `validation`."""
        raise NotImplementedError

    def bytes_per_token(self, size: int, batches: int) -> float:
        """Bytes of text per target of `validation`. Nats per token, divided by it and by
        ln 2, are bits per byte."""
        return self.validation_bytes(size, batches) / self.validation_targets(size, batches)


def generator(*key: object) -> torch.Generator:
    """A random generator that is a function of the key, such as (seed, step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
