"""Pictures of models: their counts are those of the ledger."""

import pytest

from minimodels import Config, InputError, ledger, preset
from minimodels.draw import BOX, GAP, Options, Row, costs, main, rows, shapes, short
from minimodels.ledger import size_text
from minimodels.lm import LM

TEXT = "local=attention(window=5) A:=attention(kv_heads=2) ((local mlp)*2 A mlp)*3 mod(attention moe, capacity=0.25)"


TWICE = "a=attention(window=5) A:=mlp (a A mamba)*2 a mod(a A, capacity=0.5) A"


@pytest.mark.parametrize("layers", [TEXT, TWICE, preset("hybrid").layers, preset("mod").layers])
def test_rows_add_up_to_the_ledger(layers):
    """What a text names once and uses in several rows is counted in each of them."""
    config, lines = Config(layers=layers, vocab=256, width=32), rows(layers)
    total, found = ledger(config, 64), costs(config, 64, lines)
    outer = outermost(lines)
    embedding, norm = 256 * 32, 32
    assert sum(found[number].parameters for number in outer) + embedding + norm == total.parameters
    assert sum(found[number].flops for number in outer) + 2 * embedding == pytest.approx(
        total.forward_flops
    )
    assert sum(found[number].state for number in outer) == total.state_bytes


def outermost(lines: list[Row]) -> set[int]:
    """The numbers of the rows that are not inside a wrapper."""
    found, inside = set(), 0
    for number, row in enumerate(lines):
        if row.kind == "close":
            inside -= row.call is not None
            continue
        if row.call is not None and not inside:
            found.add(number)
        inside += row.call is not None and row.kind == "open"
    return found


def test_repeats_stay_folded_and_shared_layers_say_so():
    lines = rows(TEXT)
    assert [row.times for row in lines if row.kind == "open"] == [3, 2, 1]
    assert [row.call.name for row in lines if row.kind == "layer"] == [
        "attention",
        "mlp",
        "attention",
        "mlp",
        "attention",
        "moe",
    ]
    (number,) = [number for number, row in enumerate(lines) if row.name]
    assert lines[number].name == "A"
    assert costs(Config(layers=TEXT, width=32), 64, lines)[number].uses == 3
    assert len(rows("(attention mlp)*48")) == 4


def test_shapes_are_those_of_the_matrices():
    (block,) = LM(Config(layers="attention(kv_heads=2)", width=32)).layers
    assert shapes(block) == "q, out 32×32; k, v 16×32"


@pytest.mark.parametrize(
    "count, text", [(384, "384"), (65_984, "66K"), (1_314_000, "1.31M"), (7.62e9, "7.62B")]
)
def test_numbers_have_three_digits(count, text):
    assert short(count) == text


@pytest.mark.parametrize("count, text", [(2**22, "4,096 KiB"), (2**31, "2,048 MiB")])
def test_sizes_have_thousands_separators(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize("given", [{"model": "mod"}, {"layers": TEXT}])
def test_the_command_writes_both_files(given, tmp_path):
    main(Options(**given, context=64, out=str(tmp_path / "picture")))
    first = (tmp_path / "picture.svg").read_bytes()
    assert b"</svg>" in first
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    main(Options(**given, context=64, out=str(tmp_path / "picture")))
    assert (tmp_path / "picture.svg").read_bytes() == first  # the same model gives the same file


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(
        InputError, match="layers: 'mlp' is not accepted; accepted: one of model, layers and config"
    ):
        Options(model="mod", layers="mlp")
    with pytest.raises(InputError, match="config: .*none.json"):
        main(Options(config=tmp_path / "none.json"))


def test_all_options_and_shapes_are_shown_and_no_text_leaves_its_box(tmp_path, monkeypatch):
    """The options begin at the same distance from every name."""
    from matplotlib.figure import Figure

    ends, shown, gaps = [], [], []

    def measure(figure, *given, **named):
        (axes,) = figure.axes
        to_inches = axes.transData.inverted()
        extents = {text: to_inches.transform(text.get_window_extent()) for text in axes.texts}
        small = [text for text in axes.texts if text.get_fontsize() == 7 and text.get_text()]
        names = [text for text in axes.texts if text.get_fontsize() == 10]
        ends.extend(extents[text][1, 0] for text in small)
        shown.append(" ".join(text.get_text() for text in small))
        gaps.extend(
            extents[text][0, 0] - extents[name][1, 0]
            for name in names
            for text in small
            if name.get_position()[1] == text.get_position()[1]
        )

    monkeypatch.setattr(Figure, "savefig", measure)
    options = "kv_heads=2, qk_norm=head, rope_scaling=yarn(factor=4, context=1024)"
    moe = "experts=16, experts_per_token=4"
    layers = f"(mamba2 mlp attention({options}) mod(moe({moe})))*2"
    main(Options(layers=layers, size="small", out=str(tmp_path / "long")))
    for text in (options, moe, "heads=24", "(numbers include the layers below)", "q, out 768×768"):
        assert text in shown[0]
    assert max(ends) < BOX
    assert len(gaps) == 8  # four layers with text beside their names, in two pictures
    assert all(abs(gap - GAP) < 0.05 for gap in gaps)
