"""The epoch loop: the optimisation steps of a stage, with checkpoints between them."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from models.method import Method
from models.parts import parts
from models.resume import Checkpoints, Place, StepClock
from models.run import Run
from models.stages import Stage, divergence, learning_only
from utils import log as logs
from utils.cli import signals
from utils.data.sampler import EpochBatchSampler
from utils.errors import Stopped, UserError

log = logging.getLogger(__name__)


@dataclass
class _Training:
    """A stage in training.  network: as Fabric wraps it; first_epoch: epochs of the phase's earlier stages."""

    stage: Stage
    place: Place
    loader: DataLoader
    sampler: EpochBatchSampler
    network: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    first_epoch: int
    name: str


class Epochs:
    """Trains a method's network, stage after stage.

    Everything random goes by the epoch of the phase, so a stage that is taken up in the middle ends with the same bits.
    """

    def __init__(self, run: Run, method: Method, checkpoints: Checkpoints):
        self.run, self.config, self.fabric, self.method = run, run.config, run.fabric, method
        self.checkpoints = checkpoints
        self.clock = StepClock(run.config.checkpoint_every, run.fabric)
        self.epochs_before = 0
        """Epochs of all earlier phases, for the history."""
        self.copies_state: dict[str, Any] | None = None
        """Of the copies that the present phase reads, for its checkpoints."""

    def fit(self, stage: Stage, place: Place) -> dict[str, Any]:
        """Train one stage.  Returns epochs, loss and accuracy (percent, of the last epoch's training batches).

        place: within the phase, at the stage's start or farther on; it moves along.
        """
        with learning_only(self.method.network, stage.parameters):
            training = self._set_up(stage, place)
            epochs, loss, accuracy = stage.schedule.epochs, 0.0, 0.0
            losses: list[float] = []
            steps = len(training.sampler)
            done, quiet = place.epoch * steps + place.step, not self.fabric.is_global_zero
            bar = logs.progress(epochs * steps, training.name, done=done, quiet=quiet, rate=False)
            with bar, signals.delayed():
                for _ in range(place.epoch, epochs):
                    loss, accuracy = self._epoch(training, bar)
                    losses.append(loss)
            warn_of_rising_loss(training.name, losses)
            if not all(bool(parameter.isfinite().all()) for parameter in self.method.network.parameters()):
                raise self._diverged(training, f"a weight is not finite after epoch {epochs}")
        self.run.share(self.method.network)
        return {"epochs": epochs, "loss": loss, "accuracy": accuracy}

    def _set_up(self, stage: Stage, place: Place) -> _Training:
        """Raises UserError where there are no images."""
        method, fabric, schedule = self.method, self.fabric, stage.schedule
        if not stage.items:
            raise UserError(f"{method.describe(stage.name)}: there is not one image to train on.")
        loader, sampler = self.run.training_loader(stage, method.phase)
        optimizer = schedule.build_optimizer(self._parameters(), self.config.momentum)
        network, optimizer = fabric.setup(self.run.compiled(method.network), optimizer)
        scheduler = schedule.scheduler(optimizer)
        self.restore(place, optimizer, scheduler)
        place.sums = fabric.to_device(place.sums)
        first_epoch = sum(done["epochs"] for done in place.stages)
        name = method.describe(stage.name).removesuffix(", training")
        return _Training(stage, place, loader, sampler, network, optimizer, scheduler, first_epoch, name)

    def _parameters(self) -> list[nn.Parameter] | list[dict[str, Any]]:
        """What is trained; in two groups where the backbone has a learning rate of its own."""
        network = self.method.network
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if self.config.backbone_lrate is None:
            return trained
        of_backbone = {id(parameter) for module in network.backbones() for parameter in module.parameters()}
        heads = [parameter for parameter in trained if id(parameter) not in of_backbone]
        backbone = [parameter for parameter in trained if id(parameter) in of_backbone]
        groups = [{"params": heads}, {"params": backbone, "lr": self.config.backbone_lrate}]
        return [group for group in groups if group["params"]]

    def _epoch(self, training: _Training, bar: tqdm) -> tuple[float, float]:
        """Train what is left of an epoch.  Returns the mean loss and the accuracy of the whole epoch."""
        place, sampler, schedule = training.place, training.sampler, training.stage.schedule
        start, epoch, of_phase = time.perf_counter(), place.epoch, training.first_epoch + place.epoch
        training.network.train()
        sampler.set_epoch(of_phase, place.step)
        for _, images, targets in training.loader:
            self._step(training, self.run.to_device(images), self.fabric.to_device(targets))
            is_time, signal = self.clock.look(last=epoch + 1 == schedule.epochs and place.step == len(sampler))
            if is_time or signal:
                self.save(place, training.optimizer, training.scheduler)
            bar.update()
            if signal:
                done = f"{training.name} is kept up to epoch {epoch + 1}, step {place.step} of {len(sampler)}"
                raise Stopped(signal, f"{done}, in {self.checkpoints.unfinished}")
        rate = training.optimizer.param_groups[0]["lr"]
        training.scheduler.step()
        loss, accuracy = self._finish_epoch(place)
        if not math.isfinite(loss):
            raise self._diverged(training, f"the loss is {loss} in epoch {epoch + 1}")
        progress = f"epoch {epoch + 1}/{schedule.epochs}, loss {loss:.3f}, train {accuracy:.1f} %"
        log.debug("%s: %s", training.name, progress)
        seconds, nb_items = time.perf_counter() - start, len(training.stage.items)
        left = self._seconds_left(seconds / nb_items, (schedule.epochs - place.epoch) * nb_items)
        bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}, run {logs.clock(left)}", refresh=False)
        if self.run.history:
            curves = {"learning_rate": rate, "loss": loss, "accuracy": accuracy, "seconds": seconds}
            where = (self.method.phase, training.stage.name, of_phase + 1)
            self.run.history.epoch(*where, step=self.epochs_before + of_phase + 1, **curves)
        return loss, accuracy

    def _step(self, training: _Training, images: Tensor, targets: Tensor) -> None:
        """One optimisation step, on a batch or this process's share of it."""
        fabric, method, place = self.fabric, self.method, training.place
        loss_of, sizes = training.stage.loss or method.loss, training.sampler.sizes(place.step)
        method.epoch, method.step, method.images_in_step = place.epoch, place.step, sizes[1]
        self.run.seed_step(method.phase, training.first_epoch + place.epoch, place.step)
        method.before_batch()
        training.optimizer.zero_grad()
        for part in parts(images, targets, self.config.accumulate_batches, sizes, fabric.world_size):
            with fabric.no_backward_sync(training.network, enabled=not part.last):
                shown, labels = method.prepare(part.images, part.targets)
                outputs = training.network(shown)
                with fabric.autocast():
                    loss = loss_of(outputs, shown, labels)
                fabric.backward(loss * part.share)
            right = (outputs.logits.detach().argmax(dim=1) == labels).sum() * part.count / len(labels)
            place.sums += torch.stack([loss.detach() * part.count, right])  # read once an epoch
            place.seen += part.count
        method.before_step()
        training.optimizer.step()
        place.step += 1

    def _finish_epoch(self, place: Place) -> tuple[float, float]:
        """The mean loss and the accuracy (percent) of the epoch; the place moves to the next one."""
        fabric = self.fabric
        loss, right = fabric.all_reduce(place.sums, reduce_op="sum").tolist()
        seen = int(fabric.all_reduce(torch.tensor(place.seen, device=fabric.device), reduce_op="sum"))
        place.next_epoch()
        return loss / seen, 100 * right / seen

    def _diverged(self, training: _Training, what: str) -> UserError:
        """The error to raise, which names the keys of the stage's learning rates."""
        self.checkpoints.forget_unfinished()
        schedule, rates = training.stage.schedule, {}
        for group in training.optimizer.param_groups:
            initial = group["initial_lr"]
            rates[schedule.lr_key if initial == schedule.lr else "backbone_lrate"] = initial
        return divergence(what, self.method.phase, rates)

    def _seconds_left(self, for_an_image: float, images: int) -> float:
        """Estimate for the rest of this class order: `images` more in this phase, and the later phases' epochs."""
        data, phases = self.run.data, range(self.method.phase + 1, self.run.data.nb_phases)
        new = sum(len(data.train_images(target)) for phase in phases for target in data.phase_targets(phase))
        exemplars = len(self.run.memory.items()) * len(phases)
        epochs = self.method.defaults.schedule(self.config, phase_0=False).epochs
        return for_an_image * (images + (new + exemplars) * epochs)

    def save(self, place: Place, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Keep the place within the phase."""
        method = self.method
        self.checkpoints.save_within_phase(
            {
                **place.as_state(self.fabric),
                "phase": method.phase,
                "network": method.network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "within_phase": method.within_phase,
                "copies": self.copies_state,
            }
        )
        self.clock.restart()

    def restore(self, place: Place, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Load what `save` kept into a stage that has been set up as at its start, once."""
        state, place.state = place.state, None  # it is large
        if state is None:
            return
        self.method.network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        optimizer._opt_called = True  # at an epoch's end the scheduler comes first, and rightly so: no warning


def warn_of_rising_loss(name: str, losses: Sequence[float]) -> None:
    """Say so where a stage of three epochs or more ends with a larger loss than its first epoch's.

    losses: means of the epochs that this process has trained.
    """
    if len(losses) > 2 and losses[-1] > max(losses[0], 0.0):
        log.warning(
            "%s: the loss rose from %.3f to %.3f: a lower learning rate may help (see epochs.csv)",
            *(name, losses[0], losses[-1]),
        )
