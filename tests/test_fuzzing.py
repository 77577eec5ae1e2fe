"""Random inputs: command lines, damaged runs, layers, config.json and data files. Each trains,
loads, or is refused by one InputError, within a minute, without a pickle and without the network.

`pytest -m nightly` draws 10,000 of them; MINIMODELS_FUZZED=300 draws 300 of each kind.
"""

import contextlib
import copy
import functools
import gzip
import io
import json
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import hypothesis.strategies as st
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from processes import in_processes, run_train
from torch.multiprocessing import ProcessRaisedException

from minimodels import LM, Config, InputError, from_pretrained, ledger, save_pretrained
from minimodels.architectures.registry import LAYERS, WRAPPERS, on_stream
from minimodels.data.text import open_data
from minimodels.data.tokenizer import END, open_tokenizer, train_bpe
from minimodels.grammar import Call, Group, Option, Program, write
from minimodels.ops.rotary import SCALINGS
from minimodels.published.config_json import is_idle
from minimodels.residual import Joint

EXAMPLES = int(os.environ.get("MINIMODELS_FUZZED", "1700"))  # of each of six kinds
TINY = (
    "--threads 1 --layers mlp --width 8 --context 16 --batch-size 2 --warmup 0 --eval-batches 1 "
    "--log-every 1 --device cpu"
)
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


FORBIDDEN = ("pickle.find_class", "socket.connect", "socket.getaddrinfo")
HEARD: list[str] = []  # forbidden events since a block began


@functools.cache
def listen() -> None:
    """Record forbidden events from now on, since Python removes no hook."""

    def record(event: str, arguments: tuple) -> None:
        if event in FORBIDDEN:
            HEARD.append(f"{event} {arguments}")

    sys.addaudithook(record)


@contextlib.contextmanager
def watched(seconds: int = 60):
    """Fail if the block takes longer, reads a pickle or asks the network."""

    def fail(number, frame):
        raise AssertionError(f"it takes more than {seconds} seconds")

    listen()
    HEARD.clear()
    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not HEARD, f"it must not: {HEARD}"


def misbehave(rank: int, how: str) -> None:
    with watched(1):
        if how == "pickle":
            pickle.loads(pickle.dumps(Path))
        elif how == "network":
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", 9), 0.1)
        else:
            signal.pause()


@pytest.mark.parametrize(
    "how, message",
    [
        ("pickle", "pickle.find_class"),
        ("network", "socket.connect"),
        ("slow", "more than 1 second"),
    ],
)
def test_an_example_that_misbehaves_fails(how, message):
    with pytest.raises(ProcessRaisedException, match=f"AssertionError: .*{message}"):
        in_processes(1, misbehave, how)


# command lines and runs


VALUES = [
    "0", "1", "-1", "1e30", "nan", "inf", "abc", "", "None", "true", "9" * 30, "@", "0.5", "é\x00",
]  # fmt: skip
FUZZED = [
    "width", "context", "batch-size", "accumulate", "lr", "schedule", "warmup", "weight-decay", "clip",
    "seed", "keep", "ramp", "skip-bad-steps", "eval-every", "eval-batches", "log-every", "layers", "set",
    "tokens", "flops", "minutes", "dtype", "impl", "tokenizer", "data", "init", "resume", "out", "model",
]  # fmt: skip


VALID = [
    ["--ramp", "context=4:16@0.5"], ["--ramp", "batch_size=1:4"], ["--data", "a=1:text b=0.5:lines.jsonl"],
    ["--data", "a=1:text b=2:text", "--ramp", "a=1:3 context=4:16"], ["--data", "lines.jsonl"],
    ["--data", "mqar(pairs=2)"], ["--data", "copying(tokens=2, vocab=5)"], ["--data", "parity"],
    ["--layers", "attention(heads=2) mlp"], ["--layers", "A:=mlp(width=8) A mamba A"], ["--layers", "(moe mamba2)*2"],
    ["--layers", "mod(attention(heads=2))"], ["--layers", "deltanet(heads=2) retention(heads=2)"],
    ["--set", "mlp.width=8"], ["--size", "small"], ["--size", "tiny"], ["--steps", "1"], ["--steps", "4"],
    ["--tokens", "200"], ["--flops", "1e6"], ["--minutes", "0.01"], ["--context", "8"], ["--batch-size", "3"],
    ["--accumulate", "2"], ["--schedule", "wsd"], ["--seed", "7"], ["--prompt", "é€"], ["--threads", "2"],
    ["--sample-every", "1"], ["--eval-every", "1"], ["--keep", "1"], ["--pack"], ["--checkpoint-activations"],
    ["--field", "other", "--data", "lines.jsonl"], ["--field", ""], ["--cache", "cache"], ["--tokenizer", "bpe(vocab=260)"],
    ["--device", "auto"], ["--dtype", "bfloat16"], ["--impl", "reference"], ["--out", "run"],
]  # fmt: skip
CHANGES = st.sampled_from(VALID) | st.tuples(
    st.sampled_from([f"--{name}" for name in FUZZED]), st.sampled_from(VALUES)
)


def end(rank: int, folder: Path, arguments: list[str], statuses: tuple = (0, 1, 2)) -> None:
    """Run train.py in a folder. It ends well, or with a status and one line of error."""
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder)
    with watched():
        status, lines = run_train(arguments)
    assert status in statuses, lines


def quick(folder: Path) -> list[str]:
    """The arguments of a run that ends soon."""
    (folder / "text").write_bytes(bytes(range(32, 127)) * 60)
    lines = [json.dumps({"text": f"{n} words", "other": f"{n} others"}) for n in range(300)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return [*TINY.split(), "--data", "text", "--steps", "2"]


@pytest.mark.nightly
@fuzzed
@given(st.lists(CHANGES, min_size=1, max_size=4))
def test_any_command_line_trains_or_ends_in_one_line(changes):
    with tempfile.TemporaryDirectory() as folder:
        arguments = [part for change in changes for part in change]
        in_processes(1, end, Path(folder), [*quick(Path(folder)), *arguments])


@pytest.mark.nightly
@pytest.mark.parametrize("change", VALID, ids=" ".join)
def test_a_command_line_that_looks_valid_trains(change, tmp_path):
    """If it were refused, fuzzing would find little."""
    in_processes(1, end, tmp_path, [*quick(tmp_path), *change], (0,))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run with checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = [*quick(folder), "--eval-every", "1", "--out", "run"]
    in_processes(1, end, folder, arguments)
    return folder


def damage(content: bytes, how: str, place: float, bits: int) -> bytes:
    """The bytes of a file after it was cut, flipped at one place, emptied or continued."""
    at = int(place * max(len(content) - 1, 0))
    if how == "flip" and content:
        return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]
    changed = {"cut": content[:at], "empty": b"", "more": content + bytes([bits]) * 9}
    return changed.get(how, content)


PLACES = {"place": st.floats(0, 1), "bits": st.integers(1, 255)}


@pytest.mark.nightly
@fuzzed
@given(
    number=st.integers(0, 6),
    how=st.sampled_from(["cut", "flip", "more", "gone", "empty", "folder"]),
    **PLACES,
)
def test_any_damage_to_a_run_is_passed_over_or_refused_in_one_line(
    finished, number, how, place, bits
):
    """The first checkpoint stays as it is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        shutil.copytree(finished, folder)
        files = sorted(path for path in (folder / "run").rglob("*") if path.is_file())
        assert len(files) == 7  # the lock, the log, the options, and two in each checkpoint
        damaged = files[number]
        content = damaged.read_bytes()
        damaged.unlink()
        if how == "folder":
            damaged.mkdir()
        elif how != "gone":
            damaged.write_bytes(damage(content, how, place, bits))
        first = {path.name: path.read_bytes() for path in files[:2] if path.is_file()}
        in_processes(1, end, folder, ["--resume", "run", "--steps", "3", "--keep", "9"])
        assert first == {path.name: path.read_bytes() for path in files[:2] if path.is_file()}


# layers


NUMBERS = {
    int: st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 40]),
    float: st.sampled_from([-1.0, 0.0, 1e-30, 1e-3, 0.1, 0.5, 1.0, 2.5, 100.0, 1e30]),
    bool: st.booleans(),
    tuple: st.lists(st.sampled_from([1, 2, 0.5, 1e4]), min_size=1, max_size=4).map(tuple),
}


@st.composite
def options_of(draw, *kinds: type) -> tuple[Option, ...]:
    """Up to four options of dataclasses, most of them with values of their types."""
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    names = draw(st.lists(st.sampled_from(sorted(hints)), max_size=4, unique=True)) if hints else []
    return tuple(Option(name, draw(values_of(hints[name]))) for name in names)


def values_of(hint) -> st.SearchStrategy:
    """Values of a type, as the text of a layer gives them."""
    if get_origin(hint) in (Union, types.UnionType):
        return st.one_of([values_of(each) for each in get_args(hint)])
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if hint in SCALINGS.values():
        name = next(name for name, kind in SCALINGS.items() if kind is hint)
        return options_of(hint).map(lambda options: Call(name, options=options))
    return NUMBERS.get(get_origin(hint) or hint, st.just("none"))


@st.composite
def layers(draw, within: tuple = ()) -> Call | Group:
    """A layer, a wrapper or a repeated group."""
    name = draw(st.sampled_from([*LAYERS, *WRAPPERS, "group"] if len(within) < 2 else [*LAYERS]))
    if name in LAYERS:
        kind = LAYERS[name]
        more = () if on_stream(kind) else (Joint,)
        return Call(name, (), draw(options_of(kind.Options, *more)))
    inner = tuple(draw(st.lists(layers((*within, name)), min_size=1, max_size=3)))
    if name == "group":
        return Group(inner, draw(st.integers(1, 3)))
    return Call(name, inner, draw(options_of(WRAPPERS[name].Options)))


CONFIGS = st.fixed_dictionaries(
    {"width": st.sampled_from([8, 12, 16, 24])},
    optional={
        name: values_of(hint)
        for name, hint in get_type_hints(Config).items()
        if name not in ("layers", "width", "vocab", "impl")
    },
)
MODELS = st.tuples(st.lists(layers(), min_size=1, max_size=3), CONFIGS)


def trained(text: str, given: dict) -> bool:
    """Build a model, count it, and compute a loss and its gradients. False if it is refused."""
    try:
        config = Config(layers=text, vocab=11, **given)
        ledger(config, 7)
        torch.manual_seed(0)
        model = LM(config)
        tokens = torch.randint(11, (2, 8))
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    except InputError:
        return False
    loss.backward()
    model.after_step()
    assert loss.shape == ()
    assert model.embedding.weight.grad.shape == (11, config.width)
    return True


@pytest.mark.nightly
@fuzzed
@given(MODELS)
def test_any_layers_train_or_are_refused(model):
    found, given = model
    with watched():
        trained(write(Program({}, tuple(found))), given)


def test_many_of_the_layers_that_are_drawn_are_trained():
    """If all were refused, fuzzing would find nothing."""
    built = []

    @settings(max_examples=40, derandomize=True, database=None, deadline=None)
    @given(MODELS)
    def draw(model):
        found, given = model
        built.append(trained(write(Program({}, tuple(found))), given))

    draw()
    assert sum(built) > 10
    assert sum(built) < len(built)


# JSON


WEIRD = st.sampled_from([
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**40, float("inf"), float("nan"), -0.5, 0.5, 1e-30, 1e300,
    "", "abc", "none", "silu", "a\x00b", "\ud800", [], [0], [None], [[]], ["full_attention"], ["full_attention"] * 2,
    [1.0] * 4, {}, {"a": 1}, {"type": "ByteLevel"}, {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 0},
    {"full_attention": 3}, {"quant_method": "mxfp4"}, {"quant_method": 1},
]).map(copy.deepcopy)  # fmt: skip


@st.composite
def changed(draw, tree: dict, names: list[str]) -> dict:
    """JSON in which one to three values of those with a name are others, missing or surplus."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while node:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            keys = [name for name in keys if name in names] or keys if node is tree else keys
            key = draw(st.sampled_from(keys))
            if not isinstance(node[key], (dict, list)) or not node[key] or draw(st.booleans()):
                break
            node = node[key]
        how = draw(st.sampled_from(["value", "value", "gone", "more"]))
        if how == "more" and isinstance(node, dict):
            node[draw(st.sampled_from(names))] = draw(WEIRD)
        elif how == "gone" and node:
            del node[key]
        elif node:
            node[key] = draw(WEIRD)
    return tree


# published models


@functools.cache
def published(name: str, number: int) -> Path:
    """The folder of a published model, which is left until Python ends."""
    from peers import saved, theirs

    folder = tempfile.TemporaryDirectory()
    KEPT.append(folder)
    return saved(theirs(name, number), Path(folder.name))


KEPT: list[tempfile.TemporaryDirectory] = []


@st.composite
def models(draw) -> tuple[Path, dict]:
    """The folder of a model, and a config.json that differs from its own."""
    from peers import CASES
    from test_published_drawn import SPACES

    name = draw(st.sampled_from(sorted(CASES)))
    folder = published(name, draw(st.integers(0, len(CASES[name]) - 1)))
    entries = json.loads((folder / "config.json").read_text())
    names = [
        entry
        for entry in {**entries, **SPACES[name], **SPACES["gemma2"]}
        if not is_idle(entry, None)
    ]
    return folder, draw(changed(entries, [*names, "quantization_config", "rope_scaling"]))


@pytest.mark.nightly
@fuzzed
@given(models())
def test_any_config_json_is_loaded_or_refused(model):
    """What is loaded computes, and what is saved of it is the same model."""
    folder, entries = model
    with tempfile.TemporaryDirectory() as name, watched():
        copied, again = Path(name, "copied"), Path(name, "again")
        copied.mkdir()
        (copied / "model.safetensors").symlink_to(folder / "model.safetensors")
        (copied / "config.json").write_text(json.dumps(entries))
        tokens = torch.arange(6).view(2, 3)
        try:
            lm = from_pretrained(copied)
            logits, _ = lm(tokens % lm.vocab)
        except InputError:
            return
        assert logits.shape == (2, 3, lm.vocab)
        save_pretrained(lm, again)
        repeated, _ = from_pretrained(again)(tokens % lm.vocab)
        torch.testing.assert_close(repeated, logits, rtol=1e-3, atol=1e-3, equal_nan=True)


# data


TEXTS = st.lists(
    st.text(max_size=30)
    | st.sampled_from(["\x00", "\ufeff", "é€😀", "\r\n", " ", END, "<|endoftext|>", "a" * 5000]),
    max_size=6,
)
LINES = st.lists(
    st.sampled_from([
        '{"text": 3}', '{"text": null}', '{"text": ["a"]}', '{"text": "\\ud800"}', '{"other": "a"}', "[]", "{", "", "\x00",
        "null", '{"text": "a", "text": "b"}', "[" * 3000, '{"text": ' + "9" * 5000 + "}", " ",
    ]), max_size=1,
)  # fmt: skip
ENCODINGS = ["utf-8"] * 3 + ["utf-8-sig", "utf-16", "utf-32", "utf-16-be", "latin-1"]


def parquet(texts: list[str], kind: str) -> bytes:
    """A Parquet file with a column of text, or of something else."""
    import pyarrow
    from pyarrow import parquet

    values = {
        "binary": [each.encode("utf-8", "replace") for each in texts],
        "integer": [*range(len(texts))],
        "list": [[each] for each in texts],
        "null": [None] * len(texts),
        "some": [each if len(each) % 2 else None for each in texts],
    }.get(kind, texts)
    column = pyarrow.array(values, {"string": pyarrow.string(), "null": pyarrow.null()}.get(kind))
    column = column.dictionary_encode() if kind == "dictionary" else column
    name = "other" if kind == "other" else "text"
    written = io.BytesIO()
    parquet.write_table(pyarrow.table({name: column}), written, row_group_size=2)
    return written.getvalue()


@st.composite
def files(draw) -> tuple[str, bytes]:
    """The name and the content of a file of data: of any format, compressed or not, whole or damaged."""
    texts = [each.encode("utf-8", "replace").decode() for each in draw(TEXTS)] * draw(
        st.sampled_from([1, 20, 100])
    )
    format = draw(st.sampled_from(["txt", "jsonl", "parquet"]))
    if format == "parquet":
        kinds = ["string", "binary", "integer", "list", "null", "some", "dictionary", "other"]
        content = parquet(texts, draw(st.sampled_from(kinds)))
    else:
        lines = texts if format == "txt" else [json.dumps({"text": each}) for each in texts]
        lines = [*lines, *(draw(LINES) if format == "jsonl" else ())]
        content = "\n".join(lines).encode(draw(st.sampled_from(ENCODINGS)), "replace")
    compressions = ["", ".gz", ".zst"] if format != "parquet" else [""]
    compression = draw(st.sampled_from(compressions))
    if compression == ".gz":
        content = gzip.compress(content, 1)
    if compression == ".zst":
        content = zstandard.compress(content)
    how = draw(st.sampled_from(["whole"] * 7 + ["cut", "flip", "more", "empty"]))
    content = damage(content, how, draw(PLACES["place"]), draw(PLACES["bits"]))
    ending = draw(
        st.sampled_from([f".{format}{compression}"] * 12 + [".gz", ".parquet", ".JSONL.zst", ""])
    )
    return f"file{ending}", content


@functools.cache
def tokenizers_json() -> list[dict]:
    """A byte-level BPE, a Unigram model with byte tokens, and one of whole words."""
    import tokenizers

    trained = train_bpe(["some text, which is text"] * 3, 270)
    unigram = tokenizers.Tokenizer(
        tokenizers.models.Unigram(
            [("<unk>", 0.0), ("a", -1.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))],
            0,
            True,
        )
    )
    unigram.decoder = tokenizers.decoders.ByteFallback()
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>"])
    made = [json.loads(each) for each in (trained.content, unigram.to_str(), words.to_str())]
    # the library writes a vocabulary in any order
    return [json.loads(json.dumps(each, sort_keys=True)) for each in made]


@st.composite
def tokenizers(draw) -> str | dict:
    """The name of a tokenizer, or the content of its file."""
    chosen = draw(
        st.sampled_from(["bytes", "bytes", "bpe(vocab=300)", "bpe(vocab=257)", "file", "file"])
    )
    if chosen != "file":
        return chosen
    tree = draw(st.sampled_from(tokenizers_json()))
    names = [
        "type",
        "special",
        "vocab",
        "merges",
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
    ]
    return draw(changed(tree, names))


@pytest.mark.nightly
@fuzzed
@given(
    st.lists(files(), min_size=1, max_size=3),
    tokenizers(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
)
def test_any_files_of_data_are_read_or_refused(found, tokenizer, packed, alone, context):
    """They stay as they are, and the cache has no leftovers."""
    with tempfile.TemporaryDirectory() as name, watched():
        folder, cache = Path(name, "data"), Path(name, "cache")
        for number, (ending, content) in enumerate(found):
            (folder / str(number)).mkdir(parents=True)
            (folder / str(number) / ending).write_bytes(content)
        if isinstance(tokenizer, dict):
            Path(name, "tokenizer.json").write_text(json.dumps(tokenizer))
            tokenizer = f"{name}/tokenizer.json"
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        chosen = next(iter(before)) if alone else folder
        read(str(chosen), context, tokenizer, cache, packed)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert not list(cache.rglob("*.partial"))


def read(name: str, context: int, tokenizer: str, cache: Path, packed: bool) -> None:
    """Read batches, or nothing if the data are refused."""
    try:
        data = open_data(name, context, tokenizer, cache=cache, packed=packed)
        batches = [data.batch(0, 0, 2), *data.validation(2, 2)]
    except InputError:
        return
    for tokens, targets, *_ in batches:
        assert tokens.shape == targets.shape == (2, context)
        assert 0 <= tokens.min() <= tokens.max() < data.vocab
        assert targets.max() < data.vocab
    assert data.validation_bytes(2, 2) >= 0


@pytest.mark.nightly
@fuzzed
@given(tokenizers(), st.text(max_size=30))
def test_any_tokenizer_reads_and_writes_or_is_refused(tokenizer, text):
    with tempfile.TemporaryDirectory() as name, watched():
        path = Path(name, "tokenizer.json")
        if isinstance(tokenizer, dict):
            path.write_text(json.dumps(tokenizer))
            tokenizer = str(path)
        try:
            opened = open_tokenizer(tokenizer, [text])
            tokens = opened.encode(text)
            written = "".join(opened.stream(tokens[:1], tokens[1:].tolist()))
        except InputError:
            return
        assert tokens.dtype == torch.int64
        assert isinstance(written, str)
