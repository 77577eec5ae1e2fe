"""The layer grammar and what a configuration refuses."""

import re

import pytest

from minimodels import LM, Config, InputError, preset
from minimodels.config import parse_layers
from minimodels.ledger import Options, ledger, main
from minimodels.lm import LAYERS, WRAPPERS
from minimodels.presets import PRESETS, SIZES


@pytest.mark.parametrize(
    "text, layers",
    [
        ("mamba", ("mamba",)),
        ("(attention mlp)*2", ("attention", "mlp", "attention", "mlp")),
        ("mamba*3 mlp", ("mamba", "mamba", "mamba", "mlp")),
        ("((mamba)*2 mlp) * 2", ("mamba", "mamba", "mlp", "mamba", "mamba", "mlp")),
        ("mod(attention mlp)*2", (("mod", ("attention", "mlp")),) * 2),
        ("mlp mod(mamba mod(mlp))", ("mlp", ("mod", ("mamba", ("mod", ("mlp",)))))),
    ],
)
def test_grammar(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    "text",
    ["", "  ", "(mlp", "mlp)", "mlp**2", "mlp*0", "mlp*x", "mod()", "()", "*2", "mlp,mlp", "2"],
)
def test_grammar_refuses(text):
    with pytest.raises(InputError, match="layers"):
        Config(layers=text)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"width": 100, "heads": 3}, "heads: 3 .* divisor of width 100"),
        ({"width": 12, "heads": 4}, "head_dim: 3"),
        ({"kv_heads": 3}, "kv_heads: 3 .* divisor of heads 4"),
        ({"capacity": 0.0}, "capacity: 0.0"),
        ({"capacity": 1.5}, "capacity: 1.5"),
        ({"capacity": float("nan")}, "capacity: nan"),
        (
            {"layers": "moe", "experts": 2, "experts_per_token": 3},
            "experts_per_token: 3 .* 1 to experts 2",
        ),
        ({"experts": 0}, "experts: 0"),
        ({"window": 0}, "window: 0"),
        ({"router": "hash"}, "router: 'hash' .* softmax_topk"),
        ({"impl": "cuda"}, "impl: 'cuda' .* auto"),
        ({"mod_route": "topk"}, "mod_route: 'topk' .* predictor"),
        ({"width": -1}, "width: -1"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(InputError, match=message):
        Config(**fields)


@pytest.mark.parametrize("layers", ["attention lstm", "mod", "mlp(attention)", "moe mod(rnn)"])
def test_unknown_layer_names_the_known(layers):
    with pytest.raises(
        InputError,
        match=re.escape(", ".join([*LAYERS, *(f"{wrapper}(...)" for wrapper in WRAPPERS)])),
    ):
        LM(Config(layers=layers))


def test_unknown_preset_names_the_known():
    with pytest.raises(InputError, match=f"model: 'gpt' .* {', '.join(PRESETS)}"):
        preset("gpt")
    with pytest.raises(InputError, match="size: 'huge' .* tiny, small"):
        preset("mamba", "huge")
    with pytest.raises(InputError, match="depth"):
        preset("mamba", depth=3)


@pytest.mark.parametrize("model", PRESETS)
@pytest.mark.parametrize("size", SIZES)
def test_presets_stand_on_comparable_axes(model, size):
    """At one size every preset but the routed-depth one costs about what the transformer does per token."""
    cost, transformer = (ledger(preset(name, size), 256) for name in (model, "transformer"))
    if "mod(" in PRESETS[model](4):
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
    assert config.init_std == pytest.approx(0.04)  # for 192 is a quarter of 768


def test_presets_have_the_shape_of_their_size_unless_told_otherwise():
    small = preset("transformer", "small")
    assert (small.width, small.heads, small.window, small.depth) == (768, 12, 1024, 24)
    assert preset("transformer", "small", heads=6, width=96).width == 96
    assert preset("transformer", "small", heads=6, width=96).heads == 6


def test_what_is_within_wrappers_is_refused_too():
    for layers in ("moe", "mod(moe)"):
        for router in ("softmax_topk", "sigmoid_bias"):
            with pytest.raises(InputError, match="experts_per_token: 1"):
                Config(layers=layers, experts_per_token=1, router=router)
        Config(layers=layers, experts_per_token=1, router="softmax")
    with pytest.raises(InputError, match="low less than high"):
        Config(rope_scaling="llama3:factor=8,low=4,high=1,context=16")
    LM(
        Config(layers="attention", width=10, heads=3, head_dim=5, rope_base=0.0)
    )  # no pairs, no divisor


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
