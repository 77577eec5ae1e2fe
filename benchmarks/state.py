"""What can a fixed state compute, and can it replace its content? On a CPU in
minutes, on a GPU in full.

    python -m benchmarks.state tracking     parity and permutations of three: who can track a state,
                                            and how far beyond the trained length?
    python -m benchmarks.state mixers       recall against bytes of state: which mixer recalls more?
    python -m benchmarks.state overwrite    keys that get new values: does the old value disappear?

Options, rows and pictures are those of `python -m benchmarks.claims`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import tyro

from minimodels import LM, Config
from minimodels.command import parse_options, run_command
from minimodels.data.text import open_data
from minimodels.ledger import ledger

from . import claims
from .claims import Claim, Panel
from .training import Run, score

MULTIPLES = (1, 2, 4, 8)  # of the trained length, at which a trained model is tested


def tracking(small: bool) -> Claim:
    """Grazzi et al. (arXiv:2411.12537): eigenvalues in [0, 1] cannot track a parity, those in [-1,
    1] can. Siems et al. (arXiv:2502.10297): one reflection per token tracks a parity, two track the
    permutations of three things.

    Every layer is tested alone, because several layers can solve part of the task by depth.
    """
    width, context, steps = (32, 32, 300) if small else (128, 64, 5000)
    models = {
        "attention": "attention(heads=2) mlp",
        "mamba": "mamba",
        "mamba2": "mamba2(heads=2, state_size=16)",
        "deltanet, beta < 1": "deltanet(heads=2)",
        "deltanet, beta < 2": "deltanet(heads=2, beta_max=2)",
        "deltaproduct": "deltanet(heads=2, beta_max=2, steps=2)",
    }
    runs = [
        Run(name, Config(layers=layers, width=width), "parity", context, steps, 64, lr=3e-3)
        for name, layers in models.items()
    ]
    width, context, steps = (64, 16, 700) if small else (128, 32, 10_000)
    models = {
        "attention": "attention(heads=4) mlp",
        "mamba": "mamba",
        "mamba2": "mamba2(heads=4, state_size=16)",
        "deltanet, beta < 1": "deltanet(heads=4)",
        "deltanet, beta < 2": "deltanet(heads=4, beta_max=2)",
        "deltaproduct": "deltanet(heads=4, beta_max=2, steps=2)",
    }
    runs += [
        Run(name, Config(layers=layers, width=width), "s3", context, steps, 64, lr=5e-3)
        for name, layers in models.items()
    ]
    panels = [
        Panel(
            task,
            f"{task}_length",
            f"{task}_right",
            "position in the text (trained up to the first)",
            label,
            x_log=True,
        )
        for task, label in (
            ("parity", "parities right"),
            ("s3", "permutations right"),
        )
    ]
    return Claim(
        "Who can follow a state that every token changes?", runs, panels, at_end=by_position
    )


@torch.no_grad()
def by_position(model: LM, run: Run, device: torch.device) -> Iterator[dict[str, float]]:
    """The share of right answers in the second half of a text, at the trained
    length and at longer ones."""
    longest = MULTIPLES[-1] * run.context
    right = torch.zeros(longest, device=device)
    model.eval()
    for tokens, targets in open_data(run.data, longest).validation(64, 4):
        logits, _ = model(tokens.to(device))
        right += (logits.argmax(-1) == targets.to(device)).float().mean(0) / 4
    model.train()
    for multiple in MULTIPLES:
        length = multiple * run.context
        share = right[length // 2 : length].mean().item()
        yield {f"{run.data}_length": length, f"{run.data}_right": share}


# name -> a mixer by the number of its heads; the state of few heads is larger
RECURRENT = {
    "linear_attention": "retention(heads={}, feature_map=elu, rope_base=0, decay=none, norm=sum,"
    " gate=none)",
    "retnet": "retention(heads={})",
    # block=2, because the last layer of a model with Lightning hardly decays, and this is the last
    "lightning": "retention(heads={}, feature_map=silu, rope_base=0, decay=layers, block=2,"
    " scale=false, norm=full, gate=sigmoid)",
    "gla": "retention(heads={}, rope_base=0, decay=channels)",
    "deltanet": "deltanet(heads={})",
    "gated_deltanet": "deltanet(heads={}, gate=scalar, output_gate=silu)",
    "kda": "deltanet(heads={}, gate=vector, output_gate=sigmoid, output_rank=head)",
    "deltaproduct": "deltanet(heads={}, steps=2, beta_max=2)",
}


def after_convolution(mixer: str, width: int) -> Config:
    """A short convolution, which brings a key and its value together, and a mixer, which then only
    has to remember."""
    return Config(f"short_convolution {mixer}".strip(), width=width)


def overwrite(small: bool) -> Claim:
    """Schlag et al. (arXiv:2102.11174): a state that only adds keeps old values; the delta rule
    replaces them.

    The mixers are those of `mixers`, which shows what they recall if every key is written once.
    """
    keys, vocab, times, steps, width, rates = (
        (4, 16, 4, 600, 64, (2e-3, 5e-3))
        if small
        else (32, 256, 8, 10_000, 128, (3e-4, 1e-3, 3e-3))
    )
    models = {"attention": "attention(heads=2)", "mamba2": "mamba2(heads=2, state_size=16)"}
    models |= {name: text.format(2) for name, text in RECURRENT.items()}

    def length(overwritten: int) -> int:
        """Tokens of a text in which each key has so many values before its last, on average."""
        return 2 * (overwritten + 1) * keys + keys

    data = f"overwrite(keys={keys}, vocab={vocab})"
    runs = [
        Run(name, after_convolution(mixer, width), data, length(times), steps)
        for name, mixer in models.items()
    ]

    def rewritten(model: LM, run: Run, device: torch.device) -> Iterator[dict[str, float]]:
        """Right answers against the number of values that a key had before its last one."""
        for overwritten in (0, times // 4, times // 2, times, 2 * times):
            found = score(model, open_data(run.data, length(overwritten)), 64, 8)
            yield {"overwritten": overwritten, "right": found["accuracy"]}

    panels = [
        Panel("learning", "step", "accuracy", "training steps", "answers right"),
        Panel(
            "overwriting",
            "overwritten",
            "right",
            f"how often a key was overwritten, on average ({times} in training)",
            "answers right",
        ),
    ]
    return Claim("Can a memory replace what it holds?", runs, panels, at_end=rewritten, rates=rates)


def mixers(small: bool) -> Claim:
    """Zoology (arXiv:2312.04927): recall against bytes of state, for every mixer.

    Most mixers have two sizes of state. Recurrent ones succeed in a narrow band of learning rates
    (arXiv:2508.19029), so the first seed tries several.
    """
    task, context, steps, batch, width = (
        ("mqar(pairs=8, vocab=32)", 32, 350, 32, 64)
        if small
        else ("mqar(pairs=64, vocab=8192)", 512, 20_000, 64, 128)
    )
    rates = (2e-3, 5e-3) if small else (1e-4, 3e-4, 1e-3, 3e-3)
    models = {
        "attention": ["attention(heads=2)"],
        "attention, window": [
            f"attention(heads=2, window={size})" for size in (context // 4, context // 2)
        ],
        "mamba": ["mamba(state_size=4)", "mamba"],
        "mamba2": [f"mamba2(heads=2, state_size={size})" for size in (4, 16)],
    }
    models |= {name: [text.format(heads) for heads in (8, 2)] for name, text in RECURRENT.items()}
    models["short_convolution"] = [""]  # nothing but the convolution
    runs = [
        Run(name, after_convolution(mixer, width), task, context, steps, batch)
        for name, sizes in models.items()
        for mixer in sizes
    ]

    def state(model: LM, run: Run, device: torch.device) -> Iterator[dict[str, float]]:
        """Bytes of state against right answers."""
        found = score(model, open_data(task, context), 64, 16)
        yield {"state": ledger(run.config, context).state_bytes, "right": found["accuracy"]}

    panel = Panel(
        "state", "state", "right", "bytes of state a sequence", "answers right", x_log=True
    )
    return Claim(
        "Which mixer recalls more per byte of state?",
        runs,
        [panel],
        probes=1,
        at_end=state,
        rates=rates,
    )


STATE = {claim.__name__: claim for claim in (tracking, overwrite, mixers)}


@dataclass(frozen=True)
class Options(claims.Options):
    """Train small models until they answer a question about their states."""

    claim: tyro.conf.Positional[str]
    """tracking, mixers or overwrite"""


def main(options: Options) -> None:
    """Train, record, write, and print the result."""
    claims.answer(options, STATE)


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
