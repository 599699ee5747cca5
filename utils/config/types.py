"""The types of config keys: what a value must be, what other spellings are understood, and how to say so in words."""

import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator

from utils import json_files
from utils.data.published import labels, without_comments
from utils.errors import UserError


def _as_text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, bool | int | float) else value


def _encodable(text: str) -> str:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("has half a character in it, which no file's name can have") from None
    if "\0" in text:
        raise ValueError("has a zero byte in it, which no file's name can have")
    return text


def _folder(text: str) -> str:
    if not text:
        raise ValueError('must name a folder ("." is the current one)')
    return os.path.expanduser(text)


def _folder_name(text: str) -> str:
    if not text or Path(text).name != text or text == "..":
        raise ValueError("must be the name of a folder in data_dir")
    return text


def _true_or_file(value: Any) -> Any:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return _folder(value) if isinstance(value, str) else value


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("must be a number")
    if abs(number) > LARGEST:
        raise ValueError(f"must be at most {LARGEST:g}")
    return number


def _countable(number: int) -> int:
    if number > LARGEST_COUNT:
        raise ValueError(f"must be at most {LARGEST_COUNT:,}")
    return number


def _listed(value: Any) -> Any:
    """A list also from 1993, "1993,1994" and '["0", "1"]'."""
    if isinstance(value, str) and value.strip():
        parts = [part.strip().strip("\"'") for part in value.strip().removeprefix("[").removesuffix("]").split(",")]
        return [int(part) if part.removeprefix("-").isdecimal() else part for part in parts if part]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def _listed_or_in_file(value: Any) -> Any:
    """As `_listed`, and from a file (a JSON list, or text with an entry a line) or a published list of classes."""
    if not isinstance(value, str) or Path(value).suffix not in (".json", ".txt"):
        return (labels(value) if isinstance(value, str) else None) or _listed(value)
    try:
        file = Path(value).expanduser()
        if value.endswith(".json"):
            return json_files.read(file)
        return without_comments(file.read_text(encoding="utf-8").splitlines())
    except UserError as error:
        raise ValueError(f"names a list that can't be read ({str(error).removesuffix('.')})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not a list in UTF-8"
        raise ValueError(f"names a file that can't be read ({reason})") from None


def _number_or_list(value: Any) -> Any:
    return _listed(value) if isinstance(value, str) and ("," in value or "[" in value) else value


def _different(entries: list) -> list:
    if not entries or len(set(entries)) < len(entries):
        raise ValueError("must list one or more different values")
    return entries


LARGEST, LARGEST_COUNT = 1e30, 10**15
"""Beyond these, numbers overflow in single precision, and counts in Python's own tools."""

LOGGERS = ("tensorboard", "csv", "wandb")


def _loggers(names: list[str]) -> list[str]:
    if not set(names) <= set(LOGGERS):
        raise ValueError(f"must list some of {', '.join(LOGGERS)}")
    return names


def _numpy_seed(numbers: list[int]) -> list[int]:
    if max(numbers) >= 2**32:
        raise ValueError("must be below 2^32, as numpy.random.seed takes it")
    return numbers


def _device(value: Any) -> Any:
    if value in ("auto", "cpu", "cuda"):
        return value
    entries = _listed(value)
    texts = [str(entry).strip().removeprefix("cuda:") for entry in entries] if isinstance(entries, list) else []
    if texts in (["-1"], ["cpu"]):
        return "cpu"
    if not texts or not all(text.isdecimal() for text in texts) or len(set(texts)) < len(texts):
        raise ValueError('must be "auto", "cpu", "cuda" or CUDA devices like ["0"]')
    return [int(text) for text in texts]


Text = Annotated[str, BeforeValidator(_as_text), AfterValidator(_encodable)]
"""A number or true stands for its digits or letters."""
Folder = Annotated[Text, AfterValidator(_folder)]
"""A path; ~ is the home folder."""
FolderName = Annotated[Text, AfterValidator(_folder_name)]
Number = Annotated[float, AfterValidator(_finite)]
Positive = Annotated[Number, Gt(0)]
NonNegative = Annotated[Number, Ge(0)]
Fraction = Annotated[Number, Ge(0), Lt(1)]
Probability = Annotated[Number, Ge(0), Le(1)]
Count = Annotated[int, Ge(1), AfterValidator(_countable)]
Natural = Annotated[int, Ge(0), AfterValidator(_countable)]
Epochs = Annotated[list[Count], BeforeValidator(_listed)]
Rates = Annotated[list[Probability], BeforeValidator(_listed)]
Increments = Annotated[Natural | list[Count], BeforeValidator(_number_or_list)]
ClassOrder = Annotated[list[int | str], BeforeValidator(_listed_or_in_file), AfterValidator(_different)]
Loggers = Annotated[list[str], BeforeValidator(_listed), AfterValidator(_loggers)]
YesOrFile = Annotated[bool | str, BeforeValidator(_true_or_file)]
Seeds = Annotated[
    list[Annotated[int, Ge(0)]], BeforeValidator(_listed), AfterValidator(_different), AfterValidator(_numpy_seed)
]
Device = Annotated[Any, AfterValidator(_device)]
"""PyCIL's spellings and torch's: "0", ["0", "1"], [0], "cuda:0"; -1 is the CPU.  Becomes "auto", "cpu", "cuda" or a
list of numbers."""


def bare(annotation: Any) -> Any:
    """An annotation without what `Annotated` adds."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def alternatives(annotation: Any) -> list[Any]:
    """The types of a union, or the one type, each bare."""
    annotation = bare(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(annotation) for kind in alternatives(part)]
    return [annotation]


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The texts that a key may have, where its type lists them."""
    return next((typing.get_args(k) for k in alternatives(annotation) if typing.get_origin(k) is typing.Literal), ())


_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "null",
    Any: "text or a list",
}
_IN_LISTS = {str: "texts", int: "whole numbers", float: "numbers"}


def in_words(annotation: Any) -> str:
    """Such as "a list of whole numbers or null"."""
    words = []
    for kind in alternatives(annotation):
        if typing.get_origin(kind) is list:
            words.append("a list of " + " or ".join(_IN_LISTS[k] for k in alternatives(typing.get_args(kind)[0])))
        elif typing.get_origin(kind) is typing.Literal:
            words.append(", ".join(map(json.dumps, typing.get_args(kind))))
        else:
            words.append(_WORDS[kind])
    return " or ".join(words)


def bounds(annotation: Any) -> str:
    """The range of a number, or of a list's numbers: "at least 0, below 1"; "" where there is none."""
    words = []
    if typing.get_origin(annotation) is Annotated:
        annotation, *added = typing.get_args(annotation)
        for entry in added:
            for attribute, of_bound in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
                if hasattr(entry, attribute):
                    words.append(f"{of_bound} {getattr(entry, attribute):g}")
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, Annotated):
        words += [inner for part in typing.get_args(annotation) if (inner := bounds(part))]
    return ", ".join(dict.fromkeys(words))
