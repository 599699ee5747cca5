"""The one checkpoint format, and what names a cached phase-0 network.  Plain tensors and values, loaded without pickle.

A checkpoint holds `config`, `class_names` (in target order), `phase` (the last one that is done), `network` (its
weights), `memory` (which images are exemplars), `method` (what else the method carries on) and `records` (the results
of each phase).
"""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.images import write_atomically

_PHASE = re.compile(r"phase(\d+)\.pt")


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values; a killed run leaves the old file or the new one."""
    write_atomically(path, lambda file: torch.save(dict(state), file))


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, its tensors on the CPU.  Raises UserError for a file that is none of ours or is broken."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} is no checkpoint of this program or is damaged ({reason}). Delete it.") from None
    if not isinstance(state, dict) or "network" not in state:
        raise UserError(f"{path} is no checkpoint of this program. Delete it.")
    return state


def phase_path(folder: Path, phase: int) -> Path:
    """Where the checkpoint after a phase lies."""
    return folder / f"phase{phase:02d}.pt"


def saved_phases(folder: Path) -> list[int]:
    """The phases whose checkpoints are in a folder, ascending."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _PHASE.fullmatch(name)))


def fingerprint(settings: Mapping[str, Any], files: Iterable[Path], root: Path) -> str:
    """A short name for everything that a phase-0 network depends on: settings, and files by name and size.

    Files that are not there count as such: copies may be missing where they are drawn with probability 0.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size if file.is_file() else -1
        digest.update(f"{file.relative_to(root).as_posix()}\0{size}\0".encode())
    return digest.hexdigest()[:24]
