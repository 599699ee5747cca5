"""Going on where a run stopped: what is kept after each phase and, every so often, within one.

All that is random is a function of the seeds, the phase, the epoch and the item, and so is everything between a phase's
start and its first step.  A checkpoint within a phase therefore holds only what training has changed: a run that goes
on from it loads the phase before, starts the phase anew and skips to the place.
"""

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from models.training import checkpoint
from models.training.checkpoint import StageRecord
from models.training.run import Run
from utils.cli import signals
from utils.config.schema import as_dict, differences
from utils.devices import Fabric, all_reduce
from utils.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class Place:
    """How far a phase's training has come.

    stages: the results of the stages that are done; epoch, step: how many epochs of the present stage, and how many
    steps of the present epoch, are done; sums: loss and right answers of those steps in this process, seen: their
    images; began: when training would have begun, had it never been interrupted; state: the checkpoint to restore
    network and optimizer from, None where there is none.
    """

    stages: list[StageRecord] = field(default_factory=list)
    epoch: int = 0
    step: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(2))
    seen: int = 0
    began: float = field(default_factory=time.perf_counter)
    state: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any], fabric: Fabric) -> Self:
        """The place that a checkpoint within a phase describes."""
        sums = state["sums"]
        if len(sums) != fabric.world_size:  # another number of processes: the first one gets all sums
            sums = F.pad(sums.sum(dim=0, keepdim=True), (0, 0, 0, fabric.world_size - 1))
        loss, right, seen = sums[fabric.global_rank].tolist()
        began = time.perf_counter() - state["seconds"]
        return cls(state["stages"], state["epoch"], state["step"], torch.tensor([loss, right]), int(seen), began, state)

    def as_state(self, fabric: Fabric) -> dict[str, Any]:
        """What `of` reads; to be called by all processes."""
        sums = torch.cat([self.sums.double(), self.sums.new_tensor([self.seen], dtype=torch.double)])
        return {
            "stages": self.stages,
            "epoch": self.epoch,
            "step": self.step,
            "sums": cast(Tensor, fabric.all_gather(sums)).reshape(-1, 3).cpu(),
            "seconds": time.perf_counter() - self.began,
        }

    def next_epoch(self) -> None:
        self.epoch, self.step, self.sums, self.seen = self.epoch + 1, 0, torch.zeros_like(self.sums), 0

    def next_stage(self, done: StageRecord) -> None:
        """Start of the next stage; `done` is the current stage's result."""
        self.stages = [*self.stages, done]
        self.epoch, self.step, self.sums, self.seen = 0, 0, torch.zeros_like(self.sums), 0


class StepClock:
    """Decides after each step whether the place is kept and whether a signal ends the run, alike in all processes.

    seconds: between two times that the place is kept, by the first process's clock; 0 for never.
    Processes agree after 1, 2, 4, ... steps, and then about once a second: a message at each step would slow them down.
    """

    def __init__(self, seconds: float, fabric: Fabric):
        self.seconds = seconds
        self.fabric = fabric
        self.restart()

    def restart(self) -> None:
        self.start, self.steps, self.next_look = time.monotonic(), 0, 1

    def look(self, *, last: bool = False) -> tuple[bool, int]:
        """(whether it is time to keep the place, the number of a signal that has come or 0); once after every step.

        last: of a stage, which is kept where it took a minute: what follows may take long and keeps nothing.
        """
        self.steps += 1
        passed, signal = time.monotonic() - self.start, signals.received or 0
        if self.fabric.world_size > 1:
            if self.steps < self.next_look and not last:
                return False, 0
            passed, signal = self._agree(passed, signal)
            steps_a_second = int(self.steps / max(passed, 1e-9))
            self.next_look = self.steps + min(self.steps, max(1, steps_a_second))
        limit = min(self.seconds, 60.0) if last else self.seconds
        return self.seconds > 0 and passed >= limit, signal

    def _agree(self, passed: float, signal: int) -> tuple[float, int]:
        """The seconds that have passed for the first process, and a signal that any process has got."""
        own = torch.tensor([passed if self.fabric.global_rank == 0 else 0.0, signal], dtype=torch.float64)
        passed, largest = all_reduce(self.fabric, own.to(self.fabric.device), "max").tolist()
        return passed, int(largest)


class Checkpoints:
    """Those of one run: one after each phase, and at most one within the present phase."""

    def __init__(self, run: Run):
        self.run = run
        self.folder = run.folder
        self.unfinished = checkpoint.unfinished_path(run.folder)

    def load(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """(the state after the last finished phase, the state within the next one); None where there is none.

        The first process decides which files count.  Raises UserError where they belong to another config or classes.
        """
        fabric = self.run.fabric
        phases, is_unfinished = fabric.broadcast((checkpoint.saved_phases(self.folder), self.unfinished.is_file()))
        path = checkpoint.phase_path(self.folder, phases[-1]) if phases else None
        state = self._read(path, checkpoint.AFTER_PHASE) if path else None
        done, nb_phases = len(state["records"]) if state else 0, self.run.data.nb_phases
        within = self._read(self.unfinished, checkpoint.WITHIN_PHASE) if is_unfinished else None
        fabric.barrier()  # nobody writes before all have read
        outdated = within is not None and within["phase"] != done
        if fabric.is_global_zero:
            checkpoint.remove_leftovers(self.folder)
            if outdated:
                self.unfinished.unlink()  # the run was killed after the phase was saved and before this was removed
        if outdated:
            within = None
        if within is not None:
            place = (len(within["stages"]) + 1, within["epoch"] + 1, within["step"])
            log.info("going on in phase %d, stage %d, epoch %d, after %d steps, from %s", done, *place, self.unfinished)
        elif done == nb_phases:
            log.info("all %d phases are done already: their results are taken from %s", done, path)
        elif done > 0:
            log.info("going on after %d of %d phases, from %s", done, nb_phases, path)
        return state, within

    def save_phase(self, state: Mapping[str, Any]) -> None:
        """Keep a finished phase; a rerun starts at the next one."""
        run = self.run
        if run.fabric.is_global_zero:
            checkpoint.save(checkpoint.phase_path(self.folder, state["phase"]), {**self._common(), **state})
            self.unfinished.unlink(missing_ok=True)
            if run.config.keep_checkpoints > 0:
                for phase in checkpoint.saved_phases(self.folder)[: -run.config.keep_checkpoints]:
                    checkpoint.phase_path(self.folder, phase).unlink()
        run.fabric.barrier()

    def save_within_phase(self, state: Mapping[str, Any]) -> None:
        """Keep the present place in a phase."""
        if self.run.fabric.is_global_zero:
            checkpoint.save(self.unfinished, {**self._common(), **state})

    def forget_unfinished(self) -> None:
        """Remove the checkpoint within the phase: training from it would diverge again."""
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
        run, state = self.run, checkpoint.load(path, parts)
        with checkpoint.fitting(path):
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
