"""Is each part as fast as it should be without a kernel of its own?

    python -m benchmarks.parts               all six questions, about six minutes on two CPU cores
    python -m benchmarks.parts --only scan   one of scan, delta_rule, linear_scan, moe, mod, trainer

- scan: the selective scan, forward and backward, against a loop over the tokens and against
  mambapy's parallel scan
- delta_rule: chunks, with one gate per head or per channel, with and without erasing, against a
  loop over the tokens and against PyTorch's fused causal attention with the same heads; time per
  token; memory
- linear_scan: against a loop over the tokens
- moe: routed experts against a dense MLP of equal active FLOPs, and against the loop over experts
- mod: a training step of mixture-of-depths against the dense model, compared with the speed-up that
  its FLOPs promise; and the share of routing, gathering and scattering in a wrapped block, which is
  all that a kernel could save
- trainer: tokens per second of the whole training step of a small transformer, where overhead
  counts, also compiled; and the same for GPT-2
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from minimodels import LM, Config, InputError
from minimodels.architectures.mamba import recurrence
from minimodels.architectures.moe import MoE
from minimodels.architectures.transformer import SwiGLU
from minimodels.command import keep_freed_memory, parse_options, pick_device, run_command
from minimodels.context import Context
from minimodels.ledger import ledger
from minimodels.measure import check_writable, interleave, peak_memory, per_second, ratio, write
from minimodels.ops.delta_rule import delta_rule
from minimodels.ops.linear_scan import linear_scan
from minimodels.ops.scan import scan
from minimodels.training.optim import adamw
from minimodels.training.step import training_step

from .gpt import GPT
from .training import CLIP, precision

CPU = torch.device("cpu")


def scan_inputs(
    T: int, device: torch.device = CPU, D: int = 512, N: int = 16, batch: int = 1
) -> list[torch.Tensor]:
    """x, Δ, A, B, C and a state of zeros for the selective scan, all with gradients."""
    g = torch.Generator().manual_seed(0)
    x, delta = torch.randn(2, batch, T, D, generator=g)
    B, C = torch.randn(2, batch, T, N, generator=g)
    A = -torch.arange(1, N + 1).float().repeat(D, 1)
    inputs = [x, F.softplus(delta - 3), A, B, C, torch.zeros(batch, D, N)]
    return [tensor.to(device).requires_grad_() for tensor in inputs]


def mambapy_scan(x, delta, A, B, C, state):
    """The same function with mambapy's parallel scan, whose states start from zero."""
    from mambapy.pscan import pscan

    decay = torch.exp(delta.unsqueeze(-1) * A)  # (B, T, D, N)
    states = pscan(decay, (delta * x).unsqueeze(-1) * B.unsqueeze(2))
    return (states @ C.unsqueeze(-1)).squeeze(-1), states[:, -1]


PROVIDERS = {"scan": scan, "loop": recurrence, "mambapy": mambapy_scan}


def both_ways(provider: str, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Forward and backward of the scan; returns its output."""
    for tensor in inputs:
        tensor.grad = None
    y, _ = PROVIDERS[provider](*inputs)
    y.backward(inputs[0].detach())
    return y


def gradients(provider: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of the inputs."""
    y = both_ways(provider, inputs)
    return [y.detach(), *(tensor.grad for tensor in inputs[:-1])]  # mambapy has no initial state


def scan_once(provider: str, T: int) -> None:
    """The scan once, on new inputs, to measure its memory."""
    both_ways(provider, scan_inputs(T))


def measure_scan(device: torch.device) -> Iterator[dict]:
    """Measure in a plain process first, as anyone would run it. Then keep freed memory, as train.py
    does, which helps all three."""
    names = [name for name in PROVIDERS if name != "mambapy" or importlib.util.find_spec("mambapy")]
    if len(names) < len(PROVIDERS):
        print("mambapy is not installed: skipped (pip install mambapy)")
    print("selective scan, forward + backward, batch 1, D 512, N 16, fp32")
    for kept in (False, True):
        if kept:
            keep_freed_memory()
        print("  with freed memory kept" if kept else "  in a plain process")
        for T in (256, 1024, 4096):
            inputs = scan_inputs(T, device)
            expected = gradients("loop", inputs)
            for name in names:
                for actual, wanted in zip(gradients(name, inputs), expected, strict=True):
                    torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=2e-2)
            timings = interleave({name: partial(both_ways, name, inputs) for name in names})
            cells = [f"{name} {statistics.median(timings[name]) * 1e3:.1f} ms" for name in names]
            cells += [f"{m:.2f}x {name} ({low:.2f}-{high:.2f})"
                      for name in names[1:] for m, low, high in [ratio(timings, "scan", name)]]  # fmt: skip
            print(f"    T {T:5}: " + ", ".join(cells))
            yield from [
                {"part": "scan", "kept": kept, "T": T, "provider": n, "seconds": timings[n]}
                for n in names
            ]
    lengths = (512, 1024, 2048, 4096, 8192)
    timings = interleave(
        {str(T): partial(both_ways, "scan", scan_inputs(T, device)) for T in lengths}
    )
    # the minimum, because other work on the machine disturbs it least
    per_token = {T: min(timings[str(T)]) * 1e6 / T for T in lengths}
    print(
        "  microseconds per token: "
        + ", ".join(f"{value:.1f} at {T}" for T, value in per_token.items())
    )
    yield from [
        {"part": "scan linearity", "T": T, "provider": "scan", "seconds": timings[str(T)]}
        for T in lengths
    ]
    for T in (1024, 4096) if device == CPU else ():
        memory = {name: peak_memory(partial(scan_once, name, T)) for name in names}
        print(
            f"  peak memory at T {T}: "
            + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in memory.items())
        )
        yield from [
            {"part": "scan memory", "T": T, "provider": name, "bytes": size}
            for name, size in memory.items()
        ]


RULES = {  # whether there is a gate for each channel, and whether tokens erase
    "decay": (False, False),
    "delta": (False, True),
    "decay of channels": (True, False),
    "delta, decay of channels": (True, True),
}


def delta_inputs(
    rule: str, T: int, device: torch.device = CPU, H: int = 8, K: int = 64
) -> list[torch.Tensor | None]:
    """q, k, v, g and e of a DeltaNet with rates in (0, 1) and keys of length 1."""
    vector, erase = RULES[rule]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, T, H, K, generator=generator)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta = torch.rand(1, T, H, 1, generator=generator)
    g = -0.1 * torch.rand(1, T, H, *([K] if vector else []), generator=generator)
    inputs = [q, k, beta * v, g, beta * k if erase else None]
    return [part if part is None else part.to(device).requires_grad_() for part in inputs]


def train_rule(inputs: list[torch.Tensor | None], impl: str = "torch") -> list[torch.Tensor]:
    """Forward and backward: y and the gradients."""
    y, _ = delta_rule(*inputs, impl=impl)
    wanted = [part for part in inputs if part is not None]
    return [y, *torch.autograd.grad(y, wanted, inputs[2].detach())]


def train_attention(inputs: list[torch.Tensor]) -> None:
    """Forward and backward of PyTorch's fused causal attention."""
    y = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.autograd.grad(y, inputs, inputs[2].detach())


def rule_once(rule: str, impl: str, T: int) -> None:
    """The delta rule once, on new inputs, to measure its memory."""
    train_rule(delta_inputs(rule, T), impl)


def attention_inputs(T: int, device: torch.device = CPU) -> list[torch.Tensor]:
    """q, k and v (B, H, T, d) of causal attention."""
    parts = delta_inputs("decay", T, device)[:3]
    return [part.detach().transpose(1, 2).contiguous().requires_grad_() for part in parts]


def attention_once(T: int) -> None:
    """Attention once, on new inputs, to measure its memory."""
    train_attention(attention_inputs(T))


def measure_delta_rule(device: torch.device) -> Iterator[dict]:
    """The delta rule, the loop over the tokens, and attention: times,
    times per token, and memory."""
    print("delta rule, forward + backward, batch 1, 8 heads, keys and values of 64, fp32")
    attention = {T: partial(train_attention, attention_inputs(T, device)) for T in (1024, 4096)}
    for T in (1024, 4096):
        for rule in RULES:
            inputs = delta_inputs(rule, T, device)
            providers = {"chunks": partial(train_rule, inputs), "attention": attention[T]}
            if T == 1024:
                providers["loop"] = partial(train_rule, inputs, "reference")
                results = zip(providers["chunks"](), providers["loop"](), strict=True)
                for actual, wanted in results:
                    torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)
            timings = interleave(providers)
            cells = [f"{n} {statistics.median(s) * 1e3:.1f} ms" for n, s in timings.items()]
            cells += [f"{m:.2f}x {name} ({low:.2f}-{high:.2f})"
                      for name in providers if name != "chunks"
                      for m, low, high in [ratio(timings, "chunks", name)]]  # fmt: skip
            print(f"  T {T:5}, {rule:25} " + ", ".join(cells))
            yield from [
                {"part": "delta rule", "rule": rule, "T": T, "provider": n, "seconds": s}
                for n, s in timings.items()
            ]
    lengths = (1024, 2048, 4096, 8192)
    for rule in RULES:
        timings = interleave(
            {str(T): partial(train_rule, delta_inputs(rule, T, device)) for T in lengths}
        )
        cells = [f"{min(timings[str(T)]) * 1e6 / T:.1f} at {T}" for T in lengths]
        print(f"  {rule:25} microseconds per token: " + ", ".join(cells))
        yield from [
            {"part": "delta rule linearity", "rule": rule, "T": T, "provider": "chunks",
             "seconds": timings[str(T)]}
            for T in lengths
        ]  # fmt: skip
    if device != CPU:
        return
    T = 4096
    calls = {f"{rule}, chunks": partial(rule_once, rule, "torch", T) for rule in RULES}
    calls |= {
        f"{rule}, loop": partial(rule_once, rule, "reference", T) for rule in ("decay", "delta")
    }
    calls["attention"] = partial(attention_once, T)
    sizes = {name: peak_memory(call) for name, call in calls.items()}
    print(
        f"  peak memory at T {T}, the inputs included: "
        + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items())
    )
    yield from [
        {"part": "delta rule memory", "T": T, "provider": name, "bytes": size}
        for name, size in sizes.items()
    ]


def measure_linear_scan(device: torch.device) -> Iterator[dict]:
    """The linear scan and the loop over the tokens."""
    print("linear scan, forward + backward, batch 1, fp32")
    for T, D in ((1024, 512), (4096, 512), (4096, 2048)):
        generator = torch.Generator().manual_seed(0)
        a, x = torch.rand(1, T, D, generator=generator), torch.randn(1, T, D, generator=generator)
        a, x = a.to(device).requires_grad_(), x.to(device).requires_grad_()

        def both_passes(impl, a=a, x=x):
            h, _ = linear_scan(a, x, impl=impl)
            return [h, *torch.autograd.grad(h, (a, x), x.detach())]

        calls = {"pieces": partial(both_passes, "torch"), "loop": partial(both_passes, "reference")}
        for actual, wanted in zip(*(call() for call in calls.values()), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)
        timings = interleave(calls)
        median, low, high = ratio(timings, "pieces", "loop")
        print(
            f"  T {T:5}, D {D:5}: {statistics.median(timings['pieces']) * 1e3:.1f} ms, "
            f"{median:.2f}x loop ({low:.2f}-{high:.2f})"
        )
        yield from [
            {"part": "linear scan", "T": T, "D": D, "provider": name, "seconds": seconds}
            for name, seconds in timings.items()
        ]


def measure_moe(device: torch.device) -> list[dict]:
    """Routed experts, a dense MLP of equal active FLOPs, and the loop over experts."""
    config, options = Config(width=512), MoE.Options(experts=8, experts_per_token=2)
    x = torch.randn(8, 512, 512, device=device, requires_grad=True)
    gradient = torch.randn_like(x)
    layers = {
        "dense": SwiGLU(SwiGLU.Options(), config),
        "routed": MoE(options, config),
        "loop": MoE(options, replace(config, impl="reference")),
    }
    layers = {name: layer.to(device) for name, layer in layers.items()}
    layers["loop"].load_state_dict(layers["routed"].state_dict())
    torch.testing.assert_close(layers["routed"](x)[0], layers["loop"](x)[0], rtol=1e-3, atol=1e-4)
    timings = interleave(
        {name: lambda layer=layer: layer(x)[0].backward(gradient) for name, layer in layers.items()}
    )
    print("experts, forward + backward, E 8, K 2, 4096 tokens, D 512, fp32")
    for name in ("routed", "loop"):
        median, low, high = ratio(timings, name, "dense")
        print(f"{name:>8}: {median:.2f}x a dense MLP of equal active FLOPs ({low:.2f}-{high:.2f})")
    return [
        {"part": "moe", "provider": name, "seconds": seconds} for name, seconds in timings.items()
    ]


def measure_mod(device: torch.device) -> Iterator[dict]:
    """Training steps of mixture-of-depths and of the dense model, and the
    parts of a wrapped block."""
    width, tokens = (256, 8192) if device == CPU else (768, 32768)
    print(f"mixture-of-depths, training step, 6 layers, d {width}, {tokens} tokens, capacity 0.125")
    for T in (256, 1024):
        torch.manual_seed(0)
        configs = {
            "dense": Config(width=width, layers="(attention mlp)*6"),
            "mod": Config(width=width, layers="(attention mlp mod(attention mlp))*3"),
        }
        # a causal query sees half of the T keys on average, and attention's kernel computes few
        # others; the ledger counts all T keys, so at T/2 it counts as many as are seen
        every, seen = (
            ledger(configs["dense"], t).forward_flops / ledger(configs["mod"], t).forward_flops
            for t in (T, T // 2)
        )
        steps = {
            name: train_step(LM(config), tokens // T, T, device) for name, config in configs.items()
        }
        timings = interleave(steps, rounds=15)
        median, low, high = ratio(timings, "mod", "dense")
        print(
            f"  T {T:5}: {median:.2f}x the dense model ({low:.2f}-{high:.2f}); its FLOPs promise {every:.2f}x with all keys, "
            f"{seen:.2f}x with those that are seen: {median / every:.0%} and {median / seen:.0%}"
        )
        promised = {"promised": every, "promised_causal": seen}
        yield from [
            {"part": "mod", "T": T, "provider": name, "seconds": s, **promised}
            for name, s in timings.items()
        ]
        timings = interleave(wrapped_block(width, tokens // T, T, device))
        bare, low, high = ratio(timings, "block", "group alone")
        print(
            f"  T {T:5}: routing, gathering and scattering are {1 - bare:.0%} of a block ({1 - high:.0%} to {1 - low:.0%})"
        )
        yield from [
            {"part": "mod block", "T": T, "provider": name, "seconds": seconds}
            for name, seconds in timings.items()
        ]


def wrapped_block(width: int, batch: int, T: int, device: torch.device) -> dict:
    """Forward and backward of a block in mixture-of-depths, and of its group alone, on the
    tokens that it would get."""
    torch.manual_seed(0)
    (block,) = LM(Config(width=width, layers="mod(attention mlp)")).to(device).layers
    k = block.routed(T)
    every, chosen = (
        torch.randn(batch, length, width, device=device, requires_grad=True) for length in (T, k)
    )
    positions = torch.rand(batch, T, device=device).argsort(1)[:, :k].sort(1).values

    def both_passes(module, *arguments):
        with torch.autocast(device.type, torch.bfloat16, enabled=device != CPU):
            y, _ = module(*arguments)
        y.sum().backward()

    return {
        "block": partial(both_passes, block, every),
        # a new context for each call, because a context keeps the angles of its positions
        "group alone": lambda: both_passes(block.group, chosen, None, Context(positions)),
    }


def measure_trainer(device: torch.device) -> list[dict]:
    """Tokens per second of the whole training step: ours and GPT-2's, each also compiled."""
    torch.manual_seed(0)
    config = Config(width=128, layers="(attention(heads=4) mlp)*4", vocab=65)
    square = torch.randn(2048, 2048, device=device, dtype=None if device == CPU else torch.bfloat16)
    models = {"ours": LM(config), "GPT-2": GPT(config, heads=4, context=64)}
    providers = {name: train_step(model, 12, 64, device) for name, model in models.items()}
    providers |= {
        f"{name}, compiled": train_step(model, 12, 64, device, True)
        for name, model in models.items()
    }
    timings = interleave({**providers, "matrix product": lambda: square @ square}, rounds=15)
    ceiling = per_second(2 * 2048**3, timings["matrix product"])
    print(
        f"trainer, whole step, 4 layers, d 128, 4 heads, context 64, batch 12, {'fp32' if device == CPU else 'bf16'}"
    )
    for name in providers:
        speeds = [12 * 64 / seconds for seconds in timings[name]]
        print(
            f"  {name:15} {per_second(12 * 64, timings[name]):,.0f} tokens/s ({min(speeds):,.0f}-{max(speeds):,.0f})"
        )
    flops = ledger(config, 64).training_flops * 12 * 64
    share = per_second(flops, timings["ours, compiled"]) / ceiling
    print(
        f"  ours, compiled: {share:.0%} of the rate of this machine's matrix product, {ceiling / 1e9:.0f} GFLOP/s"
    )
    return [
        {"part": "trainer", "provider": name, "seconds": seconds}
        for name, seconds in timings.items()
    ]


def train_step(model: LM | GPT, batch: int, T: int, device: torch.device, compiled: bool = False):
    """A closure that makes one training step of the model on random tokens, as train.py
    does; on a GPU in bf16."""
    model.to(device)
    optimizer = adamw(model, 1e-4, 0.1)
    loss_function = torch.compile(model.loss, fullgraph=True) if compiled else model.loss
    tokens = torch.randint(model.embedding.num_embeddings, (batch, T + 1), device=device)
    batches, autocast = [(tokens[:, :-1], tokens[:, 1:])], precision(device)
    return partial(training_step, model, optimizer, batches, autocast, CLIP, loss_function)


QUESTIONS = {
    "scan": measure_scan,
    "delta_rule": measure_delta_rule,
    "linear_scan": measure_linear_scan,
    "moe": measure_moe,
    "mod": measure_mod,
    "trainer": measure_trainer,
}


@dataclass(frozen=True)
class Options:
    """Time the parts in turn."""

    only: str = ""
    """one question: scan, delta_rule, linear_scan, moe, mod or trainer; all by default"""
    device: str = "cpu"
    """auto, cpu or cuda"""
    out: Path = Path("runs/benchmarks/parts.jsonl")
    """file for the JSON rows"""


def main(options: Options) -> None:
    """Measure, print and write."""
    if options.only and options.only not in QUESTIONS:
        raise InputError("only", options.only, ", ".join(QUESTIONS))
    rows, device = [], pick_device(options.device)
    check_writable(options.out)
    for name, measure in QUESTIONS.items():
        if options.only in ("", name):
            if name != "scan":  # scan measures both ways
                keep_freed_memory()  # for every provider, as train.py does
            precision = {} if name in ("mod", "trainer") else {"dtype": "float32"}
            for row in measure(device):
                rows.append({"benchmark": "parts", **precision, **row})
                write(options.out, rows, device)
    print(f"written to {options.out}")


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
