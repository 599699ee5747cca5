"""The epoch loop: the optimisation steps of a stage, with checkpoints between them.

All that is random is a function of the seeds, the phase, the epoch and the item, and so is everything between a phase's
start and its first step.  A checkpoint within a phase therefore holds only what training has changed: a run that goes
on from it loads the phase before, starts the phase anew, skips to the step, and ends with the same bits.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.training.checkpoint import Checkpoints
from models.training.method import Method
from models.training.run import Run
from models.training.stages import Stage, divergence, learning_only
from utils import log as logs
from utils.cli import signals
from utils.devices import Fabric, all_reduce
from utils.errors import Stopped, UserError
from utils.results import records

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far the training of a phase has come.

    stages: the results of those that are done; epoch, step: how many epochs of the present stage, and how many steps of
    the present epoch, are done; sums: loss, right answers and images of those steps in this process; began: when
    training would have begun, had it never been interrupted; epochs_before: of all earlier phases; copies: what
    identifies those that the phase reads; checkpoint: to restore network and optimizer from, None where there is none.
    """

    stages: list[records.Stage] = field(default_factory=list)
    epoch: int = 0
    step: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3))
    began: float = field(default_factory=time.perf_counter)
    epochs_before: int = 0
    copies: dict[str, Any] | None = None
    checkpoint: Mapping[str, Any] | None = None

    @classmethod
    def restored(cls, state: Mapping[str, Any], fabric: Fabric) -> Self:
        """state: a checkpoint within a phase."""
        sums = state["sums"]
        if len(sums) != fabric.world_size:  # another number of processes: the first one gets all sums
            sums = F.pad(sums.sum(dim=0, keepdim=True), (0, 0, 0, fabric.world_size - 1))
        own_sums = sums[fabric.global_rank].to(torch.get_default_dtype())
        stages = [records.Stage.model_validate(stage) for stage in state["stages"]]
        began = time.perf_counter() - state["seconds"]
        return cls(stages, state["epoch"], state["step"], own_sums, began, checkpoint=state)

    def state(self, fabric: Fabric) -> dict[str, Any]:
        """What `restored` reads; to be called by all processes."""
        return {
            "stages": [stage.to_json() for stage in self.stages],
            "epoch": self.epoch,
            "step": self.step,
            "sums": cast(Tensor, fabric.all_gather(self.sums.double())).reshape(-1, 3).cpu(),
            "seconds": time.perf_counter() - self.began,
            "copies": self.copies,
        }


def train_stage(run: Run, method: Method, checkpoints: Checkpoints, stage: Stage, progress: Progress) -> records.Stage:
    """Train one stage of a phase.

    progress: at the stage's start or farther on; it moves along.  Raises UserError where there are no images, and where
    training diverges.
    """
    if not stage.items:
        raise UserError(f"{method.describe(stage.name)}: there is not one image to train on.")
    with learning_only(method.network, stage.parameters):
        loss, accuracy = _StageLoop(run, method, checkpoints, stage, progress).fit()
    run.broadcast_network(method.network)
    progress.epoch = 0
    return records.Stage(stage=stage.name, epochs=stage.schedule.epochs, loss=loss, accuracy=accuracy)


class _StageLoop:
    """The training of one stage, as `train_stage` describes it."""

    def __init__(self, run: Run, method: Method, checkpoints: Checkpoints, stage: Stage, progress: Progress):
        self.run, self.method, self.checkpoints, self.stage, self.progress = run, method, checkpoints, stage, progress
        self.fabric, schedule = run.fabric, stage.schedule
        self.name = method.describe(stage.name).removesuffix(", training")
        self.first_epoch = sum(done.epochs for done in progress.stages)
        self.loader, self.sampler = run.training_loader(stage, method.phase)
        optimizer = schedule.build_optimizer(self._parameters(), run.config.momentum)
        network: Any = method.network
        if run.config.compile:
            torch.compiler.reset()  # networks of earlier stages would count against the limit of compilations
            network = torch.compile(network)
        self.network, self.optimizer = run.fabric.setup(network, optimizer)
        self.scheduler = schedule.scheduler(self.optimizer)
        progress.sums = run.fabric.to_device(progress.sums)
        state, progress.checkpoint = progress.checkpoint, None  # it is large
        if state is not None:
            method.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            # at an epoch's end the scheduler comes first, and rightly so: no warning
            self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def _parameters(self) -> list[nn.Parameter] | list[dict[str, Any]]:
        """What is trained; in two groups where the backbone has a learning rate of its own."""
        network, backbone_lrate = self.method.network, self.run.config.backbone_lrate
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if backbone_lrate is None:
            return trained
        in_backbones = {id(parameter) for module in network.backbones() for parameter in module.parameters()}
        heads = [parameter for parameter in trained if id(parameter) not in in_backbones]
        backbone = [parameter for parameter in trained if id(parameter) in in_backbones]
        groups: list[dict[str, Any]] = [{"params": heads}, {"params": backbone, "lr": backbone_lrate}]
        return [group for group in groups if group["params"]]

    def fit(self) -> tuple[float, float]:
        """Returns the mean loss and the accuracy (percent) of the last epoch."""
        loss, accuracy = 0.0, 0.0
        losses: list[float] = []
        progress, epochs, steps = self.progress, self.stage.schedule.epochs, len(self.sampler)
        done, quiet = progress.epoch * steps + progress.step, not self.fabric.is_global_zero
        self.bar = logs.progress(epochs * steps, self.name, done=done, quiet=quiet, rate=False)
        with self.bar, signals.delayed():
            self.epoch_start = time.perf_counter()
            for _ in range(progress.epoch, epochs):
                loss, accuracy = self._epoch()
                losses.append(loss)
        warn_of_rising_loss(self.name, losses)
        if not all(bool(parameter.isfinite().all()) for parameter in self.method.network.parameters()):
            raise self._diverged(f"a weight is not finite after epoch {epochs}")
        return loss, accuracy

    def _epoch(self) -> tuple[float, float]:
        """Train what is left of an epoch.  Returns the mean loss and the accuracy (percent) of the whole epoch."""
        run, fabric, method, progress, sampler = self.run, self.fabric, self.method, self.progress, self.sampler
        loss_of = self.stage.loss or method.loss
        epoch = self.first_epoch + progress.epoch
        self.network.train()
        sampler.set_epoch(epoch, progress.step)
        for _, images, targets in self.loader:
            # Set up the step.  What is random in it is a function of phase, epoch and step.
            sizes = sampler.sizes(progress.step)
            method.epoch, method.step, method.images_in_step = progress.epoch, progress.step, sizes[1]
            run.seed_step(method.phase, epoch, progress.step)
            method.before_batch()

            # Accumulate gradients.
            self.optimizer.zero_grad()
            batch = run.to_device(images), fabric.to_device(targets)
            for part in parts(*batch, run.config.accumulate_batches, sizes, fabric.world_size):
                with fabric.no_backward_sync(self.network, enabled=not part.last):
                    prepared, labels = method.prepare(part.images, part.targets)
                    outputs = self.network(prepared)
                    with fabric.autocast():
                        loss = loss_of(outputs, prepared, labels)
                    fabric.backward(loss * part.share)
                right = (outputs.logits.detach().argmax(dim=1) == labels).sum() * part.size / len(labels)
                # stays on the device: it is read once an epoch
                progress.sums += torch.stack([loss.detach() * part.size, right, torch.full_like(right, part.size)])

            # Update weights.
            method.before_step()
            self.optimizer.step()
            progress.step += 1
            self.bar.update()

            # Save a checkpoint once in a while, and where a signal ends the run.
            last = progress.epoch + 1 == self.stage.schedule.epochs and progress.step == len(sampler)
            is_due, signal = self.checkpoints.clock.look(last=last)
            if is_due or signal:
                self._save()
            if signal:
                done = f"{self.name} is kept up to epoch {progress.epoch + 1}, step {progress.step} of {len(sampler)}"
                raise Stopped(signal, f"{done}, in {self.checkpoints.unfinished}")

        # Finish the epoch.
        rate = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        loss_sum, right_sum, nb_images = all_reduce(fabric, progress.sums, "sum").tolist()
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, torch.zeros_like(progress.sums)
        mean_loss, accuracy = loss_sum / nb_images, 100 * right_sum / nb_images
        if not math.isfinite(mean_loss):
            raise self._diverged(f"the loss is {mean_loss} in epoch {progress.epoch}")
        self._log_epoch(rate, mean_loss, accuracy)
        return mean_loss, accuracy

    def _log_epoch(self, rate: float, loss: float, accuracy: float) -> None:
        """The epoch that is done: a line of the log and of the history, and the time left.  rate: the learning rate."""
        number, epochs, nb_images = self.progress.epoch, self.stage.schedule.epochs, len(self.stage.items)
        seconds, self.epoch_start = time.perf_counter() - self.epoch_start, time.perf_counter()
        log.debug("%s: epoch %d/%d, loss %.3f, train %.1f %%", self.name, number, epochs, loss, accuracy)
        left = seconds_left(self.run, self.method, seconds / nb_images, (epochs - number) * nb_images)
        self.bar.set_postfix_str(f"epoch {number}, loss {loss:.3f}, run {logs.clock(left)}", refresh=False)
        if self.run.history:
            epoch = self.first_epoch + number
            step = self.progress.epochs_before + epoch
            figures = {"learning_rate": rate, "loss": loss, "train_accuracy": accuracy, "seconds": seconds}
            self.run.history.add_epoch(self.method.phase, self.stage.name, epoch, step, figures)

    def _diverged(self, what: str) -> UserError:
        """The error to raise, which names the keys of the stage's learning rates."""
        self.checkpoints.forget_unfinished()  # training from it would diverge again
        schedule, rates = self.stage.schedule, {}
        for group in self.optimizer.param_groups:
            initial = group["initial_lr"]
            rates[schedule.lr_key if initial == schedule.lr else "backbone_lrate"] = initial
        return divergence(what, self.method.phase, rates)

    def _save(self) -> None:
        self.checkpoints.save_within_phase(
            {
                **self.progress.state(self.fabric),
                "phase": self.method.phase,
                "network": self.method.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "within_phase": self.method.within_phase,
            }
        )


def seconds_left(run: Run, method: Method, for_an_image: float, images: int) -> float:
    """Estimate for the rest of this class order: `images` more in this phase, and the later phases' epochs."""
    data, phases = run.data, range(method.phase + 1, run.data.nb_phases)
    new = sum(len(data.train_images(target)) for phase in phases for target in data.phase_targets(phase))
    exemplars = len(run.memory.items()) * len(phases)
    epochs = method.defaults.schedule(run.config, phase_0=False).epochs
    return for_an_image * (images + (new + exemplars) * epochs)


def warn_of_rising_loss(name: str, losses: Sequence[float]) -> None:
    """Say so where three epochs or more end with a larger loss than the first one's.  losses: means of the epochs."""
    if len(losses) > 2 and losses[-1] > max(losses[0], 0.0):
        words = "%s: the loss rose from %.3f to %.3f: a lower learning rate may help (see epochs.csv)"
        log.warning(words, name, losses[0], losses[-1])


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

    sizes: images of this process that count, and of all processes (`EpochBatchSampler.sizes`).  Gradients add up over
    the parts of a process and are averaged over processes.  So the mean loss of n images out of the N of all counts n/N
    times the number of processes: the sum over all parts is the mean over the N images.
    """
    own, total = sizes
    pieces = list(zip(*(tensor.chunk(number if own else 1) for tensor in (images, targets)), strict=True))
    for i, (some, their_targets) in enumerate(pieces):
        size = len(some) if own else 0
        yield Part(some, their_targets, size, size * nb_processes / total, last=i + 1 == len(pieces))
