"""The keys of a config as text: for a terminal, and as the page docs/config.md."""

import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from utils.config.schema import REQUIRED, SECTIONS, Config, Key, MethodInfo, keys_of
from utils.config.types import LARGEST, LARGEST_COUNT

_INTRODUCTION = """\
# Config keys

A config is a JSON file of the keys below, and `python main.py --config FILE key=value ...` (or `--key value`) replaces
some of them. A value may refer to other keys, as in `"outputs/${dataset}"`. PyCIL's own JSON files are read as they
are, with its other names (in parentheses) too.

This page is written by `python -m models.catalogue > docs/config.md`.
"""


def _sections(methods: Mapping[str, MethodInfo]) -> dict[str, list[Key]]:
    """The keys by title: the shared ones, then each method's own; methods with the same settings share a title."""
    sections: dict[str, list[Key]] = {}
    title = ""
    for name, key in keys_of(Config).items():
        title = SECTIONS.get(name, title)
        sections.setdefault(title, []).append(key)
    by_settings: dict[type, list[str]] = {}
    for method in methods.values():
        if method.settings is not None and keys_of(method.settings):
            by_settings.setdefault(method.settings, []).append(method.name)
    for settings, names in by_settings.items():
        sections["model_name = " + ", ".join(names)] = list(keys_of(settings).values())
    return sections


_WORDS = {"string": "text", "boolean": "true or false"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _type_of(key: Key, choices: Mapping[str, Sequence[str]]) -> str:
    """Such as "list of integers >= 1, or null"."""
    if key.name in choices:
        return "one of " + ", ".join(choices[key.name])
    return _in_words(TypeAdapter(key.annotation).json_schema())


def _in_words(schema: Mapping[str, Any]) -> str:
    """A JSON schema, as pydantic makes it of a type."""
    if "anyOf" in schema:
        return " or ".join(map(_in_words, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(map(json.dumps, schema["enum"]))
    if "const" in schema:
        return json.dumps(schema["const"])
    if schema["type"] == "array":
        entries = _in_words(schema["items"])
        return f"list of ({entries})" if " " in entries else f"list of {entries}"
    limits = [
        f" {sign} {schema[name]:,.10g}"
        for name, sign in _BOUNDS.items()
        if schema.get(name, LARGEST) not in (LARGEST, LARGEST_COUNT)
    ]
    words = _WORDS.get(schema["type"], schema["type"]) + ",".join(limits)
    return words


def _default(key: Key) -> str:
    return "required" if key.default is REQUIRED else json.dumps(key.default)


def help_text(methods: Mapping[str, MethodInfo], backbones: Sequence[str], width: int | None = None) -> str:
    """All keys with type, default, meaning and source, wrapped at the terminal's width."""
    width = width or min(shutil.get_terminal_size().columns, 120)
    choices = {"model_name": tuple(methods), "convnet_type": tuple(backbones)}
    lines = []
    for title, keys in _sections(methods).items():
        lines += ["", title]
        for key in keys:
            default = "required" if key.default is REQUIRED else f"default {_default(key)}"
            lines.append(f"  {key.name}: {default}")
            for text in (f"{key.meaning} [{key.source}]", _type_of(key, choices)):
                lines += textwrap.wrap(text, width - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def markdown(methods: Mapping[str, MethodInfo], backbones: Sequence[str]) -> str:
    """docs/config.md."""
    choices = {"model_name": tuple(methods), "convnet_type": tuple(backbones)}
    lines = [_INTRODUCTION]
    for title, keys in _sections(methods).items():
        lines += [f"## {title}", "", "| key | default | meaning | type | from |", "| --- | --- | --- | --- | --- |"]
        for key in keys:
            name = f"`{key.name}`" + "".join(f" (`{other}`)" for other in key.also)
            cells = (name, f"`{_default(key)}`", key.meaning, _type_of(key, choices), key.source)
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("${", "\\${") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
