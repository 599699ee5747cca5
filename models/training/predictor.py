"""Predictions and features of networks, for pictures under a dataset's test transform."""

import torchvision_compat  # noqa: F401  (before torchvision and Lightning)

# isort: split
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from models.networks import ClassifierNet, Outputs
from utils import log as logs
from utils.cli import nb_cores
from utils.config.schema import Config
from utils.data.batches import Batched, ImageSet, batch_loader
from utils.data.cache import PictureCache
from utils.data.classes import PhasedClasses
from utils.devices import Fabric, all_reduce

_ROWS = 4096
"""How many rows of predictions the processes add up at a time."""


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
        self,
        network: ClassifierNet,
        images: Sequence[Path],
        description: str = "",
        loader: DataLoader | None = None,
    ) -> Outputs:
        """Logits (N x classes) and features (N x D) of images, on the CPU, in their order.

        description: of the progress bar, "" for none; loader: `test_loader` of the images, where they are looked at
        again and again: its worker processes stay.  The network is in eval mode afterwards.
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
