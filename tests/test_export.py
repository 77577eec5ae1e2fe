"""Models outside of this package: torch.export, ONNX and the transformations of torch.func."""

import functools
import os

import pytest
import torch
from models import NAMES, same
from small import SETTINGS
from torch import nn
from torch.func import functional_call, grad, vmap

from minimodels import LM, Config, InputError
from minimodels.grammar import names_in, parse, set_options
from minimodels.presets import PRESETS

V, WIDTH = 29, 16
SHORT = {name: text.format(n=1, twice=1, half=1, quarter=1) for name, text in PRESETS.items()} | {
    "latent_attention": "latent_attention mlp",
    "differential_attention": "differential_attention mlp",
    "sparse_attention": "sparse_attention(keys=128) mlp",  # for texts of up to so many tokens
}
# all presets take a minute, so they are tried only with this variable, as are more configurations
NIGHTLY = "MINIMODELS_DRAWN" in os.environ
QUICK = ["attention mamba moe", "deltanet(gate=scalar) mod(attention mlp, capacity=0.5)"]
EXPORTED = list(SHORT) if NIGHTLY else QUICK


def model(name: str, *settings: str, dtype: torch.dtype = torch.float32) -> LM:
    """Layers, or a preset with as few as it can have, and parameters that all matter."""
    torch.manual_seed(0)
    text = SHORT.get(name, name)
    known = [each for each in SETTINGS if each.split(".")[0] in names_in(parse(text))]
    layers = set_options(text, known, missing=True)
    lm = LM(Config(layers=set_options(layers, settings), width=WIDTH, vocab=V)).to(dtype)
    for parameter in lm.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return lm


def text(batch: int, length: int) -> torch.Tensor:
    """Texts without repeated tokens if they are short, because equal scores have no order."""
    seed = torch.Generator().manual_seed(length)
    return torch.rand(batch, max(V, length), generator=seed).argsort(1)[:, :length] % V


class Logits(nn.Module):
    """The logits alone, because a graph has no state of named tuples."""

    def __init__(self, lm: LM):
        super().__init__()
        self.lm = lm

    def forward(self, tokens):
        return self.lm(tokens)[0]


def exported(lm: LM) -> torch.export.ExportedProgram:
    """The program for any number of texts of any length."""
    free = {"tokens": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        return torch.export.export(Logits(lm), (text(2, 7),), dynamic_shapes=free)


@functools.cache
def named_program(name: str) -> tuple[LM, torch.export.ExportedProgram]:
    """A model and its program."""
    lm = model(name).eval()
    return lm, exported(lm)


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_an_exported_program_gives_the_same_logits_at_any_length(name):
    lm, program = named_program(name)
    assert not [node for node in program.graph.nodes if "minimodels" in str(node.target)]
    for tokens in (text(2, 7), text(1, 2), text(3, 70)):
        same(program.module()(tokens), lm(tokens)[0], 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_an_onnx_file_gives_the_same_logits_at_any_length(name):
    pytest.importorskip("onnxscript", reason="ONNX needs the extra `export`")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX needs the extra `export`")
    lm, program = named_program(name)
    graph = torch.onnx.export(program, dynamo=True, verbose=False)
    session = runtime.InferenceSession(graph.model_proto.SerializeToString())
    for tokens in (text(2, 7), text(1, 2), text(3, 70)):
        (logits,) = session.run(None, {"tokens": tokens.numpy()})
        same(torch.from_numpy(logits), lm(tokens)[0], 1e-4)


@pytest.mark.parametrize("option", ["window=5", "softcap=2.0", "sink=true"])
@torch.no_grad()
def test_attention_is_exported_at_any_length(option):
    lm = model(f"attention({option}) mlp").eval()
    program = exported(lm).module()
    for tokens in (text(1, 3), text(2, 5), text(2, 40)):
        same(program(tokens), lm(tokens)[0], 1e-5)


class Loss(nn.Module):
    """The loss alone, as torch.func.functional_call needs it."""

    def __init__(self, lm: LM):
        super().__init__()
        self.lm = lm

    def forward(self, tokens, targets):
        return self.lm.loss(tokens, targets)[0]


@pytest.mark.parametrize("name", [*SHORT, *NAMES] if NIGHTLY else NAMES)
def test_gradients_of_each_text_are_those_of_a_loop(name):
    lm, tokens, targets = model(name, dtype=torch.float64), text(3, 11), text(3, 12)[:, 1:]
    loss = Loss(lm)

    def of_one(parameters, tokens, targets):
        return functional_call(loss, parameters, (tokens[None], targets[None]))

    together = vmap(grad(of_one), (None, 0, 0))(dict(loss.named_parameters()), tokens, targets)
    for row in range(3):
        loss.zero_grad()
        loss(tokens[row : row + 1], targets[row : row + 1]).backward()
        for name, parameter in loss.named_parameters():
            alone = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            same(together[name][row], alone, 1e-10)


def test_counting_visits_is_refused_in_a_transformation():
    lm, tokens = model("moe", "moe.router=sigmoid_bias"), text(1, 5)
    loss = Loss(lm)

    def of(parameters):
        return functional_call(loss, parameters, (tokens, tokens))

    with pytest.raises(InputError, match="router: .*eval"):
        grad(of)(dict(loss.named_parameters()))
    lm.eval()
    assert grad(of)(dict(loss.named_parameters()))


def test_a_transformed_loss_is_the_loss():
    """Outside of a transformation the torch paths compute it, inside the references do."""
    lm, tokens = model("hybrid", dtype=torch.float64), text(2, 40)
    loss = Loss(lm)

    def of(parameters):
        return functional_call(loss, parameters, (tokens, tokens))

    _, value = torch.func.grad_and_value(of)(dict(loss.named_parameters()))
    same(value, loss(tokens, tokens), 1e-10)
