"""The structure of the project: imports go downward, shared code names no architecture, and one
file adds an architecture."""

import ast
import dataclasses
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import test_laws as laws
import torch
from conftest import SLOW
from models import WIDTH

import minimodels
from minimodels import LM, Config, InputError
from minimodels.architectures.__main__ import Options, main
from minimodels.architectures.registry import LAYERS, WRAPPERS
from minimodels.grammar import set_options
from minimodels.ledger import ledger
from minimodels.ledger.__main__ import Options as LedgerOptions
from minimodels.ledger.__main__ import main as ledger_main
from minimodels.options import OneOf
from minimodels.training.optim import adamw
from minimodels.training.step import training_step

ROOT = Path(minimodels.__file__).resolve().parents[1]
EVERY = {**LAYERS, **WRAPPERS}
ORDER = [  # rooms from the lowest up; those on one line may import each other
    "interrupts",
    "errors",
    "files",
    "ranks",
    "colours command measure",
    "grammar",
    "options",
    "config",
    "kernels",  # whether a kernel can be used; it does not contain the kernels
    "paths",
    "parts",
    "context",
    "residual",
    "layers",
    "ops",
    "architectures",
    "kernels.",
    "objectives",
    "lm",
    "presets",
    "ledger",
    "data memory training published",
    "decoding",
    "generate",
    "pace",
    "draw sample",
    "",  # minimodels itself, which exports what is used in Python
    "train",
    "benchmarks",
]
FLOORS = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms.split(" ")}


def room_of(module: str) -> str:
    """The room of a module: "minimodels.ops.scan" -> "ops"."""
    first, _, rest = module.partition(".")
    if first != "minimodels":
        return first
    room, _, inside = rest.partition(".")
    return "kernels." if room == "kernels" and inside else room


def sources() -> dict[str, Path]:
    """Every module of the project except the tests, with its file."""
    paths = [path for path in (ROOT / "minimodels").rglob("*.py") if "kernels" not in path.parts]
    paths += [
        *(ROOT / "kernels").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        ROOT / "train.py",
    ]
    found = {}
    for path in paths:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[f"minimodels.{name}" if name.startswith("kernels") else name] = path
    return found


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The project's modules that a file imports, and for each whether the
    import is inside a function."""
    tree = ast.parse(path.read_text())
    functions = [
        n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    inside = {id(part) for function in functions for part in ast.walk(function)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.level == 0 else []  # a relative one stays in its room
            assert names or path.parent.name == "benchmarks", f"{path}: a relative import"
            if node.module == "minimodels":  # a room, or what minimodels exports
                rooms = [f"minimodels.{each.name}" for each in node.names]
                names = [room if room_of(room) in FLOORS else "minimodels" for room in rooms]
            elif node.module == "minimodels.kernels":
                files = {file.stem for file in (ROOT / "kernels").glob("*.py")}
                names += [f"{node.module}.{each.name}" for each in node.names if each.name in files]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        for name in names:
            if name.partition(".")[0] in ("minimodels", "train", "benchmarks"):
                yield name, id(node) in inside


def test_every_module_has_a_room():
    assert len(FLOORS) == sum(len(rooms.split(" ")) for rooms in ORDER)
    assert {room_of(module) for module in sources()} - set(FLOORS) == set()


@pytest.mark.parametrize("module", sources())
def test_imports_run_downward(module):
    """An operation imports its kernel inside the branch that chooses it. No
    other import goes upward."""
    room, path = room_of(module), sources()[module]
    for name, inside in imports(path):
        other = room_of(name)
        assert other in FLOORS, f"{module} imports {name}, which is in no room"
        to_kernel = other == "kernels." and inside and room in ("parts", "ops", "architectures")
        assert FLOORS[other] <= FLOORS[room] or to_kernel, f"{module} imports {name} from above"


def test_architectures_import_no_others_but_those_that_they_build_on():
    """A file can be read alone, because code that several share is in ops. Only layers built on
    others import them: experts are MLPs, and sparse attention is latent attention."""
    allowed = {("moe", "transformer"), ("sparse_attention", "latent_attention")}
    stems = {path.stem for path in (ROOT / "minimodels/architectures").glob("*.py")}
    for stem in stems - {"registry", "__main__", "__init__"}:
        for name, _ in imports(ROOT / f"minimodels/architectures/{stem}.py"):
            if name.startswith("minimodels.architectures."):
                assert (stem, name.rpartition(".")[2]) in allowed


SHARED = ("lm", "ledger", "layers", "objectives", "generate", "published.pretrained",
          "published.config_json", "training.step", "training.evaluate", "training.checkpoint")  # fmt: skip


@pytest.mark.parametrize("module", SHARED)
def test_shared_code_names_no_architecture(module):
    """It contains no architecture's name in a text, no class and no file.
    Docstrings may give examples."""
    tree = ast.parse(sources()[f"minimodels.{module}"].read_text())
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    words: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.update(re.findall(r"\w+", node.value))
        elif isinstance(node, (ast.Name, ast.Attribute)):
            words.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.ImportFrom):
            words.update((node.module or "").split("."), (each.name for each in node.names))
    names = {*EVERY, *(kind.__name__ for kind in EVERY.values())}
    names |= {kind.__module__.rpartition(".")[2] for kind in EVERY.values()}
    assert words & names == set()


def option_classes(kind: type) -> Iterator[type]:
    """An option dataclass, and the dataclasses of those options whose values are calls."""
    yield kind
    for hint in get_type_hints(kind, include_extras=True).values():
        for note in get_args(hint):
            if isinstance(note, OneOf):
                for choice in note.choices.values():
                    yield from option_classes(choice)


@pytest.mark.parametrize("name", EVERY)
def test_every_layer_says_what_it_is(name, capsys):
    kind = EVERY[name]
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", kind.paper)
    assert inspect.getdoc(kind)
    for options in option_classes(kind.Options):
        assert dataclasses.is_dataclass(options) and options.__dataclass_params__.frozen
        for field in dataclasses.fields(options):
            assert field.metadata.get("help"), f"{options.__qualname__}.{field.name}"
            assert field.default is not dataclasses.MISSING
    main(Options(name))
    described = capsys.readouterr().out
    assert described.startswith(f"{name}: {inspect.getdoc(kind)}\n")
    for field in dataclasses.fields(kind.Options):
        assert f"  {field.name}=" in described and field.metadata["help"] in described
    main(Options())
    listed = [line.split("(")[0].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed.count(name) == 1


def test_the_fast_tier_has_a_test_of_every_file():
    """And every test that conftest.py calls slow is there, if its file is."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listed = {}
    for tier in ("fast", "not fast"):
        done = subprocess.run(
            [*command, "-m", tier, "tests"], cwd=ROOT, capture_output=True, text=True
        )
        found = re.findall(r"^tests/(\w+)\.py::test_(\w+)", done.stdout, re.MULTILINE)
        assert found, done.stdout + done.stderr
        listed[tier] = set(found)
    files = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert {file for file, _ in listed["fast"]} == files
    slow = {(file, name) for file, names in SLOW.items() for name in names.split() if file in files}
    assert slow <= listed["not fast"] - listed["fast"]


# One file adds an architecture.

SOURCE = '''
"""A gated linear recurrence, one number of state per channel: h_t = a_t h_{t-1} + (1 - a_t) x_t."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from minimodels.errors import Count
from minimodels.options import option
from minimodels.context import Context
from minimodels.layers import Place
from minimodels.parts import linear
from minimodels.paths import full_precision


class Gated(nn.Module):
    """A recurrence whose decay is a gate."""

    paper = "Martin and Cundy, arXiv:1709.04057"

    @dataclass(frozen=True)
    class Options:
        expand: Count = option(1, "inner width over the width of the model")

    def __init__(self, options, config, place=Place()):
        super().__init__()
        D = options.expand * config.width
        self.x, self.decay, self.gate = (linear(config.width, D, config.init_std) for _ in range(3))
        self.out = linear(D, config.width, config.init_std / config.depth**0.5)

    def forward(self, u, state=None, context: Context | None = None):
        context = context or Context()
        x, a = full_precision(self.x(u)), full_precision(self.decay(u)).sigmoid()  # (B, T, D)
        x, keep = (1 - a) * x, a
        if context.resets is not None:
            keep = keep.masked_fill(context.resets.unsqueeze(-1), 0)
        if context.real is not None:
            real = context.real.unsqueeze(-1)
            x, keep = x.masked_fill(~real, 0), keep.masked_fill(~real, 1)
        h, seen = torch.zeros_like(x[:, 0]) if state is None else state, []
        for keep_t, x_t in zip(keep.unbind(1), x.unbind(1), strict=True):
            h = keep_t * h + x_t
            seen.append(h)
        y = torch.stack(seen, dim=1).to(u.dtype)
        return self.out(y * torch.nn.functional.silu(self.gate(u))), h

    def state_bytes(self, context, itemsize):
        return 4 * self.out.in_features
'''
TEXTS = ["gated", "gated(expand=2)", "A:=gated A mlp A", "mod(gated mlp, capacity=0.75)"]


@pytest.fixture
def gated(tmp_path, monkeypatch):
    """An architecture in a file that no other file knows, under the name "gated"."""
    path = tmp_path / "gated.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("gated", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gated", module)  # its annotations are looked up there
    spec.loader.exec_module(module)
    monkeypatch.setitem(LAYERS, "gated", module.Gated)
    return module.Gated


@pytest.mark.parametrize("layers", TEXTS)
@pytest.mark.parametrize(
    "law",
    [
        laws.test_chunking,
        laws.test_causality,
        laws.test_batch_independence,
        lambda layers: laws.test_packing(layers, training=False),
        lambda layers: laws.test_packing(layers, training=True),
        laws.test_no_document_sees_another,
        laws.test_packed_documents_in_pieces,
        lambda layers: laws.test_ledger_equals_measurement(layers, 20),
    ],
    ids="chunking causality batch packing packing-training documents pieces ledger".split(),
)
def test_a_new_architecture_obeys_the_laws(law, layers, gated):
    law(layers)


def test_a_broken_architecture_does_not(gated, monkeypatch):
    """The laws find a layer that ignores where documents begin, and a layer
    that forgets its state."""
    forward = gated.forward
    monkeypatch.setattr(
        gated, "forward", lambda self, u, state=None, context=None: forward(self, u, state)
    )
    for law in (lambda text: laws.test_packing(text, False), laws.test_no_document_sees_another):
        law("mlp")
        with pytest.raises(AssertionError):
            law("gated")
    monkeypatch.setattr(
        gated, "forward", lambda self, u, state=None, context=None: forward(self, u)
    )
    with pytest.raises(AssertionError):
        laws.test_chunking("gated")


def test_a_new_architecture_trains(gated):
    torch.manual_seed(0)
    model = LM(Config(layers="gated mlp gated", width=WIDTH, vocab=7))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    batch = torch.randint(7, (2, 2, 9)).unbind()
    optimizer, autocast = adamw(model, 0.01, 0.0), torch.autocast("cpu", enabled=False)
    first = training_step(model, optimizer, [batch], autocast)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    for _ in range(20):
        last = training_step(model, optimizer, [batch], autocast)
    assert last.losses[0] < first.losses[0]


def test_a_new_architecture_is_counted_listed_and_set(gated, capsys):
    config = Config(layers="gated", width=WIDTH)
    cost = ledger(config, 64)
    assert cost.state_bytes == 4 * WIDTH
    assert cost.parameters == sum(p.numel() for p in LM(config).parameters())
    ledger_main(LedgerOptions(layers="gated"))
    assert any(line.startswith("gated ") for line in capsys.readouterr().out.splitlines())
    main(Options())
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("gated "))
    assert "A recurrence whose decay is a gate." in line and "arXiv:1709.04057" in line
    main(Options("gated"))
    described = capsys.readouterr().out
    assert "expand=1" in described and "inner width over the width of the model" in described
    wide = LM(Config(layers=set_options("gated", ["gated.expand=3"]), width=WIDTH))
    assert wide.layers[0].layer.out.in_features == 3 * WIDTH
    for text, message in (("gatd", "did you mean gated?"), ("gated(expand=0)", "gated.expand: 0")):
        with pytest.raises(InputError, match=re.escape(message)):
            LM(Config(layers=text, width=WIDTH))


def test_what_is_tried_out_does_not_stay():
    assert "gated" not in LAYERS
