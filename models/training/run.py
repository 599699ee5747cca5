"""A run: what a method trains on, with what, and where its results go; and the batches and predictions made from it."""

import torchvision_compat  # noqa: F401  (before torchvision and Lightning)

# isort: split
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader

from models.networks import GrowingNet, Outputs
from models.training.stages import Stage
from utils import log as logs
from utils.config.schema import Config
from utils.data.augment import TrainTransform
from utils.data.batches import ImageSet, TrainingSet, batch_loader
from utils.data.cache import PictureCache
from utils.data.classes import DataManager
from utils.data.datasets import Augmentation
from utils.data.items import Item
from utils.data.sampler import EpochBatchSampler, seed_sequence
from utils.devices import nb_cores
from utils.fabric import Fabric
from utils.memory.exemplars import ExemplarMemory
from utils.results.history import History

_NETWORK, _METHOD = 3, 4
"""Streams of random numbers within a step."""
_ROWS = 4096
"""How many rows of predictions the processes add up at a time."""


class Copies(Protocol):
    """Copies of exemplars: how to get them, and what identifies those in use (`compress.copies.Copies`)."""

    def make(self, images: Sequence[Path], with_copies: bool) -> int | None:
        """Make missing edge maps and, with_copies, copies.  Called by all processes, which share the work.

        Returns how many copies all of them made, None where all are made ahead.
        """

    def state(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """What made the copies and what identifies them, for a checkpoint."""

    def summary(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """The same in short, for results.json."""

    def check(self, state: Mapping[str, Any], exemplars: Sequence[Path]) -> None:
        """Raises UserError where the copies are not those of a checkpoint's `state`."""


@dataclass
class Run:
    """One class order of an experiment.

    config: checked; data: the classes in their order; memory: the exemplars, empty at first; fabric: devices and
    precision, launched; folder: of this run's checkpoints; cache: folder of trained phase-0 networks, shared by runs;
    pixels: decoded images, None where none are kept; copies: of exemplars, None where none are used; history: gets
    every epoch and phase, None in all processes but the first; initial_weights: false where a checkpoint's weights
    replace the pretrained ones anyway.
    """

    config: Config
    data: DataManager
    memory: ExemplarMemory
    fabric: Fabric
    folder: Path
    cache: Path
    pixels: PictureCache | None = None
    copies: Copies | None = None
    history: History | None = None
    initial_weights: bool = True

    # Random numbers

    def rng(self, phase: int, purpose: str) -> np.random.Generator:
        """A function of model_seed, the phase and the purpose alone."""
        return np.random.default_rng([self.config.model_seed, phase, *purpose.encode()])

    def seed_torch(self, stage: int) -> None:
        """Fresh weights are a function of model_seed and the stage (0 the backbone, 1 + phase) alone."""
        torch.manual_seed(int(np.random.SeedSequence((self.config.model_seed, stage)).generate_state(1)[0]))

    def seed_step(self, phase: int, epoch: int, step: int) -> None:
        """What networks draw in a step (dropout), on all devices, is a function of these and the process alone."""
        seeds = seed_sequence(self.config.model_seed, phase, epoch, _NETWORK, step, self.fabric.global_rank)
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def generator(self, phase: int, epoch: int, step: int) -> torch.Generator:
        """For what a method draws in a step, on the run's device and in each process for itself."""
        seeds = seed_sequence(self.config.model_seed, phase, epoch, _METHOD, step, self.fabric.global_rank)
        return torch.Generator(self.fabric.device).manual_seed(int(seeds.generate_state(1)[0]))

    # Devices

    def to_home(self, network: nn.Module) -> None:
        """Move a network to its device, in the memory layout it is trained in (sums depend on it in the last bit)."""
        network.to(device=self.fabric.device, memory_format=torch.channels_last)

    def to_device(self, images: Tensor) -> Tensor:
        """A loader's images as a network takes them: they travel as bytes and become floats on the device."""
        return self.data.normalise(self.fabric.to_device(images)).contiguous(memory_format=torch.channels_last)

    def reset_gradient_scale(self) -> None:
        """Of 16-mixed: a class order does not begin with the scale that another one has ended with."""
        precision = self.fabric.strategy.precision
        if getattr(precision, "scaler", None) is not None:
            precision.scaler = torch.amp.GradScaler(precision.device)

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network, or, where `compile` is set, a compiled module that shares its weights."""
        if not self.config.compile:
            return network
        torch.compiler.reset()  # networks of earlier phases and stages would count against the limit of compilations
        return torch.compile(network)

    def share(self, network: nn.Module) -> None:
        """Give every process the first one's network: each has batch norm statistics of its own."""
        if self.fabric.world_size == 1:
            return
        for tensor in network.state_dict().values():  # each in place: pickled tensors would all go to one GPU
            sent = tensor.contiguous()
            torch.distributed.broadcast(sent, src=0)
            tensor.copy_(sent)

    # Batches

    def training_loader(self, stage: Stage, phase: int) -> tuple[DataLoader, EpochBatchSampler]:
        """Shuffled and augmented batches of (indices, images, targets), and the sampler that chooses the epoch."""
        c, fabric = self.config, self.fabric
        others = {"rank": fabric.global_rank, "world_size": fabric.world_size, "views": stage.views}
        sampler = EpochBatchSampler(len(stage.items), stage.batch_size or c.batch_size, c.model_seed, phase, **others)
        return self.loader(self.training_set(stage.items, phase, stage.augmentation), sampler), sampler

    def training_set(self, items: Sequence[Item], phase: int, augmentation: Augmentation | None = None) -> TrainingSet:
        """augmentation: in place of the config's."""
        c = self.config
        return TrainingSet(
            items,
            self.data.paths,
            self.train_transform(augmentation),
            c.augmentation_prob,
            c.augmentations_per_image,
            c.augmentation_scope,
            c.model_seed,
            phase,
            self.pixels,
        )

    def train_transform(self, augmentation: Augmentation | None) -> TrainTransform:
        """augmentation: in place of the config's."""
        data = self.data
        return data.train_transform if augmentation is None else data.defaults_with(augmentation).train_transform

    def loader(self, dataset: ImageSet | TrainingSet, batches: Iterable[Sequence]) -> DataLoader:
        """Batches of the keys that `batches` lists."""
        return batch_loader(dataset, batches, self._nb_workers(), pin_memory=self.fabric.device.type == "cuda")

    def _nb_workers(self) -> int:
        """None for small images that are cached: making a batch of those takes less time than handing it over."""
        if self.data.image_kind == "small" and self.pixels is not None:
            return 0
        return min(self.config.num_workers, nb_cores())

    # Predictions

    def predict(self, network: GrowingNet, images: Sequence[Path], description: str = "") -> Outputs:
        """Logits (N x classes) and features (N x D) of images under the test transform, on the CPU, in their order.

        description: of the progress bar, "" for none.  The network is in eval mode afterwards.
        """
        logits = torch.zeros(len(images), network.nb_classes)
        features = torch.zeros(len(images), network.head.in_features)
        for index, outputs in self._own_outputs(network, self.test_loader(images), description):
            logits[index] = outputs.logits.to(logits)
            features[index] = outputs.features.to(features)
        return Outputs(self._sum_over_processes(logits), self._sum_over_processes(features))

    def features(
        self,
        network: GrowingNet,
        groups: Sequence[Sequence[Path]],
        description: str = "",
        loader: DataLoader | None = None,
    ) -> Iterator[Tensor]:
        """The features of each group of images, such as a class, N x D each; one group at a time is in memory.

        The images are those of one `predict`, in the same batches.  loader: `test_loader` of them, where they are
        looked at again and again: its worker processes stay.
        """
        size, rank, world_size = network.head.in_features, self.fabric.global_rank, self.fabric.world_size
        if loader is None:
            loader = self.test_loader([image for group in groups for image in group])
        outputs = self._own_outputs(network, loader, description)
        index, rows = torch.zeros(0, dtype=torch.long), torch.zeros(0, size)  # of this process, not handed on yet
        for start, end in itertools.pairwise([0, *itertools.accumulate(len(group) for group in groups)]):
            of_group = torch.zeros(end - start, size)
            missing = len(range(rank, end, world_size)) - len(range(rank, start, world_size))
            while True:
                inside = index < end
                of_group[index[inside] - start] = rows[inside]
                missing -= int(inside.sum())
                index, rows = index[~inside], rows[~inside]
                if missing == 0:
                    break
                index, of_batch = next(outputs)
                rows = of_batch.features.to(of_group)
            yield self._sum_over_processes(of_group)

    def class_means(
        self, network: GrowingNet, targets: Iterable[int], description: str = "", loader: DataLoader | None = None
    ) -> Tensor:
        """The mean feature of each class's exemplars, of unit length: classes x D; zeros for a class without exemplars.

        A synthetic exemplar counts as much as a real one: its copies share its weight.  loader: as for `features`.
        """
        shown = [self.memory.evaluation_images(target) for target in targets]
        groups = [[image for image, _ in of_class] for of_class in shown]
        features = self.features(network, groups, description, loader)
        means = []
        for of_class, rows in zip(shown, features, strict=True):
            weights = torch.tensor([weight for _, weight in of_class])
            means.append(weights @ F.normalize(rows) / weights.sum().clamp(min=1e-12))
        return F.normalize(torch.stack(means))

    def test_loader(self, images: Sequence[Path]) -> DataLoader:
        """(indices, pictures, zeros) of this process's share of the images, by batches in ascending order."""
        dataset = ImageSet(images, [0] * len(images), self.data.test_transform, self.pixels)
        own = range(self.fabric.global_rank, len(images), self.fabric.world_size)
        return self.loader(dataset, BatchSampler(own, self.config.batch_size, drop_last=False))

    def _own_outputs(
        self, network: GrowingNet, batches: DataLoader, description: str
    ) -> Iterator[tuple[Tensor, Outputs]]:
        """(indices, outputs) of the batches of `test_loader`."""
        fabric = self.fabric
        network.eval()
        with logs.progress(len(batches), description, quiet=not (description and fabric.is_global_zero)) as bar:
            for index, pictures, _ in batches:
                with torch.no_grad(), fabric.autocast():
                    outputs = network(self.to_device(pictures))
                yield index, outputs
                bar.update()

    def _sum_over_processes(self, rows: Tensor) -> Tensor:
        """Each process has filled in its own rows of an array of zeros."""
        if self.fabric.world_size == 1:
            return rows
        for some in rows.split(_ROWS):  # not all at once: a device may not have room for a whole test set's
            some.copy_(self.fabric.all_reduce(some.to(self.fabric.device), reduce_op="sum"))
        return rows
