"""Test claims of papers, one command for each: at toy scale on a CPU, in minutes; at full size on
a GPU.

    python -m benchmarks.claims copying      selective copying: what is selectivity worth?
    python -m benchmarks.claims induction    induction heads: who keeps them at greater lengths?
    python -m benchmarks.claims recall       associative recall: how much state does it take?
    python -m benchmarks.claims experts      routed experts against a dense MLP: who learns faster?
    python -m benchmarks.claims depth        mixture-of-depths against dense at equal training FLOPs
    python -m benchmarks.claims balance      keeping experts in use: five ways
    python -m benchmarks.claims presets      every preset on the same text

Each command trains every model with several seeds on the same data and writes JSON rows, which
benchmarks.plot draws. On a GPU `--impl triton` trains with the kernels. Claims about states are in
benchmarks.state, those about attention in benchmarks.attention.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from minimodels import LM, Config, InputError, preset
from minimodels.architectures.mod import MixtureOfDepths
from minimodels.command import keep_freed_memory, parse_options, pick_device, run_command
from minimodels.context import Context, Record
from minimodels.data.text import open_data
from minimodels.errors import nearest
from minimodels.ledger import ledger
from minimodels.measure import check_writable, write
from minimodels.paths import choose
from minimodels.presets import MAIN, fitted

from . import table
from .plot import at_best_rate, model_of
from .s4d import forget_selection
from .training import SCORED, Run, score, train


@dataclass
class Panel:
    """One picture: the two recorded numbers that it compares."""

    name: str
    x: str
    y: str
    x_label: str
    y_label: str
    x_log: bool = False


@dataclass
class Claim:
    """A question, the runs that answer it, and the pictures that show the answer."""

    question: str
    runs: list[Run]
    panels: list[Panel]
    probes: int = 8
    """evaluations during a run, the last at its end"""
    at_end: Callable[[LM, Run, torch.device], Iterator[dict[str, float]]] | None = None
    """further records of the trained model"""
    seeds: int = 3
    rates: tuple[float, ...] = ()
    """learning rates at which the first seed trains each model; the other seeds use the best one"""


# The claims. `small`: the size for a CPU.


def copying(small: bool) -> Claim:
    """Mamba (arXiv:2312.00752) §4.1.1, table 1: S6 solves selective copying, but the time-invariant
    S4 does not."""
    task, context, steps = (
        ("copying(tokens=4, vocab=8)", 128, 1500)
        if small
        else ("copying(tokens=16, vocab=16)", 4096, 20_000)
    )
    mamba = Config(layers="mamba*2", width=64)
    runs = [  # each at its own best rate
        Run("mamba", mamba, task, context, steps, lr=4e-3),
        Run("time-invariant", mamba, task, context, steps, lr=1e-2, change=forget_selection),
    ]
    panel = Panel("accuracy", "step", "accuracy", "training steps", "answers right")
    return Claim(
        "What is selectivity worth? Copying tokens that are strewn among noise", runs, [panel]
    )


def induction(small: bool) -> Claim:
    """Mamba §4.1.2, table 2: trained at 256, Mamba extrapolates to 2^20; attention
    hardly doubles its length."""
    context, steps, longest = (64, 750, 64) if small else (256, 20_000, 4096)
    mamba = Config(layers="mamba*2", width=64)
    attention = Config(layers="(attention(heads=4) mlp)*2", width=64)
    runs = [
        Run("mamba", mamba, "induction", context, steps, lr=4e-3),
        # at Mamba's rate it does not learn at all, and it needs more steps
        Run("attention", attention, "induction", context, 2 * steps, lr=1e-3),
    ]

    def lengths(model: LM, run: Run, device: torch.device) -> Iterator[dict[str, float]]:
        multiple = 1
        while multiple <= longest:
            tested, batch = open_data("induction", context * multiple), max(1, 64 // multiple)
            found = score(model, tested, batch, max(2, 64 // batch))
            yield {"length": context * multiple, "right": found["accuracy"]}
            multiple *= 2

    panel = Panel(
        "length",
        "length",
        "right",
        "length of the text (trained at the first)",
        "answers right",
        x_log=True,
    )
    return Claim(
        "Who keeps an induction head beyond the trained length?", runs, [panel], at_end=lengths
    )


def recall(small: bool) -> Claim:
    """Zoology (arXiv:2312.04927), Based (arXiv:2402.18668): recall costs state. The models have
    equal widths but different states."""
    task, context, steps = (
        ("mqar(pairs=4, vocab=16)", 24, 800)
        if small
        else ("mqar(pairs=64, vocab=8192)", 512, 20_000)
    )
    width, windows, state_sizes = (
        (64, (4, 8, 16), (1, 16)) if small else (128, (16, 64, 256), (1, 4, 16, 64))
    )
    longer = 5 * steps // 2  # Mamba needs more steps to learn the task
    models = [("attention", steps, "(attention(heads=2) mlp)*2")]
    models += [
        ("attention, window", steps, f"(attention(heads=2, window={w}) mlp)*2") for w in windows
    ]
    models += [("mamba", longer, f"mamba(state_size={size})*2") for size in state_sizes]
    runs = [
        Run(name, Config(layers, width=width), task, context, steps, batch=64, lr=4e-3)
        for name, steps, layers in models
    ]

    def state(model: LM, run: Run, device: torch.device) -> Iterator[dict[str, float]]:
        data = open_data(task, context)
        yield {
            "state": ledger(run.config, context).state_bytes,
            "right": score(model, data, 64, SCORED)["accuracy"],
        }

    panel = Panel(
        "state", "state", "right", "bytes of state a sequence", "answers right", x_log=True
    )
    return Claim("How much state does associative recall take?", runs, [panel], at_end=state)


def experts(small: bool) -> Claim:
    """Switch (arXiv:2101.03961), OLMoE (arXiv:2409.02060): at equal active FLOPs, experts
    learn faster per token."""
    size, context, steps, batch = ("tiny", 128, 600, 8) if small else ("small", 1024, 5000, 32)
    runs = [
        Run(name, preset(name, size), "stdlib", context, steps, batch)
        for name in ("transformer", "moe")
    ]
    panels = [TEXT["tokens"], TEXT["seconds"]]
    return Claim("Do routed experts beat a dense MLP of the same active FLOPs?", runs, panels)


def depth(small: bool) -> Claim:
    """Mixture-of-depths (arXiv:2404.02258): equal loss at equal training FLOPs, with faster steps;
    random routing is far worse."""
    size, context, steps, batch = ("tiny", 128, 300, 8) if small else ("small", 1024, 5000, 32)
    dense = preset("transformer", size)
    mod = preset("mod", size)
    # mod without the groups that it routes to
    halved = replace(dense, layers=fitted(f"(attention mlp)*{dense.depth // 4}", size))
    by_router = preset("mod", size, "mod.route=router")
    runs = [
        Run("dense", dense, "stdlib", context, steps, batch),
        Run("mod, predictor", mod, "stdlib", context, steps, batch),
        Run("mod, auxiliary loss", by_router, "stdlib", context, steps, batch),
        Run("mod, random", mod, "stdlib", context, steps, batch, change=route_at_random),
        Run("dense, half as deep", halved, "stdlib", context, steps, batch),
    ]
    for run in runs:  # steps that give the same FLOPs
        run.steps = round(
            steps
            * ledger(dense, context).training_flops
            / ledger(run.config, context).training_flops
        )
    return Claim(
        "Does mixture-of-depths pay at equal training FLOPs?",
        runs,
        [TEXT["flops"], TEXT["seconds"]],
        at_end=routes,
    )


def balance(small: bool) -> Claim:
    """Nothing, the losses of Switch and ST-MoE (arXiv:2202.08906), the bias of DeepSeek-V3
    (arXiv:2412.19437), or expert choice (arXiv:2202.09368)."""
    size, context, steps, batch = ("tiny", 128, 300, 8) if small else ("small", 1024, 5000, 32)
    no_loss = ("moe.balance_loss=0", "moe.z_loss=0")
    bias = ("moe.balance_loss=0.0001", "moe.z_loss=0", f"moe.bias_step={0.01 if small else 0.001}")
    ways = {
        "none": no_loss,
        "auxiliary loss": ("moe.z_loss=0",),
        "auxiliary and z-loss": (),
        "bias": ("moe.router=sigmoid_bias", *bias),
        "expert choice (not causal)": ("moe.router=expert_choice", *no_loss),
    }
    runs = [
        Run(name, preset("moe", size, *settings), "stdlib", context, steps, batch)
        for name, settings in ways.items()
    ]
    overload = Panel(
        "overload",
        "tokens",
        "overload",
        "training tokens",
        "load of the fullest expert, 1: all alike",
    )
    return Claim(
        "What keeps the experts in use, and at what price?", runs, [overload, TEXT["tokens"]]
    )


def presets(small: bool) -> Claim:
    """The presets of this project, on one text."""
    size, context, steps, batch = ("tiny", 128, 250, 8) if small else ("small", 1024, 5000, 32)
    runs = [Run(name, preset(name, size), "stdlib", context, steps, batch) for name in MAIN]
    return Claim(
        "Which architecture learns fastest?", runs, [TEXT["tokens"], TEXT["flops"], TEXT["seconds"]]
    )


OTHERS = "benchmarks.claims, benchmarks.state and benchmarks.attention"
BITS = "validation, bits per byte"
TEXT = {
    "tokens": Panel("tokens", "tokens", "bits", "training tokens", BITS),
    "flops": Panel("flops", "flops", "bits", "training FLOPs", BITS),
    "seconds": Panel("seconds", "seconds", "bits", "seconds of training", BITS),
}
CLAIMS = {
    claim.__name__: claim
    for claim in (copying, induction, recall, experts, depth, balance, presets)
}


# Changes to models, and further measurements of them.


def route_at_random(model: LM) -> None:
    """Choose the tokens of each mixture-of-depths group at random, during training and after it."""

    def select(
        self: MixtureOfDepths, scores: Tensor, decision: Tensor, positions: Tensor, context: Context
    ):
        present = positions >= 0
        chance = torch.rand(present.shape, device=present.device).masked_fill(~present, -1)
        index = chance.topk(self.routed(present.shape[1])).indices.sort(1).values
        return index, present.gather(1, index)

    for module in model.modules():
        if isinstance(module, MixtureOfDepths):
            module.select = MethodType(select, module)


def routes(model: LM, run: Run, device: torch.device) -> Iterator[dict[str, float]]:
    """The loss, decisions and speed of one trained mixture-of-depths, with its causal decision
    and with the top-k oracle."""
    groups = [module for module in model.modules() if isinstance(module, MixtureOfDepths)]
    data = open_data(run.data, run.context)
    if not groups or run.change is route_at_random:
        return
    for topk in (True, False):  # its own decision comes last, so that the model stays unchanged
        for group in groups:
            group.topk = topk
        start = time.perf_counter()
        bits = score(model, data, run.batch, SCORED)["bits"]
        speed = SCORED * run.batch * run.context / (time.perf_counter() - start)
        yield {
            "route": "topk" if topk else groups[0].options.route,
            "route_bits": bits,
            "route_tokens_per_second": speed,
            **{f"route_{name}": mean for name, mean in decisions(model, run, device).items()},
        }


@torch.no_grad()
def decisions(model: LM, run: Run, device: torch.device) -> dict[str, float]:
    """What mixture-of-depths observes on the evaluation batches: means over batches and layers."""
    record = Record()
    model.eval()
    for tokens, _ in open_data(run.data, run.context).validation(run.batch, SCORED):
        model(tokens.to(device), record=record)
    record.finish()
    model.train()
    return {
        name: torch.stack(seen).double().mean().item() for name, seen in record.observed.items()
    }


@dataclass(frozen=True)
class Options:
    """Train small models until they answer a question."""

    claim: tyro.conf.Positional[str]
    """copying, induction, recall, experts, depth, balance or presets"""
    size: str = "auto"
    """cpu, gpu, or auto, which follows the device"""
    seeds: int = 0
    """seeds of each model; 0: the claim's own number"""
    scale: float = 1.0
    """factor on the training steps"""
    impl: str = "auto"
    """auto, reference, torch or triton; on a GPU Mamba trains far faster with triton"""
    device: str = "auto"
    """auto, cpu or cuda"""
    out: Path = Path("runs/benchmarks")
    """folder for claim-NAME.jsonl"""


def main(options: Options) -> None:
    """Train, record, write, and print the result."""
    answer(options, CLAIMS)


def answer(options: Options, claims: Mapping[str, Callable[[bool], Claim]]) -> None:
    """Train the models of a claim, and write and print what was recorded."""
    if options.claim not in claims:
        accepted = f"{nearest(options.claim, claims)}; others are in {OTHERS}"
        raise InputError("claim", options.claim, accepted)
    if options.size not in ("auto", "cpu", "gpu"):
        raise InputError("size", options.size, "auto, cpu, gpu")
    if options.seeds < 0:
        raise InputError("seeds", options.seeds, "0 or more")
    if not 0 < options.scale < math.inf:
        raise InputError("scale", options.scale, "a positive number")
    device = pick_device(options.device)
    keep_freed_memory()
    small = options.size == "cpu" or (options.size == "auto" and device.type == "cpu")
    claim = claims[options.claim](small)
    choose(options.impl, "rmsnorm", device)
    for run in claim.runs:
        run.config = replace(run.config, impl=options.impl)
        run.steps = max(1, round(options.scale * run.steps))
    runs = [replace(run, lr=rate) for run in claim.runs for rate in claim.rates or (run.lr,)]
    seeds = range(options.seeds or claim.seeds)
    rows, out = [], options.out / f"claim-{options.claim}.jsonl"
    check_writable(out)
    tokens = sum(run.steps * run.batch * run.context for run in claim.runs)
    total = tokens * (len(seeds) - 1 + max(1, len(claim.rates)))
    with tqdm(total=total, unit="token", unit_scale=True, mininterval=1) as bar:
        for seed in seeds:
            for run in runs:
                bar.set_postfix_str(f"{run.model}, rate {run.lr}, seed {seed}")
                model, records = train(run, seed, claim.probes, device, bar)
                records += claim.at_end(model, run, device) if claim.at_end else ()
                shared = {
                    "benchmark": "claim", "claim": options.claim, "question": claim.question, "model": run.model, "seed": seed,
                    "size": "cpu" if small else "gpu", "layers": run.config.layers, "data": run.data, "lr": run.lr,
                }  # fmt: skip
                rows += rows_of(records, claim.panels, shared)
                write(out, rows, device)
            if claim.rates and seed == seeds[0]:
                drawn = [row for row in rows if row["x"] is not None]
                best = {(*model_of(row), row["lr"]) for row in at_best_rate(drawn)}
                runs = [run for run in runs if (run.model, run.config.layers, run.lr) in best]
    summarise(rows)
    print(f"written to {out}")


def rows_of(records: list[dict], panels: list[Panel], shared: dict) -> list[dict]:
    """One row for each point of each panel, and one for each record that appears in no picture."""
    rows = []
    for record in records:
        points = [
            {"panel": panel.name, "x": record[panel.x], "y": record[panel.y],
             "x_label": panel.x_label, "y_label": panel.y_label, "x_log": panel.x_log}
            for panel in panels if panel.x in record and panel.y in record
        ]  # fmt: skip
        rows += [{**shared, **record, **point} for point in points or [{"x": None}]]
    return rows


def summarise(rows: list[dict]) -> None:
    """Print the last point of each line, and what `routes` recorded, if anything."""
    print(table.claims(rows))
    for row in rows:
        if "route" in row and row["x"] is None:
            print("  " + ", ".join(f"{name} {row[name]:.3f}" if isinstance(row[name], float) else f"{name} {row[name]}"
                                   for name in row if name.startswith(("model", "seed", "route"))))  # fmt: skip


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
