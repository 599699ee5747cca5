"""Compares the project's methods with PyCIL's, step by step, in float64.

    python tests/pycil_parity.py tests/reference/pycil_steps.npz [FILE ...] [--methods gem,bic]

The files hold what PyCIL's trainer computed on a small problem, whose pictures are in the first one: the loss and
gradient norm of every optimisation step, and after each phase the logits of the test images, the exemplars and the
class means.  Each run is repeated by the project's own method, through its real phase loop and epoch loop.  It is
given what is random or measured in PyCIL's run, and nothing else: pictures without augmentation, the initial weights of
backbones and heads, which pictures make a batch (and, for BiC and BEEF, which are held out), other random numbers, and
the number of epochs and the learning rate.  Everything else (weight decay, shape of the schedule, losses, memory) is
the method's own.

Prints a row a run with the worst relative differences.  Exit code 0: every run that both have is within 1e-9 (class
means 1e-7, PyCIL adds 1e-8 to norms) and keeps the same exemplars; 1: some run is not; 2: the command is wrong.
"""

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from compress.forms import Cost
from convs import BACKBONES, Backbone
from models import METHODS, catalogue
from models.method import Method
from models.run import Run
from models.stages import Stage
from models.trainer import Trainer
from utils.config.read import load_config
from utils.config.schema import Config, all_keys
from utils.data.augment import SmallTest
from utils.data.batches import batch_loader
from utils.data.classes import DataManager
from utils.data.paths import DatasetPaths
from utils.devices import launch
from utils.memory.exemplars import ExemplarMemory

TOLERANCE = 1e-9
MEANS_TOLERANCE = 1e-7
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
SAMPLES_OF_CIFAR100 = 500
"""What PyCIL's FOSTER and RMM take for the number of a new class's images where the dataset is called cifar100."""
OTHER_BACKBONES = {"little_rep": Backbone("basic", depths=(1, 1), widths=(64, 128), extra="adapters")}
"""little_rep: what SSRE was measured on."""


class Unlike(Exception):
    """The run can't go on: it trains on other pictures than PyCIL's."""


# The file


class Reference:
    """The arrays of one run in a file of PyCIL's figures.

    `args`: the keys of PyCIL's config; `constants`: those of its method's module; `sizes`: classes of each phase.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str):
        self.arrays = arrays
        self.name = name
        meta = json.loads(str(arrays[f"{name}/meta"]))
        self.args: dict[str, Any] = meta["args"]
        self.constants: dict[str, Any] = meta["constants"]
        self.sizes: list[int] = meta["increments"]
        self.method: str = self.args["model_name"]

    def get(self, phase: int, name: str) -> np.ndarray | None:
        return self.arrays.get(f"{self.name}/p{phase}/{name}")

    def setting(self, *names: str) -> Any:
        """The first of these that PyCIL's module or config has."""
        for name in names:
            for place in (self.constants, self.args):
                if name in place:
                    return place[name]
        raise KeyError(names)

    def batches(self, phase: int, stage: int) -> list[list[int]]:
        """The pictures of each step of a stage; stage -1: of the passes without a step (EWC's Fisher matrix)."""
        rows = self.get(phase, "nostep_batch") if stage < 0 else self.get(phase, "batch")
        if stage >= 0:
            rows = rows[self.get(phase, "stage") == stage]
        return [[int(number) for number in row if number >= 0] for row in rows]

    @cached_property
    def compared(self) -> tuple[int, str]:
        """(number of phases to compare, why not all).

        In phases of different sizes PyCIL's GEM takes k s ... (k + 1) s, s the size of the *present* phase, for phase
        k's classes.  The project takes the classes that phase k had, so they agree until these differ.
        """
        starts = [0, *np.cumsum(self.sizes)]
        if self.method == "gem":
            for phase, size in enumerate(self.sizes):
                if any([k * size, (k + 1) * size] != starts[k : k + 2] for k in range(phase)):
                    reason = f"differs by design: from phase {phase} on PyCIL's masks hold other classes than a phase's"
                    return phase, reason
        return len(self.sizes), ""


def runs_of(arrays: Mapping[str, np.ndarray]) -> list[str]:
    return sorted(name.partition("/")[0] for name in arrays if name.endswith("/meta"))


def initial_weight(name: str, shape: Sequence[int]) -> Tensor:
    """A backbone's parameter before training, by its name in PyCIL and its shape, as the file's README defines it."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    x = random.standard_normal(int(np.prod(shape))).reshape(tuple(shape))
    if len(shape) == 4:
        x *= np.sqrt(2 / (shape[0] * shape[2] * shape[3]))
    elif len(shape) >= 2:
        x /= np.sqrt(shape[-1])
    elif name.endswith("weight"):
        x = (1 + 0.1 * x) * (0.25 if name.endswith("bn_b.weight") else 1)
    else:
        x *= 0.05
    return torch.from_numpy(x.astype(np.float32).astype(np.float64))


def pycil_name(name: str, backbone: str) -> str:
    """layer1.0.conv1.weight -> stage_1.0.conv_a.weight, and so on."""
    if backbone == "little_rep":
        name = re.sub(r"^bn1", "conv1.1", re.sub(r"^conv1", "conv1.0", name))
        name = re.sub(r"\.(conv\d)\.(weight|bias)", r".\1.conv.\2", name)
        return re.sub(r"\.bn(\d)", r".norm\1", name)
    block = re.fullmatch(r"layer(\d)\.(\d+)\.(.*)", name)
    if block is None:
        return name.replace("conv1", "conv_1_3x3").replace("bn1", "bn_1")
    inner = block[3]
    for ours, theirs in (("1.", "_a."), ("2.", "_b.")):
        inner = inner.replace(f"conv{ours}", f"conv{theirs}").replace(f"bn{ours}", f"bn{theirs}")
    inner = inner.replace("downsample.0", "downsample.conv").replace("downsample.1", "downsample.bn")
    return f"stage_{block[1]}.{block[2]}.{inner}"


# Feeding


@dataclass
class Pictures:
    """The file's pictures as a dataset on disk: `numbers` tells which picture of the file a train image is."""

    paths: DatasetPaths
    numbers: dict[Path, int]

    @classmethod
    def write(cls, arrays: Mapping[str, np.ndarray], folder: Path) -> "Pictures":
        numbers = {}
        for mode in ("train", "test"):
            for number, (pixels, target) in enumerate(
                zip(arrays[f"data/{mode}_images"], arrays[f"data/{mode}_targets"], strict=True)
            ):
                path = folder / "CIFAR100" / mode / f"class{target}" / f"{number:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
                if mode == "train":
                    numbers[path] = number
        return cls(DatasetPaths(folder, "CIFAR100", ""), numbers)


class Still(SmallTest):
    """The test transform in place of augmentation."""

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray | None = None) -> Tensor:
        return super().__call__(pictures)


class StillData(DataManager):
    """Pictures in training as in tests, in float64."""

    @property
    def train_transform(self) -> Still:
        return Still()

    def defaults_with(self, augmentation):
        return replace(super().defaults_with(augmentation), train_transform=Still())

    @property
    def normalise(self) -> Callable[[Tensor], Tensor]:
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
        return lambda images: (images.double() / 255 - mean) / std


class GivenBatches:
    """A sampler whose batches, of indices into a stage's items, are given for each epoch of the stage."""

    def __init__(self, epochs: list[list[list[int]]], views: int):
        self.epochs = [[batch * views for batch in epoch] for epoch in epochs]
        self.first: int | None = None
        self.epoch = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        self.first = epoch if self.first is None else self.first
        self.epoch = epoch - self.first

    def sizes(self, step: int) -> tuple[int, int]:
        size = len(self.epochs[self.epoch][step])
        return size, size

    def __len__(self) -> int:
        return len(self.epochs[0])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.epochs[self.epoch]:
            yield [(self.epoch, index) for index in batch]


class Drawn:
    """Where the run is in the random numbers that PyCIL drew in a phase, by kind."""

    def __init__(self):
        self.used: dict[tuple[int, str], int] = {}

    def number(self, phase: int) -> int:
        """How often this has been asked before in the phase."""
        self.used[phase, ""] = self.used.get((phase, ""), -1) + 1
        return self.used[phase, ""]

    def next(self, reference: Reference, phase: int, name: str, shape: Sequence[int]) -> np.ndarray:
        start = self.used.get((phase, name), 0)
        end = self.used[phase, name] = start + int(np.prod(shape))
        return reference.get(phase, f"draw/{name}")[start:end].reshape(shape)


@dataclass
class Measured:
    """What the project's run came to: per phase and name, arrays like the file's."""

    loss: float = 0.0
    steps: list[tuple[float, float]] = field(default_factory=list)
    phases: list[dict[str, np.ndarray]] = field(default_factory=list)
    drawn: Drawn = field(default_factory=Drawn)

    def on_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        squares = [
            p.grad.square().sum() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        self.steps.append((self.loss, float(torch.stack(squares).sum().sqrt())))


def fed(method: type[Method], reference: Reference, pictures: Pictures, measured: Measured) -> type[Method]:
    """The method, given a run's initial weights and held-out pictures, and watched.  Its arithmetic is left alone."""

    class Fed(method):
        # What it is given

        def backbone(self):
            backbone = super().backbone()
            for name, parameter in backbone.named_parameters():
                parameter.data.copy_(initial_weight(pycil_name(name, self.config.convnet_type), parameter.shape))
            return backbone

        def image_counts(self, items) -> Tensor:
            """FOSTER's: PyCIL has a constant in place of the new classes' images where the dataset is "cifar100"."""
            counts = super().image_counts(items)
            if reference.args["dataset"] == "cifar100" and reference.name != "foster_counts":
                counts[self.nb_old :] = SAMPLES_OF_CIFAR100
            if reference.method == "rmm-foster":  # the mean of what classes have
                counts[: self.nb_old] = self.memory.total // self.nb_old
            return counts

        def images_per_class(self):
            return SAMPLES_OF_CIFAR100

        def picked(self, target, of, count):
            """The images that RMM leaves of a class."""
            return self.next_drawn("randint", (count,)).tolist()

        def some(self, target, count):
            """BEEF's for fusion."""
            trained = {number for batch in reference.batches(self.phase, 1) for number in batch}
            return [item for item in super().some(target, 10**6) if pictures.numbers[item.image] in trained]

        def split(self, items):
            """BiC's held-out pictures."""
            held = {number for batch in reference.batches(self.phase, 1) for number in batch}
            return (
                [item for item in items if pictures.numbers[item.image] not in held],
                [item for item in items if pictures.numbers[item.image] in held],
            )

        def drawn(self, count) -> Tensor:
            """Prototypes."""
            return torch.from_numpy(self.next_drawn("choice", (count,)))

        def noise(self, like, *_) -> Tensor:
            """PASS's and BEEF's."""
            if reference.method == "beefiso":  # too many to be in the file
                number = measured.drawn.number(self.phase)
                return torch.from_numpy(np.random.default_rng([0, self.phase, number]).standard_normal(like.shape))
            return torch.from_numpy(self.next_drawn("normal", tuple(like.shape)))

        def permutation(self, count) -> Tensor:
            """IL2A's mixtures."""
            return torch.from_numpy(self.next_drawn("randperm", (count,)))

        def beta(self, count) -> Tensor:
            return torch.from_numpy(self.next_drawn("beta", (count,)))

        def next_drawn(self, name, shape):
            return measured.drawn.next(reference, self.phase, name, shape)

        def feature_batches(self, epoch, count):
            """FeTrIL's batches of rows of features."""
            batches = reference.batches(self.phase, 0)
            length = len(batches) // 2
            return (torch.tensor(rows) for rows in batches[epoch * length : (epoch + 1) * length])

        def train_head(self, features, targets) -> None:
            self.loss = self.watched(self.loss)
            super().train_head(features, targets)

        # What is seen

        def stages(self):
            for stage in super().stages():
                yield stage._replace(loss=self.watched(stage.loss or self.loss))

        def watched(self, loss_of: Callable) -> Callable:
            def watching(*arguments) -> Tensor:
                loss = loss_of(*arguments)
                measured.loss = float(loss.detach())
                return loss

            return watching

        def after_training(self) -> None:
            weight = getattr(self.network.head, "weight", None)
            before = None if weight is None else weight.detach().clone()
            super().after_training()
            seen = measured.phases[-1]
            steps = np.array(measured.steps).reshape(-1, 2)
            seen["loss"], seen["grad_norm"] = steps[:, 0], steps[:, 1]
            if before is not None and before.shape == self.network.head.weight.shape:
                seen["gamma"] = (self.network.head.weight[-1].norm() / before[-1].norm()).detach().numpy()[None]

    return Fed


@dataclass
class FedRun(Run):
    """A run whose batches are those of PyCIL's run, and whose predictions of test images are noted."""

    reference: Reference = None
    pictures: Pictures = None
    measured: Measured = None
    stage_number = 0

    def training_loader(self, stage: Stage, phase: int):
        loader, _ = super().training_loader(stage, phase)
        steps = stage.name != "fisher"
        batches = self.reference.batches(phase, self.stage_number if steps else -1)
        epochs = stage.schedule.epochs if steps else 1
        self.stage_number += steps
        place = {self.pictures.numbers[item.image]: index for index, item in enumerate(stage.items)}
        theirs = {number for batch in batches for number in batch}
        if theirs != set(place):
            unlike = sorted(theirs ^ set(place))
            raise Unlike(f"phase {phase}, {stage.name}: pictures {unlike} are trained on by one of both alone")
        length, rest = divmod(len(batches), epochs)
        if rest or not length:
            raise Unlike(f"phase {phase}, {stage.name}: {epochs} epochs, PyCIL has {len(batches)} steps")
        indices = [[place[number] for number in batch] for batch in batches]
        sampler = GivenBatches([indices[e * length : (e + 1) * length] for e in range(epochs)], stage.views)
        return batch_loader(loader.dataset, sampler), sampler

    def predict(self, network: nn.Module, images: Sequence[Path], description: str = ""):
        outputs = super().predict(network, images, description)
        if description.endswith(", evaluating"):
            self.measured.phases[-1]["logits"] = outputs.logits.numpy()
        elif description.endswith(", evaluating the student"):
            self.measured.phases[-1]["snet_logits"] = outputs.logits.numpy()
        return outputs


class FedTrainer(Trainer):
    """The phases, with the fresh rows of heads that have just grown given."""

    run: FedRun

    def start_phase(self, phase: int) -> None:
        self.run.stage_number = 0
        self.run.measured.steps.clear()
        self.run.measured.phases.append({})
        super().start_phase(phase)

    @torch.no_grad()
    def grow(self, nb_new: int) -> None:
        super().grow(nb_new)
        network, old, name = self.method.network, self.method.nb_old, self.run.reference.method
        weight = self.given("init/fc.weight")
        if name in ("acil", "ds-al"):
            if old == 0:
                network.head.weight.copy_(initial_weight("Linear.weight", network.head.weight.shape))
                network.projection.copy_(initial_weight("Linear.weight", network.projection.shape))
        elif name == "aper_finetune":
            if self.method.phase < 2:  # PyCIL makes two further heads in phase 1, of which the second is trained
                (fresh,) = network.learner.proxies
                number = 2 * self.method.phase
                fresh.copy_(initial_weight(f"CosineLinear.p{self.method.phase}.n{number}.weight", fresh.shape))
        elif name == "pass":
            network.head.weight[4 * old :] = weight[4 * old :]
        elif name == "beefiso":
            for ours, theirs in (("new_head", "new_fc"), ("forward_", "forward_prototypes")):
                getattr(network, ours).weight.copy_(self.given(f"init/{theirs}.weight"))
            if old > 0:
                network.backward_.weight.copy_(self.given("init/backward_prototypes.weight"))
        elif name in ("foster", "rmm-foster") and old > 0:
            student, pair = network.student, network.pair
            student.head.weight[old:] = self.given("init2/fc.weight")[old:]
            fill_around(pair.head.weight, weight, old, student.head.in_features)
            pair.aux_head.weight.copy_(self.given("init/fe_fc.weight"))
        elif hasattr(network.head, "proxies"):
            if old == 0 or name != "coil":  # Coil's own transport initialises later ones
                newest = network.head.proxies[-1]
                given = weight if weight is not None else self.given("init/fc.fc2.weight")
                newest.copy_(given[-len(newest) :])
        elif hasattr(network, "aux_head"):
            fill_around(network.head.weight, weight, old, weight.shape[1] - network.feature_dim)
            if network.aux_head is not None:
                network.aux_head.weight.copy_(self.given("init/aux_fc.weight"))
            if name == "tagfex":
                self.fill_tagfex(network, first=old == 0)
        else:
            network.head.weight[old:] = weight[old:]

    def fill_tagfex(self, network: nn.Module, *, first: bool) -> None:
        if first:
            for place in ("projector.0", "projector.2", "predictor"):
                network.get_submodule(place).weight.copy_(self.given(f"init/{place}.weight"))
        network.merged_head.weight.copy_(self.given("init/trans_classifier.weight"))
        names = {"query": "q", "key_ts": "k_ts", "key_ta": "k_ta", "value_ts": "v_ts", "value_ta": "v_ta"}
        for ours, theirs in names.items():
            getattr(network.merge, ours).copy_(self.given(f"init/ts_attn.weight_{theirs}"))

    def given(self, name: str) -> Tensor | None:
        array = self.run.reference.get(self.method.phase, name)
        return None if array is None else torch.from_numpy(array.astype(np.float64))

    def evaluate(self) -> dict[str, Any]:
        record = super().evaluate()
        seen, run = self.run.measured.phases[-1], self.run
        if self.method.uses_memory:
            seen["class_means"] = run.class_means(self.method.evaluated, range(self.method.nb_seen)).numpy()
            seen["exemplars"] = np.array([run.pictures.numbers[item.image] for item in run.memory.items()])
        return record


def fill_around(weight: Tensor, given: Tensor, rows: int, columns: int) -> None:
    """Everything but the block of old classes and old features."""
    old = weight.data[:rows, :columns].clone()
    weight.data.copy_(given)
    weight.data[:rows, :columns] = old


def config_of(reference: Reference, folder: Path) -> Config:
    """PyCIL's keys as they are; of what its module says only the length, the rate and the place of the one decay."""
    ignored = {"prefix", "seed", "device", "memory_size", "memory_per_class", "scheduler", "milestones", "weight_decay"}
    keys = all_keys([catalogue.methods()[reference.method]])
    ignored |= {"init_milestones", "init_weight_decay", "num_workers"}
    values = {key: value for key, value in reference.args.items() if key in keys and key not in ignored}
    first, later = (reference.get(phase, "lr") for phase in (0, 1))
    try:
        rate = reference.setting("lrate", "lr", "init_lr")
    except KeyError:  # ACIL's and APER's are not among the keys
        rate = float((later if len(later) else first)[0])
    values |= {
        **{"dataset": "CIFAR100", "batch_size": 8, "num_workers": 0, "device": "cpu", "cache": "none"},
        **{"epochs": 2, "init_epoch": 2, "ft_epochs": 2, "compression_epochs": 2, "lrate": rate},
        **{"init_lr": reference.constants.get("init_lr", reference.args.get("init_lr", float(first[0])))},
        **{"data_dir": str(folder), "output_dir": str(folder / "out"), "logger": ["csv"], "checkpoint_every": 0},
    }
    steps = reference.method in ("memo", "acil", "ds-al")
    if reference.method == "ssre":
        values["convnet_type"] = "little_rep"
    if ("milestones" in reference.constants and reference.method != "simplecil") or steps:
        values |= {"milestones": [1], "init_milestones": [1]}
    if reference.args.get("fixed_memory"):
        values |= {"memory_per_class": 4, "real_per_class": 4}
    elif METHODS[reference.method].uses_memory:
        values |= {"memory_size": reference.args["memory_size"], "real_per_class": 4}
    else:
        values["fixed_memory"] = True
    file = folder / f"{reference.name}.json"
    file.write_text(json.dumps(values))
    return load_config(file, methods=catalogue.methods(), backbones=catalogue.backbones())


@contextmanager
def float64() -> Iterator[None]:
    """One thread, so that sums have one order, and float64 for all that is made without saying of what type."""
    threads, dtype, level = torch.get_num_threads(), torch.get_default_dtype(), logging.root.manager.disable
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        logging.disable(level)


# Comparing


@dataclass
class Row:
    """The outcome of a run: worst relative difference by quantity (None where the file or the project has none)."""

    name: str
    differences: dict[str, float | None] = field(default_factory=dict)
    exemplars: str = "-"
    notes: list[str] = field(default_factory=list)
    first: str = ""

    @property
    def agrees(self) -> bool:
        return not self.first and bool(self.differences) and self.exemplars in ("-", "equal")


QUANTITIES = ("loss", "grad_norm", "logits", "snet_logits", "class_means", "gamma")


def relative(theirs: np.ndarray, ours: np.ndarray, *, each: bool) -> float:
    """The largest difference, in proportion to each number (losses), or to the largest number of the array."""
    if theirs.shape != ours.shape or not np.isfinite(ours).all():
        return np.inf
    scale = np.abs(theirs) if each else np.abs(theirs).max(initial=0.0)
    return float(np.max(np.abs(theirs - ours) / (scale + 1e-300), initial=0.0))


def compare_phase(row: Row, phase: int, reference: Reference, ours: Mapping[str, np.ndarray]) -> None:
    for name in QUANTITIES:
        theirs = reference.get(phase, name)
        if theirs is None or (name == "gamma" and reference.method == "foster"):
            continue
        if name not in ours:
            if name == "snet_logits":
                row.first = row.first or f"phase {phase}: no {name}"
                row.differences[name] = np.inf
            continue
        worst = relative(theirs, ours[name], each=name in ("loss", "grad_norm"))
        row.differences[name] = max(row.differences.get(name) or 0.0, worst)
        limit = MEANS_TOLERANCE if name == "class_means" else TOLERANCE
        if worst > limit and not row.first:
            row.first = f"phase {phase}: {name} {worst:.1e}"
            if theirs.shape != ours[name].shape:
                row.first = f"phase {phase}: {name} of shape {ours[name].shape}, PyCIL's {theirs.shape}"
            elif name in ("loss", "grad_norm"):
                at = np.flatnonzero(np.abs(theirs - ours[name]) > TOLERANCE * np.abs(theirs))[0]
                row.first += f", from step {at} on ({ours[name][at]:.6g}, PyCIL {theirs[at]:.6g})"
    theirs = reference.get(phase, "exemplars")
    if theirs is not None and "exemplars" in ours:
        same = theirs.tolist() == ours["exemplars"].tolist()
        row.exemplars = "equal" if same and row.exemplars != "differ" else "differ"
        if not same and not row.first:
            row.first = f"phase {phase}: exemplars differ"


def compare(arrays: Mapping[str, np.ndarray], name: str, pictures: Pictures) -> Row:
    """Repeat a run and compare it."""
    reference, row, measured = Reference(arrays, name), Row(name), Measured()
    phases, reason = reference.compared
    if reason:
        row.notes.append(f"{reason}; {phases} of {len(reference.sizes)} phases compared")
    with float64(), tempfile.TemporaryDirectory() as scratch:
        hook = register_optimizer_step_pre_hook(measured.on_step)
        try:
            train(reference, pictures, measured, Path(scratch))
        except Unlike as unlike:
            row.first = str(unlike)
        finally:
            hook.remove()
    first, row.first = row.first, ""
    for phase, ours in enumerate(measured.phases[:phases]):
        if ours:
            compare_phase(row, phase, reference, ours)
    row.first = row.first or (first if not reason else "")
    return row


def train(reference: Reference, pictures: Pictures, measured: Measured, scratch: Path) -> None:
    with mock.patch.dict(BACKBONES, OTHER_BACKBONES):
        train_with(config_of(reference, scratch), reference, pictures, measured, scratch)


def train_with(config: Config, reference: Reference, pictures: Pictures, measured: Measured, scratch: Path) -> None:
    sizes = {"init_cls": config.init_cls, "increment": config.increment}
    data = StillData(pictures.paths, shuffle=False, seed=0, **sizes)
    total = None if config.fixed_memory else config.memory_size
    memory = ExemplarMemory(
        pictures.paths,
        [("real", config.real_per_class)],
        {"real": Cost(None, pictures.paths)},
        config.memory_per_class,
        1,
        total=total,
    )
    folders = (scratch / "checkpoints", scratch / "phase0")
    given = {"reference": reference, "pictures": pictures, "measured": measured}
    run = FedRun(config, data, memory, launch("cpu", 1), *folders, **given)
    FedTrainer(fed(METHODS[reference.method], reference, pictures, measured), run).fit()


def print_row(cells: Sequence[str], last: str) -> None:
    print("".join(f"{cell:<{width}}" for cell, width in zip(cells, (15, *[10] * 6, 11), strict=True)), last, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pycil_parity.py", description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.npz")
    parser.add_argument("--methods", default="", help="runs of the file, comma-separated; all where left out")
    asked = parser.parse_args(argv)
    arrays = {name: array for file in asked.files for name, array in np.load(file).items()}
    there = runs_of(arrays)
    names = [name for name in asked.methods.split(",") if name] or there
    if unknown := sorted(set(names) - set(there)):
        print(f"error: {asked.files[0]} has no {', '.join(unknown)}; it has {', '.join(there)}.", file=sys.stderr)
        return 2
    print_row(["run", "losses", "gradients", "logits", "student", "means", "gamma", "exemplars"], "")
    all_agree = True
    with tempfile.TemporaryDirectory() as folder:
        pictures = Pictures.write(arrays, Path(folder))
        for name in names:
            if Reference(arrays, name).method not in METHODS:
                print(f"{name:<15}not in the project")
                continue
            row = compare(arrays, name, pictures)
            all_agree &= row.agrees
            numbers = [row.differences.get(quantity) for quantity in QUANTITIES]
            cells = ["-" if number is None else f"{number:.1e}" for number in numbers]
            verdict = "; ".join(["agrees" if row.agrees else f"DIFFERS: {row.first}", *row.notes])
            print_row([name, *cells, row.exemplars], verdict)
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
