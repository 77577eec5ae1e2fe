"""The settings of a whole model, the presets, and their costs."""

import dataclasses

import pytest
import torch

from minimodels import LM, Config, InputError, preset
from minimodels.grammar import expand, parse, write
from minimodels.ledger import ledger
from minimodels.ledger.__main__ import Options, main
from minimodels.presets import MIXED, PRESETS, SIZES, fitted, layers_of


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"width": -1}, "width: -1 .* a whole number from 1"),
        ({"width": 16.0}, "width: 16.0 .* a whole number"),
        ({"width": True}, "width: True"),
        ({"vocab": -1}, "vocab: -1 .* from 0"),
        ({"vocab": 2**31}, "vocab: 2147483648 .* to 2147483647"),
        ({"norm_eps": float("nan")}, "norm_eps: nan .* a number of 0 or more"),
        ({"norm_eps": -1e-9}, "norm_eps: -1e-09"),
        ({"tie_embeddings": 1}, "tie_embeddings: 1 .* true or false"),
        ({"impl": "cuda"}, "impl: 'cuda' .* auto, reference, torch, triton"),
        ({"residual": "no_norm"}, "residual: 'no_norm' .* pre_norm"),
        ({"objective": "guess"}, "objective: 'guess' .* next_token"),
        ({"layers": ("mlp",)}, "layers: .* text"),
        ({"layers": "mlp)"}, "layers: '\\)' .* a layer or the end"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(InputError, match=message):
        Config(**fields)


@pytest.mark.parametrize(
    "layers, width, message",
    [
        ("attention(heads=3)", 100, "attention.heads: 3 .* divisor of width 100"),
        ("attention", 12, "attention.heads: 4 .*width 12 / 4 is 3"),
        ("mod(attention(kv_heads=3))", 16, "attention.kv_heads: 3 .* divisor of heads 4"),
    ],
)
def test_what_does_not_fit_the_width_is_refused_when_the_model_is_built(layers, width, message):
    config = Config(layers=layers, width=width)
    with pytest.raises(InputError, match=message):
        LM(config)
    with pytest.raises(InputError, match=message):
        ledger(config, 64)


def test_heads_without_positions_need_be_neither_even_nor_divisors():
    lm = LM(Config(layers="attention(heads=3, head_dim=5, rope_base=0)", width=10, vocab=7))
    assert lm.layers[0].layer.q.weight.shape == (15, 10)


def test_unknown_preset_names_the_known():
    with pytest.raises(InputError, match=f"model: 'gpt' .* {', '.join(PRESETS)}"):
        preset("gpt")
    with pytest.raises(InputError, match="model: 'mamb' .* did you mean mamba"):
        preset("mamb")
    with pytest.raises(InputError, match="size: 'huge' .* tiny, small"):
        preset("mamba", "huge")
    with pytest.raises(InputError, match="depth"):
        preset("mamba", depth=3)
    with pytest.raises(InputError, match="set: 'attention.heads=2' .* mamba"):
        preset("mamba", "tiny", "attention.heads=2")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MIXED)
def test_hybrids_have_three_recurrent_layers_to_one_of_attention(model, size):
    """As in Qwen3-Next, OLMo-Hybrid and Kimi Linear."""
    names = [call.name for call in expand(parse(layers_of(model, size)))]
    recurrent = sum(map(names.count, ("mamba", "mamba2", "deltanet")))
    assert recurrent == 3 * names.count("attention") > 0


@pytest.mark.parametrize("model", PRESETS)
@pytest.mark.parametrize("size", SIZES)
def test_presets_have_comparable_costs(model, size):
    """At one size, every preset except the one with mixture-of-depths costs about as much per
    token as the transformer."""
    cost, transformer = (ledger(preset(name, size), 256) for name in (model, "transformer"))
    if "mod(" in layers_of(model, size):
        assert cost.forward_flops < 0.7 * transformer.forward_flops
        assert cost.parameters == pytest.approx(transformer.parameters, rel=0.05)
    else:
        assert cost.forward_flops == pytest.approx(transformer.forward_flops, rel=0.25)
        assert cost.active == pytest.approx(transformer.active, rel=0.3)


def test_speedup_is_what_routing_saves():
    dense = ledger(preset("transformer"), 256).forward_flops
    routed = ledger(preset("mod"), 256)
    assert routed.speedup == pytest.approx(dense / routed.forward_flops, rel=0.01)
    assert ledger(preset("transformer"), 256).speedup == 1
    assert 2 < ledger(preset("moe"), 256).speedup < 4


def test_what_initial_weights_are_scaled_by():
    config = Config(layers="moe mod(attention mlp)", width=192)
    assert config.depth == 3
    assert config.init_std == pytest.approx(0.04)  # because 192 is a quarter of 768


def test_presets_have_the_shape_of_their_size_unless_told_otherwise():
    small = preset("transformer", "small")
    assert (small.width, small.depth) == (768, 24)
    assert small.layers == "(attention(heads=12) mlp)*12"
    other = preset("transformer", "small", "attention.heads=6", width=96)
    assert (other.width, other.layers) == (96, "(attention(heads=6) mlp)*12")
    assert preset("transformer", layers="mlp").layers == "mlp"
    hybrid = preset("hybrid", "tiny", "mamba.state_size=4", "moe.experts=2")
    assert hybrid.layers.count("mamba(state_size=4)") == 3
    assert hybrid.layers.count("moe(experts=2)") == 2


def test_a_size_sets_what_the_text_does_not():
    assert fitted("mlp", "small") == "mlp"
    text = "attention(heads=4) mod(attention)"
    assert fitted(text, "small") == "attention(heads=4) mod(attention(heads=12))"
    assert fitted("a=attention(heads=2) a", "small") == "a=attention(heads=2) a"


@pytest.mark.parametrize("model", PRESETS)
def test_presets_are_texts(model):
    """The layers of a preset can be written, and read as the same model."""
    config = preset(model)
    again = dataclasses.replace(config, layers=write(parse(config.layers)))
    assert again.calls == config.calls


def test_configurations_of_the_same_layers_have_the_same_calls():
    """Spaces, repeats and definitions do not matter; names, options and shared weights do."""
    same = [
        "(mlp mamba)*2",
        "mlp mamba  mlp\nmamba",
        "(mlp mamba) (mlp mamba)",
        "a=mlp (a mamba)*2",
    ]
    assert len({Config(layers=text).calls for text in same}) == 1
    other = ["(mamba mlp)*2", "(mlp mamba(expand=3))*2", "a:=mlp (a mamba)*2", "mod(mlp mamba)*2"]
    assert len({Config(layers=text).calls for text in [*other, same[0]]}) == 5


def test_a_trained_token_costs_three_passes_and_the_table_says_so(capsys):
    cost = ledger(preset("moe", "small"), 64)
    assert cost.training_flops == 3 * cost.forward_flops
    assert f"{3 * cost.forward_flops / 1e6:.1f} MFLOPs per trained token" in str(cost)
    assert (
        ledger(preset("transformer"), 64, itemsize=2).state_bytes
        == ledger(preset("transformer"), 64).state_bytes / 2
    )
    main(Options(size="small", context=64))
    (row,) = (
        line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("moe")
    )
    assert row[1:4] == [
        f"{cost.parameters / 1e6:.2f}M",
        f"{cost.active / 1e6:.2f}M",
        f"{cost.training_flops / 1e6:.1f}",
    ]


def test_the_table_counts_layers_that_are_given(capsys):
    main(Options(layers="A:=attention A mlp A", context=64))
    _, row = capsys.readouterr().out.splitlines()
    cost = ledger(Config(layers="A:=attention A mlp A"), 64)
    assert row.startswith("A:=attention A mlp A  ")
    assert f"{cost.parameters / 1e6:.2f}M" in row
    for wrong, message in (({"context": 0}, "context: 0"), ({"layers": "lstm"}, "lstm")):
        with pytest.raises(InputError, match=message):
            main(Options(**wrong))


def test_shared_layers_are_stored_once_and_computed_at_every_use():
    one, shared, apart = (
        ledger(Config(layers=text), 64) for text in ("attention", "A:=attention A A", "attention*2")
    )
    assert shared.parameters == one.parameters
    assert shared.forward_flops == apart.forward_flops
    assert shared.state_bytes == apart.state_bytes == 2 * one.state_bytes


def test_a_layer_can_be_added_in_its_own_way():
    """It says where its norm is, or the model does."""
    tokens = torch.arange(20).view(2, 10)

    def logits(**fields) -> torch.Tensor:
        torch.manual_seed(0)
        return LM(Config(width=16, **fields))(tokens)[0]

    layers = "attention(residual=post_norm) mlp(residual=post_norm)"
    after = logits(layers="attention mlp", residual="post_norm")
    assert torch.equal(logits(layers=layers), after)
    assert torch.equal(logits(layers=layers, residual="sandwich"), after)
    assert not torch.equal(logits(layers=layers.replace("post", "pre")), after)
    for wrong in ("learned_positions(residual=post_norm)", "mod(mlp, residual=post_norm)"):
        with pytest.raises(InputError, match="residual"):
            LM(Config(layers=wrong))


def test_deep_norm_adds_to_the_normalised_stream():
    """Each kind of layer with its own factors."""
    text = "attention(stream_scale=3) mlp(residual_scale=0.5)"
    model = LM(Config(width=16, layers=text, residual="deep_norm")).double()
    tokens = torch.arange(20).view(2, 10)
    x = model.embedding(tokens)
    for block, alpha, beta in zip(model.layers, (3, 1), (1, 0.5), strict=True):
        n = block.norm(x)
        x = alpha * n + beta * block.layer(n)[0]
    torch.testing.assert_close(model(tokens)[0], model.logits(model.norm(x)))
    with pytest.raises(InputError, match=r"stream_scale: 3 .* or residual=deep_norm"):
        LM(Config(width=16, layers=text))


def test_a_normalised_stream_keeps_its_precision_under_autocast():
    model, seen = LM(Config(width=16, layers="mlp*2", residual="deep_norm")), []
    for block in model.layers:
        block.register_forward_hook(lambda _, given, found: seen.extend((given[0], *found[:2])))
        block.layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 4, dtype=torch.int64))
    kinds = [str(x.dtype).removeprefix("torch.") for x in seen]
    assert kinds == 2 * ["bfloat16", "float32", "float32", "bfloat16"]
