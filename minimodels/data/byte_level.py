"""Bytes as characters: how byte-level tokenizers write their tokens, and a
tokenizer.json of plain bytes.

Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.2. A byte
that is a printable character of Latin-1 is written as that character. The other 68 are written as
the characters from 256 on, so that no token contains a space or a control character.
"""

from __future__ import annotations

import functools
from pathlib import Path

from minimodels.files import write_json


@functools.cache
def alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write for the 256 bytes: printable Latin-1 as
    itself, the others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + index): byte for index, byte in enumerate(others)}


def from_alphabet(text: str) -> bytes:
    """The bytes that a byte-level token stands for. A token with a character
    outside the alphabet stands for its own text."""
    known = alphabet()
    if all(character in known for character in text):
        return bytes(known[character] for character in text)
    return text.encode()


def save_bytes_tokenizer(path: Path) -> None:
    """Write a tokenizer.json whose tokens 0 to 255 are the 256 bytes. It
    decodes every text exactly.

    The library `tokenizers` and transformers can read it.
    """
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(alphabet().items(), key=lambda item: item[1])),
            "merges": [],
        },
    }
    write_json(path, content)
