"""The one checkpoint format: plain tensors and values, loaded without pickle.  Who writes one when, and reads which.

Each holds `config`, `class_names` (in target order), `picture_size` (width and height of a typical one), `phase`,
`network` (its weights), `copies` (what identifies those that are read) and `precision` (the scale of gradients in 16
bits, else nothing).

After a phase, `phaseNN.pt` adds `memory` (which images are exemplars), `class_means` (classes x D: the nearest-mean
classifier, None where it is not used), `method` (what else the method carries on) and `records` (the results of each
phase).

Within one, `unfinished.pt` adds `stages` (what came of those that are done), `epoch` and `step` (how many of the
present stage and of the present epoch are done), `sums` (processes x 3: loss, right answers and images of those
steps), `seconds` (of training so far), `optimizer`, `scheduler` and `within_phase` (what else the phase's training has
worked out).  What the phase began with is in the checkpoint of the phase before.
"""

import logging
import os
import pickle
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from models.training.run import Run
from utils.cli import signals
from utils.config.schema import as_dict, differences
from utils.devices import Fabric, all_reduce
from utils.errors import UserError
from utils.files import write_atomically

log = logging.getLogger(__name__)

COMMON = frozenset({"config", "class_names", "phase", "network"})
AFTER_PHASE = COMMON | {"memory", "class_means", "method", "records"}
WITHIN_PHASE = COMMON | {"stages", "epoch", "step", "sums", "seconds", "optimizer", "within_phase"}
PHASE_0 = frozenset({"network", "training"})
"""What each kind of checkpoint has at least."""


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
    if not isinstance(state, dict):
        raise _none_of_ours(path, "of another kind")
    if missing := sorted(set(parts) - state.keys()):
        raise _none_of_ours(path, f"it has no {missing[0]}")
    return state


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """While a checkpoint's content is taken over.  Raises UserError where its parts do not fit this program's."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
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


def saved_phases(folder: Path) -> list[int]:
    """The phases whose checkpoints are in a folder, ascending."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"phase(\d+)\.pt", name)))


class StepClock:
    """Decides after each step whether a checkpoint is due and whether a signal ends the run, alike in all processes.

    seconds: between two checkpoints, by the first process's clock; 0 for none.
    Processes agree after 1, 2, 4, ... steps, and then about once a second: a message at each step would slow them down.
    """

    def __init__(self, seconds: float, fabric: Fabric):
        self.seconds = seconds
        self.fabric = fabric
        self.restart()

    def restart(self) -> None:
        self.start, self.steps, self.next_look = time.monotonic(), 0, 1

    def look(self, *, last: bool = False) -> tuple[bool, int]:
        """(whether a checkpoint is due, the number of a signal that has come or 0); once after every step.

        last: of a stage, after which one is due if it took a minute: what follows may take long and saves nothing.
        """
        self.steps += 1
        passed, signal = time.monotonic() - self.start, signals.received or 0
        if self.fabric.world_size > 1:
            if self.steps < self.next_look and not last:
                return False, 0
            own = torch.tensor([passed if self.fabric.global_rank == 0 else 0.0, signal], dtype=torch.float64)
            passed, any_signal = all_reduce(self.fabric, own.to(self.fabric.device), "max").tolist()
            signal = int(any_signal)
            self.next_look = self.steps + min(self.steps, max(1, int(self.steps / max(passed, 1e-9))))
        limit = min(self.seconds, 60.0) if last else self.seconds
        return self.seconds > 0 and passed >= limit, signal


class Checkpoints:
    """Those of one run: one after each phase, and at most one within the present phase.

    clock: tells when the next one within a phase is due.
    """

    def __init__(self, run: Run):
        self.run = run
        self.folder = run.folder
        self.unfinished = run.folder / "unfinished.pt"
        self.clock = StepClock(run.config.checkpoint_every, run.fabric)

    def load(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """(the state after the last finished phase, the state within the next one); None where there is none.

        The first process decides which files count.  Raises UserError where they belong to another config or classes.
        """
        fabric = self.run.fabric
        phases, is_unfinished = fabric.broadcast((saved_phases(self.folder), self.unfinished.is_file()))
        path = phase_path(self.folder, phases[-1]) if phases else None
        state = self._read(path, AFTER_PHASE) if path else None
        done, nb_phases = len(state["records"]) if state else 0, self.run.data.nb_phases
        within = self._read(self.unfinished, WITHIN_PHASE) if is_unfinished else None
        fabric.barrier()  # nobody writes before all have read
        if fabric.is_global_zero:
            for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
        if within is not None and within["phase"] != done:
            self.forget_unfinished()  # the run was killed after the phase was saved and before this was removed
            within = None
        if within is not None:
            at = (len(within["stages"]) + 1, within["epoch"] + 1, within["step"])
            log.info("going on in phase %d, stage %d, epoch %d, after %d steps, from %s", done, *at, self.unfinished)
        elif done == nb_phases:
            log.info("all %d phases are done already: their results are taken from %s", done, path)
        elif done > 0:
            log.info("going on after %d of %d phases, from %s", done, nb_phases, path)
        return state, within

    def save_phase(self, state: Mapping[str, Any]) -> None:
        """After a phase; a rerun starts at the next one."""
        run = self.run
        if run.fabric.is_global_zero:
            save(phase_path(self.folder, state["phase"]), {**self._common(), **state})
            self.unfinished.unlink(missing_ok=True)
            if run.config.keep_checkpoints > 0:
                for phase in saved_phases(self.folder)[: -run.config.keep_checkpoints]:
                    phase_path(self.folder, phase).unlink()
        run.fabric.barrier()
        self.clock.restart()

    def save_within_phase(self, state: Mapping[str, Any]) -> None:
        if self.run.fabric.is_global_zero:
            save(self.unfinished, {**self._common(), **state})
        self.clock.restart()

    def forget_unfinished(self) -> None:
        if self.run.fabric.is_global_zero:
            self.unfinished.unlink(missing_ok=True)

    def _common(self) -> dict[str, Any]:
        run = self.run
        return {
            "config": as_dict(run.config),
            "class_names": run.data.class_names,
            "picture_size": list(run.data.picture_size),
            "precision": run.fabric.strategy.precision.state_dict(),  # the scale of 16-mixed's gradients
        }

    def _read(self, path: Path, parts: Collection[str]) -> dict[str, Any]:
        run, state = self.run, load(path, parts)
        with fitting(path):
            differing = differences(run.config, state["config"])
        if state["class_names"] != run.data.class_names:
            differing.append("the classes or their order")
        if differing:
            raise UserError(
                f"{path} is of another experiment ({'; '.join(differing)}). Choose another output_dir, or delete it."
            )
        if state.get("precision"):
            run.fabric.strategy.precision.load_state_dict(state["precision"])
        return state
