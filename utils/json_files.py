"""Reading JSON that other programs or people have written: one line for whatever is wrong with it."""

import json
from pathlib import Path
from typing import Any

from utils.errors import UserError


def read(file: Path) -> Any:
    """The value of a JSON file in UTF-8, with or without a byte order mark.

    Raises UserError for a file that can't be read or is not JSON, for an object that has a key twice (Python would
    take the last one), and for values nested too deeply.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror}).") from None
    return parse(content, str(file))


def parse(content: bytes, name: str) -> Any:
    """The same of a file's content.  name: of the file, for messages."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise UserError(f"{name} is not valid JSON: {where}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not in UTF-8: byte {error.start} is {error.object[error.start]:#04x}.") from None
    except RecursionError:
        raise UserError(f"{name} can't be read as JSON: its values are nested too deeply.") from None
    except ValueError as error:  # a key given twice, a number of too many digits
        raise UserError(f"{name} can't be read as JSON: {error}.") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} is given {keys.count(twice)} times; keep one")
    return values
