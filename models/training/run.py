"""A run: what a method trains on, with what, and where its results go; its random numbers and batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from models.networks import ClassifierNet
from models.training.predictor import Predictor
from models.training.stages import Stage
from utils.data.augment import TrainTransform
from utils.data.batches import EpochBatchSampler, TrainingSet, seed_sequence
from utils.data.classes import DataManager, Item
from utils.data.datasets import Augmentation
from utils.memory.exemplars import ExemplarMemory
from utils.memory.forms import Copies
from utils.results.history import History

# isort: split
from lightning_fabric.plugins import MixedPrecision  # after utils.devices

_NETWORK, _METHOD = 3, 4
"""Streams of random numbers within a step."""


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
        seeds = seed_sequence(self.config.model_seed, phase, epoch, _NETWORK, step, self.fabric.global_rank)
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def generator(self, phase: int, epoch: int, step: int) -> torch.Generator:
        """For what a method draws in a step, on the run's device and in each process for itself."""
        seeds = seed_sequence(self.config.model_seed, phase, epoch, _METHOD, step, self.fabric.global_rank)
        return torch.Generator(self.fabric.device).manual_seed(int(seeds.generate_state(1)[0]))

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

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network, or, where `compile` is set, a compiled module that shares its weights."""
        if not self.config.compile:
            return network
        torch.compiler.reset()  # networks of earlier phases and stages would count against the limit of compilations
        return cast(nn.Module, torch.compile(network))

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
