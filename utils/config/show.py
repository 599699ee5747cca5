"""The keys of a config as text: for a terminal, and as the page docs/config.md."""

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
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


def _in_words(schema: Mapping[str, Any]) -> str:
    """A JSON schema, as pydantic makes it of a type: such as "list of integers >= 1, or null"."""
    if "anyOf" in schema:
        return " or ".join(map(_in_words, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(map(json.dumps, schema["enum"]))
    if "const" in schema:
        return json.dumps(schema["const"])
    if schema["type"] == "array":
        entries = _in_words(schema["items"])
        return f"list of ({entries})" if " " in entries else f"list of {entries}"
    bounds = {sign: schema[name] for name, sign in _BOUNDS.items() if name in schema}
    limits = [f" {sign} {b:,.10g}" for sign, b in bounds.items() if b not in (LARGEST, LARGEST_COUNT)]
    return _WORDS.get(schema["type"], schema["type"]) + ",".join(limits)


def _rows(
    methods: Mapping[str, MethodInfo], backbones: Sequence[str]
) -> Iterator[tuple[str, list[tuple[Key, str, str]]]]:
    """(title, [(key, its type, its default)]) of each section."""
    choices = {"model_name": tuple(methods), "convnet_type": tuple(backbones)}
    for title, keys in _sections(methods).items():
        rows = []
        for key in keys:
            kind = _in_words(TypeAdapter(key.annotation).json_schema())
            if key.name in choices:
                kind = "one of " + ", ".join(choices[key.name])
            rows.append((key, kind, "required" if key.default is REQUIRED else json.dumps(key.default)))
        yield title, rows


def help_text(methods: Mapping[str, MethodInfo], backbones: Sequence[str], width: int | None = None) -> str:
    """All keys with type, default, meaning and source, wrapped at the terminal's width."""
    width = width or min(shutil.get_terminal_size().columns, 120)
    lines = []
    for title, rows in _rows(methods, backbones):
        lines += ["", title]
        for key, kind, default in rows:
            lines.append(f"  {key.name}: {default}" if key.default is REQUIRED else f"  {key.name}: default {default}")
            for text in (f"{key.meaning} [{key.source}]", kind):
                lines += textwrap.wrap(text, width - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def markdown(methods: Mapping[str, MethodInfo], backbones: Sequence[str]) -> str:
    """docs/config.md."""
    lines = [_INTRODUCTION]
    for title, rows in _rows(methods, backbones):
        lines += [f"## {title}", "", "| key | default | meaning | type | from |", "| --- | --- | --- | --- | --- |"]
        for key, kind, default in rows:
            name = f"`{key.name}`" + "".join(f" (`{other}`)" for other in key.also)
            cells = (name, f"`{default}`", key.meaning, kind, key.source)
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("${", "\\${") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
