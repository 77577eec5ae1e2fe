"""The command lines: help that names its arguments, and one line for whatever is wrong."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from benchmarks import claims, curves, plot, positions, state
from minimodels import LM, Config, InputError, draw, preset
from minimodels import sample as sampling
from minimodels.architectures import __main__ as architectures
from minimodels.command import parse_options, program
from minimodels.data.text import open_data
from minimodels.data.tokenizer import open_tokenizer
from minimodels.grammar import set_options
from minimodels.ledger import __main__ as ledgers
from minimodels.published import __main__ as published
from minimodels.published.pretrained import locate
from minimodels.training import log, options

COMMANDS = {  # module -> its positional arguments in the usage
    sampling: "MODEL",
    published: "RUN FOLDER",
    architectures: "[NAME]",
    claims: "CLAIM",
    state: "CLAIM",
    curves: "[RUNS]",
    positions: "[RUNS]",
}


def help_of(module, capsys) -> str:
    with pytest.raises(SystemExit):
        parse_options(module.Options, module.__doc__, arguments=["--help"])
    return capsys.readouterr().out


@dataclass
class Ragged:
    kind: str = "a"
    """one two
    three (four five),
    6 seven"""


def test_help_is_not_broken_where_the_docstring_is(capsys):
    with pytest.raises(SystemExit):
        parse_options(Ragged, "", arguments=["--help"])
    assert "one two three (four five), 6 seven (default: a)" in capsys.readouterr().out


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_help_names_the_program_and_its_arguments(module, capsys, monkeypatch):
    spec = type("Spec", (), {"name": module.__name__})
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec, raising=False)
    usage, *lines = help_of(module, capsys).splitlines()
    name = module.__name__.removesuffix(".__main__")
    assert usage.startswith(f"usage: python -m {name} ")
    assert COMMANDS[module] in usage
    assert "STR" not in usage.split()
    examples = [line for line in module.__doc__.splitlines() if "python -m" in line[:20]]
    assert examples
    assert {line.strip() for line in examples} <= {line.strip() for line in lines}


def test_the_program_is_named_as_it_was_started(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])
    assert program() == "python train.py"


def test_help_lists_the_choices_of_its_own_program(capsys):
    for module, known in ((claims, claims.CLAIMS), (state, state.STATE)):
        listed = re.search(r"CLAIM +│? *([\w, \n│]+)\(required\)", help_of(module, capsys))[1]
        assert set(re.findall(r"\w+", listed)) - {"or"} == set(known)
        with pytest.raises(InputError, match=f"claim: 'nope' .*{', '.join(known)}"):
            module.main(module.Options("nope"))


@pytest.mark.parametrize(
    "module, arguments, message",
    [
        (published, [], "run: '' is not accepted; accepted: folder of a training run"),
        (published, ["run"], "folder: '' is not accepted; accepted: folder to write, new or"),
        (published, ["run", "folder", "more"], "argument: 'more' is not accepted; accepted: opt"),
        (sampling, ["--promt", "x", "run"], "option: '--promt' is not accepted; accepted: did you"),
        (sampling, ["run", "--tokens"], "tokens: '' is not accepted; accepted: a whole number"),
        (sampling, ["run", "--min-p"], "min_p: '' is not accepted; accepted: a fraction"),
    ],
)
def test_a_missing_or_surplus_argument_is_one_line(module, arguments, message):
    with pytest.raises(InputError) as error:
        parse_options(module.Options, "", arguments=arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_an_empty_stop_is_shown_as_typed():
    with pytest.raises(InputError, match="^stop: '' is not accepted; accepted: texts of at least"):
        parse_options(sampling.Options, "", arguments=["run", "--stop", "a", ""])


def test_unknown_names_suggest_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name, meant in (("copyin", "copying"), ("mqr(pairs=2)", "mqar"), ("stdlb", "stdlib")):
        with pytest.raises(InputError, match=f"accepted: did you mean {meant}\\? stdlib, a file"):
            open_data(name, 64)
    with pytest.raises(InputError, match="accepted: stdlib, a file"):
        open_data("prose.txt", 64)
    with pytest.raises(InputError, match=r"did you mean bpe\? bytes, bpe\(vocab=8192\) or"):
        open_tokenizer("bep(vocab=300)")
    with pytest.raises(InputError, match=r"layers: 'lcoal' .* did you mean local\? local, atten"):
        LM(Config(layers="local=attention(window=64) (lcoal mlp)*2"))
    with pytest.raises(InputError, match=r"claim: 'induct' .* did you mean induction\?"):
        claims.main(claims.Options("induct"))
    with pytest.raises(InputError, match=r"model: 'MAMBA' .* did you mean mamba\?"):
        preset("MAMBA")
    for name in ("nope", "runs/nope", "a/b/c"):  # none is looked up on the hub
        with pytest.raises(
            InputError, match="a folder with config.json .* or OWNER/NAME on the hub"
        ):
            locate(name)


def test_what_is_wrong_with_layers_is_said_where_they_are_named():
    """And `preset` checks options before a model is built."""
    with pytest.raises(InputError, match="ledger lists the presets"):
        architectures.main(architectures.Options("transformer"))
    with pytest.raises(InputError, match=r"'foo' .* conv_bias, .*, residual"):
        preset("mamba", "tiny", "mamba.foo=3")
    with pytest.raises(InputError, match=r"'head' .* did you mean heads\? .*, residual"):
        preset("transformer", layers="mod(attention(head=8))")
    with pytest.raises(InputError, match=r"layers in its parentheses, such as mod\(mlp\)"):
        preset("transformer", layers="mod")


def test_pictures_make_their_folder_and_missing_rows_are_named(tmp_path):
    draw.main(draw.Options(layers="mlp", out=str(tmp_path / "new" / "mlp")))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"mlp.svg", "mlp.png"}
    with pytest.raises(InputError, match=r"rows \(No such file or directory\)"):
        plot.read(tmp_path / "nope")


def test_runs_that_do_not_exist_are_named_as_such(tmp_path):
    for module in (curves, positions):
        given = module.Options((tmp_path / "nope",), out=tmp_path / "rows.jsonl")
        with pytest.raises(InputError, match="runs: '.*nope' .* the folder of a training run"):
            module.main(given)


def test_a_text_that_is_too_short_for_the_positions_mentions_the_option(tmp_path):
    (tmp_path / "text").write_text("abc" * 100)
    (tmp_path / "run").mkdir()
    given = {"data": str(tmp_path / "text"), "context": 64, "seed": 0}
    (tmp_path / "run" / "options.json").write_text(json.dumps(given))
    with pytest.raises(InputError, match=r"context \+ 1 = 257 bytes; --longest sets .* here 256"):
        positions.main(positions.Options((tmp_path / "run",), out=tmp_path / "rows.jsonl"))


def test_a_setting_of_a_definition_of_a_definition_names_what_can_be_set():
    text = "a=attention(heads=2) b=a c=(a b)*2 b c"
    assert set_options(text, ["a.heads=1"]).startswith("a=attention(heads=1) b=a")
    with pytest.raises(InputError, match=r"'b.heads=1' .* a.heads, because b=a"):
        set_options(text, ["b.heads=1"])
    with pytest.raises(InputError, match=r"'c.heads=1' .* a.heads or b.heads, because c=\(a b"):
        set_options(text, ["c.heads=1"])


def test_the_ledger_counts_one_model_and_prints_nothing_before_an_error(capsys):
    ledgers.main(ledgers.Options(model="mamba", context=64))
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[0] == "parameters"
    assert row.startswith("mamba ")
    for wrong in ({"model": "mamb"}, {"layers": "lstm"}):
        with pytest.raises(InputError):
            ledgers.main(ledgers.Options(**wrong))
    with pytest.raises(InputError, match="layers: 'mlp' .* the model moe is given"):
        ledgers.Options(model="moe", layers="mlp")
    assert capsys.readouterr().out == ""


def test_scores_of_a_step_are_in_the_log_once(tmp_path):
    """A finished run that is resumed measures its last step again."""
    log.write_log(tmp_path, {"step": 2, "loss": 4.0})
    log.write_scores(tmp_path, {"step": 1, "validation_loss": 3.0})
    log.write_scores(tmp_path, {"step": 2, "validation_loss": 2.0})
    log.write_scores(tmp_path, {"step": 2, "validation_loss": 1.0})
    rows = [json.loads(line) for line in (tmp_path / log.FILE).read_text().splitlines()]
    assert [(row["step"], row.get("validation_loss")) for row in rows] == [
        (2, None),
        (1, 3.0),
        (2, 1.0),
    ]


WRONG = {  # type of a field -> values that it never accepts
    bool: ["maybe", "0"],
    int: ["abc", "-1", "1.5", "nan", ""],
    float: ["abc", "-1", "nan", "inf", ""],
    Literal: ["nope", ""],
}


def wrong_values() -> Iterator[tuple[str, str]]:
    """Options of train.py with values of the wrong type, or out of range."""
    for kind in (options.Options, Config):
        for name, hint in get_type_hints(kind).items():
            parts = [each for each in (get_args(hint) or (hint,)) if each is not type(None)]
            base = Literal if get_origin(hint) is Literal else parts[0]
            for value in WRONG.get(base, ()):
                yield name, value


def test_a_value_of_the_wrong_kind_is_one_line_that_names_its_option(monkeypatch):
    for name, value in wrong_values():
        monkeypatch.setattr(sys, "argv", ["train.py", f"--{name.replace('_', '-')}", value])
        with pytest.raises(InputError) as error:
            options.parse("")
        assert error.value.field == name
        assert value in str(error.value)
        assert "\n" not in str(error.value)
