"""The laws of tests/test_laws.py with impl="triton", at lengths that the interpreter can walk, and whole models on kernels."""

import pytest
import test_laws as laws
import torch
from models import CASES, SHAPE, make, same, tensors

pytest.importorskip("triton", reason="the kernels need the package triton")

from minimodels import LM, Config
from minimodels.sample import Sampling, generate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FEW = {"experts": 2, "experts_per_token": 1, "router": "softmax", "expert_width": 8}
KERNEL_CASES = {
    "attention": {"layers": "attention", "kv_heads": 2, "qk_norm": "head"},
    "window": {"layers": "window", "window": 3},
    "mamba": {"layers": "mamba"},
    "moe": {"layers": "moe", **FEW},
    "mod": {"layers": "mod(mamba attention)", "capacity": 0.5},
}
EXPERT_CHOICE = {
    "layers": "moe",
    "experts": 4,
    "experts_per_token": 1,
    "router": "expert_choice",
    "expert_width": 8,
}
EQUAL_CASES = {
    **KERNEL_CASES,
    "expert choice": EXPERT_CHOICE,
}  # which is not causal, and visits more than one expert a token


@pytest.fixture(autouse=True)
def on_the_kernels_device(monkeypatch):
    """Models and inputs are made on the CPU, from its random numbers, and moved to where the kernels run."""
    make_text = laws.text

    def text(*arguments) -> torch.Tensor:
        with torch.device("cpu"):
            return make_text(*arguments).to(DEVICE)

    monkeypatch.setattr(laws, "make", on_device)
    monkeypatch.setattr(laws, "text", text)
    with torch.device(DEVICE):
        yield


def on_device(*arguments, **options) -> torch.nn.Module:
    with torch.device("cpu"):
        return make(*arguments, **options).to(DEVICE)


def model(**fields) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device("cpu"):
        return LM(Config(**{**SHAPE, **FEW, "vocab": 32, **fields})).double().to(DEVICE)


def tokens() -> torch.Tensor:
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(32, (2, 5), generator=generator).to(DEVICE)


LAWS = (laws.test_chunking, laws.test_causality, laws.test_batch_independence)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_law(law, case, monkeypatch):
    monkeypatch.setattr(laws, "T", 5)
    monkeypatch.setitem(CASES, "on kernels", {**KERNEL_CASES[case], "impl": "triton"})
    law("on kernels")


@pytest.mark.parametrize("case", ["attention", "window", "mamba", "moe", "expert choice"])
def test_reference_equals_triton(case, monkeypatch):
    """Outputs, carried states and gradients."""
    monkeypatch.setattr(laws, "T", 9)
    results = {}
    for impl in ("reference", "triton"):
        stack, x = on_device({**EQUAL_CASES[case], "impl": impl}), laws.text().requires_grad_()
        with torch.no_grad():
            _, state = stack(x[:, :4])
        y, after = stack(x[:, 4:], state)
        results[impl] = [y, *tensors(after), *laws.gradients(stack, x, y, after).values()]
    for reference, kernel in zip(results["reference"], results["triton"], strict=True):
        same(kernel, reference, 1e-8)


@pytest.mark.parametrize("layers", ["attention mlp", "mamba", "attention moe"])
def test_a_whole_model_trains_and_generates_on_kernels(layers):
    """Loss, every gradient and greedy text are those of the reference."""
    given, results = tokens(), {}
    for impl in ("reference", "triton"):
        lm = model(layers=layers, impl=impl)
        loss, _ = lm.loss(given[:, :-1], given[:, 1:])
        gradients = torch.autograd.grad(loss, list(lm.parameters()))
        text = torch.stack(list(generate(lm.eval(), [given[0]], 2, Sampling(temperature=0))))
        results[impl] = [loss, *gradients, text]
    for reference, kernel in zip(results["reference"], results["triton"], strict=True):
        same(kernel, reference, 1e-8)


@pytest.mark.parametrize(
    "layers", ["attention mlp", "mamba", "attention moe", "mod(attention mlp)"]
)
def test_a_whole_model_on_kernels_compiles_to_one_graph(layers):
    lm, given = model(layers=layers, impl="triton"), tokens()
    expected, _ = lm.loss(given[:, :-1], given[:, 1:])
    torch.compiler.reset()
    loss, _ = torch.compile(lm.loss, fullgraph=True, backend="aot_eager")(
        given[:, :-1], given[:, 1:]
    )
    same(loss, expected)
