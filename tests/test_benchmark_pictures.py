"""Pictures: stable colours, readable numbers, names next to their lines, and answers that claim no
more than the data show."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import curves, drawing, plot, routing
from benchmarks.crossover import overtaking, sentence
from benchmarks.verdict import overlap, verdict
from minimodels import LM, Config
from minimodels.data.tasks import TASKS
from minimodels.data.text import open_data
from minimodels.data.tokenizer import Bytes
from minimodels.ops.linear_cross_entropy import IGNORE
from minimodels.presets import MAIN

pytest.importorskip("matplotlib")
RESULTS = Path(__file__).parent.parent / "benchmarks/results"
MEASURED = sorted(RESULTS.glob("*/claim-*.jsonl")) + sorted(RESULTS.glob("*/throughput*.jsonl"))


def figures_of(paths) -> dict:
    """Every picture of some results, by name."""
    rows = [row for path in paths for row in plot.read(path)]
    return {name: figure for picture in plot.PICTURES for name, figure in picture(rows)}


@pytest.fixture(autouse=True)
def closed():
    """Close all figures after each test."""
    yield
    drawing.pyplot().close("all")


def claim(values: dict[str, list[list[float]]], **more) -> list[dict]:
    """Rows of a claim, for each model and seed: y at x = 1, 2, and so on."""
    shared = {"benchmark": "claim", "claim": "c", "panel": "p", "question": "?", "file": "f"}
    shared |= {"x_label": "training steps", "y_label": "bits", "data": "stdlib", "x_log": False}
    return [
        {**shared, "model": model, "seed": seed, "x": x, "y": y, **more}
        for model, seeds in values.items()
        for seed, ys in enumerate(seeds)
        for x, y in enumerate(ys, 1)
    ]


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_nothing_is_cut_off_and_every_tick_can_be_read(path):
    for name, figure in figures_of([path]).items():
        figure.draw_without_rendering()
        (axes,) = figure.axes
        page = figure.get_window_extent()
        texts = [figure._suptitle, figure._supxlabel, *axes.texts]
        texts += [axes.xaxis.label, axes.yaxis.label]
        for text in texts:
            box = text.get_window_extent()
            assert box.x0 >= page.x0 and box.x1 <= page.x1, (name, text.get_text())
            assert box.y0 >= page.y0 and box.y1 <= page.y1, (name, text.get_text())
        shown = [
            tick.label1.get_text()
            for axis in (axes.xaxis, axes.yaxis)
            for tick in axis.get_major_ticks()
            if axis.get_view_interval()[0] <= tick.get_loc() <= axis.get_view_interval()[1]
        ]
        assert len(shown) >= 4
        assert all(re.fullmatch(r"\d{1,3}(,\d{3})*(\.\d+)?%?", text) for text in shown), shown
        assert not axes.xaxis.get_offset_text().get_text()  # such as 1e12
        assert not figure._supxlabel.get_text().startswith("-")
        assert figure._suptitle.get_text().count("\n") >= 1  # the question and an answer


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_names_cross_neither_lines_nor_each_other(path):
    for figure in figures_of([path]).values():
        figure.draw_without_rendering()
        (axes,) = figure.axes
        names = [text for text in axes.texts if not text.get_text().startswith("chance")]
        assert len(names) == sum(not x.get_label().startswith("_") for x in axes.get_lines())
        edge = axes.get_window_extent().x1
        boxes = [name.get_window_extent() for name in names]
        assert all(box.x0 > edge for box in boxes)
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)


def test_an_architecture_has_one_colour_in_all_pictures():
    found = {}
    for path in MEASURED:
        for figure in figures_of([path]).values():
            for drawn in figure.axes[0].get_lines():
                found.setdefault(drawn.get_label(), set()).add(drawn.get_color())
            drawing.pyplot().close(figure)
    for name in MAIN:
        assert found[name] == {drawing.COLOURS[name]}
    assert len({drawing.COLOURS[name] for name in MAIN}) == len(MAIN)
    assert found["attention"] == found["dense"] == found["transformer"]


def test_variants_share_the_colour_and_differ_in_style():
    names = ["mod, a", "mod, b", "mamba, triton", "train-moe", "odd", "other"]
    looks = drawing.looks(names)
    assert looks["mod, a"][0] == looks["mod, b"][0] == drawing.COLOURS["mod"]
    assert looks["mod, a"][1:] != looks["mod, b"][1:]
    assert looks["mamba, triton"][0] == drawing.COLOURS["mamba"]
    assert looks["train-moe"][0] == drawing.COLOURS["moe"]
    assert looks["odd"][0] != looks["other"][0]
    assert {looks[name][0] for name in ("odd", "other")} <= {*drawing.OTHERS}
    assert drawing.looks(["odd"])["odd"][0] == drawing.looks(["mamba", "odd"])["odd"][0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(256, "256"), (1024, "1,024"), (60.0, "60"), (0.25, "0.25"), (0, "0"), (-0.0, "0")],
)
def test_numbers_are_written_out(value, text):
    assert drawing.number(value) == text


def test_large_numbers_have_a_unit_in_words():
    assert drawing.amount(1.4912e12) == "1.49 trillion"
    assert drawing.amount(614_400) == "614,000" and drawing.amount(12.92) == "12.9"
    figure, axes = drawing.canvas("?", "", "")
    axes.plot([1e12, 3e12], [1, 2])
    drawing.scale_axis(axes, "x", "training FLOPs", [1e12, 3e12])
    figure.draw_without_rendering()
    assert axes.get_xlabel() == "training FLOPs, trillions"
    assert "1.5" in {tick.get_text() for tick in axes.get_xticklabels()}


def test_an_axis_of_whole_numbers_has_no_ticks_between_them():
    figure, axes = drawing.canvas("?", "", "")
    axes.plot([1, 2], [1, 2])
    drawing.scale_axis(axes, "x", "block", [1, 2])
    drawing.scale_axis(axes, "y", "bits", [1.0, 1.5])
    figure.draw_without_rendering()
    assert {tick.get_text() for tick in axes.get_xticklabels()} <= {"0", "1", "2", "3"}
    assert any("." in tick.get_text() for tick in axes.get_yticklabels())


def test_names_are_moved_apart_no_further_than_they_must():
    assert drawing.spread([50, 0, 100], 10, 200) == [50, 0, 100]
    assert drawing.spread([50, 50], 10, 200) == [45, 55]
    assert drawing.spread([48, 50, 56], 10, 200) == pytest.approx(
        [124 / 3 + k for k in (0, 10, 20)]
    )
    assert drawing.spread([99, 100], 10, 100) == [90, 100]


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_what_guessing_gets_right(name):
    sized = "vocab" in TASKS[name].__dataclass_fields__
    named = f"{name}(vocab=32)" if sized else name
    (targets,) = (targets for _, targets in open_data(named, 256).validation(4096, 1))
    answers = targets[targets != IGNORE].unique()
    assert plot.chance(named) == pytest.approx(1 / len(answers))
    assert plot.chance(named.replace("(", ":").replace(")", "")) == plot.chance(
        named
    )  # in older rows
    default = TASKS[name](256).vocab
    assert not sized or plot.chance(name) == plot.chance(f"{name}(vocab={default})")
    assert plot.chance("stdlib") is None


def test_accuracy_has_a_line_at_chance_and_percent():
    rows = claim({"mamba": [[0.5, 0.9]] * 2}, y_label="answers right", data="copying:vocab=8")
    ((_, figure),) = plot.claims(rows)
    (axes,) = figure.axes
    levels = [line.get_ydata()[0] for line in axes.get_lines() if line.get_label() == "_level"]
    assert levels == [pytest.approx(1 / 6)]
    assert "chance, 16.7%" in [text.get_text() for text in axes.texts]
    figure.draw_without_rendering()
    assert all(tick.get_text().endswith("%") for tick in axes.get_yticklabels())
    ((_, bits),) = plot.claims(claim({"mamba": [[0.5, 0.9]]}))
    assert not [line for line in bits.axes[0].get_lines() if line.get_label() == "_level"]


def test_no_winner_is_claimed_where_spreads_meet():
    apart = {"a": [1.0, 1.2], "b": [1.3, 1.4], "c": [2.0, 3.0]}
    said = verdict(apart, False, "at the end", "seed", False).replace("\xa0", " ")
    assert said == "a is ahead at the end: a 1.10; b 1.35; c 2.50"
    assert verdict(apart, True, "here", "seed", False).startswith("c is ahead here")
    meeting = {**apart, "b": [1.1, 1.6]}
    said = verdict(meeting, False, "at the end", "seed", False).replace("\xa0", " ")
    assert said.startswith("No winner at the end, because the spreads of a and b overlap: a 1.10")
    alone = verdict({"a": [1.0], "b": [0.98]}, True, "here", "seed", True)
    assert alone.startswith("No winner can be told here with one seed each")
    assert "100.0%" in alone and "98.0%" in alone
    assert overlap([1, 2], [2, 3]) and not overlap([1, 2], [2.1, 3])


def test_lines_are_compared_where_all_of_them_are():
    rows = claim({"a": [[4.0, 3.0, 2.0], [4.0, 3.1, 2.0]], "b": [[3.0, 2.5], [3.0, 2.4]]})
    assert (
        plot.ends(rows).replace("\xa0", " ") == "b is ahead after 2 training steps: b 2.45; a 3.05"
    )
    even = claim({"a": [[4.0, 3.0], [4.0, 3.0]], "b": [[3.0, 3.5], [3.0, 3.5]]})
    assert plot.ends(even).startswith("a is ahead at the end")
    lengths = claim({"a": [[4.0, 3.0]], "b": [[3.0]]}, x_log=True, x_label="bytes")
    assert plot.ends(lengths).replace("\xa0", " ") == "a 3.00 at 2; b 3.00 at 1 bytes"
    slow = [{**row, "x": row["x"] + 10.5} if row["model"] == "b" else row for row in rows]
    told = plot.ends(slow).replace("\xa0", " ")  # b was not probed before a had ended
    assert told == "a 2.00 at 3; b 2.45 at 12.5 training steps"
    assert plot.at([(1, 0, [4.0]), (3, 0, [2.0])], 2) == [3.0]
    slow = [{**row, "x": row["x"] + 10.5} if row["model"] == "b" else row for row in rows]
    told = plot.ends(slow).replace("\xa0", " ")  # b was not probed before a had ended
    assert told == "a 2.00 at 3; b 2.45 at 12.5 training steps"
    assert plot.at([(1, 0, [4.0]), (3, 0, [2.0])], 9) == [2.0]


def test_a_crossover_says_when_spreads_meet_at_the_end():
    row = {"benchmark": "throughput", "file": "f", "mode": "train", "batch": 1, "tokens": 1}
    seconds = {256: ([1.0, 1.1], [2.0, 2.1]), 512: ([2.0, 2.2], [2.1, 2.3])}
    rows = [
        {**row, "model": model, "context": context, "seconds": both[i]}
        for context, both in seconds.items()
        for i, model in enumerate(("mamba", "transformer"))
    ]
    told = plot.overtaken(rows).replace("\xa0", " ")
    assert told.endswith("mamba everywhere from 256 to 512 (too close to tell at 512)")
    rows[-1]["seconds"] = [2.5, 2.6]
    assert "too close" not in plot.overtaken(rows)
    noise = {**rows[-1], "model": "transformer again", "seconds": [2.1, 2.6]}  # the same model
    assert "too close" in sentence(overtaking([*rows, noise]))
    quick = {
        **rows[-1],
        "model": "transformer compiled",
        "base": "transformer",
        "seconds": [1.1, 1.2],
    }
    assert "too close" not in sentence(overtaking([*rows, quick, noise]))  # of another path
    once = [{**row, "seconds": row["seconds"][:1]} for row in rows]
    assert "timed once" in plot.overtaken(once)


def test_a_model_is_shown_at_its_best_rate():
    def rows(rate, *ends, label="answers right"):
        row = {"model": "a", "lr": rate, "y_label": label}
        return [{**row, "seed": s, "x": x, "y": x * y} for s, y in enumerate(ends) for x in (0, 1)]

    low, high = rows(0.1, 0.9, 0.1), rows(0.2, 0.6, 0.6)
    assert plot.at_best_rate(low + high) == high
    low, high = (rows(rate, *y, label="bits") for rate, y in ((0.1, (2, 2)), (0.2, (1, 4))))
    assert plot.at_best_rate(low + high) == low
    assert plot.at_best_rate(low + rows(0.3, 0.1, label="bits")) == low  # tried by one seed only
    old = [{key: value for key, value in row.items() if key != "lr"} for row in low]
    assert plot.at_best_rate(old) == old


def test_several_files_are_told_apart_by_words():
    row = {"device": "cpu", "torch": "2", "commit": "a"}
    assert drawing.sources([{**row, "file": "one"}]) == "cpu, torch 2, commit a"
    two = drawing.sources([{**row, "file": "one"}, {**row, "file": "two", "commit": "b"}])
    assert two == "solid: cpu, torch 2, commit a\ndashed: cpu, torch 2, commit b"


@pytest.mark.parametrize("ends", [(900, 1300), (900, 5000), (900, 500_000)])
def test_a_logarithmic_axis_has_several_ticks(ends):
    _, axes = drawing.canvas("How many?", "", "")
    axes.plot([1, 2], ends)
    drawing.scale_axis(axes, "y", "tokens", list(ends), log=True)
    low, high = axes.get_ylim()
    assert 3 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 10


def test_runs_that_were_not_scored_at_the_same_place_are_not_compared():
    runs = {"a": ([1, 2], [5, 4]), "b": ([3, 6], [4, 2]), "c": ([2, 6], [4, 3])}
    logs = {name: (validation, validation) for name, validation in runs.items()}
    assert curves.answer(logs, "steps").replace("\xa0", " ") == (
        "There is no place at which all runs were scored, in steps: a 4.00 after 2; b 2.00 after 6; "
        "c 3.00 after 6"
    )
    del logs["a"]
    assert curves.answer(logs, "steps").replace("\xa0", " ").endswith("b 2.00; c 3.00")


def test_curves_have_an_answer_and_a_caption(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(curves, "save", lambda figure, path: kept.append(figure) or [])
    for name, losses in {"mamba": (2.0, 1.0), "cost$moe": (2.0, 1.5)}.items():
        rows = [{"step": i, "tokens": 10 * i, "loss": loss} for i, loss in enumerate(losses, 1)]
        rows += [{"step": i, "tokens": 10 * i, "validation_loss": loss} for i, loss in enumerate(losses, 1)]  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / name / "options.json").write_text(json.dumps({"data": f"{name}.txt"}))
    curves.main(
        curves.Options(runs=(tmp_path / "mamba", tmp_path / "cost$moe"), out=tmp_path / "x")
    )
    (figure,) = kept
    title = figure._suptitle.get_text().replace("\xa0", " ").replace("\n", " ")
    assert title.startswith("Which run learns fastest, counted in training tokens?")
    assert "after 20 training tokens with one run each: mamba 1.44; cost\\$moe 2.16" in title
    caption = figure._supxlabel.get_text().replace("\n", " ")
    assert "Different data: mamba mamba.txt, cost\\$moe cost\\$moe.txt" in caption
    assert "thin: training" in caption and "Reached, in training tokens: all 20" in caption
    colours = [line.get_color() for line in figure.axes[0].get_lines()]
    assert colours == [drawing.COLOURS["mamba"]] * 2 + [drawing.COLOURS["moe"]] * 2


def test_routing_has_a_legend_and_says_how_many(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = LM(Config(layers="mod(attention moe) moe", width=16, vocab=256)).eval()
    monkeypatch.setattr(routing, "load_model", lambda run: model)
    page = tmp_path / "page.html"
    routing.main(routing.Options(tmp_path, "some text", html=page, route="topk"))
    shown, layers = (
        capsys.readouterr().out,
        routing.trace(model, Bytes().encode("some text"), "topk"),
    )
    legend = routing.legend(layers)
    assert next(iter(legend)) == "took the group" and len(legend) >= 2
    for name, mark in legend.items():
        assert routing.paint(f" {name} ", mark) in shown
        assert f'<span style="background:{mark}">{name}</span>' in page.read_text()
    taken = sum(choice is not None for choice in layers["mod layers.0"])
    for text in (shown, page.read_text()):
        assert f"mod layers.0, {taken} of 9 tokens" in text
        assert "moe layers.1.layer, 9 of 9 tokens" in text


def test_a_group_that_took_no_token_says_so(monkeypatch, capsys, tmp_path):
    model = LM(Config(layers="mod(attention moe)", width=16, vocab=256)).eval()
    for parameter in model.layers[0].predictor.parameters():
        torch.nn.init.constant_(parameter, -5.0 if parameter.ndim == 1 else 0.0)
    monkeypatch.setattr(routing, "load_model", lambda run: model)
    routing.main(routing.Options(tmp_path, "some text"))
    shown = capsys.readouterr().out
    assert "mod layers.0, 0 of 9 tokens" in shown
    assert "moe layers.0.group.1.layer, 0 of 9 tokens" in shown


def test_experts_that_share_a_colour_share_a_place_in_the_legend():
    assert routing.legend({"moe": [2, 12, None, 3]}) == {
        "expert 2, 12": routing.COLOURS[2],
        "expert 3": routing.COLOURS[3],
    }
    assert routing.colour(12) == routing.colour(2) and routing.colour(None) is None
    assert len({*routing.COLOURS, routing.TAKEN_COLOUR}) == 11


def test_the_points_of_a_line_may_come_in_any_order():
    rows = claim({"a": [[7.0, 6.0, 5.0]]})
    ordered = plot.curve(rows)
    assert [place for place, *_ in ordered] == [1, 2, 3]
    assert plot.curve(rows[::-1]) == ordered


def test_a_single_point_shows_the_spread_of_its_seeds():
    (figure,) = (figure for _, figure in plot.claims(claim({"a": [[4.0], [6.0], [7.0]]})))
    (bar,) = (each for each in figure.axes[0].collections if hasattr(each, "get_segments"))
    assert [[list(end) for end in segment] for segment in bar.get_segments()] == [[[1, 4], [1, 7]]]


def test_operations_are_marked_at_their_share():
    row = {"benchmark": "kernels", "operation": "scan", "direction": "forward", "ceiling": 10.0}
    row |= {"file": "f", "unit": "GB/s"}
    timed = {"torch": (2.0, [4.0, 5.0]), "triton": (8.0, [1.0, 1.2]), "peer": (5.0, [2.0])}
    rows = [
        {**row, "case": case, "provider": name, "rate": rate, "seconds": seconds}
        for case in ("small", "large")
        for name, (rate, seconds) in timed.items()
    ]
    rows.append({**row, "case": "failed", "provider": "triton", "status": "wrong"})
    ((name, figure),) = plot.PICTURES[0](rows)
    (axes,) = figure.axes
    marks = {each.get_label(): each.get_offsets().tolist() for each in axes.collections}
    assert marks == {
        "triton": [[0.8, 0], [0.8, 1]],
        "torch": [[0.2, 0], [0.2, 1]],
        "peer": [[0.5, 0], [0.5, 1]],
    }
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert labels == ["scan forward, large", "scan forward, small"] and name == "operations"
    assert (
        "triton is faster than torch in 2 of 2 cases, slower in 0." in figure._suptitle.get_text()
    )
    rows[1]["seconds"], rows[4]["seconds"] = [4.5, 4.6], [6.0, 7.0]
    ((_, figure),) = plot.PICTURES[0](rows)
    said = figure._suptitle.get_text()
    assert "in 0 of 2 cases, slower in 1; in 1 the spreads overlap." in said
    assert not list(plot.PICTURES[0]([{"benchmark": "claim"}]))


def test_the_picture_of_operations_is_not_cut_off():
    (figure,) = figures_of([RESULTS / "cpu/kernels.jsonl"]).values()
    figure.draw_without_rendering()
    (axes,), page = figure.axes, figure.get_window_extent()
    boxes = [tick.get_window_extent() for tick in axes.get_yticklabels()]
    boxes += [text.get_window_extent() for text in axes.get_legend().get_texts()]
    assert all(box.x0 >= page.x0 and box.x1 <= page.x1 for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes[:5]))
