"""From logits to text.

To continue a prompt with a trained or a published model, printing each token as it comes:

    python -m minimodels.sample runs/transformer --prompt "def " --temperature 0.8 --min-p 0.05
    python -m minimodels.sample FOLDER_OR_HUB_ID --prompt "Once upon a time"
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from minimodels.command import pick_device, run_command
from minimodels.data.tokenizer import Bytes, TokenizerFile
from minimodels.errors import InputError, check_types
from minimodels.lm import LM
from minimodels.published.pretrained import from_pretrained
from minimodels.training.checkpoint import load_model


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in this order."""

    temperature: float = 0.8
    """divides the logits; 0 takes the likeliest token"""
    top_k: int = 0
    """keep the k likeliest tokens; 0: all"""
    top_p: float = 1.0
    """keep the likeliest tokens that together reach this probability (arXiv:1904.09751)"""
    min_p: float = 0.0
    """keep tokens at least this fraction as likely as the likeliest (arXiv:2407.01082)"""

    def __post_init__(self):
        check_types(self)
        if not self.temperature >= 0:
            raise InputError("temperature", self.temperature, "0 or more")
        if self.top_k < 0:
            raise InputError("top_k", self.top_k, "0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError("top_p", self.top_p, "a fraction in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise InputError("min_p", self.min_p, "a fraction in [0, 1]")


def generate(
    model: LM,
    prompts: Sequence[Tensor | Sequence[int]],
    count: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> Iterator[Tensor]:
    """Continue each prompt by `count` tokens, one step at a time: an iterator over (B,) int64.

    prompts: B texts of token ids, (T,) int64 or lists, of any lengths. They are one chunk, each later token another: the state
    is all that is kept. Each row draws from its own generator, of the same seed, so that a prompt is continued in a batch as it
    would be alone. Raises InputError for no prompt or an empty one, one of another shape or type, an id outside the vocabulary,
    a negative count, or a model that is not causal in its present mode.
    """
    if not model.causal:
        raise InputError(
            "model",
            "not causal",
            "layers that do not route over the whole sequence, in eval() mode",
        )
    if count < 0:
        raise InputError("tokens", count, "0 or more")
    vocab = model.embedding.num_embeddings
    try:
        prompts = [torch.as_tensor(prompt) for prompt in prompts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError("prompts", prompts, f"a list of texts of token ids ({error})") from None
    if not prompts:
        raise InputError("prompts", prompts, "at least one")
    for prompt in prompts:
        if prompt.dtype != torch.int64 or prompt.ndim != 1 or not len(prompt):
            raise InputError(
                "prompt",
                f"{list(prompt.shape)} {prompt.dtype}",
                "int64 ids of one or more tokens, (T,)",
            )
        if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocab:
            raise InputError("prompt", prompt.tolist(), f"token ids 0 to {vocab - 1}")
    return continue_prompts(model, prompts, count, sampling, seed)


@torch.inference_mode()
def continue_prompts(
    model: LM, prompts: list[Tensor], count: int, sampling: Sampling, seed: int
) -> Iterator[Tensor]:
    """The iterator that generate returns once it has checked its arguments."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)  # (B, T)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    positions = positions.masked_fill(positions >= lengths[:, None], -1)
    if len({len(prompt) for prompt in prompts}) == 1:
        positions = None  # nothing is padding, and no layer needs to be told
    generators = [torch.Generator(device).manual_seed(seed) for _ in prompts]
    state, last, rows = (
        None,
        lengths - 1,
        torch.arange(len(prompts)),
    )  # `last`: where in the chunk each row's text ends
    for _ in range(count):
        x, state = model.features(tokens, state, positions)
        token = pick(model.logits(x[rows, last]), sampling, generators)  # (B,)
        yield token
        tokens, positions, last = token[:, None], None, torch.zeros_like(last)


def pick(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """Draw one token per row: (B, V) -> (B,)."""
    if (
        sampling.temperature < torch.finfo(torch.float32).tiny
    ):  # 0, or so small that fp32 divides by it as by 0
        return logits.argmax(-1)
    relative = logits.float() - logits.amax(
        -1, keepdim=True
    )  # so that no temperature makes infinities of all
    probabilities = keep(relative / sampling.temperature, sampling).softmax(-1)
    rows = zip(probabilities, generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


def keep(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits (B, V) with those that the filters remove at -inf; the likeliest always stays."""
    if sampling.top_k:
        likeliest = logits.topk(min(sampling.top_k, logits.shape[-1])).indices
        logits = logits.masked_fill(
            torch.ones_like(logits, dtype=torch.bool).scatter(-1, likeliest, False), float("-inf")
        )
    if sampling.top_p < 1:
        ordered, index = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # what stands before it suffices
        beyond[:, 0] = False
        logits = logits.masked_fill(
            torch.zeros_like(beyond).scatter(-1, index, beyond), float("-inf")
        )
    if sampling.min_p:
        probabilities = logits.softmax(-1)
        unlikely = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(unlikely, float("-inf"))
    return logits


DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Continue a prompt with a trained or a published model, printing each token as it comes."""

    model: tyro.conf.Positional[str]
    """folder of a training run, or a published model: a folder in the Hugging Face format or an id of its hub"""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling()
    prompt: str = "def "
    """text to continue"""
    tokens: int = 400
    """how many tokens to add, unless the model ends the text before"""
    seed: int = 0
    """the same seed draws the same text"""
    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: str = "auto"
    """auto (as the file has it), float32 or bfloat16"""
    ignore: tuple[str, ...] = ()
    """entries of a published config.json to leave out of account though they are unknown here"""


def main(options: Options) -> None:
    """Stream the prompt and what follows."""
    if not 0 <= options.seed < 2**63:
        raise InputError("seed", options.seed, "0 to 2^63 - 1")
    if options.dtype not in DTYPES:
        raise InputError("dtype", options.dtype, ", ".join(DTYPES))
    device, dtype = pick_device(options.device), DTYPES[options.dtype]
    if (Path(options.model) / "options.json").exists():
        model, tokenizer = load_model(Path(options.model)).to(device, dtype).eval(), Bytes()
    else:
        model = from_pretrained(options.model, dtype, device, ignore=options.ignore)
        tokenizer = TokenizerFile(model.published.folder)
    prompt = tokenizer.encode(options.prompt)
    tokens = (
        int(token)
        for token in generate(model, [prompt], options.tokens, options.sampling, options.seed)
    )
    for text in tokenizer.stream(
        prompt, itertools.takewhile(lambda token: token not in tokenizer.end, tokens)
    ):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options, description=__doc__))
