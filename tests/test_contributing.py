"""Runs the worked example of CONTRIBUTING.md and the Python code of README.md unchanged."""

import re
import sys
import types
from pathlib import Path

import pytest
import test_laws as laws
import torch
from models import make, same

from minimodels import LM, ledger
from minimodels.architectures import registry
from minimodels.architectures.__main__ import describe_layer, list_layers
from minimodels.config import Config

ROOT = Path(__file__).parents[1]
TEXTS = ["gated_recurrence", "gated_recurrence(bias=false)", "mod(gated_recurrence, capacity=0.75)"]
LAWS = [
    laws.test_chunking,
    laws.test_causality,
    laws.test_batch_independence,
    laws.test_no_document_sees_another,
    laws.test_packed_documents_in_pieces,
]


def blocks(file: str) -> list[str]:
    """The Python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


@pytest.fixture
def example(monkeypatch) -> types.ModuleType:
    """The example as a module, registered by its one line."""
    (code,) = blocks("CONTRIBUTING.md")
    module = types.ModuleType("gated_recurrence")
    monkeypatch.setitem(sys.modules, "gated_recurrence", module)
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    monkeypatch.setitem(registry.LAYERS, "gated_recurrence", module.GatedRecurrence)
    return module


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
@pytest.mark.parametrize("layers", TEXTS)
def test_the_example_obeys_the_laws(law, layers, example):
    law(layers)


@pytest.mark.parametrize("layers", TEXTS)
def test_the_example_is_packed_counted_and_equal_on_its_paths(layers, example):
    for training in (False, True):
        laws.test_packing(layers, training)
        laws.test_reference_equals_torch(layers, training)
    for context in (20, 160):
        laws.test_ledger_equals_measurement(layers, context)


def test_the_example_compiles_and_trains(example):
    laws.test_compiles_to_one_graph("gated_recurrence")
    laws.test_overfits_one_batch("gated_recurrence mlp")


def test_the_example_is_the_recurrence_of_its_reference(example):
    layer = make("gated_recurrence")[0].layer
    x = laws.text()
    keep = layer.gate(x).sigmoid()
    expected = example.reference(keep, (1 - keep) * layer.value(x), torch.zeros_like(x[:, 0]))
    same(layer(x)[0], layer.out(expected))


def test_the_example_is_listed_described_and_counted(example):
    assert "gated_recurrence" in list_layers()
    assert "a bias in the gate" in describe_layer("gated_recurrence")
    config = Config(layers="(gated_recurrence mlp)*2", width=16, vocab=256)
    assert ledger(config, 64).parameters == sum(p.numel() for p in LM(config).parameters())


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (code,) = blocks("README.md")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for _ in range(2):  # a notebook is run again
        exec(compile(code, "README.md", "exec"), {})
    assert "mamba(state_size=8)" in capsys.readouterr().out
    assert len(list(filter(None, code.splitlines()))) <= 10
