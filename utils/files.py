"""Files: written in one piece or not at all, what killed processes leave of them, and JSON, text and CSV in UTF-8."""

import csv
import hashlib
import io
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, durably: bool = False) -> None:
    """Let `write` fill a temporary file in the target's folder, then rename it.

    A killed process leaves the old file or the new one, never part of one.  Missing folders are created.  An OSError,
    such as of a full or a read-only disk, names the target and not the temporary file.
    durably: wait until a power failure, too, leaves the new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{socket.gethostname()}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            if durably:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise
    if durably:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename
        finally:
            os.close(folder)


def check_folder(name: str, folder: Path) -> None:
    """Raises UserError where a folder can't be made or written to.  name: what is to be there, for the message."""
    existing = next(above for above in (folder, *folder.absolute().parents) if above.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "is read-only" if existing.is_dir() else "is not a folder"
        raise UserError(f"{name}: {folder} can't be written to: {existing} {reason}.")


OLD = 3600.0
"""Seconds after which a half-written file is nobody's any more: no write takes as long."""


def temporary_files(folder: Path) -> list[Path]:
    """The half-written files of processes that have died.

    On this machine they no longer run; of other machines and containers, which may share the disk, nothing has been
    written for OLD seconds.
    """
    return [file for file in folder.glob(".*.tmp") if _is_abandoned(file)]


def _is_abandoned(file: Path) -> bool:
    writer = re.match(r"\.(.+)\.(\d+)-", file.name)  # machine and process
    try:
        age = time.time() - file.stat().st_mtime
    except FileNotFoundError:  # moved into place meanwhile
        return False
    return writer is not None and (age > OLD or (writer[1] == socket.gethostname() and not _is_running(int(writer[2]))))


def _is_running(process: int) -> bool:
    """Whether another process of this number runs on this machine."""
    if process == os.getpid():
        return False  # this process has not begun to write: another machine or container had the same number
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def content_digest(files: Sequence[Path], most: int = 3) -> str:
    """A digest of up to `most` files, evenly spread over `files`; those that can't be read count as empty.

    It tells the files of two folders apart whose names, sizes and times of modification agree, as after unpacking.
    """
    digest = hashlib.blake2b(digest_size=16)
    for i in {round(k * (len(files) - 1) / max(most - 1, 1)) for k in range(most)} if files else ():
        with suppress(OSError):
            digest.update(Path(files[i]).read_bytes())
        digest.update(b"\0")
    return digest.hexdigest()


def load_json(file: Path) -> Any:
    """The value of a JSON file in UTF-8, with or without a byte order mark.

    Raises UserError for a file that can't be read or is not JSON, and for a key twice in an object (Python would take
    the last one).
    """
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=_no_key_twice)
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror}).") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise UserError(f"{file} is not valid JSON: {where}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not in UTF-8: byte {error.start} is {error.object[error.start]:#04x}.") from None
    except RecursionError:
        raise UserError(f"{file} can't be read as JSON: its values are nested too deeply.") from None
    except ValueError as error:  # a key given twice, a number of too many digits
        raise UserError(f"{file} can't be read as JSON: {error}.") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} is given {keys.count(twice)} times; keep one")
    return values


def write_json(path: Path, content: Any) -> None:
    """Write a value as indented JSON, in UTF-8."""
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
