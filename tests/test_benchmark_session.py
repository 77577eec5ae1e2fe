"""The session that measures a GPU, rehearsed at toy sizes: every branch runs, and a failure
affects only its own rows."""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from minimodels.kernels import OPERATIONS

from benchmarks import all as everything
from benchmarks import checks, journal, races, summary, sweep, table, whole
from benchmarks.journal import Journal, OutOfTime, limit, read_rows
from benchmarks.session import Job, Session, work
from minimodels import InputError
from minimodels.command import parse_options
from minimodels.presets import MAIN

pytest.importorskip("triton")
CPU = torch.device("cpu")
NORM = next(race for race in races.FIRST if race.operation == "rmsnorm")
CONVOLUTION = next(race for race in races.FIRST if race.operation == "causal_conv1d")


@pytest.fixture
def session(tmp_path) -> Session:
    limits = {"GB/s": 1.0, "TFLOP/s": 1.0}
    return Session(Journal(tmp_path / "rows.jsonl", time.monotonic() + 300, {}), CPU, True, limits)


def statuses(rows: list[dict], **wanted) -> set[str]:
    """The status of each row that has these values."""
    return {
        row["status"]
        for row in rows
        if all(row.get(name) == value for name, value in wanted.items())
    }


def code(text: str):
    """Make this Python code the check of every operation."""
    return lambda operation: [sys.executable, "-c", text.replace("OPERATION", operation)]


def test_a_rehearsal_runs_every_branch(tmp_path):
    out = tmp_path / "dry"
    command = [sys.executable, "-m", "benchmarks.all", "--dry", "--minutes", "9", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "everything was measured" in done.stdout, done.stderr
    rows = read_rows(out / "rows.jsonl")
    assert {row["status"] for row in rows} == {"done", "skipped"}
    assert {row["job"] for row in rows} >= {job.name for job in everything.plan(True)}
    for operation in OPERATIONS:
        ways = {"both"} if operation == "linear_cross_entropy" else {"forward", "backward"}
        timed = [row for row in rows if row.get("operation") == operation and row.get("seconds")]
        assert {(row["provider"], row["direction"]) for row in timed} >= {
            (provider, way) for provider in ("torch", "triton") for way in ways
        }
        assert all(row["off"] < races.TOLERANCE for row in timed if row["provider"] == "triton")
    trained = [row for row in rows if row["benchmark"] == "training"]
    assert {row["model"] for row in trained} == {
        f"{name}, {impl}" for name in MAIN for impl in ("torch", "triton")
    }
    assert all(row["seconds"] and len(row["losses"]) == 2 for row in trained)
    files = {path.name for path in out.iterdir()}
    pictures = {f"throughput-{mode}.png" for mode in ("train", "prefill", "decode-1")}
    pictures.add("operations.png")
    assert files == {"rows.jsonl", "checks.txt", "tables.md", *pictures} and len(files) <= 8
    tables = (out / "tables.md").read_text()
    assert "| `selective_scan` backward |" in tables and "| `hybrid` |" in tables


def test_a_wrong_kernel_loses_its_own_rows_alone(tmp_path, monkeypatch):
    module = importlib.import_module("minimodels.kernels.selective_scan")
    right = module.selective_scan

    def wrong_gradient(x, *rest):
        y = right(x, *rest)
        y = y[0] if isinstance(y, tuple) else y
        return y.detach() + 1.02 * (y - y.detach())

    monkeypatch.setattr(module, "selective_scan", wrong_gradient)
    monkeypatch.setattr(checks, "command", code("pass"))
    plan = races.jobs([races.FIRST[0], NORM])
    monkeypatch.setattr(everything, "plan", lambda toy: plan)
    everything.main(everything.Options(out=tmp_path / "a", dry=True))
    rows = read_rows(tmp_path / "a/rows.jsonl")
    scan = {"operation": "selective_scan"}
    assert statuses(rows, provider="triton", **scan) == {"wrong"}
    assert statuses(rows, provider="torch", **scan) == {"done"}
    assert statuses(rows, operation="rmsnorm") == {"done", "skipped"}
    (row,) = (row for row in rows if row["status"] == "wrong")
    assert row["off"] == pytest.approx(0.02, rel=1e-3) and "seconds" not in row


def test_a_failed_check_costs_its_kernel_alone(session, monkeypatch, tmp_path):
    text = (
        "import sys, time; print('looks bad', flush=True)\n"
        "if 'OPERATION' == 'attention': time.sleep(60)\n"
        "sys.exit(3 * ('OPERATION' == 'rmsnorm'))"
    )
    monkeypatch.setattr(checks, "command", code(text))
    start = time.monotonic()
    log = tmp_path / "checks.txt"
    checks.check(("rmsnorm", "attention", "causal_conv1d"), 3, session.journal, log, CPU)
    assert time.monotonic() - start < 10  # at once, and stopped in time
    ends = {row["operation"]: row["status"] for row in session.journal.rows}
    assert ends == {"rmsnorm": "wrong", "attention": "cut off", "causal_conv1d": "done"}
    assert log.read_text().count("looks bad") == 3
    session.unproven = checks.unproven(session.journal.rows)
    assert list(session.unproven) == ["rmsnorm", "attention"]
    assert "looks bad" in session.unproven["rmsnorm"]

    work(races.jobs([NORM, CONVOLUTION]), session)  # rmsnorm, causal_conv1d
    rows = session.journal.rows
    assert statuses(rows, operation="rmsnorm", provider="triton") == {"left out"}
    assert statuses(rows, operation="rmsnorm", provider="torch") == {"done"}
    assert statuses(rows, operation="causal_conv1d", provider="triton") == {"done"}
    whole.train("mod", session)
    whole.against_context("prefill", 8, session)
    rows = session.journal.rows
    for model in ("mod", "transformer", "mamba"):
        assert statuses(rows, model=f"{model}, torch") == {"done"}
        assert statuses(rows, model=f"{model}, triton") == {"left out"}


def test_a_session_goes_on_after_a_failed_check(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "command", code("import sys; sys.exit(1)"))
    plan = races.jobs([NORM])
    monkeypatch.setattr(everything, "plan", lambda toy: plan)
    everything.main(everything.Options(out=tmp_path / "out", dry=True))
    rows = read_rows(tmp_path / "out/rows.jsonl")
    assert statuses(rows, job="check rmsnorm") == {"wrong"}
    assert statuses(rows, job=NORM.name, provider="triton") == {"left out"}
    assert statuses(rows, job=NORM.name, provider="torch") == {"done"}


def test_each_check_has_a_cache_of_its_own(session, monkeypatch, tmp_path):
    text = "import os; print(os.environ['TRITON_CACHE_DIR'])"
    monkeypatch.setattr(checks, "command", code(text))
    monkeypatch.setenv("TRITON_CACHE_DIR", "shared")
    checks.check(("rmsnorm", "attention"), 30, session.journal, tmp_path / "log", CPU)
    caches = [line for line in (tmp_path / "log").read_text().splitlines() if line[:3] != "---"]
    assert len({*caches, "shared"}) == 3


def test_what_a_check_runs_is_the_kernels_own():
    assert checks.command("rmsnorm")[1:] == ["-m", "minimodels.kernels.rmsnorm", "--check-only"]


def test_the_time_is_kept(tmp_path, monkeypatch):
    """A call that does not end is stopped, and jobs that found no time are named."""
    slow = Job("slow", lambda session: session.journal.attempt({"job": "slow"}, forever))
    monkeypatch.setattr(everything, "plan", lambda toy: [slow, *races.jobs(races.FIRST[:2])])
    monkeypatch.setattr(everything, "CLOSING", 1.0)
    limits = {"GB/s": 1.0, "TFLOP/s": 1.0}
    monkeypatch.setattr(everything, "ceilings", lambda device: limits)
    monkeypatch.setattr(checks, "command", code("pass"))
    start = time.monotonic()
    everything.main(everything.Options(out=tmp_path / "a", dry=True, minutes=6 / 60))
    assert time.monotonic() - start < 9
    rows = read_rows(tmp_path / "a/rows.jsonl")
    assert statuses(rows, job="slow") == {"cut off"}
    assert {row["job"] for row in rows if row["status"] == "no time"} == {
        race.name for race in races.FIRST[:2]
    }
    assert (tmp_path / "a/tables.md").exists()


def forever() -> None:
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # as a library may do
            continue


def test_a_provider_that_fails_or_lacks_memory_is_a_row(session, monkeypatch):
    module = importlib.import_module("minimodels.kernels.rmsnorm")

    def lacks(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def breaks(*arguments):
        raise KeyError("no such thing")

    peer = module.PEERS["transformers"]
    peers = {"a": replace(peer, call=lacks), "b": replace(peer, call=breaks), "c": peer}
    race = replace(NORM, peers=lambda module: peers)
    races.run(race, session)
    rows = session.journal.rows
    ends = {name: statuses(rows, provider=name) for name in ("torch", "triton", "a", "b", "c")}
    assert ends == {"torch": {"done"}, "triton": {"done"}, "a": {"out of memory"}, "b": {"failed"}, "c": {"done"}}  # fmt: skip
    assert [row["error"] for row in rows if row.get("provider") == "b"] == ["KeyError: 'no such thing'"]  # fmt: skip


def test_nothing_is_compared_with_a_torch_path_that_fails(session, monkeypatch):
    module = importlib.import_module("minimodels.kernels.rmsnorm")
    monkeypatch.setattr(module, "operation", lambda *arguments, impl: 1 / 0)
    races.run(NORM, session)
    assert statuses(session.journal.rows) == {"failed", "left out"}


def test_every_row_is_on_disk_when_it_is_made(session):
    session.journal.add("done", job="a")
    assert read_rows(session.journal.path) == [{"job": "a", "status": "done"}]
    with session.journal.path.open("a") as file:
        file.write('{"job": "cut sh')
    assert [row["job"] for row in read_rows(session.journal.path)] == ["a"]


def test_a_lost_gpu_is_left_behind(session, monkeypatch):
    restarted = []
    session.journal.restart = lambda: restarted.append(True)
    row = {"job": "a", "operation": "rmsnorm", "provider": "triton"}
    assert session.journal.attempt(row, lambda: 1 / 0) is None  # the GPU still answers
    assert not restarted

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(journal, "synchronise", lost)
    with pytest.raises(RuntimeError):
        session.journal.attempt(row, lost)
    assert restarted == [True]
    assert [row["status"] for row in session.journal.rows] == ["failed", "failed", "lost"]
    assert "rmsnorm" in checks.unproven(session.journal.rows)


def test_a_call_that_hangs_is_left_behind(tmp_path):
    """The call runs no Python code, so only another thread can end it."""
    text = f"""
import os, threading, time
from pathlib import Path
from benchmarks import journal
journal.GRACE = 0.3
held = threading.Lock(); held.acquire()
restart = lambda: os.execv("/bin/echo", ["echo", "restarted"])
made = journal.Journal(Path({str(tmp_path / "rows.jsonl")!r}), time.monotonic() + 60, {{}}, restart)
import signal
signal.setitimer = lambda *_: None  # as if no Python ran
made.attempt({{"job": "hangs"}}, held.acquire, 0.2)
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("restarted\n"), done.stderr
    assert statuses(read_rows(tmp_path / "rows.jsonl"), job="hangs") == {"lost"}


def test_a_session_goes_on_with_the_time_and_the_rows_that_it_has(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(everything.os, "execv", lambda path, command: started.append(command))
    options = everything.Options(out=tmp_path, minutes=9, dry=True, again=tmp_path)
    everything.start_again(options, time.monotonic() + 120)
    ((_, *arguments),) = started
    assert arguments[:2] == ["-m", "benchmarks.all"]
    parsed = parse_options(everything.Options, "", arguments=arguments[2:])
    assert parsed == replace(options, resume=True, minutes=pytest.approx(2, abs=0.1))
    jobs = [Job(name, print) for name in "abc"]
    rest = everything.remaining(jobs, [], [{"job": "b", "status": "lost"}])
    assert [job.name for job in rest] == ["a", "c"]


def test_a_limit_ends_calls_that_catch_exceptions():
    start = time.monotonic()
    with pytest.raises(OutOfTime), limit(0.2):
        forever()
    assert time.monotonic() - start < 2
    time.sleep(0.25)  # no alarm is left


def test_again_repeats_what_failed_then_sweeps_then_does_what_was_missed():
    jobs = [Job(name, print) for name in ("right", "late", "failed", "never", "unchecked")]
    ends = {"right": "done", "late": "no time", "failed": "wrong", "unchecked": "left out"}
    earlier = [{"job": job, "status": status} for job, status in ends.items()]
    earlier += [{"job": "failed", "status": "done"}, {"job": "right", "status": "skipped"}]
    # and would fail again
    earlier.append({"job": "right", "status": "failed", "provider": "liger"})
    names = [job.name for job in everything.remaining(jobs, earlier, [])]
    swept = [job.name for job in sweep.jobs()]
    assert names == ["failed", *swept, "late", "never", "unchecked"]


def test_again_checks_only_what_is_not_known_to_be_right(tmp_path, monkeypatch):
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    row = {"benchmark": "check", "job": "check rmsnorm", "operation": "rmsnorm", "status": "done"}
    checked = []

    def note(operations, seconds, *rest):
        checked.append(tuple(operations))

    monkeypatch.setattr(checks, "check", note)
    monkeypatch.setattr(everything, "remaining", lambda *arguments: [])
    monkeypatch.setattr(everything, "environment", lambda device: {"commit": "abc"})
    for name, known in {"same": {"commit": "abc"}, "other": {"commit": "abd"}}.items():
        (earlier / "rows.jsonl").write_text(json.dumps({**row, **known}) + "\n")
        options = everything.Options(out=tmp_path / name, dry=True, again=earlier)
        everything.main(options)
    assert checked == [("rmsnorm",)]  # only after a change of commit
    with pytest.raises(InputError, match="--resume"):
        everything.main(options)
    with pytest.raises(InputError, match="again: .* rows.jsonl"):
        everything.main(replace(options, again=tmp_path / "nowhere"))


def test_the_sweep_times_the_settings_of_the_kernel_file(session, monkeypatch):
    """Each reaches the launches of both passes, and the split of time."""
    module = importlib.import_module("minimodels.kernels.selective_scan")
    before, launched, split = dict(vars(module)), set(), set()
    sizes_of, divide = module.sizes_of, module.divide

    def note_sizes(x, N, interval, steps, registers):
        launched.add((interval, steps, registers))
        return sizes_of(x, N, interval, steps, registers)

    def note_split(*given):
        split.add((module.WHOLE, module.RESIDENT))
        return divide(*given)

    monkeypatch.setattr(module, "sizes_of", note_sizes)
    monkeypatch.setattr(module, "divide", note_split)
    sweep.sweep(sweep.SIZES[0], session)
    timed = [row for row in session.journal.rows if row.get("seconds")]
    assert len(timed) == 2 * len({row["provider"] for row in timed}) == 2 * (1 + len(module.SWEEP))
    assert launched >= {(64, 4, 64), (64, 4, None), (64, 4, 96), (32, 2, None), (32, 2, 168)}
    assert split >= {(4, 8), (8, 8), (16, 8), (8, 12)}
    assert all(getattr(module, name) == before[name] for name in ("WHOLE", "STEPS", "REGISTERS"))


def test_a_setting_that_is_wrong_is_not_timed(session, monkeypatch):
    module = importlib.import_module("minimodels.kernels.selective_scan")
    right = module.selective_scan
    monkeypatch.setattr(module, "SWEEP", [{"WHOLE": 4}])
    monkeypatch.setattr(
        module, "selective_scan", lambda *given: (right(*given)[0] * (1 + (module.WHOLE == 4)),)
    )
    sweep.sweep(sweep.SIZES[0], session)
    assert statuses(session.journal.rows, provider="as it is") == {"done"}
    assert statuses(session.journal.rows, provider="WHOLE 4") == {"wrong"}


def test_what_is_missing_or_not_a_number_is_wrong():
    one, two = torch.ones(2), torch.ones(2, 1)
    assert races.distance([one, None], [one, None]) == 0
    assert races.distance([1.01 * one], [one]) == pytest.approx(0.01, rel=1e-3)
    for results in ([None], [two], [one * torch.nan], [one * torch.inf]):
        assert races.distance(results, [one]) == torch.inf


def test_decoding_reads_the_keys_of_every_group_once():
    module = importlib.import_module("minimodels.kernels.attention")
    made = races.decoding(module, 32, 8, 2, 16)
    q, k, v = made.inputs()
    assert (q.shape, k.shape, v.shape) == ((1, 8, 1, 16), (1, 2, 32, 16), (1, 2, 32, 16))
    assert made.forward == k.numel() + v.numel()


def test_every_operation_races():
    assert {race.operation for race in races.FIRST + races.LATER} >= {*OPERATIONS}
    assert not races.jobs([races.Race("no_such_kernel", (1,), (1,))])
    assert len({job.name for job in everything.plan(False)}) == len(everything.plan(False))
    assert [job.name for job in everything.plan(False)][-1].startswith("attention flex")


def test_models_whose_losses_differ_are_not_timed(session, monkeypatch):
    real = whole.start

    def off(config, *rest):
        call, losses, memory = real(config, *rest)
        return call, [loss * (1.02 if config.impl == "triton" else 1) for loss in losses], memory

    monkeypatch.setattr(whole, "start", off)
    whole.train("transformer", session)
    ends = {row["impl"]: row["status"] for row in session.journal.rows}
    assert ends == {"torch": "done", "triton": "wrong"}


def test_a_failing_path_leaves_the_other(session, monkeypatch):
    real = whole.start

    def fails(config, *rest):
        return 1 / 0 if config.impl == "triton" else real(config, *rest)

    monkeypatch.setattr(whole, "start", fails)
    whole.train("transformer", session)
    ends = {row["impl"]: row["status"] for row in session.journal.rows}
    assert ends == {"torch": "done", "triton": "failed"}


def test_tables_name_the_paths_that_were_not_timed():
    row = {"benchmark": "training", "base": "mamba", "tokens": 100}
    rows = [
        {**row, "impl": "torch", "status": "done", "seconds": [1.0], "losses": [2.0], "share": 0.5},
        {**row, "impl": "triton", "status": "left out"},
    ]
    assert "| `mamba` | 100 | 2.0000, 50% | left out |  |  |" in table.training(rows)
    rows[1] |= {"status": "done", "seconds": [0.25], "losses": [2.0], "share": 1.0}
    assert "| 400 | 2.0000, 100% | 4.00x |" in table.training(rows)


def test_pictures_that_fail_end_nothing(session, monkeypatch, tmp_path):
    monkeypatch.setattr(summary.plot, "draw", lambda *arguments: 1 / 0)
    session.journal.add("done", benchmark="throughput", job="x", model="a again", mode="train")
    monkeypatch.setattr(summary.table, "throughput", lambda rows: "")
    summary.write(tmp_path, session.journal)
    assert statuses(session.journal.rows, job="pictures") == {"failed"}


def test_a_rehearsal_interprets(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(everything, "INTERPRETED", False)
    monkeypatch.setattr(everything.os, "execve", lambda *arguments: started.append(arguments))
    everything.main(everything.Options(out=tmp_path, dry=True))
    ((_, command, environment),) = started
    assert "--dry" in command and environment["TRITON_INTERPRET"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_memory_is_told_of_training_on_a_gpu_alone(session):
    call, losses, memory = whole.start(whole.config_of("transformer", "torch", True), 1, 8, session)
    assert memory is None and len(losses) == 2
    assert float(call()) < losses[0]  # the same tokens every time
