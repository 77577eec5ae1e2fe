"""Text to tokens and back: bytes, for what is trained here, and a published model's tokenizer.json.

Both have `encode(text)`, `stream(prompt, tokens)` and `end`, the tokens that end a text.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from minimodels.errors import InputError
from minimodels.files import read_json


class Bytes:
    """A text is its bytes, token ids 0 to 255."""

    end: frozenset[int] = frozenset()

    def encode(self, text: str) -> Tensor:
        """The bytes of a text, those that a command line could not decode included: (T,) int64."""
        return torch.tensor(list(text.encode("utf-8", "surrogateescape")), dtype=torch.int64)

    def stream(self, prompt: Tensor, tokens: Iterable[int]) -> Iterator[str]:
        """The text of the prompt, then of the tokens as they come; a character may be several of them.

        A vocabulary larger than 256 has ids that are no bytes: they are left out.
        """
        text = codecs.getincrementaldecoder("utf-8")("replace")
        yield text.decode(bytes(token for token in prompt.tolist() if token < 256))
        for token in tokens:
            yield text.decode(bytes([token] if token < 256 else []))
        yield text.decode(b"", final=True)


class TokenizerFile:
    """A published model's tokenizer, by the library `tokenizers` (extra `hub`)."""

    def __init__(self, folder: Path):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise InputError(
                "tokenizers", "not installed", 'pip install "minimodels[hub]"'
            ) from None
        path = folder / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise InputError(
                "tokenizer.json", str(path), f"a tokenizer of the library tokenizers ({error})"
            ) from None
        self.end = self.read_end(folder)

    def read_end(self, folder: Path) -> frozenset[int]:
        """eos_token_id, one or several, which generation_config.json may say otherwise than config.json."""
        end = None
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                end = read_json(folder / name).get("eos_token_id", end)
        ends = end if isinstance(end, list) else [] if end is None else [end]
        if not all(type(token) is int for token in ends):
            raise InputError("config.json eos_token_id", end, "a token id, or a list of them")
        return frozenset(ends)

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, with those that the tokenizer puts before or behind it: (T,) int64."""
        readable = text.encode("utf-8", "surrogateescape").decode(
            "utf-8", "replace"
        )  # whatever a command line has given
        return torch.tensor(self.tokenizer.encode(readable).ids, dtype=torch.int64)

    def stream(self, prompt: Tensor, tokens: Iterable[int]) -> Iterator[str]:
        """The text of the prompt, then of the tokens as they come; special tokens are left out, and bytes that are no text
        become the character for that."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        for token in itertools.chain(prompt.tolist(), tokens):
            try:
                yield stream.step(self.tokenizer, token) or ""
            except Exception:  # the library raises nothing narrower; what comes is a new beginning
                stream = DecodeStream(skip_special_tokens=True)
                yield "\ufffd"
