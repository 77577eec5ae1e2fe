"""The laws of tests/test_laws.py with impl="triton", at lengths that are practical in the
interpreter; and whole models on kernels."""

import pytest
import test_laws as laws
import torch
from models import WIDTH, make, same, tensors

pytest.importorskip("triton", reason="the kernels need the package triton")

from minimodels import LM, Config, Sampling, generate
from minimodels.decoding import FixedStep, GrowingStep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

MOE = "moe(experts=2, experts_per_token=1, router=softmax, expert_width=8)"
KERNEL_CASES = {
    "attention": "attention(kv_heads=2, qk_norm=head)",
    "window": "attention(window=3)",
    "mamba": "mamba(state_size=4)",
    "moe": MOE,
    "mod": "mod(mamba(state_size=4) attention, capacity=0.5)",
}
# the interpreter takes a minute for a law with this kernel: each kind of gate, with and without e
DELTA = [
    "mamba2(heads=2, head_dim=16, state_size=4)",
    "retention(heads=2, rope_base=0, decay=channels)",
    "deltanet(heads=2, gate=scalar, output_gate=silu)",
    "deltanet(heads=2, gate=vector)",
    "deltanet(heads=2, steps=2, beta_max=2)",
]
# not causal, and a token may visit more than one expert
EXPERT_CHOICE = "moe(experts=4, experts_per_token=1, router=expert_choice, expert_width=8)"
LAWS = (
    laws.test_chunking,
    laws.test_causality,
    laws.test_batch_independence,
    laws.test_no_document_sees_another,
)


@pytest.fixture(autouse=True)
def on_the_kernels_device(monkeypatch):
    """Make models and inputs on the CPU, with its random numbers, and move them to
    the device of the kernels."""
    make_text = laws.text

    def text(*arguments) -> torch.Tensor:
        with torch.device("cpu"):
            return make_text(*arguments).to(DEVICE)

    monkeypatch.setattr(laws, "make", on_device)
    monkeypatch.setattr(laws, "text", text)
    with torch.device(DEVICE):
        yield


@pytest.fixture
def short(monkeypatch):
    """Texts short enough for the interpreter."""
    monkeypatch.setattr(laws, "T", 5)
    monkeypatch.setattr(laws, "DOCUMENTS", ((1, 4), (3, 2), (2, 1)))


def on_device(layers: str, impl: str = "triton", **options) -> torch.nn.Module:
    """A stack whose layers use their kernels."""
    with torch.device("cpu"):
        return make(layers, impl=impl, **options).to(DEVICE)


def model(layers: str, impl: str) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device("cpu"):
        return LM(Config(layers=layers, width=WIDTH, vocab=32, impl=impl)).double().to(DEVICE)


def tokens() -> torch.Tensor:
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(32, (2, 5), generator=generator).to(DEVICE)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_law(law, case, short):
    law(KERNEL_CASES[case])


@pytest.mark.nightly
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
@pytest.mark.parametrize("layers", DELTA)
def test_law_of_the_delta_rule(law, layers, short):
    law(layers)


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_packing(case, short):
    laws.test_packing(KERNEL_CASES[case], training=False)


@pytest.mark.parametrize(
    "layers", [*list(KERNEL_CASES.values())[:4], *DELTA, "short_convolution", EXPERT_CHOICE]
)
def test_reference_equals_triton(layers, monkeypatch):
    """They agree in outputs, carried states and gradients."""
    monkeypatch.setattr(laws, "T", 9)
    results = {}
    for impl in ("reference", "triton"):
        stack, x = on_device(layers, impl), laws.text().requires_grad_()
        with torch.no_grad():
            _, state = stack(x[:, :4])
        y, after = stack(x[:, 4:], state)
        results[impl] = [y, *tensors(after), *laws.gradients(stack, x, y, after).values()]
    for reference, kernel in zip(results["reference"], results["triton"], strict=True):
        same(kernel, reference, 1e-8)


@pytest.mark.parametrize("layers", ["attention mlp", "mamba(state_size=4)", f"attention {MOE}"])
def test_a_whole_model_trains_and_generates_on_kernels(layers):
    """The loss, every gradient and the greedy text are those of the reference."""
    given, results = tokens(), {}
    for impl in ("reference", "triton"):
        lm = model(layers, impl)
        loss, _ = lm.loss(given[:, :-1], given[:, 1:])
        gradients = torch.autograd.grad(loss, list(lm.parameters()))
        text = torch.stack(list(generate(lm.eval(), [given[0]], 2, Sampling(temperature=0))))
        results[impl] = [loss, *gradients, text]
    for reference, kernel in zip(results["reference"], results["triton"], strict=True):
        same(kernel, reference, 1e-8)


@pytest.mark.parametrize(
    "layers", ["attention mlp", "mamba(state_size=4)", f"attention {MOE}", "mod(attention mlp)"]
)
def test_a_whole_model_on_kernels_compiles_to_one_graph(layers):
    lm, given = model(layers, "triton"), tokens()
    expected, _ = lm.loss(given[:, :-1], given[:, 1:])
    torch.compiler.reset()
    compiled = torch.compile(lm.loss, fullgraph=True, backend="aot_eager")
    loss, _ = compiled(given[:, :-1], given[:, 1:])
    same(loss, expected)


@pytest.mark.parametrize("layers", ["attention(kv_heads=2, window=3) mamba(state_size=4)", MOE])
@torch.inference_mode()
def test_a_step_of_fixed_size_on_kernels_gives_the_logits_of_the_ordinary_one(layers):
    """On a GPU it is a CUDA graph from the second step on."""
    lm, given = model(layers, "triton").eval(), tokens()
    _, state = lm(given)
    step, ordinary = FixedStep(lm, state, 2), GrowingStep(lm, state)
    for token in given.T[:4]:
        same(step(token), ordinary(token), 1e-8)
    assert DEVICE == "cpu" or step.graph
