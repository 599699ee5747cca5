"""The output folder of an experiment: whose it is, and the results of its class orders, whichever process made them."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import ArrayLike

from utils.config.read import read_json
from utils.config.schema import Config, as_dict, differences
from utils.errors import UserError
from utils.files import write_csv, write_json
from utils.results.records import CLASSIFIERS, Classifier, ClassOrder, ResultsFile, read_results

PHASE_COLUMNS = (
    *("seed", "phase", "classes_seen"),
    *(f"{classifier}_{key}" for classifier in ("cnn", "nme") for key in ("top1", "top5", "old", "new")),
    *("units", "bytes", "parameters", "loss", "train_accuracy", "train_seconds", "seconds"),
)
"""Of phases.csv.  Accuracies in percent; units and bytes of the exemplar memory; loss and train_accuracy of the last
training epoch; seconds of training and of the whole phase."""


class Output:
    """The folder of one experiment's results.  Several processes may work in it, each on class orders of its own.

    config: the checked config; folder: its output_dir; draw: writes the folder's page, once all class orders of the
    config are finished.  Raises UserError where the folder holds results of another experiment or can't be written to.
    """

    def __init__(self, config: Config, folder: Path, draw: Callable[[Path], None] | None = None):
        self.config, self.folder, self.draw = config, folder, draw
        before = _read_if_there(read_json, folder / "config.json")
        if before is not None and any(folder.glob("seed*/checkpoints/*.pt")):  # else nothing would be lost
            self._refuse_another(before)
        self._orders()  # which remain where the checkpoints have been deleted

    def claim(self) -> None:
        """Make the folder, with the config as used."""
        try:
            write_json(self.folder / "config.json", as_dict(self.config))
        except OSError as error:
            raise UserError(f"output_dir: {self.folder} can't be written to ({error.strerror}).") from None

    @contextmanager
    def working_on(self, seed: int, *, alone: bool = True) -> Iterator[None]:
        """Keep other runs from working on the same class order.  Raises UserError where one does already.

        alone: false for the processes of a run but the first, which does it for all.
        """
        if not alone:
            yield
            return
        folder = seed_folder(self.folder, seed)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(folder / ".lock").acquire(blocking=False)
        except Timeout:
            raise UserError(f"another process is working on seed {seed} in {self.folder}.") from None
        with lock:
            yield

    def write(self, order: ClassOrder) -> ResultsFile:
        """Put a class order in its place in results.json, beside the others.  Returns the new content of results.json.

        The confusion matrices of classifiers that all its phases have become files of their own.
        """
        for classifier in CLASSIFIERS:
            metrics = [phase.classifiers.get(classifier) for phase in order.phases]
            matrices = [each.confusion for each in metrics if each and each.confusion is not None]
            if len(matrices) == len(metrics):
                for phase, matrix in enumerate(matrices):
                    path = confusion_file(self.folder, order.seed, phase, classifier)
                    write_confusion(path, matrix, order.class_names)
        with FileLock(self.folder / ".results.lock"):
            others = [other for other in self._orders() if other.seed != order.seed]
            orders = sorted([*others, order], key=lambda one: one.seed)
            content = ResultsFile.of({**as_dict(self.config), "seed": [one.seed for one in orders]}, orders)
            write_json(self.folder / "results.json", content.to_json())
            write_phases(self.folder / "phases.csv", orders)
            if self.draw and {one.seed for one in orders if one.finished} >= set(self.config.seed):
                self.draw(self.folder)
        return content

    def _orders(self) -> list[ClassOrder]:
        """Those of results.json.  Raises UserError where they are of another experiment."""
        content: ResultsFile | None = _read_if_there(read_results, self.folder / "results.json")
        if not content or not content.runs:
            return []
        self._refuse_another(content.config)
        return content.runs

    def _refuse_another(self, before: Mapping[str, Any]) -> None:
        """Raises UserError where the config of what is in the folder differs from this experiment's."""
        if differing := differences(self.config, before):
            more = f"; {len(differing) - 4} more" if len(differing) > 4 else ""
            folder = self.folder if self.folder.name not in ("", "..") else self.folder.resolve()
            names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
            free = next(name for name in names if not name.exists())
            raise UserError(
                f"{self.folder} holds another experiment ({'; '.join(differing[:4])}{more}). "
                f"Choose another output_dir, such as {free}."
            )


def _read_if_there(read: Callable[[Path], Any], file: Path) -> Any:
    """What a file holds that a run has written, None where there is none."""
    try:
        return read(file) if file.is_file() else None
    except UserError as error:
        raise UserError(f"{error} Choose another output_dir, or delete that file.") from None


def confusion_file(folder: Path, seed: int, phase: int, classifier: Classifier) -> Path:
    """In a run's folder; the head's has no name of a classifier."""
    suffix = "" if classifier == "cnn" else f"_{classifier}"
    return seed_folder(folder, seed) / f"confusion_phase{phase:02d}{suffix}.csv"


def write_confusion(path: Path, confusion: ArrayLike, class_names: Sequence[str]) -> None:
    """A confusion matrix as CSV: a row a true class, a column a predicted one, counts of test images."""
    rows = np.asarray(confusion).tolist()
    names = list(class_names[: len(rows)])
    write_csv(path, ["true \\ predicted", *names], [[name, *row] for name, row in zip(names, rows, strict=True)])


def write_phases(path: Path, orders: Sequence[ClassOrder]) -> None:
    """phases.csv: the figures of results.json for a spreadsheet, a row a phase."""
    rows = []
    for order in orders:
        for phase in order.phases:
            keys = ("top1", "top5", "old", "new")
            accuracies = [getattr(metrics, key, None) for metrics in (phase.cnn, phase.nme) for key in keys]
            memory, training, seconds = phase.memory, phase.training, phase.seconds
            row = [order.seed, phase.phase, phase.classes_seen, *accuracies, memory.units_total, memory.bytes_total]
            rows.append([*row, phase.parameters, training.loss, training.accuracy, seconds.train, seconds.total])
    write_csv(path, PHASE_COLUMNS, rows)


def check_is_run(folder: Path) -> None:
    """Raises UserError for what is no run's output folder."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run's output folder: it has no config.json.")


def seed_folder(folder: Path, seed: int) -> Path:
    """Where a class order's history and checkpoints are, in its experiment's folder."""
    return folder / f"seed{seed}"
