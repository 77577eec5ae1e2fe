"""The laws of tests/test_laws.py with impl="triton", at lengths that the interpreter can walk, and whole models on kernels."""

from functools import partial

import pytest
import test_laws as laws
import torch
from models import WIDTH, make, same, tensors

pytest.importorskip("triton", reason="the kernels need the package triton")

from minimodels.kernels import INTERPRETED

from minimodels import LM, Config
from minimodels.sample import Sampling, generate

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="the laws run interpreted: TRITON_INTERPRET=1 where there is a GPU"
)

MOE = "moe(experts=2, experts_per_token=1, router=softmax, expert_width=8)"
KERNEL_CASES = {
    "attention": "attention(kv_heads=2, qk_norm=head)",
    "window": "attention(window=3)",
    "mamba": "mamba(state_size=4)",
    "moe": MOE,
    "mod": "mod(mamba(state_size=4) attention, capacity=0.5)",
}
# which is not causal, and lets a token visit more than one expert
EXPERT_CHOICE = "moe(experts=4, experts_per_token=1, router=expert_choice, expert_width=8)"
LAWS = (
    laws.test_chunking,
    laws.test_causality,
    laws.test_batch_independence,
    laws.test_no_document_sees_another,
)


@pytest.fixture
def on_kernels(monkeypatch):
    """Layers take their kernels, and texts are so short that the interpreter can walk them."""
    monkeypatch.setattr(laws, "T", 5)
    monkeypatch.setattr(laws, "DOCUMENTS", ((1, 4), (3, 2), (2, 1)))
    monkeypatch.setattr(laws, "make", partial(make, impl="triton"))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_law(law, case, on_kernels):
    law(KERNEL_CASES[case])


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_packing(case, on_kernels):
    laws.test_packing(KERNEL_CASES[case], training=False)


@pytest.mark.parametrize("layers", [*list(KERNEL_CASES.values())[:4], EXPERT_CHOICE])
def test_reference_equals_triton(layers, monkeypatch):
    """Outputs, carried states and gradients."""
    monkeypatch.setattr(laws, "T", 9)
    results = {}
    for impl in ("reference", "triton"):
        stack, x = make(layers, impl=impl), laws.text().requires_grad_()
        with torch.no_grad():
            _, state = stack(x[:, :4])
        y, after = stack(x[:, 4:], state)
        results[impl] = [y, *tensors(after), *laws.gradients(stack, x, y, after).values()]
    for reference, kernel in zip(results["reference"], results["triton"], strict=True):
        same(kernel, reference, 1e-8)


@pytest.mark.parametrize("layers", ["attention mlp", "mamba(state_size=4)", f"attention {MOE}"])
def test_a_whole_model_trains_and_generates_on_kernels(layers):
    """Loss, every gradient and greedy text are those of the reference."""
    tokens = torch.randint(32, (2, 5), generator=torch.Generator().manual_seed(0))
    results = {}
    for impl in ("reference", "triton"):
        torch.manual_seed(0)
        lm = LM(Config(layers=layers, width=WIDTH, vocab=32, impl=impl)).double()
        loss, _ = lm.loss(tokens[:, :-1], tokens[:, 1:])
        gradients = torch.autograd.grad(loss, list(lm.parameters()))
        text = torch.stack(list(generate(lm.eval(), [tokens[0]], 2, Sampling(temperature=0))))
        results[impl] = [loss, *gradients, text]
    for reference, kernel in zip(results["reference"], results["triton"], strict=True):
        same(kernel, reference, 1e-8)


@pytest.mark.parametrize(
    "layers", ["attention mlp", "mamba(state_size=4)", f"attention {MOE}", "mod(attention mlp)"]
)
def test_a_whole_model_on_kernels_compiles_to_one_graph(layers):
    tokens = torch.randint(32, (2, 5), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    lm = LM(Config(layers=layers, width=WIDTH, vocab=32, impl="triton")).double()
    expected, _ = lm.loss(tokens[:, :-1], tokens[:, 1:])
    torch.compiler.reset()
    loss, _ = torch.compile(lm.loss, fullgraph=True, backend="aot_eager")(
        tokens[:, :-1], tokens[:, 1:]
    )
    same(loss, expected)
