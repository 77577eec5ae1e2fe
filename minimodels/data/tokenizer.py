"""Text to tokens and back: bytes, a BPE trained on the run's own text, or the
tokenizer.json of a published model.

All have `encode(text)`, `stream(prompt, tokens)`, `vocab`, `end` (the tokens that end a text),
`fingerprint` and `save(folder)`.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from minimodels.data.byte_level import from_alphabet, save_bytes_tokenizer
from minimodels.data.chat import read_template, render, special_tokens
from minimodels.errors import InputError, meant, missing
from minimodels.files import atomic_write, read_json, write_json

END = "<|end|>"  # ends a document in the tokenizers that are trained here
ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # tokens that end a document


class Bytes:
    """The tokens of a text are its bytes, 0 to 255."""

    vocab = 256
    end: frozenset[int] = frozenset()
    fingerprint = "bytes"

    def encode(self, text: str) -> Tensor:
        """The bytes of a text, including those that a command line could not decode: (T,) int64."""
        return torch.tensor(list(text.encode("utf-8", "surrogateescape")), dtype=torch.int64)

    def stream(self, prompt: Tensor, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of the prompt, then the text of the tokens as they arrive. One
        character may be several tokens.

        If the vocabulary is larger than 256, ids from 256 on are not bytes and are left out.
        """
        text = codecs.getincrementaldecoder("utf-8")("replace")
        yield text.decode(bytes(token for token in prompt.tolist() if token < 256))
        for token in tokens:
            yield text.decode(bytes([token] if token < 256 else []))
        yield text.decode(b"", final=True)

    def chat(self, message: str) -> Tensor:
        """Raise InputError, because bytes have no chat template."""
        raise InputError("chat", "a model of bytes", "a model whose tokenizer has a chat template")

    def save(self, folder: Path) -> None:
        """Write a tokenizer.json, with which other programs read and write the same tokens."""
        save_bytes_tokenizer(folder / "tokenizer.json")
        save_settings(folder, {})


class LibraryTokenizer:
    """A tokenizer of the library `tokenizers` (extra `hub`).

    end: the tokens that end a text. content: its tokenizer.json, which other releases of the
    library may write differently.
    """

    def __init__(self, tokenizer, end: frozenset[int], content: str | None = None):
        self.tokenizer, self.end = tokenizer, end
        self.content = tokenizer.to_str() if content is None else content
        self.vocab = max(tokenizer.get_vocab().values(), default=-1) + 1
        if self.vocab < 1:
            raise InputError("tokenizer.json", "no tokens", "a tokenizer with at least one token")

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that determines the tokens of a text."""
        return hashlib.blake2b(self.content.encode(), digest_size=8).hexdigest()

    @functools.cached_property
    def separator(self) -> int | None:
        """The token to put at the end of a document; None if no token is known to end one."""
        named = [self.tokenizer.token_to_id(name) for name in ENDS]
        known = [token for token in (*sorted(self.end), *named) if token is not None]
        return next((token for token in known if 0 <= token < self.vocab), None)

    def encode(self, text: str, whole: bool = True) -> Tensor:
        """The tokens of a text: (T,) int64. If it is `whole`, they include those that the tokenizer
        adds before or after it."""
        # a command line may contain bytes that are not UTF-8
        readable = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        encoded = self.tokenizer.encode(readable, add_special_tokens=whole)
        return torch.tensor(encoded.ids, dtype=torch.int64)

    def stream(self, prompt: Tensor, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of the prompt, then the text of the tokens as they arrive. Special tokens
        are left out, and invalid bytes become the replacement character."""
        pieces = self.pieces(itertools.chain(prompt.tolist(), tokens))
        yield "".join(itertools.islice(pieces, len(prompt)))
        yield from pieces

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """One text for each token, and one for what is left at the end."""
        text = codecs.getincrementaldecoder("utf-8")("replace")
        begun, previous = False, None  # `previous`: the last token that is not bytes
        for token in tokens:
            content = self.token_bytes.get(token)
            if content is None:
                yield text.decode(b"", final=True) + self.text_of(token, begun, previous)
                begun, previous = True, token
            else:
                yield text.decode(content)
                begun = begun or bool(content)
        yield text.decode(b"", final=True)

    def text_of(self, token: int, begun: bool, previous: int | None) -> str:
        """The text of a token that is not bytes. It depends on the token before, and on whether it
        is the first, because the first may lose a space."""
        if not begun:
            return self.tokenizer.decode([token])
        before = [token if previous is None else previous]
        whole, start = self.tokenizer.decode([*before, token]), self.tokenizer.decode(before)
        return whole[len(start) :] if whole.startswith(start) else self.tokenizer.decode([token])

    @functools.cached_property
    def token_bytes(self) -> dict[int, bytes]:
        """The tokens that are the same bytes wherever they appear: token id ->
        bytes; b"" for special tokens.

        These are all tokens of a byte-level tokenizer, or the byte tokens to which other tokenizers
        fall back.
        """
        decoders = set(find_types(json.loads(self.content).get("decoder")))
        byte_level = bool(decoders) and decoders <= {"ByteLevel", "Sequence", "Fuse"}
        known = {}
        for text, token in self.tokenizer.get_vocab(with_added_tokens=False).items():
            if byte_level:
                known[token] = from_alphabet(text)
            elif "ByteFallback" in decoders and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
                known[token] = bytes.fromhex(text[3:5])
        for token, added in self.tokenizer.get_added_tokens_decoder().items():
            if added.special:
                known[token] = b""
            elif byte_level:
                known[token] = added.content.encode()
        return known

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and what it does not say: which tokens end a text."""
        with atomic_write(folder / "tokenizer.json") as path:
            path.write_text(self.content, encoding="utf-8")
        end = sorted(self.end)
        save_settings(folder, {"eos_token": self.tokenizer.id_to_token(end[0])} if end else {})
        if end:
            write_json(folder / "generation_config.json", {"eos_token_id": end})


class TokenizerFile(LibraryTokenizer):
    """A published tokenizer.json. Other files in the same folder may say which tokens end a text.

    Truncation and padding stored in the file are switched off, so that a prompt has all its tokens
    and no others.
    """

    def __init__(self, folder: Path, name: str = "tokenizer.json"):
        require_tokenizers()
        path = folder / name
        if not path.is_file():
            raise InputError("tokenizer.json", str(path), "a regular file that exists")
        try:
            content = path.read_text(encoding="utf-8")
            tokenizer = load_tokenizer(content)
        except Exception as error:  # the library raises nothing narrower
            raise InputError(
                "tokenizer.json", str(path), f"a tokenizer of the library tokenizers ({error})"
            ) from None
        named = tokenizer.token_to_id(special_tokens(folder).get("eos_token", END))
        end = read_end(folder) | frozenset([] if named is None else [named])
        super().__init__(tokenizer, end, content)
        self.folder = folder

    def chat(self, message: str) -> Tensor:
        """The tokens of a user's message as a conversation, up to where the answer begins: (T,)
        int64. Raises InputError if the tokenizer has no chat template, or an invalid one."""
        messages = [{"role": "user", "content": message}]
        text = render(read_template(self.folder), messages, special_tokens(self.folder))
        return self.encode(text, whole=False)


def save_settings(folder: Path, special: dict[str, str]) -> None:
    """Write tokenizer_config.json, which transformers' AutoTokenizer needs."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", settings | special)


def load_tokenizer(content: str):
    """The tokenizer of a tokenizer.json, without truncation and padding."""
    tokenizer = require_tokenizers().Tokenizer.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_end(folder: Path) -> frozenset[int]:
    """The ids in eos_token_id. Those in generation_config.json take precedence
    over those in config.json."""
    end = None
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            end = read_json(folder / name).get("eos_token_id", end)
    ends = end if isinstance(end, list) else [] if end is None else [end]
    if not all(type(token) is int for token in ends):
        raise InputError("config.json eos_token_id", end, "a token id, or a list of them")
    return frozenset(ends)


def require_tokenizers():
    """The library `tokenizers`. Raises InputError if it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise missing("tokenizers", "hub") from None
    return tokenizers


def find_types(decoder: object) -> Iterator[str]:
    """The types of a decoder in a tokenizer.json, and of the decoders inside it."""
    if isinstance(decoder, dict):
        yield decoder.get("type", "")
        for inner in decoder.get("decoders", ()):
            yield from find_types(inner)


def open_tokenizer(spec: str, texts: Iterable[str] | None = None) -> Bytes | LibraryTokenizer:
    """Open the tokenizer that a text describes: "bytes", "bpe(vocab=8192)", a tokenizer.json or
    the folder that contains one.

    texts: training text for a BPE. Raises InputError for any other name, or a file that is missing
    or damaged.
    """
    if spec == "bytes":
        return Bytes()
    if is_bpe(spec):
        vocab = parse_bpe(spec)
        if texts is None:
            raise InputError(
                "tokenizer", spec, "bytes or a tokenizer.json, because no text is given"
            )
        return train_bpe(texts, vocab)
    path = Path(spec)
    if path.is_dir():
        return TokenizerFile(path)
    if not path.is_file():
        word = meant(spec.partition("(")[0], ("bytes", "bpe"))
        accepted = f"{word}bytes, bpe(vocab=8192) or a file tokenizer.json"
        raise InputError("tokenizer", spec, accepted)
    return TokenizerFile(path.parent, path.name)


def train_bpe(texts: Iterable[str], vocab: int) -> LibraryTokenizer:
    """Train a byte-level BPE with at most `vocab` tokens. Token 0 ends a document. The same
    texts give the same tokens.

    Sennrich et al., arXiv:1508.07909: begin with the 256 bytes as tokens. Repeatedly merge the most
    frequent pair of neighbours within words into one token, until the vocabulary is full.
    """
    library = require_tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return LibraryTokenizer(tokenizer, frozenset([0]))


def is_bpe(spec: str) -> bool:
    """Whether a text asks for a tokenizer trained on the run's own text."""
    return spec.partition("(")[0].strip() == "bpe"


def parse_bpe(spec: str) -> int:
    """ "bpe(vocab=8192)" -> 8192."""
    found = re.fullmatch(r"\s*bpe\s*(?:\(\s*(?:vocab\s*=\s*(\d{1,9})\s*)?\)\s*)?", spec)
    vocab = int(found[1] or 8192) if found else 0
    if not 257 <= vocab <= 2**20:
        raise InputError("tokenizer", spec, "bpe(vocab=NUMBER) with a number from 257 to 1048576")
    return vocab
