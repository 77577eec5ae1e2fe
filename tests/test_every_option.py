"""Every option of training, of a whole model, of sampling and of the tasks: its default, its bounds,
and that it has an effect. The options of the layers are tried in test_grammar.py."""

import contextlib
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import torch

import train
from minimodels import LM, Config, InputError, Sampling, complete, load_model
from minimodels.architectures.registry import LAYERS, WRAPPERS
from minimodels.data.tasks import TASKS
from minimodels.errors import Range
from minimodels.grammar import Call, Option, write_value
from minimodels.options import read_options
from minimodels.presets import SIZES
from minimodels.training.optim import adamw
from minimodels.training.options import DEFAULT_STEPS, TRAINING, Options

KINDS = {
    "training": Options,
    "model": Config,
    "sampling": Sampling,
    **{name: kind.Options for name, kind in {**LAYERS, **WRAPPERS}.items()},
    **{f"task {name}": kind for name, kind in TASKS.items()},
}


def defaults(kind: type) -> str:
    """The defaults of an option dataclass, as text."""
    return ", ".join(
        f"{field.name}={'none' if field.default is None else write_value(field.default)}"
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    )


DEFAULTS = {
    "training": "model=transformer, size=tiny, data=stdlib, tokenizer=bytes, pack=false, "
    "field=text, cache=, steps=none, tokens=none, flops=none, minutes=none, "
    "context=256, batch_size=8, accumulate=1, ramp=, lr=0.002, schedule=cosine, warmup=50, "
    "weight_decay=0.1, clip=1.0, seed=0, device=auto, threads=none, dtype=auto, "
    "compile=false, checkpoint_activations=false, context_parallel=1, shard=false, "
    "skip_bad_steps=0, eval_every=100, keep=2, eval_batches=8, sample_every=0, "
    "prompt=import , log_every=10, out=none, init=, resume=none",
    "model": "layers=(attention mlp)*4, vocab=0, width=128, norm_eps=1e-05, norm=rms, "
    "tie_embeddings=true, impl=auto, residual=pre_norm, embedding_scale=1.0, "
    "embedding_norm=false, residual_scale=1.0, logit_scale=1.0, logit_softcap=none, objective=next_token",
    "sampling": "repetition_penalty=1.0, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0",
    "attention": "heads=4, kv_heads=none, head_dim=none, window=none, rope_base=10000.0, "
    "rope_fraction=1.0, rope_scaling=none, qk_norm=none, bias=false, scale=none, "
    "softcap=none, sink=false, value_residual=false, gate=none",
    "mlp": "width=none, bias=false, activation=silu, gated=true",
    "mamba": "expand=2, state_size=16, conv_width=4, rank=none, conv_bias=true, bias=false, "
    "norm=none, norm_eps=none",
    "moe": "experts=8, experts_per_token=2, expert_width=none, shared_experts=0, "
    "router=softmax_topk, groups=1, groups_per_token=1, routed_scale=1.0, "
    "balance_loss=0.01, balance=layer, z_loss=0.001, bias_step=0.001, bias=false, "
    "expert_bias=false, activation=silu, shared_width=none, shared_gate=false",
    "mamba2": "heads=4, head_dim=none, state_size=128, groups=1, expand=2, conv_width=4, "
    "conv_bias=true, bias=false, norm=gate_norm, norm_eps=none, step_min=0.0, "
    "step_max=none",
    "retention": "heads=4, head_dim=none, value_dim=none, feature_map=none, rope_base=10000.0, "
    "decay=heads, scale=true, norm=head, norm_eps=none, gate=silu, decay_rank=16, "
    "decay_divisor=16.0, block=1",
    "deltanet": "heads=4, key_heads=none, head_dim=none, value_dim=none, gate=none, "
    "gate_rank=head, gate_bound=none, beta_max=1, steps=1, output_gate=none, "
    "output_rank=full, conv_width=4, norm_eps=none",
    "short_convolution": "conv_width=3, bias=false",
    "latent_attention": "heads=4, head_dim=none, rope_dim=none, value_dim=none, kv_rank=none, "
    "q_rank=none, rope_base=10000.0, rope_scaling=none, scale=none, norm_eps=1e-06, "
    "bias=false",
    "sparse_attention": "heads=4, head_dim=none, rope_dim=none, value_dim=none, kv_rank=none, "
    "q_rank=none, rope_base=10000.0, rope_scaling=none, scale=none, norm_eps=1e-06, "
    "bias=false, keys=64, index_heads=4, index_dim=none, index_loss=1.0",
    "differential_attention": "version=v2, heads=4, kv_heads=none, head_dim=none, rope_base=10000.0, "
    "rope_scaling=none, bias=false",
    "learned_positions": "context=1024",
    "mod": "capacity=0.125, route=predictor, loss=0.01",
    "task copying": "tokens=16, vocab=16",
    "task induction": "vocab=16",
    "task mqar": "pairs=8, vocab=8192",
    "task overwrite": "keys=8, vocab=64",
    "task parity": "",
    "task s3": "",
}


def test_every_default_is_read_back():
    """A default is part of every figure that was measured with it. A new or changed
    one belongs here, and a changed one in the change log."""
    assert {name: defaults(kind) for name, kind in KINDS.items()} == DEFAULTS
    assert dict(SIZES["tiny"]._asdict()) == {
        "blocks": 4,
        "width": 128,
        "settings": ("mamba2.state_size=64",),
    }
    assert SIZES["small"][:2] == (12, 768)
    assert TRAINING == {
        "tiny": {},
        "small": {"context": 1024, "batch_size": 32, "lr": 6e-4, "warmup": 500, "eval_every": 1000},
    }
    assert DEFAULT_STEPS == {"tiny": 600, "small": 20_000}
    optimizer = adamw(LM(Config(layers="mlp", width=8)), 1e-3, 0.1)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["eps"] == 1e-8


# Guards.


def parts(hint) -> Iterator:
    """The members of a union; the type itself if it is no union."""
    yield from get_args(hint) if type(None) in get_args(hint) else (hint,)


def ranges() -> Iterator[tuple[str, str, Range, type]]:
    """Every field with a range: the dataclass, the field, the range and the type of its values."""
    for name, kind in KINDS.items():
        for field, hint in get_type_hints(kind, include_extras=True).items():
            for part in parts(hint):
                if get_origin(part) is Annotated:
                    base, *notes = get_args(part)
                    for note in notes:
                        if isinstance(note, Range):
                            yield name, field, note, base


def outside(limits: Range, kind: type) -> list:
    """The values nearest to a range on both sides, and a value of another type."""
    step = 1 if kind is int else 1e-9
    low = limits.low if limits.above else limits.low - step
    high = [limits.high + step] if limits.high < float("inf") else [float("inf")]
    return [kind(low), *(high if kind is float else map(int, high)), "many", True, float("nan")]


RANGES = list(ranges())


@pytest.mark.parametrize("name, field, limits, base", RANGES, ids=lambda given: str(given)[:30])
def test_every_bound_is_met_alone(name, field, limits, base):
    """All other fields have their defaults, so no other guard answers. On the bound itself a
    number is accepted, or refused by a guard that names another reason."""
    for value in outside(limits, base):
        with pytest.raises(InputError) as error:
            read(name, **{field: value})
        assert error.value.field in (field, f"layers: {name}.{field}")
        assert limits.accepted in error.value.accepted
    least = limits.low if not limits.above else 1e-9
    with contextlib.suppress(InputError):
        assert getattr(read(name, **{field: base(least)}), field) == least


def read(name: str, **given):
    """The dataclass with these fields, as a command line or the text of a layer gives it."""
    kind = KINDS[name]
    if kind is Options:
        return Options(Config(), **given)
    if kind in (Config, Sampling):
        return kind(**given)
    options = tuple(Option(option, value) for option, value in given.items())
    return read_options(kind, Call(name, options=options), "")


def test_every_number_has_a_range():
    """The options of tasks are whole numbers above 0, which open_task checks."""
    for name, kind in KINDS.items():
        if not name.startswith("task "):
            for field, hint in get_type_hints(kind, include_extras=True).items():
                assert not any(part in (int, float) for part in parts(hint)), f"{name}.{field}"


# Effects.

CONFIG = {  # field of Config -> another value
    "layers": "mlp attention",
    "vocab": 50,
    "width": 24,
    "norm_eps": 0.1,
    "norm": "layer",
    "tie_embeddings": False,
    "impl": "reference",
    "residual": "post_norm",
    "embedding_scale": 2.0,
    "embedding_norm": True,
    "residual_scale": 0.5,
    "logit_scale": 0.5,
    "logit_softcap": 0.1,
}
ONE_VALUE = {"objective"}  # fields with a single accepted value


def test_every_field_of_a_model_has_an_effect():
    """On its logits, or for `impl` on the path that computes them."""
    assert CONFIG.keys() | ONE_VALUE == {field.name for field in dataclasses.fields(Config)}
    base = {"layers": "attention mlp", "vocab": 40, "width": 16}
    tokens = torch.arange(40).view(2, 20)

    def built(**fields) -> tuple:
        torch.manual_seed(0)
        model = LM(Config(**{**base, **fields}))
        with torch.no_grad():  # away from initial values at which some fields have no effect
            for parameter in model.parameters():
                parameter.add_(0.2)
        return model.layers[0].layer.impl if "impl" in fields else "auto", model(tokens)[0]

    path, logits = built()
    assert torch.equal(logits, built()[1])
    for name, value in CONFIG.items():
        if name != "layers":
            other_path, other = built(**{name: value})
            alike = other.shape == logits.shape and torch.equal(other, logits)
            assert not alike or other_path != path, name
    swapped = LM(Config(**{**base, "layers": CONFIG["layers"]}))
    assert [type(block.layer).__name__ for block in swapped.layers] == ["SwiGLU", "Attention"]


SAMPLING = (
    {},
    {"repetition_penalty": 9.0},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.5},
    {"min_p": 0.5},
)


def test_every_option_of_sampling_has_an_effect():
    torch.manual_seed(0)
    model = LM(Config(layers="mlp", width=16, vocab=256, tie_embeddings=False)).eval()
    model.head.weight.data.mul_(3)
    texts = [complete(model, "abc", 60, Sampling(**given), seed=1) for given in SAMPLING]
    assert {name for given in SAMPLING for name in given} == {
        field.name for field in dataclasses.fields(Sampling)
    }
    assert len(set(texts)) == len(texts)


LEARNS = {  # option of training -> other values, each of which gives other weights
    "config": [Config(layers="mlp", width=8)],
    "data": ["parity"],
    "tokenizer": ["bpe(vocab=300)"],
    "pack": [True],
    "steps": [2],
    "tokens": [64.0],
    "context": [8],
    "batch_size": [3],
    "accumulate": [2],
    "ramp": ["context=8:16"],
    "lr": [1e-3, 3e-3],
    "schedule": ["wsd", "constant"],
    "warmup": [0, 3],
    "weight_decay": [0.0, 0.2],
    "clip": [0.0, 0.01],
    "seed": [1],
    "dtype": ["bfloat16"],
}
REPORTS = {  # -> other values, each of which gives other records or another text, and the same weights
    "eval_every": [1],
    "eval_batches": [2],
    "sample_every": [1],
    "prompt": ["def "],
    "log_every": [3],
}
ELSEWHERE = {  # -> where it is tried
    "model": "test_train: a_run_with_other_layers_than_its_preset_is_called_custom",
    "size": "test_train: a_size_brings_its_shape_and_its_training",
    "set": "test_first_hour: options_of_layers_are_set",
    "field": "test_real_text: other_fields_and_none",
    "cache": "test_real_text: a_cache_that_cannot_be_written_is_told",
    "flops": "test_train: the_first_bound_ends_the_run",
    "minutes": "test_train: minutes_end_a_run_and_shape_its_schedule",
    "device": "test_train: refuses_a_gpu_that_is_not_there",
    "threads": "test_first_hour: threads_are_the_fastest_that_a_trial_found",
    "compile": "test_train: a_compiled_run_takes_the_same_steps",
    "out": "test_train: a_new_run_takes_a_new_name",
    "checkpoint_activations": "test_blocks: blocks_computed_again_remember_less",
    "context_parallel": "test_parallel: a_split_context_gives_the_outputs_and_gradients_of_the_whole",
    "shard": "test_parallel: torchrun_takes_the_steps_of_one_process_which_continues_its_run",
    "skip_bad_steps": "test_survival: a_run_skips_as_many_bad_steps_as_it_may",
    "keep": "test_train: the_last_checkpoints_and_the_best_are_kept",
    "init": "test_survival: a_run_starts_from_the_weights_of_another",
    "resume": "test_train: resuming_is_exact",
}


def trained(folder, number: int, **changes) -> tuple[list[torch.Tensor], object]:
    """The weights of a short run, its records and its output, without what depends on time."""
    base = {
        "config": Config(layers="mlp attention", width=8),
        "data": str(folder / "text"),
        "cache": str(folder / "cache"),
        "steps": 4,
        "context": 16,
        "batch_size": 2,
        "warmup": 1,
        "log_every": 1,
        "eval_every": 0,
        "eval_batches": 1,
        "threads": 1,
        "device": "cpu",
        "out": folder / f"run-{number}",
    }
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.main(Options(**{**base, **changes}))
    rows = [json.loads(line) for line in (base["out"] / "log.jsonl").open()]
    for row in rows:
        for name in ("seconds", "tokens_per_second"):
            row.pop(name, None)
    printed = said.getvalue().replace(str(base["out"]), "RUN")
    return list(load_model(base["out"]).parameters()), (rows, printed)


def test_every_option_of_training_has_an_effect(tmp_path, monkeypatch):
    def short(model, prompt, tokens, *given, **more):
        return complete(model, prompt, 5, *given, **more)

    monkeypatch.setattr(train, "complete", short)
    names = {field.name for field in dataclasses.fields(Options)}
    assert LEARNS.keys() | REPORTS.keys() | ELSEWHERE.keys() == names
    words = [f"word{number % 7} {number % 11}\n" for number in range(3000)]
    (tmp_path / "text").write_text("".join(words))
    number = itertools.count()
    weights, records = trained(tmp_path, next(number))
    again, repeated = trained(tmp_path, next(number))
    assert all(map(torch.equal, weights, again))
    assert records == repeated
    for name, values in LEARNS.items():
        for value in values:
            other, _ = trained(tmp_path, next(number), **{name: value})
            assert [w.shape for w in other] != [w.shape for w in weights] or not all(
                map(torch.equal, weights, other)
            ), (name, value)
    for name, values in REPORTS.items():
        for value in values:
            other, written = trained(tmp_path, next(number), **{name: value})
            assert all(map(torch.equal, weights, other)), (name, value)
            assert written != records, (name, value)


def test_what_is_tried_elsewhere_is_there():
    for where in ELSEWHERE.values():
        file, name = where.split(": ")
        assert f"def test_{name}(" in (Path(__file__).parent / f"{file}.py").read_text(), where
