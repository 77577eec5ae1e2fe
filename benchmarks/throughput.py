"""How fast is each architecture as the context grows, and from which context on does it beat the
transformer?

    python -m benchmarks.throughput    every preset: training step, prefill and decode
    python -m benchmarks.throughput --models transformer mamba --modes train --longest 16384
    python -m benchmarks.throughput --layers "mamba attention(window=128) mlp" --impl reference torch
    python -m benchmarks.throughput --models transformer --modes train --impl flash triton --compile

Models are matched on one axis (`--match`): each gets the width at which it has the transformer's
parameters, active parameters or FLOPs per token. Contexts double from 256. The number of tokens per
step is constant, so a longer context means fewer sequences, down to one. The models are timed in
turn, and the first of them twice, which shows the noise. The share of the matrix products counts
the ledger's FLOPs, in which a query sees every key, so a causal attention may exceed 100 %. If a
model does not fit in memory, that is a result too. In prefill and decoding, mixture-of-depths takes
its share of the tokens at random, because an untrained router would take any number. If several
paths are given, each model is timed with each path, and the crossover compares the fastest paths of
both models.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch

from minimodels import LM, Config, InputError, preset
from minimodels.architectures.registry import LAYERS
from minimodels.command import (
    has_bfloat16,
    keep_freed_memory,
    parse_options,
    pick_device,
    require_compiler,
    run_command,
)
from minimodels.decoding import has_graphs
from minimodels.grammar import Call, names_in, parse, set_options
from minimodels.ledger import Ledger, ledger
from minimodels.measure import (
    ceilings,
    check_writable,
    interleave,
    peak_bytes,
    per_second,
    synchronise,
    write,
)
from minimodels.options import read_options
from minimodels.paths import choose
from minimodels.presets import MAIN, PRESETS, fitted

from .crossover import overtaking, sentence
from .modes import BACKENDS, DECODED, MODES, Provider, run

AXES: dict[str, Callable[[Ledger], float]] = {
    "parameters": lambda cost: cost.parameters,
    "active": lambda cost: cost.active,
    "flops": lambda cost: cost.forward_flops,
}
FIRST = 256  # the context at which the models are matched, and the shortest unless another is given
HEADS = {  # layer -> options whose default is width / heads
    "attention": ("head_dim",),
    "retention": ("head_dim", "value_dim"),
    "deltanet": ("head_dim",),
}


@dataclass(frozen=True)
class Options:
    """Time whole models against the length of their context."""

    models: tuple[str, ...] = MAIN
    """presets"""
    layers: tuple[str, ...] = ()
    """further models, as layers in the grammar"""
    size: str = "tiny"
    """tiny or small"""
    match: str = "active"
    """axis on which the models are made equal: parameters, active, flops, or none"""
    modes: tuple[str, ...] = ("train", "prefill", "decode")
    """train (a whole step), prefill (the state of a prompt), decode (further tokens one by one,
    with batch 1 and `decode_batch`)"""
    shortest: int = FIRST
    """first context"""
    longest: int = 0
    """last context; 0: 4096 on a CPU, 1,048,576 on a GPU"""
    tokens: int = 0
    """tokens of a training step or prefill; 0: 4096 on a CPU, 65,536 on a GPU"""
    decode_batch: int = 8
    """sequences decoded at once, in addition to one alone"""
    rounds: int = 2
    """timings of each point in a sweep"""
    sweeps: int = 3
    """number of sweeps over all points, because a shared machine may be slower for some minutes"""
    patience: float = 20.0
    """seconds; a model that takes longer is not tried at longer contexts"""
    impl: tuple[str, ...] = ("auto",)
    """paths to compare: auto, reference, torch, triton; on a GPU also flash and cudnn, which are
    torch with that attention"""
    compile: bool = False
    """also time the training step with torch.compile, and decoding with a state of fixed size that
    is written in place; on a GPU this is a CUDA graph, which avoids launching each kernel"""
    device: str = "auto"
    """auto, cpu or cuda"""
    out: Path = Path("runs/benchmarks/throughput.jsonl")
    """file for the JSON rows, rewritten after each point"""


def main(options: Options) -> None:
    """Measure, print and write each context as soon as it is done."""
    device = check(options)
    configs = matched(options)
    keep_freed_memory()
    gpu = device.type == "cuda"
    longest, tokens = (
        options.longest or longest_on(device),
        options.tokens or (65536 if gpu else 4096),
    )
    limits = ceilings(device)
    print(f"matrix products {limits['TFLOP/s']:.3g} TFLOP/s, copying {limits['GB/s']:.0f} GB/s")
    rows: dict[tuple, dict] = {}  # mode, batch, context, model -> its row
    timings: dict[tuple, list[float]] = defaultdict(list)  # of all sweeps
    for sweep in range(options.sweeps):
        for mode, batch in measurements(options):
            # what does not fit, or takes too long, is not tried at twice the context
            alive = providers(configs, options, mode)
            for context in contexts(options.shortest, longest):
                given = alive
                if sweep:  # the same points again
                    given = {
                        name: alive[name]
                        for name in alive
                        if timings.get((mode, batch, context, name))
                    }
                if not given:
                    break
                for row in measure_point(
                    mode, given, context, batch or max(1, tokens // context), options, device
                ):
                    row |= {"limit": limits["TFLOP/s"] * 1e12}
                    print(describe(row), flush=True)
                    key, seconds = (mode, batch, context, row["model"]), row["seconds"]
                    if not sweep and (
                        seconds is None or statistics.median(seconds) > options.patience
                    ):
                        alive.pop(row["model"].removesuffix(" again"), None)
                    timings[key] += seconds or []
                    rows[key] = row | {"seconds": timings[key] or None}
                write(options.out, list(rows.values()), device)
    for mode, batch in measurements(options):
        if found := overtaking([row for key, row in rows.items() if key[:2] == (mode, batch)]):
            print(f"{mode}{f', batch {batch}' if batch else ''}: {sentence(found)}")
    print(f"written to {options.out}")


def check(options: Options) -> torch.device:
    """The device. Raises InputError for options that cannot run on it."""
    for mode in options.modes:
        if mode not in MODES:
            raise InputError("modes", mode, ", ".join(MODES))
    if options.match not in (*AXES, "none"):
        raise InputError("match", options.match, ", ".join([*AXES, "none"]))
    for name in ("longest", "tokens"):
        if getattr(options, name) < 0:
            raise InputError(name, getattr(options, name), "0 or more")
    if options.shortest > (options.longest or longest_on(pick_device(options.device))):
        raise InputError("longest", options.longest or "auto", f"{options.shortest} or more")
    for name in ("rounds", "sweeps", "decode_batch", "shortest"):
        if getattr(options, name) < 1:
            raise InputError(name, getattr(options, name), "1 or more")
    for name, given, accepted in (
        ("models", options.models + options.layers, PRESETS),
        ("modes", options.modes, MODES),
    ):
        if not given:
            raise InputError(name, "", ", ".join(accepted))
    device = pick_device(options.device)
    for impl in options.impl:
        if impl not in BACKENDS:
            choose(impl, "rmsnorm", device)
        elif device.type != "cuda":
            raise InputError(
                "impl", impl, f"auto, reference or torch, because the device is {device.type}"
            )
    if not options.impl:
        raise InputError("impl", "", ", ".join(["auto, reference, torch, triton", *BACKENDS]))
    if options.compile:
        require_compiler(device)
    check_writable(options.out)
    return device


def longest_on(device: torch.device) -> int:
    """The longest context by default."""
    return 2**20 if device.type == "cuda" else 4096


def measurements(options: Options) -> list[tuple[str, int]]:
    """The modes, each with its number of sequences; 0 if the number of tokens is given instead."""
    batches = {"decode": sorted({1, options.decode_batch})}
    return [(mode, batch) for mode in options.modes for batch in batches.get(mode, [0])]


def contexts(shortest: int, longest: int) -> list[int]:
    """The contexts, each twice the one before."""
    return [shortest * 2**i for i in range(int(math.log2(longest / shortest)) + 1)]


def providers(configs: dict[str, Config], options: Options, mode: str) -> dict[str, Provider]:
    """Every model with every path. If there are several ways, the name says which."""
    found = {}
    suffixes = {
        "train": " compiled",
        "decode": " as a graph" if has_graphs(pick_device(options.device)) else " in place",
    }
    for compiled in (False, True) if options.compile and mode in suffixes else (False,):
        for impl in options.impl:
            for base, config in configs.items():
                names = names_in(parse(config.layers))
                if impl in BACKENDS and "attention" not in names:
                    continue
                # no fixed step for layers that wait for values, or for backends without its mask
                waiting = {"mod", "learned_positions", *(() if impl == "triton" else ("moe",))}
                if compiled and mode == "decode" and (waiting & names or impl in BACKENDS):
                    continue
                path = f", {impl}" if len(options.impl) > 1 else ""
                way = path + (suffixes.get(mode, "") if compiled else "")
                config = replace(config, impl="torch" if impl in BACKENDS else impl)
                found[base + way] = Provider(base, config, impl, compiled)
    return found


def matched(options: Options) -> dict[str, Config]:
    """The models by name, each with the width at which it costs as much as the transformer on the
    axis. Prints a table of their costs."""
    base = preset("transformer", options.size)
    configs = {name: preset(name, options.size) for name in options.models}
    for layers in options.layers:
        configs[layers] = replace(base, layers=fitted(layers, options.size))
    if options.match != "none":
        configs = {
            name: match(config, base, AXES[options.match]) for name, config in configs.items()
        }
    print(f"matched on {options.match}" if options.match != "none" else "not matched")
    for name, config in configs.items():
        print(f"  {name:12} width {config.width}: {ledger(config, FIRST)}")
    return configs


def match(config: Config, base: Config, axis: Callable[[Ledger], float]) -> Config:
    """The width, a multiple of 8, at which the model is closest to the base on the axis.

    The heads keep their size, and the rank of Mamba's step size is a multiple of 8 too, because
    tensor cores need that. Widths that one of the layers does not accept are left out. Raises
    InputError if no width is accepted.
    """
    target, config = axis(ledger(base, FIRST)), keep_heads(config)
    widths, refusals = range(8, 4 * base.width + 1, 8), []

    @cache
    def cost(width: int) -> float | None:
        try:
            return axis(ledger(at_width(config, width), FIRST))
        except InputError as error:
            refusals.append(error)
            return None

    def next_cost(width: int) -> float:
        """The cost at the first accepted width from this one on. Costs grow with the width."""
        costs = map(cost, range(width, widths.stop, 8))
        return next((found for found in costs if found is not None), math.inf)

    first = bisect_left(widths, target, key=next_cost)
    sides = (reversed(widths[:first]), widths[first:])
    nearest = [next((width for width in side if cost(width) is not None), None) for side in sides]
    candidates = [width for width in nearest if width is not None]
    if not candidates:
        raise refusals[0]
    return at_width(config, min(candidates, key=lambda width: abs(cost(width) - target)))


def keep_heads(config: Config) -> Config:
    """The model with the sizes of its heads written in its text, so that they stay
    the same at another width."""
    layers = config.layers
    for name, sizes in HEADS.items():
        calls = [call for call in every_call(config.calls) if call.name == name]
        options = [read_options(LAYERS[name].Options, call, config.layers) for call in calls]
        for size in sizes:
            heads = {each.heads for each in options if getattr(each, size) is None}
            if len(heads) > 1:
                accepted = f"the same number in each layer, {size} in each, or --match none"
                raise InputError(f"layers: {name}.heads", sorted(heads), accepted)
            settings = [f"{name}.{size}={config.width // count}" for count in heads]
            layers = set_options(layers, settings, missing=True)
    return replace(config, layers=layers)


def every_call(calls: tuple[Call, ...]) -> list[Call]:
    """The calls, including those inside wrappers."""
    return [found for call in calls for found in (call, *every_call(call.layers))]


def at_width(config: Config, width: int) -> Config:
    """The model at another width."""
    ranks = [f"mamba.rank={8 * -(-width // 128)}"] * ("mamba" in names_in(parse(config.layers)))
    return replace(config, width=width, layers=set_options(config.layers, ranks))


def measure_point(
    mode: str,
    given: dict[str, Provider],
    context: int,
    batch: int,
    options: Options,
    device: torch.device,
):
    """Rows of all providers at one context. They are timed in turn, or each alone if they do not
    fit into memory together. If one does not fit or cannot run, its `seconds` are None and
    `error` gives the reason."""
    rows = {
        name: describe_point(mode, name, provider, context, batch, options)
        for name, provider in given.items()
    }
    again = next(iter(given))
    if error := fill(rows, given, again, mode, context, batch, options, device):
        for name, provider in given.items():
            if len(given) > 1:
                error = fill(rows, {name: provider}, again, mode, context, batch, options, device)
            rows[name] |= {"alone": len(given) > 1, "error": error}
    return list(rows.values())


def fill(rows: dict[str, dict], given: dict[str, Provider], *point) -> str:
    """Put the measurements into the rows, and return what went wrong, if anything:
    usually too little memory."""
    try:
        measured = timed(given, *point)
    except Exception as error:  # errors of Triton have no common base class
        synchronise()  # raises if the GPU is lost to this process
        return (str(error).splitlines() or ["out of memory"])[0]
    for name, (seconds, peak) in measured.items():
        rows[name] = {
            **rows[name.removesuffix(" again")],
            "model": name,
            "seconds": seconds,
            "peak_bytes": peak,
        }
    return ""


def describe_point(
    mode: str, name: str, provider: Provider, context: int, batch: int, options: Options
) -> dict:
    """What is known of a point before it is measured."""
    itemsize = 2 if has_bfloat16(pick_device(options.device)) else 4
    config = provider.config
    cost = cost_of(replace(config, impl="auto"), context, itemsize)  # counted once for all paths
    return {
        "benchmark": "throughput", "mode": mode, "model": name, "base": provider.base, "impl": provider.impl,
        "compiled": provider.compiled, "layers": config.layers, "width": config.width, "match": options.match,
        "context": context, "batch": batch, "parameters": cost.parameters, "active": cost.active,
        "state_bytes": cost.state_bytes, "tokens": batch * (DECODED if mode == "decode" else context),
        "flops": cost.training_flops if mode == "train" else cost.forward_flops, "seconds": None, "peak_bytes": None,
    }  # fmt: skip


cost_of = cache(ledger)


def timed(
    given: dict[str, Provider],
    again: str,
    mode: str,
    context: int,
    batch: int,
    options: Options,
    device: torch.device,
) -> dict:
    """Seconds of each round, and peak memory in bytes, of each provider, and once more
    of the one named `again`."""
    calls, peaks = {}, {}
    for name, provider in given.items():
        torch.manual_seed(0)
        with device:
            model = LM(provider.config)
        calls[name] = partial(run, provider.impl, MODES[mode](model, context, batch, provider))
        calls[name]()
        graph = provider.compiled and mode == "decode"  # its memory was allocated before
        peaks[name] = None if graph else peak_bytes(calls[name], device)
    if again in given:
        calls[f"{again} again"], peaks[f"{again} again"] = calls[again], peaks[again]
    return {
        name: (seconds, peaks[name])
        for name, seconds in interleave(calls, options.rounds, 0.1, warm=False).items()
    }


def describe(row: dict) -> str:
    """A point as one line of text."""
    place = f"{row['mode']:8} context {row['context']:8,} x {row['batch']:<4} {row['model']:18}"
    if row["seconds"] is None:
        return f"{place} {row['error']}"
    speed = per_second(row["tokens"], row["seconds"])
    slowest, fastest = (row["tokens"] / extreme(row["seconds"]) for extreme in (max, min))
    text = f"{place} {speed:12,.0f} tokens/s ({slowest:,.0f}-{fastest:,.0f})"
    if row["mode"] == "decode":
        text += f", {statistics.median(row['seconds']) * 1e3 / DECODED:.3f} ms a token"
    else:
        text += f", {speed * row['flops'] / row['limit']:.0%} of the matrix products"
    memory = f", peak {row['peak_bytes'] / 2**20:,.0f} MiB" if row["peak_bytes"] is not None else ""
    return text + memory + f", state {row['state_bytes'] / 1024:,.0f} KiB a sequence"


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
