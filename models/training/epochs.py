"""The epoch loop: the optimisation steps of a stage, with checkpoints between them."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from models.training.checkpoint import StageRecord
from models.training.method import Method
from models.training.resume import Checkpoints, Place, StepClock
from models.training.run import Run
from models.training.stages import Stage, divergence, learning_only
from utils import log as logs
from utils.cli import signals
from utils.data.batches import EpochBatchSampler
from utils.devices import all_reduce
from utils.errors import Stopped, UserError

# isort: split
from lightning_fabric.wrappers import _FabricModule  # after utils.devices

log = logging.getLogger(__name__)


@dataclass
class _Training:
    """A stage in training.  network: as Fabric wraps it; first_epoch: epochs of the phase's earlier stages."""

    stage: Stage
    place: Place
    loader: DataLoader
    sampler: EpochBatchSampler
    network: _FabricModule
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

    def fit(self, stage: Stage, place: Place) -> StageRecord:
        """Train one stage.

        place: within the phase, at the stage's start or farther on; it moves along.  Raises UserError where there are
        no images, and where training diverges.
        """
        loss, accuracy = 0.0, 0.0
        losses: list[float] = []
        with learning_only(self.method.network, stage.parameters):
            training = self._set_up(stage, place)
            with EpochLog(self.run, self.method, training, self.epochs_before) as progress, signals.delayed():
                for _ in range(place.epoch, stage.schedule.epochs):
                    loss, accuracy = self._epoch(training, progress)
                    losses.append(loss)
            warn_of_rising_loss(training.name, losses)
            if not all(bool(parameter.isfinite().all()) for parameter in self.method.network.parameters()):
                raise self._diverged(training, f"a weight is not finite after epoch {stage.schedule.epochs}")
        self.run.broadcast_network(self.method.network)
        return {"stage": stage.name, "epochs": stage.schedule.epochs, "loss": loss, "accuracy": accuracy}

    def _set_up(self, stage: Stage, place: Place) -> _Training:
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
        in_backbones = {id(parameter) for module in network.backbones() for parameter in module.parameters()}
        heads = [parameter for parameter in trained if id(parameter) not in in_backbones]
        backbone = [parameter for parameter in trained if id(parameter) in in_backbones]
        groups: list[dict[str, Any]] = [{"params": heads}, {"params": backbone, "lr": self.config.backbone_lrate}]
        return [group for group in groups if group["params"]]

    def _epoch(self, training: _Training, progress: "EpochLog") -> tuple[float, float]:
        """Train what is left of an epoch.  Returns the mean loss and the accuracy of the whole epoch."""
        run, fabric, method = self.run, self.fabric, self.method
        place, sampler, optimizer, network = training.place, training.sampler, training.optimizer, training.network
        loss_of = training.stage.loss or method.loss
        epoch = training.first_epoch + place.epoch
        network.train()
        sampler.set_epoch(epoch, place.step)
        for _, images, targets in training.loader:
            # Set up the step.  What is random in it is a function of its place.
            sizes = sampler.sizes(place.step)
            method.epoch, method.step, method.images_in_step = place.epoch, place.step, sizes[1]
            run.seed_step(method.phase, epoch, place.step)
            method.before_batch()

            # Accumulate gradients.
            optimizer.zero_grad()
            batch = run.to_device(images), fabric.to_device(targets)
            for part in parts(*batch, self.config.accumulate_batches, sizes, fabric.world_size):
                with fabric.no_backward_sync(network, enabled=not part.last):
                    prepared, labels = method.prepare(part.images, part.targets)
                    outputs = network(prepared)
                    with fabric.autocast():
                        loss = loss_of(outputs, prepared, labels)
                    fabric.backward(loss * part.share)
                right = (outputs.logits.detach().argmax(dim=1) == labels).sum() * part.size / len(labels)
                place.sums += torch.stack([loss.detach() * part.size, right])  # read once an epoch
                place.seen += part.size

            # Update weights.
            method.before_step()
            optimizer.step()
            place.step += 1

            # Keep the place once in a while, and where a signal ends the run.
            is_time, signal = self.clock.look(
                last=place.epoch + 1 == training.stage.schedule.epochs and place.step == len(sampler)
            )
            if is_time or signal:
                self.save(place, optimizer, training.scheduler)
            progress.add_step()
            if signal:
                done = f"{training.name} is kept up to epoch {place.epoch + 1}, step {place.step} of {len(sampler)}"
                raise Stopped(signal, f"{done}, in {self.checkpoints.unfinished}")

        # Finish the epoch.
        rate = optimizer.param_groups[0]["lr"]
        training.scheduler.step()
        loss, accuracy = self._finish_epoch(place)
        if not math.isfinite(loss):
            raise self._diverged(training, f"the loss is {loss} in epoch {place.epoch}")
        progress.add_epoch(place.epoch, rate, loss, accuracy)
        return loss, accuracy

    def _finish_epoch(self, place: Place) -> tuple[float, float]:
        """The mean loss and the accuracy (percent) of the epoch; the place moves to the next one."""
        fabric = self.fabric
        loss, right = all_reduce(fabric, place.sums, "sum").tolist()
        seen = int(all_reduce(fabric, torch.tensor(place.seen, device=fabric.device), "sum"))
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
        optimizer._opt_called = True  # type: ignore[attr-defined]  # at an epoch's end the scheduler comes first, and rightly so: no warning


class EpochLog:
    """What is seen of a stage's training: the bar with the time left, a line of the log and of the history an epoch."""

    def __init__(self, run: Run, method: Method, training: _Training, epochs_before: int):
        self.run, self.method, self.training = run, method, training
        self.epochs_before = epochs_before
        self.epochs = training.stage.schedule.epochs
        steps, place, quiet = len(training.sampler), training.place, not run.fabric.is_global_zero
        done = place.epoch * steps + place.step
        self.bar = logs.progress(self.epochs * steps, training.name, done=done, quiet=quiet, rate=False)
        self.start = time.perf_counter()

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(*error)

    def add_step(self) -> None:
        self.bar.update()

    def add_epoch(self, number: int, rate: float, loss: float, accuracy: float) -> None:
        """number: of the stage, from 1; rate: the learning rate; loss, accuracy (percent): of its training batches."""
        training, items = self.training, len(self.training.stage.items)
        seconds, self.start = time.perf_counter() - self.start, time.perf_counter()
        log.debug("%s: epoch %d/%d, loss %.3f, train %.1f %%", training.name, number, self.epochs, loss, accuracy)
        left = seconds_left(self.run, self.method, seconds / items, (self.epochs - number) * items)
        self.bar.set_postfix_str(f"epoch {number}, loss {loss:.3f}, run {logs.clock(left)}", refresh=False)
        if self.run.history:
            epoch = training.first_epoch + number
            self.run.history.add_epoch(
                self.method.phase,
                training.stage.name,
                epoch,
                step=self.epochs_before + epoch,
                learning_rate=rate,
                loss=loss,
                accuracy=accuracy,
                seconds=seconds,
            )


def seconds_left(run: Run, method: Method, for_an_image: float, images: int) -> float:
    """Estimate for the rest of this class order: `images` more in this phase, and the later phases' epochs."""
    data, phases = run.data, range(method.phase + 1, run.data.nb_phases)
    new = sum(len(data.train_images(target)) for phase in phases for target in data.phase_targets(phase))
    exemplars = len(run.memory.items()) * len(phases)
    epochs = method.defaults.schedule(run.config, phase_0=False).epochs
    return for_an_image * (images + (new + exemplars) * epochs)


def warn_of_rising_loss(name: str, losses: Sequence[float]) -> None:
    """Say so where a stage of three epochs or more ends with a larger loss than its first epoch's.

    losses: means of the epochs that this process has trained.
    """
    if len(losses) > 2 and losses[-1] > max(losses[0], 0.0):
        log.warning(
            "%s: the loss rose from %.3f to %.3f: a lower learning rate may help (see epochs.csv)",
            *(name, losses[0], losses[-1]),
        )


class Part(NamedTuple):
    """Some images of a batch.

    images: B x 3 x H x W; targets: B; size: B, or 0 where they only keep a process in step with the others; share: the
    weight of their mean loss; last: whether none comes after it in this process.
    """

    images: Tensor
    targets: Tensor
    size: int
    share: float
    last: bool


def parts(images: Tensor, targets: Tensor, number: int, sizes: tuple[int, int], nb_processes: int) -> Iterator[Part]:
    """A process's images in (up to) so many parts, weighted so that the gradients of all are that of the batch's mean.

    sizes: images of this process that count, and of all processes (`EpochBatchSampler.sizes`).

    Gradients add up over the parts of a process and are averaged over processes.  So the mean loss of n images out of
    the N of all counts n/N times the number of processes: the sum over all parts is the mean over the N images.
    """
    own, total = sizes
    pieces = list(zip(*(tensor.chunk(number if own else 1) for tensor in (images, targets)), strict=True))
    for i, (some, their_targets) in enumerate(pieces):
        size = len(some) if own else 0
        yield Part(some, their_targets, size, size * nb_processes / total, last=i + 1 == len(pieces))
