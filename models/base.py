"""What all methods share: the phases, the one epoch loop, the one evaluation.

A method is a subclass that says what its paper changes: `loss`, and, where it needs them, `build_network`, `stages`,
`before_stage`, `changing`, `backward`, `before_step`, `before_training` and `after_training`.  Everything but the steps
of training is done again when a run goes on in the middle of a phase, so it must depend on nothing else than the phase
before.
"""

import torchvision_compat  # noqa: F401  (before torchvision and Lightning)

# isort: split
import abc
import copy
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import BatchSampler, DataLoader

from convs.blocks import fold_adapters
from convs.resnet import ResNet, build_backbone, nb_parameters
from models import phase0
from models.networks import GrowingNet, IncrementalNet, Outputs
from models.parts import parts
from models.resume import Checkpoints, Place
from models.stages import Defaults, Schedule, Stage, learning_only
from utils import log as logs
from utils.config.schema import Config
from utils.data.batches import ImageSet, TrainingSet, batch_loader
from utils.data.classes import DataManager
from utils.data.items import Item
from utils.data.sampler import EpochBatchSampler
from utils.errors import UserError
from utils.fabric import Fabric
from utils.memory.exemplars import ExemplarMemory
from utils.results.history import History
from utils.results.metrics import nearest_mean_scores, phase_metrics

log = logging.getLogger(__name__)


class Copies(Protocol):
    """Copies of exemplars: how to get them, and what identifies those in use (`compress.copies.Copies`)."""

    def make(self, images: Sequence[Path], with_copies: bool) -> int | None:
        """Make missing edge maps and, with_copies, copies.  Returns how many copies, None where all are made ahead."""

    def state(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """What made the copies and what identifies them, for a checkpoint."""

    def summary(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """The same in short, for results.json."""

    def check(self, state: Mapping[str, Any], exemplars: Sequence[Path]) -> None:
        """Raises UserError where the copies are not those of a checkpoint's `state`."""


def fresh_backbone(c: Config, data: DataManager, stem: str | None = None) -> ResNet:
    """A run's backbone at its start.  Raises UserError where pretrained weights are asked for and not there."""
    increments = c.increment if isinstance(c.increment, list) else [c.increment]
    unequal = [increment for increment in increments if increment != c.init_cls]
    phases = {"init_cls": c.init_cls, "increment": [*unequal, c.init_cls][0]}
    try:
        return build_backbone(c.convnet_type, data.image_kind, **phases, pretrained=c.pretrained, stem=stem)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"pretrained: {error}.") from None


class Learner(abc.ABC):
    """One run of a method over all phases.

    config: the checked configuration; data: the classes in their order; memory: the exemplars, empty at first;
    fabric: devices and precision, launched; folder: where this run's checkpoints go; cache: where trained phase-0
    networks are shared; copies: those of exemplars, None where none is used;
    history: told of every epoch and phase, None in all processes but the first.
    """

    name = ""
    """What a config's `model_name` calls the method: `class ICaRL(Learner, name="icarl")`."""
    defaults: Defaults
    """The method's own schedule, for the keys that the config leaves null."""
    uses_memory = True
    """Whether exemplars are kept at all."""
    least_exemplars = 1
    """How many exemplars of each class the method needs at least."""
    keeps_old_network = False
    """Whether the network as it was before a phase is kept, frozen, as `old_network`."""
    plain_phase_0 = True
    """Whether phase 0 is a backbone and a linear head, trained by cross-entropy: all such methods share one network."""
    phase_0_keys: Sequence[str] = ()
    """Config keys of the method's own that the trained network of phase 0 depends on."""
    stem: str | None = None
    """The backbone's stem for large images, where the method has one of its own."""

    def __init_subclass__(cls, name: str | None = None, **options: Any):
        super().__init_subclass__(**options)
        cls.name = name or cls.name

    def __init__(
        self,
        config: Config,
        data: DataManager,
        memory: ExemplarMemory,
        fabric: Fabric,
        folder: Path,
        cache: Path,
        copies: Copies | None = None,
        history: History | None = None,
    ):
        self.config = config
        self.data = data
        self.memory = memory
        self.fabric = fabric
        self.folder = folder
        self.cache = cache
        self.copies = copies
        self.history = history
        self.records: list[dict[str, Any]] = []
        self.phase = -1
        self.nb_old = self.nb_new = self.nb_seen = 0
        self.epoch = self.step = 0  # of the present stage; of the present epoch
        self.old_network: GrowingNet | None = None
        self.state: dict[str, Any] = {}  # what a method takes into the next phase; changed in `after_training` alone
        self.within_phase: dict[str, Any] = {}  # what training has worked out and a restart within the phase needs
        self._seed_torch(0)
        self.network = self.build_network(self.backbone())
        self.checkpoints = Checkpoints(self, folder)
        self.seconds_before = 0.0  # what processes that were killed spent in the present phase's training

    # What a method changes

    def build_network(self, backbone: ResNet) -> GrowingNet:
        """The method's network around a fresh backbone, before it knows any class."""
        return IncrementalNet(backbone)

    @abc.abstractmethod
    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of some images, a scalar.  images: B x 3 x H x W; targets: B, of 0 ... nb_seen - 1.

        A batch may be worked off in parts (`models.parts`), so it must be a mean over images, each by itself.
        """

    def stages(self) -> Iterable[Stage]:
        """How the present phase is trained: on the new classes' images and the exemplars, once, unless a method says
        otherwise.  In a generator, what follows a `yield` runs when that stage is done."""
        return [Stage("training", [*self.data.new_items(self.phase), *self.memory.items()], self.schedule())]

    def before_stage(self, stage: Stage) -> None:
        """Called before each of the stages."""

    def changing(self) -> dict[str, nn.Module]:
        """The networks that training has changed since the phase began, by name: `network`, and what others there
        are; what else the phase needs, `stages` and `before_stage` make again."""
        return {"network": self.network}

    def before_batch(self) -> None:
        """Called before a batch's forward passes; the network is in training mode."""

    def backward(self, loss: Tensor, outputs: Outputs, targets: Tensor, share: float) -> None:
        """Add the gradients of share x loss; called for each part of a batch."""
        self.fabric.backward(loss * share)

    def before_step(self) -> None:
        """Called when a batch's gradients are all there, the same in all processes; the optimizer's step comes next."""

    def before_training(self) -> None:
        """Called when the network has grown for a phase, before it is trained."""

    def after_training(self) -> None:
        """Called when a phase's training is over, before exemplars are chosen and the phase is evaluated."""

    def old_outputs(self, images: Tensor) -> Outputs:
        """What the frozen network of before this phase says: logits are B x nb_old."""
        with torch.no_grad(), self.fabric.autocast():
            return self.old_network(images)

    def old_logits(self, images: Tensor) -> Tensor:
        """B x nb_old."""
        return self.old_outputs(images).logits

    # The phases

    def run(self, after_phase: Callable[[list[dict[str, Any]]], None] | None = None) -> list[dict[str, Any]]:
        """Every phase that is not done yet.  Returns the records of all, in order (`evaluate` describes one).

        after_phase: called with the records so far when a phase is done and safe on disk.
        """
        for phase in range(self.checkpoints.take_up(), self.data.nb_phases):
            start = time.perf_counter()
            self.start_phase(phase)
            training = self.train()
            self.after_training()
            trained = time.perf_counter()
            copies = self.choose_exemplars()
            chosen = time.perf_counter()
            results = self.evaluate()
            now = time.perf_counter()
            start -= self.seconds_before
            seconds = {"train": trained - start, "exemplars": chosen - trained, "evaluate": now - chosen}
            self.records.append(
                {
                    **results,
                    "training": training,
                    "copies_on_demand": copies,
                    "copies": self.copies and self.copies.summary(self.shown()),
                    "seconds": {**seconds, "total": now - start},
                }
            )
            if self.history:  # before the checkpoint: whoever goes on from that finds the phase's history whole
                self.history.phase(self.records[-1])
            self.checkpoints.save_phase()
            self._say_how_it_went()
            if after_phase:
                after_phase(self.records)
        return self.records

    def start_phase(self, phase: int) -> None:
        """Make the network ready for a phase's classes."""
        self.phase = phase
        targets = self.data.phase_targets(phase)
        self.nb_old, self.nb_new, self.nb_seen = targets.start, len(targets), targets.stop
        self.within_phase = {}
        fold_adapters(self.network)
        if self.keeps_old_network and phase > 0:
            self.old_network = copy.deepcopy(self.network).requires_grad_(False).eval()
        self._seed_torch(phase + 1)
        self.network.grow(self.nb_new)
        self.to_home(self.network)
        self.before_training()

    def backbone(self) -> ResNet:
        """A fresh one."""
        return fresh_backbone(self.config, self.data, self.stem)

    def init_schedule(self) -> Schedule:
        """Phase 0's."""
        epochs, lr, weight_decay = map(self.own, ("init_epoch", "init_lr", "init_weight_decay"))
        return Schedule(epochs, lr, self._steps("init_milestones"), self.config.init_lr_decay, weight_decay)

    def schedule(self) -> Schedule:
        """The present phase's."""
        if self.phase == 0:
            return self.init_schedule()
        epochs, lr, weight_decay = map(self.own, ("epochs", "lrate", "weight_decay"))
        return Schedule(epochs, lr, self._steps("milestones"), self.config.lrate_decay, weight_decay)

    def own(self, key: str) -> Any:
        """A key of the schedule; the method's own value where the config has null."""
        value = getattr(self.config, key)
        return getattr(self.defaults, key) if value is None else value

    def train(self) -> dict[str, Any]:
        """Go through the stages, unless this very training has been done before.

        Returns what `fit` does for the first stage, with `stages`, a list of that for each one, the seconds that all
        took and whether the outcome was reused.
        """
        if self.phase == 0 and (training := phase0.load(self)) is not None:
            self.seconds_before = 0.0 if training["reused"] else training["seconds"]
            return training
        place = self.checkpoints.place()
        self.seconds_before = time.perf_counter() - place.began
        for number, stage in enumerate(self.stages()):
            self.before_stage(stage)
            if number >= len(place.stages):
                place = place.next_stage({"stage": stage.name, **self.fit(stage, place)})
        first = place.stages[0] if place.stages else {"epochs": 0, "loss": None, "accuracy": None}
        training = {key: first[key] for key in ("epochs", "loss", "accuracy")}
        training |= {"stages": place.stages, "seconds": time.perf_counter() - place.began}
        if self.phase == 0:
            phase0.save(self, training)
        return {**training, "reused": False}

    def fit(self, stage: Stage, place: Place) -> dict[str, Any]:
        """The epoch loop.  Returns epochs, loss and accuracy (percent, of the last epoch's training batches).

        place: within the phase, at the stage's beginning or farther on; the loop moves it along.
        """
        with learning_only(self.network, stage.parameters):
            return self._fit(stage, place)

    def _fit(self, stage: Stage, place: Place) -> dict[str, Any]:
        config, fabric, schedule = self.config, self.fabric, stage.schedule
        loader, sampler = self.training_loader(stage)
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = SGD(trained, lr=schedule.lr, momentum=config.momentum, weight_decay=schedule.weight_decay)
        network, optimizer = fabric.setup(self.compiled(self.network), optimizer)
        scheduler, loss_of = schedule.scheduler(optimizer), stage.loss or self.loss
        self.checkpoints.restore(place, optimizer, scheduler)
        first_epoch = sum(done["epochs"] for done in place.stages)  # what is random goes by the epoch of the phase
        loss_mean = accuracy = 0.0
        name = self._name() if stage.name == "training" else f"{self._name()}, {stage.name}"
        steps, done = schedule.epochs * len(sampler), place.epoch * len(sampler) + place.step
        bar = logs.progress(steps, name, done=done, quiet=not fabric.is_global_zero, rate=False)
        with bar:
            for epoch in range(place.epoch, schedule.epochs):
                start = time.perf_counter()
                network.train()
                sampler.set_epoch(first_epoch + epoch, place.step)
                for _, images, targets in loader:
                    images, targets = self.to_device(images), fabric.to_device(targets)
                    sizes = sampler.sizes(place.step)
                    self.epoch, self.step = epoch, place.step
                    self.before_batch()
                    optimizer.zero_grad()
                    for part in parts(images, targets, config.accumulate_batches, sizes, fabric.world_size):
                        with fabric.no_backward_sync(network, enabled=not part.last):
                            outputs = network(part.images)
                            with fabric.autocast():
                                loss = loss_of(outputs, part.images, part.targets)
                            self.backward(loss, outputs, part.targets, part.share)
                        right = (outputs.logits.detach().argmax(dim=1) == part.targets)[: part.count].sum()
                        place.sums += torch.stack([loss.detach() * part.count, right])  # read once an epoch
                        place.seen += part.count
                    self.before_step()
                    optimizer.step()
                    place.step += 1
                    self.checkpoints.after_step(place, optimizer, scheduler)
                    bar.update()
                rate = optimizer.param_groups[0]["lr"]
                scheduler.step()
                loss_sum, nb_right = fabric.all_reduce(place.sums, reduce_op="sum").tolist()
                seen = int(fabric.all_reduce(torch.tensor(place.seen, device=fabric.device), reduce_op="sum"))
                place.next_epoch()
                loss_mean, accuracy = loss_sum / seen, 100 * nb_right / seen
                if not math.isfinite(loss_mean):
                    self.checkpoints.forget_unfinished()
                    key = "init_lr" if self.phase == 0 else "lrate"
                    where = " and choose another output_dir" if self.phase else ""
                    raise UserError(
                        f"training diverged: the loss is {loss_mean} in epoch {epoch + 1} of phase {self.phase}. "
                        f"Lower {key} ({schedule.lr:g} now){where}."
                    )
                progress = f"epoch {epoch + 1}/{schedule.epochs}, loss {loss_mean:.3f}, train {accuracy:.1f} %"
                seconds = time.perf_counter() - start
                left = self.seconds_left(seconds / len(stage.items), (schedule.epochs - epoch - 1) * len(stage.items))
                bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss_mean:.3f}, run {logs.clock(left)}", refresh=False)
                log.debug("%s: %s", name, progress)
                if self.history:
                    of_phase = first_epoch + epoch + 1
                    step = self._epochs_before() + of_phase
                    curves = {"learning_rate": rate, "loss": loss_mean, "accuracy": accuracy, "seconds": seconds}
                    self.history.epoch(self.phase, stage.name, of_phase, step=step, **curves)
        self.share_network()
        return {"epochs": schedule.epochs, "loss": loss_mean, "accuracy": accuracy}

    def share_network(self) -> None:
        """Take the first process's network everywhere: each process has batch norm statistics of its own."""
        if self.fabric.world_size == 1:
            return
        for tensor in self.network.state_dict().values():  # each in place: pickled tensors would all go to one GPU
            sent = tensor.contiguous()
            torch.distributed.broadcast(sent, src=0)
            tensor.copy_(sent)

    def seconds_left(self, for_an_image: float, images: int) -> float:
        """Estimate for the rest of this class order: `images` more in this phase, and the later phases' epochs."""
        later = [
            target for phase in range(self.phase + 1, self.data.nb_phases) for target in self.data.phase_targets(phase)
        ]
        new = sum(len(self.data.train_images(target)) for target in later)
        exemplars = len(self.memory.items()) * (self.data.nb_phases - self.phase - 1)
        return for_an_image * (images + (new + exemplars) * self.own("epochs"))

    def choose_exemplars(self) -> int | None:
        """Choose among all real images of the new classes, then make copies.  Returns what `make_copies` does."""
        if not self.uses_memory:
            return None
        there = frozenset(self.shown())
        self.memory.make_room(self.nb_seen)
        targets = list(self.data.phase_targets(self.phase))
        images = [self.data.train_images(target) for target in targets]
        features = self.predict([image for of_class in images for image in of_class], "choosing exemplars").features
        for target, of_class, rows in zip(targets, images, features.split([len(i) for i in images]), strict=True):
            self.memory.add_class(target, of_class, rows)
        return self.make_copies(self.phase, there)

    def shown(self) -> list[Path]:
        """The exemplars of which copies are looked at."""
        replaced = self.config.augmentation_prob > 0
        return [item.image for item in self.memory.items() if replaced or item.regenerated]

    def make_copies(self, phase: int, there: Collection[Path] = ()) -> int | None:
        """Make what is missing of the exemplars' edge maps and, where copies are read again, of their copies.

        there: exemplars that have theirs.  Returns the number of copies made, None where all are made ahead.
        """
        if self.copies is None or not self.uses_memory:
            return None
        needed = phase + 1 < self.data.nb_phases or self.config.nme
        self.copies.make([image for image in self.shown() if image not in there], with_copies=False)
        for target in self.memory.targets:  # edge maps cost what they cost; no copies of what is dropped
            self.memory.enforce_budget(target)
        return self.copies.make([image for image in self.shown() if image not in there], with_copies=needed)

    def predict(
        self, images: Sequence[Path], purpose: str, *, again: bool = False, network: GrowingNet | None = None
    ) -> Outputs:
        """The network's logits and features for pictures, with the test transform, on the CPU in the order given.

        purpose: what a progress bar calls it, "" for none; again: whether later phases will ask for the same pictures;
        network: None for the method's present one; it is in eval mode afterwards.
        """
        fabric, network = self.fabric, network or self.network
        dataset = ImageSet(images, [0] * len(images), self.data.test_transform, self.data.pixels)
        own = range(fabric.global_rank, len(images), fabric.world_size)
        batches = self._loader(dataset, BatchSampler(own, self.config.batch_size, drop_last=False))
        network.eval()
        logits = torch.zeros(len(images), network.nb_classes)
        features = torch.zeros(len(images), network.head.in_features)
        quiet = not (purpose and fabric.is_global_zero)
        bar = logs.progress(len(batches), f"{self._name()}, {purpose}", quiet=quiet)
        with bar, torch.no_grad(), fabric.autocast():
            for index, pictures, _ in batches:
                outputs = network(self.to_device(pictures))
                logits[index] = outputs.logits.to(logits)
                features[index] = outputs.features.to(features)
                bar.update()
        return Outputs(self._sum_over_processes(logits), self._sum_over_processes(features))

    def evaluate(self) -> dict[str, Any]:
        """The record of a phase: phase, classes_seen, cnn and nme (`metrics.phase_metrics`; nme None where unused),
        memory (`ExemplarMemory.report`), parameters."""
        outputs = self.predict_test("evaluating")
        nme = None
        if self.config.nme and self.uses_memory:
            means = self.class_means(range(self.nb_seen))
            nme = self.metrics(nearest_mean_scores(outputs.features, means))
        return {
            "phase": self.phase,
            "classes_seen": self.nb_seen,
            "cnn": self.metrics(outputs.logits),
            "nme": nme,
            "memory": self.memory.report(),
            "parameters": nb_parameters(self.network),
        }

    def predict_test(self, purpose: str, network: GrowingNet | None = None) -> Outputs:
        """`predict` for the test images of all classes seen, by target."""
        images = [self.data.test_images(target) for target in self.data.seen_targets(self.phase)]
        every = [image for of_class in images for image in of_class]
        return self.predict(every, purpose, again=True, network=network)

    def metrics(self, scores: Tensor) -> dict[str, Any]:
        """`phase_metrics` of scores for the test images of all classes seen, in the order of `predict_test`."""
        seen = self.data.seen_targets(self.phase)
        targets = torch.tensor([target for target in seen for _ in self.data.test_images(target)])
        return phase_metrics(scores, targets, [self.data.seen_targets(phase).stop for phase in range(self.phase + 1)])

    def class_means(self, targets: Sequence[int], purpose: str = "class means") -> Tensor:
        """The mean feature of each class's exemplars, of unit length: classes x D; purpose: as for `predict`.

        A synthetic exemplar counts as much as a real one: its copies share its weight.
        """
        shown = [self.memory.evaluation_images(target) for target in targets]
        pictures = [image for of_class in shown for image, _ in of_class]
        features = F.normalize(self.predict(pictures, purpose).features)
        means = []
        for of_class, rows in zip(shown, features.split([len(of_class) for of_class in shown]), strict=True):
            weights = torch.tensor([weight for _, weight in of_class])
            means.append(weights @ rows / weights.sum())
        return F.normalize(torch.stack(means))

    # Small matters

    def _steps(self, key: str) -> Sequence[int] | None:
        """Milestones, or None where the learning rate is to fall along a cosine.

        Milestones in the config mean steps, unless `scheduler` says otherwise.
        """
        given = getattr(self.config, key)
        scheduler = self.config.scheduler or ("steps" if given is not None else self.defaults.scheduler)
        return self.own(key) if scheduler == "steps" else None

    def training_loader(self, stage: Stage) -> tuple[DataLoader, EpochBatchSampler]:
        config, fabric = self.config, self.fabric
        ranks = {"rank": fabric.global_rank, "world_size": fabric.world_size}
        sampler = EpochBatchSampler(len(stage.items), config.batch_size, config.model_seed, self.phase, **ranks)
        return self._loader(self.training_set(stage.items), sampler), sampler

    def training_set(self, items: Sequence[Item]) -> TrainingSet:
        config = self.config
        return TrainingSet(
            items,
            self.data.paths,
            self.data.train_transform,
            config.augmentation_prob,
            config.augmentations_per_image,
            config.augmentation_scope,
            config.model_seed,
            self.phase,
            self.data.pixels,
        )

    def _loader(self, dataset: ImageSet | TrainingSet, batches: Iterable[Sequence]) -> DataLoader:
        return batch_loader(dataset, batches, self._nb_workers(), pin_memory=self.fabric.device.type == "cuda")

    def rng(self, purpose: str) -> np.random.Generator:
        """Random numbers for one purpose: a function of it, of model_seed and of the phase alone."""
        return np.random.default_rng([self.config.model_seed, self.phase, *purpose.encode()])

    def _epochs_before(self) -> int:
        """Epochs of all earlier phases together."""
        trainings = [record["training"] for record in self.records]
        return sum(stage["epochs"] for training in trainings for stage in training.get("stages", [training]))

    def _nb_workers(self) -> int:
        """At most one a core; macOS does not say which cores are ours.

        None for small pictures that are cached: making a batch of those takes less time than handing it over.
        """
        if self.data.image_kind == "small" and self.data.pixels is not None:
            return 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(self.config.num_workers, cores)

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network, or, where `compile` is set, a shell around it that runs faster; its weights are the same."""
        if not self.config.compile:
            return network
        torch.compiler.reset()  # networks of earlier phases and stages would count against the limit of compilations
        return torch.compile(network)

    def to_home(self, network: nn.Module) -> None:
        """To where it learns, laid out as it is there: sums in another order are not the same to the last bit."""
        network.to(device=self.fabric.device, memory_format=torch.channels_last)

    def to_device(self, images: Tensor) -> Tensor:
        """What the network takes of pictures that a loader gives: they travel as bytes, and become floats there."""
        return self.data.normalise(self.fabric.to_device(images)).contiguous(memory_format=torch.channels_last)

    def _sum_over_processes(self, rows: Tensor) -> Tensor:
        """Each process has filled in its own rows of an array of zeros; their sum is the whole."""
        if self.fabric.world_size == 1:
            return rows
        return self.fabric.all_reduce(rows.to(self.fabric.device), reduce_op="sum").cpu()

    def _seed_torch(self, stage: int) -> None:
        """Fresh weights are a function of model_seed and the stage (0 the backbone, 1 + phase) alone."""
        torch.manual_seed(int(np.random.SeedSequence((self.config.model_seed, stage)).generate_state(1)[0]))

    def _name(self) -> str:
        return f"phase {self.phase} ({self.phase + 1} of {self.data.nb_phases})"

    def _say_how_it_went(self) -> None:
        record = self.records[-1]
        memory = record["memory"]
        parts = []
        for name, key in (("CNN", "cnn"), ("student", "student"), ("NME", "nme")):
            if (metrics := record.get(key)) is not None:
                of_old = "" if metrics["old"] is None else f"old {metrics['old']:.1f}, new {metrics['new']:.1f}, "
                parts.append(f"{name} {metrics['top1']:.1f} % ({of_old}top-5 {metrics['top5']:.1f})")
        parts.append(f"memory {memory['units_total']:.1f} units, {memory['bytes_total']:,} bytes")
        parts.append(f"{record['seconds']['total']:.1f} s")
        log.info("%s, %d classes: %s", self._name(), self.nb_seen, "; ".join(parts))
