"""The grammar: what it reads, what it rejects and at which place, and the effect of each option."""

import string
import types
from dataclasses import fields
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, REPRESENTATIVES, WIDTH, make, observe, tensors

from minimodels import LM, Config, InputError
from minimodels.architectures.registry import LAYERS, WRAPPERS, read_call
from minimodels.grammar import (
    Call,
    Definition,
    Group,
    Option,
    Program,
    count_layers,
    parse,
    parse_call,
    set_options,
    write,
    write_call,
    write_value,
)
from minimodels.layers import flops, state_bytes
from minimodels.ops.rotary import Linear, Llama3
from minimodels.options import read_options, write_options

EVERY = {**LAYERS, **WRAPPERS}


def written_out(text: str) -> str:
    """The layers that a text describes, one by one. A shared layer has # and its shared name."""

    def one(call: Call) -> str:
        inside = [" ".join(map(one, call.layers))] if call.layers else []
        inside += [f"{each.name}={write_value(each.value)}" for each in call.options]
        name = f"{call.name}#{call.shared}" if call.shared else call.name
        return f"{name}({', '.join(inside)})" if inside else name

    return " ".join(map(one, Config(layers=text).calls))


@pytest.mark.parametrize(
    "text, layers",
    [
        ("mamba", "mamba"),
        ("(attention mlp)*2", "attention mlp attention mlp"),
        ("mamba*3 mlp", "mamba mamba mamba mlp"),
        ("((mamba)*2 mlp) * 2", "mamba mamba mlp mamba mamba mlp"),
        ("mod(attention mlp)*2", "mod(attention mlp) mod(attention mlp)"),
        ("mlp mod(mamba mod(mlp))", "mlp mod(mamba mod(mlp))"),
        ("mamba (attention mlp)*2", "mamba attention mlp attention mlp"),  # after a space: a group
        ("attention( window = 8 ,heads=2 )\n\tmlp", "attention(window=8, heads=2) mlp"),
        ("mod((mamba mlp)*2, capacity=0.5)", "mod(mamba mlp mamba mlp, capacity=0.5)"),
        ("mod(attention capacity=0.5)", "mod(attention, capacity=0.5)"),  # the comma is optional
        ("attention() mamba()*2", "attention mamba mamba"),
        ("a=attention(window=5) (a mlp)*2", "attention(window=5) mlp attention(window=5) mlp"),
        ("a=attention b=(a mlp)*2 b mamba a", "attention mlp attention mlp mamba attention"),
        ("mlp=mamba mlp", "mamba"),  # a definition hides the layer of its name
        ("A:=attention mamba A mlp A", "mamba attention#A mlp attention#A"),
        ("A:=(attention mlp) A*2", "attention#A.0 mlp#A.1 attention#A.0 mlp#A.1"),
        ("A:=mlp*2 A", "mlp#A.0 mlp#A.1"),
        ("A:=mod(mlp) A A", "mod#A(mlp) mod#A(mlp)"),
        ("A:=mlp mod(A attention) A", "mod(mlp#A attention) mlp#A"),
        ("A:=mlp B:=(A mamba) B A", "mlp#A mamba#B.1 mlp#A"),  # the innermost name counts
    ],
)
def test_grammar(text, layers):
    assert written_out(text) == layers
    assert written_out(write(parse(text))) == layers


NESTED = "mod(" * 51 + "mlp" + ")" * 51
CHAIN = "a0=mlp " + " ".join(f"a{i}=a{i - 1}" for i in range(1, 2000)) + " a1999"
A_LAYER = "here a layer; a text is like"
# text, the value that the error names, what it says is accepted, where its caret points
REFUSED = [
    ("", "the end of the text", A_LAYER, ""),
    ("  ", "the end of the text", A_LAYER, ""),
    ("()", ")", A_LAYER, ")"),
    ("*2", "*", A_LAYER, "*2"),
    ("2", "2", A_LAYER, "2"),
    ("mlp ; mamba", ";", A_LAYER, "; mamba"),
    ("mlp,mlp", ",", "here a layer or the end", ",mlp"),
    ("attention mlp)", ")", "here a layer or the end", ")"),
    ("(attention mlp", "the end of the text", 'here ")"', ""),
    ("mod(attention mlp", "the end of the text", 'here ")"', ""),
    ("mod(attention, mlp)", ")", 'here "="', ")"),
    ("mlp**2", "*", "here a whole number of 1 or more", "*2"),
    ("mlp*0", "0", "here a whole number of 1 or more", "0"),
    ("mlp*x", "x", "here a whole number of 1 or more", "x"),
    ("mlp*2.5", "2.5", "here a whole number of 1 or more", "2.5"),
    ("mlp*-1", "-1", "here a whole number of 1 or more", "-1"),
    ("attention(heads=2 window=5)", "window", 'here "," or ")"', "window=5"),
    ("attention(heads=2, heads=4)", "heads", "here each option once", "heads=4"),
    ("attention(window=)", ")", "here a number, true, false, a word or numbers in brackets", ")"),
    ("attention(rope_scaling=linear(mlp))", "linear", "here options in the paren", "linear("),
    ("attention (heads=2)", "=", "here a layer", "=2"),  # a space: a group
    ("mlp a=mamba", "=", "a layer; definitions come first", "=mamba"),  # a definition comes first
    ("attention lstm", "lstm", "attention, mlp, mamba, moe", "lstm"),
    ("attention mambo", "mambo", "did you mean mamba? attention, mlp", "mambo"),
    ("attention MLP", "MLP", "did you mean mlp? attention, mlp", "MLP"),
    ("mod(mlp rnn)", "rnn", "attention, mlp, mamba, moe", "rnn"),
    ("mlp moe(expert=8)", "expert", "did you mean experts? experts, ", "expert=8"),
    ("mod(mlp, window=5)", "window", "capacity, route, loss", "window=5"),
    ("mlp attention(window=0)", 0, "a whole number from 1 to 2147483647 or none", "window=0"),
    ("attention(heads=2.5)", 2.5, "a whole number from 1", "heads=2.5"),
    ("attention(heads=[1,2])", "[1, 2]", "a whole number from 1", "heads=[1,2]"),
    ("attention(heads=none)", "none", "a whole number from 1", "heads=none"),
    ("attention(window=true)", True, "a whole number from 1", "window=true"),
    ("attention(bias=1)", 1, "true or false", "bias=1"),
    ("attention(qk_norm=all)", "all", "none, head, full", "qk_norm=all"),
    ("attention(rope_base=1e999)", float("inf"), "a number of 0 or more", "rope_base"),
    ("moe(router=hash)", "hash", "softmax_topk, softmax, sigmoid_bias", "router=hash"),
    ("mod(mlp, capacity=0)", 0, "a fraction above 0, at most 1", "capacity=0"),
    ("mod(mlp, capacity=1.5)", 1.5, "a fraction above 0, at most 1", "capacity=1.5"),
    ("mod(mlp, route=topk)", "topk", "router, predictor", "route=topk"),
    ("mamba mlp(attention)", "mlp", "no layers in its parentheses", "mlp(attention)"),
    ("mlp mod", "mod", "layers in its parentheses", "mod"),
    ("mod() mlp", "mod", "layers in its parentheses", "mod()"),
    ("mod (mlp)", "mod", "layers in its parentheses", "mod (mlp)"),
    ("attention(rope_scaling=wavy)", "wavy", "none or linear(factor=...)", "rope_scal"),
    ("attention(rope_scaling=linear(factr=2))", "factr", "did you mean factor?", "factr=2"),
    ("attention(rope_scaling=linear(factor=four))", "four", "a number above 0", "factor=four"),
    ("attention(rope_scaling=llama3(low=4, high=1))", 4, "less than high, 1", "low=4"),
    ("mlp attention(heads=3)", 3, "a divisor of width 16, or a head_dim", "attention(heads=3)"),
    ("attention(heads=16)", 16, "turns pairs (width 16 / 16 is 1)", "attention(heads=16)"),
    ("attention(head_dim=3)", 3, "an even number", "attention(head_dim=3)"),
    ("latent_attention(heads=16)", 16, "heads of an even width", "latent_attention"),
    ("latent_attention(rope_dim=3)", 3, "an even number", "latent_attention"),
    ("differential_attention(heads=16)", 16, "heads of an even width", "differential"),
    ("retention(heads=16, rope_base=9)", 16, "heads of an even width", "retention"),
    ("attention(rope_fraction=0.25)", 0.25, "an even number", "attention(rope"),
    ("attention(kv_heads=3)", 3, "a divisor of heads 4", "attention"),
    ("moe(experts=2, experts_per_token=3)", 3, "1 to experts 2", "experts_per_token=3"),
    ("moe moe(experts_per_token=1)", 1, "2 or more, or router=softmax", "experts_per_token=1"),
    ("mod(mod(moe(experts_per_token=9)))", 9, "1 to experts 8", "experts_per_token=9"),
    ("mod(attention(heads=3))", 3, "a divisor of width 16", "attention(heads=3)"),
    ("a=mlp", "the end of the text", A_LAYER, ""),
    ("mod(capacity=0.5, attention mlp)", "mlp", "layers come before options", "mlp)"),
    ("attention(8)", "8", "name=value, such as heads=8", "8)"),
    ("a:=attention mlp", "a", "a definition whose name is used later", "a:=attention"),
    ("b=mlp a=b mlp", "b", "a definition whose name is used later", "b=mlp"),
    ("a=a mlp", "a", "a definition whose name is used later", "a=a"),
    (
        "attention (window=6)",
        "=",
        "without a space before them: a=mlp attention(window=64) a",
        "=6)",
    ),
    ("a=mlp a=mamba a", "a", "here a name that is not defined yet", "a=mamba"),
    ("a=mlp a(width=3)", "a", "a defined name without options", "a(width=3)"),
    ("a=b b=a a", "a", "a definition that is not inside itself", "a a"),
    ("a=mod(mlp a) a", "a", "a definition that is not inside itself", "a) a"),
    (CHAIN, "a1949", "definitions nested at most 50 deep", "a1949"),
    ("(" * 51 + "mlp" + ")" * 51, "(", "here groups nested at most 50 deep", "(mlp"),
    (NESTED, "(", "here groups nested at most 50 deep", "(mlp"),
]


@pytest.mark.parametrize(
    "text, value, accepted, place", REFUSED, ids=[row[0][:60] or "nothing" for row in REFUSED]
)
def test_refused_with_a_caret(text, value, accepted, place):
    with pytest.raises(InputError) as raised:
        LM(Config(layers=text, width=WIDTH))
    error = raised.value
    assert error.field.startswith("layers")
    assert (error.value, type(error.value)) == (value, type(value))
    assert accepted in error.accepted
    line, caret = error.excerpt.split("\n")
    assert caret.strip() == "^"
    assert line[len(caret) - 1 :].removesuffix("...").startswith(place)
    assert place or len(caret) > len(line)
    assert str(error).endswith(error.excerpt)


@pytest.mark.parametrize("space", [" ", "\n", "\r\n", "\t"], ids=["space", "line", "crlf", "tab"])
@pytest.mark.parametrize("before, after", [(0, 0), (3, 3), (100, 0), (0, 100), (100, 100)])
def test_the_caret_is_at_its_place_in_a_long_text(before, after, space):
    text = space.join(["mlp"] * before + ["lstm"] + ["mlp"] * after)
    with pytest.raises(InputError) as raised:
        LM(Config(layers=text, width=WIDTH))
    line, caret = raised.value.excerpt.split("\n")
    assert line[len(caret) - 1 :].startswith("lstm")
    assert len(line) <= 130


@pytest.mark.parametrize(
    "text",
    ["mlp*10001", "mlp*99999999", "a=mlp*101 b=a*100 b", "mod(mlp*101)*100", "A:=mlp*5001 A A"],
)
def test_a_model_has_a_most_of_layers(text):
    with pytest.raises(InputError, match="at most 10000 layers"):
        Config(layers=text)


def test_layers_are_counted_without_their_wrappers():
    assert count_layers(Config(layers="mod(mlp*4999, capacity=0.5)*2").calls) == 9998
    assert Config(layers="moe mod(attention mod(mlp))").depth == 3


# Any program, as a tree.

NAMES = st.text(string.ascii_letters + "_", min_size=1, max_size=4).filter(
    lambda name: name not in ("true", "false")
)


def options_of(values, least=0):
    """Up to three options, with different names."""
    pairs = st.dictionaries(NAMES, values, min_size=least, max_size=3)
    return pairs.map(lambda given: tuple(Option(*pair) for pair in given.items()))


def many(items):
    """One to three items."""
    return st.lists(items, min_size=1, max_size=3).map(tuple)


VALUES = st.recursive(
    st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | NAMES
    | many(st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.builds(
        lambda name, options: Call(name, options=options), NAMES, options_of(inner, 1)
    ),
    max_leaves=3,
)


ITEMS = st.recursive(
    st.builds(lambda name, options: Call(name, (), options), NAMES, options_of(VALUES)),
    lambda inner: (
        st.builds(Call, NAMES, many(inner), options_of(VALUES))
        | st.builds(Group, many(inner), st.integers(1, 12))
    ),
    max_leaves=6,
)
PROGRAMS = st.builds(
    lambda definitions, items: Program(definitions, (*map(Call, definitions), *items)),
    st.dictionaries(NAMES, st.builds(Definition, st.booleans(), ITEMS), max_size=3),
    many(ITEMS),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(PROGRAMS)
def test_what_is_written_is_read_as_the_same(program):
    assert parse(write(program)) == program


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text("ab12.*():=, -+e\n", max_size=25) | st.text(max_size=10))
def test_any_text_is_read_or_refused(text):
    """Any text that is read can be written and read again."""
    try:
        program = parse(text)
    except InputError:
        return
    assert parse(write(program)) == program


# Options that are set from outside.

LOCAL = "local=attention(window=512) (local mlp)*2 attention"


@pytest.mark.parametrize(
    "text, setting, expected",
    [
        ("mamba", "mamba.state_size=32", "mamba(state_size=32)"),
        ("mod(mamba*2) mlp", " mamba.x = 1 ", "mod(mamba(x=1)*2) mlp"),
        ("moe(experts=4, bias=true)", "moe.experts=8", "moe(experts=8, bias=true)"),
        ("mod(mlp, capacity=0.5)", "mod.route=router", "mod(mlp, capacity=0.5, route=router)"),
        ("attention", "attention.rope_scaling=linear(factor=4)", "attention(rope_scaling=linear(factor=4))"),
        ("attention(window=5)", "attention.window=none", "attention(window=none)"),
        ("attention(rope_scaling=yarn)", "attention.rope_scaling.factor=4", "attention(rope_scaling=yarn(factor=4))"),
        ("attention(rope_scaling=longrope(short=[1, 2], context=8)) mlp", "attention.rope_scaling.context=9",
         "attention(rope_scaling=longrope(short=[1, 2], context=9)) mlp"),
        (LOCAL, "local.window=64", LOCAL.replace("512", "64")),
        (
            LOCAL,
            "attention.heads=8",
            "local=attention(window=512, heads=8) (local mlp)*2 attention(heads=8)",
        ),
        ("A:=mod(mlp) A A", "A.capacity=0.5", "A:=mod(mlp, capacity=0.5) A A"),
        ("A:=(attention mamba) A", "A.bias=true", "A:=(attention(bias=true) mamba(bias=true)) A"),
        ("A=mlp B=(A mamba) B", "B.bias=true", "A=mlp B=(A mamba(bias=true)) B"),
    ],
)  # fmt: skip
def test_options_are_set_in_all_layers_of_a_name(text, setting, expected):
    assert set_options(text, [setting]) == expected


def test_settings_follow_each_other_and_none_change_nothing():
    text = "( mamba   mlp )*2"
    assert set_options(text, []) is text
    given = ["mamba.state_size=4", "mlp.width=8", "mamba.state_size=5", "mamba.expand=1"]
    assert set_options(text, given) == "(mamba(state_size=5, expand=1) mlp(width=8))*2"


def test_missing_options_alone_are_set():
    text = "a=attention(heads=2) a attention mod(attention(window=5))"
    expected = "a=attention(heads=2) a attention(heads=8) mod(attention(window=5, heads=8))"
    assert set_options(text, ["attention.heads=8"], missing=True) == expected
    with pytest.raises(InputError, match="a layer of the model: did you mean attention"):
        set_options(text, ["atention.heads=8"], missing=True)


@pytest.mark.parametrize(
    "setting, accepted",
    [
        ("mamba", "LAYER.OPTION=VALUE, such as mamba.state_size=32"),
        ("mamba=3", "LAYER.OPTION=VALUE"),
        ("attention.heads=8 mlp.width=64", "one LAYER.OPTION=VALUE; repeat --set"),
        ("mamba.state_size", "LAYER.OPTION=VALUE"),
        ("mamba.state_size=", "here a number, true, false, a word or numbers in brackets"),
        ("mamba.state_size=4, expand=1", "one option; repeat --set for another"),
        ("mamba.state_size=4) mlp(width=8", "a name with options"),
        ("mamba.state_size=4)", "here a layer or the end"),
        ("mamba.scaling.factor=4", "an option that the text sets in mamba"),
        ("mambo.state_size=4", "a layer of the model: did you mean mamba? mamba, mlp, mod"),
        ("attention.heads=4", "a layer of the model: mamba, mlp, mod"),
    ],
)
def test_settings_that_are_refused(setting, accepted):
    with pytest.raises(InputError) as raised:
        set_options("mod(mamba) mlp", [setting])
    assert raised.value.field == "set"
    assert accepted in raised.value.accepted


def test_a_setting_that_its_layer_does_not_have_is_refused_when_the_model_is_built():
    text = set_options("mlp mamba", ["mamba.heads=4"])
    with pytest.raises(InputError, match=r"layers: mamba: 'heads' is not accepted"):
        LM(Config(layers=text, width=WIDTH))


# What a single call may be.


def test_a_call_is_one_name_with_options():
    call = parse_call("mqar(pairs=8, vocab=256)", "data")
    assert (call.name, [(each.name, each.value) for each in call.options]) == (
        "mqar",
        [("pairs", 8), ("vocab", 256)],
    )
    for text in ("mqar mqar", "mqar*2", "(mqar)", "mqar(text)", ""):
        with pytest.raises(InputError, match="data: "):
            parse_call(text, "data")


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3), ("-3", -3), ("+3", 3), ("3.0", 3.0), (".5", 0.5), ("3.", 3.0), ("1e4", 1e4), ("-1.5E-3", -1.5e-3),
        ("[1, 2.5]", (1, 2.5)), ("[]", ()), ("[ 3, ]", (3,)),
        ("true", True), ("false", False), ("word", "word"), ("word()", "word"), ("9" * 30, float("9" * 30)),
        ("f(x=1, y=g(z=true))", Call("f", options=(Option("x", 1), Option("y", Call("g", options=(Option("z", True),)))))),
    ],
)  # fmt: skip
def test_values(text, value):
    (found,) = parse_call(f"name(option={text})", "layers").options
    assert found.value == value
    assert type(found.value) is type(value)


# What the options of the layers do.


def read(text: str):
    """The options of a call, as its layer reads them."""
    call = parse_call(text, "layers")
    return read_options(EVERY[call.name].Options, call, text)


def test_none_is_no_value_or_a_word():
    assert read("attention(window=none)").window is None
    assert read("attention(rope_scaling=none)").rope_scaling is None
    assert read("attention(qk_norm=none)").qk_norm == "none"
    assert read("mamba(norm=none, norm_eps=none)") == EVERY["mamba"].Options()


def test_scalings_are_read_with_their_defaults():
    assert read("attention(rope_scaling=linear)").rope_scaling == Linear()
    scaling = "llama3(factor=2, low=0.5, high=3, context=100)"
    assert read(f"attention(rope_scaling={scaling})").rope_scaling == Llama3(2, 0.5, 3, 100)
    assert read("attention(rope_scaling=llama3(context=100))").rope_scaling == Llama3(context=100)


DEFAULTS = [(name, each) for name, kind in EVERY.items() for each in fields(kind.Options)]


@pytest.mark.parametrize("name, field", DEFAULTS, ids=lambda given: getattr(given, "name", given))
def test_defaults_can_be_written(name, field):
    default = "none" if field.default is None else write_value(field.default)
    assert read(f"{name}({field.name}={default})") == EVERY[name].Options()
    assert write_options(EVERY[name].Options()) == ()


NUMBERS = [1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.6, 2.5, 100.0]
MORE_TEXTS = {
    "attention.rope_fraction": ["attention(heads=2)"],  # wider heads
    "retention.block": ["retention(decay=layers)*6"],
}
VALUES_OF = {int: [1, 2, 3, 4, 6, 8, 24], float: NUMBERS, bool: [True, False]}
SCALINGS = [
    "linear(factor=2)", "llama3(factor=8, low=1, high=4, context=16)", "dynamic(context=8, length=64)",
    "longrope(attention=1.5)", "yarn(context=16)",
]  # fmt: skip


def values_of(name: str, field) -> tuple[list, int]:
    """The values at which an option is tried, including its default, and how many of
    the models must differ."""
    if field.name == "rope_scaling":
        return [field.default, *SCALINGS], 1 + len(SCALINGS)
    hint = get_type_hints(EVERY[name].Options)[field.name]  # without its range
    union = get_origin(hint) in (Union, types.UnionType)
    kinds = [kind for kind in (get_args(hint) if union else (hint,)) if kind is not type(None)]
    values = [field.default]
    for kind in kinds:
        values += get_args(kind) if get_origin(kind) is Literal else VALUES_OF[kind]
    values = list({(type(value), value): value for value in values}.values())
    return values, 3 if int in kinds or float in kinds else len(values)


def built(text: str) -> list[torch.Tensor]:
    """Everything about a model that an option can change: parameters, outputs, losses, effects
    of a step, states, FLOPs."""
    stack = make(text).train()
    x = torch.randn(2, 23, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, state, record = observe(stack, x)
    for module in stack.modules():
        if hasattr(module, "after_step"):
            module.after_step()
    costs = torch.tensor([flops(stack, 160), state_bytes(stack, 160, 4)])
    found = [y, costs, *stack.parameters(), *stack.buffers(), *tensors(state)]
    return [*found, *(record.losses[name] for name in sorted(record.losses))]


def alike(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("name, field", DEFAULTS, ids=lambda given: getattr(given, "name", given))
def test_every_option_has_an_effect(name, field):
    """In one of the texts used for the laws, the default and two other values give three different
    models. If only a few values are possible, all of them give different models."""
    values, needed = values_of(name, field)
    most = 0
    for base in [*CASES[name], *MORE_TEXTS.get(f"{name}.{field.name}", [])]:
        models: list[list[torch.Tensor]] = []
        tried = 0
        for value in values:
            setting = f"{name}.{field.name}={'none' if value is None else write_value(value)}"
            text = set_options(base, [setting])
            try:
                model = built(text)
            except InputError:  # it does not fit the other options
                continue
            tried += 1
            check_written(name, text, field)
            if not any(alike(model, other) for other in models):
                models.append(model)
            if len(models) == needed:
                return
        if len(models) == tried > 1:  # the others were refused
            return
        most = max(most, len(models))
    pytest.fail(f"{values} make {most} different models at most; expected: {needed}")


def check_written(name: str, text: str, field) -> None:
    """The options that were read can be written, and are read as the same options."""
    call = Config(layers=text).calls[0]
    options, _ = read_call(call, text)
    again = write_call(Call(name, call.layers, write_options(options)))
    (call,) = Config(layers=again).calls
    assert read_options(EVERY[name].Options, call, again) == options
    assert (field.name in {each.name for each in call.options}) == (
        getattr(options, field.name) != field.default
    )


def test_equal_texts_build_equal_models():
    """If this failed, every option would seem to have an effect."""
    for text in REPRESENTATIVES:
        assert alike(built(text), built(text))


@pytest.mark.parametrize(
    "scaling, other",
    [
        ("linear(factor=2)", "linear(factor=3)"),
        ("llama3(factor=8, context=16)", "llama3(factor=4, context=16)"),
        ("llama3(low=1, context=16)", "llama3(low=2, context=16)"),
        ("llama3(high=4, context=16)", "llama3(high=3, context=16)"),
        ("llama3(context=16)", "llama3(context=24)"),
    ],
)
def test_every_option_of_a_scaling_has_an_effect(scaling, other):
    one, two = (built(f"attention(rope_scaling={each})") for each in (scaling, other))
    assert not alike(one, two)
