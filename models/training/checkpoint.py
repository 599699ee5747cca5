"""The one checkpoint format, and what names a cached phase-0 network.  Plain tensors and values, loaded without pickle.

Each holds `config`, `class_names` (in target order), `picture_size` (width and height of a typical one), `phase`,
`network` (its weights) and `precision` (the scale of gradients in 16 bits, else nothing).

After a phase, `phaseNN.pt` adds `memory` (which images are exemplars), `class_means` (classes x D: the nearest-mean
classifier, None where it is not used), `method` (what else the method carries on) and `records` (the results of each
phase).

Within one, `unfinished.pt` adds `stages` (what came of those that are done), `epoch` and `step` (how many of the
present stage and of the present epoch are done), `sums` (processes x 3: loss, right answers and images of those
steps), `seconds` (of training so far), `optimizer`, `scheduler`, `random` (torch's state) and `within_phase` (what else
the phase's training has worked out).  What the phase began with is in the checkpoint of the phase before.
"""

import hashlib
import itertools
import json
import os
import pickle
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from utils.errors import UserError
from utils.files import content_digest, write_atomically
from utils.results.metrics import PhaseMetrics

_PHASE = re.compile(r"phase(\d+)\.pt")


class StageRecord(TypedDict):
    """loss, accuracy (percent): of the last epoch's training batches."""

    stage: str
    epochs: int
    loss: float | None
    accuracy: float | None


class TrainingRecord(TypedDict):
    """epochs, loss, accuracy: of the first stage; seconds: of all; reused: whether another run's network was taken."""

    epochs: int
    loss: float | None
    accuracy: float | None
    stages: list[StageRecord]
    seconds: float
    reused: bool


class Scores(TypedDict):
    """Of the classifiers of `utils.results.records.CLASSIFIERS`; nme: None where it is unused."""

    cnn: PhaseMetrics
    nme: PhaseMetrics | None
    student: NotRequired[PhaseMetrics]
    svm: NotRequired[PhaseMetrics]


class PhaseRecord(Scores):
    """memory: `ExemplarMemory.report`, and archive_bytes: the size of the file that holds all of it; copies_on_demand:
    number made, None where all are made ahead; copies: what made those in use, None where none are; seconds: by part of
    the phase.
    """

    phase: int
    classes_seen: int
    memory: Mapping[str, Any]
    parameters: int
    training: TrainingRecord
    copies_on_demand: int | None
    copies: Mapping[str, Any] | None
    seconds: Mapping[str, float]


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values; a killed run or a power failure leaves the old file or the new one.

    Raises UserError where the disk is full or the folder can't be written to; what was there before stays.
    """
    try:
        write_atomically(path, lambda file: torch.save(dict(state), file), durably=True)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's writer, on a full disk
            raise
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or "the disk may be full"
        raise UserError(
            f"the checkpoint {path} could not be written ({reason}). "
            "Make room and run the same command again: it goes on from the last checkpoint."
        ) from error


COMMON = frozenset({"config", "class_names", "phase", "network"})
AFTER_PHASE = COMMON | {"memory", "class_means", "method", "records"}
WITHIN_PHASE = COMMON | {"stages", "epoch", "step", "sums", "seconds", "optimizer", "within_phase"}
PHASE_0 = frozenset({"network", "training"})
"""What each kind of checkpoint has at least."""


def load(path: Path, parts: Collection[str] = ("network",)) -> dict[str, Any]:
    """What `save` wrote, its tensors on the CPU.

    parts: what it must have.  Raises UserError for a file that is none of ours or is damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message advises to run the code in the file
        raise _none_of_ours(path, "another kind of file, or one that holds code, which is never run") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise _none_of_ours(path, f"damaged: {reason or type(error).__name__}") from None
    if not isinstance(state, dict) or (missing := sorted(set(parts) - state.keys())):
        raise _none_of_ours(path, f"it has no {missing[0]}" if isinstance(state, dict) else "of another kind")
    return state


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """While a checkpoint's content is taken over.  Raises UserError where its parts do not fit this program's."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:120]
        raise _none_of_ours(path, f"{type(error).__name__}: {reason}") from error


def _none_of_ours(path: Path, why: str) -> UserError:
    advice = "Move it elsewhere; a run goes on from the checkpoint before it, or begins anew."
    return UserError(f"{path} is no checkpoint of this program ({why}). {advice}")


def phase_path(folder: Path, phase: int) -> Path:
    """Where the checkpoint after a phase lies."""
    return folder / f"phase{phase:02d}.pt"


def unfinished_path(folder: Path) -> Path:
    """Where the checkpoint within the present phase lies."""
    return folder / "unfinished.pt"


def saved_phases(folder: Path) -> list[int]:
    """The phases whose checkpoints are in a folder, ascending."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _PHASE.fullmatch(name)))


def remove_leftovers(folder: Path) -> None:
    """Take away what a process that was killed while it wrote has left half done; for a folder of one run alone."""
    for file in folder.glob(".*.tmp"):
        file.unlink()


def fingerprint(settings: Mapping[str, Any], files: Iterable[Path], root: Path) -> str:
    """A short name for everything that a phase-0 network depends on: settings, and files by name, size, time of
    modification, and the content of a few of each folder.

    Each folder is listed once.  Files that are not there count as such: copies may be missing where they are drawn with
    probability 0.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for folder, group in itertools.groupby(files, key=lambda file: file.parent):
        folder_files, stamps = list(group), _stamps(folder)
        digest.update(os.fsencode(f"{folder.relative_to(root).as_posix()}\0{content_digest(folder_files)}\0"))
        for file in folder_files:
            digest.update(os.fsencode(f"{file.name}\0{stamps.get(file.name, -1)}\0"))
    return digest.hexdigest()[:24]


def _stamps(folder: Path) -> dict[str, str]:
    """Size and time of modification of the files in a folder, by name."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        stats = ((entry.name, entry.stat()) for entry in entries if entry.is_file())
        return {name: f"{stat.st_size}-{stat.st_mtime_ns}" for name, stat in stats}
