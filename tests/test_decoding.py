"""A decoding step of fixed size, which a CUDA graph can record: it runs here without one."""

import contextlib
import importlib
from types import SimpleNamespace

import pytest
import torch
from models import CASES, WIDTH, same
from small import small
from torch.utils._pytree import tree_map

from minimodels import LM, Config, InputError, decoding, generate, preset
from minimodels.decoding import FixedStep, GrowingStep, fixed, tensors, waits
from minimodels.presets import PRESETS

generation = importlib.import_module("minimodels.generate")  # the package exports the function
TEXTS = [text for texts in CASES.values() for text in texts]
WAITING = [text for text in TEXTS if text.startswith(("moe", "mod", "learned_positions"))]


def model(config: Config) -> LM:
    torch.manual_seed(0)
    lm = LM(config).eval()
    for parameter in lm.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return lm.double()


def of(text: str) -> LM:
    return model(Config(layers=text, width=WIDTH, vocab=32))


@torch.inference_mode()
def prompted(lm: LM, lengths: tuple[int, ...]) -> list:
    """The state after one prompt of each length."""
    tokens = torch.randint(32, (len(lengths), max(lengths)))
    positions = torch.arange(max(lengths)).expand_as(tokens)
    positions = positions.masked_fill(positions >= torch.tensor(lengths)[:, None], -1)
    given = {} if len(set(lengths)) == 1 else {"positions": positions}
    return lm(tokens, **given)[1]


@torch.inference_mode()
def equals_the_ordinary_step(lm: LM, lengths: tuple[int, ...]) -> None:
    """For eight tokens, and no tensor of the state is replaced."""
    state = prompted(lm, lengths)
    step, ordinary = FixedStep(lm, state, len(lengths)), GrowingStep(lm, state)
    places = [part.data_ptr() for part in tensors(step.state)]
    for tokens in torch.randint(32, (8, len(lengths))):
        same(step(tokens), ordinary(tokens))
    assert places == [part.data_ptr() for part in tensors(step.state)]


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in WAITING])
@pytest.mark.parametrize("lengths", [(6,), (7, 2)], ids=["one prompt", "prompts of two lengths"])
def test_a_step_of_fixed_size_gives_the_logits_of_the_ordinary_one(text, lengths):
    equals_the_ordinary_step(of(text), lengths)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_steps_of_fixed_size_or_says_why_not(name):
    lm = model(preset(name, "tiny", *small(name), width=16, vocab=32))
    if any(word in lm.config.layers for word in ("moe(", "moe ", "mod(")):
        with pytest.raises(InputError, match="^model: .* moe counts|takes? the group"):
            FixedStep(lm, prompted(lm, (5,)), 1)
    else:
        equals_the_ordinary_step(lm, (5, 3))


@pytest.mark.parametrize("text", TEXTS)
def test_a_layer_says_whether_the_host_must_know_a_value(text, monkeypatch):
    """Tensors on the meta device have no values."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    lm = of(text)
    state = fixed(prompted(lm, (6, 3)), 2, torch.device("cpu"))
    state = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, state)
    token = torch.zeros(2, 1, dtype=torch.int64, device="meta")
    asked = contextlib.nullcontext()
    if waits(lm):
        asked = pytest.raises((RuntimeError, NotImplementedError), match="meta")
    with torch.inference_mode(), asked:
        lm.to("meta").features(token, state)


@pytest.mark.parametrize("text", ["attention(window=5)", "retention", "mamba(state_size=4)"])
@torch.inference_mode()
def test_a_full_state_moves_to_a_larger_one(text, monkeypatch):
    monkeypatch.setattr(decoding, "ROOM", 3)
    lm = of(text)
    state = prompted(lm, (7, 2))
    step, ordinary = FixedStep(lm, state, 2), GrowingStep(lm, state)
    for tokens in torch.randint(32, (8, 2)):
        same(step(tokens), ordinary(tokens))


class Recording(contextlib.AbstractContextManager):
    """A stand-in for torch.cuda.graph: what runs inside has no effect, as in a recording."""

    def __init__(self, graph, step: FixedStep, error: bool):
        self.step, self.error, graph.replay = step, error, step.run

    def __enter__(self):
        self.before = [part.clone() for part in tensors(self.step.state)]

    def __exit__(self, *raised):
        for part, before in zip(tensors(self.step.state), self.before, strict=True):
            part.copy_(before)
        if self.error:
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("error", [False, True], ids=["recorded", "not recorded"])
@torch.inference_mode()
def test_the_second_step_is_recorded_and_a_failure_is_a_warning(error, monkeypatch):
    lm = of("attention mamba(state_size=4)")
    state = prompted(lm, (5,))
    step, ordinary = FixedStep(lm, state, 1), GrowingStep(lm, state)
    step.records, graphs = True, []  # as on a GPU

    def graph() -> SimpleNamespace:
        graphs.append(SimpleNamespace())
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Recording(graph, step, error))
    tokens = torch.randint(32, (6, 1))
    same(step(tokens[0]), ordinary(tokens[0]))
    assert not graphs  # the first step compiles the kernels
    with pytest.warns(match="no CUDA graph: .* capturing") if error else contextlib.nullcontext():
        same(step(tokens[1]), ordinary(tokens[1]))
    for token in tokens[2:]:
        same(step(token), ordinary(token))
    assert len(graphs) == 1 and (step.graph is None) == error


def test_generate_takes_fixed_steps_on_a_gpu_where_nothing_waits(monkeypatch):
    """The text is the same."""
    taken = []

    class Noted(FixedStep):
        def __call__(self, tokens):
            taken.append(len(tokens))
            return super().__call__(tokens)

    monkeypatch.setattr(generation, "FixedStep", Noted)
    for text, steps in (("attention mamba(state_size=4)", 7), ("mod(mlp)", 0)):
        lm, texts = of(text), []
        for gpu in (False, True):
            monkeypatch.setattr(generation, "has_graphs", lambda device, gpu=gpu: gpu)
            texts.append(torch.stack(list(generate(lm, [[1, 2], [3]], 8, seed=0))))
        assert torch.equal(*texts) and taken == [2] * steps, text
        taken.clear()
