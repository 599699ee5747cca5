"""What is wrong with a config's value, in words."""

import difflib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from utils.config.types import choices_of, in_words

_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def what_is_wrong(annotation: Any, error: ValidationError, shown: str) -> str:
    """Such as "must be at least 1, not 0"; shown: the value as it was written."""
    for fault in error.errors():
        if fault["type"] in _BOUNDS:
            bound, words = _BOUNDS[fault["type"]]
            return f"must be {words} {fault['ctx'][bound]:g}, not {shown}"
        if fault["type"] == "literal_error":
            return not_among(choices_of(annotation), shown)
        if fault["type"] == "value_error":
            said = str(fault["ctx"]["error"])
            return f"{said}, not {shown}" if said.startswith("must") else f"{said}: {json.dumps(shown)}"
    return f"must be {in_words(annotation)}, not {shown}"


def is_among(value: str, choices: Sequence[str]) -> bool:
    """Whether a value is one of the choices; "timm/NAME" stands for whatever has a name after "timm/"."""
    patterns = [choice.removesuffix("NAME") for choice in choices if choice.endswith("/NAME")]
    return value in choices or any(value.startswith(pattern) and value != pattern for pattern in patterns)


def not_among(choices: Sequence[str], shown: str, meant: str | None = None) -> str:
    """meant: what the value stands for elsewhere, where that is known."""
    near = [meant] if meant else difflib.get_close_matches(shown.strip('"'), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"must be one of {', '.join(choices)}, not {shown}{hint}"


def as_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else text[:100] + "..."
