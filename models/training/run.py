"""What a method works with: the networks' predictions, and a run's random numbers, batches, memory and folders."""

import torchvision_compat  # noqa: F401  (before torchvision and Lightning)

# isort: split
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader

from models.networks import ClassifierNet, Outputs
from models.training.stages import Stage
from utils import log as logs
from utils.cli import nb_cores
from utils.config.schema import Config
from utils.data.augment import TrainTransform
from utils.data.batches import Batched, EpochBatchSampler, ImageSet, TrainingSet, batch_loader, seed_sequence
from utils.data.cache import PictureCache
from utils.data.classes import DataManager, Item, PhasedClasses
from utils.data.datasets import Augmentation
from utils.devices import Fabric, all_reduce
from utils.memory.exemplars import ExemplarMemory
from utils.memory.forms import Copies
from utils.results.history import History

# isort: split
from lightning_fabric.plugins import MixedPrecision  # after utils.devices

_ROWS = 4096
"""How many rows of predictions the processes add up at a time."""

_NETWORK, _METHOD = 3, 4
"""Streams of random numbers within a step."""


@dataclass
class Predictor:
    """What networks need in order to predict.

    config: checked; data: the classes in their order, with the transforms; fabric: devices and precision, launched;
    pixels: decoded images, None where none are kept.
    """

    config: Config
    data: PhasedClasses
    fabric: Fabric
    _: KW_ONLY
    pixels: PictureCache | None = None

    def network_to_device(self, network: nn.Module) -> None:
        """Move a network to its device, in the memory layout it is trained in (sums depend on it in the last bit)."""
        network.to(self.fabric.device)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def to_device(self, images: Tensor) -> Tensor:
        """A loader's images as a network takes them: they travel as bytes and become floats on the device."""
        return self.data.defaults.normalise(self.fabric.to_device(images)).contiguous(memory_format=torch.channels_last)

    def predict(
        self, network: ClassifierNet, images: Sequence[Path], description: str = "", loader: DataLoader | None = None
    ) -> Outputs:
        """Logits (N x classes) and features (N x D) of images, on the CPU.  The network is in eval mode afterwards.

        description: of the progress bar, "" for none; loader: `test_loader` of the images, where they are looked at
        again and again: its worker processes stay.
        """
        logits = torch.zeros(len(images), network.nb_classes)
        features = torch.zeros(len(images), network.nb_features)
        network.eval()
        loader = loader or self.test_loader(images)
        with logs.progress(len(loader), description, quiet=not (description and self.fabric.is_global_zero)) as bar:
            for index, pictures, _ in loader:
                with torch.no_grad(), self.fabric.autocast():
                    outputs = network(self.to_device(pictures))
                logits[index] = outputs.logits.to(logits)
                features[index] = outputs.features.to(features)
                bar.update()
        return Outputs(self._sum_over_processes(logits), self._sum_over_processes(features))

    def features(
        self,
        network: ClassifierNet,
        groups: Sequence[Sequence[Path]],
        description: str = "",
        loader: DataLoader | None = None,
    ) -> Sequence[Tensor]:
        """The features of each group of images, such as a class, N x D each.  loader: as for `predict`."""
        images = [image for group in groups for image in group]
        return self.predict(network, images, description, loader).features.split([len(group) for group in groups])

    def test_loader(self, images: Sequence[Path]) -> DataLoader:
        """(indices, pictures, zeros) of this process's share of the images, by batches in ascending order."""
        dataset = ImageSet(images, [0] * len(images), self.data.defaults.test_transform, self.pixels)
        own = range(self.fabric.global_rank, len(images), self.fabric.world_size)
        return self.loader(dataset, BatchSampler(own, self.config.batch_size, drop_last=False))

    def loader(self, dataset: Batched, batches: Iterable[list]) -> DataLoader:
        """Batches of the keys that `batches` lists.

        Small images that are cached need no worker processes: making a batch takes less time than handing it over.
        """
        cached = self.data.defaults.image_kind == "small" and self.pixels is not None
        workers = 0 if cached else min(self.config.num_workers, nb_cores())
        return batch_loader(dataset, batches, workers, pin_memory=self.fabric.device.type == "cuda")

    def _sum_over_processes(self, rows: Tensor) -> Tensor:
        """Each process has filled in its own rows of an array of zeros."""
        if self.fabric.world_size == 1:
            return rows
        for some in rows.split(_ROWS):  # not all at once: a device may not have room for a whole test set's
            some.copy_(all_reduce(self.fabric, some.to(self.fabric.device), "sum"))
        return rows


@dataclass
class Run(Predictor):
    """One class order of an experiment.

    memory: the exemplars, empty at first; folder: of this run's checkpoints; cache: folder of trained phase-0 networks,
    shared by runs; copies: of exemplars, None where none are used; history: gets every epoch and phase, None in all
    processes but the first.
    """

    data: DataManager
    memory: ExemplarMemory
    folder: Path
    cache: Path
    copies: Copies | None = None
    history: History | None = None

    # Random numbers

    def rng(self, phase: int, purpose: str) -> np.random.Generator:
        """A function of model_seed, the phase and the purpose alone."""
        return np.random.default_rng([self.config.model_seed, phase, *purpose.encode()])

    def seed_torch(self, stage: int) -> None:
        """Fresh weights are a function of model_seed and the stage (0 the backbone, 1 + phase) alone."""
        torch.manual_seed(int(np.random.SeedSequence((self.config.model_seed, stage)).generate_state(1)[0]))

    def seed_step(self, phase: int, epoch: int, step: int) -> None:
        """What networks draw in a step (dropout), on all devices, is a function of these and the process alone."""
        torch.manual_seed(self._seed(phase, epoch, _NETWORK, step))

    def generator(self, phase: int, epoch: int, step: int) -> torch.Generator:
        """For what a method draws in a step, on the run's device and in each process for itself."""
        return torch.Generator(self.fabric.device).manual_seed(self._seed(phase, epoch, _METHOD, step))

    def _seed(self, phase: int, epoch: int, stream: int, step: int) -> int:
        seeds = seed_sequence(self.config.model_seed, phase, epoch, stream, step, self.fabric.global_rank)
        return int(seeds.generate_state(1)[0])

    # Images with copies

    def exemplars_with_copies(self) -> list[Path]:
        """The exemplars whose copies are read."""
        replaced = self.config.augmentation_prob > 0
        return [item.image for item in self.memory.items() if replaced or item.regenerated]

    def new_images_with_copies(self, phase: int) -> list[Path]:
        """A phase's new images, where training reads copies of them that are made on demand."""
        c = self.config
        replaced = c.augmentation_prob > 0 and c.augmentation_scope == "all"
        if self.copies is None or c.regenerate != "on_demand" or not replaced:
            return []
        return [item.image for item in self.data.new_items(phase)]

    # Devices

    def reset_gradient_scale(self) -> None:
        """Of 16-mixed: a class order does not begin with the scale that another one has ended with."""
        precision = self.fabric.strategy.precision
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            precision.scaler = torch.amp.GradScaler(precision.device)

    def broadcast_network(self, network: nn.Module) -> None:
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
        ranks = {"rank": fabric.global_rank, "world_size": fabric.world_size}
        size = stage.batch_size or c.batch_size
        sampler = EpochBatchSampler(len(stage.items), size, c.model_seed, phase, **ranks, views=stage.views)
        return self.loader(self.training_set(stage.items, phase, stage.augmentation), sampler), sampler

    def training_set(self, items: Sequence[Item], phase: int, augmentation: Augmentation | None = None) -> TrainingSet:
        """augmentation: in place of the config's."""
        c = self.config
        copies = c.augmentation_prob, c.augmentations_per_image, c.augmentation_scope
        transform = self.train_transform(augmentation)
        return TrainingSet(items, self.data.paths, transform, *copies, c.model_seed, phase, self.pixels)

    def train_transform(self, augmentation: Augmentation | None) -> TrainTransform:
        """augmentation: in place of the config's."""
        defaults = self.data.defaults if augmentation is None else self.data.defaults_with(augmentation)
        return defaults.train_transform

    def class_means(
        self, network: ClassifierNet, targets: Iterable[int], description: str = "", loader: DataLoader | None = None
    ) -> Tensor:
        """The mean feature of each class's exemplars, of unit length: classes x D; zeros for a class without exemplars.

        A synthetic exemplar counts as much as a real one: its copies share its weight.  loader: as for `predict`.
        """
        exemplars = [self.memory.evaluation_images(target) for target in targets]
        images = [[image for image, _ in pictures] for pictures in exemplars]
        means = []
        for pictures, rows in zip(exemplars, self.features(network, images, description, loader), strict=True):
            weights = torch.tensor([weight for _, weight in pictures])
            means.append(weights @ F.normalize(rows) / weights.sum().clamp(min=1e-12))
        return F.normalize(torch.stack(means))
