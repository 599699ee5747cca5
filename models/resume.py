"""Going on where a run stopped: what is kept after each phase and, every so often, in the middle of one.

All that is random is a function of the seeds, the phase, the epoch and the item, and so is all that happens between a
phase's start and its first step.  A checkpoint within a phase therefore holds only what training has changed: a run
that goes on from it takes up the phase before, starts the phase anew and steps right to the place.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from models import checkpoint
from utils.config.schema import as_dict, differences
from utils.errors import UserError
from utils.fabric import Fabric

if TYPE_CHECKING:
    from models.base import Learner

log = logging.getLogger(__name__)


@dataclass
class Place:
    """How far a phase's training has come.

    stages: what came of the stages that are done; epoch, step: how many epochs of the present stage, and how many
    steps of the present epoch, are behind; sums: loss and right answers of those steps in this process, seen: their
    images; began: when training would have begun, had it never been interrupted; state: the checkpoint within the
    phase that is to be taken up, None where there is none.
    """

    stages: list[dict[str, Any]] = field(default_factory=list)
    epoch: int = 0
    step: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(2))
    seen: int = 0
    began: float = field(default_factory=time.perf_counter)
    state: dict[str, Any] | None = None

    def next_epoch(self) -> None:
        self.epoch, self.step, self.sums, self.seen = self.epoch + 1, 0, torch.zeros_like(self.sums), 0

    def next_stage(self, done: dict[str, Any]) -> "Place":
        """The beginning of the stage after the present one, of which `done` came."""
        return Place([*self.stages, done], began=self.began)


class StepClock:
    """Tells after a step whether so many seconds have passed: the same in every process, by the first one's clock.

    Asking it takes all processes, and is not done at each step: after 1, 2, 4, ... steps, then when time must be up.
    """

    def __init__(self, seconds: float, fabric: Fabric):
        self.seconds = seconds
        self.fabric = fabric
        self.restart()

    def restart(self) -> None:
        self.start, self.steps, self.next_look = time.monotonic(), 0, 1

    def is_over(self) -> bool:
        """To be called after every step.  Never for 0 seconds."""
        self.steps += 1
        if self.seconds == 0 or self.steps < self.next_look:
            return False
        passed = self.fabric.broadcast(time.monotonic() - self.start)
        if passed >= self.seconds:
            return True
        left = self.steps * (self.seconds / max(passed, 1e-9) - 1)
        self.next_look = self.steps + max(1, int(min(left, self.steps)))
        return False


class Checkpoints:
    """Those of one learner: one after each phase, and at most one within the present phase."""

    def __init__(self, learner: "Learner", folder: Path):
        self.learner = learner
        self.folder = folder
        self.clock = StepClock(learner.config.checkpoint_every, learner.fabric)
        self._unfinished: dict[str, Any] | None = None

    def take_up(self) -> int:
        """Take up the last checkpoint, if there is one.  Returns the phase to start with.

        Raises UserError where it is of another config or of other classes.
        """
        learner, fabric = self.learner, self.learner.fabric
        unfinished = checkpoint.unfinished_path(self.folder)
        phases, is_unfinished = fabric.broadcast((checkpoint.saved_phases(self.folder), unfinished.is_file()))
        path = checkpoint.phase_path(self.folder, phases[-1]) if phases else None
        last = self._load(path) if path else None
        if last is not None:
            self._take_up_phase(last)
        done, nb_phases = len(learner.records), learner.data.nb_phases
        state = self._load(unfinished) if is_unfinished else None
        began_with = (state if state and state["phase"] == done else last) or {}
        if done < nb_phases and began_with.get("copies") and learner.copies:
            learner.copies.check(began_with["copies"], learner.shown())
        fabric.barrier()  # nobody writes before all have read
        if fabric.is_global_zero:
            checkpoint.remove_leftovers(self.folder)
            if state is not None and state["phase"] != done:
                unfinished.unlink()  # the run was killed when the phase was safe and this not yet away
        if state is not None and state["phase"] == done:
            self._unfinished = state
            place = (len(state["stages"]) + 1, state["epoch"] + 1, state["step"])
            log.info("going on in phase %d, stage %d, epoch %d, after %d steps, from %s", done, *place, unfinished)
        elif done == nb_phases:
            log.info("all %d phases are done already: their results are taken from %s", done, path)
        elif done > 0:
            log.info("going on after %d of %d phases, from %s", done, nb_phases, path)
        return done

    def save_phase(self) -> None:
        """Keep the phase; a rerun starts at the next one."""
        learner = self.learner
        if learner.fabric.is_global_zero:
            state = {
                **self._common(),
                "network": learner.network.state_dict(),
                "memory": learner.memory.state_dict(),
                "method": learner.state,
                "records": learner.records,
            }
            checkpoint.save(checkpoint.phase_path(self.folder, learner.phase), state)
            checkpoint.unfinished_path(self.folder).unlink(missing_ok=True)
            if learner.config.keep_checkpoints > 0:
                for phase in checkpoint.saved_phases(self.folder)[: -learner.config.keep_checkpoints]:
                    checkpoint.phase_path(self.folder, phase).unlink()
        learner.fabric.barrier()
        self.clock.restart()

    def forget_unfinished(self) -> None:
        """Remove the checkpoint within the phase: training from it would diverge again."""
        if self.learner.fabric.is_global_zero:
            checkpoint.unfinished_path(self.folder).unlink(missing_ok=True)

    def place(self) -> Place:
        """Where the training of the phase that has just started goes on: its beginning, or where a killed run was."""
        state, self._unfinished = self._unfinished, None
        if state is None or state["phase"] != self.learner.phase:
            return Place()
        self.learner.within_phase = state["within_phase"]
        fabric, sums = self.learner.fabric, state["sums"]
        if len(sums) != fabric.world_size:  # the first process takes over what others had summed up
            sums = F.pad(sums.sum(dim=0, keepdim=True), (0, 0, 0, fabric.world_size - 1))
        loss, right, seen = sums[fabric.global_rank].tolist()
        began = time.perf_counter() - state["seconds"]
        sums = torch.tensor([loss, right])
        return Place(state["stages"], state["epoch"], state["step"], sums, int(seen), began, state)

    def restore(self, place: Place, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Put a stage that has been set up as at its beginning where it was."""
        if place.state is not None:
            for name, module in self.learner.changing().items():
                module.load_state_dict(place.state[name])
            optimizer.load_state_dict(place.state["optimizer"])
            scheduler.load_state_dict(place.state["scheduler"])
            optimizer._opt_called = True  # at an epoch's end the scheduler comes first, and rightly so: no warning
            torch.set_rng_state(place.state["random"])
        place.state = None  # it is large, and only for once
        place.sums = self.learner.fabric.to_device(place.sums)

    def after_step(self, place: Place, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Keep the place, if it is time to."""
        if not self.clock.is_over():
            return
        learner, fabric = self.learner, self.learner.fabric
        sums = torch.cat([place.sums.double(), place.sums.new_tensor([place.seen], dtype=torch.double)])
        sums = fabric.all_gather(sums).reshape(-1, 3).cpu()
        if fabric.is_global_zero:
            state = {
                **self._common(),
                "stages": place.stages,
                "epoch": place.epoch,
                "step": place.step,
                "sums": sums,
                "seconds": time.perf_counter() - place.began,
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "random": torch.get_rng_state(),
                "within_phase": learner.within_phase,
                **{name: module.state_dict() for name, module in learner.changing().items()},
            }
            checkpoint.save(checkpoint.unfinished_path(self.folder), state)
        self.clock.restart()

    def _common(self) -> dict[str, Any]:
        learner = self.learner
        return {
            "config": as_dict(learner.config),
            "class_names": learner.data.class_names,
            "phase": learner.phase,
            "copies": learner.copies and learner.copies.state(learner.shown()),
            "precision": learner.fabric.strategy.precision.state_dict(),  # the scale of 16-mixed's gradients
        }

    def _load(self, path: Path) -> dict[str, Any]:
        learner, state = self.learner, checkpoint.load(path)
        differing = differences(learner.config, state["config"])
        if state["class_names"] != learner.data.class_names:
            differing.append("the classes or their order")
        if differing:
            raise UserError(
                f"{path} is of another experiment ({'; '.join(differing)}). Choose another output_dir, or delete it."
            )
        if state.get("precision"):
            learner.fabric.strategy.precision.load_state_dict(state["precision"])
        return state

    def _take_up_phase(self, state: dict[str, Any]) -> None:
        learner = self.learner
        for phase in range(state["phase"] + 1):
            learner.network.grow(len(learner.data.phase_targets(phase)))
        learner.network.load_state_dict(state["network"])
        learner.to_home(learner.network)
        learner.memory.load_state_dict(state["memory"])
        learner.state = state["method"]
        learner.records = state["records"]
        if len(learner.records) < learner.data.nb_phases:
            learner.make_copies(state["phase"])  # copies that were deleted since then come back
