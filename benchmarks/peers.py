"""How fast are we against transformers, on the same weights?

    python -m benchmarks.peers                    Llama, Mixtral and Mamba: training step and generation
    python -m benchmarks.peers --only llama

Each model is made by transformers (width 256, 4 layers, fp32), saved, and loaded by us; the logits are compared before the
clock starts. Then one forward and backward pass at each length, and greedy generation with a carried state, in turn.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from minimodels import InputError, from_pretrained
from minimodels.command import keep_freed_memory, run_command
from minimodels.loss import IGNORE
from minimodels.measure import interleave, ratio, write
from minimodels.sample import Sampling, generate

SHAPE = {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 4}
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 704}
MODELS = {
    "llama": HEADS,
    "mixtral": {**HEADS, "num_local_experts": 8, "intermediate_size": 352},
    "mamba": {},
}


def pair(name: str):
    """A model of transformers and ours with its weights, both in training mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SHAPE, **MODELS[name], **NO_SPECIAL)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = from_pretrained(folder)
    tokens = torch.randint(SHAPE["vocab_size"], (1, 128))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    return ours.train(), theirs.train()


def measure_training(name: str, T: int) -> dict:
    """Forward and backward of one sequence; the slower side is timed less often."""
    ours, theirs = pair(name)
    tokens = torch.randint(SHAPE["vocab_size"], (1, T))
    targets = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)), dim=1)

    def our_step() -> None:
        ours.zero_grad()
        ours.loss(tokens, targets)[0].backward()

    def their_step() -> None:
        theirs.zero_grad()
        theirs(tokens, labels=tokens, use_cache=False).loss.backward()

    slow = name == "mamba"  # whose loop over tokens takes them seconds to minutes
    return interleave({"minimodels": our_step, "transformers": their_step}, rounds=2 if slow else 9, warm=not slow)


def measure_generation(name: str, count: int = 256) -> dict:
    """`count` tokens after a prompt of 32, greedily, the state carried."""
    ours, theirs = (model.eval() for model in pair(name))
    prompt = torch.randint(SHAPE["vocab_size"], (1, 32))
    calls = {
        "minimodels": lambda: list(generate(ours, [prompt[0]], count, Sampling(temperature=0))),
        "transformers": lambda: theirs.generate(prompt, max_new_tokens=count, do_sample=False),
    }
    first, second = torch.cat(calls["minimodels"]()), calls["transformers"]()[0, 32:]
    if not torch.equal(first[:64], second[:64]):  # further on, rounding may tip a near tie
        raise AssertionError(f"{name}: the two do not generate the same tokens")
    return interleave(calls, rounds=5)


@dataclass(frozen=True)
class Options:
    """Time published models against transformers on this machine's CPU."""

    only: str = ""
    """one model: llama, mixtral or mamba; all by default"""
    lengths: tuple[int, ...] = (512, 2048)
    """tokens of the training step"""
    out: Path = Path("benchmarks/results/cpu/peers.jsonl")
    """file for the JSON rows"""


def main(options: Options) -> None:
    """Measure, print, write."""
    if options.only and options.only not in MODELS:
        raise InputError("only", options.only, ", ".join(MODELS))
    try:
        import transformers
    except ImportError:
        raise InputError("transformers", "not installed", "pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keep_freed_memory()
    rows = []
    print("width 256, 4 layers, vocabulary 256, batch 1, fp32, against transformers")
    for name in MODELS:
        if options.only in ("", name):
            questions = {f"forward + backward, T {T}": (measure_training, T) for T in options.lengths}
            for question, (measure, argument) in {**questions, "generation": (measure_generation, 256)}.items():
                timings = measure(name, argument)
                median, low, high = ratio(timings, "minimodels", "transformers")
                seconds = {provider: statistics.median(samples) for provider, samples in timings.items()}
                times = ", ".join(f"{provider} {value * 1e3:.0f} ms" for provider, value in seconds.items())
                print(f"{name:8} {question:28} {median:6.2f}x ({low:.2f}-{high:.2f})   {times}", flush=True)
                rows += [
                    {"benchmark": "peers", "model": name, "question": question, "tokens": argument, "provider": p, "seconds": s}
                    for p, s in timings.items()
                ]
    write(options.out, rows, torch.device("cpu"))
    print(f"written to {options.out}")


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options, description=__doc__))
