"""Continue a prompt with a trained or a published model, and print each token as it is drawn.

    python -m minimodels.sample runs/transformer --prompt "def " --temperature 0.8 --min-p 0.05
    python -m minimodels.sample Qwen/Qwen3-0.6B --prompt "Once upon a time"
    python -m minimodels.sample Qwen/Qwen3-0.6B --chat --prompt "Why is the sky blue?"

By default a run continues the prompt up to its context, and adds nothing if the prompt already
fills it. A published model adds 400 tokens. A terminal shows control characters as escapes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from minimodels.command import escaped, parse_options, pick_device, run_command
from minimodels.data.tasks import is_task
from minimodels.decoding import waits
from minimodels.errors import InputError, Natural, Range, check_types
from minimodels.files import read_json
from minimodels.generate import Sampling, stream, tokenizer_of, until
from minimodels.published import from_pretrained
from minimodels.training.checkpoint import home, load_model

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
TOKENS = 400  # default for a published model


@dataclass(frozen=True)
class Options:
    """Continue a prompt with a trained or a published model, and print
    each token as it is drawn."""

    model: tyro.conf.Positional[str]
    """folder of a training run, whose last checkpoint is taken, or of one of its checkpoints
    (RUN/checkpoints/step-N), or a published model: a folder in the Hugging Face format or an id on
    its hub"""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling()
    prompt: str = "def "
    """text to continue"""
    chat: bool = False
    """the prompt is a message to a chat model, which answers it"""
    stop: tuple[str, ...] = ()
    """end the text before any of these"""
    tokens: Natural | None = None
    """tokens to add, unless the model ends the text earlier; by default a run's context is filled
    (nothing is added if the prompt already fills it), and a published model adds 400"""
    seed: Annotated[int, Range(0, 2**63 - 1, "a whole number from 0, below 2^63")] = 0
    """the same seed draws the same text"""
    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto (the type in the file), float32, bfloat16 or float16"""
    ignore: tuple[str, ...] = ()
    """unknown entries of a published config.json to ignore"""

    def __post_init__(self):
        check_types(self)
        if not self.prompt:
            raise InputError("prompt", self.prompt, "at least one character")
        if "" in self.stop:
            raise InputError("stop", "", "texts of at least one character")


def main(options: Options) -> None:
    """Print the prompt unless it is a message, and then each token as it is drawn."""
    device, dtype = pick_device(options.device), DTYPES[options.dtype]
    folder, context = Path(options.model), None
    if (home(folder) / "options.json").exists():
        run = read_json(home(folder) / "options.json", "model")
        if is_task(str(run.get("data"))):
            raise InputError(
                "model", options.model, f"a run on text; {run['data']} has answers, not text"
            )
        context = run.get("context")
        model = load_model(folder).to(device, dtype).eval()
    else:
        model = from_pretrained(options.model, dtype, device, ignore=options.ignore)
    tokenizer = tokenizer_of(model)
    prompt = tokenizer.chat(options.prompt) if options.chat else tokenizer.encode(options.prompt)
    count = tokens_to_add(options.tokens, context, len(prompt))
    if device.type == "cuda" and (reason := waits(model)):
        print(f"note: no CUDA graph, because {reason}", file=sys.stderr)
    texts = stream(model, tokenizer, prompt, count, options.sampling, options.seed)
    shown = escaped if sys.stdout.isatty() else str
    opening = next(texts)
    print("" if options.chat else shown(opening), end="", flush=True)
    for text in until(texts, options.stop):
        print(shown(text), end="", flush=True)
    print()


def tokens_to_add(asked: int | None, context: int | None, prompt: int) -> int:
    """The number of tokens to generate. Prints a note if they go beyond the context of training, or
    if there are none because the prompt fills it."""
    if context is None:
        return TOKENS if asked is None else asked
    if asked is None and prompt >= context:
        note = f"the prompt's {prompt} tokens already fill the context of {context}"
        print(f"note: {note}; --tokens N writes more", file=sys.stderr)
        return 0
    asked = context - prompt if asked is None else asked
    if prompt + asked > context:
        note = f"the model was trained on texts of {context} tokens and may be worse beyond"
        print(f"note: {note}", file=sys.stderr)
    return asked


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
