"""The claims about attention: their models are comparable, and what is recorded of a trained model is
right."""

import functools
import json

import pytest
import torch

from benchmarks import attention, plot, training
from benchmarks.attention import ATTENTION, Probe, Stream, by_position, continued
from benchmarks.training import Run
from minimodels import LM, Config
from minimodels.architectures.transformer import Attention
from minimodels.data.text import open_data
from minimodels.grammar import set_options
from minimodels.ledger import ledger
from minimodels.ops.rotary import rotary, rotate

CPU = torch.device("cpu")
OPTIONS = ["", ", sink=true", ", gate=full", ", kv_heads=1"]


def trained(layers: str, seed: int = 0) -> LM:
    """A model in fp64 with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    model = LM(Config(layers=layers, width=16, vocab=256)).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("small", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", ATTENTION)
def test_models_that_are_compared_have_equal_active_parameters(name, small):
    claim = ATTENTION[name](small)
    assert claim.seeds == 3 and claim.runs
    budgets = [ledger(run.config, run.context).active for run in claim.runs]
    assert max(budgets) < 1.005 * min(budgets)


@pytest.mark.parametrize("more", OPTIONS)
def test_a_stream_without_first_tokens_is_attention_in_a_window(more):
    """Pieces of one token never see more or less than a window."""
    model = trained(f"(attention(heads=2{more}) mlp)*2")
    text = set_options(model.config.layers, ["attention.window=8"])
    windowed = LM(Config(layers=text, width=16, vocab=256)).double().eval()
    windowed.load_state_dict(model.state_dict())
    tokens = torch.randint(256, (2, 37))
    with torch.no_grad():
        streamed, _ = Stream(model, 8, 0, pieces=8)(tokens)
        assert torch.allclose(streamed, windowed(tokens)[0], atol=1e-12)
        assert not torch.allclose(streamed, model(tokens)[0], atol=1e-3)


@pytest.mark.parametrize("more", OPTIONS)
def test_a_stream_keeps_its_first_tokens_next_to_the_latest(more):
    """In one layer, each key and value depends only on its own token, so the stream ends like a
    short text of the tokens that it remembers."""
    model = trained(f"attention(heads=2{more})")
    tokens = torch.randint(256, (2, 40))
    remembered = torch.cat((tokens[:, :3], tokens[:, 35:]), dim=1)  # 3 + 3, and a piece of 2
    with torch.no_grad():
        streamed, state = Stream(model, 8, 3, pieces=4)(tokens)
        expected, _ = model(remembered)
    assert state[0].keys.shape[2] == 8
    assert torch.allclose(streamed[:, -2:], expected[:, -2:], atol=1e-5)  # angles are in fp32


@pytest.mark.parametrize("more", OPTIONS)
def test_the_probe_finds_the_weights_of_the_first_token_and_of_the_sink(more):
    layer = trained(f"attention(heads=2{more})").layers[0].layer
    x, angles = torch.randn(2, 9, 16).double(), rotary(torch.arange(9), 8, 10_000.0)
    with torch.no_grad():
        q, k = (part(x).unflatten(2, (-1, 8)).transpose(1, 2) for part in (layer.q, layer.k))
        scores = rotate(q, *angles) @ rotate(k, *angles).mT * 8**-0.5
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        sink = torch.full((2,), -torch.inf) if layer.sink is None else layer.sink
        scores = torch.cat((scores, sink.view(2, 1, 1).expand(2, 2, 9, 1)), dim=-1)
        expected = scores.softmax(-1)[..., [0, -1]].mean(1)  # (B, T, 2)
        assert torch.allclose(Probe(layer)(x), expected, atol=1e-6)
    assert isinstance(layer, Attention) and isinstance(layer.v, torch.nn.Linear)  # as before


def test_tuning_starts_from_the_trained_weights():
    model = trained("attention(heads=2) mlp").float()
    run = Run("rotary", model.config, "stdlib", 32, 1, 2)
    scaled = "attention(heads=2, rope_scaling=yarn(factor=8, context=32)) mlp"
    same = continued(model, run, model.config.layers, 0, CPU)
    yarn = continued(model, run, scaled, 0, CPU)
    tuned = continued(model, run, scaled, 1, CPU)
    tokens = torch.randint(256, (1, 64))
    assert torch.equal(same.eval()(tokens)[0], model(tokens)[0])
    assert not torch.equal(yarn.eval()(tokens)[0], model(tokens)[0])
    for name, weight in model.state_dict().items():
        assert torch.equal(yarn.state_dict()[name], weight)
    # one step of Adam moves a number by about the rate
    moved = (tuned.embedding.weight - model.embedding.weight).abs().max()
    assert 0 < moved < 2 * run.lr


def test_bits_by_position_are_those_of_each_bin(monkeypatch):
    """A model that knows the next byte with certainty up to a position, and nothing after it."""
    monkeypatch.setattr(attention, "READ", (2, 1))
    data = open_data("stdlib", 512)
    (targets,) = (targets for _, targets in data.validation(2, 1))

    class Oracle(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, tokens):
            logits = 1e4 * torch.nn.functional.one_hot(targets, 256).double()
            logits[:, 96:] = 0
            return logits, None

    assert dict(by_position(Oracle(), data, 64)) == pytest.approx({64: 0, 128: 4, 256: 8, 512: 8})


@pytest.mark.parametrize("name", ["sinks", "positions"])
def test_a_claim_leaves_rows_that_plot_draws(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    real = ATTENTION[name]

    def shorter(small):
        described = real(small)
        for run in described.runs:
            run.batch, run.context = 2, 64
        return described

    monkeypatch.setattr(attention, "READ", (1, 1))
    monkeypatch.setattr(attention, "TUNED", 1)
    monkeypatch.setattr(training, "SCORED", 1)
    for module in (attention, training):  # because opening a text takes longer than the rest
        monkeypatch.setattr(module, "open_data", functools.cache(open_data))
    monkeypatch.setitem(ATTENTION, name, shorter)
    attention.main(attention.Options(claim=name, scale=0.001, seeds=1, device="cpu", out=tmp_path))
    path = tmp_path / f"claim-{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    drawn = {(row["panel"], row["model"]) for row in rows if row["x"] is not None}
    models = {run.model for run in shorter(True).runs}
    panels = {"sinks": ("first", "whole", "window", "kept"), "positions": ("length",)}[name]
    if name == "positions":
        models |= {"rotary, tuned", "yarn", "yarn, tuned"}
    expected = {(panel, model) for panel in panels for model in models}
    assert drawn == expected
    plot.main(plot.Options(results=(path,)))
    assert len(list(tmp_path.glob("*.png"))) == len({panel for panel, _ in drawn})
