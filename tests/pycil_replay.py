"""PyCIL's run repeated by the project's own method: what is random or measured there is given, the rest is computed."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from compress.training.exemplars import Cost
from convs import BACKBONES, Backbone
from models import catalogue
from models.training.method import Method
from models.training.run import Run
from models.training.stages import Stage
from models.training.trainer import Trainer
from tests.methods import METHODS
from tests.pycil_reference import Pictures, Reference, initial_weight, pycil_name
from utils.config.read import load_config
from utils.config.schema import Config, all_keys
from utils.data.augment import SmallTest
from utils.data.batches import batch_loader
from utils.data.classes import DataManager
from utils.devices import launch
from utils.memory.exemplars import ExemplarMemory

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
SAMPLES_OF_CIFAR100 = 500
"""What PyCIL's FOSTER and RMM take for the number of a new class's images where the dataset is called cifar100."""
OTHER_BACKBONES = {"little_rep": Backbone("basic", depths=(1, 1), widths=(64, 128), extra="adapters")}
"""little_rep: what SSRE was measured on."""


class Unlike(Exception):
    """The run can't go on: it trains on other pictures than PyCIL's."""


class Compared(Exception):
    """All phases that are compared are done."""


class Still(SmallTest):
    """The test transform in place of augmentation."""

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray | None = None) -> Tensor:
        return super().__call__(pictures)


class StillData(DataManager):
    """Pictures in training as in tests, in float64."""

    def defaults_with(self, augmentation):
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
        normalise = lambda images: (images.double() / 255 - mean) / std  # noqa: E731
        return replace(super().defaults_with(augmentation), train_transform=Still(), normalise=normalise)


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

        @classmethod
        def build_network(cls, new_backbone, config):
            def given_backbone():
                backbone = new_backbone()
                for name, parameter in backbone.named_parameters():
                    parameter.data.copy_(initial_weight(pycil_name(name, config.convnet_type), parameter.shape))
                return backbone

            return super().build_network(given_backbone, config)

        def image_counts(self, items) -> Tensor:
            """FOSTER's: PyCIL has a constant in place of the new classes' images where the dataset is "cifar100"."""
            counts = super().image_counts(items)
            if reference.args["dataset"] == "cifar100" and reference.name != "foster_counts":
                counts[self.nb_old :] = SAMPLES_OF_CIFAR100
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

    def predict(self, network: nn.Module, images: Sequence[Path], description: str = "", loader=None):
        outputs = super().predict(network, images, description, loader)
        if description.endswith(", evaluating"):
            self.measured.phases[-1]["logits"] = outputs.logits.numpy()
        elif description.endswith(", evaluating the student"):
            self.measured.phases[-1]["snet_logits"] = outputs.logits.numpy()
        return outputs


class FedTrainer(Trainer):
    """The phases, with the fresh rows of heads that have just grown given."""

    run: FedRun

    def start_phase(self, phase: int) -> None:
        if phase == self.run.reference.compared[0]:
            raise Compared
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
    run = FedRun(config, data, launch("cpu"), memory, *folders, **given)
    FedTrainer(fed(METHODS[reference.method], reference, pictures, measured), run).fit()
