"""Text to tokens and back, and continuing published models from the command line."""

import json
import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimodels import LM, Config, InputError, from_pretrained, save_pretrained
from minimodels.data.tokenizer import Bytes, TokenizerFile, open_tokenizer, read_end
from minimodels.generate import Sampling, generate
from minimodels.sample import Options, main

TEXT = "def añadir(x):\n    return x + 1  # 日本\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published model with its own byte-level tokenizer, which puts <s> before a text."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizer.json needs the extra `hub`")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 0)]
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published") / "model"
    save_pretrained(LM(Config(width=16, layers="attention mlp", vocab=300)), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("text", [TEXT, "", "a", "\udcff"])
def test_bytes_give_the_text_back(text):
    tokens = Bytes().encode(text)
    for cut in range(len(tokens) + 1):
        streamed = "".join(Bytes().stream(tokens[:cut], [*tokens[cut:].tolist(), 300]))
        assert streamed == text.encode("utf-8", "surrogateescape").decode(errors="replace")


def test_a_tokenizer_file_gives_the_text_back(folder):
    tokenizer = TokenizerFile(folder)
    tokens = tokenizer.encode(TEXT)
    assert tokens[0] == 0 and len(tokens) < len(TEXT.encode())
    for cut in (1, 5, len(tokens)):
        assert "".join(tokenizer.stream(tokens[:cut], tokens[cut:].tolist())) == TEXT


def test_what_a_command_line_could_not_decode_is_encoded(folder):
    assert len(TokenizerFile(folder).encode("a\udcff"))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    """A tokenizer that falls back to bytes and writes spaces into its
    words, as SentencePiece does."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "<s>": 1, "\u2581he": 2, "llo": 3, "\u2581": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(["<s>", "<unk>"])
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    folder = tmp_path_factory.mktemp("fallback")
    tokenizer.save(str(folder / "tokenizer.json"))
    return TokenizerFile(folder)


HE, LLO, A, BROKEN = 2, 3, 5 + 0x41, 5 + 0x80


@pytest.mark.parametrize(
    "tokens, text",
    [
        ([HE, LLO], "hello"),
        ([1, HE, LLO, 1, HE], "hello he"),
        ([HE, A, BROKEN, HE, HE], "heA\ufffd he he"),
        ([BROKEN, HE], "\ufffd he"),
        ([4, HE], " he"),
        ([A, HE], "A he"),
        (
            [HE, BROKEN, BROKEN, BROKEN, 5 + 0xE6, 5 + 0x97, 5 + 0xA5, LLO],
            "he\ufffd\ufffd\ufffd日llo",
        ),
        ([HE, 5 + 0xE6, 5 + 0x97, LLO, HE], "he\ufffdllo he"),
        ([*[BROKEN] * 50, HE], "\ufffd" * 50 + " he"),
        ([HE, 5 + 0xE6], "he\ufffd"),
        ([HE, 999, LLO], "hello"),
    ],
)
def test_bytes_that_are_no_text_drop_no_token(fallback, tokens, text):
    for cut in range(len(tokens) + 1):
        assert "".join(fallback.stream(torch.tensor(tokens[:cut]), tokens[cut:])) == text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 4), st.sampled_from("añ日☃\n")), max_size=12))
def test_streamed_text_is_the_decoded_text(fallback, parts):
    tokens = []
    for part in parts:
        tokens += [part] if type(part) is int else [5 + byte for byte in part.encode()]
    assert "".join(fallback.stream(torch.tensor([], dtype=torch.int64), tokens)) == (
        fallback.tokenizer.decode(tokens)
    )


def test_a_character_comes_when_it_is_whole(fallback):
    stream = fallback.stream(torch.tensor([HE]), [5 + 0xE6, 5 + 0x97, 5 + 0xA5, A])
    assert list(stream) == ["he", "", "", "日", "A", ""]


def test_words_that_are_pieced_together_stream(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "un": 1, "##believ": 2, "##able": 3, "news": 4, ".": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    file = TokenizerFile(tmp_path)
    tokens = [1, 2, 3, 4, 4, 5, 1, 3]
    assert file.token_bytes == {}
    assert (
        "".join(file.stream(torch.tensor(tokens[:2]), tokens[2:]))
        == "unbelievable news news. unable"
    )


def test_truncation_and_padding_of_a_file_are_switched_off(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
        "pad_type_id": 0, "pad_token": "</s>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for text in ("a", TEXT * 5):
        assert torch.equal(TokenizerFile(tmp_path).encode(text), TokenizerFile(folder).encode(text))


def test_special_files_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="tokenizer.json: .*regular"):
        TokenizerFile(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="tokenizer.json: .*regular"):
        TokenizerFile(tmp_path)
    for spec in (tmp_path / "tokenizer.json", "/dev/zero"):
        with pytest.raises(InputError, match="^tokenizer: "):
            open_tokenizer(str(spec))


@pytest.fixture(scope="module")
def plain_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    Bytes().save(folder)
    return folder


HOSTILE = (
    "".join(map(chr, range(0x180))) + "\ufeff \u2028<s></s>[UNK] \r\n日本 \U0010ffff ''s  a , b ."
)


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.text(max_size=40), st.just(HOSTILE)))
def test_other_programs_read_and_write_bytes(plain_bytes, text):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(plain_bytes / "tokenizer.json"))
    tokens = list(text.encode())
    assert tokenizer.encode(text).ids == tokens
    assert tokenizer.decode(tokens) == text
    file = TokenizerFile(plain_bytes)
    assert file.encode(text).tolist() == tokens and file.vocab == 256 and not file.end
    assert "".join(file.stream(torch.tensor(tokens[:3], dtype=torch.int64), tokens[3:])) == text


def test_transformers_reads_and_writes_bytes(plain_bytes):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain_bytes)
    assert tokenizer(HOSTILE)["input_ids"] == list(HOSTILE.encode())
    assert tokenizer.decode(list(HOSTILE.encode())) == HOSTILE
    assert len(tokenizer) == 256


def test_a_trained_tokenizer_is_that_of_other_programs(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = open_tokenizer("bpe(vocab=280)", [TEXT] * 10)
    assert tokenizer.vocab == 280 and tokenizer.end == {0}
    tokenizer.save(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode(TEXT).ids == tokenizer.encode(TEXT).tolist()
    assert len(other.encode(TEXT).ids) < len(TEXT.encode())
    assert other.decode(other.encode(HOSTILE).ids) == HOSTILE
    again = open_tokenizer(str(tmp_path))
    assert (again.fingerprint, again.end) == (tokenizer.fingerprint, {0})
    assert "".join(again.stream(again.encode(HOSTILE), [0])) == HOSTILE


def test_documents_end_with_a_token_of_the_tokenizer(folder, tmp_path):
    assert TokenizerFile(folder).separator == 1  # </s>
    for name, ends in (("other", [999, 7]), ("none", [999])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        (tmp_path / name / "config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert TokenizerFile(tmp_path / "other").separator == 7
    assert TokenizerFile(tmp_path / "none").separator == 1


def test_tokenizers_are_named():
    assert isinstance(open_tokenizer("bytes"), Bytes)
    assert open_tokenizer(" bpe ( vocab = 260 ) ", [TEXT]).vocab == 260
    assert open_tokenizer("bpe", [TEXT]).vocab < 8192  # the text has no more pairs
    for spec in ("bpe(vocab=256)", "bpe()x", "bpe(260)", "nothing"):
        with pytest.raises(InputError, match="^tokenizer: "):
            open_tokenizer(spec, [TEXT])
    with pytest.raises(InputError, match="no text is given"):
        open_tokenizer("bpe(vocab=260)")


def test_without_the_library_bytes_are_left(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    open_tokenizer("bytes").save(tmp_path)
    for spec in ("bpe(vocab=300)", str(tmp_path)):
        with pytest.raises(InputError, match=r"-e .\.\[hub\]"):
            open_tokenizer(spec, [TEXT])


def test_the_end_of_a_text_is_what_the_files_say(folder, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert TokenizerFile(tmp_path).end == frozenset()
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 1}))
    assert TokenizerFile(tmp_path).end == {1}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert TokenizerFile(tmp_path).end == {1, 7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["x"]}))
    with pytest.raises(InputError, match="eos_token_id: .'x'."):
        TokenizerFile(tmp_path)


def test_a_published_model_is_continued_and_stops_where_it_ends(folder, capsys):
    options = Options(model=str(folder), prompt=TEXT, tokens=30, sampling=Sampling(temperature=0))
    main(options)
    written = capsys.readouterr().out
    assert written.startswith(TEXT) and len(written) > len(TEXT) + 1
    main(
        Options(
            model=str(folder),
            prompt=TEXT,
            tokens=30,
            sampling=Sampling(temperature=0),
            dtype="bfloat16",
        )
    )
    assert capsys.readouterr().out.startswith(TEXT)

    tokenizer, config = TokenizerFile(folder), folder / "config.json"
    (first,) = (
        int(token)
        for token in generate(
            from_pretrained(folder), [tokenizer.encode(TEXT)], 1, options.sampling
        )
    )
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "eos_token_id": first}))
    try:
        main(options)
    finally:
        config.write_text(before)
    assert capsys.readouterr().out == TEXT + "\n"


@pytest.mark.parametrize("content", [None, "{}", "not JSON"])
def test_a_tokenizer_that_is_missing_or_damaged_is_told(folder, tmp_path, content):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer.json"):
        TokenizerFile(tmp_path)


def test_options_of_sampling_are_checked(folder):
    for field, value in {"dtype": "int8", "seed": -1, "device": "tpu"}.items():
        with pytest.raises(InputError, match=field):
            main(Options(**{"model": str(folder), field: value}))


def test_generation_config_need_not_name_an_end(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True}))
    assert read_end(tmp_path) == {1}


def test_a_character_that_is_cut_off_shows():
    assert "".join(Bytes().stream(torch.tensor([97]), [0xE6, 0x97])) == "a\ufffd"
