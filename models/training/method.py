"""What a method may change: its network, its loss, and what happens before and after phases, stages and steps.

A method is a subclass of `Method` in a file of its own: `class ICaRL(Method, name="icarl")`.  Config keys of its own
are the fields of a dataclass `Settings` at the top of that file.

Everything in a phase but the optimisation steps is done again when a run goes on in the middle of it.  It must depend
on nothing but the config, the data, the memory, the state after the phase before (`network`, `state`), and what
`within_phase` keeps.
"""

import abc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from convs import LIBRARIES
from convs.blocks import FeatureExtractor
from convs.library import library_backbone, library_input
from convs.resnet import build_backbone
from models.networks import ClassifierNet, GrowingNet, IncrementalNet, NewBackbone, Outputs
from models.training.run import Run
from models.training.stages import Defaults, Schedule, Stage
from utils.config.schema import Config
from utils.data.classes import Item, PhasedClasses
from utils.data.datasets import Augmentation, NetworkInput
from utils.errors import UserError


# longer than usual: one hook for each thing that a method may change, most of them of one line
class Method(abc.ABC):
    """A method in a run.

    run: what it has.  `network` is what it trains.  `phase` is the present one, with classes 0 ... nb_old - 1 from
    earlier phases and nb_new new ones, nb_seen in all.  `epoch` and `step` are those of the present stage and epoch,
    `images_in_step` the images of that step, over all parts and processes, before `prepare`.
    """

    network: GrowingNet
    old_network: GrowingNet | None = None
    name: ClassVar[str] = ""
    """What a config's `model_name` calls the method."""
    defaults: ClassVar[Defaults]
    """The method's own schedule, for the keys that the config leaves null."""
    uses_memory: ClassVar[bool] = True
    """Whether exemplars are kept."""
    least_exemplars: ClassVar[int] = 1
    """How many exemplars of each class the method needs."""
    keeps_old_network: ClassVar[bool] = False
    """Whether the network as it was before a phase is kept, frozen, as `old_network`."""
    plain_phase_0: ClassVar[bool] = True
    """Whether phase 0 is a backbone and a linear head, trained by cross-entropy: all such methods share one network."""
    phase_0_keys: ClassVar[Sequence[str]] = ()
    """The method's own config keys that the trained network of phase 0 depends on."""
    needs_stages: ClassVar[bool] = False
    """Whether the method reads or cuts the stages of a ResNet, so that backbones of libraries won't do."""
    reads_old_images: ClassVar[bool] = False
    """Whether later phases train on images of old classes that are no exemplars."""
    stem: ClassVar[str | None] = None
    """The backbone's stem for large images, where the method has one of its own."""

    def __init_subclass__(cls, name: str | None = None, **options: Any):
        super().__init_subclass__(**options)
        cls.name = name or cls.name

    def __init__(self, run: Run):
        self.run = run
        self.config, self.settings = run.config, run.config.settings
        self.data, self.memory, self.fabric = run.data, run.memory, run.fabric
        self.phase = -1
        self.nb_old = self.nb_new = self.nb_seen = 0
        self.epoch = self.step = 0
        self.images_in_step = 1
        self.state: dict[str, Any] = {}
        """What is carried on to the next phase: tensors and plain values, changed in `after_training` alone."""
        self.within_phase: dict[str, Any] = {}
        """What training has worked out and a restart within the phase needs: tensors and plain values."""
        run.seed_torch(0)
        self.network = self.fresh_network(run.config, run.data)

    # The network

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> GrowingNet:
        """The network around a fresh backbone, before it knows any class."""
        return IncrementalNet(new_backbone())

    @classmethod
    def fresh_network(cls, config: Config, data: PhasedClasses, *, weights: bool = True) -> GrowingNet:
        """`build_network`'s.  weights: as for `fresh_backbone`."""
        return cls.build_network(lambda: fresh_backbone(config, data, cls.stem, weights=weights), config)

    @classmethod
    def trained_network(cls, config: Config, data: PhasedClasses, state: Mapping[str, Any]) -> GrowingNet:
        """The network of a finished phase, from its checkpoint, on the CPU."""
        network = cls.fresh_network(config, data, weights=False)
        load_network(network, data, state)
        return network

    # Hooks

    @abc.abstractmethod
    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of some images, a scalar.  images: B x 3 x H x W; targets: B, of 0 ... nb_seen - 1.

        A batch may be processed in parts (`accumulate_batches`), so it must be a mean over images, each by itself.
        """

    def stages(self) -> Iterable[Stage]:
        """How the present phase is trained.  By default one stage: the new classes' images and the exemplars.

        In a generator, the code after a `yield` runs when that stage is done.
        """
        items = [*self.new_items(), *self.memory.items()]
        return [Stage("training", items, self.schedule(), augmentation=self.augmentation)]

    def new_items(self) -> list[Item]:
        """The new classes' images that are trained on; by default all of them."""
        return self.data.new_items(self.phase)

    def before_training(self) -> None:
        """Called when the network has grown for a phase."""

    def before_stage(self, stage: Stage) -> None:
        """Called before each stage."""

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The method's own augmentation, of a batch or a part of one; may return more of both, as rotations.

        images: B x 3 x H x W, normalised; targets: B.
        """
        return images, targets

    def before_batch(self) -> None:
        """Called before a batch's forward passes; the network is in training mode."""

    def before_step(self) -> None:
        """Called when a batch's gradients are complete, the same in all processes; the optimizer's step comes next."""

    def after_training(self) -> None:
        """Called after a phase's training, before exemplars are chosen and the phase is evaluated."""

    def exemplar_units(self, target: int) -> float | None:
        """Units of the memory that a new class gets, where all classes share it; None for an equal share."""
        return None

    def further_scores(self, images: Sequence[Path], outputs: Outputs) -> dict[str, Tensor]:
        """Scores (N x nb_seen) of further classifiers, by their keys in `utils.results.records.CLASSIFIERS`.

        images: the N test images of all classes seen; outputs: of `evaluated` for them, on the CPU.
        """
        return {}

    def class_means(self) -> Tensor | None:
        """Those of the nearest-mean classifier, of unit length, nb_seen x D: by default of the exemplars; or None."""
        if not self.uses_memory:
            return None
        return self.run.class_means(self.evaluated, range(self.nb_seen), self.describe("class means"))

    @property
    def augmentation(self) -> Augmentation | None:
        """How the present phase's training images are augmented; None: as the config says."""
        return None

    # For their use

    @property
    def evaluated(self) -> ClassifierNet:
        """The network that predicts, chooses exemplars, and whose parameters are counted."""
        return self.network.evaluated

    def schedule(self, *, as_phase_0: bool = False) -> Schedule:
        """The present phase's, from the config and `defaults`."""
        return self.defaults.schedule(self.config, phase_0=as_phase_0 or self.phase == 0)

    def old_outputs(self, images: Tensor) -> Outputs:
        """The outputs of the frozen network of before this phase: logits are B x nb_old."""
        assert self.old_network is not None
        with torch.no_grad(), self.fabric.autocast():
            return self.old_network(images)

    def old_logits(self, images: Tensor) -> Tensor:
        """B x nb_old."""
        return self.old_outputs(images).logits

    def new_features(self, purpose: str) -> list[Tensor]:
        """Features of all images of each of the phase's new classes, N x D each.  purpose: for the progress bar."""
        images = [self.data.train_images(target) for target in self.data.phase_targets(self.phase)]
        return list(self.run.features(self.network, images, self.describe(purpose)))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the network and `state` of a finished phase, from its checkpoint."""
        load_network(self.network, self.data, state)
        self.run.network_to_device(self.network)
        self.state = state["method"]

    def describe(self, purpose: str) -> str:
        """Such as "phase 1 (2 of 3), evaluating"."""
        return f"phase {self.phase} ({self.phase + 1} of {self.data.nb_phases}), {purpose}"


def load_network(network: GrowingNet, data: PhasedClasses, state: Mapping[str, Any]) -> None:
    """Fill a fresh network with the weights of a finished phase.  state: its checkpoint."""
    for phase in range(state["phase"] + 1):
        network.grow(len(data.phase_targets(phase)))
    network.load_state_dict(state["network"])


def fresh_backbone(
    c: Config, data: PhasedClasses, stem: str | None = None, *, weights: bool = True
) -> FeatureExtractor:
    """A run's backbone before training.  Raises UserError where pretrained weights are asked for and not there.

    stem: for large images; None: 7x7 where all phases are equally large and 3x3 where phase 0 is larger, as PyCIL does;
    weights: whether pretrained weights are loaded, where the config asks for them.
    """
    backbone: FeatureExtractor
    try:
        if c.convnet_type.startswith(LIBRARIES):
            backbone = library_backbone(c.convnet_type, c.image_size, c.pretrained, weights)
        else:
            increments = c.increment if isinstance(c.increment, list) else [c.increment]
            equal = all(increment == c.init_cls for increment in increments)
            stem = stem or ("7x7" if equal else "3x3")
            backbone = build_backbone(c.convnet_type, data.defaults.image_kind, stem, c.pretrained, weights)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{'pretrained' if c.pretrained else 'convnet_type'}: {error}.") from None
    return backbone.requires_grad_(not c.freeze_backbone)


def network_input(convnet_type: str, image_size: int | None) -> NetworkInput | None:
    """What a library's backbone takes; None for those whose input the dataset decides.  Raises UserError."""
    if not convnet_type.startswith(LIBRARIES):
        return None
    try:
        return library_input(convnet_type, image_size)
    except ValueError as error:
        raise UserError(f"convnet_type: {error}.") from None
