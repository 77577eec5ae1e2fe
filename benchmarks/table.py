"""Prints Markdown tables from measured rows, in the form of the README.

    python -m benchmarks.table benchmarks/results/cpu/throughput.jsonl
    python -m benchmarks.table benchmarks/results/cpu/peers.jsonl

Each kind of row in a file has its own table.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro

from minimodels import InputError
from minimodels.command import parse_options, run_command
from minimodels.measure import per_second, ratio

from .plot import Rows, at_best_rate, read


@dataclass(frozen=True)
class Options:
    """Print tables of result files."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """files of JSON rows"""


def main(options: Options) -> None:
    """One table for each kind of row in each file."""
    if not options.results:
        raise InputError("results", "", "one or more files of JSON rows")
    for path in options.results:
        rows = read(path)
        found = [make(rows) for make in (throughput, training, peers, kernels, claims)]
        if not any(found):
            raise InputError(
                "results", str(path), "rows of benchmarks.all, throughput, peers, kernels or claims"
            )
        for table in filter(None, found):
            print(table)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table, with a line of text after it."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def throughput(rows: Rows) -> str:
    """Median tokens per second: a table for each mode and batch, a row for each model, a
    column for each context."""
    tables = defaultdict(dict)
    for row in rows:
        if row.get("benchmark") == "throughput" and not row["model"].endswith(" again"):
            mode = f"decode, batch {row['batch']}" if row["mode"] == "decode" else row["mode"]
            speed = per_second(row["tokens"], row["seconds"]) if row["seconds"] else None
            failed = "out of memory" if "memory" in (row.get("error") or "memory") else "cannot run"
            tables[mode][row["model"], row["context"]] = f"{speed:,.0f}" if speed else failed
    texts = []
    for mode, cells in tables.items():
        models, contexts = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
        lines = [
            [f"`{model}`", *(cells.get((model, context), "") for context in contexts)]
            for model in models
        ]
        texts.append(
            markdown(
                [f"{mode}, tokens/s at context", *(f"{context:,}" for context in contexts)], lines
            )
        )
    return "\n".join(texts)


def peers(rows: Rows) -> str:
    """How many times faster ours is than each peer: median over the rounds, with the
    least and the greatest."""
    timings = defaultdict(dict)
    for row in rows:
        if row.get("benchmark") == "peers":
            timings[f"{row['model']}, {row['peer']}", row["question"]][row["provider"]] = row[
                "seconds"
            ]
    pairs, questions = (list(dict.fromkeys(key[i] for key in timings)) for i in (0, 1))
    cells = {}
    for (pair, question), samples in timings.items():
        (peer,) = set(samples) - {"minimodels"}
        cells[pair, question] = "{:.2f}x ({:.2f}-{:.2f})".format(
            *ratio(samples, "minimodels", peer)
        )
    lines = [[pair, *(cells.get((pair, question), "") for question in questions)] for pair in pairs]
    return markdown(["model, against", *questions], lines) if lines else ""


def training(rows: Rows) -> str:
    """Median tokens per second of training steps: a row for each model, a column for each path, and
    the gain of the kernels."""
    speeds, losses = defaultdict(dict), {}
    for row in rows:
        if row.get("benchmark") == "training" and "impl" in row:
            timed = row["status"] == "done"
            speed = per_second(row["tokens"], row["seconds"]) if timed else row["status"]
            speeds[row["base"]][row["impl"]] = speed
            if timed:
                losses[row["base"], row["impl"]] = f"{row['losses'][-1]:.4f}, {row['share']:.0%}"
    lines = []
    for model, by_path in speeds.items():
        cells = [by_path.get(impl, "") for impl in ("torch", "triton")]
        both = all(isinstance(cell, float) for cell in cells)
        cells = [f"{cell:,.0f}" if isinstance(cell, float) else cell for cell in cells]
        told = [losses.get((model, impl), "") for impl in ("torch", "triton")]
        gain = f"{by_path['triton'] / by_path['torch']:.2f}x" if both else ""
        lines.append([f"`{model}`", cells[0], told[0], cells[1], told[1], gain])
    said = "loss, share of the matrix products"
    head = ["training, tokens/s", "torch", said, "triton", said, "triton over torch"]
    return markdown(head, lines) if lines else ""


def kernels(rows: Rows, every: bool = False) -> str:
    """For the last case of each operation, or for `every` case: our time, the share of the
    machine's copying or multiplying rate, the memory, and how many times longer the others take.
    "Ours" is the kernel, or the torch path if the kernel was not timed."""
    cases = defaultdict(dict)
    for row in rows:
        if row.get("benchmark") == "kernels" and row.get("seconds"):
            cases[row["operation"], row["direction"]].setdefault(row["case"], {})[
                row["provider"]
            ] = row
    lines = []
    for (operation, direction), by_case in cases.items():
        for case, providers in list(by_case.items())[0 if every else -1 :]:
            ours = next((name for name in ("triton", "torch") if name in providers), None)
            if ours is not None:
                cells = against_others(providers, ours)
                lines.append([f"`{operation}` {direction}", case, *cells])
    return markdown(["operation", "case", "ours", "others take"], lines) if lines else ""


def against_others(providers: dict[str, dict], ours: str) -> list[str]:
    """Our time, and how many times longer the others take. `providers`: the rows
    of one case by provider."""
    row = providers[ours]
    took = [
        f"{statistics.median(row['seconds']) * 1e3:.2f} ms",
        f"{row['rate'] / row['ceiling']:.0%} of {row['unit']}",
    ]
    took += [f"{row['bytes'] / 1e6:,.0f} MB"] if row["bytes"] is not None else []
    texts = []
    for name, other in providers.items():
        # a slow provider was timed once, not in the same rounds
        gain = statistics.median(other["seconds"]) / statistics.median(row["seconds"])
        if len(other["seconds"]) == len(row["seconds"]):
            gain = ratio({"ours": row["seconds"], "other": other["seconds"]}, "ours", "other")[0]
        texts += [f"{name} {gain:.2f}x"] if name != ours else []
    return [f"{ours} {', '.join(took)}", ", ".join(texts)]


def claims(rows: Rows) -> str:
    """The last value of each line in each picture: mean over the seeds, with the
    least and the greatest."""
    texts, told = [], set()
    drawn = [row for row in rows if row.get("benchmark") == "claim" and row["x"] is not None]
    panels = dict.fromkeys((row["claim"], row["panel"]) for row in drawn)
    for claim, panel in panels:
        points = at_best_rate(
            [row for row in drawn if (row["claim"], row["panel"]) == (claim, panel)]
        )
        final = defaultdict(dict)
        for row in points:
            final[row["model"]][row["seed"], row["x"] if row["x_log"] else 0] = row["y"]
        lines, several = [], len({row["seed"] for row in points}) > 1
        for model, ends in final.items():
            by_x = defaultdict(list)
            for (_, x), y in ends.items():
                by_x[x].append(y)
            spread = [
                (f"{x:,.0f}: " if x else "")
                + f"{statistics.mean(y):.3f}"
                + (f" ({min(y):.3f}-{max(y):.3f})" if several else "")
                for x, y in sorted(by_x.items())
            ]
            lines.append([model, "; ".join(spread)])
        label = points[0]["y_label"]
        if (key := json.dumps([claim, label, lines])) not in told:  # panels may differ only in x
            texts.append(markdown([f"{claim}, {panel}", label], lines))
        told.add(key)
    return "\n".join(texts)


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
