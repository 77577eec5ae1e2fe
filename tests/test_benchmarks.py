"""The benchmarks at tiny sizes: they run, their rows have what plots need, and results
computed from rows are right."""

import functools
import importlib
import itertools
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tyro
from models import scored
from tqdm import tqdm

from benchmarks import all as everything
from benchmarks import (
    claims,
    curves,
    gpt,
    kernels,
    modes,
    parts,
    peers,
    plot,
    positions,
    routing,
    s4d,
    steps,
    table,
    throughput,
    training,
)
from benchmarks.crossover import crossover, overtaking, sentence
from minimodels import LM, Config, InputError, measure, preset
from minimodels.context import Record
from minimodels.data.text import open_data
from minimodels.data.tokenizer import Bytes
from minimodels.decoding import ROOM
from minimodels.ledger import ledger
from minimodels.measure import interleave, ratio
from minimodels.ops.convolution import causal_conv1d
from minimodels.training.checkpoint import save_model


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_crossover_is_where_the_ratio_rises_through_one():
    contexts = [256, 512, 1024, 2048]
    even = crossover(contexts, [[0.5, 0.5], [math.sqrt(0.5)] * 2, [1.0, 1.0], [2.0, 2.0]])
    assert (even.median, even.low, even.high) == (1024, 1024, 1024)
    between = crossover(contexts, [[0.5] * 3, [0.5] * 3, [2.0] * 3, [4.0] * 3])
    # half way between 1/2 and 2, in logarithms
    assert between.median == pytest.approx(512 * math.sqrt(2))
    spread = crossover(
        contexts, [[0.5, 0.5, 0.5], [0.5, 0.9, 0.5], [2.0, 1.1, 4.0], [4.0, 4.0, 4.0]]
    )
    assert spread.low < spread.median < spread.high


def test_a_sentence_says_who_is_faster_and_from_where():
    texts = {
        "sooner": crossover([256, 512], [[0.5, 0.5], [2.0, 2.0]]),
        "slow": crossover([256, 512], [[0.5], [0.6]]),
        "also slow": crossover([256, 512], [[0.4], [0.4]]),
        "fast": crossover([256, 512], [[2.0], [3.0]]),
        "at first": crossover([256, 512, 1024], [[2.0], [2.0], [0.5]]),
        "mostly": crossover([256, 512], [[0.5, 0.5, 2.0], [2.0, 2.0, 2.0]]),
        "hardly": crossover([256, 512], [[0.5, 0.5, 0.5], [2.0, 2.0, 0.5]]),
    }
    assert sentence(texts).replace("\xa0", " ") == (
        "Faster than the transformer: sooner from 362 on (362-362), mostly from 362 on (256-362), "
        "hardly from 362 on (362-above 512); slow, also slow nowhere from "
        "256 to 512; fast everywhere from 256 to 512; at first in parts, but not at 1,024"
    )
    assert sentence({}) == ""


def test_the_crossover_is_that_of_the_fastest_way_of_either():
    rows = []
    for context, times in {
        256: (1.0, 2.0, 3.0),
        512: (2.0, 1.0, 4.0),
        1024: (8.0, 4.0, 2.0),
    }.items():
        for name, base, seconds in zip(
            ("t", "t compiled", "m"), ("transformer", "transformer", "mamba"), times, strict=True
        ):
            rows.append(
                {"model": name, "base": base, "context": context, "seconds": [seconds, seconds]}
            )
    # a model timed again only shows the noise
    rows.append({"model": "t again", "base": "transformer", "context": 1024, "seconds": [0.1, 0.1]})
    assert overtaking(rows)["mamba"].median == pytest.approx(512 * 2 ** (2 / 3))  # from 1/4 to 2
    assert overtaking(rows[:3]) == {}  # one context
    # one timing may be noise
    assert overtaking([{**row, "seconds": row["seconds"][:1]} for row in rows]) == {}


def test_timings_are_interleaved_and_compared_round_by_round():
    order = []
    timings = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, seconds=0
    )
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert {name: len(samples) for name, samples in timings.items()} == {"a": 3, "b": 3}
    assert ratio({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}, "a", "b") == (1.0, 0.5, 2.0)


@pytest.mark.parametrize("name", peers.MODELS)
def test_peers_have_our_logits_and_generate_our_tokens(name, tmp_path, monkeypatch):
    """main checks both before it times anything."""
    monkeypatch.setattr(
        peers, "interleave", lambda calls, **_: interleave(calls, rounds=1, seconds=0, warm=False)
    )
    peers.main(peers.Options(only=name, lengths=(8,), generate=6, out=tmp_path / "peers.jsonl"))
    rows = rows_of(tmp_path / "peers.jsonl")
    assert {row["provider"] for row in rows} >= {"minimodels", "transformers"}
    assert {row["question"] for row in rows} == {"forward + backward, T 8", "generation"}


def test_a_wrapped_block_and_its_group_alone():
    calls = parts.wrapped_block(16, 2, 24, torch.device("cpu"))
    for call in calls.values():
        call()
    assert list(calls) == ["block", "group alone"]


@pytest.mark.parametrize("axis", throughput.AXES)
@pytest.mark.parametrize("model", ["mamba", "moe", "mod", "hybrid", "retnet", "kimi_linear"])
def test_models_are_matched_on_the_axis(axis, model):
    base, of = preset("transformer"), throughput.AXES[axis]
    matched = throughput.match(preset(model), base, of)
    assert of(ledger(matched, 256)) == pytest.approx(of(ledger(base, 256)), rel=0.11)
    for call in throughput.every_call(matched.calls):
        options = {option.name: option.value for option in call.options}
        if call.name == "mamba":
            assert options["rank"] % 8 == 0
        for size in throughput.HEADS.get(call.name, ()):
            assert options[size] == base.width // 4  # heads
    for width in (matched.width - 8, matched.width + 8):
        other = of(ledger(throughput.replace(matched, width=width), 256))
        assert abs(other - of(ledger(base, 256))) >= abs(
            of(ledger(matched, 256)) - of(ledger(base, 256))
        )


def test_widths_that_a_layer_refuses_are_left_out():
    base, of = preset("transformer"), throughput.AXES["parameters"]
    layers = "mamba2(heads=48, state_size=16) mlp"  # whose inner width is a multiple of 48
    matched = throughput.match(Config(layers, width=100), base, of)
    others = [of(ledger(replace(matched, width=width), 256)) for width in range(24, 513, 24)]
    target = of(ledger(base, 256))
    assert abs(of(ledger(matched, 256)) - target) == min(abs(other - target) for other in others)
    with pytest.raises(InputError, match="nothing"):
        throughput.match(Config("attention nothing"), base, of)


def test_heads_keep_their_size_in_every_part_of_the_text():
    kept = throughput.keep_heads(
        Config("A=attention(heads=2) A mod(attention(heads=8, head_dim=6) mlp)", width=48)
    )
    heads = [call for call in throughput.every_call(kept.calls) if call.name == "attention"]
    assert [{option.name: option.value for option in call.options} for call in heads] == [
        {"heads": 2, "head_dim": 24},
        {"heads": 8, "head_dim": 6},
    ]
    with pytest.raises(InputError, match=r"attention.heads: \[2, 8\] .* head_dim in each"):
        throughput.keep_heads(Config("attention(heads=2) attention(heads=8)", width=48))


def test_throughput_writes_rows_that_plot_draws(tmp_path, capsys):
    out = tmp_path / "throughput.jsonl"
    throughput.main(
        throughput.Options(models=("transformer", "mamba"), layers=("attention(window=128) mlp",), longest=512,
                           tokens=256, rounds=1, sweeps=2, decode_batch=2, device="cpu", out=out)
    )  # fmt: skip
    rows = rows_of(out)
    assert {row["mode"] for row in rows} == {"train", "prefill", "decode"}
    assert {row["context"] for row in rows} == {256, 512}
    assert {"transformer", "transformer again", "mamba", "attention(window=128) mlp"} == {
        row["model"] for row in rows
    }
    for row in rows:
        assert len(row["seconds"]) == 2 and row["device"] and row["commit"] and row["limit"] > 0
        assert row["state_bytes"] > 0 and row["flops"] > 0 and row["parameters"] > 0
    assert "Faster than the transformer" in capsys.readouterr().out
    plot.main(plot.Options(results=(out, out), out=tmp_path / "pictures"))
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    names = ("throughput-train", "throughput-prefill", "throughput-decode-1", "throughput-decode-2")
    assert drawn == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}


def test_throughput_compares_paths(tmp_path):
    out = tmp_path / "throughput.jsonl"
    options = throughput.Options(
        models=("transformer",), layers=("mlp",), modes=("train", "decode"), impl=("torch", "reference"), compile=True,
        longest=256, tokens=256, rounds=1, sweeps=1, decode_batch=1, device="cpu", out=out,
    )  # fmt: skip
    configs = throughput.matched(options)
    named = throughput.providers(configs, options, "train")
    assert list(named) == [f"{model}, {impl}{compiled}" for compiled in ("", " compiled") for impl in options.impl
                           for model in ("transformer", "mlp")]  # fmt: skip
    assert named["mlp, reference compiled"] == (
        "mlp",
        throughput.replace(configs["mlp"], impl="reference"),
        "reference",
        True,
    )
    decoding = throughput.providers(configs, options, "decode")
    assert [name for name in decoding if decoding[name].compiled] == [
        f"{model}, {impl} in place" for impl in options.impl for model in ("transformer", "mlp")
    ]
    cudnn = throughput.providers(
        configs, throughput.replace(options, impl=("torch", "cudnn")), "prefill"
    )
    # no attention, no cuDNN
    assert list(cudnn) == [
        "transformer, torch",
        "mlp, torch",
        "transformer, cudnn",
    ]
    throughput.main(throughput.replace(options, compile=False))
    assert {(row["base"], row["impl"]) for row in rows_of(out)} == {
        ("transformer", "torch"), ("transformer", "reference"), ("mlp", "torch"), ("mlp", "reference")
    }  # fmt: skip


def test_decoding_is_a_graph_where_nothing_waits_for_the_gpu(monkeypatch):
    monkeypatch.setattr(throughput, "pick_device", lambda name: torch.device("cuda"))
    configs = {name: preset(name) for name in ("transformer", "mamba", "moe", "mod", "hybrid")}
    named = throughput.providers(
        configs, throughput.Options(impl=("torch", "cudnn", "triton"), compile=True), "decode"
    )
    graphs = [name for name, provider in named.items() if provider.compiled]
    at_torch = [f"{name}, torch as a graph" for name in ("transformer", "mamba")]
    fits = ("transformer", "mamba", "moe", "hybrid")
    assert graphs == [*at_torch, *(f"{name}, triton as a graph" for name in fits)]


def test_decoding_with_a_state_of_fixed_size_repeats_the_same_positions():
    model = LM(Config(width=16, layers="attention(heads=2) retention(heads=2)"))
    call = modes.decode(model, 8, 2, modes.Provider("x", model.config, "torch", True))
    step = call.args[0]
    for _ in range(2):
        call()
        assert step.left == ROOM - modes.DECODED
        for state in step.state:
            assert state.seen.tolist() == [8 + modes.DECODED] * 2
    written = step.state[0].positions[:, : 8 + modes.DECODED]
    assert (written == torch.arange(8 + modes.DECODED)).all()


def test_every_sweep_measures_the_points_of_the_first(monkeypatch, tmp_path):
    clock = iter(range(1, 100))

    def measure(mode, given, context, batch, options, device):
        # each call takes longer, so that patience ends at another context in each sweep
        sweep = next(clock)
        rows = {name: throughput.describe_point(mode, name, provider, context, batch, options)
                for name, provider in given.items()}  # fmt: skip
        return [{**row, "seconds": [context / 256 * sweep]} for row in rows.values()]

    monkeypatch.setattr(throughput, "measure_point", measure)
    out = tmp_path / "throughput.jsonl"
    throughput.main(throughput.Options(models=("transformer", "mamba"), modes=("prefill",), longest=2048, patience=7, sweeps=3,
                                       device="cpu", out=out))  # fmt: skip
    assert all(row["batch"] * row["context"] == row["tokens"] == 4096 for row in rows_of(out))
    assert {(row["model"], row["context"]): row["seconds"] for row in rows_of(out)} == {
        (model, context): seconds
        for model in ("transformer", "mamba")
        for context, seconds in ((256, [1, 4, 7]), (512, [4, 10, 16]), (1024, [12, 24, 36]))
    }


def test_what_does_not_fit_is_a_row(monkeypatch, tmp_path):
    def refuse(model, context, batch, provider):
        raise torch.OutOfMemoryError("out of memory, tried to allocate")

    monkeypatch.setitem(modes.MODES, "train", refuse)
    given = {"mlp": modes.Provider("mlp", Config(layers="mlp"), "torch")}
    (row,) = throughput.measure_point(
        "train", given, 256, 1, throughput.Options(), torch.device("cpu")
    )
    assert row["seconds"] is None and "out of memory" in throughput.describe(row)
    out = tmp_path / "throughput.jsonl"
    throughput.main(
        throughput.Options(
            models=("transformer", "mod"), modes=("train",), tokens=256, device="cpu", out=out
        )
    )
    assert [(row["model"], row["context"], row["seconds"]) for row in rows_of(out)] == [
        ("transformer", 256, None),
        ("mod", 256, None),
    ]


def test_what_does_not_fit_beside_others_is_timed_alone(monkeypatch):
    real, together = throughput.timed, []

    def crowded(given, *point):
        together.append(list(given))
        if len(given) > 1 or "mamba" in given:
            raise torch.OutOfMemoryError("out of memory")
        return real(given, *point)

    monkeypatch.setattr(throughput, "timed", crowded)
    given = {
        name: modes.Provider(name, preset(name), "torch")
        for name in ("transformer", "mamba", "mod")
    }
    options = throughput.Options(rounds=1)
    rows = {
        row["model"]: row
        for row in throughput.measure_point("prefill", given, 32, 1, options, torch.device("cpu"))
    }
    assert together == [["transformer", "mamba", "mod"], ["transformer"], ["mamba"], ["mod"]]
    assert rows["mod"]["seconds"] and rows["mod"]["alone"] and not rows["mod"]["error"]
    assert rows["mamba"]["seconds"] is None and rows["mamba"]["error"] == "out of memory"


def test_mixture_of_depths_is_timed_at_its_capacity():
    torch.manual_seed(0)
    model = modes.at_capacity(LM(preset("mod", "tiny", "mod.capacity=0.25")).eval())
    record = Record()
    model(torch.zeros(8, 256, dtype=torch.int64), record=record)
    assert len(record.observed["routed"]) == 2
    assert all(abs(share - 0.25) < 0.05 for share in record.observed["routed"])


@pytest.mark.parametrize("claim", claims.CLAIMS)
@pytest.mark.parametrize("small", [True, False], ids=["cpu", "gpu"])
def test_every_claim_describes_models_that_can_be_built(claim, small):
    described = claims.CLAIMS[claim](small)
    assert described.seeds >= 3
    for run in described.runs:
        with torch.device("meta"):
            run.change(LM(run.config))
        for panel in described.panels:
            assert panel.x and panel.y


@pytest.mark.parametrize("claim", ["copying", "recall", "depth", "balance"])
def test_a_claim_leaves_rows_that_plot_draws(claim, tmp_path, monkeypatch, capsys):
    real = claims.CLAIMS[claim]

    def shorter(small):
        described = real(small)
        for run in described.runs:
            run.batch, run.context = 2, min(run.context, 64)
        described.probes = 2
        return described

    monkeypatch.setitem(claims.CLAIMS, claim, shorter)
    for module in (claims, training):  # because opening a text takes longer than the rest
        monkeypatch.setattr(module, "open_data", functools.cache(open_data))
    claims.main(claims.Options(claim=claim, scale=0.004, seeds=2, device="cpu", out=tmp_path))
    rows = rows_of(tmp_path / f"claim-{claim}.jsonl")
    described = shorter(True)
    assert {row["model"] for row in rows} == {run.model for run in described.runs}
    assert {row["panel"] for row in rows if row["x"] is not None} == {
        panel.name for panel in described.panels
    }
    if claim == "depth":
        routes = {(row["model"], row["route"]) for row in rows if "route" in row}
        assert routes == {("mod, predictor", "predictor"), ("mod, predictor", "topk"), ("mod, auxiliary loss", "router"),
                          ("mod, auxiliary loss", "topk")}  # fmt: skip
    plot.main(plot.Options(results=(tmp_path / f"claim-{claim}.jsonl",)))
    assert len(list(tmp_path.glob("*.png"))) == len(described.panels)


def test_the_first_seed_tries_every_rate_and_the_others_train_at_the_best(tmp_path, monkeypatch):
    best = {"attention": 1e-1, "mlp": 1e-3}
    trained = []

    def learn(run, seed, *given):
        trained.append((run.model, run.lr, seed))
        return None, [{"step": 1, "accuracy": 0.5 + 0.5 * (run.lr == best[run.model])}]

    def swept(small):
        runs = [training.Run(name, Config(layers=name), "parity", 8, 1) for name in best]
        panel = claims.Panel("learning", "step", "accuracy", "steps", "answers right")
        return claims.Claim("Which?", runs, [panel], rates=(1e-3, 1e-1))

    monkeypatch.setattr(claims, "train", learn)
    options = claims.Options(claim="swept", device="cpu", out=tmp_path)
    claims.answer(options, {"swept": swept})
    assert trained == [
        *((name, rate, 0) for name in best for rate in (1e-3, 1e-1)),
        *((name, best[name], seed) for seed in (1, 2) for name in best),
    ]


def test_routing_decisions_are_those_of_all_batches_scored(monkeypatch):
    monkeypatch.setattr(claims, "SCORED", 3)
    config = preset("mod", "tiny", "attention.heads=2", width=16, vocab=256)
    run = claims.Run("mod, predictor", config, "stdlib", 16, 1, 2)
    torch.manual_seed(0)
    model = LM(run.config)
    for router in model.routers:  # so that they do not treat all tokens the same
        for parameter in router.predictor.parameters():
            torch.nn.init.normal_(parameter)
    oracle, causal = claims.routes(model, run, torch.device("cpu"))
    assert model.training and model.eval().causal  # as it was before
    for told, topk in ((oracle, True), (causal, False)):
        shares = []
        for tokens, _ in training.open_data("stdlib", 16).validation(2, 3):
            record = Record()
            for router in model.routers:
                router.topk = topk
            model(tokens, record=record)
            shares += [share.item() for share in record.observed["routed"]]
        assert len(shares) == 6 and len({*shares[::2]}) > 1  # two groups, and batches that differ
        assert told["route_routed"] == pytest.approx(sum(shares) / 6)
    assert "route_accuracy" in oracle and "route_accuracy" not in causal


def test_gpt_is_causal_and_of_the_size_that_is_told():
    config = Config(width=128, layers="(attention(heads=4) mlp)*4", vocab=65)
    model, tokens = gpt.GPT(config, heads=4, context=64), torch.randint(65, (2, 64))
    sizes = [sum(parameter.numel() for parameter in m.parameters()) for m in (model, LM(config))]
    assert sizes[0] / sizes[1] == pytest.approx(0.99, abs=0.001)
    targets = torch.full((2, 64), -100)
    targets[:, 9] = tokens[:, 10]
    later = tokens.clone()
    later[:, 10:] = 0
    losses = [model.loss(given, targets)[0] for given in (tokens, later, later.flip(1))]
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0] != losses[2]


def test_without_selection_mamba_is_a_time_invariant_recurrence():
    torch.manual_seed(0)
    lm = LM(Config(layers="mamba(state_size=6)", width=16)).double()
    s4d.forget_selection(lm)
    (layer,) = (module for module in lm.double().modules() if isinstance(module, s4d.S4D))
    x, A = (
        torch.randn(9, 32, dtype=torch.float64),
        torch.complex(-layer.log_decay.exp(), layer.frequency),
    )
    decay, C = torch.exp(layer.log_step.exp()[:, None] * A), torch.view_as_complex(layer.C)
    h, expected = torch.zeros_like(A), []
    for x_t in x:
        h = decay * h + (decay - 1) / A * x_t[:, None]
        expected.append(2 * (C * h).sum(1).real)
    convolved = [sum(layer.filter(9)[:, t - s] * x[s] for s in range(t + 1)) for t in range(9)]
    torch.testing.assert_close(torch.stack(convolved), torch.stack(expected))

    lm.loss(torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64))[
        0
    ].backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())

    # without projections, x given twice is both signal and gate
    layer.in_proj = layer.out_proj = torch.nn.Identity()
    u = x.repeat(1, 2)[None]
    signal, _ = causal_conv1d(
        x[None], layer.conv1d.weight.squeeze(1), layer.conv1d.bias, None, activation=True
    )
    convolved = torch.stack(
        [sum(layer.filter(9)[:, t - s] * signal[0, s] for s in range(t + 1)) for t in range(9)]
    )
    torch.testing.assert_close(layer(u)[0][0], (convolved + layer.D * signal[0]) * F.silu(x))


def test_a_run_is_probed_alike_apart_and_scored_on_more_at_its_end():
    run = training.Run("mlp", Config(layers="mlp", width=16), "induction", 8, steps=5, batch=2)
    _, records = training.train(run, 0, 2, torch.device("cpu"), tqdm(disable=True))
    assert [(record["step"], record["targets"]) for record in records] == [(3, 8), (5, 128)]


def test_what_cannot_run_is_told_from_what_does_not_fit():
    row = {
        "benchmark": "throughput",
        "mode": "train",
        "batch": 1,
        "context": 256,
        "tokens": 256,
        "seconds": None,
    }
    rows = [
        {**row, "model": "a", "error": "CUDA out of memory. Tried"},
        {**row, "model": "b", "error": "no kernel"},
    ]
    assert [line.split(" | ")[1] for line in table.throughput(rows).splitlines()[2:]] == [
        "out of memory |",
        "cannot run |",
    ]


def test_routing_shows_what_the_routers_chose():
    torch.manual_seed(0)
    lm, tokens = (
        LM(Config(layers="mod(attention moe, capacity=0.5) moe", width=16)).eval(),
        Bytes().encode("some text"),
    )
    shown = routing.trace(lm, tokens, "topk")
    depth, inner, outer = (
        shown[name] for name in ("mod layers.0", "moe layers.0.group.1.layer", "moe layers.1.layer")
    )
    assert depth.count(routing.TAKEN) == 5  # half of nine, rounded up
    assert [choice is None for choice in depth] == [choice is None for choice in inner]
    assert None not in outer
    # nothing is left behind
    assert routing.trace(lm, tokens)["mod layers.0"] != depth and lm.causal
    assert "<script" not in routing.page("<script>", ["<"] * 9, shown)


def test_curves_are_drawn_from_logs(tmp_path):
    log = [{"step": 1, "seconds": 1.0, "tokens": 10, "flops": 5.0, "loss": 2.0},
           {"step": 1, "seconds": 1.5, "validation_loss": 1.0}]  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    curves.main(curves.Options(runs=(tmp_path / "run",), axis="flops", out=tmp_path / "lr0.1"))
    assert (tmp_path / "lr0.1.svg").exists()
    training, validation = curves.points([{**row, "file": "x"} for row in log], "flops")
    assert (training, validation) == (([5.0], [2 / math.log(2)]), ([5.0], [1 / math.log(2)]))
    log[1]["bits_per_byte"] = 0.25 / math.log(2)  # four bytes a token
    training, validation = curves.points([{**row, "file": "x"} for row in log], "flops")
    assert training[1] == [pytest.approx(0.5 / math.log(2))]
    assert validation[1] == [pytest.approx(0.25 / math.log(2))]


def test_the_loss_by_position_is_that_of_each_token(tmp_path, capsys):
    torch.manual_seed(0)
    model = LM(Config(layers="attention(window=5) mod(mlp)", width=16, vocab=256))
    save_model(model, tmp_path / "run")
    about = json.loads((tmp_path / "run/options.json").read_text())
    del about["checksum"]
    about |= {"data": "stdlib", "context": 8}
    (tmp_path / "run/options.json").write_text(json.dumps(about))
    out = tmp_path / "rows.jsonl"
    options = positions.Options(
        runs=(tmp_path / "run",), batch_size=3, batches=2, device="cpu", out=out
    )
    positions.main(options)
    rows = rows_of(out)
    bounds = [(row["first"], row["last"]) for row in rows]
    assert bounds == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 5), (6, 7),
                      (8, 10), (11, 15), (16, 22), (23, 31)]  # fmt: skip
    assert all((row["context"], row["longest"]) == (8, 32) for row in rows)
    losses = []  # of each token, as if it were the only target
    model.eval()
    for tokens, targets in training.open_data("stdlib", 32).validation(3, 2):
        logits = model(tokens)[0]
        losses += [
            [F.cross_entropy(logits[b, t], targets[b, t]).item() for t in range(32)]
            for b in range(3)
        ]
    for row in rows:
        part = [each for loss in losses for each in loss[row["first"] : row["last"] + 1]]
        assert row["targets"] == len(part)
        assert row["bits_per_byte"] == pytest.approx(sum(part) / len(part) / math.log(2), rel=1e-5)
    assert f"{rows[-1]['bits_per_byte']:.4f}" in capsys.readouterr().out

    positions.main(replace(options, longest=6, per_doubling=1))
    assert [row["last"] for row in rows_of(out)] == [0, 1, 3, 5]
    about["data"] = "induction"
    (tmp_path / "run/options.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="a run on text; induction is a task"):
        positions.main(options)
    del about["context"]
    (tmp_path / "run/options.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="the folder of a training run"):
        positions.main(options)


@pytest.mark.parametrize("context", [1, 3, 100, 256])
@pytest.mark.parametrize("longest", [1, 99, 100, 256, 1000])
def test_no_bin_reaches_over_the_trained_context(context, longest):
    for per_doubling in (1, 2, 3):
        edges = positions.bins(context, longest, per_doubling)
        assert edges == sorted(set(edges)) and (edges[0], edges[-1]) == (0, longest)
        assert context in edges or context > longest
        assert all(
            stop <= max(start + 1, 2 * start + 1) for start, stop in itertools.pairwise(edges)
        )


def test_a_cpu_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    plan = {
        "first": ["-c", "pass"],
        "second": ["-c", "raise SystemExit(3)"],
        "third": ["-c", "pass"],
    }
    monkeypatch.setattr(steps, "steps", lambda *arguments: plan)
    options = everything.Options(out=tmp_path / "machine", minutes=1, device="cpu")
    everything.main(options)
    done = json.loads((tmp_path / "machine/done.json").read_text())
    assert [done[name]["status"] for name in plan] == ["done", "failed with 3", "done"]
    assert "not done: second" in capsys.readouterr().out
    with pytest.raises(InputError, match="--resume"):
        everything.main(options)
    plan["second"] = ["-c", "pass"]
    plan["first"] = ["-c", "raise SystemExit(1)"]  # is not run again
    everything.main(replace(options, resume=True))
    assert "everything is done" in capsys.readouterr().out


def test_a_cpu_is_asked_for_what_there_is(tmp_path):
    """Every step of the plan is a command, and its options exist."""
    for name, (module, *arguments) in (
        (name, step[1:]) for name, step in steps.steps(tmp_path, "torch").items()
    ):
        assert arguments, name
        if module != "pytest":
            tyro.cli(importlib.import_module(module).Options, args=arguments)
        else:
            assert all(
                Path(argument).exists() for argument in arguments if argument.startswith("tests/")
            )


def test_a_step_is_stopped_with_what_it_started(tmp_path):
    child = "import time; time.sleep(1); open('alive', 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], cwd={str(tmp_path)!r})"
    assert steps.run(["-c", parent], 0.4) == "cut off"
    time.sleep(1.2)
    assert not (tmp_path / "alive").exists()
    assert steps.run(["-c", "raise SystemExit(2)"], 10) == "failed with 2"


def test_a_cpu_measures_nothing_if_the_results_are_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(
        steps,
        "steps",
        lambda *arguments: {"correctness": ["-c", "raise SystemExit(1)"], "x": ["-c", "pass"]},
    )
    options = everything.Options(out=tmp_path / "machine", minutes=1, device="cpu")
    with pytest.raises(InputError, match="nothing was measured"):
        everything.main(options)
    assert "x" not in json.loads((tmp_path / "machine/done.json").read_text())


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (
            throughput.main,
            throughput.Options(modes=("guess",)),
            "modes: 'guess' .* train, prefill, decode",
        ),
        (throughput.main, throughput.Options(modes=()), "modes: '' .* train, prefill, decode"),
        (throughput.main, throughput.Options(models=("gpt",)), "model: 'gpt' .* transformer"),
        (throughput.main, throughput.Options(match="weight"), "match: 'weight'"),
        (throughput.main, throughput.Options(longest=100), "longest: 100 .* 256 or more"),
        (throughput.main, throughput.Options(rounds=0), "rounds: 0"),
        (throughput.main, throughput.Options(sweeps=0), "sweeps: 0"),
        (throughput.main, throughput.Options(shortest=0), "shortest: 0"),
        (throughput.main, throughput.Options(impl=()), "impl: '' .* auto"),
        (
            throughput.main,
            throughput.Options(impl=("cudnn",), device="cpu"),
            "impl: 'cudnn' .* device is cpu",
        ),
        (throughput.main, throughput.Options(impl=("fast",)), "impl: 'fast' .* reference"),
        (peers.main, peers.Options(lengths=(1,)), "lengths: 1 .* 2 or more"),
        (claims.main, claims.Options(claim="luck"), "claim: 'luck' .* copying"),
        (claims.main, claims.Options(claim="copying", size="big"), "size: 'big'"),
        (claims.main, claims.Options(claim="copying", scale=math.inf), "scale"),
        (
            claims.main,
            claims.Options(claim="copying", out=Path(__file__)),
            "out: .* a file that can be written",
        ),
        (
            throughput.main,
            throughput.Options(out=Path(__file__).parent),
            "out: .* a file that can be written",
        ),
        (
            parts.main,
            parts.Options(out=Path(__file__).parent),
            "out: .* a file that can be written",
        ),
        (kernels.main, kernels.Options(only="fft"), "only: 'fft' .* rmsnorm"),
        (kernels.main, kernels.Options(rounds=0), "rounds: 0"),
        (
            throughput.main,
            throughput.Options(shortest=512, longest=256, device="cpu"),
            "longest: 256 .* 512",
        ),
        (everything.main, everything.Options(out=Path("never"), impl="fast"), "impl: 'fast'"),
        (peers.main, peers.Options(only="gpt"), "only: 'gpt' .* llama"),
        (plot.main, plot.Options(results=()), "results"),
        (curves.main, curves.Options(runs=(), axis="money"), "axis: 'money' .* tokens"),
        (positions.main, positions.Options(runs=()), "runs: '' .* folders of training runs"),
        (
            positions.main,
            positions.Options(runs=(Path("never"),)),
            "runs: 'never' .* the folder of a tr",
        ),
    ],
)
def test_bad_input_is_refused(main, options, message):
    with pytest.raises(InputError, match=message):
        main(options)


def test_nothing_is_compiled_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="compile: True .* no C"):
        throughput.check(throughput.Options(compile=True, device="cpu"))


def test_tables_hold_medians_and_means(tmp_path, capsys):
    timed = {"benchmark": "throughput", "mode": "train", "batch": 1, "context": 256, "tokens": 100}
    rows = [
        {**timed, "model": "mamba", "seconds": [1.0, 2.0, 4.0]},
        {**timed, "model": "mlp", "seconds": None},
    ]
    for provider, seconds in {"minimodels": [1.0, 1.0], "transformers": [2.0, 4.0]}.items():
        rows.append(
            {"benchmark": "peers", "model": "llama", "question": "generation", "peer": "transformers", "provider": provider,
             "seconds": seconds}
        )  # fmt: skip
        kernel = {
            "benchmark": "kernels",
            "operation": "rmsnorm",
            "direction": "forward",
            "unit": "GB/s",
        }
        kernel |= {"rate": 5, "ceiling": 10}
        ours = "torch" if provider == "minimodels" else "reference"
        rows += [
            {**kernel, "case": case, "provider": ours, "seconds": seconds, "bytes": 10**6}
            for case in ("small", "large")
        ]
    for seed, y in ((0, 0.5), (1, 1.0)):
        claim = {
            "benchmark": "claim",
            "claim": "copying",
            "panel": "accuracy",
            "model": "mamba",
            "y_label": "right",
        }
        rows.append({**claim, "seed": seed, "x": 10, "y": y, "x_log": False})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table.main(table.Options(results=(tmp_path / "rows.jsonl",)))
    shown = capsys.readouterr().out
    for line in (
        "| `mamba` | 50 |",
        "| `mlp` | out of memory |",
        "| llama, transformers | 3.00x (2.00-4.00) |",
        "| `rmsnorm` forward | large | torch 1000.00 ms, 50% of GB/s, 1 MB | reference 3.00x |",
        "| mamba | 0.750 (0.500-1.000) |",
    ):
        assert line in shown


def test_a_curve_joins_the_seeds_probe_by_probe():
    rows = [
        {"seed": seed, "x": x, "y": y}
        for seed, points in enumerate(([(1, 4), (2, 3)], [(3, 5), (6, 2)]))
        for x, y in points
    ]
    assert plot.curve(rows) == [(2, 4.5, (4, 5)), (4, 2.5, (3, 2))]
    kinked = [{"seed": 0, "x": x, "y": y} for x, y in ((50, 3), (99, 1), (100, 2))]
    assert plot.curve(kinked) == [(50, 3, (3,)), (100, 2, (2,))]  # the end is scored on more


@pytest.mark.parametrize("content", ["", "not JSON", "[1]\n", '{"benchmark": "none"}\n'])
def test_results_that_cannot_be_drawn_are_refused(content, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(InputError, match="results"):
        table.main(table.Options(results=(tmp_path / "rows.jsonl",)))
    with pytest.raises(InputError, match="results"):
        plot.main(plot.Options(results=(tmp_path / "rows.jsonl",)))
    with pytest.raises(InputError, match="results"):
        plot.main(plot.Options(results=(tmp_path / "missing.jsonl",)))


def test_a_crossover_is_the_last_one_of_most_rounds():
    assert crossover([256, 512, 1024, 2048], [[0.5], [2.0], [0.5], [2.0]]).median == pytest.approx(
        1024 * math.sqrt(2)
    )
    assert crossover([256, 512], [[0.5, 0.5, 2.0], [2.0] * 3]).median == pytest.approx(
        256 * math.sqrt(2)
    )
    early = crossover([256, 512], [[0.5, 2.0, 2.0], [2.0] * 3])  # two rounds were ahead before
    assert (early.low, early.median) == (256, 256) and early.high == pytest.approx(256 * 2**0.5)
    assert crossover([256, 512], [[0.5] * 3, [1.0, 2.0, 8.0]]).median == pytest.approx(
        256 * math.sqrt(2)
    )
    noisy = crossover([256, 512], [[0.03, 7.5], [0.4, 0.4]])  # one round was disturbed
    assert not noisy.sooner and noisy.median == math.inf
    late = crossover([256, 512], [[0.5] * 3, [0.9, 0.9, 1.1]])  # only one round
    assert late.median == late.high == math.inf and late.low < 512
    row = {"model": "t", "base": "transformer", "context": 512, "seconds": [4.0, 4.0, 4.0]}
    rows = [
        row,
        {**row, "model": "t compiled", "seconds": [1.0, 8.0, 8.0]},
        {**row, "base": "mamba", "seconds": [2.0] * 3},
    ]
    rows += [
        {**row, "context": 256},
        {**row, "context": 256, "base": "mamba", "seconds": [8.0] * 3},
    ]
    # 512 before 256, the faster by its median
    assert overtaking(rows)["mamba"].median == pytest.approx(256 * math.sqrt(2))


def test_timings_are_of_one_call():
    timings = interleave({"a": lambda: time.sleep(0.02)}, rounds=2, seconds=0.1)
    assert timings["a"] == pytest.approx([0.02] * 2, abs=0.04)


def test_the_ceilings_count_bytes_both_ways_and_a_multiply_add_as_two(monkeypatch):
    monkeypatch.setattr(
        measure, "interleave", lambda *_, **__: {"copy": [2.0, 1.0], "product": [4.0, 2.0]}
    )
    expected = {"GB/s": 2 * 4 * 2**25 / 1e9, "TFLOP/s": 2 * 2048**3 / 2 / 1e12}
    assert measure.ceilings(torch.device("cpu")) == pytest.approx(expected)


def test_to_look_whether_a_file_can_be_written_leaves_it_as_it_was(tmp_path):
    measure.check_writable(tmp_path / "new/rows")
    assert not (tmp_path / "new/rows").exists()
    (tmp_path / "rows").write_text("before")
    measure.check_writable(tmp_path / "rows")
    assert (tmp_path / "rows").read_text() == "before"


def test_a_row_says_otherwise_than_its_environment(tmp_path):
    measure.write(tmp_path / "rows", [{"dtype": "int8"}, {}], torch.device("cpu"))
    assert [row["dtype"] for row in rows_of(tmp_path / "rows")] == ["int8", "float32"]


def test_tables_keep_apart_what_differs():
    row = {
        "benchmark": "throughput",
        "mode": "decode",
        "batch": 1,
        "context": 256,
        "tokens": 100,
        "model": "mamba",
    }
    rows = [
        {**row, "seconds": [1.0]},
        {**row, "batch": 8, "seconds": [0.5]},
        {**row, "context": 512, "seconds": [4.0]},
    ]
    shown = table.throughput([*rows, {**row, "model": "mamba again", "seconds": [9.0]}])
    for line in ("| decode, batch 1, tokens/s at context | 256 | 512 |", "| decode, batch 8, tokens/s at context | 256 |",
                 "| `mamba` | 100 | 25 |", "| `mamba` | 200 |"):  # fmt: skip
        assert line in shown
    assert "again" not in shown
    claim = {"benchmark": "claim", "claim": "copying", "model": "mamba", "y_label": "right"}
    shown = table.claims([
        {**claim, "panel": panel, "x_log": panel == "b", "seed": seed, "x": x, "y": x + seed}
        for x in (1, 2) for seed in (0, 1) for panel in "abc"
    ])  # fmt: skip
    assert shown.count("| mamba | 2.500 (2.000-3.000) |") == 1  # the last probe; a is as c
    assert "| mamba | 1: 1.500 (1.000-2.000); 2: 2.500 (2.000-3.000) |" in shown
    kernel = {
        "benchmark": "kernels",
        "operation": "scan",
        "direction": "forward",
        "case": "c",
        "unit": "GB/s",
    }
    kernel |= {"rate": 5, "ceiling": 10, "bytes": None}
    times = {"torch": [3.0, 4.0, 4.0], "triton": [1.0, 2.0, 2.0]}
    shown = table.kernels(
        [{**kernel, "provider": name, "seconds": seconds} for name, seconds in times.items()]
    )
    assert "| triton 2000.00 ms, 50% of GB/s | torch 2.00x |" in shown


def test_a_picture_has_a_line_for_each_model_and_file():
    row = {"benchmark": "throughput", "mode": "prefill", "batch": 1, "tokens": 100}
    drawn = plot.throughput([
        {**row, "model": model, "file": file, "context": context, "seconds": [scale, 2 * scale, 4 * scale]}
        for context in (512, 256) for file, scale in (("here", 1), ("there", 2))
        for model in ("mamba", "transformer", "transformer again")
    ])  # fmt: skip
    ((_, figure),) = drawn
    (axes,) = figure.axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
    assert lines == [([256, 512], [50, 50])] * 2 + [([256, 512], [25, 25])] * 2
    assert [text.get_text() for text in axes.texts] == ["mamba", "transformer"]
    bands = [band.get_paths()[0].vertices[:, 1] for band in axes.collections]
    assert [(band.min(), band.max()) for band in bands] == [(25, 100)] * 2 + [(12.5, 50)] * 2


def test_a_run_for_a_comparison_takes_the_steps_that_it_says():
    changed = []
    config = Config(layers="moe(router=sigmoid_bias, bias_step=0.1)", width=16)
    run = training.Run(
        "moe",
        config,
        "mqar(pairs=2, vocab=8)",
        8,
        steps=40,
        batch=2,
        lr=1e-2,
        change=changed.append,
    )
    trained, records = training.train(run, 5, 4, torch.device("cpu"), tqdm(disable=True))
    data = training.open_data(run.data, 8)
    torch.manual_seed(5)
    model = LM(replace(config, vocab=data.vocab))
    optimizer = training.adamw(model, 1e-2, 0.1)
    for step in range(40):
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-2 * min(1, (step + 1) / 3) * (0.55 + 0.45 * math.cos(math.pi * step / 40))
            )
        model.loss(*data.batch(5, step, 2))[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
    for ours, theirs in zip(
        trained.state_dict().values(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert changed == [trained]
    assert [record["tokens"] for record in records] == [160, 320, 480, 640]
    flops = ledger(model.config, 8).training_flops
    assert [record["flops"] for record in records] == [
        flops * record["tokens"] for record in records
    ]
    assert [record["seconds"] for record in records] == sorted(
        record["seconds"] for record in records
    )


def test_a_comparison_is_scored_on_held_out_batches_as_in_use():
    data = training.open_data("mqar(pairs=2, vocab=8)", 32)
    torch.manual_seed(0)
    # a tied head repeats its token
    model = LM(Config(layers="mod(mlp)", width=16, vocab=8, tie_embeddings=False))
    scores = training.score(model, data, 4, 8)
    assert model.training
    nats, accuracy = scored(model, data.validation(4, 8))
    assert scores == pytest.approx({"bits": nats / math.log(2), "accuracy": accuracy})
    assert training.count_targets(data, 4, 8) == 64


def test_a_mode_does_the_work_that_its_rows_count(monkeypatch):
    seen, features = [], LM.features
    config = Config(width=16, layers="attention(heads=2)")

    def watched(model, tokens, state=None, context=None):
        seen.append((tuple(tokens.shape), state))
        return features(model, tokens, state, context)

    monkeypatch.setattr(LM, "features", watched)
    monkeypatch.setattr(modes, "PIECE", 16)
    provider = modes.Provider("x", config, "torch")

    def shapes(mode):
        seen.clear()
        call = modes.MODES[mode](LM(config), 24, 2, provider)
        call()
        point = throughput.describe_point(
            mode, "x", provider, 24, 2, throughput.Options(device="cpu")
        )
        told = point["tokens"]
        cost = ledger(config, 24)
        assert point["flops"] == (cost.training_flops if mode == "train" else cost.forward_flops)
        read = seen[:3] if mode == "decode" else []
        written = seen[len(read) :]
        assert sum(shape[0] * shape[1] for shape, _ in written) == told
        return [shape for shape, _ in read], [shape for shape, _ in written]

    assert shapes("train") == ([], [(2, 24)])
    assert shapes("prefill") == ([], [(2, 24)])
    assert shapes("decode") == ([(2, 8)] * 3, [(2, 1)] * 32)
    assert [state is None for _, state in seen] == [True] + [False] * 34
    assert len({id(state) for _, state in seen}) == 35

    model = LM(config)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    modes.train(model, 24, 2, provider)()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(parameter, old) and parameter.grad is None


def test_selection_is_taken_from_every_layer_and_nothing_of_it_decays():
    model = LM(Config(layers="mamba mamba", width=16))
    s4d.forget_selection(model)
    decayed = {
        id(parameter) for parameter in training.adamw(model, 1e-3, 0.1).param_groups[0]["params"]
    }
    found = [module for module in model.modules() if isinstance(module, s4d.S4D)]
    assert len(found) == 2
    for layer in found:
        assert not decayed & {
            id(getattr(layer, name)) for name in ("log_step", "log_decay", "frequency", "C", "D")
        }
        torch.testing.assert_close(layer.frequency[3, :3], torch.tensor([0, math.pi, 2 * math.pi]))
        torch.testing.assert_close(layer.log_decay.exp().unique(), torch.tensor([0.5]))
        assert 0.001 <= layer.log_step.exp().min() and layer.log_step.exp().max() <= 0.1


def test_peak_memory_is_that_of_the_call():
    for mebibytes in (512, 256):  # the second is not hidden by the first
        call = partial(torch.ones, mebibytes * 2**18)
        told = measure.peak_bytes(call, torch.device("cpu"))
        assert told is None or told == pytest.approx(mebibytes * 2**20, rel=0.1)
    assert measure.peak_memory(call) == pytest.approx(256 * 2**20, rel=0.1)


def test_each_model_has_its_own_peak(monkeypatch):
    peaks = iter((1, 2))
    monkeypatch.setattr(throughput, "peak_bytes", lambda call, device: next(peaks))
    given = {
        name: modes.Provider(name, Config(layers=name, width=16), "torch")
        for name in ("mlp", "mamba")
    }
    rows = throughput.measure_point(
        "prefill", given, 8, 1, throughput.Options(rounds=1), torch.device("cpu")
    )
    assert [(row["model"], row["peak_bytes"]) for row in rows] == [
        ("mlp", 1),
        ("mamba", 2),
        ("mlp again", 1),
    ]
