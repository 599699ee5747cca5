"""The classes of a run by phases, and the transforms that turn their pictures into a network's input."""

from collections.abc import Sequence
from functools import cached_property

from utils.data.datasets import (
    Augmentation,
    DatasetDefaults,
    NetworkInput,
    Resolution,
    dataset_defaults,
    default_resolution,
)


class PhasedClasses:
    """What a trained network's user needs to know of its data, without the data.

    dataset: its name; class_names: in the order in which they arrive; phase_starts: see the function of that name;
    picture_size: (width, height) of a typical picture; augmentation: of large pictures in training;
    network_input: where the backbone takes a size of its own.
    """

    def __init__(
        self,
        dataset: str,
        class_names: Sequence[str],
        starts: Sequence[int],
        picture_size: tuple[int, int],
        augmentation: Augmentation = "pescr",
        network_input: NetworkInput | None = None,
    ):
        self.dataset = dataset
        self.class_names = list(class_names)
        self.phase_starts = list(starts)
        self.picture_size = picture_size
        self.augmentation, self.network_input = augmentation, network_input

    @property
    def nb_classes(self) -> int:
        return len(self.class_names)

    @property
    def nb_phases(self) -> int:
        return len(self.phase_starts) - 1

    def phase_targets(self, phase: int) -> range:
        """The targets of the classes that are new in a phase (0, 1, ...)."""
        if not 0 <= phase < self.nb_phases:
            raise IndexError(f"phase {phase} of {self.nb_phases}")
        return range(self.phase_starts[phase], self.phase_starts[phase + 1])

    def seen_targets(self, phase: int) -> range:
        """The targets of all classes seen by the end of a phase."""
        return range(self.phase_targets(phase).stop)

    @property
    def resolution(self) -> Resolution:
        """The preset of compress/run.py."""
        return default_resolution(self.dataset, self.picture_size)

    @cached_property
    def defaults(self) -> DatasetDefaults:
        """What fits the dataset's name and the typical size of its pictures."""
        return self.defaults_with(self.augmentation)

    def defaults_with(self, augmentation: Augmentation) -> DatasetDefaults:
        return dataset_defaults(self.dataset, self.picture_size, augmentation, self.network_input)


def phase_starts(nb_classes: int, init_cls: int, increments: int | Sequence[int]) -> list[int]:
    """The number of classes seen before phase 0 (none), phase 1, ..., and after the last phase.

    increments: classes of each later phase; the last number of a list repeats, and the last phase has what is left.
    """
    increments = [increments] if isinstance(increments, int) else increments
    starts = [0, init_cls]
    while starts[-1] < nb_classes:
        size = increments[min(len(starts) - 2, len(increments) - 1)]
        starts.append(min(starts[-1] + size, nb_classes))
    return starts
