"""What must attention remember, what does it attend to, and how far does it reach? At toy scale on
a CPU, in minutes; at full size on a GPU.

    python -m benchmarks.attention cache        bits per byte against bytes of state: how small may
                                                the memory of a token be?
    python -m benchmarks.attention sinks        attention on the first token, and longer texts than
                                                in training, with and without a sink or a gate
    python -m benchmarks.attention positions    longer texts than in training: with rotary positions
                                                in all, no or some layers, and with yarn

Options, rows and pictures are those of `python -m benchmarks.claims`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from minimodels import LM, Config
from minimodels.architectures.transformer import Attention
from minimodels.command import parse_options, run_command
from minimodels.data.text import Text, open_data
from minimodels.grammar import set_options
from minimodels.ledger import ledger
from minimodels.ops.cache import AttentionState
from minimodels.ops.rotary import rotate

from . import claims
from .claims import BITS, Claim, Panel
from .positions import bins, loss_by_position
from .training import SCORED, Run, score, train

LONGER = 8  # the longest texts, as a multiple of the trained length
BEGIN = 32  # where the first bin begins; the bits before it vary too much
READ = (8, 2)  # held-out texts to read: rows of a batch, batches
FIRST = 4  # tokens kept from the beginning of a stream, as in StreamingLLM
TUNED = 50  # steps of tuning on long texts


def cache(small: bool) -> Claim:
    """Grouped queries (arXiv:2305.13245) and latent attention (arXiv:2405.04434) remember less than
    full heads at about the same quality. A window and the gated delta rule (arXiv:2412.06464)
    remember a fixed amount.

    All models have equal active parameters: the width of the MLPs makes up for the other layers.
    """
    blocks, width, heads, context, steps, batch = (
        (2, 64, 4, 256, 500, 4) if small else (12, 768, 12, 1024, 5000, 32)
    )
    models = [
        ("attention", f"attention(heads={heads})"),
        ("attention", f"attention(heads={heads}, kv_heads={heads // 2})"),
        ("attention", f"attention(heads={heads}, kv_heads=1)"),
        ("latent_attention", f"latent_attention(heads={heads})"),
        ("attention, window", f"attention(heads={heads}, window={context // 4})"),
        ("attention, window", f"attention(heads={heads}, window={context // 16})"),
        ("gated_deltanet", f"deltanet(heads={heads}, gate=scalar, output_gate=silu)"),
    ]
    texts = equal_parameters([f"({layer} mlp)*{blocks}" for _, layer in models], width)
    runs = [
        Run(name, Config(layers=text, width=width), "stdlib", context, steps, batch, lr=4e-3)
        for (name, _), text in zip(models, texts, strict=True)
    ]

    def state(model: LM, run: Run, device: torch.device) -> Iterator[dict[str, float]]:
        cost = ledger(run.config, context)
        bits = score(model, open_data(run.data, context), run.batch, SCORED)["bits"]
        yield {"state": cost.state_bytes / context, "bits": bits, "active": cost.active}

    label = f"bytes of state per token, after {context:,} tokens"
    panel = Panel("state", "state", "bits", label, BITS, x_log=True)
    return Claim("How small may the memory of a token be?", runs, [panel], 0, state)


def sinks(small: bool) -> Claim:
    """StreamingLLM (arXiv:2309.17453): heads attend to the first token, so a model fails as soon as
    a window loses this token. With a learned sink (gpt-oss, arXiv:2508.10925) or a gate
    (arXiv:2505.06708) they have no need to.

    The models have equal active parameters, as in `cache`.
    """
    blocks, width, heads, context, steps, batch = (
        (2, 64, 4, 256, 600, 4) if small else (12, 768, 12, 1024, 5000, 32)
    )
    models = {
        "neither": f"attention(heads={heads})",
        "sink": f"attention(heads={heads}, sink=true)",
        "gate": f"attention(heads={heads}, gate=full)",
    }
    texts = equal_parameters([f"({layer} mlp)*{blocks}" for layer in models.values()], width)
    runs = [
        Run(name, Config(layers=text, width=width), "stdlib", context, steps, batch, lr=4e-3)
        for name, text in zip(models, texts, strict=True)
    ]

    def measured(model: LM, run: Run, device: torch.device) -> Iterator[dict[str, float]]:
        yield from first_token(model, run, device)
        data = open_data(run.data, LONGER * context)
        readers = model, Stream(model, context, 0), Stream(model, context, FIRST)
        found = [by_position(reader, data, context) for reader in readers]
        for (position, whole), (_, window), (_, kept) in zip(*found, strict=True):
            yield {"reach": position, "whole": whole, "window": window, "kept": kept}

    place = f"position in the text, end of a bin (trained up to {context:,})"
    both = f"{BITS}, first {FIRST} and last {context - FIRST:,} kept"
    panels = [
        Panel("first", "block", "first", "block", "share of attention on the first token"),
        Panel("whole", "reach", "whole", place, f"{BITS}, all tokens kept", x_log=True),
        Panel("window", "reach", "window", place, f"{BITS}, last {context:,} kept", x_log=True),
        Panel("kept", "reach", "kept", place, both, x_log=True),
    ]
    question = "Do heads need the first token, and is a sink or a gate a substitute?"
    return Claim(question, runs, panels, 1, measured)


def positions(small: bool) -> Claim:
    """Rotary positions fail beyond the trained length. Models reach further without positions
    (arXiv:2305.19466), or without them in one layer of four (SmolLM3), or with yarn
    (arXiv:2309.00071) after a few steps of tuning or none."""
    blocks, width, heads, context, steps, batch = (
        (4, 64, 4, 256, 700, 4) if small else (12, 768, 12, 1024, 5000, 32)
    )
    rotating, plain = f"attention(heads={heads}) mlp", f"attention(heads={heads}, rope_base=0) mlp"
    models = {
        "rotary": f"({rotating})*{blocks}",
        "none": f"({plain})*{blocks}",
        "three to one": f"(({rotating})*3 {plain})*{blocks // 4}",
    }
    runs = [
        Run(name, Config(layers=text, width=width), "stdlib", context, steps, batch, lr=4e-3)
        for name, text in models.items()
    ]
    yarn = f"attention.rope_scaling=yarn(factor={LONGER}, context={context})"

    def lengths(model: LM, run: Run, device: torch.device) -> Iterator[dict]:
        readers = {run.model: model}
        if run.model == "rotary":
            text = run.config.layers
            scaled = set_options(text, [yarn])
            readers["rotary, tuned"] = continued(model, run, text, TUNED, device)
            readers["yarn"] = continued(model, run, scaled, 0, device)
            readers["yarn, tuned"] = continued(model, run, scaled, TUNED, device)
        data = open_data(run.data, LONGER * context)
        for name, reader in readers.items():
            for position, bits in by_position(reader, data, context):
                yield {"model": name, "reach": position, "bits": bits}

    place = f"position in the text, end of a bin (trained up to {context:,})"
    panel = Panel("length", "reach", "bits", place, BITS, x_log=True)
    question = "Which positions reach further than the texts of training?"
    return Claim(question, runs, [panel], 1, lengths)


ATTENTION = {claim.__name__: claim for claim in (cache, sinks, positions)}


def equal_parameters(texts: list[str], width: int) -> list[str]:
    """The models with other widths of their MLPs, so that all have as many active parameters as the
    first, as nearly as whole widths allow. All MLPs of a model are equally wide.
    """

    def active(text: str) -> float:
        return ledger(Config(layers=text, width=width), 1).active

    def widened(text: str, hidden: int) -> str:
        return set_options(text, [f"mlp.width={hidden}"])

    matched, budget = [], active(texts[0])
    for text in texts:
        least = active(widened(text, 1))
        step = active(widened(text, 2)) - least
        matched.append(widened(text, 1 + round((budget - least) / step)))
    return matched


def by_position(model: nn.Module, data: Text, context: int) -> Iterator[tuple[int, float]]:
    """The bits per byte of a model trained on `context` bytes, by position: the end of each bin,
    and the mean over it. Bins double in length."""
    bits = loss_by_position(model, data, *READ) / math.log(2)
    for first, stop in pairwise(bins(context, data.context, 1)):
        if first >= BEGIN:
            yield stop, bits[first:stop].mean().item()


def continued(model: LM, run: Run, layers: str, steps: int, device: torch.device) -> LM:
    """A copy of a trained model with other options, trained for some more steps on long texts."""

    def load(new: LM) -> None:
        new.load_state_dict(model.state_dict())

    tuning = replace(
        run,
        config=replace(run.config, layers=layers),
        context=LONGER * run.context,
        steps=steps,
        batch=max(1, run.batch // LONGER),
        lr=run.lr / 4,
        change=load,
    )
    return train(tuning, 0, 0, device, tqdm(disable=True))[0]


# What attention attends to.


@torch.no_grad()
def first_token(model: LM, run: Run, device: torch.device) -> Iterator[dict[str, float]]:
    """The attention of each block on the first token, and on the sink if there is one: means over
    heads and over the queries in the second half of a text."""
    layers = [layer for layer in model.modules() if isinstance(layer, Attention)]
    probes, shares = [Probe(layer) for layer in layers], [[] for _ in layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: shares[i].append(probes[i](args[0])))
        for i, layer in enumerate(layers)
    ]
    model.eval()
    for tokens, _ in open_data(run.data, run.context).validation(*READ):
        model(tokens.to(device))
    model.train()
    for hook in hooks:
        hook.remove()
    for block, seen in enumerate(shares, 1):
        first, sink = torch.stack(seen)[:, :, run.context // 2 :].mean((0, 1, 2)).tolist()
        yield {"block": block, "first": first, "sink": sink}


class Probe(nn.Module):
    """Measures how much a layer attends to the first token, and to its sink.

    The layer's values are replaced: the first number is 1 at the first token and 0 at all others,
    the second is 1 everywhere. So the outputs are the weight of the first token, and the sum of all
    weights, which a sink reduces.
    """

    def __init__(self, layer: Attention):
        super().__init__()
        self.layer = copy.deepcopy(layer)
        del self.layer.v
        self.layer.v, self.layer.out, self.layer.gate = self.values, nn.Identity(), None

    def values(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, G·d)."""
        values = x.new_ones(*x.shape[:2], self.layer.kv_heads, self.layer.head_dim)
        values[..., 0] = 0
        values[:, 0, :, 0] = 1
        return values.flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, 2): shares of the first token and of the sink, means over heads."""
        weights, _ = self.layer(x)
        first, total = weights.unflatten(2, (self.layer.heads, -1))[..., :2].mean(2).unbind(-1)
        return torch.stack((first, 1 - total), dim=-1)


# Streaming.


class Stream(nn.Module):
    """A model that reads a long text in pieces and never attends to more tokens than in training.

    Before each piece it forgets the oldest tokens, except the `first` ones of the text. Positions
    are those in the memory, not in the text (StreamingLLM, section 3.2): a first token that stays
    is rotated further, so that it comes right before the oldest other token that stays.
    """

    def __init__(self, model: LM, window: int, first: int, pieces: int = 8):
        super().__init__()
        self.model, self.device, self.first = model, model.device, first
        self.piece = window // pieces
        self.keep = window - self.piece

    def forward(self, tokens: Tensor) -> tuple[Tensor, list]:
        """tokens (B, T) -> logits (B, T, V), and the state after the last piece."""
        state, outputs = [None] * len(self.model.layers), []
        for piece in tokens.split(self.piece, dim=1):
            pairs = zip(self.model.layers, state, strict=True)
            logits, state = self.model(
                piece, [self.evict(block.layer, old) for block, old in pairs]
            )
            outputs.append(logits)
        return torch.cat(outputs, dim=1), state

    def evict(self, layer: nn.Module, state: AttentionState | None) -> AttentionState | None:
        """The state of a rotary attention layer, cut to at most `keep` tokens."""
        gone = 0 if state is None else state.keys.shape[2] - self.keep
        if gone <= 0:
            return state
        old, new = slice(0, self.first), slice(self.first + gone, None)
        angles = layer.angles(torch.tensor([gone], device=state.keys.device), {})
        moved = rotate(state.keys[:, :, old], *angles)
        keys = torch.cat((moved, state.keys[:, :, new]), dim=2)
        values = torch.cat((state.values[:, :, old], state.values[:, :, new]), dim=2)
        return AttentionState(keys, values, None, state.seen)


@dataclass(frozen=True)
class Options(claims.Options):
    """Train small models until they answer a question about attention."""

    claim: tyro.conf.Positional[str]
    """cache, sinks or positions"""


def main(options: Options) -> None:
    """Train, record, write, and print the result."""
    claims.answer(options, ATTENTION)


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
