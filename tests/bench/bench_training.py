"""Images per second of loading and of training, against PyCIL's loop:
python tests/bench/bench_training.py [DATA_DIR] [--cpu] [--device cuda --precision bf16-mixed --batch-size 128]

DATA_DIR holds CIFAR10 and Imagenette224 in the project's layout (without one: JPEGs of noise are made, in a temporary
folder).  32 pixels train a resnet32, 224 pixels a resnet18.

PyCIL's loop: CIFAR's pictures are arrays in memory, others files that Pillow opens and converts; torchvision's
transforms one picture at a time, a DataLoader with a process per worker, floats in NCHW, and for each step zero_grad,
backward, step, and the loss and the right answers read back.  224 pixels are loaded with PyCIL's transforms of
ImageNet-100 (crop and flip), and with PESCR's, which add brightness and AutoAugment.  Ours is what main.py runs.

Both take turns, round by round, with 0, 1 and 2 workers, each as fast as with its best number; figures are medians over
rounds, after one pass over the data that is not counted, as in a training of 100 epochs and more.  --cpu counts CPU
seconds, without workers, which other work on the machine changes less; where that takes cores, set OMP_NUM_THREADS to
those that are free.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torchvision_compat  # noqa: F401  (before torchvision)

# isort: split

import numpy as np
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from convs.resnet import build_backbone
from models.networks import IncrementalNet
from models.training.epochs import Progress, train_stage
from models.training.run import Run
from models.training.stages import Schedule, Stage
from models.training.trainer import Trainer
from tests.methods import METHODS
from utils.config.schema import Config
from utils.data.batches import EpochBatchSampler, TrainingSet, batch_loader
from utils.data.cache import PictureCache
from utils.data.classes import DataManager, Item
from utils.data.datasets import CIFAR10_STATISTICS, IMAGENET_STATISTICS
from utils.data.paths import DatasetPaths
from utils.memory.exemplars import ExemplarMemory

WORKERS = (0, 1, 2)
PARTS = {"CIFAR10": (32, "resnet32"), "Imagenette224": (224, "resnet18")}


# PyCIL's loop


class Pictures(Dataset):
    """Items as PyCIL's DummyDataset reads them: arrays in memory of 32-pixel pictures, else files."""

    def __init__(self, items: Sequence[Item], transform: Callable, *, in_memory: bool):
        self.items, self.transform = items, transform
        self.arrays = [np.asarray(_opened(item)) for item in items] if in_memory else None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        image = _opened(self.items[index]) if self.arrays is None else Image.fromarray(self.arrays[index])
        return index, self.transform(image), self.items[index].target


def _opened(item: Item) -> Image.Image:
    with open(item.image, "rb") as file:
        return Image.open(file).convert("RGB")


def published_transform(side: int, augmentation: str) -> Callable:
    jitter, flip = transforms.ColorJitter(brightness=63 / 255), transforms.RandomHorizontalFlip()
    if side == 32:
        first, last, statistics_ = [transforms.RandomCrop(32, padding=4), flip, jitter], [], CIFAR10_STATISTICS
    else:
        pescr = augmentation == "pescr"
        first, last = [transforms.RandomResizedCrop(224), flip], [jitter, transforms.AutoAugment()] if pescr else []
        statistics_ = IMAGENET_STATISTICS
    return transforms.Compose([*first, *last, transforms.ToTensor(), transforms.Normalize(*statistics_)])


def published_loader(
    items: Sequence[Item], side: int, batch_size: int, workers: int, augmentation: str = "pescr"
) -> DataLoader:
    dataset = Pictures(items, published_transform(side, augmentation), in_memory=side == 32)
    # Workers that stay are more than PyCIL has; without them a short pass would measure their start.
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def published_epoch(network: nn.Module, optimizer, loader: DataLoader, device: torch.device, precision: str) -> None:
    network.train()
    losses, correct = 0.0, 0
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")
    for _, images, targets in loader:
        images, targets = images.to(device), targets.to(device)
        with mixed:
            logits = network(images).logits
            loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.item()
        correct += logits.max(dim=1)[1].eq(targets).cpu().sum()


# Measuring


def best(rounds: dict[int, list[float]]) -> tuple[float, int]:
    """(median images a second, workers) of the best number of workers."""
    return max((statistics.median(rates), workers) for workers, rates in rounds.items())


def rate(work: Callable[[], int], clock: Callable[[], float]) -> float:
    start = clock()
    return work() / (clock() - start)


def gone_through(loader: DataLoader, sampler: EpochBatchSampler | None = None, epoch: int = 0) -> int:
    if sampler is not None:
        sampler.set_epoch(epoch)
    return sum(len(targets) for _, _, targets in loader)


def compare(sides: dict[str, dict[int, Callable[[], int]]], options) -> dict[str, tuple[float, int]]:
    """Side -> (median images a second, workers), of work by side and workers; they take turns."""
    clock = time.process_time if options.cpu else time.perf_counter
    rates = {side: {workers: [] for workers in by_workers} for side, by_workers in sides.items()}
    for number in range(options.rounds + 1):
        for workers in options.workers:
            for side, by_workers in sides.items():
                if workers in by_workers:
                    images_a_second = rate(by_workers[workers], clock)
                    if number > 0:
                        rates[side][workers].append(images_a_second)
    return {side: best(by_workers) for side, by_workers in rates.items()}


def print_row(what: str, found: dict[str, tuple[float, int]]) -> None:
    theirs, workers = found["published"]
    words = [f"PyCIL's loop {theirs:9,.1f} ({workers} workers)"]
    for name, (ours, workers) in list(found.items())[1:]:
        words.append(f"{name} {ours:9,.1f} ({workers} workers), {ours / theirs:5.2f} x")
    print(f"{what:42}" + "   ".join(words), flush=True)


def measure_loading(data: DataManager, items: Sequence[Item], side: int, options, cache: PictureCache) -> None:
    augmentation = data.augmentation

    def ours(pixels: PictureCache | None, workers: int) -> Callable[[], int]:
        dataset = TrainingSet(items, data.paths, data.defaults.train_transform, 0.0, 0, "all", 1, 0, pixels)
        sampler = EpochBatchSampler(len(items), options.batch_size, 1, 0)
        loader, epochs = batch_loader(dataset, sampler, workers), iter(range(10**9))
        return lambda: gone_through(loader, sampler, next(epochs))

    def theirs(workers: int) -> Callable[[], int]:
        loader = published_loader(items, side, options.batch_size, workers, augmentation)
        return lambda: gone_through(loader)

    sides = {
        "published": {workers: theirs(workers) for workers in options.workers},
        "cached": {workers: ours(cache, workers) for workers in options.workers},
        "not cached": {workers: ours(None, workers) for workers in options.workers},
    }
    transforms_ = "" if side == 32 else f", {augmentation}'s transforms"
    print_row(f"{side} pixels, loading{transforms_}", compare(sides, options))


def measure_training(data: DataManager, items: Sequence[Item], name: str, options, cache: PictureCache, folder) -> None:
    side, convnet = PARTS[name]
    fabric = Fabric(accelerator=options.device, devices=1, precision=options.precision)
    fabric.launch()

    def ours(workers: int) -> Callable[[], int]:
        config = Config(dataset=name, init_cls=10, increment=10, model_name="finetune", convnet_type=convnet)
        config.batch_size, config.num_workers, config.checkpoint_every = options.batch_size, workers, 0.0
        memory = ExemplarMemory(data.paths, [], {}, None, 0)
        trainer = Trainer(METHODS["finetune"], Run(config, data, fabric, memory, folder, folder, pixels=cache))
        trainer.start_phase(0)
        stage = Stage("training", items, Schedule(1, 0.01, (), 0.1, 5e-4))

        def epoch() -> int:
            train_stage(trainer.run, trainer.method, trainer.checkpoints, stage, Progress())
            return len(items)

        return epoch

    def theirs(workers: int) -> Callable[[], int]:
        network = IncrementalNet(build_backbone(convnet, data.defaults.image_kind, "7x7"))
        network.grow(data.nb_classes)
        network.to(fabric.device)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        loader = published_loader(items, side, options.batch_size, workers)

        def epoch() -> int:
            published_epoch(network, optimizer, loader, fabric.device, options.precision)
            return len(items)

        return epoch

    sides = {"published": {w: theirs(w) for w in options.workers}, "main.py": {w: ours(w) for w in options.workers}}
    print_row(f"{side} pixels, training a {convnet}, {options.precision}", compare(sides, options))


# Data


def make_pictures(folder: Path) -> None:
    """Smooth noise as JPEGs, about as large as photographs' files are."""
    rng = np.random.default_rng(0)
    for name, (side, _) in PARTS.items():
        for mode, count in (("train", 60 if side == 32 else 12), ("test", 1)):
            for label in "abcdefghij":
                (folder / name / mode / label).mkdir(parents=True)
                for i in range(count):
                    coarse = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
                    picture = coarse.resize((side, side), Image.Resampling.BICUBIC)
                    picture.save(folder / name / mode / label / f"{i:03d}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data_dir", nargs="?", type=Path, help="holds CIFAR10 and Imagenette224 (default: noise)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, nargs=2, default=(256, 32), help="a pass, at 32 and 224 pixels [256 32]")
    parser.add_argument("--only", choices=("loading", "training"))
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds, without workers")
    options = parser.parse_args()
    options.workers = (0,) if options.cpu else WORKERS
    seconds = "CPU second" if options.cpu else "second"
    print(
        f"images per {seconds} on {options.device}, {torch.get_num_threads()} threads, batches of "
        f"{options.batch_size}, medians of {options.rounds} rounds; {options.data_dir or 'noise'}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        if options.data_dir is None:
            make_pictures(Path(temporary))
        for (name, (side, _)), images in zip(PARTS.items(), options.images, strict=True):
            paths = DatasetPaths(options.data_dir or Path(temporary), name)
            if not paths.root.is_dir():
                print(f"{side} pixels: left out, there is no {paths.root}")
                continue
            data = DataManager(paths, shuffle=False, seed=0, init_cls=10, increment=10)
            every = data.new_items(0)
            items = every[:: max(1, len(every) // images)][:images]
            cache = PictureCache(1 << 30, data.defaults.train_transform.prepare)
            if options.only != "training":
                measure_loading(data, items, side, options, cache)
                if side == 224:
                    pycil = DataManager(paths, shuffle=False, seed=0, init_cls=10, increment=10, augmentation="pycil")
                    measure_loading(pycil, items, side, options, cache)
            if options.only != "loading":
                measure_training(data, items, name, options, cache, Path(temporary))


if __name__ == "__main__":
    main()
