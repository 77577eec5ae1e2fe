"""The reports of the kernels' files when they run as commands: providers that are
left out, rows, and tables."""

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
        "wrong: left out, because it failed (AssertionError: result 0" in said
        and "failing: left out" in said
    )


def test_an_error_in_every_number_is_noticed_though_it_is_small_beside_the_largest():
    wanted = torch.cat((torch.full((1,), 10.0), torch.ones(999)))
    common.agree([wanted * 1.0001], [wanted])
    with pytest.raises(AssertionError, match="result 0 is off"):
        common.agree([wanted + 0.04], [wanted])
    with pytest.raises(AssertionError, match="result 0 is off by nan"):
        common.agree([wanted * float("nan")], [wanted])


def square(x, impl="triton"):
    return x * x


def small_inputs() -> tuple:
    return (torch.ones(4, 8, **common.TIMED, requires_grad=True),)


@pytest.fixture
def quick(monkeypatch):
    """Nothing is measured for long, and nothing is compiled."""
    monkeypatch.setattr(
        common, "interleave", lambda calls, **_: interleave(calls, rounds=2, seconds=0)
    )
    monkeypatch.setattr(common, "ceilings", lambda device: {"GB/s": 10.0, "TFLOP/s": 1.0})
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)


def rows_of(tmp_path, kernel, check=lambda: None) -> list[dict]:
    """The report on a square, with a peer that is right."""
    out = tmp_path / "kernels.jsonl"
    case = common.Case("small", small_inputs, forward=64, backward=96)
    peers = {"peer": common.Peer("torch", square, gpu=False)}
    report = common.report("square", kernel, square, [case], peers, check)
    report(common.Options(out=out, rounds=2))
    return read(out)


def test_a_wrong_kernel_is_left_out_and_what_is_right_stays(tmp_path, quick, monkeypatch):
    """On a GPU the kernel is timed too. Results are right if they are those of the torch path,
    not those of the kernel."""
    monkeypatch.setattr(common, "GPU", True)
    timed = {row["provider"] for row in rows_of(tmp_path, lambda x: 1.02 * x * x)}
    assert timed == {"torch", "torch.compile", "peer"}
    timed = {row["provider"] for row in rows_of(tmp_path, square)}
    assert timed == {"torch", "torch.compile", "peer", "triton"}


def test_a_check_that_fails_costs_the_kernel_alone(tmp_path, quick, monkeypatch, capsys):
    def check():
        raise AssertionError("result 3 of 4: off\nand more")

    monkeypatch.setattr(common, "GPU", True)
    timed = {row["provider"] for row in rows_of(tmp_path, square, check)}
    assert timed == {"torch", "torch.compile", "peer"}
    assert (
        "square: the kernel fails its check and is left out: AssertionError: result 3 of 4: off\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("error, status", [(None, 0), (AssertionError("off"), 1), (OSError(), 1)])
def test_a_check_alone_ends_with_a_status_and_its_reason(error, status, capsys):
    def check():
        if error:
            raise error

    report = common.report("square", square, square, [], {}, check)
    with pytest.raises(SystemExit) as ended:
        report(common.Options(check_only=True))
    assert ended.value.code == status
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("square: ") and (not error or f"{type(error).__name__}: {error}" in last)


class Tuner:
    """The part of Triton's autotuner that is used here."""

    def __init__(self, candidates):
        self.candidates, self.configs, self.base_fn = candidates, candidates[:1], square


def test_every_configuration_is_compared(monkeypatch):
    first, second = Tuner(["a", "b", "c"]), Tuner(["x", "y"])
    met = []

    def kernel(x):
        met.append((first.configs[0], second.configs[0], len(x), x.dtype))
        return (1.5 if second.configs == ["y"] and wrong else 1) * x

    arguments = [(torch.ones(3),)], [(torch.ones(8),)]
    wrong = False
    common.compare_all((first, second), kernel, lambda x: x, *arguments)
    _, *others = common.CHECKED
    assert met == [
        *(("a", "x", size, dtype) for size in (3, 8) for dtype in common.CHECKED),
        *(("b", "y", 8, dtype) for dtype in others),
        *(("c", "y", 8, dtype) for dtype in others),
    ]
    assert first.configs == ["a"] and second.configs == ["x"]
    wrong = True
    with pytest.raises(AssertionError, match="off by .* square b; square y"):
        common.compare_all((first, second), kernel, lambda x: x, *arguments)


def test_tuning_goes_by_the_number_of_rows():
    """Otherwise, blocks that suit one row would be used for thousands of rows."""
    from minimodels.kernels import attention, causal_conv1d, grouped_mlp

    tuners = [
        tuner
        for module in (attention, causal_conv1d, grouped_mlp)
        for tuner in vars(module).values()
        if hasattr(tuner, "candidates")
    ]
    assert len(tuners) == 3 + 2 + 4 and all("size" in tuner.keys for tuner in tuners)
    sizes = [common.size_of(rows) for rows in (1, 3, 600, 4096, 100_000)]
    assert sizes == [1, 4, 1024, 4096, 4096]


def test_an_operation_reports_rows_that_table_reads(tmp_path, capsys, quick):
    cases = [
        common.Case(label, small_inputs, forward=64, backward=96) for label in ("small", "large")
    ]
    peers = {
        "same": common.Peer("torch", square, gpu=False),
        "absent": common.Peer("no-such-package", square),
    }
    out = tmp_path / "new" / "kernels.jsonl"
    for _ in range(2):  # the second replaces the first
        common.report("square", square, square, cases, peers, lambda: None)(
            common.Options(out=out, rounds=2)
        )
    rows = read(out)
    assert len(rows) == 2 * (3 + 4) and all(
        row["rate"] > 0 and len(row["seconds"]) == 2 for row in rows
    )
    assert {row["provider"] for row in rows} >= {"torch", "torch.compile", "same"}
    assert "absent: skipped, because no-such-package is not installed" in capsys.readouterr().out
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
