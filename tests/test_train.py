"""The training script as a user experiences it: it learns, stops,
continues, and rejects bad input."""

import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import scored
from processes import in_processes
from safetensors import safe_open
from small import small

import minimodels.published.__main__ as published
import minimodels.sample
import minimodels.training.run as training_run
import train
from minimodels import LM, Config, InputError, load_model, preset, save_model
from minimodels.command import run_command
from minimodels.data.text import open_data
from minimodels.files import LOCK, atomic_write
from minimodels.memory import Memory
from minimodels.presets import MAIN, PRESETS
from minimodels.training import checkpoint
from minimodels.training.optim import adamw, learning_rate
from minimodels.training.options import make_first

SMALL = (
    "--width 32 --context 32 --batch-size 2 --warmup 5 --eval-batches 1 --eval-every 0 --log-every 1 "
    "--device cpu"
).split()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(bytes(range(32, 127)) * 60)


def settings(model: str) -> list[str]:
    """The arguments that make a preset small."""
    return [argument for each in small(model) for argument in ("--set", each)]


def run(*arguments, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    run_command(train.main, lambda: train.parse(train.__doc__))


def contents(folder) -> dict[str, bytes]:
    """The bytes of all tensors in a run's newest checkpoint, which one process wrote."""
    with safe_open(shard(folder), "pt") as file:
        return {
            name: file.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
            for name in file.keys()  # noqa: SIM118
        }


def shard(folder) -> Path:
    """The file of tensors in a run's newest checkpoint."""
    (file,) = checkpoint.find(folder).folder.glob("*.safetensors")
    return file


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", [*MAIN, "mamba2", "kda"])
def test_main_path(model, tmp_path, monkeypatch, capsys):
    """Every preset trains, validates, samples and writes its folder. Sampling from it gives the
    same text with the same seed."""
    run("--model", model, *settings(model), "--data", "text", "--steps", 40, "--lr", 0.01, "--prompt", "abc", *SMALL,
        "--device", "auto", "--out", f"runs/{model}", monkeypatch=monkeypatch)  # fmt: skip
    printed = capsys.readouterr().out
    for word in (
        "ledger",
        "parameters",
        "validation",
        "bits per byte",
        "--- sample ---\nabc",
        f"runs/{model}",
    ):
        assert word in printed
    folder = tmp_path / "runs" / model
    assert sorted(file.name for file in folder.iterdir()) == [
        "checkpoints",
        LOCK,
        "log.jsonl",
        "options.json",
    ]
    records = log(folder)
    assert records[39]["loss"] < 0.8 * records[0]["loss"]
    assert records[39]["tokens"] == 40 * 64
    assert records[-1]["bits_per_byte"] < 5.5
    if model == "moe":
        assert len(records[39]["load"]) == 4
        assert sum(records[39]["load"][0]) == pytest.approx(1)
        assert max(records[39]["overload"]) >= 1
        assert records[39]["balance"] > 0
    if model == "mod":
        assert len(records[39]["accuracy"]) == len(records[39]["routed"]) == 2

    texts = []
    for seed in (1, 1, 2):
        monkeypatch.setattr(
            sys,
            "argv",
            ["sample", str(folder), "--prompt", "abc", "--tokens", "30", "--seed", str(seed)],
        )
        run_command(
            minimodels.sample.main, lambda: minimodels.sample.tyro.cli(minimodels.sample.Options)
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("abc")
    assert texts[0] != texts[2]


def test_samples_in_the_precision_that_is_asked_for(monkeypatch):
    run(
        "--layers",
        "mlp",
        "--data",
        "text",
        "--steps",
        1,
        "--out",
        "run",
        *SMALL,
        monkeypatch=monkeypatch,
    )
    dtypes = []
    monkeypatch.setattr(
        minimodels.sample,
        "stream",
        lambda model, *_: dtypes.append(model.embedding.weight.dtype) or iter([""]),
    )
    for dtype in ("auto", "float32", "bfloat16"):
        minimodels.sample.main(minimodels.sample.Options("run", dtype=dtype, device="cpu"))
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]


def test_a_compiled_run_takes_the_same_steps(monkeypatch):
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2))
    except Exception as error:
        pytest.skip(f"torch.compile does not work here, as without a C++ compiler: {error}")
    layers = "mamba(state_size=4) moe(experts=4) mod(attention(window=8) mlp) attention"
    for name, chosen in {"plain": [], "compiled": ["--compile"]}.items():
        run(
            "--layers",
            layers,
            "--data",
            "text",
            "--steps",
            4,
            "--out",
            name,
            *SMALL,
            *chosen,
            monkeypatch=monkeypatch,
        )
    plain, compiled = (
        [
            {
                key: value
                for key, value in record.items()
                if key not in ("seconds", "tokens_per_second")
            }
            for record in log(Path(name))
        ]
        for name in ("plain", "compiled")
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "transformer", "--schedule", "wsd"],
        ["--model", "mamba", "--data", "copying(tokens=4)"],
        ["--model", "moe", "--set", "moe.router=sigmoid_bias", "--set", "moe.bias_step=0.1"],
        ["--model", "mod", "--accumulate", "2"],
        ["--model", "hybrid"],
        ["--layers", "A:=attention A mlp A"],
        ["--layers", "mlp", "--tokenizer", "bpe(vocab=280)", "--cache", "cache"],
    ],
    ids=lambda arguments: arguments[1],
)
def test_resuming_is_exact(arguments, tmp_path, monkeypatch, capsys):
    """A run that stopped after 4 of 8 steps and resumed ends with the same bits as one that was not
    stopped, and logs the same."""
    if "--data" not in arguments:
        arguments = [*arguments, "--data", "text"]
    # so that the fourth is not yet logged
    arguments = [
        *arguments,
        "--steps",
        8,
        *SMALL,
        "--log-every",
        3,
    ]
    run(*arguments, "--out", "whole", monkeypatch=monkeypatch)

    rate = train.learning_rate

    def interrupt(peak, schedule, step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(peak, schedule, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupt)
        with pytest.raises(SystemExit) as stopped:
            run(*arguments, "--out", "its parts", monkeypatch=monkeypatch)
    assert stopped.value.code == 130
    assert "--resume 'its parts'" in capsys.readouterr().out
    torch.manual_seed(99)
    run("--resume", "its parts", monkeypatch=monkeypatch)

    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "its parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []
    losses = [
        {r["step"]: r["loss"] for r in log(tmp_path / name) if "loss" in r}
        for name in ("whole", "its parts")
    ]
    assert losses[0] == losses[1]
    assert losses[0].keys() == {3, 6, 8}


def test_bits_per_byte_count_the_bytes_that_the_tokens_represent(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="tokens need the extra `hub`")
    run("--layers", "mlp", "--data", "text", "--tokenizer", "bpe(vocab=280)", "--cache", "cache", "--steps", 2,
        *SMALL, "--out", "run", monkeypatch=monkeypatch)  # fmt: skip
    data = open_data("text", 32, str(tmp_path / "run"), cache=tmp_path / "cache")
    rows = [row for _, targets in data.validation(2, 1) for row in targets.tolist()]
    count = sum(len(data.tokenizer.tokenizer.decode(row)) for row in rows)  # all text is ASCII
    assert count > 1.1 * 2 * 32
    scores = log(tmp_path / "run")[-1]
    bits = scores["validation_loss"] / math.log(2)  # per token
    assert scores["bits_per_byte"] == pytest.approx(bits * 2 * 32 / count)


def test_an_interrupt_while_compiling_is_one_line(tmp_path, monkeypatch, capsys):
    import torch._inductor.compile_fx as inductor

    def interrupted(graph, *given, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return graph  # uncompiled

    torch._dynamo.reset()
    monkeypatch.setattr(inductor, "compile_fx", interrupted)
    monkeypatch.setattr(train, "require_compiler", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        run(
            "--data",
            "text",
            "--steps",
            9,
            "--compile",
            *SMALL,
            "--out",
            "run",
            monkeypatch=monkeypatch,
        )
    torch._dynamo.reset()
    assert stopped.value.code == 130
    told = capsys.readouterr()
    assert told.out.strip().splitlines()[-1].startswith("interrupted at step 1 and saved")
    assert "Traceback" not in told.err


def test_an_interrupt_at_the_end_waits_for_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return save(*arguments)

    save = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        with pytest.raises(SystemExit) as stopped:
            run("--data", "text", "--steps", 2, "--out", "run", *SMALL, monkeypatch=monkeypatch)
    assert stopped.value.code == 130
    assert "interrupted at step 2 and saved" in capsys.readouterr().out
    run("--resume", "run", "--steps", 3, monkeypatch=monkeypatch)


def test_a_constant_run_is_extended(tmp_path, monkeypatch):
    common = ["--data", "text", "--schedule", "constant", *SMALL]
    run(*common, "--steps", 6, "--out", "whole", monkeypatch=monkeypatch)
    run(*common, "--steps", 3, "--out", "parts", monkeypatch=monkeypatch)
    run("--resume", "parts", "--steps", 6, monkeypatch=monkeypatch)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_a_run_resumed_with_other_bounds_keeps_them(tmp_path, monkeypatch, capsys):
    """The command that it prints after an interruption, with --resume alone,
    continues to the new bound."""
    run("--data", "text", "--steps", 2, "--out", "parts", *SMALL, monkeypatch=monkeypatch)
    for bounds in (["--steps", 6], []):
        run("--resume", "parts", *bounds, monkeypatch=monkeypatch)
        assert "to 6 steps" in capsys.readouterr().out
    run("--resume", "parts", monkeypatch=monkeypatch)
    assert "the run has reached its bound, --steps 6; a larger one" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--resume", "parts", "--steps", 5, monkeypatch=monkeypatch)
    assert "steps: 5 is not accepted; accepted: 6 or more" in capsys.readouterr().err
    assert json.loads(Path("parts/options.json").read_text())["steps"] == 6


def test_a_run_with_other_layers_than_its_preset_is_called_custom(tmp_path, monkeypatch, capsys):
    run("--layers", "mamba", "--data", "text", "--steps", 1, *SMALL, monkeypatch=monkeypatch)
    assert "model    custom: mamba" in capsys.readouterr().out
    assert log(tmp_path / "runs/custom")


def test_a_task_is_learnt_and_scored(tmp_path, monkeypatch, capsys):
    run("--data", "mqar(pairs=2, vocab=8)", "--steps", 5, *SMALL, monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    assert "right" in said and "no sample" in said and "minimodels.sample" not in said
    assert 0 <= log(tmp_path / "runs/transformer")[-1]["accuracy"] <= 1


@pytest.mark.parametrize(
    "bounds, steps",
    [
        (["--steps", "3"], 3),
        (["--tokens", "256"], 4),
        (["--flops", "2e7"], None),
        (["--steps", "9", "--tokens", "130"], 2),
    ],
    ids=lambda bounds: bounds[0] if isinstance(bounds, list) else "",
)
def test_the_first_bound_ends_the_run(bounds, steps, tmp_path, monkeypatch):
    run("--layers", "attention mlp", "--data", "text", *bounds, *SMALL, monkeypatch=monkeypatch)
    last = [record for record in log(tmp_path / "runs/custom") if "flops" in record][-1]
    if steps is None:  # as many as the FLOPs allow
        assert last["flops"] <= 2e7 < last["flops"] * (last["step"] + 1) / last["step"]
    else:
        assert last["step"] == steps


def test_minutes_end_a_run_and_shape_its_schedule(tmp_path, monkeypatch):
    run(
        "--layers",
        "mlp",
        "--data",
        "text",
        "--minutes",
        0.03,
        *SMALL,
        "--warmup",
        0,
        monkeypatch=monkeypatch,
    )
    records = [record for record in log(tmp_path / "runs/custom") if "lr" in record]
    assert 1.5 < records[-1]["seconds"] < 5
    assert records[-1]["lr"] < 0.2 * records[0]["lr"]


def test_validation_is_logged_and_checkpointed_on_the_way(tmp_path, monkeypatch):
    run(
        "--data",
        "text",
        "--steps",
        4,
        *SMALL,
        "--eval-every",
        2,
        "--sample-every",
        3,
        monkeypatch=monkeypatch,
    )
    assert [
        record["step"]
        for record in log(tmp_path / "runs/transformer")
        if "validation_loss" in record
    ] == [2, 4]


def test_refuses_to_compile_without_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="2"):
        run("--data", "text", "--steps", 1, *SMALL, "--compile", monkeypatch=monkeypatch)
    assert (
        "compile: True is not accepted; accepted: False, because PyTorch finds no C++ compiler"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "runs").exists()


def test_a_new_run_takes_a_new_name(tmp_path, monkeypatch):
    for _ in range(2):
        run("--data", "text", "--steps", 1, *SMALL, monkeypatch=monkeypatch)
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == [
        "transformer",
        "transformer-2",
    ]


def test_runs_that_start_at_once_take_a_name_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(make_first, [tmp_path / "run"] * 8))
    assert {folder.name for folder in folders} == {"run", *(f"run-{n}" for n in range(2, 9))}


def test_decay_touches_matrices_only():
    model = LM(preset("hybrid", "tiny", "attention.qk_norm=head"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, kept = (
        {names[p] for p in group["params"]} for group in adamw(model, 1e-3, 0.1).param_groups
    )
    for name in names.values():
        plain = any(name.endswith(end) for end in ("norm.weight", "bias", "A_log", ".D"))
        assert (name in kept) == plain
    assert "layers.0.layer.in_proj.weight" in decayed


SET = ("--set",)
ROPE = "attention.rope_scaling="
MOD, MOE = ("--model", "mod", *SET), ("--model", "moe", *SET)
REFUSED = [
    (["--model", "gpt"], "model: 'gpt'", ", ".join(PRESETS)),
    (["--size", "huge"], "size: 'huge'", "tiny, small"),
    (
        ["--layers", "attention lstm"],
        "layers: 'lstm'",
        "attention, mlp, mamba",
    ),
    (["--layers", "(attention"], "layers: 'the end of the text'", 'here ")"'),
    (["--width", "100", *SET, "attention.heads=3"], "attention.heads: 3", "divisor of width 100"),
    ([*MOD, "mod.capacity=0"], "mod.capacity: 0", "a fraction above 0, at most 1"),
    ([*MOD, "mod.capacity=1.01"], "mod.capacity: 1.01", "a fraction above 0, at most 1"),
    (
        [*MOE, "moe.experts=2", *SET, "moe.experts_per_token=3"],
        "moe.experts_per_token: 3",
        "1 to experts 2",
    ),
    ([*SET, "heads=3"], "set: 'heads=3'", "LAYER.OPTION=VALUE, such as mamba.state_size=32"),
    ([*SET, "mamba.expand=1"], "set: 'mamba.expand=1'", "a layer of the model: attention, mlp"),
    ([*SET, "attention.head=3"], "layers: attention: 'head'", "did you mean heads?"),
    (["--heads", "8"], "option: '--heads'", "did you mean --set attention.heads=VALUE?"),
    (["--data", "missing"], "data: 'missing'", "stdlib, a file, a folder"),
    (["--data", "empty"], "data: '0 bytes of training text'", "context + 1"),
    (["--data", "short"], "data: ", "context + 1"),
    (["--out", "taken"], "out: 'taken'", "a new or empty folder"),
    (["--resume", "nowhere"], "resume: 'nowhere'", "there is no such folder"),
    (["--resume", "taken"], "resume: 'taken'", "a training run's folder, with options.json"),
    (["--init", "taken"], "init: 'taken'", "config.json and safetensors"),
    (["--device", "warp"], "device: 'warp'", "auto, cpu"),
    (["--impl", "triton", "--device", "cpu"], "impl: 'triton'", "auto, reference or torch"),
    (["--vocab", "100"], "vocab: 100", "256 or more"),
    (["--schedule", "linear"], "schedule: 'linear'", "cosine, wsd, constant"),
    (["--dtype", "int8"], "dtype: 'int8'", "auto, float32, bfloat16"),
    (["--steps", "0"], "steps: 0", "a whole number from 1"),
    (["--tokens", "inf"], "tokens: inf", "above 0"),
    (["--out", "text/run"], "out: 'text/run'", "a folder that can be created"),
    (["--layers", "mlp*99999999"], "layers: 'mlp*99999999...'", "at most 10000 layers"),
    (["--layers", "mlp*" + "9" * 5000], "layers: '9999", "a whole number of 1 or more"),
    (["--layers", "(" * 3000], "layers: '('", "nested at most 50 deep"),
    (["--layers", "mod(" * 51 + "mlp" + ")" * 51], "layers: '('", "nested at most 50 deep"),
    ([*SET, ROPE + ":"], "set: ':'", "a number, true, false, a word or numbers"),
    (
        [*SET, ROPE + "wavy"],
        "layers: attention.rope_scaling: 'wavy'",
        "none or linear(factor=...)",
    ),
    ([*SET, ROPE + "linear(factor=four)"], "layers: linear.factor: 'four'", "a number above 0"),
    ([*SET, ROPE + "linear(factor=4, factor=5)"], "set: 'factor'", "each option once"),
    (["--seed", str(10**30)], "seed: 1", "below 2^63"),
    (
        [*MOE, "moe.experts_per_token=1"],
        "moe.experts_per_token: 1",
        "2 or more, or router=softmax",
    ),
    (["--data", "x" * 5000], "data: 'xxx", "files that can be read"),
    (["--minutes", "-1"], "minutes: -1.0", "above 0"),
    (["--tokens", "10"], "tokens", "enough for one step of 2048 tokens"),
    (["--lr", "nan"], "lr: nan", "above 0"),
    (["--prompt", ""], "prompt: ''", "at least one character"),
    (["--eval-batches", str(10**30)], "eval_batches: 1000", "1 to 2147483647"),
    (["--data", "mqar(pears=3)"], "data: mqar: 'pears'", "did you mean pairs? pairs, vocab"),
    (
        ["--data", "mqar(pairs=" + "9" * 5000 + ")"],
        "data: mqar.pairs: inf",
        "a whole number from 1",
    ),
]


@pytest.mark.parametrize(
    "arguments, field, accepted", REFUSED, ids=[" ".join(row[0])[:60] for row in REFUSED]
)
def test_bad_input_is_one_line(arguments, field, accepted, tmp_path, monkeypatch, capsys):
    """Each error names the field, the value and what is accepted. It exits with status 2 and leaves
    nothing behind. A piece of the text, with a caret, may follow."""
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"abc")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes").write_text("mine")
    monkeypatch.setattr("minimodels.kernels.INTERPRETED", False)  # as outside the tests
    if "--data" not in arguments:
        arguments = ["--data", "text", *arguments]
    arguments = ["--steps", "1", *arguments]  # so that accepted input ends soon
    with pytest.raises(SystemExit) as exit:
        run(*arguments, monkeypatch=monkeypatch)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    line, *excerpt = error.splitlines()
    assert not excerpt or (len(excerpt) == 2 and excerpt[1].strip() == "^")
    assert field in line
    assert accepted in line
    assert "--resume" not in line  # there is nothing to resume
    assert not (tmp_path / "runs").exists()
    assert (tmp_path / "taken/notes").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="refuses a GPU only where there is none")
def test_refuses_a_gpu_that_is_not_there(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run("--data", "text", "--device", "cuda", monkeypatch=monkeypatch)
    assert "device: 'cuda' is not accepted; accepted: auto, cpu\n" in capsys.readouterr().err


def test_an_unknown_option_names_the_nearest(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        run("--contxt", "3", monkeypatch=monkeypatch)
    assert exit.value.code == 2
    assert "--context" in capsys.readouterr().err


def test_refuses_to_resume_what_is_damaged_or_another_run(tmp_path, monkeypatch, capsys):
    def refused(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run("--resume", "run", *arguments, monkeypatch=monkeypatch)
        error = capsys.readouterr().err
        assert (exit.value.code, error.count("\n")) == (2, 1)
        return error

    common = ["--data", "text", "--steps", 2, *SMALL]
    run(*common, "--out", "run", monkeypatch=monkeypatch)
    run(*common, "--width", 16, "--out", "other", monkeypatch=monkeypatch)
    folder, file = tmp_path / "run/checkpoints/step-2", shard(tmp_path / "run")
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        file.write_bytes(content)
        assert "step-2: the checksum of shard-00001" in refused("--steps", 4)
        assert file.read_bytes() == content
    folder.rename(tmp_path / "mine")
    assert "accepted: a run with a whole checkpoint, checkpoints/step-N (it has none)" in refused()
    (tmp_path / "run/checkpoint.safetensors").write_bytes(whole)
    assert "checkpoint.safetensors is of an earlier version" in refused()
    shutil.copytree(tmp_path / "other/checkpoints/step-2", folder)
    assert "a model of this configuration; it has width 16, not 32" in refused("--steps", 4)
    shutil.rmtree(folder)
    (tmp_path / "mine").rename(folder)
    file.write_bytes(whole)
    for field, value in {"width": 16, "data": "stdlib", "context": 16, "seed": 5}.items():
        named = "config: 'width 16, not 32'" if field == "width" else f"{field}: "
        assert f"error: {named}" in refused(f"--{field}", value)


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_as_if_undamaged(
    tmp_path, monkeypatch, capsys
):
    """The log says which one and why. The steps since the one before are taken again."""
    common = ["--data", "text", "--steps", 6, *SMALL, "--eval-every", 2]
    run(*common, "--out", "run", monkeypatch=monkeypatch)
    expected = contents(tmp_path / "run")
    shard(tmp_path / "run").write_bytes(b"damaged")
    capsys.readouterr()
    run("--resume", "run", monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    assert re.search(r"passed over a checkpoint: step-6: the checksum of shard-\S+ is not", said)
    assert "from step 4, to 6 steps" in said
    assert checkpoint.find(tmp_path / "run").folder.name == "step-6"
    assert contents(tmp_path / "run") == expected


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    """The best one is loaded from its own folder."""
    model = LM(Config(layers="mlp", width=8))
    for step, score in enumerate([3.0, 1.0, 2.0, None, 4.0, 5.0]):
        with torch.no_grad():
            model.embedding.weight.fill_(step)
        checkpoint.save(tmp_path, model, None, {"step": step}, score, keep=2)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-1", "step-4", "step-5"}
    checkpoint.save_options(tmp_path, {"config": {}})
    for folder, weight in ((tmp_path, 5), (tmp_path / "checkpoints/step-1", 1)):
        assert (checkpoint.load_model(folder).embedding.weight == weight).all()


def test_says_that_memory_is_lacking(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        run("--data", "text", "--width", 2**30, monkeypatch=monkeypatch)
    assert exit.value.code == 1
    assert re.fullmatch(
        r"out of memory: a smaller .* \(.*tried to allocate.*\)\n", capsys.readouterr().err
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line(capsys):
    def main(_):
        with open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(SystemExit) as exit:
        run_command(main, lambda: None)
    assert exit.value.code == 1
    assert re.fullmatch(r"error: .*No space left on device.*\n", capsys.readouterr().err)


def test_a_file_that_fails_half_way_is_as_it_was(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "file") as partial:
        partial.write_text("aft")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "before"
    assert not partial.exists()


def test_what_a_killed_save_left_goes_away(tmp_path, monkeypatch):
    left = tmp_path / "run/checkpoints/step-7.partial"
    left.mkdir(parents=True)
    (left / "shard-00001-model-00001-of-00001.safetensors").write_text("half")
    checkpoint.save(
        tmp_path / "run",
        model := LM(Config(layers="mlp", width=8)),
        adamw(model, 1e-3, 0.1),
        {"step": 1},
    )
    assert [path.name for path in left.parent.iterdir()] == ["step-1"]
    (tmp_path / "plain").touch()
    assert shard(tmp_path / "run").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_that_cannot_be_had_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run_command(lambda _: (tmp_path / "no/such").write_text(""), lambda: None)
    assert exit.value.code == 1
    assert re.fullmatch(
        r"error: .*No such file or directory: '.*no/such'\n", capsys.readouterr().err
    )


def test_a_validation_counts_what_was_spent(tmp_path, monkeypatch):
    run(
        "--data",
        "text",
        "--out",
        "run",
        *SMALL,
        "--steps",
        4,
        "--eval-every",
        3,
        "--log-every",
        4,
        monkeypatch=monkeypatch,
    )
    assert [
        (row["step"], row["tokens"]) for row in log(tmp_path / "run") if "validation_loss" in row
    ] == [(3, 192), (4, 256)]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    run("--data", "text", "--steps", 2, "--out", "run", *SMALL, monkeypatch=monkeypatch)
    before = shard(tmp_path / "run").read_bytes()
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            run("--resume", "run", "--steps", 4, monkeypatch=monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert exit.value.code == 2
    assert (
        "error: out: 'run' is not accepted; accepted: a folder with room for a checkpoint"
        in capsys.readouterr().err
    )
    assert shard(tmp_path / "run").read_bytes() == before
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-2"]


def test_refuses_moments_of_another_shape(tmp_path):
    torch.manual_seed(0)
    model = LM(Config(vocab=7, width=8, layers="mlp"))
    optimizer = adamw(model, 1e-3, 0.1)
    model.loss(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))[
        0
    ].backward()
    optimizer.step()
    moments = optimizer.state[model.embedding.weight]
    moments["exp_avg"] = moments["exp_avg"].t()
    checkpoint.save(tmp_path, model, optimizer, {"step": 1})
    with pytest.raises(
        InputError, match=r"embedding.weight.exp_avg \[8, 7\] float32.* \[7, 8\] float32"
    ):
        checkpoint.load(tmp_path, model, optimizer)


def test_refuses_to_go_on_with_other_data(tmp_path, monkeypatch, capsys):
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / name).write_bytes(b"some text " * 50)
    run("--data", "texts", "--steps", 2, "--out", "texts/run", *SMALL, monkeypatch=monkeypatch)
    # files that the run has written there are not text
    run("--resume", "texts/run", "--steps", 4, monkeypatch=monkeypatch)
    (tmp_path / "texts" / "c").write_bytes(b"more")
    with pytest.raises(SystemExit):
        run("--resume", "texts/run", "--steps", 6, monkeypatch=monkeypatch)
    error = capsys.readouterr().err
    assert "error: data: '3 files," in error and "was started with: 2 files," in error


def test_a_log_that_ran_ahead_of_its_checkpoint_is_cut_back(tmp_path, monkeypatch):
    run("--data", "text", "--steps", 4, "--out", "run", *SMALL, monkeypatch=monkeypatch)
    with (tmp_path / "run/log.jsonl").open("a") as file:
        # and a killed run leaves a part
        file.write('{"step": 5, "loss": 1.0}\n{}\nnothing}\n{"step": null}\n{"step": 6, "lo')
    run("--resume", "run", "--steps", 6, monkeypatch=monkeypatch)
    assert [record["step"] for record in log(tmp_path / "run") if "loss" in record] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@pytest.mark.parametrize(
    "change", [{"batch_size": 2.5}, {"data": 5}, {"steps": 1.5}, {"compile": 1}, {"model": None}]
)
def test_refuses_options_of_another_kind(change, tmp_path, monkeypatch, capsys):
    run("--data", "text", "--steps", 1, "--out", "run", *SMALL, monkeypatch=monkeypatch)
    options = json.loads((tmp_path / "run/options.json").read_text())
    changed = {**options, **change}
    for given, message in (
        (changed, "error: resume: 'run/options.json'"),
        ({name: changed[name] for name in changed if name != "checksum"}, next(iter(change))),
    ):
        (tmp_path / "run/options.json").write_text(json.dumps(given))
        with pytest.raises(SystemExit) as exit:
            run("--resume", "run", monkeypatch=monkeypatch)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err


def test_options_that_still_parse_but_changed_are_refused(tmp_path, monkeypatch, capsys):
    run("--data", "text", "--steps", 1, "--out", "run", *SMALL, monkeypatch=monkeypatch)
    path = tmp_path / "run/options.json"
    path.write_text(path.read_text().replace('"lr": 0.002', '"lr": 0.0025'))
    with pytest.raises(SystemExit):
        run("--resume", "run", monkeypatch=monkeypatch)
    assert "these were changed or damaged" in capsys.readouterr().err
    with pytest.raises(InputError, match="these were changed or damaged"):
        load_model("run")


def test_outputs_that_are_not_finite_are_neither_saved_nor_logged(tmp_path, monkeypatch, capsys):
    """The loss before the last step, and the weights after it, may still be finite."""
    monkeypatch.setattr(training_run, "evaluate", lambda *given: {"validation_loss": math.nan})
    with pytest.raises(SystemExit, match="1"):
        run("--data", "text", "--steps", 1, "--out", "run", *SMALL, monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    assert re.search("the validation loss is not finite; .* nothing was saved", said)
    assert not checkpoint.exists(tmp_path / "run")
    assert all(math.isfinite(value) for row in log(tmp_path / "run") for value in row.values())


def test_refuses_weights_that_are_not_finite(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="1"):
        run(
            "--data",
            "text",
            "--steps",
            1,
            "--lr",
            1e38,
            "--warmup",
            0,
            "--out",
            "run",
            *SMALL,
            monkeypatch=monkeypatch,
        )
    said = capsys.readouterr().err
    assert re.search("weights are not finite; .* nothing was saved", said)
    assert not checkpoint.exists(tmp_path / "run")


def test_weights_are_looked_at_before_a_checkpoint_on_the_way(tmp_path, monkeypatch, capsys):
    """Step 2 breaks them, long before the log would show it."""
    step = training_run.training_step

    def broken(model, *given):
        taken = step(model, *given)
        if checkpoint.exists(tmp_path / "run"):
            model.norm.weight.data.fill_(math.nan)
        return taken

    monkeypatch.setattr(training_run, "training_step", broken)
    arguments = ["--data", "text", "--steps", 9, "--out", "run", *SMALL]
    with pytest.raises(SystemExit, match="1"):
        run(*arguments, "--eval-every", 1, "--log-every", 9, monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    assert re.search("weights are not finite; .* the last checkpoint is good", said)
    assert all(weight.isfinite().all() for weight in load_model("run").parameters())


def test_a_run_that_cannot_fit_ends_before_its_first_step(tmp_path, monkeypatch, capsys):
    """And one that may not fit starts with a note; slow steps are mentioned on the way."""
    arguments = ["--data", "text", "--steps", 2, "--log-every", 1, "--out", "run", *SMALL]
    monkeypatch.setattr("minimodels.pace.Pace.remark", lambda self, speed: "slow")
    monkeypatch.setattr("minimodels.memory.memory_of", lambda device: Memory(1000, 1000))
    with pytest.raises(SystemExit) as exit:
        run(*arguments, monkeypatch=monkeypatch)
    assert exit.value.code == 2
    assert "error: memory: 'at least " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("minimodels.memory.memory_of", lambda device: Memory(1e12, 1000))
    run(*arguments, monkeypatch=monkeypatch)
    said = capsys.readouterr()
    assert "memory   at least " in said.out
    assert (said.out + said.err).count("note: slow") == 1  # not after the last step


def test_a_run_on_a_task_continues_no_text(tmp_path, monkeypatch, capsys):
    run("--data", "induction", "--steps", 1, "--out", "run", *SMALL, monkeypatch=monkeypatch)
    monkeypatch.setattr(sys, "argv", ["sample", "run", "--prompt", "a"])
    with pytest.raises(SystemExit) as exit:
        run_command(
            minimodels.sample.main, lambda: minimodels.sample.tyro.cli(minimodels.sample.Options)
        )
    assert exit.value.code == 2
    assert "model: 'run' is not accepted; accepted: a run on text" in capsys.readouterr().err


@pytest.mark.parametrize("clip", [0.3, 0])
def test_a_run_takes_the_steps_that_it_says(clip, tmp_path, monkeypatch):
    """It takes its data in order, accumulates, clips, and uses the scheduled rate. All of it is
    written out here and gives the same bits."""
    layers = "attention moe(experts=4, router=sigmoid_bias, bias_step=0.1)"
    arguments = f"--layers|{layers}|--data|text|--steps|3|--accumulate|2|--seed|4"
    arguments = [*arguments.split("|"), "--weight-decay", 0.5, "--clip", clip, "--out", "run"]
    run(*arguments, *SMALL, monkeypatch=monkeypatch)
    config, data = checkpoint.load_model(tmp_path / "run").config, train.open_data("text", 32)
    torch.manual_seed(4)
    model = LM(config)
    optimizer = adamw(model, 1.0, 0.5)
    for step, record in enumerate(log(tmp_path / "run")[:3]):
        lr = 2e-3 * (step + 1) / 6 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 3)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        said = []
        for micro in range(2):
            loss, parts = model.loss(*data.batch(4, 2 * step + micro, 2))
            (loss / 2).backward()
            said.append(parts["cross_entropy"].item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        expected = {
            "loss": sum(said) / 2,
            "grad_norm": norm.item(),
            "lr": lr,
            "tokens": (step + 1) * 2 * 64,
        }
        assert {name: record[name] for name in expected} == pytest.approx(expected)
    (tmp_path / "ours").mkdir()
    checkpoint.save(tmp_path / "ours", model, optimizer, {"step": 3})
    assert contents(tmp_path / "ours") == contents(tmp_path / "run")


@pytest.mark.parametrize("name", ["text", "mqar(pairs=2, vocab=8)"])
def test_validation_scores_every_held_out_batch_as_in_use(name):
    data = train.open_data(name, 32)
    torch.manual_seed(0)
    # a tied head repeats its token
    config = Config(layers="mod(mlp)", width=16, vocab=data.vocab, tie_embeddings=False)
    model = LM(config)
    scores = training_run.evaluate(model, data, 4, 8, torch.autocast("cpu", enabled=False))
    train.sample(model, data, "a")
    assert model.training
    nats, accuracy = scored(model, data.validation(4, 8))
    expected = {"validation_loss": nats, "accuracy": accuracy}
    assert scores == pytest.approx(
        expected | ({"bits_per_byte": nats / math.log(2)} if name == "text" else {})
    )


def test_a_sample_has_no_control_characters(monkeypatch):
    model = LM(Config(layers="mlp", width=8, vocab=256))
    monkeypatch.setattr(train, "complete", lambda *_, **__: "\x1b[2J\tb\n\x07")
    text = train.sample(model, train.open_data("text", 32), "a\0")
    assert text == "--- sample ---\na\\x00\\x1b[2J\tb\n\\x07"


@pytest.mark.parametrize(
    "bounds, message",
    [
        (
            ["--flops", "1e3"],
            "error: flops: 1000.0 is not accepted; accepted: enough for one step of",
        ),
        (
            ["--steps", "5", "--tokens", "7"],
            "error: tokens: 7.0 is not accepted; accepted: enough for",
        ),
    ],
)
def test_a_bound_below_one_step_is_named_with_its_value(bounds, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run("--layers", "mlp", "--data", "text", *bounds, *SMALL, monkeypatch=monkeypatch)
    assert message in capsys.readouterr().err


def test_a_resumed_run_counts_the_seconds_before(tmp_path, monkeypatch):
    run("--data", "text", "--steps", 2, "--out", "run", *SMALL, monkeypatch=monkeypatch)
    find = checkpoint.find

    def found_late(run):
        found = find(run)
        found.about["progress"]["seconds"] = 100.0
        return found

    monkeypatch.setattr(checkpoint, "find", found_late)
    run("--resume", "run", "--steps", 3, monkeypatch=monkeypatch)
    assert 100 < log(tmp_path / "run")[-1]["seconds"] < 200


def test_the_type_asked_for_is_computed_in(monkeypatch, capsys):
    run(
        "--layers",
        "mlp",
        "--data",
        "text",
        "--steps",
        1,
        "--dtype",
        "bfloat16",
        *SMALL,
        monkeypatch=monkeypatch,
    )
    assert re.search(r"runs on  cpu.*, bfloat16 autocast; ", capsys.readouterr().out)


def test_rates_over_a_run():
    def rates(schedule, *steps):  # of 100, of which 9 warm up
        return [learning_rate(2.0, schedule, step, 9, step / 100) for step in steps]

    assert rates("constant", 0, 4, 9, 99) == pytest.approx([0.2, 1, 2, 2])
    assert rates("cosine", 0, 50, 100, 150) == pytest.approx([0.2, 1.1, 0.2, 0.2])
    assert rates("wsd", 0, 50, 80, 90, 100, 110) == pytest.approx([0.2, 2, 2, 1, 0, 0])


def test_a_size_brings_its_shape_and_its_training(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "mamba", "--size", "small"])
    options = train.parse("")
    assert options.config == preset("mamba", "small")
    assert (options.context, options.batch_size, options.lr, options.warmup) == (
        1024,
        32,
        6e-4,
        500,
    )
    assert train.label(options) == "mamba"
    data = train.open_data("text", 32)
    for change, bounds in (
        ({}, "20000 steps"),
        ({"size": "tiny"}, "600 steps"),
        ({"minutes": 1.5, "tokens": 1e6}, "1e+06 tokens or 1.5 minutes"),
    ):
        budget = train.Budget(replace(options, **change), options.config, data, {})
        assert budget.describe() == bounds


def test_what_may_change_on_resuming_is_taken(tmp_path, monkeypatch, capsys):
    run("--data", "text", "--steps", 1, "--out", "run", *SMALL, monkeypatch=monkeypatch)
    changes = "--steps 2 --impl reference --dtype float32 --eval-every 1 --sample-every 1 --prompt b --log-every 2".split()
    run("--resume", "run", *changes, "--eval-batches", 2, monkeypatch=monkeypatch)
    assert "rmsnorm: reference" in capsys.readouterr().out
    changes = (
        "--batch-size 3 --accumulate 2 --schedule constant --warmup 1 --weight-decay 1 --clip 3"
    )
    run("--resume", "run", *changes.split(), "--lr", 1e-3, "--steps", 4, monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    for change in ("batch_size: 2 -> 3", "lr: 0.002 -> 0.001", "clip: 1.0 -> 3.0"):
        assert f"changed  {change}\n" in said
    record = log(Path("run"))[-2]
    assert (record["lr"], record["tokens"]) == (1e-3, 2 * 64 + 2 * 2 * 3 * 32)
    run("--resume", "run", "--steps", 5, monkeypatch=monkeypatch)
    assert "batch_size" not in capsys.readouterr().out


def test_decay_is_what_is_asked_for():
    decayed, kept = adamw(LM(Config(layers="mlp")), 1e-3, 0.3).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0)


def test_a_checkpoint_is_of_one_configuration(tmp_path, monkeypatch):
    """It is rejected for another configuration even if all shapes agree. A checkpoint older than a
    field gets the field's default."""
    model = LM(Config(layers="attention(window=4)", width=8))
    checkpoint.save(tmp_path, model, adamw(model, 1e-3, 0.1), {"step": 1})
    other = replace(model.config, layers="attention(window=5)")
    differing = r"it has layers 'attention\(window=4\)', not 'attention\(window=5\)'"
    with pytest.raises(InputError, match=differing):
        checkpoint.load(tmp_path, LM(other))
    with pytest.raises(InputError, match="it has norm_eps 1e-05, not 1e-06"):
        checkpoint.load(tmp_path, LM(replace(model.config, norm_eps=1e-6)))
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint,
            "asdict",
            lambda config: {"layers": config.layers, "width": config.width},
        )
        checkpoint.save(tmp_path, model, adamw(model, 1e-3, 0.1), {"step": 1})
    checkpoint.load(tmp_path, model)


@pytest.mark.parametrize(
    "saved, wanted, same",
    [
        ("(mlp)*2", "mlp mlp", True),
        ("mlp  mod( attention mlp,capacity = 0.5 )", "mlp mod(attention mlp, capacity=0.5)", True),
        ("a=mlp a*2", "mlp*2", True),
        ("A:=mlp A A", "mlp mlp", False),
        ("mlp mlp", "A:=mlp A A", False),
        ("attention(heads=2)", "attention", False),
    ],
)
def test_checkpoints_compare_what_texts_describe(saved, wanted, same, tmp_path):
    """Spaces, repeats and definitions do not matter."""
    model = LM(Config(layers=saved, width=8))
    checkpoint.save(tmp_path, model, None, {"step": 1})
    other = LM(Config(layers=wanted, width=8))
    if same:
        checkpoint.load(tmp_path, other)
        tokens = torch.arange(5)[None]
        assert torch.equal(model.eval()(tokens)[0], other.eval()(tokens)[0])
    else:
        with pytest.raises(InputError, match="it has layers"):
            checkpoint.load(tmp_path, other)


def test_a_shared_layer_is_saved_once(tmp_path):
    """Its weights and moments are saved under the name of its first use. After
    loading it is shared again."""
    torch.manual_seed(0)
    config = Config(layers="A:=attention A mlp A", width=8, vocab=7)
    model, other = LM(config), LM(config)
    optimizer = adamw(model, 1e-3, 0.1)
    model.loss(*torch.zeros(2, 1, 3, dtype=torch.int64))[0].backward()
    optimizer.step()
    checkpoint.save(tmp_path, model, optimizer, {"step": 1})
    kept = contents(tmp_path)
    names = {name.removeprefix("model.") for name in kept if name.startswith("model.")}
    assert names == set(dict(model.named_parameters()))
    assert not any(".layers.2." in f".{name}" for name in kept)
    for name in ("exp_avg", "exp_avg_sq"):
        assert f"optimizer.layers.0.layer.q.weight.{name}" in kept
    again = adamw(other, 1e-3, 0.1)
    checkpoint.load(tmp_path, other, again)
    tokens = torch.arange(5)[None]
    assert torch.equal(model(tokens)[0], other(tokens)[0])
    assert other.layers[0] is other.layers[2]
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg_sq"], again.state[theirs]["exp_avg_sq"])


def test_a_run_is_resumed_with_the_same_layers_in_other_words(tmp_path, monkeypatch, capsys):
    """Layers and settings are compared by meaning. The run continues with the saved ones."""
    layers = "(mlp  attention( heads=2 ))*2"
    run(
        "--layers",
        layers,
        "--data",
        "text",
        "--steps",
        2,
        "--out",
        "run",
        *SMALL,
        monkeypatch=monkeypatch,
    )
    again = ["--layers", "mlp attention(heads=2) mlp attention(heads=2)"]
    run("--resume", "run", *again, "--steps", 3, monkeypatch=monkeypatch)
    run("--resume", "run", "--set", "attention.heads=2", "--steps", 4, monkeypatch=monkeypatch)
    assert log(tmp_path / "run")[-1]["step"] == 4
    for change in (["--layers", "(mlp attention)*2"], ["--set", "attention.heads=4"]):
        with pytest.raises(SystemExit):
            run("--resume", "run", *change, monkeypatch=monkeypatch)
        assert 'error: config: "layers' in capsys.readouterr().err


def test_a_run_that_ends_by_the_clock_logs_its_last_steps(tmp_path, monkeypatch):
    clock, rate = [0], train.learning_rate

    def take_a_second(*given):
        clock[0] += 1
        return rate(*given)

    monkeypatch.setattr(training_run, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(train, "learning_rate", take_a_second)
    arguments = ["--layers", "mlp", "--data", "text", *SMALL, "--log-every", 5]
    run(*arguments, "--minutes", 0.2, "--out", "run", monkeypatch=monkeypatch)
    assert [record["step"] for record in log(tmp_path / "run") if "loss" in record] == [5, 10, 12]


def test_a_validation_on_the_way_is_checkpointed_and_no_part_of_the_speed(tmp_path, monkeypatch):
    clock, saved, rate, save = [0], [], train.learning_rate, checkpoint.save

    def tick(seconds, result=None):
        clock[0] += seconds
        return result

    monkeypatch.setattr(training_run, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    # a step takes a second
    monkeypatch.setattr(train, "learning_rate", lambda *given: tick(1, rate(*given)))
    monkeypatch.setattr(
        training_run, "evaluate", lambda *_: tick(100, {"validation_loss": 1.0, "accuracy": 0.5})
    )
    monkeypatch.setattr(
        checkpoint, "save", lambda *given: saved.append(given[3]["step"]) or save(*given)
    )
    arguments = [
        "--layers",
        "mlp",
        "--data",
        "text",
        "--steps",
        8,
        *SMALL,
        "--eval-every",
        4,
        "--log-every",
        4,
    ]
    run(*arguments, "--out", "run", monkeypatch=monkeypatch)
    assert saved == [4, 8]
    records = [record for record in log(tmp_path / "run") if "loss" in record]
    assert [(record["seconds"], record["tokens_per_second"]) for record in records] == [
        (4, 64),
        (108, 64),
    ]


def test_damage_anywhere_is_seen(tmp_path):
    """In every tensor, in the progress, and in the list of files."""
    model = LM(Config(layers="mlp", width=8))
    optimizer = adamw(model, 1e-3, 0.1)
    model.loss(*torch.zeros(2, 1, 3, dtype=torch.int64))[0].backward()
    optimizer.step()
    checkpoint.save(tmp_path, model, optimizer, {"step": 1})
    file = shard(tmp_path)
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    places = [start + told["data_offsets"][0] for name, told in json.loads(whole[8:start]).items()
              if name != "__metadata__"]  # fmt: skip
    for place in [0, start - 1, *places]:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="step-1: the checksum of shard-00001.*tensors is not"):
            checkpoint.load(tmp_path, model, optimizer)
    file.write_bytes(whole)
    progress = file.with_name("progress.json")
    content = progress.read_text()
    for hurt, message in {
        content.replace('"step": 1', '"step": 2'): "the checksum of progress.json is not",
        content[:-9]: "a JSON object",
        "{}": "the checksum of progress.json",
    }.items():
        progress.write_text(hurt)
        with pytest.raises(InputError, match=message):
            checkpoint.load(tmp_path, model, optimizer)
    progress.write_text(content)
    shutil.copy(file, file.with_name("shard-00002-model-00001-of-00001.safetensors"))
    with pytest.raises(InputError, match="its files are not shard-00001"):
        checkpoint.load(tmp_path, model, optimizer)


class NoPickler:
    def __init__(self, *given, **named):
        raise AssertionError("something is pickled")


def save_and_load(rank: int, folder: Path) -> None:
    """Save and load a checkpoint and a model; then show that a pickle would have been noticed."""
    for name in ("Pickler", "_Pickler", "dump", "dumps"):
        setattr(pickle, name, NoPickler)
    read = []
    sys.addaudithook(lambda event, given: read.append(given) if "pickle" in event else None)
    model = LM(Config(layers="mlp", width=8))
    optimizer = adamw(model, 1e-3, 0.1)
    model.loss(*torch.zeros(2, 1, 3, dtype=torch.int64))[0].backward()
    optimizer.step()
    checkpoint.save(folder, model, optimizer, {"step": 1})
    assert checkpoint.load(folder, model, optimizer) == {"step": 1}
    save_model(model, folder / "model")
    assert load_model(folder / "model").config == model.config
    assert read == []
    with pytest.raises(AssertionError, match="something is pickled"):
        torch.save(model.state_dict(), folder / "pickled")
    pickle.loads(b"cpathlib\nPath\n.")
    assert read == [("pathlib", "Path")]


def test_no_model_or_checkpoint_is_pickled(tmp_path):
    """A pickle runs any code when it is read."""
    in_processes(1, save_and_load, tmp_path)


def test_a_file_is_replaced_and_not_written_over(tmp_path):
    for content in ("before", "after"):
        with atomic_write(tmp_path / "file") as partial:
            partial.write_text(content)
        if content == "before":
            os.link(tmp_path / "file", tmp_path / "same")
    assert ((tmp_path / "file").read_text(), (tmp_path / "same").read_text()) == ("after", "before")


def test_a_model_beside_the_weights_of_another_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run("--init", "run", "--model", "mamba", monkeypatch=monkeypatch)
    assert "model: 'mamba' is not accepted; accepted: no --model with" in capsys.readouterr().err


def test_another_tokenizer_beside_the_weights_of_a_model_is_refused(tmp_path, monkeypatch, capsys):
    """Its embeddings are those of its own tokens."""
    run("--data", "parity", "--steps", 1, "--out", "run", *SMALL, monkeypatch=monkeypatch)
    with pytest.raises(SystemExit):
        run("--init", "run", "--tokenizer", "bpe(vocab=300)", monkeypatch=monkeypatch)
    assert "tokenizer: 'bpe(vocab=300)' is not accepted; acc" in capsys.readouterr().err


def test_a_used_folder_is_refused_before_the_data_are_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes").write_text("mine")
    with pytest.raises(SystemExit):
        run("--out", "used", "--data", "missing", *SMALL, monkeypatch=monkeypatch)
    assert "out: 'used' is not accepted" in capsys.readouterr().err


def test_a_run_on_a_task_is_not_published(tmp_path, monkeypatch):
    run("--data", "parity", "--steps", 1, "--out", "run", *SMALL, monkeypatch=monkeypatch)
    with pytest.raises(InputError, match="run: 'run' .* a task has answers"):
        published.main(published.Options(Path("run"), tmp_path / "there"))
    assert not (tmp_path / "there").exists()
