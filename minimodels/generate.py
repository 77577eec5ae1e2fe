"""From logits to text: draw the next token, and continue texts token by token."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minimodels.context import Context
from minimodels.data.tokenizer import Bytes, LibraryTokenizer, TokenizerFile
from minimodels.decoding import FixedStep, GrowingStep, has_graphs, waits
from minimodels.errors import (
    Fraction,
    InputError,
    Natural,
    NonNegative,
    Positive,
    Share,
    check_types,
)
from minimodels.lm import LM


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: Sampling(temperature=0.5, top_k=40).

    The penalty comes first, then the temperature and the filters, in this order.

    repetition_penalty: 1 is none. temperature: 0 takes the most likely token. top_k: 0 keeps all
    tokens, and so do top_p=1 and min_p=0.
    """

    repetition_penalty: Positive = 1.0
    """divides the logits of tokens that the text already contains, or multiplies them if they are
    negative; 1: none (arXiv:1909.05858)"""
    temperature: NonNegative = 0.8
    """divides the logits; 0 takes the most likely token"""
    top_k: Natural = 0
    """keep the k most likely tokens; 0: all"""
    top_p: Fraction = 1.0
    """keep the most likely tokens that together reach this probability (arXiv:1904.09751)"""
    min_p: Share = 0.0
    """keep tokens at least this fraction as likely as the most likely one (arXiv:2407.01082)"""

    def __post_init__(self):
        check_types(self)


def complete(
    model: LM,
    text: str,
    tokens: int = 200,
    sampling: Sampling = Sampling(),
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> str:
    """Text in, text out: the text that a model writes after `text`, up to `tokens` tokens.

        complete(model, "def ", sampling=Sampling(temperature=0.5))

    The text ends before any of those in `stop`. The tokenizer is the model's own, or bytes if it
    has none. Without a seed, every call gives a different text. Raises InputError as generate does,
    and if `text` is no text.
    """
    if not isinstance(text, str):
        given = type(text).__name__
        raise InputError("text", given, "text; generate(model, prompts, count) continues token ids")
    tokenizer = tokenizer_of(model)
    prompt = tokenizer.encode(text)
    texts = stream(model, tokenizer, prompt, tokens, sampling, seed)
    next(texts)  # the prompt
    return "".join(until(texts, stop))


def tokenizer_of(model: LM) -> Bytes | LibraryTokenizer:
    """The model's own tokenizer; bytes if it has none. Raises InputError if that of a published
    model is missing or damaged."""
    if model.tokenizer is None and model.published:
        model.tokenizer = TokenizerFile(model.published.folder)
    return model.tokenizer or Bytes()


def stream(
    model: LM,
    tokenizer: Bytes | LibraryTokenizer,
    prompt: Tensor,
    tokens: int,
    sampling: Sampling,
    seed: int | None,
) -> Iterator[str]:
    """The text of the prompt, then that of each token as it is drawn, until the text ends."""
    ids = (int(token) for token in generate(model, [prompt], tokens, sampling, seed))
    return tokenizer.stream(
        prompt, itertools.takewhile(lambda token: token not in tokenizer.end, ids)
    )


def until(texts: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The texts up to where one in `stop` begins. An end that may be the beginning of one is held
    back until that is known."""
    held = ""
    for text in texts:
        held += text
        found = [held.index(each) for each in stop if each in held]
        if found:
            yield held[: min(found)]
            return
        begun = [n for each in stop for n in range(1, len(each)) if held.endswith(each[:n])]
        shown = len(held) - max(begun, default=0)
        yield held[:shown]
        held = held[shown:]
    yield held


def generate(
    model: LM,
    prompts: Sequence[Tensor | Sequence[int]],
    count: int,
    sampling: Sampling = Sampling(),
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Continue each prompt by `count` tokens, one step at a time: an iterator over (B,) int64.

    prompts: B texts of token ids, (T,) int64 or lists, of any lengths. The prompts are processed as
    one chunk, and then each token as another, so only the state is kept. Row i draws from its own
    generator, seeded with seed + i, as its prompt would alone with that seed. Without a seed, every
    call draws different tokens. On a GPU a step is a CUDA graph if the layers allow it; `waits` in
    minimodels/decoding.py gives the reason if they do not.

    Raises InputError if there is no prompt, or an empty one, or one of another shape or type; for
    an id outside the vocabulary; for a negative count; and if the model is not causal in its
    present mode.
    """
    if not model.causal:
        accepted = (
            "layers that do not route over the whole sequence"
            if not model.training
            else "model.eval() first"
        )
        raise InputError("model", "in training mode" if model.training else "not causal", accepted)
    if count < 0:
        raise InputError("tokens", count, "0 or more")
    vocab, accepted = model.vocab, "a list of prompts, each a sequence of token ids"
    try:
        given = list(prompts)
        if any(isinstance(prompt, str) for prompt in given):
            accepted += "; complete(model, text) continues a text"
            raise InputError("prompts", prompts, accepted)
        given = [torch.as_tensor(prompt) for prompt in given]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError("prompts", prompts, f"{accepted} ({error})") from None
    if not given:
        raise InputError("prompts", prompts, "at least one")
    if any(not prompt.ndim for prompt in given):
        raise InputError("prompts", f"{type(prompts).__name__} of numbers", accepted)
    for prompt in given:
        if not prompt.numel():
            raise InputError("prompt", prompt.tolist(), "at least one token")
        if prompt.dtype != torch.int64 or prompt.ndim != 1:
            found = f"{list(prompt.shape)} {prompt.dtype}"
            raise InputError("prompt", found, "int64 ids of one or more tokens, (T,)")
        if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocab:
            raise InputError("prompt", prompt.tolist(), f"token ids 0 to {vocab - 1}")
    seed = random.SystemRandom().randrange(2**62) if seed is None else seed
    return continue_prompts(model, given, count, sampling, seed)


@torch.inference_mode()
def continue_prompts(
    model: LM, prompts: list[Tensor], count: int, sampling: Sampling, seed: int
) -> Iterator[Tensor]:
    """The iterator that generate returns after it has checked its arguments."""
    device = model.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)  # (B, T)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    positions = positions.masked_fill(positions >= lengths[:, None], -1)
    if len({len(prompt) for prompt in prompts}) == 1:
        positions = None  # nothing is padding
    generators = [torch.Generator(device).manual_seed(seed + row) for row in range(len(prompts))]
    seen = None  # (B, V), the tokens of each text; only for a penalty
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(len(prompts), model.vocab, dtype=torch.bool, device=device)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt.to(device)] = True
    if not count:
        return
    rows = torch.arange(len(prompts))
    x, state = model.features(tokens, None, Context(positions, tokens=tokens))
    x = x[rows, lengths - 1]  # (B, D), the last token of each
    step = GrowingStep(model, state)
    if has_graphs(device) and not waits(model):
        step = FixedStep(model, state, len(prompts))
    del state  # the step keeps what it needs of it
    token = pick(model.logits(x), sampling, generators, seen)  # (B,)
    yield token
    for _ in range(count - 1):
        if seen is not None:
            seen[rows, token] = True
        token = pick(step(token), sampling, generators, seen)
        yield token


def pick(
    logits: Tensor,
    sampling: Sampling,
    generators: list[torch.Generator],
    seen: Tensor | None = None,
) -> Tensor:
    """Draw one token per row: (B, V) -> (B,). Raises InputError if the logits are not finite.

    seen (B, V) bool: which tokens the penalty for repetition applies to; None for none.
    """
    if not logits.isfinite().all():
        accepted = "a model whose logits are finite"
        if logits.dtype == torch.float16:
            accepted = "float32 or bfloat16, because the logits are not finite in float16"
        raise InputError("dtype", str(logits.dtype).removeprefix("torch."), accepted)
    if seen is not None:
        penalty = sampling.repetition_penalty
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, penalised, logits)
    # fp32 may round a smaller temperature to 0, by which nothing can be divided
    if sampling.temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(-1)
    # relative to the largest, so that no temperature makes all of them infinite
    relative = logits.float() - logits.amax(-1, keepdim=True)
    probabilities = keep(relative / sampling.temperature, sampling).softmax(-1)
    rows = zip(probabilities, generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


def keep(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits (B, V), with -inf for the tokens that the filters remove. The most
    likely token always stays."""
    if sampling.top_k:
        likeliest = logits.topk(min(sampling.top_k, logits.shape[-1])).indices
        logits = logits.masked_fill(
            torch.ones_like(logits, dtype=torch.bool).scatter(-1, likeliest, False), float("-inf")
        )
    if sampling.top_p < 1:
        ordered, index = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the tokens before are enough
        beyond[:, 0] = False
        logits = logits.masked_fill(
            torch.zeros_like(beyond).scatter(-1, index, beyond), float("-inf")
        )
    if sampling.min_p:
        probabilities = logits.softmax(-1)
        unlikely = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(unlikely, float("-inf"))
    return logits
