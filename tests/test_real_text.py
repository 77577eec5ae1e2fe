"""Text as it occurs in practice: in folders with links and leftovers, compressed, in records, with
byte order marks and broken bytes."""

import codecs
import errno
import gzip
import itertools
import json
import os
import random
import shutil
import socket
import sys
import tracemalloc
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import in_processes
from tqdm import tqdm

import minimodels.data.cache
import minimodels.data.corpus
import minimodels.data.files
import minimodels.data.span
import minimodels.data.tokens
from benchmarks.drawing import pyplot
from minimodels.data.chat import require_jinja2
from minimodels.data.documents import Documents, Part, pack
from minimodels.data.files import find_files, fingerprint, inspect_file
from minimodels.data.formats import read_hub, read_records, read_text
from minimodels.data.mixture import Mixture, parse_mixture
from minimodels.data.span import Piece, Span
from minimodels.data.text import Text, open_data
from minimodels.data.tokenizer import LibraryTokenizer, require_tokenizers, train_bpe
from minimodels.data.tokens import Encoder, cut_documents, decode, sample_text, widths
from minimodels.errors import InputError
from minimodels.ops.linear_cross_entropy import IGNORE

few = settings(max_examples=30, deadline=None)


def written(data, split="training") -> bytes:
    """All bytes of one half of the text."""
    span = data.spans[split]
    return span[0 : len(span)].tobytes()


def everything(data) -> bytes:
    return written(data) + written(data, "validation")


def ignore(_: int) -> None:
    pass


# files


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    (root / "b/c").mkdir(parents=True)
    for name in ("a.txt", "b/d.txt", "b/c/e.txt"):
        (root / name).write_text(name * 20)
    return root


def names(root):
    return [path.relative_to(root).as_posix() for path in find_files(root)]


FOUND = ["a.txt", "b/c/e.txt", "b/d.txt"]


def test_hidden_files_and_version_control_are_no_text(folder):
    for name in (".git/config", ".hidden", "b/.svn/x", "CVS/Root", "__pycache__/a.pyc"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not this")
    assert names(folder) == FOUND
    hidden = folder.rename(folder.with_name(".folder"))
    assert names(hidden) == FOUND


def test_what_a_run_writes_is_no_text(folder):
    before = open_data(str(folder), 8).fingerprint
    run = folder / "runs/a"
    (run / "options.json.partial").mkdir(parents=True)
    (run / "options.json.partial/options.json").write_text("{")
    assert open_data(str(folder), 8).fingerprint == before
    options = {"data": ".", "context": 8, "seed": 0, "config": {}}
    (run / "options.json").write_text(json.dumps(options))
    (run / "log.jsonl").write_text('{"step": 1}\n')
    (run / "step-10").mkdir()
    (run / "step-10/progress.json").write_text("{}")
    assert open_data(str(folder), 8).fingerprint == before
    for name in ("weights.safetensors", "x.partial"):
        (folder / name).write_text("not this")
    assert open_data(str(folder), 8).fingerprint == before
    (folder / "b/options.json").write_text('{"data": 1}')
    assert "b/options.json" in names(folder)


def test_the_cache_is_no_text(folder):
    before = names(folder)
    (folder / "x.txt.gz").write_bytes(gzip.compress(b"some text " * 30))
    open_data(str(folder), 8, cache=folder / "cache")
    assert names(folder) == [*before, "x.txt.gz"]


def test_links_are_followed_once(folder):
    outside = folder.with_name("outside")
    outside.mkdir()
    (outside / "f.txt").write_text("outside" * 20)
    (outside / "back").symlink_to(folder)
    (folder / "b/link").symlink_to(outside)
    (folder / "b/again").symlink_to(outside)
    (folder / "0").symlink_to(folder / "b/c")
    (folder / "loop").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "nothing").symlink_to("missing")
    (folder / "a2.txt").symlink_to("a.txt")
    (folder / "g.txt").symlink_to(outside / "f.txt")
    assert names(folder) == [*FOUND, "g.txt"]
    (folder / "g.txt").unlink()
    assert names(folder) == ["a.txt", "b/again/f.txt", "b/c/e.txt", "b/d.txt"]


def test_special_files_are_refused_or_passed_over(folder, tmp_path):
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path may have 108 characters
        server.bind("socket")
        os.chdir(here)
        assert names(folder) == FOUND
        for name in (folder / "fifo", folder / "socket", "/dev/zero", "/dev/null"):
            with pytest.raises(InputError, match="^data: "):
                open_data(str(name), 8)
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(InputError, match="^data: "):
        open_data(str(tmp_path / "self"), 8)
    with pytest.raises(OSError, match="regular"):
        inspect_file(folder / "fifo")


def test_a_file_that_shrinks_gives_one_error(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(b"x" * 100_000)
    data = open_data(str(file), 64)
    assert data.batch(0, 0, 4)[0].eq(ord("x")).all()
    os.truncate(file, 10)
    with pytest.raises(InputError, match=f"data: '{file}'.*shrunk"):
        data.batch(0, 0, 4)


def test_a_file_larger_than_memory_costs_what_is_read(tmp_path):
    file = tmp_path / "sparse"
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    span = Span([Piece(file, 0, 2**40)])
    assert not span[2**39 : 2**39 + 100].any()
    assert len(Text(span, span, 64).batch(0, 0, 2)[0]) == 2


def test_the_fingerprint_covers_contents_and_moves_with_the_text(folder):
    before = open_data(str(folder), 8).fingerprint
    moved = folder.rename(folder.with_name("elsewhere"))
    assert open_data(str(moved), 8).fingerprint == before
    text = (moved / "b/d.txt").read_text()
    (moved / "b/d.txt").write_text(text[:-1] + "!")
    assert open_data(str(moved), 8).fingerprint != before


def test_of_a_large_text_the_fingerprint_reads_a_sample(folder, monkeypatch):
    monkeypatch.setattr(minimodels.data.files, "WHOLE", 1000)
    monkeypatch.setattr(minimodels.data.files, "BLOCK", 10)
    content = bytearray(random.Random(0).randbytes(10_000))
    (folder / "large").write_bytes(content)

    def mark():
        return fingerprint({b"large": inspect_file(folder / "large")})

    before, seen = mark(), 0
    for place in range(10_000):
        content[place] ^= 1
        if place % 50 < 20 or place >= 9_990:
            (folder / "large").write_bytes(content)
            seen += mark() != before
        content[place] ^= 1
    assert 900 <= seen <= 1100  # blocks of 10 that add up to 1,000, and the last
    (folder / "large").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert mark() != before


def test_the_header_names_files_and_bytes(folder):
    size = sum(path.stat().st_size for path in find_files(folder))
    assert open_data(str(folder), 8).describe().startswith(f"3 files, {size} bytes")
    assert open_data(str(folder / "a.txt"), 4).describe() == "1 file, 100 bytes; 5 bytes held out"
    assert open_data("parity", 8).describe() == "Parity(context=8)"


# formats

TEXT = "first line\n\nEnde: añadir 日本\n" * 30


@pytest.mark.parametrize("mark, encoding", [
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
])  # fmt: skip
@pytest.mark.parametrize("ending", ["txt", "txt.gz", "jsonl"])
def test_byte_order_marks_tell_the_encoding_and_are_no_text(tmp_path, mark, encoding, ending):
    text = TEXT + "\ufeff"  # only the mark at the beginning is one
    content = json.dumps({"text": text}, ensure_ascii=False) if ending == "jsonl" else text
    content = mark + content.encode(encoding)
    path = tmp_path / f"file.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    data = open_data(str(path), 8, cache=tmp_path / "cache")
    assert everything(data).decode() == text + "\n" * (ending == "jsonl")


def test_each_file_loses_its_own_mark(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + name.encode() * 100)
    assert everything(open_data(str(tmp_path), 4)) == b"a" * 100 + b"b" * 100


def test_nul_bytes_and_broken_bytes_are_text(tmp_path):
    content = b"\0\xff\xc3\0 text " * 50
    (tmp_path / "x").write_bytes(content)
    assert everything(open_data(str(tmp_path / "x"), 8)) == content
    data = open_data(str(tmp_path / "x"), 4, "bpe(vocab=270)", cache=tmp_path / "cache")
    text = detokenize(data) + detokenize(data, "validation")
    assert text == "\0\ufffd\ufffd\0 text " * 50
    assert data.sizes[0 : len(data.sizes)].sum() == len(content) // 20


def compress(content: bytes, ending: str) -> bytes:
    if ending == "gz":
        return gzip.compress(content[:100]) + gzip.compress(content[100:])
    zstandard = pytest.importorskip("zstandard")
    parts = (
        zstandard.ZstdCompressor(write_checksum=True).compress(part)
        for part in (content[:100], content[100:])
    )
    return b"".join(parts)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_text_is_the_text(tmp_path, ending):
    (tmp_path / f"x.txt.{ending}").write_bytes(compress(TEXT.encode(), ending))
    data = open_data(str(tmp_path / f"x.txt.{ending}"), 8, cache=tmp_path / "cache")
    assert everything(data) == TEXT.encode()
    (tmp_path / "x").write_text(TEXT)
    plain = open_data(str(tmp_path / "x"), 8)
    assert written(data) == written(plain)


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "other", "bit"])
def test_damaged_compressed_text_is_refused_and_leaves_nothing(tmp_path, ending, damage):
    content = compress(random.Random(0).randbytes(5000).hex().encode(), ending)
    content = {
        "cut": content[:-20],
        "other": b"no such format",
        "bit": content[:900] + bytes([content[900] ^ 255]) + content[901:],
    }[damage]
    path = tmp_path / f"x.{ending}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"data: .*x.{ending}"):
        open_data(str(path), 8, cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def write_records(path, texts, **more):
    lines = [json.dumps({**more, "text": text}) for text in texts]
    path.write_text("\n\n".join(lines) + "\r\n")
    return path


def test_json_lines_give_one_document_a_record(tmp_path):
    texts = ["a\nb\n", "", "日本", None, "c"]
    path = write_records(tmp_path / "x.jsonl", texts, id=3)
    assert list(read_records(path, "text", ignore)) == [
        b"a\nb\n", b"", "日本\n".encode(), b"", b"c\n",
    ]  # fmt: skip
    data = open_data(str(write_records(tmp_path / "y.jsonl", ["ab" * 50] * 3)), 4, cache=tmp_path)
    assert everything(data) == (b"ab" * 50 + b"\n") * 3
    assert "3 documents with 303 bytes of text" in data.describe()


def test_few_records_are_split_by_position_and_stay_documents(tmp_path):
    texts = [f"{number:03} " * (1 + number % 9) for number in range(150)]
    path = write_records(tmp_path / "x.jsonl", texts)
    data = open_data(str(path), 8, cache=tmp_path / "cache", packed=True)
    found = []
    for span in data.spans.values():
        content = span[0 : len(span)].tobytes().decode()
        found.append([content[a:b] for a, b in itertools.pairwise([0, *span.ends[0:200].tolist()])])
    training, validation = found
    assert len(data.spans["validation"]) == len("".join(texts) + "\n" * 150) // 20
    joined = [*training[:-1], training[-1] + validation[0], *validation[1:]]  # one is cut
    if training[-1].endswith("\n"):
        joined = training + validation
    assert sorted(joined) == [f"{text}\n" for text in texts]


def test_many_records_are_split_by_their_content(tmp_path):
    texts = [f"document {number} " * 5 for number in range(400)]
    path = write_records(tmp_path / "x.jsonl", texts * 2)
    data = open_data(str(path), 8, cache=tmp_path / "cache")
    training, validation = (
        set(written(data, split).decode().splitlines()) for split in ("training", "validation")
    )
    assert validation and not training & validation
    assert training | validation == set(texts)
    assert 0.02 < len(validation) / 400 < 0.09


@pytest.mark.parametrize("content, message", [
    ('{"text": "a"}\n{"other": 1, "more": 2}\n', "field: 'text'.*x.jsonl, line 2: other, more"),
    ('{"text": 3}', "field that is text; .*line 1 has int"),
    ('{"text": "a"}\n\n{"text": ', "x.jsonl, line 3.*one JSON object a line"),
    ("[1]", "line 1.*one JSON object a line"),
    ("[" * 100_000, "line 1.*one JSON object a line"),
    ("\ufeff\xff\xfe", "one JSON object a line"),
    ("", "0 bytes of training text"),
])  # fmt: skip
def test_bad_json_lines_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(
        content, encoding="latin-1" if "\xff" in content[:1] else None
    )
    with pytest.raises(InputError, match=message) as error:
        open_data(str(tmp_path / "x.jsonl"), 8, cache=tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_other_fields_and_none(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "inside of it"}\n' * 9)
    data = open_data(str(path), 4, field="body", cache=tmp_path / "cache")
    assert everything(data) == b"inside of it\n" * 9
    plain = open_data(str(path), 4, field="", cache=tmp_path / "none")
    assert everything(plain) == path.read_bytes()
    assert not (tmp_path / "none").exists()
    assert plain.fingerprint != data.fingerprint


@few
@given(
    st.lists(
        st.one_of(st.binary(max_size=30), st.sampled_from([b'{"text": "x"}', b'{"text":'])),
        max_size=6,
    )
)
def test_any_bytes_are_documents_or_refused(tmp_path_factory, lines):
    for ending in ("jsonl", "jsonl.gz", "txt.gz", "txt"):
        path = tmp_path_factory.mktemp("x") / f"x.{ending}"
        path.write_bytes(b"\n".join(lines))
        read = read_records if "jsonl" in ending else read_text
        try:
            assert all(isinstance(part, bytes) for part in read(path, "text", ignore))
        except InputError as error:
            assert "\n" not in str(error)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"text {number}" if number % 7 else None for number in range(1000)]
    table = pyarrow.table({"text": texts, "id": list(range(1000))})
    path = tmp_path / "x.parquet"
    parquet.write_table(table, path, row_group_size=300)
    positions = []
    found = list(read_records(path, "text", positions.append))
    assert found == [f"{text}\n".encode() if text else b"" for text in texts]
    assert positions == sorted(positions) and positions[-1] == path.stat().st_size
    with pytest.raises(InputError, match="field: 'body'.*text, id"):
        list(read_records(path, "body", ignore))
    with pytest.raises(InputError, match="field that is text; .* has int"):
        list(read_records(path, "id", ignore))
    (tmp_path / "y.parquet").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="y.parquet"):
        list(read_records(tmp_path / "y.parquet", "text", ignore))


@pytest.mark.parametrize("module, name", [("pyarrow", "x.parquet"), ("zstandard", "x.txt.zst")])
def test_what_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(InputError, match=f'^{module} is not installed; pip .*".\\[data\\]"$'):
        open_data(str(tmp_path / name), 8, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    "package, extra, needs",
    [
        ("tokenizers", "hub", require_tokenizers),
        ("jinja2", "hub", require_jinja2),
        ("matplotlib", "plot", pyplot),
    ],
)
def test_a_missing_library_is_named_with_its_extra(package, extra, needs, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as error:
        needs()
    command = f'pip install -e ".[{extra}]"'
    assert str(error.value) == f"{package} is not installed; {command}"
    assert (error.value.field, error.value.accepted) == (package, command)


def test_a_data_set_of_the_hub_is_streamed_once(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, configuration, split, streaming):
        asked.append((name, configuration, split, streaming))
        return ({"text": f"story {number}"} for number in range(300))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = [open_data("owner/stories:small", 8, cache=tmp_path) for _ in range(2)]
    assert asked == [("owner/stories", "small", "train", True)]
    assert data[0].fingerprint == data[1].fingerprint
    assert sorted(everything(data[0]).splitlines()) == sorted(b"story %d" % n for n in range(300))

    def fail(*_, **__):
        raise RuntimeError("no network\nat all")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    with pytest.raises(InputError, match="data: 'owner/other'.*no network\\)"):
        open_data("owner/other", 8, cache=tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install -e .*hub"):
        open_data("owner/other", 8, cache=tmp_path)


def test_a_missing_file_is_no_data_set(tmp_path, monkeypatch):
    """If the folder exists and the file in it does not, the network is not used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install -e .*hub"):
        open_data("texts/x.txt", 8, cache=tmp_path / "cache")
    (tmp_path / "texts").mkdir()
    with pytest.raises(InputError, match="a folder with files"):
        open_data("texts/x.txt", 8, cache=tmp_path / "cache")


def test_data_sets_are_read_as_the_library_reads_them(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own/er").mkdir(parents=True)  # the library takes folders for data sets too
    write_records(tmp_path / "own/er/train.jsonl", ["abc", "d"])
    assert list(read_hub("own/er", "text")) == [b"abc\n", b"d\n"]


# tokens

tokenizers = pytest.importorskip("tokenizers", reason="tokens need the extra `hub`")


@pytest.fixture
def prose(tmp_path):
    """250 files, so that one in twenty is held out whole."""
    words = "the quick brown fox añade 日本 <|end|> jumps over\n".split(" ")
    random_words = random.Random(0)
    folder = tmp_path / "prose"
    folder.mkdir()
    for number in range(250):
        text = " ".join(random_words.choices(words, k=random_words.randint(1, 200)))
        (folder / f"{number}.txt").write_text(text)
    return folder


def detokenize(data, split="training") -> str:
    span = data.spans[split]
    ids = [token for token in span[0 : len(span)].tolist() if token not in data.tokenizer.end]
    return data.tokenizer.tokenizer.decode(ids, skip_special_tokens=False)


def test_tokens_give_the_text_back_and_hold_out_the_same(prose, tmp_path):
    plain = open_data(str(prose), 16)
    data = open_data(str(prose), 16, "bpe(vocab=300)", cache=tmp_path / "cache")
    for split in ("training", "validation"):
        assert detokenize(data, split) == written(plain, split).decode()
        assert data.spans[split][0 : len(data.spans[split])].dtype == np.uint16
    assert data.vocab == data.tokenizer.vocab == 300
    assert data.fingerprint.startswith(plain.fingerprint) and data.fingerprint != plain.fingerprint


def test_a_document_ends_with_a_token_that_no_text_gives(prose, tmp_path):
    data = open_data(str(prose), 16, "bpe(vocab=300)", cache=tmp_path / "cache")
    (end,) = data.tokenizer.end
    span = data.spans["training"]
    tokens = span[0 : len(span)]
    ends = span.ends[0 : len(span.ends)]
    assert (np.flatnonzero(tokens == end) + 1).tolist() == ends.tolist()
    assert len(span.ends) + len(data.spans["validation"].ends) == 250
    assert "<|end|>" in detokenize(data)


def test_held_out_tokens_know_their_bytes(prose, tmp_path):
    data = open_data(str(prose), 16, "bpe(vocab=300)", cache=tmp_path / "cache")
    span, (end,) = data.spans["validation"], data.tokenizer.end
    tokens, sizes = span[0 : len(span)], data.sizes[0 : len(span)]
    assert sizes.sum() == len(written(open_data(str(prose), 16), "validation"))
    texts = [data.tokenizer.token_bytes[token] for token in tokens.tolist()]
    assert sizes.tolist() == [0 if t == end else len(b) for t, b in zip(tokens, texts, strict=True)]
    counted = sum(
        len(data.tokenizer.token_bytes[token])
        for _, targets in data.validation(3, 5)
        for token in targets.flatten().tolist()
    )
    assert data.validation_bytes(3, 5) == counted
    assert data.bytes_per_token(3, 5) == counted / (3 * 5 * 16)
    assert open_data(str(prose), 16).bytes_per_token(3, 5) == 1


def test_tokens_are_made_once_and_again_if_they_are_damaged(prose, tmp_path, monkeypatch):
    def opened():
        return open_data(str(prose), 16, "bpe(vocab=300)", cache=tmp_path / "cache")

    made, write = [], minimodels.data.tokens.write_pieces

    def count(*arguments):
        made.append(1)
        write(*arguments)

    monkeypatch.setattr(minimodels.data.tokens, "write_pieces", count)
    before = opened().batch(0, 0, 8)
    (folder,) = (tmp_path / "cache").glob("tokens-*/")
    for damage in ("none", "short", "gone", "about", "leftover"):
        if damage == "short":
            os.truncate(folder / "training.bin", 100)
        elif damage == "gone":
            (folder / "validation.bytes").unlink()
        elif damage == "about":
            (folder / "about.json").write_text("{")
        elif damage == "leftover":
            shutil.move(folder, folder.with_name(folder.name + ".partial"))
        made.clear()
        assert all(map(torch.equal, opened().batch(0, 0, 8), before))
        assert bool(made) == (damage != "none")
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize("encoding, told", [("latin-1", ", 10% of it not UTF-8;"), ("utf-8", "")])
def test_the_header_tells_text_in_another_encoding(tmp_path, encoding, told):
    (tmp_path / "x").write_bytes("neun und é".encode(encoding) * 500)
    for _ in ("made", "found in the cache"):
        data = open_data(str(tmp_path / "x"), 16, "bpe(vocab=260)", cache=tmp_path / "cache")
        assert told in data.describe()
        assert ("UTF-8" in data.describe()) == bool(told)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet", "x.txt.gz"])
def test_a_bar_ends_at_the_bytes_of_the_text(tmp_path, monkeypatch, name):
    bars = []

    class Bar(tqdm):
        def __init__(self, **given):
            super().__init__(**{**given, "disable": False})  # although this is no terminal

        def __exit__(self, *raised):
            bars.append((self.desc.partition(" /")[0], self.n, self.total))
            super().__exit__(*raised)

    monkeypatch.setattr(minimodels.data.corpus, "tqdm", Bar)
    texts = [f"text {number} " * 40 for number in range(300)]
    if name == "x.parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = sys.modules["pyarrow"].table({"text": texts})
        parquet.write_table(table, tmp_path / name, row_group_size=100)
    else:
        lines = [json.dumps({"text": text}) if "jsonl" in name else text for text in texts]
        content, ending = "\n".join(lines).encode(), name.rpartition(".")[2]
        content = content if ending == "jsonl" else compress(content, ending)
        (tmp_path / name).write_bytes(content)
    open_data(str(tmp_path / name), 16, "bpe(vocab=260)", cache=tmp_path / "cache")
    size = (tmp_path / name).stat().st_size
    plain = open_data(str(tmp_path / name), 16, cache=tmp_path / "cache")
    whole, training = len(everything(plain)), len(plain.spans["training"])
    assert bars == [
        ("reading", size, size),
        ("reading for the tokenizer", training, training),
        ("tokenizing", whole, whole),
    ]


def test_damaged_ends_of_documents_are_told(prose, tmp_path):
    open_data(str(prose), 16, "bpe(vocab=300)", cache=tmp_path / "cache")
    (ends,) = (tmp_path / "cache").glob("tokens-*/training.ends")
    content = np.fromfile(ends, np.int64)
    for place in (3, -1):
        wrong = content.copy()
        wrong[place] += 10**9
        wrong.tofile(ends)
        with pytest.raises(InputError, match="^cache: .*damaged"):
            open_data(str(prose), 16, "bpe(vocab=300)", cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_told(prose, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="^cache: "):
        open_data(str(prose), 16, "bpe(vocab=300)", cache=tmp_path / "file")


def test_a_full_disk_is_told(prose, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(minimodels.data.cache.Writer, "write", fail)
    with pytest.raises(InputError, match="^cache: .*room for the text .No space left"):
        open_data(str(prose), 16, "bpe(vocab=300)", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("tokens-*/"))


def test_an_interrupted_making_leaves_nothing(prose, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(minimodels.data.tokens, "write_pieces", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_data(str(prose), 16, "bpe(vocab=300)", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("tokens-*/"))


def test_the_same_text_trains_the_same_tokenizer(prose, tmp_path):
    marks = {
        open_data(str(prose), 16, "bpe(vocab=300)", cache=tmp_path / name).fingerprint
        for name in ("one", "two")
    }
    assert len(marks) == 1
    other = open_data(str(prose), 16, "bpe(vocab=290)", cache=tmp_path / "one")
    assert other.fingerprint not in marks and other.vocab == 290


def test_the_tokenizer_is_trained_on_the_training_half(tmp_path):
    (tmp_path / "x").write_bytes(b"ab cabd " * 1000 + b"zyz yx " * 60)
    data = open_data(str(tmp_path / "x"), 8, "bpe(vocab=400)", cache=tmp_path / "cache")
    learnt = [token for token in data.tokenizer.token_bytes.values() if len(token) > 1]
    assert learnt and not any(b"zy" in token for token in learnt)


def test_a_run_opens_its_saved_tokenizer(prose, tmp_path):
    data = open_data(str(prose), 16, "bpe(vocab=300)", cache=tmp_path / "cache")
    data.tokenizer.save(tmp_path)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        again = open_data(str(prose), 16, str(name), cache=tmp_path / "cache")
        assert again.fingerprint == data.fingerprint and again.tokenizer.end == data.tokenizer.end
    assert len(list((tmp_path / "cache").glob("tokens-*/"))) == 1


def test_long_documents_are_tokenized_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(minimodels.data.tokens, "PIECE", 50)
    monkeypatch.setattr(minimodels.data.tokens, "BATCH", 3)
    text = TEXT * 10 + "日" * 100 + "a" * 300
    (tmp_path / "x").write_text(text)
    data = open_data(str(tmp_path / "x"), 8, "bpe(vocab=300)", cache=tmp_path / "cache")
    assert detokenize(data) + detokenize(data, "validation") == text


def write_short_documents(folder, count: int) -> None:
    """A folder with JSON lines of some 50 bytes each, and a tokenizer."""
    folder.mkdir()
    train_bpe(["document and a few words "], 280).save(folder)
    with (folder / "x.jsonl").open("w") as file:
        for number in range(count):
            file.write(f'{{"text": "document {number} and a few words {number % 7}"}}\n')


def read_short_documents(folder) -> None:
    """Convert, tokenize and pack them."""
    name, tokenizer = str(folder / "x.jsonl"), str(folder / "tokenizer.json")
    data = open_data(name, 32, tokenizer, cache=folder / "cache", packed=True)
    data.batch(0, 0, 4)
    assert next(data.validation(4, 1))[0].shape == (4, 32)


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path):
    """Not even by the eight bytes of each document's end."""
    peaks, counts = [], (4_000, 28_000)
    for count in counts:
        write_short_documents(tmp_path / str(count), count)
        tracemalloc.start()
        read_short_documents(tmp_path / str(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 4 * (counts[1] - counts[0])


def test_reading_documents_in_order_or_packed_keeps_none_in_memory(tmp_path):
    peaks, counts = [], (2_000, 22_000)
    for count in counts:

        def fill(writer, count=count):
            for split in ("training", "validation"):
                for _ in range(count):
                    writer.write(split, np.arange(3))
                    writer.end_document(split)

        folder = minimodels.data.cache.make_once(tmp_path, str(count), np.uint8, fill)
        tracemalloc.start()
        spans = [minimodels.data.cache.open_span(folder, s) for s in ("training", "validation")]
        assert [sum(1 for _ in cut_documents(span)) for span in spans] == [count, count]
        Documents(*spans, 8).batch(0, 0, 2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 4 * (counts[1] - counts[0])


def read_in_two_gigabytes(rank: int, folder) -> None:
    import resource  # which Windows lacks

    resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9, 2 * 10**9))
    read_short_documents(folder)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere RLIMIT_DATA limits no NumPy array")
def test_a_gigabyte_of_short_documents_is_read_in_two_of_memory(tmp_path):
    """MINIMODELS_DOCUMENTS=200000000 reads ten gigabytes."""
    count = int(os.environ.get("MINIMODELS_DOCUMENTS", 2 * 10**7))
    write_short_documents(tmp_path / "texts", count)
    in_processes(1, read_in_two_gigabytes, tmp_path / "texts")


def test_documents_are_the_same_in_blocks_of_any_size(documents, monkeypatch):
    def read():
        data = open_data(str(documents), 32, packed=True)
        pieces = [list(cut_documents(data.spans[split])) for split in data.spans]
        return pieces, [*data.batch(0, 0, 8), *next(data.validation(8, 1))]

    expected, tensors = read()
    for size in (1, 3):
        monkeypatch.setattr(minimodels.data.span, "BLOCK", size)
        found, others = read()
        assert found == expected
        assert all(map(torch.equal, others, tensors))


@few
@given(
    st.lists(st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode)), max_size=5)
)
def test_pieces_of_documents_are_the_documents(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("x") / "x"
    path.write_bytes(b"".join(documents))
    ends = np.cumsum([0, *(len(document) for document in documents)])[1:]
    span = Span([Piece(path, 0, path.stat().st_size)], np.uint8, ends)
    found = [b""]
    for raw, ended in cut_documents(span, 8):
        assert 0 < len(raw) <= 8
        found[-1] += raw
        if ended:
            found.append(b"")
    assert found == [*(document for document in documents if document), b""]


@few
@given(st.one_of(st.binary(max_size=60), st.text(max_size=30).map(str.encode)))
def test_broken_bytes_are_counted_one_by_one(raw):
    assert widths(raw).sum() == len(raw)
    text, invalid = decode(raw)
    assert len(widths(raw)) == len(text)
    assert text.replace("\ufffd", "") == raw.decode(errors="ignore").replace("\ufffd", "")
    assert invalid == text.count("\ufffd") - raw.count("\ufffd".encode())


@pytest.fixture(scope="module")
def encoders():
    """Encoders of several kinds of tokenizers. Byte-level: one plain, and two that change
    the text first. Others: one that puts a space before each word, and one that drops
    spaces and unknown text."""
    library = tokenizers
    texts = ["the quick brown fox añade 日本\n " * 20]
    level = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = []
    for normalizer, splitter, decoder in [
        (None, level, library.decoders.ByteLevel()),
        (library.normalizers.Lowercase(), level, library.decoders.ByteLevel()),
        (library.normalizers.NFKD(), level, library.decoders.ByteLevel()),
        (None, library.pre_tokenizers.Metaspace(), library.decoders.Metaspace()),
        (None, library.pre_tokenizers.Whitespace(), library.decoders.Fuse()),
    ]:
        tokenizer = library.Tokenizer(library.models.BPE())
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoder
        trainer = library.trainers.BpeTrainer(
            vocab_size=330,
            initial_alphabet=level.alphabet() if splitter is level else [],
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        made.append(Encoder(LibraryTokenizer(tokenizer, frozenset())))
    return made


@few
@given(
    raw=st.one_of(
        st.binary(max_size=40),
        st.text(max_size=20).map(str.encode),
        st.sampled_from(["ﬁné Ⅷ <s>".encode(), b" the fox \n"]),
    )
)
def test_tokens_stand_for_all_bytes_whatever_the_tokenizer(encoders, raw):
    for encoder in encoders:
        ((tokens, sizes),) = encoder.with_sizes([raw])
        ((same, _),) = encoder.tokens([raw])
        assert tokens.tolist() == same.tolist()
        assert len(sizes) == len(tokens) and (sizes >= 0).all()
        assert sizes.sum() == (len(raw) if len(tokens) else 0)


def test_a_sample_is_evenly_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(minimodels.data.tokens, "BLOCK", 10)
    (tmp_path / "x").write_bytes(bytes(range(100)))
    span = Span([Piece(tmp_path / "x", 0, 100)])
    assert "".join(sample_text(span, 100)).encode() == bytes(range(100))
    assert [text[0] for text in sample_text(span, 30)] == [chr(0), chr(40), chr(80)]


@pytest.mark.parametrize("spec", [
    "bpe(vocab=100)", "bpe(vocab=x)", "bpe(words=300)", "bpe(vocab=300", "bpe(vocab=99999999)", "words", "", "missing.json",
])  # fmt: skip
def test_tokenizers_that_are_none(prose, tmp_path, spec):
    with pytest.raises(InputError, match="^tokenizer"):
        open_data(str(prose), 16, spec, cache=tmp_path / "cache")


def test_tasks_have_tokens_of_their_own():
    with pytest.raises(InputError, match="^tokenizer.*parity is a task"):
        open_data("parity", 8, "bpe(vocab=300)")


# documents

parts = st.lists(st.integers(1, 16), min_size=1, max_size=60).map(
    lambda lengths: [Part(100 * i, length, False) for i, length in enumerate(lengths)]
)


@few
@given(parts)
def test_packing_loses_nothing_and_leaves_little(found):
    rows = pack(found, 16)
    assert sorted(part for row in rows for part in row) == sorted(found)
    lengths = [sum(part.length for part in row) for row in rows]
    assert max(lengths) <= 16
    assert sum(lengths) > 16 * (len(rows) - 1) / 2  # no two rows fit into one
    for i, length in enumerate(lengths):  # a row is begun only if no other has room
        assert all(length + max(part.length for part in row) > 16 for row in rows[i + 1 :])


@pytest.fixture
def documents(tmp_path):
    """250 files of 1 to 40 distinct bytes. The first two identify the file."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(250):
        length = 3 + number % 38
        (folder / f"{number:03}").write_bytes(bytes([number, *range(length - 1)]))
    return folder


def split_rows(batch):
    """(tokens, targets) of each document in each row, without what fills the row."""
    for tokens, targets, starts in zip(*batch, strict=True):
        assert (starts <= torch.arange(len(starts))).all()
        for start in starts.unique().tolist():
            where = (starts == start).nonzero().flatten()
            assert where.tolist() == list(range(start, start + len(where)))  # one stretch
            if not (tokens[where].eq(0) & targets[where].eq(IGNORE)).all():
                yield tokens[where].tolist(), targets[where].tolist()


def test_rows_hold_whole_documents(documents):
    data = open_data(str(documents), 40, packed=True)
    assert isinstance(data, Documents) and isinstance(data, Text)
    seen = 0
    for tokens, targets in split_rows(data.batch(0, 0, 16)):
        file = (documents / f"{tokens[0]:03}").read_bytes()
        assert tokens == list(file)
        assert targets == [*file[1:], IGNORE]
        seen += 1
    assert seen >= 16


def test_documents_longer_than_the_context_are_cut(tmp_path):
    for number in range(250):
        (tmp_path / f"{number}").write_bytes(bytes(range(1, 41)))
    data = open_data(str(tmp_path), 16, packed=True)
    found = {
        (tuple(tokens), tuple(targets)) for tokens, targets in split_rows(data.batch(0, 0, 64))
    }
    assert found == {
        (tuple(range(1, 17)), tuple(range(2, 18))),
        (tuple(range(17, 33)), tuple(range(18, 34))),
        (tuple(range(33, 41)), (*range(34, 41), IGNORE)),
    }
    targets = torch.cat([batch[1].flatten() for batch in data.validation(4, 3)])
    assert data.validation_targets(4, 3) == targets.ne(IGNORE).sum()


def test_batches_of_documents_are_a_function_of_seed_and_step(documents):
    first, second = (open_data(str(documents), 40, packed=True) for _ in range(2))
    steps = [0, 40, 1, 17, 16, 15, 0]
    found = {step: first.batch(3, step, 16) for step in steps}
    for step in reversed(steps):
        assert all(map(torch.equal, found[step], second.batch(3, step, 16)))
    assert len({tuple(batch[0].flatten().tolist()) for batch in found.values()}) == len(set(steps))
    assert not torch.equal(first.batch(3, 0, 16)[0], first.batch(4, 0, 16)[0])
    assert first.batch(3, 0, 5, context=20)[0].shape == (5, 20)


def test_rows_of_another_size_repeat_no_window(documents):
    """A run may change the size of its batches. Then the same window has other steps."""
    data = open_data(str(documents), 40, packed=True)
    window = torch.cat([data.batch(0, step, 16)[0] for step in range(16, 32)])
    later = torch.cat([data.batch(0, step, 8)[0] for step in range(32, 64)])
    assert window.shape == later.shape
    assert (window == later).all(dim=1).float().mean() < 0.1


def test_every_document_is_as_likely(documents):
    data = open_data(str(documents), 64, packed=True)
    counts = dict.fromkeys(range(250), 0)
    filled = 0
    for step in range(0, 200):
        batch = data.batch(0, step, 32)
        filled += batch[1].ne(IGNORE).sum().item()
        for tokens, _ in split_rows(batch):
            counts[tokens[0]] += 1
    training = {int(piece.path.name) for piece in data.spans["training"].pieces}
    assert {number for number, count in counts.items() if count} == training
    short = [counts[number] for number in training if number % 38 < 5]
    long = [counts[number] for number in training if number % 38 >= 33]
    assert abs(np.mean(short) / np.mean(long) - 1) < 0.1
    assert filled > 0.9 * 200 * 32 * 64


def test_validation_of_documents(documents):
    data = open_data(str(documents), 40, packed=True)
    once, again = (list(data.validation(4, 3)) for _ in range(2))
    assert [batch[0].shape for batch in once] == [(4, 40)] * 3
    assert all(all(map(torch.equal, a, b)) for a, b in zip(once, again, strict=True))
    held_out = {int(piece.path.name) for piece in data.spans["validation"].pieces}
    assert {tokens[0] for batch in once for tokens, _ in split_rows(batch)} <= held_out
    targets = sum(batch[1].ne(IGNORE).sum().item() for batch in once)
    assert data.validation_targets(4, 3) == data.validation_bytes(4, 3) == targets
    assert data.bytes_per_token(4, 3) == 1


def test_documents_without_targets_are_refused(tmp_path):
    for number in range(250):
        (tmp_path / f"{number}").write_bytes(b"x")
    with pytest.raises(InputError, match="data: .*none with two tokens"):
        open_data(str(tmp_path), 8, packed=True)
    assert open_data(str(tmp_path), 2).batch(0, 0, 2)[0].shape == (2, 2)


def test_bytes_of_packed_tokens(prose, tmp_path):
    data = open_data(str(prose), 24, "bpe(vocab=300)", cache=tmp_path / "cache", packed=True)
    targets = torch.cat([batch[1].flatten() for batch in data.validation(4, 3)])
    targets = targets[targets != IGNORE].tolist()
    assert data.validation_targets(4, 3) == len(targets)
    counted = sum(len(data.tokenizer.token_bytes[token]) for token in targets)
    assert data.validation_bytes(4, 3) == counted


def test_records_are_packed_too(tmp_path):
    texts = [f"{number:03}" * (1 + number % 7) for number in range(300)]
    path = write_records(tmp_path / "x.jsonl", texts)
    data = open_data(str(path), 30, cache=tmp_path / "cache", packed=True)
    for tokens, _ in split_rows(data.batch(0, 0, 8)):
        assert bytes(tokens).decode().removesuffix("\n") in texts


# mixtures


@pytest.fixture
def mixture(tmp_path):
    for name, letter in (("one file", b"a"), ("two", b"b")):
        (tmp_path / name).write_bytes(letter * 1000)
    return f"code=0.75:{tmp_path / 'one file'}  prose=0.25:{tmp_path / 'two'}"


def test_rows_come_from_the_parts_by_their_weights(mixture):
    data = open_data(mixture, 16)
    assert isinstance(data, Mixture) and data.vocab == 256
    rows = torch.cat([data.batch(0, step, 8)[0] for step in range(100)])
    assert (rows == rows[:, :1]).all()
    assert abs((rows[:, 0] == ord("a")).float().mean() - 0.75) < 0.06
    orders = {tuple(data.batch(0, step, 4)[0][:, 0].tolist()) for step in range(100)}
    assert len(orders) > 8  # parts are mixed within a batch
    changed = data.batch(0, 3, 50, weights={"code": 0.0})[0]
    assert (changed == ord("b")).all()
    again = open_data(mixture, 16)
    assert all(map(torch.equal, data.batch(5, 7, 8), again.batch(5, 7, 8)))
    assert data.batch(5, 7, 8, context=4)[0].shape == (8, 4)


@few
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 100))
def test_shares_of_a_mixture_are_all_rows(weights, rows):
    part = types.SimpleNamespace(context=8, vocab=256, tokenizer=None, fingerprint="")
    names = dict(enumerate(weights))
    shares = Mixture(dict.fromkeys(names, part), names).shares(rows)
    assert sum(shares) == rows
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - rows * weight / sum(weights)) <= 1.01


def test_validation_of_a_mixture(mixture):
    data = open_data(mixture, 16)
    batches = list(data.validation(4, 5))
    assert [tokens.shape for tokens, _ in batches] == [(4, 16)] * 5
    rows = torch.cat([tokens[:, 0] for tokens, _ in batches])
    assert (rows == ord("a")).sum() == 15
    assert len(set(rows[:8].tolist())) == 2
    assert data.bytes_per_token(4, 5) == 1


def test_a_mixture_has_one_tokenizer(prose, mixture, tmp_path):
    name = f"{mixture} words=2:{prose}"
    data = open_data(name, 16, "bpe(vocab=300)", cache=tmp_path / "cache", packed=True)
    assert {part.tokenizer for part in data.parts.values()} == {data.tokenizer}
    assert data.vocab == 300
    tokens, targets, starts = data.batch(0, 0, 6)
    assert tokens.shape == targets.shape == starts.shape == (6, 16)
    sizes = {"code": 1, "prose": 1}
    found = [batch[1] for batch in data.validation(4, 5)]
    targets = torch.cat(found)
    targets = targets[targets != IGNORE].tolist()
    counted = sum(len(data.tokenizer.token_bytes[token]) for token in targets)
    assert data.bytes_per_token(4, 5) == counted / len(targets)
    assert all(f"{part} " in data.describe() for part in (*sizes, "words"))


@pytest.mark.parametrize("text, parts", [
    ("code=0.7:a/b prose=0.3:c d.txt", {"code": (0.7, "a/b"), "prose": (0.3, "c d.txt")}),
    ("x=1:stdlib", {"x": (1.0, "stdlib")}),
    ("folder", None),
    ("mqar:pairs=8,vocab=256", None),
    ("C:/folder x=1:y", None),
])  # fmt: skip
def test_mixtures_are_read(text, parts):
    assert parse_mixture(text) == parts


@pytest.mark.parametrize("text, message", [
    ("a=0:x b=1:y", "a=0:.*weights above 0"),
    ("a=-1:x", "weights above 0"),
    ("a=nan:x", "weights above 0"),
    ("a=x:y", "weights above 0"),
    ("a=1:x a=2:y", "names that differ"),
    ("a=1:missing-file", "data: 'missing-file'"),
    ("a=1:stdlib b=1:parity", "data: 'parity'.*not tasks"),
])  # fmt: skip
def test_mixtures_that_are_none(text, message):
    with pytest.raises(InputError, match=message):
        open_data(text, 8)


# none leads out of the folder, because the disk may be large
PARTS = st.sampled_from(
    ["a=1:", "mqar:", "pairs=4", "stdlib", "./", "\0", " ", "x" * 300, "x/y"]
) | st.text(st.characters(exclude_characters="/."), max_size=4)


@few
@given(st.lists(PARTS, max_size=4).map("".join))
def test_any_name_is_data_or_refused_in_one_line(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("names")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "datasets", None)
        try:
            assert open_data(name, 64, cache=folder / "cache").describe()
        except InputError as error:
            assert len(str(error).splitlines()) == 1


# a cache used by several processes


def test_processes_wait_for_the_one_that_makes_tokens(prose, tmp_path):
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def child():
        data = open_data(str(prose), 16, "bpe(vocab=300)", cache=tmp_path / "cache")
        results.put(data.batch(0, 0, 4)[0].tolist())

    children = [context.Process(target=child) for _ in range(3)]
    for process in children:
        process.start()
    for process in children:
        process.join(120)
        assert process.exitcode == 0
    found = [results.get() for _ in children]
    assert found[0] == found[1] == found[2]
    assert len(list((tmp_path / "cache").glob("tokens-*/"))) == 1


def test_the_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"text" * 100))
    open_data(str(tmp_path / "x.txt.gz"), 8)
    assert list((tmp_path / "minimodels").glob("text-*/"))
