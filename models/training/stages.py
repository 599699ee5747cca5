"""A phase's training as data: the stages that the epoch loop goes through, and their schedules."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from utils.config.schema import Config
from utils.data.classes import Item
from utils.data.datasets import Augmentation
from utils.errors import UserError


class Schedule(NamedTuple):
    """The optimizer's settings: the learning rate is multiplied by `decay` after each epoch in `milestones`.

    Where milestones is None it falls along half a cosine instead, from lr to `floor` at the last epoch.
    lr_key: the config's key of the learning rate.
    """

    epochs: int
    lr: float
    milestones: Sequence[int] | None
    decay: float
    weight_decay: float
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    floor: float = 0.0
    lr_key: str = "lrate"

    def build_optimizer(self, parameters: Iterable[Any], momentum: float) -> Optimizer:
        """parameters: as torch's optimizers take them, groups too; momentum: SGD's alone."""
        if self.optimizer == "sgd":
            return SGD(parameters, lr=self.lr, momentum=momentum, weight_decay=self.weight_decay)
        kind = Adam if self.optimizer == "adam" else AdamW
        return kind(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """Stepped once an epoch."""
        if self.milestones is None:
            return CosineAnnealingLR(optimizer, self.epochs, self.floor)
        return MultiStepLR(optimizer, list(self.milestones), self.decay)


class Defaults(NamedTuple):
    """A method's own schedule: what holds for each key of the config that is null.  These values are PyCIL's.

    scheduler: "steps" or "cosine".
    """

    epochs: int
    milestones: Sequence[int] = ()
    weight_decay: float = 2e-4
    init_epoch: int = 200
    init_milestones: Sequence[int] = (60, 120, 170)
    init_weight_decay: float = 5e-4
    init_lr: float = 0.1
    lrate: float = 0.1
    scheduler: str = "steps"

    def schedule(self, config: Config, *, phase_0: bool) -> Schedule:
        """The schedule of phase 0 or of a later phase; these values stand in for what the config leaves null.

        Milestones in the config mean steps, unless its `scheduler` says otherwise.
        """
        keys = ["epochs", "lrate", "milestones", "weight_decay"]
        if phase_0:
            keys = ["init_epoch", "init_lr", "init_milestones", "init_weight_decay"]
        in_config = [getattr(config, key) for key in keys]
        epochs, lr, milestones, weight_decay = (
            getattr(self, key) if value is None else value for key, value in zip(keys, in_config, strict=True)
        )
        scheduler = config.scheduler or (self.scheduler if in_config[2] is None else "steps")
        decay = config.init_lr_decay if phase_0 else config.lrate_decay
        return Schedule(epochs, lr, milestones if scheduler == "steps" else None, decay, weight_decay, lr_key=keys[1])


class Stage(NamedTuple):
    """One pass of the epoch loop.

    name: unique within the phase; items: the training set; parameters: what is trained, None for all that require
    gradients; loss: replaces the method's own, same signature; batch_size, augmentation: replace the config's; views:
    how often each image of a batch is read, with other random numbers: first all images once, then all again.

    A phase's stages are a function of the phase, the config, the data, the memory and `Method.within_phase`, so that
    they can be made again after a restart.
    """

    name: str
    items: Sequence[Item]
    schedule: Schedule
    parameters: Sequence[nn.Parameter] | None = None
    loss: Callable | None = None
    batch_size: int | None = None
    augmentation: Augmentation | None = None
    views: int = 1


def divergence(what: str, phase: int, rates: Mapping[str, float]) -> UserError:
    """what: which number is not finite, and when; rates: the learning rates that were used, by their keys."""
    lower = " or ".join(f"{key} ({rate:g} now)" for key, rate in rates.items())
    where = " and choose another output_dir" if phase else ""
    return UserError(f"training diverged: {what} of phase {phase}. Lower {lower}{where}.")


@contextmanager
def learning_only(network: nn.Module, parameters: Sequence[nn.Parameter] | None) -> Iterator[None]:
    """For a while, let nothing but `parameters` require gradients; None changes nothing."""
    chosen = {id(parameter) for parameter in (network.parameters() if parameters is None else parameters)}
    frozen = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
