"""What the kernels' files report when they are run as commands: providers left out, rows, and the tables made of them."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need the package triton")

from minimodels.kernels import common

from benchmarks import table
from benchmarks.plot import read
from minimodels import InputError
from minimodels.measure import interleave


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_provider_that_fails_or_is_wrong_is_left_out(direction, capsys):
    providers = {
        "first": lambda x: 2 * x, "same": lambda x: x + x, "wrong": lambda x: 3 * x, "failing": lambda x: x / None,
        "something else": lambda x: 7 * x,
    }  # fmt: skip
    inputs = lambda: (torch.ones(3, requires_grad=True),)  # noqa: E731
    timings, memory = common.time_providers(
        providers, {"something else"}, inputs, direction, rounds=2
    )
    assert list(timings) == list(memory) == ["first", "same", "something else"]
    said = capsys.readouterr().out
    assert (
        "wrong: left out, for it failed (AssertionError: result 0" in said
        and "failing: left out" in said
    )


def test_an_operation_reports_rows_that_table_reads(tmp_path, capsys, monkeypatch):
    def square(x, impl="triton"):
        return x * x

    inputs = lambda: (torch.ones(4, 8, **common.TIMED, requires_grad=True),)  # noqa: E731
    cases = [common.Case(label, inputs, forward=64, backward=96) for label in ("small", "large")]
    peers = {
        "same": common.Peer("torch", square, gpu=False),
        "absent": common.Peer("no-such-package", square),
    }
    monkeypatch.setattr(
        common, "interleave", lambda calls, **_: interleave(calls, rounds=2, seconds=0)
    )
    monkeypatch.setattr(common, "ceilings", lambda device: {"GB/s": 10.0, "TFLOP/s": 1.0})
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    out = tmp_path / "new" / "kernels.jsonl"
    for _ in range(2):  # the second time in the place of the first
        common.report("square", square, square, cases, peers, lambda: None)(
            common.Options(out=out, rounds=2)
        )
    rows = read(out)
    assert len(rows) == 2 * (3 + 4) and all(
        row["rate"] > 0 and len(row["seconds"]) == 2 for row in rows
    )
    assert {row["provider"] for row in rows} >= {"torch", "torch.compile", "same"}
    assert "absent: skipped, for no-such-package is not installed" in capsys.readouterr().out
    table.main(table.Options(results=(out,)))
    assert "| `square` backward | large |" in capsys.readouterr().out


def test_rows_of_an_operation_take_the_place_of_earlier_ones(tmp_path):
    path = tmp_path / "new" / "kernels.jsonl"
    common.forget(path, "attention")
    path.write_text('{"operation": "attention"}\n\n{"operation": "rmsnorm"}\n')
    common.forget(path, "attention")
    assert [row["operation"] for row in read(path)] == ["rmsnorm"]
    path.write_text("something else")
    with pytest.raises(InputError, match="rows of kernels"):
        common.forget(path, "attention")
    assert path.read_text() == "something else"
