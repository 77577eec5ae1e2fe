"""The claims about states: their models and tasks exist, and their records of a
trained model are right."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.state import MULTIPLES, STATE, by_position
from minimodels import LM
from minimodels.data.text import open_data


@pytest.mark.parametrize("small", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", STATE)
def test_models_and_tasks_exist(name, small):
    claim = STATE[name](small)
    for run in claim.runs:
        data = open_data(run.data, run.context)
        tokens, targets = data.batch(0, 0, 2)
        assert tokens.shape == targets.shape == (2, run.context)
        with torch.device("meta"):
            LM(run.config)
    drawn = {(run.config.layers, run.data, run.lr) for run in claim.runs}
    assert len(drawn) == len(claim.runs)


def test_accuracy_by_position():
    """The model here is right up to some position, and wrong after it."""
    context = 16
    run = SimpleNamespace(data="parity", context=context)

    class Parity:
        train = eval = lambda self: self

        def __call__(self, tokens):
            right = tokens.cumsum(1) % 2
            right[:, 40:] = 1 - right[:, 40:]
            return F.one_hot(right, 2).float(), None

    rows = list(by_position(Parity(), run, torch.device("cpu")))
    assert [row["parity_length"] for row in rows] == [context * each for each in MULTIPLES]
    shares = [row["parity_right"] for row in rows]
    assert shares == pytest.approx([1.0, 1.0, 8 / 32, 0.0])  # from half of each length on


def test_keys_are_overwritten_as_often_as_said():
    """A text has a key's values, one of them the last, and asks for each of four keys once."""
    claim = STATE["overwrite"](True)
    run, contexts = claim.runs[-1], []

    class Model(LM):
        def forward(self, tokens, **given):
            contexts.append(tokens.shape[1])
            return super().forward(tokens, **given)

    rows = list(claim.at_end(Model(run.config), run, torch.device("cpu")))
    lengths = list(dict.fromkeys(contexts))
    assert [(length - 4) / 8 - 1 for length in lengths] == [row["overwritten"] for row in rows]
    assert all(one < other for one, other in pairwise(lengths))
    assert run.context in lengths


def test_mixers_that_should_decay_do():
    """The decay of Lightning depends on the layer's place, and is almost none in the last layer."""
    for name, decays in {"linear_attention": False, "retnet": True, "lightning": True}.items():
        (run,) = (run for run in STATE["overwrite"](True).runs if run.model == name)
        mixer = LM(run.config).layers[-1].layer
        log_decay = mixer.log_decay(torch.zeros(1, 1, run.config.width))
        assert (log_decay.exp().min().item() < 0.98) == decays, name
