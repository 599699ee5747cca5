"""A run's history, written while it is made: epochs.csv and TensorBoard's event files, in the folder of one seed.

    epochs.csv                               one row an epoch: phase, stage, epoch (counted from 1 through all stages of
                                             the phase), learning_rate, loss, train_accuracy (percent), seconds
    events.out.tfevents.<...>.phase<NN>      the same as curves over all epochs of the run (train/...), and what the
                                             phase came to as curves over phases (cnn/..., nme/..., memory/...)

Look at the curves with `tensorboard --logdir <output_dir>`.  A phase whose network of phase 0 was reused has no epochs.
A run that goes on after it was killed repeats epochs; their rows and events are replaced, so that each is there once.
"""

import csv
import hashlib
import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.files import write_csv
from utils.results.records import Phase

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

_CURVES = ("learning_rate", "loss", "train_accuracy", "seconds")
COLUMNS = ("phase", "stage", "epoch", *_CURVES)


class History:
    """What one seed's run writes down after each epoch and each phase.  For one process of a run alone.

    folder: of this seed's results, where an earlier part of the run may have left its history; loggers: as in the
    config.  Raises UserError for an epochs.csv that is not of this kind, and as `check_loggers` does.
    """

    def __init__(self, folder: Path, *, loggers: Sequence[str] = ("tensorboard",)):
        check_loggers(loggers)
        self.folder = folder
        self.tensorboard = "tensorboard" in loggers
        self.path = folder / "epochs.csv"
        self._wandb = _wandb_logger(folder) if "wandb" in loggers else None
        self._step = 0  # the last epoch's
        self.rows = self._read()
        self._phase: int | None = None  # whose event file is open
        self._events: EventsWriter | None = None

    def add_epoch(self, phase: int, stage: str, epoch: int, step: int, figures: Mapping[str, float]) -> None:
        """Add an epoch, in place of itself and of all later ones that an interrupted run has left.

        epoch: from 1, counted through the stages of the phase; step: from 1, counted through all phases; figures:
        learning_rate, loss, train_accuracy (percent), seconds.
        """
        self.rows = [row for row in self.rows if (int(row["phase"]), int(row["epoch"])) < (phase, epoch)]
        row = {"phase": str(phase), "stage": stage, "epoch": str(epoch)}
        row |= {key: f"{figures[key]:{'.3f' if key == 'seconds' else '.6g'}}" for key in _CURVES}
        self._step = step
        self._log(phase, step, _curves_of(row), first_step=step - epoch)
        self.rows.append(row)
        self._write()

    def add_phase(self, record: Phase) -> None:
        """Add what a finished phase came to."""
        phase = record.phase
        if any(int(row["phase"]) > phase for row in self.rows):
            self.rows = [row for row in self.rows if int(row["phase"]) <= phase]
            self._write()
        seconds, memory = record.seconds.to_json(), record.memory
        figures = {f"seconds/{key}": value for key, value in seconds.items()}
        figures |= {"memory/units": memory.units_total, "memory/bytes": memory.bytes_total}
        figures |= {"network/parameters": record.parameters}
        for name, metrics in (("cnn", record.cnn), ("nme", record.nme)):
            figures |= {f"{name}/{key}": getattr(metrics, key, None) for key in ("top1", "top5", "old", "new")}
        self._log(phase, phase, {tag: value for tag, value in figures.items() if value is not None})
        self.close()

    def _log(self, phase: int, step: int, values: Mapping[str, float], first_step: int = 0) -> None:
        """step: of the curves; first_step: that of the phase's first epoch, less one."""
        if self._wandb:
            self._wandb.log_metrics({**values, "phase": phase}, step=self._step)
        if self.tensorboard:
            self._open(phase, first_step)
            self._add(step, values)

    def close(self) -> None:
        """Close the event file that is being written, if there is one."""
        if self._events is not None:
            self._events.close()
        self._events = self._phase = None

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            known = tuple(rows.fieldnames or ()) == COLUMNS
            content = list(rows)
        places = [row.get(key) or "" for row in content for key in ("phase", "epoch")]
        if not known or not all(place.isdecimal() for place in places):
            raise UserError(f"{self.path} is not as this program writes it. Move it elsewhere, or delete it.")
        return content

    def _write(self) -> None:
        write_csv(self.path, COLUMNS, [list(row.values()) for row in self.rows])

    def _open(self, phase: int, first_step: int) -> None:
        """Begin a phase's event file, unless it is open, with those of its epochs that are behind already."""
        if self._phase == phase:
            return
        # Synchronous, unlike SummaryWriter: no thread and no queue that the data loader's processes would inherit.
        from tensorboardX.event_file_writer import EventsWriter

        self.close()
        for file in self.folder.glob("events.out.tfevents.*.phase*"):
            if int(file.name.rpartition(".phase")[2]) >= phase:
                file.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._events, self._phase = EventsWriter(str(self.folder / "events"), f".phase{phase:02d}"), phase
        for row in self.rows:
            if int(row["phase"]) == phase:
                self._add(first_step + int(row["epoch"]), _curves_of(row))

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        assert self._events is not None, "opened"
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for tag, value in values.items():
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(tag, value)))
        self._events.flush()


def _curves_of(row: Mapping[str, str]) -> dict[str, float]:
    return {f"train/{key}": float(row[key]) for key in _CURVES}


def check_loggers(loggers: Sequence[str]) -> None:
    """Raises UserError where a package is missing that they need."""
    packages = {"tensorboard": ("tensorboardX", "-r requirements.txt"), "wandb": ("wandb", "wandb")}
    for name in filter(packages.get, loggers):
        package, source = packages[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"logger: {name} needs the package {package}: pip install {source}, or leave it out.")


def _wandb_logger(folder: Path):
    """Lightning's, for a run whose identity is its folder's, so that a run that goes on adds to its curves."""
    import torchvision_compat  # noqa: F401, I001  (before Lightning)
    from pytorch_lightning.loggers import WandbLogger

    identity = hashlib.sha256(str(folder.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    project = os.environ.get("WANDB_PROJECT", "escort")
    name = f"{folder.parent.name}-{folder.name}"
    return WandbLogger(name=name, save_dir=str(folder), id=identity, project=project, resume="allow")
