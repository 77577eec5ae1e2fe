"""Chat templates: how a model's tokenizer writes a conversation as one text.

A chat model was trained on conversations in one form, and knows no other. The form is a Jinja
template among the files of its tokenizer. A template is somebody else's program, so it runs in
Jinja's sandbox, which gives it only the messages and the special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from minimodels.errors import InputError, missing
from minimodels.files import read_json

SETTINGS = "tokenizer_config.json"


def read_template(folder: Path) -> str:
    """The template in chat_template.jinja, or else in tokenizer_config.json.

    Raises InputError if there is none.
    """
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = (
        read_json(folder / SETTINGS).get("chat_template") if (folder / SETTINGS).is_file() else None
    )
    if isinstance(template, list):  # several, by their purpose
        template = {each.get("name"): each.get("template") for each in template}.get("default")
    if not isinstance(template, str):
        raise InputError("chat", str(folder), "a model whose tokenizer has a chat template")
    return template


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that have a purpose: "eos_token" -> "</s>", and so on."""
    named = {}
    for file in ("special_tokens_map.json", SETTINGS):
        entries = read_json(folder / file) if (folder / file).is_file() else {}
        for purpose, token in entries.items():
            text = token.get("content") if isinstance(token, dict) else token
            if purpose.endswith("_token") and isinstance(text, str):
                named[purpose] = text
    return named


def render(template: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str]) -> str:
    """The text of a conversation, up to where the model's answer begins.

    messages: each with a "role" and its "content". Raises InputError if the template is invalid
    or refuses the messages.
    """
    jinja2 = require_jinja2()
    try:
        compiled = environment(jinja2).from_string(template)
        return compiled.render(messages=messages, add_generation_prompt=True, **special)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError("chat", "the template", f"one for such messages ({error})") from None


def environment(jinja2):
    """A sandbox with what transformers gives to templates."""

    class Passage(jinja2.ext.Extension):
        """{% generation %} marks the model's own words for training; the words stay."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def as_json(value, indent: int | None = None, ensure_ascii: bool = False, **options) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Passage, "jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = as_json
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox


def require_jinja2():
    """The library `jinja2`. Raises InputError if it is missing or its sandbox has known escapes."""
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise missing("jinja2", "hub") from None
    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3])
    if version < (3, 1, 6):
        raise InputError("jinja2", jinja2.__version__, "3.1.6 or later, without known escapes")
    return jinja2
