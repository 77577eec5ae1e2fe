"""What all command lines share: options, one-line errors, the device and signals."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import errno
import io
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser  # tyro depends on it
import torch
import tyro
from tqdm import tqdm

from minimodels.errors import InputError, describe
from minimodels.ranks import joined, rank

Options = TypeVar("Options")


def parse_options(
    kind: type[Options],
    description: str,
    default: Options | None = None,
    synonyms: Mapping[str, str] = {},
    arguments: Sequence[str] | None = None,
) -> Options:
    """Read the command line as a dataclass. `synonyms`: the name of an option in other
    programs -> what to write here.

    If the command line is wrong, raises InputError with one line, in place of tyro's longer
    message.
    """
    join_lines(kind)
    given = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                prog=program(),
                args=arguments,
                description=description,
                config=(tyro.conf.PositionalMetavarFromFieldName,),
                **given,
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        arguments = sys.argv[1:] if arguments is None else arguments
        raise command_line_error(said.getvalue(), kind, synonyms, arguments) from None


def join_lines(kind: type) -> None:
    """Give tyro the docstrings of all options as single lines, because it would break the help
    where the source is broken."""
    described = docstring_parser.parse_from_object(kind).params
    texts = {each.arg_name: " ".join((each.description or "").split()) for each in described}
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            join_lines(hints[field.name])
        elif text := texts.get(field.name):
            field.metadata = MappingProxyType({**field.metadata, "help": text})


def program() -> str:
    """How this program is started: "python train.py" or "python -m minimodels.sample"."""
    main = sys.modules["__main__"]
    if spec := getattr(main, "__spec__", None):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return f"python {os.path.basename(sys.argv[0])}"


def command_line_error(
    message: str, kind: type, synonyms: Mapping[str, str], given: Sequence[str]
) -> InputError:
    """tyro's error message about the arguments `given`, shortened to one line."""
    lines = [line.strip("│ ") for line in message.splitlines()]
    text = " ".join(line for line in lines if line and line[0] not in "─╭╰")  # without the frame
    known = hints_of(kind)
    found = re.search(r"Unrecognized options: (-\S+?)(?:,? |$)", text)
    # tyro may take the value of an unknown option for an argument, and then report another error
    written = [each for each in given if each.startswith("--") and name_of(each) not in known]
    if option := found[1] if found else next(iter(written), ""):
        name = name_of(option)
        ours = {**synonyms, **{each: f"--{each.replace('_', '-')}" for each in known}}
        close = [name] if name in ours else difflib.get_close_matches(name.lower(), ours, 3, 0.7)
        meant = list(dict.fromkeys(ours[each] for each in close))
        accepted = f"did you mean {' or '.join(meant)}?" if meant else "an option that --help lists"
        return InputError("option", option, accepted)
    if found := re.search(r"Missing from .*?: (?P<name>[A-Z_]+) (?P<help>.*?) \(required\)", text):
        return InputError(found["name"].lower(), "", found["help"])
    if found := re.search(r"Missing value for argument '-+(?P<name>[\w.-]+)'", text):
        name = found["name"].rpartition(".")[2].replace("-", "_")
        return InputError(name, "", describe(known[name]))
    if found := re.search(r"Unrecognized options: (\S+)", text):
        return stray_word(found[1], given, known)
    choice = re.search(
        r"invalid choice '(?P<value>.*?)' for argument '-{0,2}(?P<name>[\w.-]+)", text
    )
    parsed = re.search(
        r"Error parsing -{0,2}(?P<name>[\w.-]+): .*?'(?P<value>[^']*)'(?:\]|\b| |$)", text
    )
    listed = re.search(
        r"Error parsing -{0,2}(?P<name>[\w.-]+): .*? from \['?(?P<value>.*?)'?\]", text
    )
    if wrong := choice or listed or parsed:
        name = wrong["name"].rpartition(".")[2].replace("-", "_")
        accepted = describe(known[name]) if name in known else "a value that --help describes"
        return InputError(name, wrong["value"], accepted)
    reason = text.partition("For full")[0].strip()
    return InputError("command line", " ".join(given)[:80], f"what --help lists ({reason})")


def name_of(option: str) -> str:
    """The field that an option of the command line sets: --no-compile sets compile, --lr=1 lr."""
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    return name.removeprefix("no_")


def stray_word(word: str, given: Sequence[str], known: Mapping[str, Any]) -> InputError:
    """The error for a word that belongs to no option, or follows one that takes no value."""
    word = word if word in given else word.removesuffix(",")  # tyro separates several by commas
    before = given[: given.index(word)] if word in given else []
    option = next((each for each in reversed(before) if each.startswith("--")), "")
    name, option = name_of(option), option.partition("=")[0]
    if known.get(name) is bool and before[-1] == option:
        flag = name.replace("_", "-")
        return InputError(name, word, f"--{flag} or --no-{flag}, without a value")
    hint = known.get(name)
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(hint) is list:
        return InputError(name, word, f"one value after each {option}, which can be repeated")
    if hint is str:
        return InputError(
            name, word, f'one text, in quotes if it has spaces: {option} "... {word}"'
        )
    likely = ("model", "layers") if "layers" in known else ("prompt",)
    meant = " or ".join(f"--{each} {word}" for each in likely if each in known)
    such = f", such as {meant}" if meant else ""
    return InputError("argument", word, f"options and arguments that --help lists{such}")


def hints_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields by name, including those of dataclasses inside it."""
    found: dict[str, Any] = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        base = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        found |= hints_of(base) if is_dataclass(base) else {field.name: hint}
    return found


def run_command(main: Callable[[Options], None], options: Callable[[], Options]) -> None:
    """Parse the options and run. Bad input ends with one line on stderr and exit status 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # undoes minimodels/interrupts.py
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # a terminal may lack characters that a model writes
            stream.reconfigure(errors="replace")
    try:
        main(options())
    except InputError as error:
        line = str(error).removesuffix(error.excerpt).replace("\n", " ").strip()
        fail(f"error: {line}\n{error.excerpt}".rstrip(), 2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).rpartition("Allocator: ")[2].partition("\n")[0] or "MemoryError"
        fail(f"out of memory: a smaller model, batch or context takes less ({reason})", 1)
    except KeyboardInterrupt:
        fail("\ninterrupted", 130)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC and error.filename is None:
            raise
        fail(f"error: {error}", 1)


def escaped(text: str) -> str:
    r"""The text with its control characters as escapes, such as \x1b, because a terminal would obey
    them. Newlines and tabs stay."""
    control = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    return re.sub(control, lambda found: f"\\x{ord(found[0]):02x}", text)


def fail(message: str, status: int) -> NoReturn:
    """Print the reason on a line of its own, below any progress bar, and exit."""
    if rank() > 0:
        # all ranks may fail for the same reason; rank 0 ends first, and torchrun ends the others
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # undoes stopped_by_signals
        time.sleep(2)
    tqdm.write(message, file=sys.stderr)
    if joined():
        os._exit(status)  # threads of gloo may abort an ordinary exit
    sys.exit(status)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out. On a CPU, PyTorch has no class for this error."""
    lacking = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        text in str(error) for text in lacking
    )


def pick_device(name: str) -> torch.device:
    """The device with this name; "auto" is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        found = {"cuda": torch.cuda, "mps": torch.backends.mps}
        accepted = ", ".join(["auto", "cpu", *(n for n in found if found[n].is_available())])
        raise InputError("device", name, accepted) from None
    return device


def require_compiler(device: torch.device) -> None:
    """Raise InputError if torch.compile needs a C++ compiler, as on a CPU, and finds none."""
    from torch._inductor import config  # takes a second to import

    names = [name for name in config.cpp.cxx if name]
    if device.type == "cpu" and not any(map(shutil.which, names)):
        raise InputError(
            "compile", True, f"False, because PyTorch finds no C++ compiler ({', '.join(names)})"
        )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device is a GPU that computes in bfloat16 without emulation."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step. Otherwise the library returns it to
    the kernel, which must clear each page before it is used again.

    A training step frees and allocates the same large tensors again and again, so on a CPU this can
    double the speed. It works on Linux with glibc. Elsewhere it does nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    trim_threshold, mmap_max = -1, -4  # mallopt(3)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_max, 0)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C, SIGTERM or SIGHUP sets, so that a run can finish its step and
    save. A second signal ends the process at once, even inside a compiler.

    A signal within a second of the first counts as the same one: Ctrl-C reaches a process of
    torchrun twice, from the terminal and from torchrun.
    """
    stopped, first = threading.Event(), math.inf

    def stop(number, frame):
        nonlocal first
        first = min(first, time.monotonic())
        if time.monotonic() > first + 1:
            os.write(2, b"\nstopped at once; no checkpoint was changed\n")
            os._exit(128 + number)
        if rank() == 0 and not stopped.is_set():  # a step may take long, above all if it compiles
            os.write(
                2,
                b"\nstopping after this step; another Ctrl-C, at least a second later, stops at once\n",
            )
        stopped.set()

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), stop) for name in names}
    try:
        yield stopped
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
        if stopped.is_set() and callable(again := before["SIGINT"]):
            # the second copy of the signal may arrive after the run has saved
            signal.signal(
                signal.SIGINT,
                lambda *given: again(*given) if time.monotonic() > first + 1 else None,
            )
