"""`--batch-size auto` finds what the memory holds, and a step stays what it is."""

import json
import sys

import pytest
import torch

import train
from minimodels import Config, InputError
from minimodels.training import fit

MEGABYTE = 2**20


def test_the_largest_divisor_that_fits_is_found():
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= 5

    assert fit.largest_batch(12, 1, fits) == 4
    assert tried == [12, 6, 4]
    assert fit.largest_batch(12, 2, fits) == 4
    with pytest.raises(InputError, match="the memory does not hold one sequence"):
        fit.largest_batch(12, 6, fits)
    with pytest.raises(InputError, match="a multiple of 5, the number of processes"):
        fit.largest_batch(12, 5, fits)


@pytest.mark.skipif(not fit.resource, reason="memory cannot be limited here")
def test_a_trial_has_only_the_memory_that_is_free(monkeypatch, capfd):
    monkeypatch.setattr(fit, "free_memory", lambda: 200 * MEGABYTE)

    def fill(rows: int) -> None:
        if rows == 3:
            raise ValueError("three")
        torch.ones(rows, 100 * MEGABYTE, dtype=torch.uint8)

    assert fit.fits_cpu(fill, 1)
    assert not fit.fits_cpu(fill, 9)
    with pytest.raises(RuntimeError, match="a trial with 3 sequences failed"):
        fit.fits_cpu(fill, 3)
    assert "ValueError: three" in capfd.readouterr().err


@pytest.mark.skipif(not fit.resource, reason="memory cannot be limited here")
def test_a_trial_trains_the_model(monkeypatch):
    """A context that the free memory holds, and one that it does not."""
    monkeypatch.setattr(fit, "free_memory", lambda: 200 * MEGABYTE)
    config = Config(layers="mlp", width=64, vocab=256)
    device, autocast = torch.device("cpu"), torch.autocast("cpu", enabled=False)
    for context, enough in ((16, True), (400_000, False)):
        assert fit.tries(config, device, autocast, context, again=False)(1) == enough


def test_auto_takes_the_same_steps_in_more_passes(tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(bytes(range(32, 127)) * 60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit, "tries", lambda *_: lambda rows: rows <= 2)
    common = "--layers attention --width 16 --context 16 --steps 2 --data text --eval-batches 1"
    for out, given in (("auto", ["auto"]), ("given", ["2", "--accumulate", "4"])):
        arguments = [*common.split(), "--log-every", "1", "--batch-size", *given, "--out", out]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        train.main(train.parse(""))
    options = json.loads((tmp_path / "auto/options.json").read_text())
    assert (options["batch_size"], options["accumulate"]) == (2, 4)
    logs = [(tmp_path / out / "log.jsonl").read_text().splitlines() for out in ("auto", "given")]
    auto, given = ([json.loads(line).get("loss") for line in log] for log in logs)
    assert auto == given
