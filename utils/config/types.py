"""The types of config keys: pydantic's, with the other spellings that are understood."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, Field

from utils.data.datasets import published_labels, without_comments
from utils.errors import UserError
from utils.files import load_json

LARGEST, LARGEST_COUNT = 1e30, 10**15
"""Beyond these, numbers overflow in single precision, and counts in Python's own tools."""


def _as_text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, bool | int | float) else value


def _name_of_a_file(text: str) -> str:
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


def _listed(value: Any) -> Any:
    """A list also from 1993, "1993,1994" and '["0", "1"]'."""
    if isinstance(value, str) and value.strip():
        parts = [part.strip().strip("\"'") for part in value.strip().removeprefix("[").removesuffix("]").split(",")]
        return [int(part) if part.removeprefix("-").isdecimal() else part for part in parts if part]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def _listed_or_in_file(value: Any) -> Any:
    """As `_listed`, and from a file (a JSON list, or text with an entry a line) or a published list of classes."""
    if not isinstance(value, str):
        return _listed(value)
    file = Path(value).expanduser()
    if file.suffix not in (".json", ".txt"):
        return published_labels(value) or _listed(value)
    try:
        if file.suffix == ".json":
            return load_json(file)
        return without_comments(file.read_text(encoding="utf-8").splitlines())
    except UserError as error:
        raise ValueError(f"names a list that can't be read: {str(error).removesuffix('.')}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not a list in UTF-8"
        raise ValueError(f"names a file that can't be read ({reason})") from None


def _number_or_list(value: Any) -> Any:
    return _listed(value) if isinstance(value, str) and ("," in value or "[" in value) else value


def _different(entries: list) -> list:
    if not entries or len(set(entries)) < len(entries):
        raise ValueError("must list one or more different values")
    return entries


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


Text = Annotated[str, BeforeValidator(_as_text), AfterValidator(_name_of_a_file)]
"""A number or true stands for its digits or letters."""
Folder = Annotated[Text, AfterValidator(_folder)]
"""A path; ~ is the home folder."""
FolderName = Annotated[Text, AfterValidator(_folder_name)]
Number = Annotated[float, Field(allow_inf_nan=False), Le(LARGEST)]
Positive = Annotated[Number, Gt(0)]
NonNegative = Annotated[Number, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Probability = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1), Le(LARGEST_COUNT)]
Natural = Annotated[int, Ge(0), Le(LARGEST_COUNT)]
Epochs = Annotated[list[Count], BeforeValidator(_listed)]
Rates = Annotated[list[Probability], BeforeValidator(_listed)]
Increments = Annotated[Natural | list[Count], BeforeValidator(_number_or_list)]
ClassOrder = Annotated[list[int | str], BeforeValidator(_listed_or_in_file), AfterValidator(_different)]
Loggers = Annotated[list[Literal["tensorboard", "csv", "wandb"]], BeforeValidator(_listed)]
YesOrFile = Annotated[bool | str, BeforeValidator(_true_or_file)]
Seeds = Annotated[list[Annotated[int, Ge(0), Lt(2**32)]], BeforeValidator(_listed), AfterValidator(_different)]
"""Below 2^32, as numpy.random.seed takes them."""
Scheduler = Annotated[Literal["steps", "cosine"], BeforeValidator(lambda name: "steps" if name == "steplr" else name)]
Device = Annotated[Literal["auto", "cpu", "cuda"] | list[int], BeforeValidator(_device)]
"""PyCIL's spellings and torch's: "0", ["0", "1"], [0], "cuda:0"; -1 is the CPU."""
