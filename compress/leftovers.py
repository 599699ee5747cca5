"""Half-written files of killed processes."""

import os
import re
from pathlib import Path


def temporary_files(folder: Path) -> list[Path]:
    """The half-written files (as `write_atomically` names them) of processes that no longer run on this machine."""
    if not folder.is_dir():
        return []
    found = [(file, re.match(r"\.(\d+)-", file.name)) for file in folder.glob(".*.tmp")]
    return [file for file, process in found if process and not is_running(int(process[1]))]


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
