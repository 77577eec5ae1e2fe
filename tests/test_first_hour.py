"""The first experience of a new user: options, threads, folders, signals, and a
checkout that is not installed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import minimodels
import train
from minimodels import (
    LM,
    Config,
    InputError,
    complete,
    generate,
    interrupts,
    ledger,
    load_model,
    pace,
    preset,
    save_model,
)
from minimodels import memory as memory_of_devices
from minimodels.data.files import amount
from minimodels.files import LOCK, locked
from minimodels.training import checkpoint, options

ROOT = Path(__file__).parents[1]
TINY = [
    "--layers",
    "mlp",
    "--width",
    "8",
    "--context",
    "16",
    "--batch-size",
    "2",
    "--eval-batches",
    "1",
    "--threads",
    "1",
]


def parse(*arguments: str, monkeypatch) -> options.Options:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return options.parse("")


@pytest.mark.parametrize(
    "given, message",
    [
        (["--steps", "abc"], "steps: 'abc' is not accepted; accepted: a whole number"),
        (["--steps", "0"], "steps: 0 is not accepted; accepted: a whole number from 1"),
        (["--lr", "fast"], "lr: 'fast' is not accepted; accepted: a number above 0"),
        (
            ["--dtype", "float8"],
            "dtype: 'float8' is not accepted; accepted: auto, float32, bfloat16",
        ),
        (["--learning-rate", "1"], "did you mean --lr"),
        (["--block-size=64"], "did you mean --context"),
        (["--heads", "8"], "did you mean --set attention.heads=VALUE"),
        (["--widht", "8"], "did you mean --width"),
        (["--lerning-rate", "1"], "did you mean --lr"),
        (["--expert", "8"], "did you mean --set moe.experts=VALUE"),
        (["--dropout", "8"], "an option that --help lists"),
        (["hybrid"], "such as --model hybrid"),
        (
            ["--layers", "mamba", "mlp", "attention"],
            'in quotes if it has spaces: --layers "... mlp"',
        ),
        (["--layers=mamba", "mlp"], 'in quotes if it has spaces: --layers "... mlp"'),
        (["--steps", "2", "mlp"], "such as --model mlp or --layers mlp"),
        (["--set", "mlp.width=8", "mlp.bias=true"], "accepted: one value after each --set"),
        (["--resume", "--steps", "3"], "resume: '' is not accepted; accepted: a path"),
        (["--layers", "mlp hybrid"], "the layers of the preset hybrid are (mamba mlp mamba moe"),
        (
            ["--layers", "mlp", "--model", "mamba"],
            "model: 'mamba' is not accepted; accepted: --model or",
        ),
        (
            ["--init", "nothing"],
            "init: 'nothing' is not accepted; accepted: a published model: a folder with",
        ),
        (
            ["--tie-embeddings", "maybe"],
            "tie_embeddings: 'maybe' is not accepted; accepted: --tie-embeddings or --no-tie-embeddings",
        ),
    ],
)
def test_a_wrong_option_is_one_line(given, message, monkeypatch):
    with pytest.raises(InputError) as error:
        parse(*given, monkeypatch=monkeypatch)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_of_layers_are_set(monkeypatch):
    given = parse(
        "--model",
        "hybrid",
        "--set",
        "mamba.state_size=32",
        "--set",
        "moe.experts=4",
        monkeypatch=monkeypatch,
    )
    assert (
        given.config.layers
        == preset("hybrid", "tiny", "mamba.state_size=32", "moe.experts=4").layers
    )
    assert options.label(given) == "custom"
    given = parse(
        "--size", "small", "--layers", "attention(heads=6) attention", monkeypatch=monkeypatch
    )
    assert given.config.layers == "attention(heads=6) attention(heads=12)"


def test_the_recipe_of_the_readme_is_gpt2(monkeypatch):
    """124M with its vocabulary, and half a million tokens a step with the small size's own batch."""
    recipe = re.search(
        r"^recipe=\(train.py (.*?)\)$", (ROOT / "README.md").read_text(), re.M | re.S
    )
    found = parse(*shlex.split(recipe[1]), monkeypatch=monkeypatch)
    assert (found.size, found.tokenizer, found.tokens) == ("small", "bpe(vocab=50257)", 1e10)
    cost = ledger(preset("transformer", "small", vocab=50257), found.context)
    assert cost.parameters == pytest.approx(123.6e6, rel=1e-3)
    tokens = options.DEFAULT_ROWS["small"] * found.context * found.accumulate
    assert tokens == pytest.approx(0.5e6, rel=0.05)
    assert cost.training_flops * found.tokens == pytest.approx(8.5e18, rel=0.01)


def test_threads_are_the_fastest_that_a_trial_found(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        for seconds, best in (({4: 8.0, 2: 1.0, 1: 2.0}, 2), ({4: 1.1, 2: 1.0, 1: 2.0}, 4)):
            monkeypatch.setattr(pace, "product_seconds", seconds.__getitem__)
            found = pace.pick_threads(None, torch.device("cpu"))
            assert (found.count, found.speed) == (best, pace.FLOPS / seconds[best])
            why = "8.0 times as fast as 4 on this machine now" if best == 2 else ""
            assert found.reason == why
        monkeypatch.setattr(pace, "product_seconds", lambda count: 1.0)
        assert pace.pick_threads(3, torch.device("cpu")) == (3, "", pace.FLOPS)
    finally:
        monkeypatch.undo()
        torch.set_num_threads(before)


def test_a_product_is_timed_with_the_threads_asked_for():
    before = torch.get_num_threads()
    try:
        assert 0 < pace.product_seconds(1, 0.01) < 1
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_folder_has_one_writer(tmp_path):
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
        with (
            pytest.raises(
                InputError, match=f"no other process writes; process {os.getpid()} on .* does"
            ),
            locked(tmp_path),
        ):
            pass
    with locked(tmp_path):
        pass


def test_a_run_that_saved_nothing_leaves_its_folder_usable(tmp_path, monkeypatch):
    for name in ("options.json", "log.jsonl", LOCK):
        (tmp_path / name).write_text("{}")
    given = parse("--out", str(tmp_path), monkeypatch=monkeypatch)
    assert options.new_folder(given) == tmp_path
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="a new or empty folder"):
        options.new_folder(given)
    (tmp_path / "checkpoints/step-1").mkdir(parents=True)
    with pytest.raises(InputError, match="--resume .* continues the run"):
        options.new_folder(given)


def run(*arguments: str, **environment: str) -> subprocess.Popen:
    """Run train.py in its own process."""
    text = subprocess.PIPE
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env=env,
        stdout=text,
        stderr=text,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves(number, tmp_path):
    process = run(*TINY, "--steps", "1000000", "--log-every", "1", "--out", str(tmp_path / "run"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "and saved; to continue: python train.py --resume" in out
    load_model(tmp_path / "run")


def test_a_loss_that_is_not_finite_is_not_saved(tmp_path):
    """The weights may still be finite. JSON has no NaN."""
    arguments = [
        "--layers",
        "mamba",
        "--width",
        "8",
        "--context",
        "16",
        "--lr",
        "1e30",
        "--warmup",
        "0",
        "--log-every",
        "1",
    ]
    process = run(*arguments, "--steps", "5", "--threads", "1", "--out", str(tmp_path / "run"))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "step 2 was bad: the loss is nan; the first output that is not finite is that of" in said
    assert "nothing was saved" in said
    assert not (tmp_path / "run/checkpoints").exists()
    for line in (
        (tmp_path / "run" / "log.jsonl").read_text().splitlines()
        if (tmp_path / "run" / "log.jsonl").exists()
        else []
    ):
        json.loads(line, parse_constant=pytest.fail)


def test_a_checkout_runs_without_being_installed(tmp_path):
    """minimodels.kernels is found next to minimodels."""
    for folder in ("minimodels", "kernels"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("__pycache__", "kernels"),
            symlinks=True,
        )
    code = "import minimodels.kernels as k; print(k.__file__)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()) == tmp_path / "kernels" / "__init__.py"


def test_what_a_notebook_needs_is_exported():
    for name in minimodels.__all__:
        assert getattr(minimodels, name) is not None
    assert ledger(preset("moe"), 8192).parameters > 1e6
    assert minimodels.__version__


def test_a_model_of_a_notebook_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = LM(Config(layers="A:=attention A mlp A", vocab=256, width=16)).eval()
    save_model(model, tmp_path / "model")
    loaded = load_model(str(tmp_path / "model")).eval()
    tokens = torch.randint(256, (1, 9))
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    model.norm.weight.data.fill_(2.0)
    save_model(model, tmp_path / "model")
    assert (load_model(tmp_path / "model").norm.weight == 2).all()
    (tmp_path / "model" / "log.jsonl").write_text("")  # a training run's folder has one
    with pytest.raises(InputError, match="a new or empty folder, or one that save_model"):
        save_model(model, tmp_path / "model")
    with pytest.raises(InputError, match="model: 'OrderedDict' is not .* an LM"):
        save_model(model.state_dict(), tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_text_in_text_out():
    torch.manual_seed(0)
    model = LM(Config(layers="attention mlp", vocab=256, width=16)).eval()
    assert complete(model, "abc", 20, seed=1) == complete(model, "abc", 20, seed=1)
    # each call draws different tokens
    assert len({complete(model, "abc", 20) for _ in range(3)}) > 1
    with pytest.raises(InputError, match="complete\\(model, text\\)"):
        generate(model, "abc", 5)
    with pytest.raises(InputError, match="at least one token"):
        generate(model, [[]], 5)
    with pytest.raises(InputError, match="at least one token"):
        complete(model, "", 5)
    wide = LM(Config(layers="mod(mlp)", vocab=256, width=16)).train()
    with pytest.raises(InputError, match=r"in training mode.*model.eval\(\) first"):
        generate(wide, [[1]], 5)


def test_samples_of_one_prompt_differ_and_repeat_on_a_seed():
    torch.manual_seed(0)
    model = LM(Config(layers="mlp", vocab=256, width=16)).eval()
    rows = torch.stack(list(generate(model, [[1, 2]] * 3, 10, seed=5)), dim=1)
    assert len({tuple(row) for row in rows.tolist()}) == 3
    for row in range(3):
        alone = torch.stack(list(generate(model, [[1, 2]], 10, seed=5 + row)), dim=1)
        assert torch.equal(alone[0], rows[row])


def test_logits_that_are_not_finite_name_the_dtype_to_try():
    model = LM(Config(layers="mlp", vocab=256, width=16)).half().eval()
    model.norm.weight.data.fill_(float("inf"))
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="dtype: 'float16' is not accepted; accepted: float32"):
            list(generate(model, [[1]], 1, minimodels.Sampling(temperature=temperature)))


def test_a_run_whose_text_has_moved_is_continued_with_its_new_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").write_bytes(bytes(range(32, 127)) * 60)

    def run(*arguments: str) -> None:
        train.main(parse(*arguments, monkeypatch=monkeypatch))

    run(*TINY, "--data", "text", "--steps", "2", "--out", "run")
    Path("text").rename("moved")
    with pytest.raises(InputError, match="'text' .* moved, give its new path as --data"):
        run("--resume", "run", "--steps", "3")
    run("--resume", "run", "--steps", "3", "--data", "moved")
    assert checkpoint.find(Path("run")).about["progress"]["step"] == 3


def test_slow_steps_suggest_fewer_threads_once(monkeypatch):
    """But only if fewer threads are faster now; a layer may be slow by itself."""
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    looks = []

    def product(count: int) -> float:
        looks.append(count)
        return seconds[count]

    monkeypatch.setattr(pace, "product_seconds", product)
    threads = pace.Threads(4, speed=1e9)
    seconds = {4: 9.0, 2: 2.0, 1: 1.0}
    run = pace.Pace(threads, flops_per_token=1e6)
    assert (
        run.remark(tokens_per_second=1000) == run.remark(300) == ""
    )  # as fast as suggested, or near
    assert not looks
    said = run.remark(100)
    assert "10 times slower" in said
    assert "1 of 4 threads are 9.0 times as fast now" in said
    assert "--resume with --threads 1" in said
    assert run.remark(100) == ""
    seconds, looks[:] = {4: 1.0, 2: 1.0, 1: 1.9}, []
    run = pace.Pace(threads, 1e6)
    assert [run.remark(100) for _ in range(9)] == [""] * 9
    assert len(looks) == 3 * pace.LOOKS
    assert pace.Pace(pace.Threads(1, speed=1e9), 1e6).remark(1) == ""
    assert pace.Pace(pace.Threads(4), 1e6).remark(1) == ""  # a GPU
    assert torch.get_num_threads() == before


FP32 = torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize(
    "layers",
    [
        "attention mlp",
        "attention(window=48)",
        "mamba(state_size=4) mlp",
        "moe(experts=4)",
        "mod(attention mlp, capacity=0.3)",
        "deltanet",
    ],
)
def test_the_bound_on_memory_is_below_what_is_stored_and_near_it(layers):
    torch.manual_seed(0)
    model = LM(Config(layers=layers, width=32, vocab=64))
    buffers = [buffer.clone() for buffer in model.buffers()]
    random = torch.get_rng_state()
    least = memory_of_devices.activation_bytes(model, 3, 400, FP32)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, buffers, model.buffers()))
    stored = memory_of_devices.stored_bytes(model, 3, 400, FP32)
    assert 0.8 * stored < least <= 1.01 * stored


def test_a_step_that_cannot_fit_is_refused_and_one_that_may_not_is_noted(monkeypatch):
    model = LM(Config(layers="mlp", width=16, vocab=64))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    least = 3 * weights + memory_of_devices.activation_bytes(model, 8, 1000, FP32)

    def check(total, free, **given):
        monkeypatch.setattr(
            memory_of_devices, "memory_of", lambda device: memory_of_devices.Memory(total, free)
        )
        return memory_of_devices.check_memory(model, 8, 1000, FP32, **given)

    assert check(1e12, 1e12) == check(2 * least, 1.01 * least) == ""
    said = check(1.01 * least, 0.99 * least)
    assert said.startswith(f"at least {amount(int(least))} for a step, and only")
    with pytest.raises(InputError, match="memory: 'at least .* accepted: up to .*--batch-size"):
        check(0.99 * least, 0.5 * least)
    assert "at least" in check(0.99 * least, 0.5 * least, exact=False)


def test_the_memory_of_this_machine_and_its_limits(tmp_path):
    total, free = memory_of_devices.memory_of(torch.device("cpu"))
    assert 0 < free <= total
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    for folder, name, text in (
        ("", "memory.max", "max"),
        ("a", "memory.max", "5000"),
        ("a/b", "memory.max", "max"),
        ("memory/c", "memory.limit_in_bytes", "4000"),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_text(text)
    for text, limit in (
        ("0::/a/b\n", 5000),
        ("0::/\n", float("inf")),
        ("4:cpu,memory:/c\n0::/a\n", 4000),
        ("4:cpu:/c\n", float("inf")),
    ):
        groups.write_text(text)
        assert memory_of_devices.cgroup_limit(groups, root) == limit
    assert memory_of_devices.cgroup_limit(tmp_path / "none", root) == float("inf")


INTERRUPT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize("command", [["train.py"], ["-m", "minimodels.sample", "x"]])
def test_ctrl_c_ends_the_imports_of_a_command_without_a_traceback(command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    found = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True)
    assert (found.returncode, found.stdout, found.stderr) == (130, b"", b"")


@pytest.mark.parametrize(
    "argv, given, ours",
    [
        (["-m", "x"], "python -m minimodels.sample x", True),
        (["-m"], "python -u -m benchmarks.claims", True),
        ([str(ROOT / "train.py")], "python train.py", True),
        (["-m"], "python -m their.package", False),  # which may import minimodels
        (["/their/train.py"], "python train.py", False),
        (["-c"], "python -c import", False),
        ([""], "python", False),
        ([], "", False),
    ],
)
def test_ctrl_c_is_left_alone_in_other_programs(argv, given, ours, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", given.split())
    assert interrupts.is_command() == ours
