"""Half-written files of killed processes."""

import os
import re
import socket
import time
from pathlib import Path

OLD = 3600.0
"""Seconds after which a half-written file is nobody's any more: no write takes as long."""


def temporary_files(folder: Path) -> list[Path]:
    """The half-written files (as `write_atomically` names them) of processes that have died.

    On this machine they no longer run; of other machines and containers, which may share the disk, nothing has been
    written for OLD seconds.
    """
    if not folder.is_dir():
        return []
    # Without a host before 2026-12.
    found = [(file, re.match(r"\.(?:(.+)\.)?(\d+)-", file.name)) for file in folder.glob(".*.tmp")]
    return [file for file, name in found if name and _is_abandoned(file, name[1], int(name[2]))]


def _is_abandoned(file: Path, host: str | None, process: int) -> bool:
    try:
        age = time.time() - file.stat().st_mtime
    except FileNotFoundError:  # moved into place meanwhile
        return False
    return age > OLD or (host == socket.gethostname() and not is_running(process))


def is_running(process: int) -> bool:
    """Whether another process of this number runs on this machine."""
    if process == os.getpid():
        return False  # this process has not begun to write: another machine or container had the same number
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
