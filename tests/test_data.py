"""Text and tasks: the right tokens, and the same ones for every model with the same seed."""

import functools
import itertools
import os

import pytest
import torch

import minimodels.data.span
from minimodels.data.schedule import ramp
from minimodels.data.span import Piece, Span
from minimodels.data.text import Text, open_data
from minimodels.errors import InputError
from minimodels.ops.linear_cross_entropy import IGNORE


@pytest.fixture
def folder(tmp_path):
    for number in range(60):
        (tmp_path / f"{number:02}.txt").write_bytes(bytes([number]) * (number + 40))
    return tmp_path


def test_span_reads_across_files_without_joining_them(tmp_path):
    pieces = []
    for i, (start, stop) in enumerate([(0, 5), (5, 5), (5, 6), (6, 20)]):
        (tmp_path / str(i)).write_bytes(bytes([99, *range(start, stop), 99]))
        pieces.append(Piece(tmp_path / str(i), 1, 1 + stop - start))
    span = Span(pieces)
    assert len(span) == 20
    for start in range(19):
        for stop in range(start + 1, 21):
            assert span[start:stop].tolist() == list(range(start, stop))


def test_targets_are_the_next_tokens(folder):
    data = open_data(str(folder), 30)
    tokens, targets = data.batch(0, 0, 8)
    assert tokens.shape == targets.shape == (8, 30)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_a_batch_is_a_function_of_seed_and_step(folder):
    first, second = open_data(str(folder), 16), open_data(str(folder), 16)
    assert torch.equal(first.batch(3, 7, 4)[0], second.batch(3, 7, 4)[0])
    assert not torch.equal(first.batch(3, 7, 4)[0], first.batch(3, 8, 4)[0])
    assert not torch.equal(first.batch(3, 7, 4)[0], first.batch(4, 7, 4)[0])
    for one, other in zip(first.validation(4, 2), second.validation(4, 2), strict=True):
        assert torch.equal(one[0], other[0])


def test_of_many_files_some_are_held_out_and_never_trained_on(folder):
    for number in range(60, 250):
        (folder / f"{number}.txt").write_bytes(bytes([number]) * 40)
    data = open_data(str(folder), 30)
    held_out, training = (
        {piece.path.name for piece in data.spans[part].pieces}
        for part in ("validation", "training")
    )
    assert held_out
    assert not held_out & training
    assert len(held_out | training) == 250
    start = data.spans["training"][0:200].tolist()
    assert start == sorted(start)


def test_few_files_are_joined_and_split_by_position(folder):
    """The split does not depend on their names, so no file is held out whole."""
    joined = b"".join(file.read_bytes() for file in sorted(folder.iterdir()))
    (folder / os.fsdecode(b"\xff")).write_bytes(b"last")  # a name that is no text
    (folder / "run/checkpoints/step-1").mkdir(parents=True)
    # files that a training run has written are not text
    for name in ("checkpoints/step-1/progress.json", "log.jsonl"):
        (folder / "run" / name).write_bytes(b"not this")
    data = open_data(str(folder), 30)
    spans = [bytes(span[0 : len(span)].tolist()) for span in data.spans.values()]
    assert b"".join(spans) == joined + b"last"
    assert len(spans[1]) == len(joined + b"last") // 20


def test_the_fingerprint_tells_whether_files_have_changed(folder):
    before = open_data(str(folder), 30).fingerprint
    assert open_data(str(folder), 16).fingerprint == before
    (folder / "00.txt").write_bytes(b"another length")
    assert open_data(str(folder), 30).fingerprint != before


def test_more_files_than_a_process_may_open(folder, monkeypatch):
    few = functools.lru_cache(2)(minimodels.data.span.open_file.__wrapped__)
    monkeypatch.setattr(minimodels.data.span, "open_file", few)
    span = open_data(str(folder), 30).spans["training"]
    assert span[0 : len(span)].tolist() == sorted(span[0 : len(span)].tolist())
    assert few.cache_info().currsize == 2


def test_one_file_is_split_by_position(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(bytes(range(200)) * 5)
    data = open_data(str(file), 10)
    assert [len(span) for span in data.spans.values()] == [950, 50]
    assert bytes(data.spans["validation"][0:50].tolist()) == file.read_bytes()[950:]


def test_stdlib_is_pythons_own_source_without_its_tests():
    data = open_data("stdlib", 64)
    assert len(data.spans["training"]) > 3_000_000
    assert len(data.spans["validation"]) > 50_000
    assert b"import" in bytes(data.spans["training"][0:100_000].tolist())
    assert data.vocab == 256


def test_selective_copying_asks_for_what_is_not_noise():
    tokens, targets = open_data("copying(tokens=4, vocab=8)", 20).batch(0, 0, 50)
    assert tokens.shape == (50, 20)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert row[16:] == [1] * 4
        assert [token for token in row[:16] if token] == answers[16:]
        assert set(answers[:16]) == {IGNORE}
    assert tokens.max() == 7


def test_induction_asks_what_followed_the_special_token():
    tokens, targets = open_data("induction(vocab=6)", 12).batch(0, 0, 200)
    places = set()
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert row.count(5) == 2
        place = row.index(5)
        places.add(place)
        assert answers == [IGNORE] * 11 + [row[place + 1]]
        assert row[11] == 5
    assert places == set(range(10))


def test_recall_asks_keys_for_their_values():
    tokens, targets = open_data("mqar(pairs=5, vocab=40)", 32).batch(0, 0, 100)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(pairs) == 5
        assert all(key < 20 <= value for key, value in pairs.items())
        asked = {at: answer for at, answer in enumerate(answers) if answer != IGNORE}
        assert {row[at]: answer for at, answer in asked.items()} == pairs
        assert min(asked) >= 10


def test_tasks_repeat_on_a_seed_and_hold_out_validation():
    for name in (
        "copying(tokens=4)",
        "induction",
        "mqar(pairs=4, vocab=64)",
        "overwrite",
        "parity",
        "s3",
    ):
        task = open_data(name, 32)
        assert torch.equal(task.batch(1, 2, 3)[0], task.batch(1, 2, 3)[0])
        assert not torch.equal(task.batch(1, 2, 3)[0], next(task.validation(3, 1))[0])


@pytest.mark.parametrize(
    "name, context, message",
    [
        ("no-such-file", 8, "data: 'no-such-file'"),
        ("mqar(queries=4)", 64, "pairs, vocab"),
        ("mqar(pairs=x)", 64, "data: mqar.pairs: 'x'.*a whole number from 1"),
        ("mqar(pairs=40, vocab=64)", 400, "80 or more"),
        ("copying", 31, "context: 31"),
        ("induction", 2, "context: 2"),
        ("overwrite(keys=40)", 400, "80 or more"),
        ("overwrite(keys=8)", 23, "context: 23"),
        ("parity(vocab=3)", 8, "no options"),
        ("s3()", 0, "context: 0"),
    ],
)
def test_refuses(name, context, message):
    with pytest.raises(InputError, match=message):
        open_data(name, context)


@pytest.mark.parametrize("size", [0, 5, 100])
def test_refuses_a_file_too_short(tmp_path, size):
    file = tmp_path / "short"
    file.write_bytes(b"a" * size)
    with pytest.raises(InputError, match="context \\+ 1 = 65"):
        open_data(str(file), 64)


def test_refuses_an_empty_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="a folder with files .*there is no file in it"):
        open_data(str(tmp_path), 8)


def test_every_window_can_be_drawn(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(200)))
    training, validation = (
        Span([Piece(tmp_path / "text", *span)]) for span in ((0, 12), (100, 130))
    )
    tokens, targets = Text(training, validation, 10).batch(0, 0, 50)
    assert (set(tokens[:, 0].tolist()), set(targets[:, -1].tolist())) == ({0, 1}, {10, 11})


def test_validation_windows_reach_over_all_that_is_held_out(tmp_path):
    (tmp_path / "text").write_bytes(bytes(1900) + bytes(range(1, 101)))
    batches = list(open_data(str(tmp_path / "text"), 9).validation(4, 3))
    assert [len(tokens) for tokens, _ in batches] == [4, 4, 4]
    starts = torch.cat([tokens[:, 0] for tokens, _ in batches])
    assert starts.tolist() == [int(1 + i * 90 / 11) for i in range(12)]
    assert batches[-1][1][-1, -1] == 100


def test_what_is_held_out_does_not_depend_on_where_the_folder_lies(folder):
    (folder / "a").mkdir()
    for number in range(250):
        (folder / f"a/{number}").write_bytes(bytes([number]) * 40)
    before = open_data(str(folder / "a"), 16)
    held_out = [piece.path.name for piece in before.spans["validation"].pieces]
    (folder / "a").rename(folder / "b")
    after = open_data(str(folder / "b"), 16)
    assert [piece.path.name for piece in after.spans["validation"].pieces] == held_out
    assert after.fingerprint == before.fingerprint


def test_recall_asks_for_most_keys_early_and_for_some_at_the_end():
    _, targets = open_data("mqar(pairs=2, vocab=8)", 64).batch(0, 0, 2000)
    asked = (targets != IGNORE).sum(0)
    assert asked.nonzero().flatten().tolist() == list(range(4, 64, 2))
    assert asked[4] > 5 * asked[40:].max()
    values = set(targets[targets != IGNORE].tolist())
    assert values == {4, 5, 6, 7}


def test_no_two_batches_are_alike(folder):
    for name in (
        str(folder),
        "copying(tokens=4)",
        "induction",
        "mqar(pairs=4, vocab=64)",
        "overwrite",
        "s3",
    ):
        task = open_data(name, 32)
        batches = [task.batch(seed, step, 3)[0] for seed in range(3) for step in range(3)]
        batches += [tokens for tokens, _ in task.validation(3, 3)]
        assert len({tuple(tokens.flatten().tolist()) for tokens in batches}) == 12


def test_tasks_use_their_whole_vocabulary():
    tokens, targets = open_data("copying(tokens=4, vocab=8)", 20).batch(0, 0, 200)
    assert (
        set(targets[:, 16:].flatten().tolist())
        == set(tokens[:, :16].flatten().tolist()) - {0}
        == set(range(2, 8))
    )
    tokens, _ = open_data("mqar(pairs=2, vocab=8)", 20).batch(0, 0, 200)
    assert set(tokens[:, 5::2].flatten().tolist()) == set(range(8))


def test_the_fingerprint_tells_whether_files_have_other_names(folder):
    before = open_data(str(folder), 30).fingerprint
    (folder / "00.txt").rename(folder / "00.text")
    assert open_data(str(folder), 30).fingerprint != before


def test_overwritten_keys_are_asked_for_their_last_value():
    for context in (31, 32):
        tokens, targets = open_data("overwrite(keys=5, vocab=24)", context).batch(0, 0, 100)
        assert tokens.shape == targets.shape == (100, context)
        changed = 0
        for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
            assert set(answers[:-5]) == {IGNORE}
            pairs = row[(context - 5) % 2 : -5]
            memory = {}
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                assert key < 12 <= value < 24
                changed += key in memory
                memory[key] = value
            assert len(memory) == 5
            assert sorted(row[-5:]) == sorted(memory)
            assert [memory[key] for key in row[-5:]] == answers[-5:]
        assert changed == 100 * 8


def test_parity_is_that_of_the_ones_so_far():
    tokens, targets = open_data("parity", 33).batch(0, 0, 20)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert answers == [sum(row[: t + 1]) % 2 for t in range(33)]
    assert set(tokens.flatten().tolist()) == {0, 1}


def test_s3_multiplies_permutations_in_their_order():
    """Each permutation moves the things to which the earlier ones have been applied."""
    permutations = list(itertools.permutations(range(3)))
    tokens, targets = open_data("s3", 17).batch(0, 0, 20)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        places = [0, 1, 2]  # where each thing is
        for token, answer in zip(row, answers, strict=True):
            places = [permutations[token][place] for place in places]
            assert permutations[answer] == tuple(places)
    assert set(tokens.flatten().tolist()) == set(range(6))


def test_a_task_of_another_context_is_the_same_task():
    for name in (
        "copying(tokens=4)",
        "induction",
        "mqar(pairs=4, vocab=64)",
        "overwrite",
        "parity",
    ):
        longer = open_data(name, 32).batch(1, 2, 3, context=48)
        assert all(map(torch.equal, longer, open_data(name, 48).batch(1, 2, 3)))


@pytest.mark.parametrize(
    "text, progress, values",
    [
        ("context=256:2048@0.5", 0.0, {"context": 256}),
        ("context=256:2048@0.5", 0.25, {"context": 1024}),
        ("context=256:2048@0.5", 0.499, {"context": 1792}),
        ("context=256:2048@0.5", 0.5, {"context": 2048}),
        ("context=256:2048@0.5", 2.0, {"context": 2048}),
        ("context=100:250", 0.99, {"context": 200}),
        ("context=100:250", 1.0, {"context": 250}),
        ("batch_size=32:8@0.4", 0.1, {"batch_size": 24}),
        ("batch_size=32:8@0.4", 0.4, {"batch_size": 8}),
        ("context=8:8  batch_size=1:3", 0.5, {"context": 8, "batch_size": 2}),
        ("", 0.5, {}),
    ],
)
def test_ramp(text, progress, values):
    found = ramp(text, progress)
    assert found == values
    assert all(type(value) is int for value in found.values())


def test_ramp_of_weights():
    assert ramp("code=0.8:0.2@0.5", 0.25, ("code",)) == {"code": 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "context",
        "context=256",
        "context=256:0",
        "context=2.5:8",
        "context=8:16@0",
        "context=8:16@1.5",
        "context=8:16@nan",
        "depth=1:2",
        "context=-8:16",
        "batch_size=8:inf",
        "context=1:2 context=2:3",
    ],
)
def test_ramp_refuses(text):
    with pytest.raises(InputError, match="^ramp: "):
        ramp(text, 0.5)
