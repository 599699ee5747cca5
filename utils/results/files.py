"""Files that runs and comparisons write: JSON, text and CSV in UTF-8, each in one piece or not at all."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.data.images import write_atomically


def write_json(path: Path, content: Any) -> None:
    """Indented."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def printable(text: str) -> str:
    """A name with its undecodable bytes escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
